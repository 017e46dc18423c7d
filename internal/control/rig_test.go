package control

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/resilience"
)

const bucketHolds, bucketLimits = "HOLDS", "LIMITS"

// gates is a worker that obeys: a hold a target and authority, limits a creator.
type gates struct {
	mu     sync.Mutex
	holds  map[string]resilience.Hold
	limits map[string]resilience.Limits
	calls  []string
	owns   func(creator string) bool // nil: all
}

func (g *gates) key(t Target, by Authority) string {
	key, err := t.Key(by)
	if err != nil {
		panic(err)
	}
	return key
}

func (g *gates) Hold(t Target, by Authority, h resilience.Hold) {
	g.mu.Lock()
	defer g.mu.Unlock()
	key := g.key(t, by)
	g.calls = append(g.calls, "hold "+key)
	if there, held := g.holds[key]; held && by == ByAPI && there.Stands(time.Now()) && !h.Outlasts(&there) {
		return
	}
	g.holds[key] = h
}

func (g *gates) Release(t Target, by Authority) {
	g.mu.Lock()
	defer g.mu.Unlock()
	key := g.key(t, by)
	g.calls = append(g.calls, "release "+key)
	delete(g.holds, key)
}

func (g *gates) Limit(creator string, l resilience.Limits) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.limits[creator] = l
}

func (g *gates) Owns(creator string) bool { return g.owns == nil || g.owns(creator) }

// held is the hold that the gate of a target obeys.
func (g *gates) held(t Target) *resilience.Hold {
	g.mu.Lock()
	defer g.mu.Unlock()
	var both [2]*resilience.Hold
	for _, by := range []Authority{ByPeople, ByAPI} {
		if h, there := g.holds[g.key(t, by)]; there {
			both[by] = &h
		}
	}
	return Later(time.Now(), both[0], both[1])
}

func (g *gates) limit(creator string) resilience.Limits {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.limits[creator]
}

// rig is a broker with the two buckets, and workers.
type rig struct {
	t   *testing.T
	nc  *nats.Conn
	js  jetstream.JetStream
	ctx context.Context
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, nc: natsservertest.Connect(t), ctx: t.Context()}
	var err error
	if r.js, err = jetstream.New(r.nc); err != nil {
		t.Fatal(err)
	}
	r.setup()
	return r
}

// newRigOn is newRig on a broker that can be stopped.
func newRigOn(t *testing.T, b *natsservertest.Broker) *rig {
	t.Helper()
	nc, err := nats.Connect("", nats.InProcessServer(b), nats.MaxReconnects(-1), nats.ReconnectWait(200*time.Millisecond), nats.ReconnectBufSize(-1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	r := &rig{t: t, nc: nc, ctx: t.Context()}
	if r.js, err = jetstream.New(nc); err != nil {
		t.Fatal(err)
	}
	r.setup()
	return r
}

func (r *rig) setup() {
	r.t.Helper()
	for _, bucket := range []string{bucketHolds, bucketLimits} {
		if _, err := r.js.CreateOrUpdateKeyValue(r.ctx, jetstream.KeyValueConfig{Bucket: bucket, History: 1}); err != nil {
			r.t.Fatal(err)
		}
	}
}

func (r *rig) drop(bucket string) {
	r.t.Helper()
	if err := r.js.DeleteKeyValue(r.ctx, bucket); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) put(bucket, key, value string) {
	r.t.Helper()
	if _, err := r.kv(bucket).PutString(r.ctx, key, value); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) kv(bucket string) jetstream.KeyValue {
	r.t.Helper()
	kv, err := r.js.KeyValue(r.ctx, bucket)
	if err != nil {
		r.t.Fatal(err)
	}
	return kv
}

// stored is the hold that a key of HOLDS has; nil: none that can be read.
func (r *rig) stored(key string) *resilience.Hold {
	entry, err := r.kv(bucketHolds).Get(r.ctx, key)
	if err != nil {
		return nil
	}
	h, err := ParseHold(entry.Value(), entry.Created())
	if err != nil {
		return nil
	}
	return &h
}

func (r *rig) desk() *Desk {
	r.t.Helper()
	d, err := OpenDesk(r.ctx, r.js, bucketHolds)
	if err != nil {
		r.t.Fatal(err)
	}
	return d
}

// worker is what one worker has of this package.
type worker struct {
	*gates
	h    *Holds
	l    *Limits
	log  *lines
	stop func()

	mu      sync.Mutex
	changes []Change
}

// told are the changes that were told so far, in words.
func (w *worker) told() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []string
	for _, c := range w.changes {
		all = append(all, fmt.Sprintf("%s %s by %s, %s",
			map[ChangeKind]string{Held: "held", Released: "released", Expired: "expired"}[c.Kind], c.Target, side(c.By), c.Who))
	}
	return all
}

func side(by Authority) string {
	if by == ByAPI {
		return "the API"
	}
	return "people"
}

var usual = resilience.Limits{Rate: resilience.Rate{PerSecond: 1, Burst: 90}, Concurrency: 3}

// start runs a worker until the test ends or it is stopped.
func (r *rig) start() *worker { return r.startOn(r.js, nil) }

func (r *rig) startOn(js jetstream.JetStream, owns func(string) bool) *worker {
	w := &worker{gates: &gates{holds: map[string]resilience.Hold{}, limits: map[string]resilience.Limits{}, owns: owns}, log: &lines{}}
	log := zerolog.New(w.log)
	w.h = NewHolds(js, bucketHolds, w.gates, func(c Change) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.changes = append(w.changes, c)
	}, log)
	w.l = NewLimits(js, bucketLimits, usual, w.gates, log)
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { w.h.Run(ctx) })
	done.Go(func() { w.l.Run(ctx) })
	w.stop = func() {
		cancel()
		done.Wait()
	}
	r.t.Cleanup(w.stop)
	return w
}

// ready waits until a worker knows both buckets.
func (w *worker) ready(t *testing.T) *worker {
	t.Helper()
	for _, ready := range []<-chan struct{}{w.h.Ready(), w.l.Ready()} {
		select {
		case <-ready:
		case <-time.After(time.Minute):
			t.Fatalf("not ready: %s", w.log)
		}
	}
	return w
}

// within waits, in simulated time, until it is so.
func within(t *testing.T, limit time.Duration, what string, so func() bool) {
	t.Helper()
	for began := time.Now(); !so(); time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > limit {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// simulate runs a test in simulated time.
func simulate(t *testing.T, test func(*rig)) {
	t.Helper()
	natsservertest.Simulate(t, func(t *testing.T) {
		test(newRig(t))
		synctest.Wait()
	})
}

// lines is a log.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *lines) count(text string) int { return strings.Count(l.String(), text) }

func alice(by Authority) string {
	key, _ := Target{Creator: "alice"}.Key(by)
	return key
}

func until(d time.Duration, reason string) resilience.Hold {
	h := resilience.Hold{Since: time.Now(), Reason: reason, Who: "w1"}
	if d > 0 {
		h.Until = h.Since.Add(d)
	}
	return h
}

// left is the time that a hold still has; -1: without end, 0: none.
func left(h *resilience.Hold) time.Duration {
	switch {
	case !h.Stands(time.Now()):
		return 0
	case h.Until.IsZero():
		return -1
	}
	return time.Until(h.Until).Round(time.Second)
}
