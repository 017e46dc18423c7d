package ownership

import (
	"bytes"
	"context"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
)

// rig is a broker with a bucket of owners, and the workers on it.
type rig struct {
	t          testing.TB
	nc         *nats.Conn
	js         jetstream.JetStream
	kv         jetstream.KeyValue
	partitions int
	ttl        time.Duration
	log        log
}

func newRig(t testing.TB, partitions int) *rig {
	t.Helper()
	r := &rig{t: t, partitions: partitions, ttl: publisher.OwnerTTL}
	r.connect(natsservertest.Connect(t))
	return r
}

func (r *rig) connect(nc *nats.Conn) {
	r.t.Helper()
	var err error
	r.nc = nc
	if r.js, err = jetstream.New(nc); err != nil {
		r.t.Fatal(err)
	}
	r.makeBucket()
}

func (r *rig) makeBucket() {
	r.t.Helper()
	var err error
	r.kv, err = r.js.CreateKeyValue(r.t.Context(), jetstream.KeyValueConfig{
		Bucket: publisher.Owners, TTL: r.ttl, LimitMarkerTTL: publisher.OwnerMarker, History: 1, Storage: jetstream.FileStorage,
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) deleteBucket() {
	r.t.Helper()
	if err := r.js.DeleteKeyValue(r.t.Context(), publisher.Owners); err != nil {
		r.t.Fatal(err)
	}
}

// expire does for the rest of the test what the server does with keys that are not written again. The
// server itself cannot in a simulation: its clock for ages is the real one. TestExpiry shows
// that this is what it does.
func (r *rig) expire() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	r.t.Cleanup(func() { cancel(); <-done })
	s := r.store()
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			_ = s.each(ctx, ">", func(m *message) {
				if time.Since(m.time) > r.ttl && m.header.Get(jetstream.MsgTTLHeader) != "never" {
					r.expireNow(ctx, m)
				}
			})
			wait(ctx, 500*time.Millisecond)
		}
	}()
}

func (r *rig) expireNow(ctx context.Context, m *message) {
	if m.marks() {
		if s, err := r.js.Stream(ctx, "KV_"+publisher.Owners); err == nil {
			_ = s.Purge(ctx, jetstream.WithPurgeSubject("$KV."+publisher.Owners+"."+m.key), jetstream.WithPurgeSequence(m.sequence+1))
		}
		return
	}
	mark := nats.NewMsg("$KV." + publisher.Owners + "." + m.key)
	mark.Header.Set(jetstream.MarkerReasonHeader, "MaxAge")
	mark.Header.Set(jetstream.MsgRollup, jetstream.MsgRollupSubject)
	_, _ = r.js.PublishMsg(ctx, mark, jetstream.WithExpectLastSequencePerSubject(m.sequence))
}

func (r *rig) put(key, value string) {
	r.t.Helper()
	if _, err := r.kv.Put(r.t.Context(), key, []byte(value)); err != nil {
		r.t.Fatal(err)
	}
}

// last is the last message of a key, nil if there is none.
func (r *rig) last(key string) *message {
	r.t.Helper()
	m, err := newStore(r.nc, r.js, r.kv).last(r.t.Context(), key)
	if err != nil {
		r.t.Fatal(err)
	}
	return m
}

func (r *rig) store() *store { return newStore(r.nc, r.js, r.kv) }

func (r *rig) lease(worker string, partition int) *Lease {
	return newLease(r.store(), worker, partition, r.ttl)
}

// worker is a Keeper that runs.
type worker struct {
	*Keeper
	r     *rig
	parts []*part
	stop  func()        // and wait
	begin func()        // to stop
	kill  func()        // without a word
	done  chan struct{} // Run has returned
}

// config is that of a worker without history.
func (r *rig) config(name string) Config {
	return Config{
		Name: name, Partitions: r.partitions, NC: r.nc, JS: r.js, KV: r.kv, Log: zerolog.New(&r.log), TTL: r.ttl,
		Delivered: func(context.Context, int) bool { return false },
	}
}

func (r *rig) start(name string, change ...func(*Config)) *worker {
	r.t.Helper()
	cfg := r.config(name)
	for _, f := range change {
		f(&cfg)
	}
	k, err := New(cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	w := &worker{Keeper: k, r: r, done: make(chan struct{})}
	var all []Partition
	for n := range r.partitions {
		p := &part{n: n, lease: k.Lease(n)}
		p.ended.L = &p.mu
		w.parts = append(w.parts, p)
		all = append(all, p)
	}
	return r.run(w, all)
}

func (r *rig) run(w *worker, all []Partition) *worker {
	ctx, cancel := context.WithCancel(context.Background())
	stop := make(chan struct{})
	w.begin = sync.OnceFunc(func() { close(stop) })
	w.stop = func() { w.begin(); <-w.done }
	w.kill = sync.OnceFunc(func() {
		cancel()
		for _, p := range w.parts {
			p.endAll()
		}
		<-w.done
	})
	go func() {
		defer close(w.done)
		if err := w.Run(ctx, stop, all); err != nil {
			r.t.Error(err)
		}
	}()
	r.t.Cleanup(w.kill)
	return w
}

// owned are the partitions that take messages.
func (w *worker) owned() []int {
	var all []int
	for _, p := range w.parts {
		if p.isActive() {
			all = append(all, p.n)
		}
	}
	return all
}

// part is a Partition.
type part struct {
	n     int
	lease *Lease
	busy  atomic.Bool // it is not idle
	fail  atomic.Pointer[error]

	mu      sync.Mutex
	ended   sync.Cond
	active  bool
	entries []Before
	leaves  int // of them, how often there was something to leave
	left    int // how often Leave was called
	early   int // how often it was asked for its calls while another could start
	still   []string
	calls   map[string]int
}

func (p *part) Number() int { return p.n }

func (p *part) Enter(_ context.Context, b Before) error {
	if err := p.fail.Load(); err != nil {
		return *err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.active {
		panic("entered twice")
	}
	p.active, p.still = true, b.Calling
	p.entries = append(p.entries, b)
	return nil
}

func (p *part) Leave() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.left++
	was := p.active
	p.active = false
	if was {
		p.leaves++
	}
	return was
}

func (p *part) Idle() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.calls) == 0 && !p.busy.Load()
}

func (p *part) Wait() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.calls) > 0 {
		p.ended.Wait()
	}
}

func (p *part) Calling() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lease.Valid(time.Now()) {
		p.early++
	}
	return slices.Sorted(maps.Keys(p.calls))
}

func (p *part) StillCalled(creators []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.still = creators
}

func (p *part) stillCalled() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.still
}

func (p *part) isActive() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.active
}

func (p *part) befores() []Before {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.entries)
}

// begin starts a call if it may.
func (p *part) begin(creator string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.active || slices.Contains(p.still, creator) {
		return false
	}
	if p.calls == nil {
		p.calls = map[string]int{}
	}
	p.calls[creator]++ // first this, then the lease is asked
	if !p.lease.Valid(time.Now()) {
		p.over(creator)
		return false
	}
	return true
}

func (p *part) end(creator string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over(creator)
}

func (p *part) over(creator string) {
	if p.calls[creator]--; p.calls[creator] <= 0 {
		delete(p.calls, creator)
	}
	p.ended.Broadcast()
}

func (p *part) endAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.calls)
	p.ended.Broadcast()
}

// eventually waits until a condition holds.
func eventually(t testing.TB, within time.Duration, says string, holds func() bool) time.Duration {
	t.Helper()
	began := time.Now()
	for !holds() {
		if time.Since(began) > within {
			t.Fatalf("not within %v: %s", within, says)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(began)
}

// all waits until the workers have all partitions between them.
func (r *rig) all(within time.Duration, workers ...*worker) time.Duration {
	r.t.Helper()
	return eventually(r.t, within, "all partitions owned", func() bool {
		var all []int
		for _, w := range workers {
			all = append(all, w.owned()...)
		}
		return len(all) == r.partitions
	})
}

// balanced waits until each of the workers has its share.
func (r *rig) balanced(within time.Duration, workers ...*worker) time.Duration {
	r.t.Helper()
	return eventually(r.t, within, "balanced", func() bool {
		sum := 0
		for _, w := range workers {
			n := len(w.owned())
			sum += n
			if n < r.partitions/len(workers) || n > (r.partitions+len(workers)-1)/len(workers) {
				return false
			}
		}
		return sum == r.partitions
	})
}

// log is read while it is written.
type log struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (l *log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if os.Getenv("HEADGATE_TEST_LOG") != "" {
		_, _ = io.MultiWriter(os.Stderr).Write(b)
	}
	return l.all.Write(b)
}

func (l *log) count(says string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.all.String(), says)
}

// weak is a bucket behind a bad line.
type weak struct {
	jetstream.KeyValue
	delay time.Duration // of a write
	lose  atomic.Int64  // so many confirmations
}

func (w *weak) Update(ctx context.Context, key string, value []byte, last uint64) (uint64, error) {
	wait(ctx, w.delay)
	revision, err := w.KeyValue.Update(ctx, key, value, last)
	if err == nil && w.lose.Add(-1) >= 0 {
		return 0, context.DeadlineExceeded
	}
	return revision, err
}

// deaf is a bucket whose watch stands still from the beginning.
type deaf struct{ jetstream.KeyValue }

type deafWatcher struct {
	jetstream.KeyWatcher
	updates chan jetstream.KeyValueEntry
}

func (w deafWatcher) Updates() <-chan jetstream.KeyValueEntry { return w.updates }

func (d deaf) WatchAll(ctx context.Context, opts ...jetstream.WatchOpt) (jetstream.KeyWatcher, error) {
	inner, err := d.KeyValue.WatchAll(ctx, opts...)
	if err != nil {
		return nil, err
	}
	w := deafWatcher{inner, make(chan jetstream.KeyValueEntry)}
	go func() {
		select {
		case w.updates <- nil:
		case <-ctx.Done():
		}
	}()
	return w, nil
}
