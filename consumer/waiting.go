package consumer

import (
	"cmp"
	"slices"
	"time"

	"github.com/headgate-io/headgate/resilience"
)

// mayCall asks for everything that a call of d needs. turn: c was the first in line for what
// other creators use, and has not to queue up again.
func (p *partition) mayCall(c *creator, d *delivery, now time.Time, turn bool) (permit resilience.Permit, no resilience.Refusal, ok bool) {
	if no, refused := p.refuses(c, d, turn); refused {
		return permit, no, false
	}
	permit, no, ok = c.gate.Admit(now, d.op.Kind)
	if ok && d.suspect() && !p.shared.alone(d) {
		permit.End(now, resilience.Excluded)
		permit.Close()
		return permit, resilience.Refusal{Reason: reasonSuspect}, false
	}
	return permit, no, ok
}

// refuses looks at the reasons that gates do not know.
func (p *partition) refuses(c *creator, d *delivery, turn bool) (resilience.Refusal, bool) {
	switch {
	case p.elsewhere[c.name]:
		return resilience.Refusal{Reason: reasonElsewhere}, true
	case c.settling >= unsettledPerSlot*c.gate.Slots():
		return resilience.Refusal{Reason: reasonStorage, Hold: nil}, true
	case p.shared.stuck():
		return resilience.Refusal{Reason: reasonStorage}, true
	case d.suspect():
		if other := p.shared.suspect.Load(); other != nil && other != d {
			return resilience.Refusal{Reason: reasonSuspect}, true
		}
	}
	if !turn {
		if reason := p.shared.ahead(); reason != "" {
			return resilience.Refusal{Reason: reason}, true
		}
	}
	return resilience.Refusal{}, false
}

// keeps says what would keep d from being called now, without taking anything.
func (p *partition) keeps(c *creator, d *delivery, now time.Time) resilience.Refusal {
	// What keeps the creator at all comes first: it is not over when others have had their turn.
	if no, refused := c.gate.Look(now, d.op.Kind); refused && !shared(no.Reason) {
		return no
	}
	if no, refused := p.refuses(c, d, false); refused {
		return no
	}
	no, _ := c.gate.Look(now, d.op.Kind)
	return no
}

// wait lets d wait in the worker if its turn is near and there is room, otherwise
// at the server.
func (p *partition) wait(c *creator, d *delivery, now time.Time) {
	if d.suspect() {
		d.call = nil
		p.shared.memory.add(d)
		c.suspects = append(c.suspects, d)
		return
	}
	l := placing{
		refusal: d.why, now: now, ahead: len(c.waiting), behind: c.behind(d), slots: c.gate.Slots(),
		limit: p.limitOf(c, d.op.Kind, now), room: p.shared.memory.room(), passing: p.pass.on,
	}
	if !l.here() {
		p.park(c, d, &parked{why: d.why})
		return
	}
	if d.starved = shared(d.why.Reason) && len(c.waiting) < l.slots; d.starved {
		p.starved++ // soon called: it keeps the call that was prepared
	} else {
		d.call = nil
	}
	p.shared.memory.add(d)
	at, _ := slices.BinarySearchFunc(c.waiting, d.seq, func(o *delivery, seq uint64) int {
		return cmp.Compare(o.seq, seq)
	})
	c.waiting = slices.Insert(c.waiting, at, d)
}

// behind reports whether a request of c that came before d waits at the server for room.
func (c *creator) behind(d *delivery) bool {
	seq, there := c.firstReady()
	return there && seq < d.seq
}

// limitOf is how many requests of a creator may wait in the worker: those that its rate allows at
// once and soon, and no more than its slots can call soon.
func (p *partition) limitOf(c *creator, kind resilience.Kind, now time.Time) int {
	slots := c.gate.Slots()
	latency := c.gate.Latency()
	if latency == 0 {
		latency = unknownLatency
	}
	limit := mayWait(latency / time.Duration(slots))
	if interval := c.gate.Interval(kind); interval > 0 {
		limit = min(limit, c.gate.Tokens(now, kind)+int(nearTurn/interval))
	}
	return max(limit, 1)
}

// remove takes d out of the requests of c that wait in the worker.
func (p *partition) remove(c *creator, d *delivery) {
	p.shared.memory.remove(d)
	if d.suspect() {
		c.suspects = without(c.suspects, d)
		return
	}
	c.waiting = without(c.waiting, d)
	if d.starved {
		d.starved = false
		p.starved--
	}
}

// without takes d out of a line in which it is most often the first.
func without(line []*delivery, d *delivery) []*delivery {
	i := slices.Index(line, d)
	switch {
	case i < 0:
		return line
	case i == 0:
		line[0] = nil
		line = line[1:]
	default:
		line = slices.Delete(line, i, i+1)
	}
	if len(line) == 0 {
		return nil
	}
	return line
}

// turn lets c make one call, because it was the first in line for what other creators
// use, and puts it at the end of the line if it could make another one.
func (p *partition) turn(c *creator) {
	p.mu.Lock()
	if p.active && p.creators[c.name] == c {
		p.advance(c, true)
	}
	p.mu.Unlock()
	p.pull()
}

// pump lets the requests of c that wait in the worker go, as far as the gate allows, and
// fetches more.
func (p *partition) pump(c *creator) {
	if p.active && p.creators[c.name] == c {
		p.advance(c, false)
	}
}

// advance is turn and pump. In its turn c makes one call and no more.
func (p *partition) advance(c *creator, turn bool) {
	for {
		d := c.first(p.shared)
		if d == nil {
			break
		}
		now := time.Now()
		if !now.Before(d.expires) {
			p.remove(c, d)
			p.async(d, func() { p.expired(d) })
			continue
		}
		permit, no, ok := p.mayCall(c, d, now, turn)
		if ok {
			p.remove(c, d)
			p.start(d, permit)
			turn, c.next = false, false
			continue // without a turn: it queues up again behind the others
		}
		d.why = no
		if far(no, now) {
			p.setAside(c, no, now)
		}
		p.arm(c, no, now)
		return
	}
	p.fetch(c, turn, time.Now())
}

// first is the next request of c to be called: a suspect only if no other suspect is being
// called, so that it does not stop the others.
func (c *creator) first(a *admission) *delivery {
	if len(c.suspects) > 0 && (len(c.waiting) == 0 || a.suspect.Load() == nil) {
		return c.suspects[0]
	}
	if len(c.waiting) > 0 {
		return c.waiting[0]
	}
	return nil
}

// setAside parks all requests of c that wait in the worker: what they wait for has become far
// away.
func (p *partition) setAside(c *creator, no resilience.Refusal, now time.Time) {
	for _, line := range [][]*delivery{c.waiting, c.suspects} {
		for _, d := range slices.Clone(line) {
			p.remove(c, d)
			d.why = no
			p.park(c, d, &parked{why: no})
		}
	}
}

// arm sees to it that c goes on when what keeps it is over.
func (p *partition) arm(c *creator, no resilience.Refusal, now time.Time) {
	switch {
	case no.Reason == reasonStorage && c.settling >= unsettledPerSlot*c.gate.Slots():
		return // the end of one of them pumps
	case p.shared.enqueue(p, c, no.Reason):
		return
	case no.NotBefore.IsZero():
		return // the end of a call, or of a hold, pumps
	}
	p.wakeAt(c, no.NotBefore, now)
}

// wakeAt pumps c at a time. If its requests wait at the server that is a little sooner,
// so that they are here by then.
func (p *partition) wakeAt(c *creator, at, now time.Time) {
	delay := at.Sub(now)
	if len(c.waiting)+len(c.suspects) == 0 {
		delay -= fetchAhead
	}
	delay = max(delay, 0)
	if c.timer == nil {
		c.timer = time.AfterFunc(delay, func() {
			p.mu.Lock()
			p.pump(c)
			p.mu.Unlock()
			p.pull()
		})
		return
	}
	c.timer.Reset(delay)
}
