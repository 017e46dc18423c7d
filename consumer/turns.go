package consumer

import (
	"container/heap"
	"strings"
	"time"

	"github.com/headgate-io/headgate/resilience"
)

const (
	// longestPark is for how long a message is set aside at once; then it comes back by itself
	// and is asked again whether it still has to wait.
	longestPark = 10 * time.Minute

	// roundAbove is the distance from which messages are sent back in groups, on whole seconds:
	// the server looks at all that wait each time that one is due.
	roundAbove = 10 * time.Second

	// fetchAhead is how long before a creator may be called its requests are fetched.
	fetchAhead = time.Second

	// fetchTimeout is the age at which a message that was fetched and has not come is looked for.
	fetchTimeout = 5 * time.Second
)

// parked is a message that was NAK'd and waits at the server. It comes back when its delay is
// over, or when a second NAK on its reply fetches it.
type parked struct {
	id      string
	creator string
	seq     uint64
	reply   string
	kind    resilience.Kind
	record  record
	why     resilience.Refusal
	stored  time.Time
	expires time.Time

	// due is when it may be called, where that is its own matter and not its creator's: after
	// its backoff. Zero: as soon as there is room.
	due  time.Time
	back time.Time // when its delay at the server is over

	fetched     time.Time // when it was fetched; zero: it was not
	unknown     bool      // to be looked up when it comes back
	unexplained bool
	refreshed   bool
}

// own reports that a request waits for its own backoff.
func (k *parked) own() bool { return !k.due.IsZero() }

// park sends d back to the server. k says how it waits; park fills in the rest.
func (p *partition) park(c *creator, d *delivery, k *parked) {
	now := time.Now()
	p.forget(d)
	if d.marked { // it would be UNCERTAIN if this worker vanished, and is not called soon
		marked := &delivery{msg: d.msg, req: d.req, record: d.record, seq: d.seq, stored: d.stored, count: d.count}
		p.spawn(func() { p.settler.unmark(marked) })
		d.record.Mark, d.marked = nil, false
	}
	if !p.lease.Valid(now) || d.reply == "" {
		// Its owner is another worker by now, or the reconciler found it and will again.
		return
	}
	k.id, k.creator, k.seq, k.reply, k.kind = strings.Clone(d.req.ID), c.name, d.seq, d.reply, d.op.Kind
	k.record, k.stored, k.expires = d.record, d.stored, d.expires
	k.unexplained, k.refreshed = d.unexplained, d.refreshed
	delay := longestPark
	if k.own() {
		delay = min(delay, k.due.Sub(now))
	}
	if !k.unknown {
		delay = min(delay, k.expires.Sub(now)) // then it is a dead letter
	}
	if delay > roundAbove && !k.own() {
		delay = now.Add(delay).Truncate(time.Second).Sub(now)
	}
	if delay <= 0 {
		delay = abandonedFor
	}
	k.back = now.Add(delay)
	if c.parked == nil {
		c.parked = make(map[uint64]*parked)
	}
	c.parked[d.seq] = k
	if !k.own() {
		heap.Push(&c.ready, k.seq)
	}
	p.server.reply(d.reply, nakAfter(delay))
}

// unpark takes the message that d is a delivery of out of those parked; nil: it is none of them.
func (p *partition) unpark(c *creator, d *delivery) *parked {
	k := c.parked[d.seq]
	if k == nil {
		return nil
	}
	delete(c.parked, d.seq)
	if !k.fetched.IsZero() {
		c.fetched--
	}
	d.adopt(k.record)
	d.why, d.unexplained, d.refreshed = k.why, k.unexplained, k.refreshed
	return k
}

// comeBack goes on with a message that was parked.
func (p *partition) comeBack(c *creator, d *delivery, k *parked, now time.Time) {
	switch {
	case k.own() && k.due.Sub(now) > nearTurn && now.Before(d.expires):
		// Set aside for longer than can be done at once.
		p.park(c, d, &parked{due: k.due, why: k.why, unknown: k.unknown})
	case k.unknown:
		d.enter(lookingUp)
		p.async(d, func() { p.lookUp(d) })
	default:
		p.admit(c, d, now)
	}
}

// fetch gets as many parked requests of c back as there is room for, the first ones first. In its
// turn c gets at least one, and keeps the turn until that is here.
func (p *partition) fetch(c *creator, turn bool, now time.Time) {
	seq, there := c.firstReady()
	if !there {
		return
	}
	k := c.parked[seq]
	if no, refused := c.gate.Look(now, k.kind); refused && !shared(no.Reason) {
		k.why = no
		if far(no, now) || no.NotBefore.IsZero() {
			p.arm(c, no, now)
			return
		}
	}
	if p.elsewhere[c.name] {
		return
	}
	limit := p.limitOf(c, k.kind, now)
	if reason := p.shared.ahead(); reason != "" && !turn {
		// Others are in line for what it needs. It queues up, and is fetched in its turn.
		if len(c.waiting)+c.fetched == 0 {
			p.shared.enqueue(p, c, reason)
		}
		return
	}
	n := limit - len(c.waiting) - c.fetched
	switch {
	case turn:
		c.next = true
		n = max(1, min(n, c.gate.Slots()))
	case n < (limit+1)/2 || !p.shared.memory.room() && len(c.waiting)+c.fetched > 0:
		return
	}
	for ; n > 0; n-- {
		seq, there := c.firstReady()
		if !there {
			return
		}
		heap.Pop(&c.ready)
		k := c.parked[seq]
		k.fetched = now
		c.fetched++
		p.server.reply(k.reply, nakPayload)
	}
}

// firstReady is the first of the parked requests that wait for room.
func (c *creator) firstReady() (seq uint64, there bool) {
	for len(c.ready) > 0 {
		if k := c.parked[c.ready[0]]; k != nil && !k.own() && k.fetched.IsZero() {
			return c.ready[0], true
		}
		heap.Pop(&c.ready) // it came back by itself
	}
	c.ready = nil
	return 0, false
}

// retryAt lets a request come back after a time: after its backoff, or when its
// creator's hold is over, if that is what it waits for. unknown: the server is asked again what became
// of it.
func (p *partition) retryAt(d *delivery, after time.Time, why resilience.Refusal, unknown bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.active {
		p.abandon(d)
		return
	}
	c := p.creator(d.req.Creator)
	d.decided = false
	d.why = why
	k := &parked{due: after, why: why, unknown: unknown}
	hold := c.gate.Held(time.Now())
	// It waits for the hold that it may have caused, and ends with it, unless its own backoff is
	// longer by more than chance.
	if hold != nil && !unknown && (hold.Until.IsZero() || !after.After(hold.Until.Add(d.op.Retry.Base))) {
		k.due = time.Time{}
		k.why = resilience.Refusal{Reason: resilience.ReasonHold, NotBefore: hold.Until, Hold: hold}
	}
	p.park(c, d, k)
	p.pump(c)
}

// readmit lets a request go again as soon as its gate allows it.
func (p *partition) readmit(d *delivery) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.active {
		p.abandon(d)
		return
	}
	d.call = nil
	if p.shared.notAlone(d) {
		p.spawn(p.shared.wake)
	}
	p.admit(p.creator(d.req.Creator), d, time.Now())
}

// acknowledge removes a request from the stream: it has its outcome.
func (p *partition) acknowledge(d *delivery) {
	p.settler.ack(d)
	p.mu.Lock()
	p.forget(d)
	p.mu.Unlock()
}

// leave gives a request back, to be delivered again to the partition's owner.
func (p *partition) leave(d *delivery) {
	if !d.op.NotIdempotent || !d.called {
		p.settler.unmark(d)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.abandon(d)
}

// abandon is leave, under the lock and with the mark as it is.
func (p *partition) abandon(d *delivery) {
	if p.here[d.seq] == d {
		p.forget(d)
	}
	if p.lease.Valid(time.Now()) {
		p.server.reply(d.reply, nakAfter(abandonedFor))
	}
}

// abandonedFor keeps a request that cannot be worked on now from coming back in a hot loop.
const abandonedFor = 250 * time.Millisecond

// forget is the end of every delivery in this worker.
func (p *partition) forget(d *delivery) {
	if p.here[d.seq] != d {
		return
	}
	delete(p.here, d.seq)
	if c := p.creators[d.req.Creator]; c != nil && d.counted {
		c.here--
	}
	if p.shared.notAlone(d) {
		p.spawn(p.shared.wake)
	}
}

// sequences is a heap of stream sequences.
type sequences []uint64

func (s sequences) Len() int           { return len(s) }
func (s sequences) Less(i, j int) bool { return s[i] < s[j] }
func (s sequences) Swap(i, j int)      { s[i], s[j] = s[j], s[i] }
func (s *sequences) Push(x any)        { *s = append(*s, x.(uint64)) }
func (s *sequences) Pop() any {
	old := *s
	x := old[len(old)-1]
	*s = old[:len(old)-1]
	return x
}
