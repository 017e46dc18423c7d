package consumer

import (
	"fmt"
	"runtime/debug"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/broker"
	"github.com/headgate-io/headgate/internal/failpoint"
	"github.com/headgate-io/headgate/internal/mutant"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// This file is the way of a request.
//
//	receive → take ─┬──────────────────────→ admit → work = attempt → settle
//	                └→ lookUp = explain ──┘    ↑              ↑
//	                                         place          decide

// receive takes a message from the server or, given nil, asks for more.
func (p *partition) receive(m *nats.Msg) {
	defer p.pull()
	if m == nil {
		return
	}
	now := time.Now()
	d, err := open(m, now)
	if err != nil {
		p.log.Error().Err(err).Msg("a delivery cannot be read; the server will send it again")
		return
	}
	d.lease = p.lease
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pending = d.pending
	p.numberedFrom(d.number, now)
	switch {
	case !p.active:
		p.server.reply(d.reply, nakPayload)
	case !p.lease.Valid(now):
		// Not at once, or it would come back at once, as long as the lease is in doubt.
		p.server.reply(d.reply, nakAfter(doubt))
	case p.here[d.seq] != nil:
		// Redelivered while it is being worked on: no second call, and no
		// answer, which would settle the first.
	default:
		p.take(d, now)
	}
}

// take finds the way of a request that is new here, or that comes back.
func (p *partition) take(d *delivery, now time.Time) {
	p.here[d.seq] = d
	defer func() {
		if r := recover(); r != nil {
			p.async(d, func() { p.panicked(d, r) })
		}
	}()
	p.caller.read(d)
	c := p.creator(d.req.Creator)
	c.here++
	d.counted = true
	if failpoint.Hit(failpoint.Received, "") != nil {
		p.forget(d) // as if it had been lost on its way
		return
	}
	back := p.unpark(c, d)
	switch {
	case p.elsewhere[c.name]:
		// Its outcome may be on its way: it is looked up when the former owner is done.
		p.park(c, d, &parked{unknown: true, why: resilience.Refusal{Reason: reasonElsewhere}})
	case back != nil:
		p.comeBack(c, d, back, now)
	case p.mustLookUp(d):
		d.enter(lookingUp)
		p.async(d, func() { p.lookUp(d) })
	case d.malformed != nil:
		p.async(d, func() {
			p.end(d, verdict{action: deadLetter, class: classify.MalformedRequest, reason: d.malformed.Error()})
		})
	default:
		p.admit(c, d, now)
	}
}

// mustLookUp reports whether the server is asked what became of a request before it is called: one
// that was delivered before, or may have been, one that was replayed by two commands that did not
// know of each other, and one that must not be called twice.
func (p *partition) mustLookUp(d *delivery) bool {
	return d.count > 1 || d.seq <= p.delivered || d.stored.Before(p.consumed) || d.op.NotIdempotent ||
		d.msg.Header.Get(publisher.HeaderReplay) != ""
}

// lookUp asks the server what became of a request, and goes on from there.
func (p *partition) lookUp(d *delivery) {
	found, err := p.settler.lookUp(d)
	if err != nil {
		p.retryAt(d, time.Now().Add(lookAgain), resilience.Refusal{Reason: reasonStorage}, true)
		return
	}
	d.adopt(found.record)
	now := time.Now()
	s := situation{
		source: d.source(), op: d.op, worker: p.settler.worker, malformed: d.malformed, now: now,
		unsent: p.settler.neverSent(d), alive: p.keeper.Alive,
	}
	p.mu.Lock()
	s.crashed = p.crashed && d.stored.Before(p.entered)
	if found.other != nil {
		s.otherHere = p.here[found.other.Source.Sequence] != nil
	}
	p.mu.Unlock()
	v, unexplained := explain(found, s)
	d.unexplained = unexplained
	switch v.action {
	case call:
	case postpone:
		p.retryAt(d, v.after, resilience.Refusal{Reason: reasonBackoff, NotBefore: v.after}, true)
		return
	default:
		p.conclude(d, v, found.stands)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.active {
		p.server.reply(d.reply, nakPayload)
		p.forget(d)
		return
	}
	p.admit(p.creator(d.req.Creator), d, now)
}

// admit calls d, or lets it wait.
func (p *partition) admit(c *creator, d *delivery, now time.Time) {
	d.enter(waiting)
	if !now.Before(d.expires) {
		p.async(d, func() { p.expired(d) })
		return
	}
	if !d.suspect() && (len(c.waiting) > 0 || c.behind(d)) {
		d.why = p.keeps(c, d, now)
		p.wait(c, d, now)
		return
	}
	permit, no, ok := p.mayCall(c, d, now, c.next)
	if ok {
		c.next = false
		p.start(d, permit)
		return
	}
	d.why = no
	p.wait(c, d, now)
	p.arm(c, no, now)
}

// start makes the call, in a goroutine that ends when the request is settled.
func (p *partition) start(d *delivery, permit resilience.Permit) {
	d.enter(calling)
	p.pass.started++
	p.spawn(func() {
		p.guarded(d, func() { p.perform(d, permit) })
	})
}

// perform calls and settles. The creator's slot is free as soon as the call has ended; the worker's
// place only when the request is settled, so that a server that cannot store results slows
// the worker down instead of filling its memory.
func (p *partition) perform(d *delivery, permit resilience.Permit) {
	defer p.shared.wake()
	defer permit.Close()
	e := p.attempt(d, permit)
	defer e.answer.Done() // its memory is used until it is stored
	p.ended(d, permit.End(time.Now(), e.health))
	defer p.settled(d)
	d.enter(settling)
	p.settle(d, e)
}

// settle does what was decided, and is the only place where a call's outcome is stored.
func (p *partition) settle(d *delivery, e ending) {
	switch e.action {
	case succeed:
		if mutant.On(mutant.AckBeforeStore) {
			p.settler.ack(d)
		}
		stands, err := p.settler.result(d, e)
		p.outcome(d, stands, err)
	case deadLetter:
		stands, err := p.settler.bury(d, e.verdict, e.failure, e.answer.Status)
		p.outcome(d, stands, err)
	case retry:
		if d.record.Due = nil; e.hold == nil { // a hold is known by itself, and may be released
			d.record.Due = &e.after
		}
		if p.settler.failedAttempt(d, e) != nil {
			p.leave(d)
			return
		}
		p.retryAt(d, e.after, resilience.Refusal{Reason: reasonBackoff, NotBefore: e.after}, false)
	case postpone:
		p.retryAt(d, e.after, resilience.Refusal{Reason: reasonBackoff, NotBefore: e.after}, false)
	case callAgain:
		p.readmit(d)
	default:
		p.leave(d)
	}
}

// conclude does what was decided of a request without calling it.
func (p *partition) conclude(d *delivery, v verdict, stands publisher.Outcome) {
	d.enter(settling)
	switch v.action {
	case acknowledge:
		p.settler.settledBefore(d, v.reason)
		p.acknowledge(d)
	case finishLetter:
		_, err := p.settler.finish(d, stands)
		p.outcome(d, stands, err)
	default:
		p.settle(d, ending{verdict: v, failure: classify.Failure{Class: v.class, Scope: classify.ScopeRequest}})
	}
}

// end is conclude where nothing stands in the request's place.
func (p *partition) end(d *delivery, v verdict) { p.conclude(d, v, publisher.Outcome{}) }

// outcome goes on after an outcome was stored, or was not.
func (p *partition) outcome(d *delivery, stands publisher.Outcome, err error) {
	switch {
	case err == nil:
		p.acknowledge(d)
	case errNotStored(err):
		// Its place in the worker is free for others meanwhile.
		p.retryAt(d, time.Now().Add(storeAgain), resilience.Refusal{Reason: reasonStorage}, true)
	case broker.TroubleOf(err) == broker.Never:
		line(p.log.Error(), d).Err(err).Msg("the server refuses its outcome for good; it is tried again every 10 minutes, and when the worker is started")
		p.retryAt(d, time.Now().Add(longestPark), resilience.Refusal{Reason: reasonStorage}, true)
	default:
		p.leave(d)
	}
}

// guarded runs f, which handles d. Should it panic, d becomes a dead letter, unless an
// outcome is on its way: then it is given back, and its outcome found.
func (p *partition) guarded(d *delivery, f func()) {
	defer func() {
		if r := recover(); r != nil {
			p.panicked(d, r)
		}
	}()
	f()
}

func (p *partition) panicked(d *delivery, r any) {
	p.log.Error().Str("request", d.req.ID).Interface("panic", r).Bytes("stack", debug.Stack()).Msg("handling a request panicked")
	if d.decided || d.panicked {
		p.leave(d)
		return
	}
	d.panicked = true
	class := classify.Internal
	if d.called && d.op.NotIdempotent && !d.op.RetryUncertain {
		class = classify.Uncertain
	}
	p.guarded(d, func() {
		p.end(d, verdict{action: deadLetter, class: class, reason: fmt.Sprintf("handling the request panicked: %v", r)})
	})
}

// expired makes a dead letter of a request that is too old to be called.
func (p *partition) expired(d *delivery) {
	reason := "too old to be called"
	if d.why.Reason != "" {
		reason += "; it waited for: " + string(d.why.Reason)
		if h := d.why.Hold; h != nil && h.Reason != "" {
			reason += " (" + h.Reason + ")"
		}
	}
	p.end(d, verdict{action: deadLetter, class: classify.Expired, reason: reason})
}
