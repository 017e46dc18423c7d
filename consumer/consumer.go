package consumer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"github.com/headgate-io/headgate/internal/broker"
	"github.com/headgate-io/headgate/internal/budget"
	"github.com/headgate-io/headgate/internal/control"
	"github.com/headgate-io/headgate/internal/ownership"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// Worker is made by New and runs once.
type Worker struct {
	cfg     Config
	log     zerolog.Logger
	nc      *nats.Conn
	server  *server
	reader  *broker.Reader
	shared  *admission
	settler *settler
	caller  *caller
	holds   *control.Holds
	limits  *control.Limits
	keeper  *ownership.Keeper
	budget  *budget.Budget
	credits *credits
	events  *events
	stats   stats
	backlog backlog

	partitions []*partition
	work       sync.WaitGroup // goroutines that handle requests
}

type stats struct{ calls, results, deadLetters, retries, held atomic.Int64 }

// New binds to what publisher.Topology.Ensure has made. It calls no API. The connection must
// not keep what is written while it is down (nats.ReconnectBufSize(-1)): sent later, it
// would settle messages that are another worker's by then.
func New(ctx context.Context, nc *nats.Conn, cfg Config) (*Worker, error) {
	gates, err := resilience.NewGates(cfg.Gates)
	if err != nil {
		return nil, err
	}
	if nc.Opts.ReconnectBufSize >= 0 {
		return nil, errors.New("a worker's connection must not buffer while it is down; connect with nats.ReconnectBufSize(-1)")
	}
	cfg = cfg.withDefaults()
	if cfg.Topology.Partitions < 1 {
		return nil, errors.New("a worker needs at least one partition")
	}
	// Room for a result and a dead letter of everything in flight.
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(2*cfg.Gates.InFlight), jetstream.WithPublishAsyncTimeout(cfg.StoreTimeout))
	if err != nil {
		return nil, fmt.Errorf("use JetStream: %w", err)
	}
	w := &Worker{cfg: cfg, log: cfg.Log, nc: nc, reader: broker.NewReader(js)}
	requests := cfg.Topology.Namespace.Stream(publisher.Requests)
	stream, err := js.Stream(ctx, requests)
	if err != nil {
		return nil, fmt.Errorf("bind to stream %s (has `headgate setup` been run?): %w", requests, err)
	}
	w.server = &server{nc: nc, stream: stream, name: requests, api: apiPrefix(js), log: cfg.Log}
	kv, err := buckets(ctx, js, cfg.Topology.Namespace)
	if err != nil {
		return nil, err
	}
	if err := w.assemble(js, kv, gates); err != nil {
		return nil, err
	}
	return w, nil
}

// buckets binds to the buckets that a worker uses.
func buckets(ctx context.Context, js jetstream.JetStream, ns publisher.Namespace) (map[string]jetstream.KeyValue, error) {
	all := map[string]jetstream.KeyValue{}
	for _, name := range []string{publisher.Ledger, publisher.Budgets, publisher.Owners} {
		kv, err := js.KeyValue(ctx, ns.Stream(name))
		if err != nil {
			return nil, fmt.Errorf("bind to bucket %s (has `headgate setup` been run?): %w", ns.Stream(name), err)
		}
		all[name] = kv
	}
	return all, nil
}

// assemble makes the parts of a worker.
func (w *Worker) assemble(js jetstream.JetStream, kv map[string]jetstream.KeyValue, gates *resilience.Gates) (err error) {
	cfg, ns := w.cfg, w.cfg.Topology.Namespace
	pub := publisher.New(js, cfg.Topology)
	w.events = &events{publisher: pub, worker: cfg.Name, provider: cfg.Provider, log: cfg.Log}
	w.holds = control.NewHolds(js, ns.Stream(publisher.Holds), steering{w}, w.events.changed(w.owns), cfg.Log)
	w.limits = control.NewLimits(js, ns.Stream(publisher.Limits), cfg.Gates.Creator, steering{w}, cfg.Log)
	w.budget = budget.New(kv[publisher.Budgets], cfg.Gates.Account, gates, cfg.Log)
	w.credits = &credits{kv: kv[publisher.Budgets], cfg: cfg.Credits, log: cfg.Log}
	w.settler = &settler{
		worker: cfg.Name, provider: cfg.Provider, requests: w.server.name, publisher: pub, reader: w.reader,
		ledger: &ledger{kv: kv[publisher.Ledger], reader: w.reader}, nc: w.nc,
		timeout: cfg.StoreTimeout, observer: cfg.Observer, events: w.events, stats: &w.stats, log: cfg.Log,
	}
	w.caller = &caller{
		namespace: ns, api: cfg.API, profile: cfg.Profile, operations: cfg.Operations, maxAge: cfg.Topology.MaxAge,
		observer: cfg.Observer, stats: &w.stats, created: w.server.stream.CachedInfo().Created, log: cfg.Log,
	}
	w.shared = newAdmission(gates, cfg.Memory, cfg.Gates.InFlight, &w.settler.unstored, w.budget.Want)
	if w.keeper, err = ownership.New(ownership.Config{
		JS: js, KV: kv[publisher.Owners], Name: cfg.Name, NC: w.nc, StoreTimeout: cfg.StoreTimeout, Log: cfg.Log,
		Partitions: cfg.Topology.Partitions, InFlight: gates.InFlight, Delivered: w.delivered,
		BeforeEnter: w.holds.WaitCurrent,
	}); err != nil {
		return err
	}
	// Together the partitions have no more in their buffers than the worker
	// can call at once, so that none waits there for longer than a call.
	window := min(max(cfg.Gates.InFlight/cfg.Topology.Partitions, 8), 256)
	for n := range cfg.Topology.Partitions {
		p := &partition{
			number: n, log: cfg.Log, lease: w.keeper.Lease(n), server: w.server, shared: w.shared, settler: w.settler,
			caller: w.caller, holds: w.holds, limits: w.limits, credits: w.credits, events: w.events, keeper: w.keeper,
			work: &w.work, pumpEverywhere: w.pumpAll, ackWait: cfg.Topology.AckWait, here: make(map[uint64]*delivery),
		}
		p.puller = puller{
			nc: w.nc, window: window, receive: p.receive,
			next: fmt.Sprintf("%sCONSUMER.MSG.NEXT.%s.%s", w.server.api, w.server.name, publisher.ConsumerName(n)),
			trouble: func(err error) {
				w.log.Warn().Err(err).Int("partition", n).Msg("cannot pull; trying again")
			},
		}
		w.partitions = append(w.partitions, p)
	}
	return nil
}

// apiPrefix is where js sends its requests, which a domain changes.
func apiPrefix(js jetstream.JetStream) string {
	if domain := js.Options().Domain; domain != "" {
		return "$JS." + domain + ".API."
	}
	return jetstream.DefaultAPIPrefix
}

// Stats may be called at any time.
func (w *Worker) Stats() Stats {
	s := &w.stats
	return Stats{
		Calls: s.calls.Load(), Results: s.results.Load(), DeadLetters: s.deadLetters.Load(),
		Retries: s.retries.Load(), Held: time.Duration(s.held.Load()),
	}
}

// Working is the number of messages that are called, settled or waiting in this
// worker.
func (w *Worker) Working() int { return w.shared.gates.InFlight() + int(w.shared.memory.count.Load()) }

// Run works until ctx ends. Then it stops pulling, lets calls in flight finish
// within the grace time, gives back what has not been called, and releases its
// partitions. It returns an error only if it could not start.
func (w *Worker) Run(ctx context.Context) error {
	callCtx, cutCalls := context.WithCancel(context.WithoutCancel(ctx))
	defer cutCalls()
	settleCtx, cutSettle := context.WithCancel(context.WithoutCancel(ctx))
	defer cutSettle()
	w.caller.ctx, w.settler.ctx = callCtx, settleCtx

	// The keepers of leases and deliveries go on until all calls are over.
	keepCtx, stopKeeping := context.WithCancel(context.WithoutCancel(ctx))
	defer stopKeeping()
	var keepers errgroup.Group
	keep := func(f func(context.Context)) {
		keepers.Go(func() error {
			f(keepCtx)
			return nil
		})
	}
	keep(w.holds.Run)
	keep(w.limits.Run)
	for _, ready := range []<-chan struct{}{w.holds.Ready(), w.limits.Ready()} {
		select {
		case <-ready: // before its first call a worker knows every hold and limit
		case <-ctx.Done():
		}
	}
	all := make([]ownership.Partition, len(w.partitions))
	for i, p := range w.partitions {
		all[i] = p
	}
	keep(func(ctx context.Context) { w.budget.Run(ctx, funds{w}) })
	keep(w.watchBacklog)
	keep(w.tick)
	keep(w.reconcile)
	keep(w.lookForOverdue)
	keep(w.spend)
	released := make(chan struct{})
	keep(func(keepCtx context.Context) {
		defer close(released)
		if err := w.keeper.Run(keepCtx, ctx.Done(), all); err != nil {
			w.log.Warn().Err(err).Msg("not everything was released; the leases expire by themselves")
		}
	})
	<-ctx.Done()

	w.log.Info().Int("in_flight", w.shared.gates.InFlight()).Dur("grace_ms", w.cfg.Grace).Msg("stopping: no more messages are taken")
	for _, p := range w.partitions {
		p.close()
	}
	w.wait(released, cutCalls, cutSettle)
	stopKeeping()
	return keepers.Wait()
}

// wait lets the calls in flight finish, and cuts them off after the grace time. The partitions are
// released meanwhile, each when its own calls are over.
func (w *Worker) wait(released <-chan struct{}, cutCalls, cutSettle func()) {
	done := make(chan struct{})
	go func() {
		<-released
		w.work.Wait()
		close(done)
	}()
	grace := time.NewTimer(w.cfg.Grace)
	defer grace.Stop()
	select {
	case <-done:
		return
	case <-grace.C:
		w.log.Warn().Int("in_flight", w.shared.gates.InFlight()).Msg("grace time is over: calls are cut off and their requests given back")
		cutCalls()
	}
	// An answer that is here is worth storing.
	settle := time.NewTimer(w.cfg.StoreTimeout)
	defer settle.Stop()
	select {
	case <-done:
	case <-settle.C:
		cutSettle()
		<-done
	}
}

// tick does the periodic work.
func (w *Worker) tick(ctx context.Context) {
	t := time.NewTicker(tickEvery)
	defer t.Stop()
	reconnected := w.nc.StatusChanged(nats.CONNECTED)
	defer w.nc.RemoveStatusListener(reconnected)
	lastSweep, serverID := time.Now(), w.nc.ConnectedServerId()
	for {
		var now time.Time
		rebind, restarted := false, false
		select {
		case <-ctx.Done():
			return
		case <-reconnected:
			// The server that had our requests for messages may be gone.
			rebind, now = true, time.Now()
			id := w.nc.ConnectedServerId()
			restarted, serverID = id != serverID, id
		case now = <-t.C:
		}
		w.shared.gates.SetWorkers(w.keeper.Members())
		sweep := now.Sub(lastSweep) >= sweepEvery
		for _, p := range w.partitions {
			p.extend(now)
			if rebind || p.puller.silent(now) {
				p.rebind(ctx, restarted)
			}
			p.judge(now)
			p.pull()
			if sweep {
				p.sweep(now)
			}
		}
		w.shared.wake() // makes up for a wake-up that was lost
		if sweep {
			lastSweep = now
		}
	}
}

// tickEvery is how often deliveries are extended and pulls are watched.
const tickEvery = 250 * time.Millisecond

// delivered reports whether a worker has had messages of the partition lately, or may
// have had.
func (w *Worker) delivered(ctx context.Context, partition int) bool {
	info, err := w.server.consumer(ctx, partition)
	if err != nil {
		return true
	}
	d := info.Delivered
	return d.Consumer > 0 && (d.Last == nil || time.Since(*d.Last) < publisher.OwnerMarker)
}

// pumpAll lets every creator go on, because a hold or a breaker of all of them has ended.
func (w *Worker) pumpAll() {
	for _, p := range w.partitions {
		p.pumpAll()
		p.pull()
	}
}

// owns reports whether a creator is this worker's to call.
func (w *Worker) owns(creator string) bool {
	p := w.partitionOf(creator)
	return p != nil && p.lease.Valid(time.Now())
}

// partitionOf is a creator's partition, nil if there can be no such creator.
func (w *Worker) partitionOf(creator string) *partition {
	n, err := PartitionOf(creator, len(w.partitions))
	if err != nil {
		return nil
	}
	return w.partitions[n]
}

// steering is how holds and limits reach the gates.
type steering struct{ w *Worker }

// Hold implements control.Gates.
func (s steering) Hold(t control.Target, by resilience.Authority, h resilience.Hold) {
	switch t.Kind {
	case control.Account:
		s.w.shared.gates.HoldAccount(by, h)
	case control.Provider:
		s.w.shared.gates.HoldProvider(by, h)
	default:
		if p := s.w.partitionOf(t.Creator); p != nil {
			p.hold(t.Creator, by, h)
		}
	}
}

// Release implements control.Gates.
func (s steering) Release(t control.Target, by resilience.Authority) {
	switch t.Kind {
	case control.Account:
		s.w.shared.gates.ReleaseAccount(by)
	case control.Provider:
		s.w.shared.gates.ReleaseProvider(by)
	default:
		if p := s.w.partitionOf(t.Creator); p != nil {
			p.release(t.Creator, by)
		}
		return
	}
	s.w.pumpAll()
}

// Limit implements control.Gates.
func (s steering) Limit(creator string, l resilience.Limits) {
	if p := s.w.partitionOf(creator); p != nil {
		p.limit(creator, l)
	}
}

// Owns implements control.Gates.
func (s steering) Owns(creator string) bool { return s.w.owns(creator) }

// funds is how tokens of the account's limit reach the gates.
type funds struct{ w *Worker }

// Wanted implements budget.Client.
func (f funds) Wanted() int { return f.w.shared.wanted() }

// Workers implements budget.Client.
func (f funds) Workers() int { return f.w.keeper.Members() }

// Wake implements budget.Client.
func (f funds) Wake() { f.w.shared.wake() }
