// Package consumer is Headgate's worker: it owns partitions of the request
// stream, pulls their messages, calls the API for those that their creator's
// gate admits, decides what each answer means and settles the message.
//
// A request with a PubAck ends in exactly one durable outcome, a result or a
// dead letter, or is still visibly waiting. The call itself may happen more
// than once.
package consumer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// API makes the calls. Prepare checks a request against what its operation
// needs and returns the call; its error says what the request lacks, and makes
// it a dead letter without a call. A call never fails in a way that its answer
// does not tell.
type API interface {
	Prepare(*publisher.Request) (call func(context.Context) classify.Answer, err error)
}

// Refresher is an API whose credentials can be renewed.
type Refresher interface {
	// Refresh renews the credentials with which a call was refused, once however
	// many calls were. It reports false if they cannot be renewed, and an error if
	// that is not known.
	Refresh(ctx context.Context, refused classify.Answer) (bool, error)
}

// Operation is what a worker has to know of one kind of request.
type Operation struct {
	Kind resilience.Kind
	// NotFoundEmpty: nothing found is an empty result, not a failure.
	NotFoundEmpty bool
	// NotIdempotent: to call it twice does harm. When it is not known whether a call
	// was made the request is a dead letter, UNCERTAIN, unless RetryUncertain.
	NotIdempotent  bool
	RetryUncertain bool
	Retry          Retry

	name string
}

// AnyOperation is the key of the operation that stands for all that are not named.
const AnyOperation = "*"

// Config is a worker's. Only what says so may be left zero.
type Config struct {
	Name       string // of this worker, unique
	Provider   string // for people
	Topology   publisher.Topology
	Profile    *classify.Profile
	API        API
	Operations map[string]Operation
	Gates      resilience.Config
	Credits    Credits

	// Grace is how long calls in flight may go on when the worker is told to
	// stop. Zero: they are cut off at once.
	Grace time.Duration
	// StoreTimeout bounds one attempt to write to the server; default 5 s.
	StoreTimeout time.Duration
	Observer     Observer // nil: nobody
	Log          zerolog.Logger
}

// Observer is told what a worker does, as it does it. Operations that are not
// named in the configuration come as AnyOperation.
type Observer interface {
	// Called: a call has ended, with a class if it failed. insideHold means that it
	// began although the creator was held, which must not happen.
	Called(operation string, class classify.Class, status int, took time.Duration, insideHold bool)
	// Retried: the request will be called again.
	Retried(class classify.Class)
	// Settled: a request has its outcome, after so many calls; a class if it is
	// a dead letter.
	Settled(class classify.Class, calls int)
}

// nobody observes.
type nobody struct{}

func (nobody) Called(string, classify.Class, int, time.Duration, bool) {}
func (nobody) Retried(classify.Class)                                  {}
func (nobody) Settled(classify.Class, int)                             {}

// Stats counts what a worker has done.
type Stats struct {
	Calls, Results, DeadLetters, Retries int64
	Held                                 time.Duration // sum of all holds that answers asked for
}

// Worker is made by New and runs once.
type Worker struct {
	cfg       Config
	log       zerolog.Logger
	nc        *nats.Conn
	publisher *publisher.Publisher
	gates     *resilience.Gates
	holds     *holds
	limits    *limits
	members   *members
	budget    *budget
	credits   *credits
	ledger    *ledger
	requests  string           // names of streams
	results   string           //
	stream    jetstream.Stream // of requests
	created   time.Time        // when it was, for requests without an id
	backlog   atomic.Int64     // what is in it, as of a few seconds ago
	oldest    atomic.Int64     // and when the oldest was stored, Unix nanoseconds

	partitions []*partition
	calls      sync.WaitGroup
	near       atomic.Int64 // messages waiting in this worker
	lines      [3]line      // creators that wait for what they share
	suspects   suspects
	storing    deadlines

	callCtx   context.Context // of calls
	settleCtx context.Context // of what must be done once a call was made
	cutCalls  context.CancelFunc
	cutSettle context.CancelFunc

	stats struct{ calls, results, deadLetters, retries, held atomic.Int64 }
}

// New binds to what publisher.Topology.Ensure has made. It calls nobody. The connection must
// not keep what is written while it is down (nats.ReconnectBufSize(-1)): sent later, it
// would settle what is another worker's by then.
func New(ctx context.Context, nc *nats.Conn, cfg Config) (*Worker, error) {
	gates, err := resilience.NewGates(cfg.Gates)
	if err != nil {
		return nil, err
	}
	if nc.Opts.ReconnectBufSize >= 0 {
		return nil, errors.New("a worker's connection must not buffer while it is down; connect with nats.ReconnectBufSize(-1)")
	}
	if cfg.Observer == nil {
		cfg.Observer = nobody{}
	}
	if cfg.StoreTimeout == 0 {
		cfg.StoreTimeout = 5 * time.Second
	}
	// Room for a result and a dead letter of everything in flight.
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(2*cfg.Gates.InFlight), jetstream.WithPublishAsyncTimeout(cfg.StoreTimeout))
	if err != nil {
		return nil, fmt.Errorf("use JetStream: %w", err)
	}
	cfg.Topology = cfg.Topology.WithDefaults()
	ns := cfg.Topology.Namespace
	if cfg.Topology.Partitions < 1 {
		return nil, errors.New("a worker needs at least one partition")
	}
	w := &Worker{
		cfg: cfg, log: cfg.Log, nc: nc, gates: gates,
		publisher: publisher.New(js, cfg.Topology),
		requests:  ns.Stream(publisher.Requests), results: ns.Stream(publisher.Results),
	}
	stream, err := js.Stream(ctx, w.requests)
	if err != nil {
		return nil, fmt.Errorf("bind to stream %s (has `headgate setup` been run?): %w", w.requests, err)
	}
	w.stream, w.created = stream, stream.CachedInfo().Created

	buckets := map[string]jetstream.KeyValue{}
	for _, name := range []string{publisher.Holds, publisher.Limits, publisher.Ledger, publisher.Budgets, publisher.Owners} {
		if buckets[name], err = js.KeyValue(ctx, ns.Stream(name)); err != nil {
			return nil, fmt.Errorf("bind to bucket %s (has `headgate setup` been run?): %w", ns.Stream(name), err)
		}
	}
	w.holds = &holds{kv: buckets[publisher.Holds], log: cfg.Log, known: make(map[string]knownHold)}
	w.limits = &limits{kv: buckets[publisher.Limits], log: cfg.Log, usual: cfg.Gates.Creator, creators: make(map[string]resilience.Limits)}
	w.members = newMembers(buckets[publisher.Owners], cfg.Name, cfg.Log)
	w.budget = &budget{kv: buckets[publisher.Budgets], rate: cfg.Gates.Account, log: cfg.Log, wanted: make(chan struct{}, 1)}
	w.credits = &credits{kv: buckets[publisher.Budgets], cfg: cfg.Credits, log: cfg.Log}
	w.lines = [...]line{
		{reason: resilience.ReasonWorker, full: gates.Full},
		{reason: resilience.ReasonSlow, full: gates.SlowFull},
		{reason: resilience.ReasonAccount, full: func() bool { return gates.Broke(time.Now()) }},
	}
	api := apiPrefix(js)
	w.ledger = &ledger{nc: nc, kv: buckets[publisher.Ledger], stream: "KV_" + ns.Stream(publisher.Ledger), api: api}

	// Together the partitions have no more in their buffers than the worker
	// can call at once, so that none waits there for longer than a call.
	window := min(max(cfg.Gates.InFlight/cfg.Topology.Partitions, 8), 256)
	for n := range cfg.Topology.Partitions {
		p := &partition{w: w, number: n, here: make(map[uint64]*delivery)}
		p.lease = newLease(buckets[publisher.Owners], n)
		p.puller = puller{
			nc: nc, window: window, receive: p.receive,
			next: fmt.Sprintf("%sCONSUMER.MSG.NEXT.%s.%s", api, w.requests, publisher.ConsumerName(n)),
			trouble: func(err error) {
				w.log.Warn().Err(err).Int("partition", n).Msg("cannot pull; trying again")
			},
		}
		w.partitions = append(w.partitions, p)
	}
	return w, nil
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
func (w *Worker) Working() int { return w.gates.InFlight() + int(w.near.Load()) }

// Run works until ctx ends. Then it stops pulling, lets calls in flight finish
// within the grace time, gives back what has not been called, and releases its
// partitions. It returns an error only if it could not start.
func (w *Worker) Run(ctx context.Context) error {
	w.callCtx, w.cutCalls = context.WithCancel(context.WithoutCancel(ctx))
	defer w.cutCalls()
	w.settleCtx, w.cutSettle = context.WithCancel(context.WithoutCancel(ctx))
	defer w.cutSettle()

	// What keeps leases and deliveries alive goes on until all calls are over.
	keepCtx, stopKeeping := context.WithCancel(context.WithoutCancel(ctx))
	defer stopKeeping()
	var keepers errgroup.Group
	for _, b := range []struct {
		kv    jetstream.KeyValue
		apply func(jetstream.KeyValueEntry)
	}{
		{w.holds.kv, func(e jetstream.KeyValueEntry) { w.holds.apply(w, e) }},
		{w.limits.kv, func(e jetstream.KeyValueEntry) { w.limits.apply(w, e) }},
		{w.members.kv, w.members.apply},
	} {
		ready := make(chan struct{})
		keepers.Go(func() error {
			w.follow(keepCtx, b.kv, b.apply, sync.OnceFunc(func() { close(ready) }))
			return nil
		})
		select {
		case <-ready: // before its first call a worker knows every hold, limit and owner
		case <-ctx.Done():
		}
	}
	keepers.Go(func() error { w.fund(keepCtx); return nil })
	keepers.Go(func() error { w.watchBacklog(keepCtx); return nil })
	keepers.Go(func() error { w.own(keepCtx, ctx.Done()); return nil })
	keepers.Go(func() error { w.tick(keepCtx); return nil })
	keepers.Go(func() error { w.count(keepCtx); return nil })
	keepers.Go(func() error { w.spend(keepCtx); return nil })
	<-ctx.Done()

	w.log.Info().Int("in_flight", w.gates.InFlight()).Dur("grace_ms", w.cfg.Grace).Msg("stopping: no more messages are taken")
	w.members.leave(keepCtx, w.cfg.StoreTimeout) // the others know at once whose partitions come free
	for _, p := range w.partitions {
		p.close()
	}
	w.wait()
	stopKeeping()
	_ = keepers.Wait()
	return w.release(context.WithoutCancel(ctx))
}

// wait lets what is in flight finish, and cuts it off after the grace time.
func (w *Worker) wait() {
	done := make(chan struct{})
	go func() {
		w.calls.Wait()
		close(done)
	}()
	grace := time.NewTimer(w.cfg.Grace)
	defer grace.Stop()
	select {
	case <-done:
		return
	case <-grace.C:
		w.log.Warn().Int("in_flight", w.gates.InFlight()).Msg("grace time is over: calls are cut off and their requests given back")
		w.cutCalls()
	}
	// An answer that is here is worth storing.
	settle := time.NewTimer(w.cfg.StoreTimeout)
	defer settle.Stop()
	select {
	case <-done:
	case <-settle.C:
		w.cutSettle()
		<-done
	}
}

func (w *Worker) release(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, w.cfg.StoreTimeout)
	defer cancel()
	var errs []error
	for _, p := range w.partitions {
		errs = append(errs, p.lease.release(ctx))
	}
	if err := w.nc.FlushWithContext(ctx); err != nil {
		errs = append(errs, fmt.Errorf("flush: %w", err))
	}
	if err := errors.Join(errs...); err != nil {
		w.log.Warn().Err(err).Msg("not everything was released; the leases expire by themselves")
	}
	return nil
}

// follow applies what is in a bucket and then each change, again and again
// should the watch end. It calls ready when all that is there has been applied.
func (w *Worker) follow(ctx context.Context, kv jetstream.KeyValue, apply func(jetstream.KeyValueEntry), ready func()) {
	for ctx.Err() == nil {
		if err := watch(ctx, kv, apply, ready); err != nil && ctx.Err() == nil {
			w.log.Error().Err(err).Msg("changes are not followed; trying again")
			sleep(ctx, time.Second)
		}
	}
}

func watch(ctx context.Context, kv jetstream.KeyValue, apply func(jetstream.KeyValueEntry), ready func()) error {
	watcher, err := kv.WatchAll(ctx)
	if err != nil {
		return fmt.Errorf("watch %s: %w", kv.Bucket(), err)
	}
	defer func() { _ = watcher.Stop() }()
	for {
		select {
		case <-ctx.Done():
			return nil
		case entry, open := <-watcher.Updates():
			switch {
			case !open:
				return fmt.Errorf("watch %s: the watcher ended", kv.Bucket())
			case entry == nil:
				ready()
			default:
				apply(entry)
			}
		}
	}
}

// tick does what has to be done now and then.
func (w *Worker) tick(ctx context.Context) {
	t := time.NewTicker(250 * time.Millisecond)
	defer t.Stop()
	reconnected := w.nc.StatusChanged(nats.CONNECTED)
	defer w.nc.RemoveStatusListener(reconnected)
	lastSweep, lastHurry := time.Now(), time.Now()
	for {
		rebind := false
		var now time.Time
		select {
		case <-ctx.Done():
			return
		case <-reconnected:
			rebind = true // the server that had our requests for messages may be gone
			now = time.Now()
		case now = <-t.C:
		}
		sweep, hurry := now.Sub(lastSweep) >= sweepEvery, now.Sub(lastHurry) >= hurryEvery
		for _, p := range w.partitions {
			p.extend(now)
			if rebind || p.puller.silent(now) {
				p.rebind(ctx)
			}
			p.pull()
			if hurry {
				p.hurry(now)
			}
			if sweep {
				p.sweep(now)
			}
		}
		if hurry {
			lastHurry = now
		}
		if sweep {
			lastSweep = now
			w.holds.expire(ctx, now, w.owns)
		}
	}
}

// read turns a stored message into a request. It has an id, a creator and an
// operation even if it cannot be read, so that its dead letter can be found.
func (w *Worker) read(d *delivery) (publisher.Request, error) {
	fallback := fmt.Sprintf("%d-%d", w.created.Unix(), d.seq)
	req, err := publisher.ParseRequest(w.cfg.Topology.Namespace, d.msg.Subject, d.msg.Header, d.msg.Data, fallback)
	if err != nil {
		if req.ID == "" {
			req.ID = fallback
		}
		if req.Creator == "" || req.Operation == "" {
			req.Creator, req.Operation = unreadable, unreadable
		}
	}
	return req, err
}

// unreadable stands for a creator or operation that cannot be read.
const unreadable = "unreadable"

// prepare finds a request's operation and turns it into a call.
func (w *Worker) prepare(req *publisher.Request) (Operation, func(context.Context) classify.Answer, error) {
	op, ok := w.cfg.Operations[req.Operation]
	op.name = req.Operation
	if !ok {
		op, ok = w.cfg.Operations[AnyOperation]
		op.name = AnyOperation
	}
	if !ok {
		known := slices.Sorted(maps.Keys(w.cfg.Operations))
		return op, nil, fmt.Errorf("no operation %q is configured; there are: %s", req.Operation, strings.Join(known, ", "))
	}
	call, err := w.cfg.API.Prepare(req)
	return op, call, err
}

// reply answers a delivery without waiting for the server. What gets lost is
// made up for by AckWait.
func (w *Worker) reply(subject string, payload []byte) {
	if subject == "" {
		return // no delivery: the sweeper found it, and will find it again
	}
	if err := w.nc.Publish(subject, payload); err != nil {
		w.log.Debug().Err(err).Msg("answer a delivery")
	}
}

// released ends a creator's hold here, wherever the creator is.
func (w *Worker) released(creator string) {
	if p := w.partitionOf(creator); p != nil {
		p.release(creator)
	}
}

// owns reports whether a creator is this worker's to call.
func (w *Worker) owns(creator string) bool {
	p := w.partitionOf(creator)
	return p != nil && p.lease.holds(time.Now())
}

// partitionOf is a creator's partition, nil if there can be no such creator.
func (w *Worker) partitionOf(creator string) *partition {
	n, err := PartitionOf(creator, len(w.partitions))
	if err != nil {
		return nil
	}
	return w.partitions[n]
}

func (w *Worker) replanAll() {
	for _, p := range w.partitions {
		p.replanAll()
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
