package consumer

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/failpoint"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

const (
	// nearTurn is how far away a turn may be for its message to wait in the
	// worker instead of going back to the server.
	nearTurn = 2 * time.Second

	// nearest bounds the messages of one creator that wait in the worker, and
	// nearestFast those of one that is called so fast that it needs more for
	// a second. Those of all creators are bounded by nearShare times its
	// calls in flight.
	nearest     = 256
	nearestFast = 2048
	nearShare   = 4

	// doubt is for how long a message is set aside that comes while it is not known
	// whether the partition is still this worker's.
	doubt = time.Second

	// sweepEvery is how often gates that remember nothing are forgotten.
	sweepEvery = time.Minute
)

// partition owns the creators that hash into it: all of their messages meet
// here, so that a gate in memory is exact. It is a monitor: one lock, held for
// decisions and never for I/O that waits.
type partition struct {
	w      *Worker
	number int
	lease  lease
	puller puller

	calls  sync.WaitGroup // of this partition, in flight
	flying atomic.Int64   // how many these are

	mu         sync.Mutex
	active     bool      // takes messages
	binding    bool      // is being rebound
	closed     bool      // the worker stops
	emptySince time.Time // limiters of an earlier owner must not burst again
	crashed    bool      // the earlier owner did not give it up in good order
	consumed   time.Time // when its consumer was created
	entered    time.Time
	creators   map[string]*creator
	here       map[uint64]*delivery // by stream sequence: being worked on in this worker
	busy       int                  // of them, not yet decided upon: fewer are pulled for these

	// Of the comparison of what is stored with what is known, see count.
	missed    map[uint64]bool
	countFrom uint64
}

// creator is one creator's gate and those of its messages that wait.
type creator struct {
	name    string
	gate    *resilience.Gate
	waiting []*delivery // in the worker, the next one first
	parked  map[uint64]*parked
	timer   *time.Timer // for waiting
	queued  bool        // in one of the worker's queues, guarded by its lock
	plans   int         // how often all turns were given anew

	failures []publisher.Attempt // the latest
}

// receive looks at a message, or, given nil, just asks for more.
func (p *partition) receive(m *nats.Msg) {
	defer p.pull()
	if m == nil {
		return
	}
	now := time.Now()
	d, err := open(m, now)
	if err != nil {
		p.w.log.Error().Err(err).Msg("a delivery cannot be read; the server will send it again")
		return
	}

	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !p.active:
		p.w.reply(d.msg.Reply, nakPayload)
		return
	case !p.lease.holds(now):
		// Not at once, or it would come back at once, as long as the lease is in doubt.
		p.w.reply(d.msg.Reply, nakAfter(doubt))
		return
	case p.here[d.seq] != nil:
		// Redelivered while it is being worked on: no second call, and no
		// answer, which would settle the first.
		return
	}
	p.handle(d, now)
}

// handle decides what becomes of a message that is new here.
func (p *partition) handle(d *delivery, now time.Time) {
	p.here[d.seq] = d
	defer func() {
		if r := recover(); r != nil {
			p.decideLater(d, func() { p.w.panicked(p, d, r) })
		}
	}()
	if failpoint.Hit(failpoint.Received, "") != nil {
		delete(p.here, d.seq) // as if it had been lost on its way
		return
	}
	var err error
	d.req, err = p.w.read(d)
	if err != nil {
		p.decideLater(d, func() { p.w.malformed(p, d, err) })
		return
	}
	d.op, d.call, err = p.w.prepare(&d.req)
	if err != nil {
		p.decideLater(d, func() { p.w.malformed(p, d, err) })
		return
	}
	d.expires = d.stored.Add(d.op.Retry.MaxAge)
	if t := d.req.Deadline; !t.IsZero() && t.Before(d.expires) {
		d.expires = t
	}
	c := p.creator(d.req.Creator)
	switch back := c.parked[d.seq]; {
	case back != nil:
		delete(c.parked, d.seq)
		d.waited, d.record, d.why, d.unexplained = true, back.record, back.why, back.unexplained
		if back.turn.Sub(now) > nearTurn { // set aside for longer than can be done at once
			p.park(c, d, back.turn, back.own)
			return
		}
	case d.count > 1, d.stored.Before(p.consumed), d.msg.Header.Get(publisher.HeaderReplay) != "":
		// Delivered before, or by a consumer that is no more, or replayed by two who did not
		// know of each other.
		p.decideLater(d, func() { p.w.lookUp(p, c, d) })
		return
	}
	if d.suspect() {
		p.admitAlone(c, d, now)
		return
	}
	p.admit(c, d, now)
}

// decideLater runs what needs I/O before d can be decided upon, without the
// lock. Until then d counts as busy.
func (p *partition) decideLater(d *delivery, f func()) {
	p.busy++
	p.goes(func() {
		p.w.guarded(p, d, f)
		p.mu.Lock()
		p.busy--
		p.mu.Unlock()
		p.pull()
	})
}

// goes runs f in a goroutine that the worker, or whoever hands the partition
// over, waits for.
func (p *partition) goes(f func()) {
	p.w.calls.Add(1)
	p.calls.Add(1)
	p.flying.Add(1)
	go func() {
		defer p.w.calls.Done()
		defer p.calls.Done()
		defer p.flying.Add(-1)
		f()
	}()
}

// pull asks for as many messages as can be looked at, unless nobody may be
// called: then the backlog stays where it is.
func (p *partition) pull() {
	if _, blocked := p.w.gates.Blocked(time.Now()); blocked {
		return
	}
	p.mu.Lock()
	active, busy := p.active, p.busy
	p.mu.Unlock()
	if active && p.lease.holds(time.Now()) {
		p.puller.more(busy)
	}
}

func (p *partition) creator(name string) *creator {
	c := p.creators[name]
	if c == nil {
		c = &creator{name: name, gate: p.w.gates.Gate(name, p.emptySince)}
		if h, held := p.w.holds.of(name); held {
			c.gate.Hold(h)
		}
		if l, special := p.w.limits.of(name); special {
			_ = c.gate.SetLimits(time.Now(), l) // checked when it was read
		}
		p.creators[name] = c
	}
	return c
}

// admit calls d, or lets it wait.
func (p *partition) admit(c *creator, d *delivery, now time.Time) {
	if !now.Before(d.expires) {
		p.decideLater(d, func() { p.w.expired(p, d) })
		return
	}
	if len(c.waiting) > 0 {
		// Somebody is in front. What they wait for is what this waits for.
		d.why = c.waiting[0].why
		p.wait(c, d, now)
		return
	}
	permit, no, ok := c.gate.Admit(now, d.op.Kind, d.waited)
	if ok {
		p.start(c, d, permit)
		return
	}
	d.why = no
	p.wait(c, d, now)
	p.arm(c, no, now)
}

// wait lets d wait in the worker if its turn is near and there is room, else
// at the server.
func (p *partition) wait(c *creator, d *delivery, now time.Time) {
	// Waiting for what others have is not this creator's doing, so those that
	// could be called at once keep their place, and less is pulled meanwhile.
	// The rest of its backlog lets others pass.
	few := len(c.waiting) < c.gate.Slots()
	starved := few && d.why.Reason.Shared()
	room := few || p.w.near.Load() < int64(nearShare*p.w.cfg.Gates.InFlight) &&
		(len(c.waiting) < nearest || len(c.waiting) < mayWait(c.gate.Pace(d.op.Kind)))
	// Who comes back for its turn does not queue up for another one, unless
	// what it waited for has become far away.
	if !starved && (!d.waited || far(d.why, now) || !room) {
		turn := c.gate.Turn(now, d.op.Kind, len(c.waiting), rand.Float64())
		if turn.IsZero() || turn.Sub(now) > nearTurn || !room {
			p.park(c, d, turn, false)
			return
		}
	}
	d.waited, d.starved = true, starved
	if starved {
		p.busy++ // soon called: it keeps what was prepared
	} else {
		d.call = nil
	}
	p.w.near.Add(1)
	c.waiting = append(c.waiting, d)
}

// mayWait is how many messages of a creator with such a pace may wait in the worker.
func mayWait(pace time.Duration) int {
	return int(min(max(time.Second/pace, nearest), nearestFast))
}

// far reports whether what keeps a message is not over soon.
func far(no resilience.Refusal, now time.Time) bool {
	return no.NotBefore.Sub(now) > nearTurn || no.Hold != nil && no.NotBefore.IsZero()
}

// next takes the first waiting message of c.
func (p *partition) next(c *creator) *delivery {
	d := c.waiting[0]
	c.waiting[0] = nil
	if c.waiting = c.waiting[1:]; len(c.waiting) == 0 {
		c.waiting = nil
	}
	p.w.near.Add(-1)
	if d.starved {
		d.starved = false
		p.busy--
	}
	return d
}

// pump lets those who wait in the worker go, as far as the gate allows.
func (p *partition) pump(c *creator) {
	p.mu.Lock()
	p.pumpLocked(c)
	p.mu.Unlock()
	p.pull()
}

func (p *partition) pumpLocked(c *creator) {
	for len(c.waiting) > 0 && p.active {
		now := time.Now()
		d := c.waiting[0]
		if !now.Before(d.expires) {
			p.next(c)
			p.decideLater(d, func() { p.w.expired(p, d) })
			continue
		}
		permit, no, ok := c.gate.Admit(now, d.op.Kind, true)
		if ok {
			p.next(c)
			p.start(c, d, permit)
			continue
		}
		d.why = no
		if far(no, now) {
			p.setAside(c, no, now)
			return
		}
		p.arm(c, no, now)
		return
	}
}

// setAside parks all who wait in the worker: what they wait for has become far
// away.
func (p *partition) setAside(c *creator, no resilience.Refusal, now time.Time) {
	for len(c.waiting) > 0 {
		d := p.next(c)
		d.why = no
		p.park(c, d, c.gate.Turn(now, d.op.Kind, len(c.waiting), rand.Float64()), false)
	}
}

// arm sees to it that c is pumped when its first waiting message may go.
func (p *partition) arm(c *creator, no resilience.Refusal, now time.Time) {
	switch {
	case len(c.waiting) == 0:
		return
	case no.Reason.Shared() || no.Reason == resilience.ReasonSlow:
		p.w.starve(p, c, no.Reason)
		return
	case no.NotBefore.IsZero(): // the end of one of c's calls pumps
		return
	}
	delay := max(no.NotBefore.Sub(now), 0)
	if c.timer == nil {
		c.timer = time.AfterFunc(delay, func() { p.pump(c) })
	} else {
		c.timer.Reset(delay)
	}
}

// start makes the call, in a goroutine that ends with finish.
func (p *partition) start(c *creator, d *delivery, permit resilience.Permit) {
	p.goes(func() { p.w.work(p, c, d, permit) })
}

// hold takes a hold for a creator that may or may not be known here yet.
func (p *partition) hold(name string, h resilience.Hold) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.creators[name]; c != nil && c.gate.Hold(h) {
		p.pumpLocked(c)
	}
}

// limit changes the limits of a creator that may or may not be known here yet.
func (p *partition) limit(name string, l resilience.Limits) {
	p.mu.Lock()
	c := p.creators[name]
	p.mu.Unlock()
	if c != nil {
		_ = c.gate.SetLimits(time.Now(), l) // checked when it was read
		p.replan(c)
	}
}

// release ends c's hold.
func (p *partition) release(name string) {
	p.mu.Lock()
	c := p.creators[name]
	p.mu.Unlock()
	if c == nil {
		return
	}
	now := time.Now()
	h := c.gate.Held(now)
	if h == nil {
		return
	}
	if h.Until.IsZero() {
		p.w.stats.held.Add(int64(now.Sub(h.Since)))
	}
	c.gate.Release(now)
	p.replan(c)
}

// extend tells the server about everything that is still being worked on, so
// that it is not delivered again.
func (p *partition) extend(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.lease.holds(now) {
		return
	}
	for _, d := range p.here {
		if now.Sub(d.extended) >= p.w.cfg.Topology.AckWait/3 {
			d.extended = now
			p.w.reply(d.msg.Reply, progressPayload)
		}
	}
}

// sweep forgets gates that remember nothing.
func (p *partition) sweep(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, c := range p.creators {
		if len(c.waiting) == 0 && len(c.parked) == 0 && c.gate.Neutral(now) {
			delete(p.creators, name)
		}
	}
}

// rebind asks the server anew for messages, perhaps through a consumer that was
// made anew, which counts deliveries from one again.
func (p *partition) rebind(ctx context.Context) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.active || p.binding {
		return
	}
	p.binding = true
	p.goes(func() {
		p.look(ctx)
		p.mu.Lock()
		p.binding = false
		active := p.active
		p.mu.Unlock()
		if !active {
			return
		}
		if err := p.puller.bind(); err != nil {
			p.w.log.Warn().Err(err).Int("partition", p.number).Msg("cannot pull; trying again")
			return
		}
		p.pull()
		p.mu.Lock()
		defer p.mu.Unlock()
		if !p.active { // left meanwhile
			p.puller.stop()
		}
	})
}

// look finds out when the partition's consumer was made. What was stored before may
// have been delivered by another one.
func (p *partition) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, beatEvery)
	defer cancel()
	c, err := p.w.stream.Consumer(ctx, publisher.ConsumerName(p.number))
	switch {
	case errors.Is(err, jetstream.ErrConsumerNotFound):
		p.w.log.Error().Int("partition", p.number).Msg("the partition's consumer is gone: its requests wait until `headgate setup` makes it again")
	case err == nil:
		p.mu.Lock()
		p.consumed = c.CachedInfo().Created
		p.mu.Unlock()
	}
}

// enter starts taking messages. Limiters start empty if the partition had an
// owner lately, who may have used up their bursts.
func (p *partition) enter(ctx context.Context, hadOwner, crashed bool) error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return errStopping
	}
	p.active, p.crashed, p.emptySince, p.entered = true, crashed, time.Time{}, time.Now()
	if hadOwner {
		p.emptySince = time.Now()
	}
	p.creators = make(map[string]*creator)
	clear(p.here) // nothing of an earlier time is being worked on
	p.missed, p.countFrom = nil, 0
	p.mu.Unlock()
	p.look(ctx)
	if err := p.puller.bind(); err != nil {
		return err
	}
	p.pull()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.active { // left meanwhile
		p.puller.stop()
		return errStopping
	}
	return nil
}

// errStopping means that the worker, or this partition's owner, is on its way out.
var errStopping = errors.New("stopping")

// close is leave for good.
func (p *partition) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.leave()
}

// leave stops taking messages and gives back those that have not been called.
// What was parked is dropped with the lease: the next owner has its own. It
// reports whether there was anything to leave.
func (p *partition) leave() bool {
	p.puller.stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.active {
		return false
	}
	p.active = false
	for _, c := range p.creators {
		if c.timer != nil {
			c.timer.Stop()
		}
		for len(c.waiting) > 0 {
			d := p.next(c)
			p.w.reply(d.msg.Reply, nakPayload)
			delete(p.here, d.seq)
			p.notAlone(d)
		}
		c.parked = nil
	}
	for _, d := range p.w.suspects.leave(p) {
		p.w.reply(d.msg.Reply, nakPayload)
		delete(p.here, d.seq)
	}
	p.creators = nil
	return true
}
