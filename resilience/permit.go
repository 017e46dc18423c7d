package resilience

import "time"

// Permit is the right to make one call. End must be called when the call has
// ended and Close when the request is settled, once each and in this order.
type Permit struct {
	gate     *Gate
	call     int64 // of all calls, which one
	started  time.Time
	placed   bool    // it has one of the worker's calls in flight
	breaker  *ticket // this call probes the creator's breaker
	outage   bool    // and this the provider's
	account  *probe  // the account's hold
	provider *probe  // the provider's
}

// Started is when the permit was given.
func (p Permit) Started() time.Time { return p.started }

// Valid is asked right before the call, after everything that took time since
// Admit. It is not ok if a hold has come meanwhile, whenever that hold
// began, or a breaker has opened: then the call must not be made, and End takes
// NotMade.
func (p Permit) Valid(now time.Time) (no Refusal, ok bool) {
	g := p.gate
	if h := g.gates.account.standing(now); h != nil {
		return Refusal{Reason: ReasonAccountHold, NotBefore: h.Until, Hold: h}, false
	}
	if h := g.gates.provider.standing(now); h != nil {
		return Refusal{Reason: ReasonProviderHold, NotBefore: h.Until, Hold: h}, false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if h := g.holds.standing(now); h != nil {
		return Refusal{Reason: ReasonHold, NotBefore: h.Until, Hold: h}, false
	}
	if no, blocked := g.gates.outage.blocks(now, g.brk.trouble()); blocked && !p.outage {
		return no, false
	}
	if until, blocked := g.brk.blocks(now); blocked && p.breaker == nil {
		return Refusal{Reason: ReasonBreaker, NotBefore: until}, false
	}
	return Refusal{}, true
}

// Concurrency takes what an answer says about calls at once, before End: how many the
// API takes and has of this creator, 0 where it does not say, and whether
// it refused this one because there were too many. Slots are halved then, once
// for all that were under way, and come back one by one as calls succeed.
func (p Permit) Concurrency(now time.Time, limit, active int, refused bool) {
	g := p.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case refused && !p.started.Before(g.congested):
		g.slots = max(1, g.slots/2)
	case refused:
	case limit > 0 && (limit < g.slots || active >= limit):
		g.slots = min(g.slots, limit)
	default:
		return
	}
	g.congested, g.streak = now, 0
}

// Change is what a call's outcome did to the breakers.
type Change struct {
	Opened, Closed                 bool
	ProviderOpened, ProviderClosed bool
	OpenUntil                      time.Time // of the creator's, where it opened
}

// End gives back the creator's slot and tells the breakers how the call went.
// Holds that the answer asks for must be set before, or another call slips
// through in between.
func (p Permit) End(now time.Time, o Outcome) Change {
	g := p.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended(p, now, o)
	calling := g.gates.calling.Add(-1)

	g.gates.report(&g.gates.account, p.account, o)
	g.gates.report(&g.gates.provider, p.provider, o)
	c := g.judge(p, now, o, calling)
	if g.brk == nil && o.failed() {
		failures := g.gates.cfg.Breaker.Failures
		g.brk = newBreaker(g.gates.cfg.Breaker, func(consecutive uint32) bool { return int(consecutive) >= failures })
	}
	if g.brk != nil {
		c.Opened, c.Closed = g.brk.record(p.breaker, o)
		if c.Opened {
			c.OpenUntil = g.brk.openUntil
		}
		if c.Closed {
			g.drain(now)
		}
		if o == Success && g.brk.closed() {
			g.brk = nil
		}
	}
	return c
}

// judge tells the provider's breaker how the call went.
func (g *Gate) judge(p Permit, now time.Time, o Outcome, calling int64) (c Change) {
	out := &g.gates.outage
	out.heard(p.call)
	switch {
	case o == Success:
		closed, over := out.success()
		if over {
			g.gates.epoch.Add(1)
		}
		c.ProviderClosed = closed
	case o == Failed && (p.breaker == nil || p.outage):
		c.ProviderOpened = out.failure(g.creator, now, p.outage, g.gates.begun.Load(), calling)
	case p.outage && o == NotMade:
		out.unused(now)
	case p.outage && o == Excluded:
		out.unused(now.Add(firstProbe)) // the API answered, but not well enough to tell
	}
	return c
}

// ended gives the slot back and learns from the time that the call took.
func (g *Gate) ended(p Permit, now time.Time, o Outcome) {
	g.inFlight--
	if g.slow {
		g.gates.slow.Add(-1)
	}
	g.started = now // calls still in flight began before, and are measured from here
	if o == NotMade {
		return
	}
	took := now.Sub(p.started)
	if g.latency == 0 {
		g.latency = took
	}
	g.latency += (took - g.latency) / 4
	g.markSlow(g.gates.isSlow(took))
	g.gates.took(took)
	if o == Success && g.slots < g.limit && !p.started.Before(g.congested) {
		if g.streak++; g.streak >= g.slots {
			g.slots, g.streak = g.slots+1, 0
		}
	}
}

// giveBack undoes what was taken for a permit that is not given.
func (p Permit) giveBack(now time.Time) {
	g := p.gate
	g.gates.report(&g.gates.account, p.account, NotMade)
	g.gates.report(&g.gates.provider, p.provider, NotMade)
	if p.outage {
		g.gates.outage.unused(now)
	}
	if p.placed {
		g.gates.inFlight.Add(-1)
	}
}

// Close gives back the worker's place.
func (p Permit) Close() { p.gate.gates.inFlight.Add(-1) }
