package consumer

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
)

var (
	seeds     = flag.Int("seeds", 5, "simulated runs")
	firstSeed = flag.Uint64("seed", 1, "the first run's seed")
	failures  = flag.Int("failures", 3, "go on until more simulated runs than these have violations")
)

// TestSimulation runs whole workers on the real broker through simulated hours
// of faults, and then holds what the API saw against what is stored. The world of
// one seed in four is kind: well-formed requests, and nobody at work but the workers.
func TestSimulation(t *testing.T) {
	failed := 0
	for n := range uint64(*seeds) {
		seed := *firstSeed + n
		hangs := time.AfterFunc(2*time.Minute, func() { panic(fmt.Sprintf("seed %d hangs", seed)) })
		var found []string
		natsservertest.Simulate(t, func(t *testing.T) { found = simulate(t, seed, false) })
		hangs.Stop()
		if len(found) > 0 { // said outside of the bubble, whose failure would end the test
			failed++
			t.Errorf("seed %d:\n%s", seed, strings.Join(found, "\n"))
		}
		if failed > *failures {
			t.Fatal("enough")
		}
	}
	t.Logf("%d runs from seed %d, %d with violations", *seeds, *firstSeed, failed)
}

// A worker that acks before the result is stored loses requests; the simulation
// notices.
func TestSimulationFindsAnEarlyAck(t *testing.T) {
	for seed := range uint64(50) {
		var found []string
		natsservertest.Simulate(t, func(t *testing.T) { found = simulate(t, seed, true) })
		if len(found) > 0 {
			t.Logf("found with seed %d: %s", seed, found[0])
			return
		}
	}
	t.Error("not found in 50 runs")
}

func simulate(t *testing.T, seed uint64, planted bool) (found []string) {
	var n nasty
	if seed%4 != 0 {
		n = nastyOf(seed)
	}
	w := newWorldOf(t, seed, n)
	w.planted = planted
	w.run()
	if len(w.found) > 0 && !planted {
		w.found = append(w.found, fmt.Sprintf("(%d partitions, %+v)", w.cfg.Topology.Partitions, n))
	}
	return w.found
}

// course is how a run goes: who works, and what happens.
type simCourse struct {
	w        *world
	helpers  sync.WaitGroup
	workers  []*simWorker
	creators int
}

// run is the course of a simulation.
func (w *world) run() {
	c := &simCourse{w: w}
	ctx, cancel := context.WithCancel(context.Background())
	defer c.helpers.Wait()
	defer cancel()
	c.helpers.Go(func() { w.expireLeases(ctx) })
	if w.nasty.on {
		c.helpers.Go(func() { w.watchHolds(ctx) })
		if err := w.capture(); err != nil {
			w.t.Fatal(err)
		}
	}
	defer func() {
		for _, s := range c.workers {
			s.stop()
		}
		time.Sleep(2 * time.Second) // for what is under way
	}()
	c.start()
	c.start()
	requests := 30 + w.rng.IntN(60)
	c.creators = 2 + w.rng.IntN(8)
	published := 0
	for events := 3 + w.rng.IntN(8); events > 0 || published < requests; {
		for range w.rng.IntN(10) {
			if published < requests {
				w.publish(c.creators)
				published++
			}
		}
		time.Sleep(time.Duration(w.rng.IntN(12_000)) * time.Millisecond)
		if w.nasty.on {
			c.ask()
			if w.rng.IntN(4) == 0 {
				w.publishAs(fmt.Sprintf("probe-%d", published), fmt.Sprintf("probe-%d-%d", published, w.rng.IntN(1000)), "send")
			}
		}
		if events == 0 {
			continue
		}
		events--
		if w.nasty.on && w.rng.IntN(2) == 0 {
			c.nastyEvent()
		} else {
			c.event()
		}
	}
	c.heal()
	w.drained(c, 3*time.Hour)
	time.Sleep(3 * time.Minute) // for whatever comes late
	if missing, err := w.check(); err != nil || missing != "" {
		w.violation("at the end: %s (%v)", missing, err)
	}
	w.judge()
}

func (c *simCourse) start() {
	if s := c.w.start(); s != nil {
		c.workers = append(c.workers, s)
	}
}

func (c *simCourse) remove() *simWorker {
	i := c.w.rng.IntN(len(c.workers))
	s := c.workers[i]
	c.workers = slices.Delete(c.workers, i, i+1)
	return s
}

// event is something that happens to workers and servers everywhere.
func (c *simCourse) event() {
	w := c.w
	w.fault()
	switch kind := w.rng.IntN(7); {
	case kind == 0 && len(c.workers) < 4:
		c.start()
	case kind == 1 && len(c.workers) > 0:
		s := c.remove()
		c.helpers.Go(s.stop)
	case kind <= 3 && len(c.workers) > 0:
		c.remove().crash()
		c.start()
	case kind == 4:
		end := w.trouble("")
		w.broker.Stop()
		time.Sleep(time.Duration(w.rng.IntN(25_000)) * time.Millisecond)
		w.broker.Start()
		end()
	case len(c.workers) > 0:
		// Nothing reaches the server, nor comes from it, for a while; then all of it does.
		s := c.workers[w.rng.IntN(len(c.workers))]
		d := time.Duration(w.rng.IntN(90_000)) * time.Millisecond
		end := w.trouble(s.name)
		s.line.freeze()
		c.helpers.Go(func() {
			time.Sleep(d)
			s.line.thaw()
			end()
			w.fault()
		})
	}
}

// nastyEvent is something that happens in a nasty world only.
func (c *simCourse) nastyEvent() {
	w, n := c.w, c.w.nasty
	var kinds []func()
	add := func(on bool, do func()) {
		if on {
			kinds = append(kinds, do)
		}
	}
	add(n.operators, func() {
		for range 1 + w.rng.IntN(3) {
			w.operator(c.creators, &c.helpers)
		}
	})
	add(n.buckets, func() { w.remake(c.workers) })
	add(n.buckets, w.litter)
	add(n.consumers, w.remakeConsumers)
	add(n.full, func() { w.fill(&c.helpers) })
	add(n.kills, c.killAll)
	add(n.tokens, func() { w.expireToken(&c.helpers) })
	add(n.pauses, func() { time.Sleep(11 * time.Minute) })
	if len(kinds) > 0 {
		kinds[w.rng.IntN(len(kinds))]()
	}
}

// killAll is kill -9 of programs that are worker and server in one: all vanish together, and what
// consumers have been given of late is forgotten.
func (c *simCourse) killAll() {
	w := c.w
	if w.rng.IntN(3) > 0 {
		w.broker.SaveConsumers("REQUESTS")
		time.Sleep(time.Duration(w.rng.IntN(3000)) * time.Millisecond)
	}
	w.fault()
	end := w.trouble("")
	n := len(c.workers)
	for len(c.workers) > 0 {
		c.remove().crash()
	}
	w.broker.Kill("REQUESTS")
	time.Sleep(time.Duration(w.rng.IntN(5000)) * time.Millisecond)
	w.broker.Start()
	end()
	for range max(n, 1) {
		c.start()
	}
}

// heal: from here on nothing is broken.
func (c *simCourse) heal() {
	w := c.w
	for _, s := range c.workers {
		s.line.thaw()
	}
	w.mu.Lock()
	w.healed, w.endpointFails = true, false
	w.mu.Unlock()
	w.fault()
	c.start()
	if w.nasty.on {
		time.Sleep(2 * time.Minute) // for what was to last a while
		c.release()
	}
}

// release ends all holds and special limits.
func (c *simCourse) release() {
	w := c.w
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	w.mu.Lock()
	for _, h := range w.holds {
		w.endHolds(h.key)
	}
	clear(w.windows)
	for n := range c.creators {
		w.limits = append(w.limits, limitChange{creator: fmt.Sprintf("c%d", n), at: time.Now(), unknown: true})
	}
	w.mu.Unlock()
	for _, bucket := range []string{"HOLDS", "LIMITS"} {
		kv, err := w.js.KeyValue(ctx, bucket)
		if err != nil {
			continue
		}
		keys, _ := kv.Keys(ctx)
		for _, key := range keys {
			_ = kv.Delete(ctx, key)
		}
	}
}

// drained waits until no request is left, and every one has its outcome.
func (w *world) drained(c *simCourse, limit time.Duration) {
	released, empty := time.Now(), 0
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Second) {
		left := w.left()
		if left == 0 {
			missing, err := w.check()
			if err == nil && missing == "" {
				return
			}
			if empty++; empty > 30 {
				w.violation("nothing is left after %v, and: %s (%v)", time.Since(w.began), missing, err)
				return
			}
		}
		if time.Now().After(deadline) {
			missing, err := w.check()
			w.violation("not drained after %v: %d requests are left: %v; %s (%v)\n%s", limit, left, w.subjects("REQUESTS"), missing, err, w.explain(c))
			return
		}
		if c != nil && w.nasty.on && time.Since(released) > 5*time.Minute {
			c.release()
			released = time.Now()
		}
	}
}

// explain says what servers and workers know of the requests that are left.
func (w *world) explain(c *simCourse) string {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var text strings.Builder
	for p := range w.cfg.Topology.Partitions {
		if consumer, err := w.js.Consumer(ctx, "REQUESTS", publisher.ConsumerName(p)); err == nil {
			i := consumer.CachedInfo()
			fmt.Fprintf(&text, "partition %d: %d pending, %d delivered and not acked, %d pulls; ", p, i.NumPending, i.NumAckPending, i.NumWaiting)
		} else {
			fmt.Fprintf(&text, "partition %d: %v; ", p, err)
		}
	}
	if c == nil {
		return text.String()
	}
	for _, s := range c.workers {
		worker := s.worker.Load()
		for n := range c.creators {
			if worker == nil {
				continue
			}
			if y, known := worker.Why(fmt.Sprintf("c%d", n)); known {
				fmt.Fprintf(&text, "\n%s of c%d: %q, %d in flight, %d waiting, %d parked", s.name, n, y.Text, y.InFlight, y.Waiting, y.Parked)
			}
		}
	}
	return text.String()
}

// left is how many requests are stored; -1: not known.
func (w *world) left() int {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, err := w.js.Stream(ctx, "REQUESTS")
	if err != nil {
		return -1
	}
	return int(s.CachedInfo().State.Msgs)
}

func (w *world) fault() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.faults = append(w.faults, time.Now())
}

func (w *world) violation(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.addViolation(format, args...)
}

// addViolation is violation for those that hold w.mu.
func (w *world) addViolation(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); len(w.found) < 5 && !slices.Contains(w.found, text) {
		w.found = append(w.found, text)
	}
}

// ask asks why a creator waits. It must not hear that nothing waits while a request of the creator has
// been stored for a minute.
func (c *simCourse) ask() {
	w := c.w
	creator := fmt.Sprintf("c%d", w.rng.IntN(c.creators))
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	s, err := w.js.Stream(ctx, "REQUESTS")
	if err != nil {
		return
	}
	m, err := s.GetMsg(ctx, 1, jetstream.WithGetMsgSubject("requests.*."+creator+".*"))
	if err != nil || time.Since(m.Time) < simUnknown {
		return
	}
	for _, worker := range c.workers {
		now := time.Now()
		w.mu.Lock()
		able := w.clear(worker.name, m.Time.Add(simUnknown), now) && !w.troubled(worker.name) && now.Sub(worker.started) > simSettling
		w.mu.Unlock()
		if !able || worker.worker.Load() == nil {
			continue
		}
		y, known := worker.worker.Load().Why(creator)
		if !known || !strings.HasPrefix(y.Text, "nothing waits, and nothing keeps it") || y.InFlight > 0 {
			continue
		}
		if _, err := s.GetMsg(ctx, m.Sequence); err == nil {
			w.violation("at %v %s says of %s: %q, and a request is stored since %v", now.Sub(w.began), worker.name, creator, y.Text, m.Time.Sub(w.began))
		}
	}
}

// watchHolds learns which of the API's windows are known to the fleet.
func (w *world) watchHolds(ctx context.Context) {
	for ctx.Err() == nil {
		watch, stop := context.WithCancel(ctx)
		w.mu.Lock()
		w.stopWatch = stop
		w.mu.Unlock()
		if kv, err := w.js.KeyValue(watch, "HOLDS"); err == nil {
			if watcher, err := kv.WatchAll(watch); err == nil {
				for entry := range watcher.Updates() {
					if entry != nil && entry.Operation() == jetstream.KeyValuePut {
						w.sawHold(entry)
					}
				}
			}
		}
		stop()
		sleep(ctx, time.Second)
	}
}

// rewatch follows HOLDS from its start: it was made anew.
func (w *world) rewatch() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopWatch != nil {
		w.stopWatch()
	}
}

func (w *world) sawHold(entry jetstream.KeyValueEntry) {
	var h struct {
		Until *time.Time `json:"until"`
	}
	if json.Unmarshal(entry.Value(), &h) != nil {
		return
	}
	creator := strings.TrimSuffix(strings.TrimPrefix(entry.Key(), "creator."), ".api")
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.windows[creator] {
		win := &w.windows[creator][i]
		if win.known.IsZero() && (h.Until == nil || !h.Until.Before(win.till.Add(-time.Millisecond))) {
			win.known = time.Now()
		}
	}
	for _, p := range w.holds {
		if p.key == entry.Key() && p.lost && p.ended.IsZero() && h.Until != nil && !h.Until.Before(p.till) {
			p.lost, p.put = false, time.Now() // a worker has written it back
		}
	}
}

// expireLeases does what the broker does with OWNERS, whose clock stands still in
// a simulation.
func (w *world) expireLeases(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
		short, cancel := context.WithTimeout(ctx, 3*time.Second)
		if kv, err := w.js.KeyValue(short, "OWNERS"); err == nil {
			if keys, err := kv.Keys(short); err == nil {
				for _, key := range keys {
					if e, err := kv.Get(short, key); err == nil && time.Since(e.Created()) > publisher.OwnerTTL {
						_ = kv.Purge(short, key, jetstream.LastRevision(e.Revision()))
					}
				}
			}
		}
		cancel()
	}
}

// subjects of a stream and how many messages each has.
func (w *world) subjects(stream string) map[string]uint64 {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, err := w.js.Stream(ctx, stream)
	if err != nil {
		w.t.Fatal(err)
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(">"))
	if err != nil {
		w.t.Fatal(err)
	}
	return info.State.Subjects
}

// flying is how many calls a worker has in flight.
func (w *world) flying(worker string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.calls {
		if !c.ended && c.worker == worker {
			n++
		}
	}
	return n
}

// simUnknown is the age from which a stored request must be known to the worker that owns its
// partition. A message that was on its way when a server was killed comes after AckWait.
const simUnknown = 3 * time.Minute
