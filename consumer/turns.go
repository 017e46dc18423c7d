package consumer

import (
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/headgate-io/headgate/resilience"
)

const (
	// longestPark is for how long a message is set aside at once; then it is
	// asked again whether it still has to wait.
	longestPark = 10 * time.Minute

	// roundAbove is the distance from which messages are sent back in groups,
	// on whole seconds unless a creator is fast: the server looks at all that
	// wait each time that one is due. They come back up to a second early
	// and wait for their turn in the worker. Where there are many, it is done
	// with the closer ones, too.
	roundAbove = 10 * time.Second
	many       = 1000

	// hurryEvery is how often it is asked whether somebody waits for nothing.
	hurryEvery = 5 * time.Second
)

// park sends d back until its turn; zero: until c is released.
func (p *partition) park(c *creator, d *delivery, turn time.Time, own bool) {
	now := time.Now()
	p.notAlone(d)
	if !p.lease.holds(now) {
		// Its owner is another worker by now, which may be calling it.
		delete(p.here, d.seq)
		return
	}
	until := turn
	if until.IsZero() || until.After(d.expires) {
		until = d.expires // then it is a dead letter
	}
	if c.parked == nil {
		c.parked = make(map[uint64]*parked)
	}
	c.parked[d.seq] = &parked{
		id: strings.Clone(d.req.ID), reply: d.msg.Reply, kind: d.op.Kind, turn: until, record: d.record, own: own, why: d.why,
		unexplained: d.unexplained,
	}
	p.w.reply(d.msg.Reply, nakAfter(p.delay(c, d.op.Kind, until, now)))
	delete(p.here, d.seq)
}

// delay is for how long a message is set aside for a turn.
func (p *partition) delay(c *creator, kind resilience.Kind, turn, now time.Time) time.Duration {
	delay := min(turn.Sub(now), longestPark)
	if delay <= roundAbove && len(c.parked) < many {
		return delay
	}
	// As many as may wait here come back at once, and not more.
	pace := c.gate.Pace(kind)
	group := min(pace*time.Duration(mayWait(pace))/2, time.Second)
	if delay <= group {
		return delay
	}
	return now.Add(delay).Truncate(group).Sub(now)
}

// finish forgets a message that has been settled.
func (p *partition) finish(d *delivery) {
	p.mu.Lock()
	delete(p.here, d.seq)
	p.notAlone(d)
	p.mu.Unlock()
}

// atOnce lets a message go again as soon as its gate allows it.
func (p *partition) atOnce(c *creator, d *delivery) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.active {
		p.w.reply(d.msg.Reply, nakPayload)
		delete(p.here, d.seq)
		p.notAlone(d)
		return
	}
	d.call, d.waited, d.starved = nil, true, false
	p.admit(c, d, time.Now())
}

// again lets a message whose call failed come back after its backoff.
func (p *partition) again(c *creator, d *delivery, after time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d.why = resilience.Refusal{Reason: reasonBackoff, NotBefore: after}
	turn, own := after, true
	if hold := c.gate.Held(time.Now()); hold != nil {
		// It is first in line, at the end of the hold that it may have caused.
		at := c.gate.Turn(time.Now(), d.op.Kind, 0, rand.Float64())
		// What it waits for is the hold, and ends with it, unless its own backoff is
		// longer by more than chance.
		if at.IsZero() || !after.After(hold.Until.Add(d.op.Retry.Base)) {
			turn, own = at, false
			if !at.IsZero() && after.After(at) {
				turn = after
			}
			d.why = resilience.Refusal{Reason: resilience.ReasonHold, NotBefore: hold.Until, Hold: hold}
		}
	}
	p.park(c, d, turn, own)
}

// reasonBackoff is a request's own wait between two attempts. Gates do not know it.
const reasonBackoff resilience.Reason = "backoff"

// replan gives all who wait a new turn, because a hold has ended before its
// time or because the pace has changed. A second NAK on the reply that was
// kept moves a message to its new turn. Those in their own backoff keep it.
func (p *partition) replan(c *creator) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.active || p.creators[c.name] != c {
		return
	}
	c.gate.Replan()
	c.plans++
	plan := c.plans
	seqs := slices.Sorted(maps.Keys(c.parked))
	seqs = p.replanSome(c, seqs)
	if len(seqs) == 0 {
		return
	}
	// The first ones go on at once, however many there are.
	p.goes(func() {
		for len(seqs) > 0 {
			p.mu.Lock()
			if !p.active || c.plans != plan {
				p.mu.Unlock()
				return
			}
			seqs = p.replanSome(c, seqs)
			p.mu.Unlock()
		}
	})
}

// replanSome gives the first of seqs their new turns and returns the rest.
func (p *partition) replanSome(c *creator, seqs []uint64) (rest []uint64) {
	some := seqs[:min(len(seqs), 2*nearest)]
	now := time.Now()
	for _, seq := range some {
		k := c.parked[seq]
		if k == nil || k.own {
			continue
		}
		k.turn = c.gate.Turn(now, k.kind, 0, 0)
		until := k.turn
		if until.IsZero() {
			until = now.Add(longestPark)
		}
		p.w.reply(k.reply, nakAfter(p.delay(c, k.kind, until, now)))
	}
	p.pumpLocked(c)
	return seqs[len(some):]
}

// hurry gives new turns to those who wait although nothing keeps them from being
// called: turns are planned by the pace of the time when they are given, and an
// API that was slow then may be fast now, with nobody being called to notice.
func (p *partition) hurry(now time.Time) {
	var idle []*creator
	p.mu.Lock()
	for _, c := range p.creators {
		if len(c.parked) == 0 || len(c.waiting) > 0 || c.gate.InFlight() > 0 || c.gate.Held(now) != nil {
			continue
		}
		var first *parked
		for _, k := range c.parked {
			if !k.own && (first == nil || k.turn.Before(first.turn)) {
				first = k
			}
		}
		if first == nil || first.turn.Sub(now) <= nearTurn {
			continue
		}
		// Tokens of the account are leased for those who wait here: nobody does.
		if no, refused := c.gate.Look(now, first.kind); !refused || no.Reason == resilience.ReasonAccount {
			idle = append(idle, c)
		}
	}
	p.mu.Unlock()
	for _, c := range idle {
		c.gate.Unlearn()
		p.replan(c)
	}
}

// replanAll is replan for every creator.
func (p *partition) replanAll() {
	p.mu.Lock()
	all := slices.Collect(maps.Values(p.creators))
	p.mu.Unlock()
	for _, c := range all {
		p.replan(c)
	}
}
