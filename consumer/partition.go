package consumer

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/internal/control"
	"github.com/headgate-io/headgate/internal/mutant"
	"github.com/headgate-io/headgate/internal/ownership"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

const (
	// doubt is for how long a message is set aside that comes while it is not known
	// whether the partition is still this worker's.
	doubt = time.Second

	// sweepEvery is how often gates that remember nothing are forgotten.
	sweepEvery = time.Minute

	// consumerTimeout bounds a question about the partition's consumer.
	consumerTimeout = 3 * time.Second
)

// partition owns the creators that hash into it: all of their messages meet
// here, so that a gate in memory is exact. It is a monitor: one lock, held for
// decisions and never for I/O that waits.
type partition struct {
	number  int
	log     zerolog.Logger
	lease   *ownership.Lease
	puller  puller
	server  *server // replies to deliveries, questions about the consumer
	shared  *admission
	settler *settler
	caller  *caller
	holds   *control.Holds
	limits  *control.Limits
	credits *credits
	events  *events
	keeper  *ownership.Keeper
	// pumpEverywhere lets the creators of all partitions go on.
	pumpEverywhere func()
	ackWait        time.Duration

	work   *sync.WaitGroup // goroutines of the whole worker
	calls  sync.WaitGroup  // and of this partition
	flying atomic.Int64    // how many these are

	mu         sync.Mutex
	active     bool // takes messages
	binding    bool // is being rebound
	closed     bool // the worker stops
	crashed    bool // the earlier owner did not give it up in good order
	entered    time.Time
	emptySince time.Time // limiters of an earlier owner must not burst again
	delivered  uint64    // up to this sequence an earlier owner may have had messages
	consumed   time.Time // what was stored before may have been delivered by another consumer
	created    time.Time // when the consumer was
	numbered   uint64    // the latest delivery's number at the consumer
	creators   map[string]*creator
	here       map[uint64]*delivery // by stream sequence: being worked on in this worker
	elsewhere  map[string]bool      // creators that a former owner is still calling
	busy       int                  // of here, not yet decided upon: fewer are pulled for these
	starved    int                  // of here, waiting for what other creators use: likewise
	pending    uint64               // messages that the server has not delivered yet, as last heard
	pass       passing
	recon      reconciliation
	strays     uint64 // the next sequence at which one is looked for
}

// creator is one creator's gate and those of its requests that wait. It is guarded by the
// lock of its partition, and is not forgotten while a request of it is here.
type creator struct {
	name     string
	gate     *resilience.Gate
	here     int         // requests being worked on
	waiting  []*delivery // in the worker, by stream sequence
	suspects []*delivery // in the worker, to be called alone
	parked   map[uint64]*parked
	ready    sequences // of those parked that wait for room, the first one first; some may be gone
	fetched  int       // of those parked, on their way back
	settling int       // calls that have ended and whose outcome is not stored
	next     bool      // it had its turn in a queue; what is fetched for it goes first
	timer    *time.Timer

	failures []publisher.Attempt // the latest
}

// idle reports that nothing waits.
func (c *creator) idle() bool {
	return c.here == 0 && len(c.waiting) == 0 && len(c.suspects) == 0 && len(c.parked) == 0
}

// creator returns the creator with that name, with what is known of it.
func (p *partition) creator(name string) *creator {
	c := p.creators[name]
	if c != nil {
		return c
	}
	c = &creator{name: name, gate: p.shared.gates.Gate(name, p.emptySince)}
	for _, by := range []resilience.Authority{resilience.ByPeople, resilience.ByAPI} {
		if h, held := p.holds.Of(name, by); held {
			c.gate.Hold(by, h)
		}
	}
	if l, special := p.limits.Of(name); special {
		_ = c.gate.SetLimits(time.Now(), l) // checked when it was read
	}
	p.creators[name] = c
	return c
}

// Number of the partition.
func (p *partition) Number() int { return p.number }

// spawn runs f in a goroutine for which the worker waits, and the owner that hands the
// partition over.
func (p *partition) spawn(f func()) {
	p.work.Add(1)
	p.calls.Add(1)
	p.flying.Add(1)
	go func() {
		defer p.work.Done()
		defer p.calls.Done()
		defer p.flying.Add(-1)
		f()
	}()
}

// async runs f, which handles d and does I/O, without the lock. Until then d counts as busy.
func (p *partition) async(d *delivery, f func()) {
	p.busy++
	p.spawn(func() {
		p.guarded(d, f)
		p.mu.Lock()
		p.busy--
		p.mu.Unlock()
		p.pull()
	})
}

// pull asks for as many messages as can be looked at, unless a hold of all creators stands:
// then the backlog stays where it is.
func (p *partition) pull() {
	now := time.Now()
	if _, blocked := p.shared.gates.Blocked(now); blocked || !p.lease.Valid(now) {
		return
	}
	p.mu.Lock()
	active, busy := p.active, p.busy
	if !p.pass.on {
		busy += p.starved
	}
	p.mu.Unlock()
	if active {
		p.puller.more(busy)
	}
}

// extend tells the server about the requests that are still being worked on, so
// that it does not deliver them again.
func (p *partition) extend(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.lease.Valid(now) {
		return
	}
	for _, d := range p.here {
		if now.Sub(d.extended) >= p.ackWait/3 {
			d.extended = now
			p.server.reply(d.reply, progressPayload)
		}
	}
}

// sweep forgets gates that remember nothing.
func (p *partition) sweep(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, c := range p.creators {
		if (c.idle() || mutant.On(mutant.SweepInUse)) && c.gate.Neutral(now) {
			if c.timer != nil {
				c.timer.Stop()
			}
			delete(p.creators, name)
		}
	}
}

// Enter starts taking messages. The consumer is reset where an earlier owner had messages that it
// did not settle, so that all of them come at once, and not when their delays are over.
func (p *partition) Enter(ctx context.Context, before ownership.Before) error {
	now := time.Now()
	info, err := p.server.consumer(ctx, p.number)
	if err != nil {
		return err
	}
	delivered, numbered := info.Delivered.Stream, info.Delivered.Consumer
	if info.NumAckPending > 0 {
		numbered = 0 // it counts from one again
		if err := p.server.reset(ctx, p.number); err != nil {
			p.log.Warn().Err(err).Int("partition", p.number).Msg("messages that the earlier owner set aside come when their delays are over, within 10 minutes")
		}
	}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return errStopping
	}
	p.active, p.crashed, p.emptySince, p.entered = true, before.Crashed, time.Time{}, now
	if before.Owned {
		p.emptySince = now
	}
	p.delivered, p.numbered, p.created, p.consumed = delivered, numbered, info.Created, info.Created
	if before.Crashed {
		// A server that crashed with the worker forgets its latest deliveries.
		p.consumed = now
	}
	p.creators = make(map[string]*creator)
	clear(p.here) // nothing of an earlier time is being worked on
	p.busy, p.starved, p.pending, p.pass, p.recon = 0, 0, info.NumPending, passing{}, reconciliation{}
	p.elsewhere = setOf(before.Calling)
	p.mu.Unlock()
	if err := p.puller.bind(); err != nil {
		p.Leave()
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

// close leaves the partition for good.
func (p *partition) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
}

// Leave stops taking messages and gives back those that have not been called.
// The parked ones are dropped with the lease: the next owner asks the server for them. It
// reports whether there was anything to leave.
func (p *partition) Leave() bool {
	p.puller.stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.active {
		return false
	}
	p.active = false
	valid := p.lease.Valid(time.Now())
	for _, c := range p.creators {
		if c.timer != nil {
			c.timer.Stop()
		}
		for _, d := range append(c.waiting, c.suspects...) {
			p.shared.memory.remove(d)
			p.forget(d)
			if valid {
				p.server.reply(d.reply, nakPayload)
			}
		}
		c.waiting, c.suspects, c.parked, c.ready = nil, nil, nil, nil
	}
	p.creators = nil
	return true
}

// Idle reports that no call of an earlier time is in flight.
func (p *partition) Idle() bool { return p.flying.Load() == 0 }

// Wait waits until the last call has ended and its request is settled.
func (p *partition) Wait() { p.calls.Wait() }

// Calling lists the creators with calls that are not settled.
func (p *partition) Calling() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	names := map[string]bool{}
	for _, d := range p.here {
		if s := d.stage(); s == calling || s == settling {
			names[d.req.Creator] = true
		}
	}
	return slices.Collect(maps.Keys(names))
}

// StillCalled takes the creators that a former owner is still calling, all of them each time.
// Those that it calls no more may go on.
func (p *partition) StillCalled(creators []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.elsewhere
	p.elsewhere = setOf(creators)
	for name := range before {
		if !p.elsewhere[name] && p.active {
			if c := p.creators[name]; c != nil {
				p.pump(c)
			}
		}
	}
}

// rebind asks the server again for messages, perhaps through a consumer that was
// made again, which counts deliveries from one. restarted: the server may have forgotten
// which messages it delivered.
func (p *partition) rebind(ctx context.Context, restarted bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.active || p.binding {
		return
	}
	if restarted {
		p.consumed = time.Now()
	}
	p.binding = true
	p.spawn(func() {
		err := p.look(ctx)
		p.mu.Lock()
		p.binding = false
		active := p.active
		p.mu.Unlock()
		if !active {
			return
		}
		if err == nil {
			err = p.puller.bind()
		}
		if err != nil {
			p.puller.failed(err)
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

// numberedFrom takes a delivery's number at the consumer. One that is not higher than the last says
// that the consumer counts from the start: it was made again or reset, or its server forgot what it
// delivered.
func (p *partition) numberedFrom(number uint64, now time.Time) {
	if number <= p.numbered {
		p.consumed = now
	}
	p.numbered = number
}

// look finds out whether the partition's consumer was made again.
func (p *partition) look(ctx context.Context) error {
	info, err := p.server.consumer(ctx, p.number)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !info.Created.Equal(p.created) {
		p.created, p.consumed = info.Created, time.Now()
	}
	return nil
}

// server is what a partition asks NATS for beside messages.
type server struct {
	nc     *nats.Conn
	stream jetstream.Stream // of requests
	name   string           // of that stream
	api    string           // prefix of the JetStream API
	log    zerolog.Logger
}

// reply answers a delivery without waiting for the server. AckWait makes up for an answer that
// is lost.
func (s *server) reply(subject string, payload []byte) {
	if subject == "" {
		return // no delivery: the reconciler found it, and will find it again
	}
	if err := s.nc.Publish(subject, payload); err != nil {
		s.log.Debug().Err(err).Msg("answer a delivery")
	}
}

func (s *server) consumer(ctx context.Context, partition int) (*jetstream.ConsumerInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, consumerTimeout)
	defer cancel()
	name := publisher.ConsumerName(partition)
	c, err := s.stream.Consumer(ctx, name)
	switch {
	case errors.Is(err, jetstream.ErrConsumerNotFound):
		return nil, &missingError{name, err}
	case err != nil:
		return nil, err
	}
	return c.CachedInfo(), nil
}

// missingError says that a partition's consumer is gone.
type missingError struct {
	name string
	err  error
}

func (e *missingError) Error() string {
	return "consumer " + e.name + " is missing, so its requests wait; run `headgate setup` to make it again"
}

func (e *missingError) Unwrap() error { return e.err }

func setOf(names []string) map[string]bool {
	set := make(map[string]bool, len(names))
	for _, name := range names {
		set[name] = true
	}
	return set
}
