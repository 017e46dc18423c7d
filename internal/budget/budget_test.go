package budget

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"pgregory.net/rapid"

	"github.com/headgate-io/headgate/resilience"
)

// bucket is a key-value store whose answers take a while.
type bucket struct {
	mu       sync.Mutex
	revision uint64
	entries  map[string]entry
	writes   int
	refused  int
}

type entry struct {
	jetstream.KeyValueEntry // the methods that are not asked for
	value                   []byte
	revision                uint64
	created                 time.Time
}

func (e entry) Value() []byte      { return e.value }
func (e entry) Revision() uint64   { return e.revision }
func (e entry) Created() time.Time { return e.created }

func (b *bucket) put(key string, value []byte, expect uint64, any bool) (uint64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !any && b.entries[key].revision != expect {
		b.refused++
		return 0, &jetstream.APIError{ErrorCode: jetstream.JSErrCodeStreamWrongLastSequence}
	}
	if b.entries == nil {
		b.entries = map[string]entry{}
	}
	b.revision++
	b.writes++
	b.entries[key] = entry{value: value, revision: b.revision, created: time.Now()}
	return b.revision, nil
}

func (b *bucket) written() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.writes
}

// distant is the bucket as a worker sees it that is so far away.
type distant struct {
	*bucket
	trip   time.Duration
	jitter float64
}

func (d distant) wait(ctx context.Context) error {
	half := float64(d.trip) / 2
	select {
	case <-time.After(time.Duration(half * (1 + d.jitter*rand.Float64()))):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d distant) away(ctx context.Context, do func() (uint64, error)) (uint64, error) {
	if err := d.wait(ctx); err != nil {
		return 0, err
	}
	revision, err := do()
	if err := d.wait(ctx); err != nil {
		return 0, err
	}
	return revision, err
}

func (d distant) Get(ctx context.Context, key string) (jetstream.KeyValueEntry, error) {
	var e entry
	var ok bool
	_, err := d.away(ctx, func() (uint64, error) {
		d.mu.Lock()
		defer d.mu.Unlock()
		e, ok = d.entries[key]
		return 0, nil
	})
	if err == nil && !ok {
		err = jetstream.ErrKeyNotFound
	}
	return e, err
}

func (d distant) Create(ctx context.Context, key string, value []byte, _ ...jetstream.KVCreateOpt) (uint64, error) {
	return d.away(ctx, func() (uint64, error) { return d.put(key, value, 0, false) })
}

func (d distant) Update(ctx context.Context, key string, value []byte, revision uint64) (uint64, error) {
	return d.away(ctx, func() (uint64, error) { return d.put(key, value, revision, false) })
}

func (d distant) Put(ctx context.Context, key string, value []byte) (uint64, error) {
	return d.away(ctx, func() (uint64, error) { return d.put(key, value, 0, true) })
}

// worker has more to call than it may.
type worker struct {
	gates   *resilience.Gates
	gate    *resilience.Gate
	budget  *Budget
	workers int
	latency time.Duration
	api     *api

	mu     sync.Mutex
	queue  int
	flying int
	slots  int
}

// api notes when calls arrive, some of them later than others.
type api struct {
	mu      sync.Mutex
	transit time.Duration
	calls   []time.Time
	by      map[*worker]int
}

func newWorker(t testing.TB, store Store, r resilience.Rate, a *api, slots, workers int) *worker {
	cfg := resilience.DefaultConfig()
	cfg.Account, cfg.Creator.Concurrency, cfg.InFlight = r, slots, slots
	gates, err := resilience.NewGates(cfg)
	if err != nil {
		t.Fatal(err)
	}
	w := &worker{
		gates: gates, gate: gates.Gate("a", time.Time{}), budget: New(store, r, gates, zerolog.Nop()),
		workers: workers, latency: 50 * time.Millisecond, api: a, queue: math.MaxInt, slots: slots,
	}
	return w
}

func (w *worker) Wanted() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return min(w.queue, w.slots-w.flying)
}

func (w *worker) Workers() int { return w.workers }

func (w *worker) Wake() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.queue > 0 {
		p, no, ok := w.gate.Admit(time.Now(), resilience.Read)
		if !ok {
			if no.Reason == resilience.ReasonAccount {
				w.budget.Want()
			}
			return
		}
		w.queue--
		w.flying++
		w.api.called(w)
		time.AfterFunc(w.latency, func() {
			p.End(time.Now(), resilience.Success)
			p.Close()
			w.mu.Lock()
			w.flying--
			w.mu.Unlock()
			w.Wake()
		})
	}
}

func (w *worker) add(n int) {
	w.mu.Lock()
	w.queue += n
	w.mu.Unlock()
	w.Wake()
}

func (a *api) called(w *worker) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls = append(a.calls, time.Now().Add(time.Duration(rand.Float64()*float64(a.transit))))
	if a.by == nil {
		a.by = map[*worker]int{}
	}
	a.by[w]++
}

// tooMany says which call an exact token bucket would refuse, "" if none.
func (a *api) tooMany(r resilience.Rate) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	slices.SortFunc(a.calls, time.Time.Compare)
	level, last := float64(r.Burst), time.Time{}
	for i, at := range a.calls {
		if i > 0 {
			level = min(float64(r.Burst), level+at.Sub(last).Seconds()*r.PerSecond)
		}
		level--
		last = at
		if level < -1e-3 {
			return fmt.Sprintf("call %d of %d, after %v, is %.3f calls above %v", i, len(a.calls), at.Sub(a.calls[0]), -level, r)
		}
	}
	return ""
}

func (a *api) at(i int) time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.calls[i]
}

func (a *api) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.calls)
}

// between is the number of calls in a part of the time.
func (a *api) between(from, to time.Time) (n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, at := range a.calls {
		if !at.Before(from) && at.Before(to) {
			n++
		}
	}
	return n
}

// transit is how much later than others a call of the rate may arrive.
func transit(r resilience.Rate) time.Duration {
	room := float64(r.Burst-1) / r.PerSecond * float64(time.Second)
	return time.Duration(min(room*3/4, float64(100*time.Millisecond)))
}

// run lets workers with a backlog call for a while and returns the part of the
// rate that they used, once they had begun.
func run(t testing.TB, r resilience.Rate, a *api, workers []*worker, span time.Duration) float64 {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, w := range workers {
		wg.Go(func() { w.budget.Run(ctx, w) })
		w.Wake()
	}
	warm := 10*time.Second + 3*time.Duration(float64(time.Second)*float64(r.Burst)/r.PerSecond)
	time.Sleep(warm)
	from := time.Now()
	time.Sleep(span)
	cancel()
	wg.Wait()
	time.Sleep(time.Second) // calls in flight
	return float64(a.between(from, from.Add(span))+1) / (r.PerSecond * span.Seconds())
}

// At each distance, with each burst and number of workers: no window of the API
// sees more calls than the limit allows, and the limit is used.
func TestExactAndUsed(t *testing.T) {
	least := 1.0
	rapid.Check(t, func(rt *rapid.T) {
		r := resilience.Rate{
			PerSecond: math.Pow(10, rapid.Float64Range(-0.3, 2).Draw(rt, "log of rate")),
			Burst:     rapid.IntRange(1, 100).Draw(rt, "burst"),
		}
		jitter := rapid.Float64Range(0, 0.5).Draw(rt, "jitter")
		trips := rapid.SliceOfN(rapid.SampledFrom([]int{1, 30, 110, 300}), 1, 4).Draw(rt, "round trips")
		var wrong string
		synctest.Test(t, func(t *testing.T) {
			a, store := &api{transit: transit(r)}, &bucket{}
			var all []*worker
			for _, trip := range trips {
				all = append(all, newWorker(t, distant{store, time.Duration(trip) * time.Millisecond, jitter}, r, a, 300, len(trips)))
			}
			used := run(t, r, a, all, time.Duration(max(30, 300/r.PerSecond)*float64(time.Second)))
			least = min(least, used)
			wrong = a.tooMany(r)
			if used < 0.97 {
				wrong += fmt.Sprintf("; %.3f of the rate is used", used)
			}
			for i, w := range all {
				if err := w.budget.Trouble(); a.by[w] == 0 || err != nil {
					wrong += fmt.Sprintf("; worker %d calls %d times: %v", i, a.by[w], err)
				}
			}
		})
		if wrong != "" {
			rt.Fatalf("%v at %v ms: %s", r, trips, wrong)
		}
	})
	t.Logf("at least %.3f of the rate was used", least)
}

// The shapes that stalled, or broke the limit, at the distances at which they did.
func TestDistances(t *testing.T) {
	for _, r := range []resilience.Rate{{PerSecond: 10, Burst: 1}, {PerSecond: 10, Burst: 2}, {PerSecond: 10, Burst: 3}, {PerSecond: 100, Burst: 10}, {PerSecond: 10, Burst: 100}, {PerSecond: 500, Burst: 50}} {
		for _, trip := range []time.Duration{1, 30, 110, 300} {
			for _, n := range []int{1, 4} {
				t.Run(fmt.Sprintf("%v, %d ms, %d workers", r, trip, n), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						a, store := &api{transit: transit(r)}, &bucket{}
						var all []*worker
						for range n {
							all = append(all, newWorker(t, distant{store, trip * time.Millisecond, 0.2}, r, a, 300, n))
						}
						used := run(t, r, a, all, time.Duration(max(10, 600/r.PerSecond)*float64(time.Second)))
						if no := a.tooMany(r); no != "" {
							t.Error(no)
						}
						if used < 0.97 {
							t.Errorf("%.3f of the rate is used", used)
						}
						share := []int{}
						for _, w := range all {
							share = append(share, a.by[w])
						}
						t.Logf("%.3f of the rate is used, %v by each worker, %d writes, %d refused", used, share, store.writes, store.refused)
					})
				})
			}
		}
	}
}
