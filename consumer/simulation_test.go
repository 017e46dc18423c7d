package consumer

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
)

var (
	seeds     = flag.Int("seeds", 5, "simulated runs")
	firstSeed = flag.Uint64("seed", 1, "the first run's seed")
)

// TestSimulation runs whole workers on the real broker through simulated hours
// of faults, and then holds what the API saw against what is stored.
func TestSimulation(t *testing.T) {
	failed := 0
	for n := range uint64(*seeds) {
		seed := *firstSeed + n
		hangs := time.AfterFunc(time.Minute, func() { panic(fmt.Sprintf("seed %d hangs", seed)) })
		natsservertest.Simulate(t, func(t *testing.T) {
			if found := simulate(t, seed, false); len(found) > 0 {
				failed++
				t.Errorf("seed %d:\n%s", seed, strings.Join(found, "\n"))
			}
		})
		hangs.Stop()
		if failed > 3 {
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
	w := newWorld(t, seed)
	w.planted = planted
	w.run()
	return w.found
}

// run is the course of a simulation.
func (w *world) run() {
	ctx, cancel := context.WithCancel(context.Background())
	var helpers sync.WaitGroup
	defer helpers.Wait()
	defer cancel()
	helpers.Go(func() { w.expireLeases(ctx) })

	var workers []*simWorker
	defer func() {
		for _, s := range workers {
			s.stop()
		}
	}()
	start := func() {
		if s := w.start(); s != nil {
			workers = append(workers, s)
		}
	}
	remove := func(i int) *simWorker {
		s := workers[i]
		workers = append(workers[:i], workers[i+1:]...)
		return s
	}
	start()
	start()
	requests := 30 + w.rng.IntN(60)
	creators := 2 + w.rng.IntN(8)
	next := 0
	for events := 3 + w.rng.IntN(8); events > 0 || next < requests; {
		for range w.rng.IntN(10) {
			if next < requests {
				w.publish(next, creators)
				next++
			}
		}
		time.Sleep(time.Duration(w.rng.IntN(12_000)) * time.Millisecond)
		if events == 0 {
			continue
		}
		events--
		w.fault()
		switch kind := w.rng.IntN(7); {
		case kind == 0 && len(workers) < 4:
			start()
		case kind == 1 && len(workers) > 0:
			s := remove(w.rng.IntN(len(workers)))
			helpers.Go(s.stop)
		case kind <= 3 && len(workers) > 0:
			remove(w.rng.IntN(len(workers))).crash()
			start()
		case kind == 4:
			w.broker.Stop()
			time.Sleep(time.Duration(w.rng.IntN(25_000)) * time.Millisecond)
			w.broker.Start()
		case len(workers) > 0:
			// Nothing reaches the server, nor comes from it, for a while; then all of it does.
			s := workers[w.rng.IntN(len(workers))]
			d := time.Duration(w.rng.IntN(90_000)) * time.Millisecond
			s.line.freeze()
			helpers.Go(func() {
				time.Sleep(d)
				s.line.thaw()
				w.fault()
			})
		}
	}
	// From here on nothing is broken.
	for _, s := range workers {
		s.line.thaw()
	}
	w.fault()
	start()
	w.drained(time.Hour)
	time.Sleep(3 * time.Minute) // for whatever comes late
	if missing, err := w.check(); err != nil || missing != "" {
		w.violation("at the end: %s (%v)", missing, err)
	}
	w.judge()
}

// drained waits until every request with a PubAck has its outcome.
func (w *world) drained(limit time.Duration) {
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Second) {
		missing, err := w.check()
		if err == nil && missing == "" {
			return
		}
		if time.Now().After(deadline) {
			w.violation("not drained after %v: %s (%v)", limit, missing, err)
			return
		}
	}
}

func (w *world) fault() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.faults = append(w.faults, time.Now())
}

func (w *world) violation(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.found) < 5 {
		w.found = append(w.found, fmt.Sprintf(format, args...))
	}
}

func (w *world) publish(n, creators int) {
	operation := "send"
	if w.rng.IntN(4) == 0 {
		operation = "pay"
	}
	w.publishAs(fmt.Sprintf("r-%d", n), fmt.Sprintf("c%d", w.rng.IntN(creators)), operation)
}

func (w *world) publishAs(id, creator, operation string) {
	w.mu.Lock()
	w.asked[id] = true
	w.mu.Unlock()
	m := nats.NewMsg("requests." + creator + "." + operation)
	m.Header.Set(nats.MsgIdHdr, id)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if ack, err := w.js.PublishMsg(ctx, m); err == nil {
		w.mu.Lock()
		w.acked[id] = ack.Sequence
		w.mu.Unlock()
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
					if e, err := kv.Get(short, key); err == nil && time.Since(e.Created()) > leaseTTL {
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

// check compares the requests with a PubAck with what is stored: each has one
// outcome, and nothing else has.
func (w *world) check() (missing string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	outcomes := map[string][]string{}
	for stream, at := range map[string]int{"RESULTS": 3, "DLQ": 4} {
		s, err := w.js.Stream(ctx, stream)
		if err != nil {
			return "", err
		}
		info, err := s.Info(ctx, jetstream.WithSubjectFilter(">"))
		if err != nil {
			return "", err
		}
		for subject, n := range info.State.Subjects {
			tokens := strings.Split(subject, ".")
			if tokens[0] == "fence" {
				continue
			}
			for range n {
				outcomes[tokens[at]] = append(outcomes[tokens[at]], subject)
			}
		}
	}
	w.mu.Lock()
	acked, lost := len(w.acked), ""
	for id := range w.acked {
		if len(outcomes[id]) == 0 {
			lost = id
		}
	}
	w.mu.Unlock()
	for id, all := range outcomes {
		if len(all) > 1 {
			w.violation("%s has %d outcomes: %v", id, len(all), all)
		}
		if !w.asked[id] {
			w.violation("an outcome without a request: %v", all)
		}
	}
	if lost != "" {
		return fmt.Sprintf("%s of %d requests has no outcome; stored: %v", lost, acked, w.stored(ctx)), nil
	}
	return "", nil
}

func (w *world) stored(ctx context.Context) any {
	s, err := w.js.Stream(ctx, "REQUESTS")
	if err != nil {
		return err
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(">"))
	if err != nil {
		return err
	}
	return info.State.Subjects
}

// judge looks at the calls.
func (w *world) judge() {
	w.mu.Lock()
	calls, faults := w.calls, w.faults
	w.mu.Unlock()
	for id, all := range calls {
		retryable := 0
		for i, c := range all {
			if c.ended && c.retryable {
				retryable++
			}
			if i > 0 && all[i-1].worker == c.worker && !all[i-1].ended && c.start.After(all[i-1].start) {
				w.violation("%s was called twice at once by %s", id, c.worker)
			}
			if i > 0 && c.operation == "pay" && !all[i-1].certain {
				w.violation("%s must not be called twice, and was: at %v by %s, although nobody knew what came of the call at %v by %s",
					id, c.start.Sub(w.began), c.worker, all[i-1].start.Sub(w.began), all[i-1].worker)
			}
		}
		during := 0
		for _, at := range faults {
			if at.After(all[0].start.Add(-2*time.Minute)) && at.Before(all[len(all)-1].start.Add(time.Second)) {
				during++
			}
		}
		if len(all) > 1+retryable+during {
			w.violation("%s was called %d times: %d retryable answers, %d faults in between", id, len(all), retryable, during)
		}
	}
}

// flying is how many calls a worker has in flight.
func (w *world) flying(worker string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, calls := range w.calls {
		for _, c := range calls {
			if !c.ended && c.worker == worker {
				n++
			}
		}
	}
	return n
}
