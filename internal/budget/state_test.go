package budget

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/resilience"
)

var tenASecond = resilience.Rate{PerSecond: 10, Burst: 10}

// start runs workers until the test ends.
func start(t *testing.T, all ...*worker) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, w := range all {
		wg.Go(func() { w.budget.Run(ctx, w) })
		w.Wake()
	}
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		time.Sleep(time.Second)
	})
}

// A worker that is far away gets its share beside near ones.
func TestFarAndNear(t *testing.T) {
	for _, trips := range [][]int{{1, 1, 2, 300}, {1, 1, 30, 30}} {
		for _, r := range []resilience.Rate{{PerSecond: 0.3, Burst: 5}, {PerSecond: 10, Burst: 1}, {PerSecond: 10, Burst: 20}, {PerSecond: 200, Burst: 40}} {
			synctest.Test(t, func(t *testing.T) {
				a, store := &api{transit: transit(r)}, &bucket{}
				var all []*worker
				for _, trip := range trips {
					all = append(all, newWorker(t, distant{store, time.Duration(trip) * time.Millisecond, 0.2}, r, a, 300, len(trips)))
				}
				used := run(t, r, a, all, time.Duration(max(60, 100/r.PerSecond)*float64(time.Second)))
				if no := a.tooMany(r); no != "" {
					t.Error(no)
				}
				if used < 0.97 {
					t.Errorf("%v: %.3f of the rate is used", r, used)
				}
				calls := a.count()
				for i, w := range all {
					if share := float64(a.by[w]) / float64(calls); share < 0.15 {
						t.Errorf("%v: worker %d of %v ms makes %.2f of the calls", r, i, trips, share)
					}
				}
			})
		}
	}
}

// A key that is deleted under a worker gives it no second burst.
func TestDeletedKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := resilience.Rate{PerSecond: 2, Burst: 40}
		a, store := &api{}, &bucket{}
		start(t, newWorker(t, distant{store, time.Millisecond, 0}, r, a, 100, 1))
		time.Sleep(time.Minute)
		store.mu.Lock()
		delete(store.entries, Key)
		store.mu.Unlock()
		before := a.count()
		time.Sleep(time.Minute)
		if n := a.count() - before; n < 117 || n > 123 {
			t.Errorf("%d calls in the minute after the key was deleted, at 2/s", n)
		}
		if no := a.tooMany(r); no != "" {
			t.Error(no)
		}
	})
}

// Few calls at a time, more to come: tokens are leased for those as well.
func TestFewSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := resilience.Rate{PerSecond: 20, Burst: 40}
		a, store := &api{}, &bucket{}
		w := newWorker(t, distant{store, 110 * time.Millisecond, 0.2}, r, a, 3, 1)
		if used := run(t, r, a, []*worker{w}, time.Minute); used < 0.97 {
			t.Errorf("%.3f of the rate is used by 3 calls at once of 50 ms", used)
		}
	})
}

// A single call waits for NATS once or twice, and nothing is asked while nothing is
// wanted.
func TestSparseCalls(t *testing.T) {
	for _, r := range []resilience.Rate{tenASecond, {PerSecond: 10, Burst: 1}} {
		synctest.Test(t, func(t *testing.T) {
			a, store := &api{}, &bucket{}
			w := newWorker(t, distant{store, 30 * time.Millisecond, 0}, r, a, 10, 1)
			w.queue = 0
			start(t, w)
			for range 20 {
				time.Sleep(time.Minute)
				before, writes, began := a.count(), store.written(), time.Now()
				w.add(1)
				time.Sleep(100 * time.Millisecond)
				if a.count() != before+1 {
					t.Fatalf("%v: a single call is not made after 100 ms", r)
				}
				if wait := a.at(before).Sub(began); wait > 80*time.Millisecond {
					t.Errorf("%v: it waited for %v", r, wait)
				}
				time.Sleep(time.Minute)
				if n := store.written() - writes; n > 1 {
					t.Errorf("%v: %d writes for one call", r, n)
				}
			}
		})
	}
}

// Whatever stands in the key, calls go on, at the rate and without a burst, and
// after a repair at once.
func TestUnbelievableState(t *testing.T) {
	future := func(d time.Duration) string {
		return fmt.Sprintf(`{"tat":%q,"rate":10,"burst":10}`, time.Now().Add(d).UTC().Format(time.RFC3339))
	}
	for name, value := range map[string]func() string{
		"garbage":       func() string { return "garbage" },
		"empty":         func() string { return "" },
		"null":          func() string { return "null" },
		"an hour ahead": func() string { return future(time.Hour) },
		"the year 9999": func() string { return `{"tat":"9999-12-31T23:59:59Z","rate":10,"burst":10}` },
		"another rate":  func() string { return `{"tat":"2000-01-01T00:00:00Z","rate":99,"burst":10}` },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, store := &api{}, &bucket{}
				if _, err := store.put(Key, []byte(value()), 0, true); err != nil {
					t.Fatal(err)
				}
				start(t, newWorker(t, distant{store, time.Millisecond, 0}, tenASecond, a, 100, 1))
				time.Sleep(10 * time.Second)
				if n := a.count(); n < 90 || n > 102 {
					t.Errorf("%d calls in 10 s at 10/s", n)
				}
				// The same while the worker runs.
				if _, err := store.put(Key, []byte(value()), 0, true); err != nil {
					t.Fatal(err)
				}
				before := a.count()
				time.Sleep(20 * time.Second)
				if n := a.count() - before; n < 185 || n > 203 {
					t.Errorf("%d calls in 20 s at 10/s", n)
				}
				if no := a.tooMany(tenASecond); no != "" {
					t.Error(no)
				}
			})
		})
	}
}

// A limit that is used up for long, as far as it can be, is looked at again
// every few seconds.
func TestRepairIsSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := resilience.Rate{PerSecond: 1.0 / 60, Burst: 60}
		a, store := &api{}, &bucket{}
		used := fmt.Sprintf(`{"tat":%q,"rate":%v,"burst":60}`, time.Now().Add(2*time.Hour).UTC().Format(time.RFC3339), r.PerSecond)
		if _, err := store.put(Key, []byte(used), 0, true); err != nil {
			t.Fatal(err)
		}
		w := newWorker(t, distant{store, time.Millisecond, 0}, r, a, 100, 1)
		start(t, w)
		time.Sleep(40 * time.Second)
		if n := a.count(); n != 0 {
			t.Errorf("%d calls of a limit that is used up", n)
		}
		if err := w.budget.Trouble(); err != nil {
			t.Errorf("used up is no trouble: %v", err)
		}
		free := fmt.Sprintf(`{"tat":"2000-01-01T00:00:00Z","rate":%v,"burst":60}`, r.PerSecond)
		if _, err := store.put(Key, []byte(free), 0, true); err != nil {
			t.Fatal(err)
		}
		time.Sleep(lookAgain + time.Second)
		if n := a.count(); n < 30 {
			t.Errorf("%d calls after the repair", n)
		}
	})
}

// broken is a store that can be made to fail, or to become slow.
type broken struct {
	distant
	fails atomic.Bool
	slow  atomic.Int64
}

func (b *broken) get(ctx context.Context) error {
	if b.fails.Load() {
		return nats.ErrNoResponders
	}
	select {
	case <-time.After(time.Duration(b.slow.Load())):
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

func (b *broken) Get(ctx context.Context, key string) (jetstream.KeyValueEntry, error) {
	if err := b.get(ctx); err != nil {
		return nil, err
	}
	return b.distant.Get(ctx, key)
}

func (b *broken) Update(ctx context.Context, key string, value []byte, revision uint64) (uint64, error) {
	if err := b.get(ctx); err != nil {
		return 0, err
	}
	return b.distant.Update(ctx, key, value, revision)
}

// Trouble says why no tokens come, and is over with its cause.
func TestTrouble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := resilience.Rate{PerSecond: 10, Burst: 1}
		a := &api{}
		store := &broken{distant: distant{&bucket{}, time.Millisecond, 0}}
		w := newWorker(t, store, r, a, 100, 1)
		start(t, w)
		time.Sleep(10 * time.Second)
		store.fails.Store(true)
		time.Sleep(10 * time.Second)
		if err := w.budget.Trouble(); !errors.Is(err, nats.ErrNoResponders) {
			t.Errorf("NATS is away: %v", err)
		}
		before := a.count()
		time.Sleep(time.Minute)
		if n := a.count() - before; n > 0 {
			t.Errorf("%d calls without a token", n)
		}
		store.fails.Store(false)
		time.Sleep(10 * time.Second)
		if err := w.budget.Trouble(); err != nil {
			t.Errorf("NATS is back: %v", err)
		}
		// So slow that the tokens on their way come too late.
		store.slow.Store(int64(1100 * time.Millisecond))
		var seen error
		for range 100 {
			time.Sleep(50 * time.Millisecond)
			if err := w.budget.Trouble(); err != nil {
				seen = err
			}
		}
		if seen == nil || !strings.Contains(seen.Error(), "NATS answers in 1.10") {
			t.Errorf("NATS is slow: %v", seen)
		}
		before = a.count()
		time.Sleep(time.Minute)
		if n := a.count() - before; n < 582 || w.budget.Trouble() != nil {
			t.Errorf("%d calls in a minute, once it is known to be slow: %v", n, w.budget.Trouble())
		}
		if no := a.tooMany(r); no != "" {
			t.Error(no)
		}
	})
}

// slowed is a bucket of a broker that is far away.
type slowed struct {
	jetstream.KeyValue
	trip time.Duration
}

func (s slowed) Get(ctx context.Context, key string) (jetstream.KeyValueEntry, error) {
	time.Sleep(s.trip / 2)
	defer time.Sleep(s.trip / 2)
	return s.KeyValue.Get(ctx, key)
}

func (s slowed) Create(ctx context.Context, key string, value []byte, opts ...jetstream.KVCreateOpt) (uint64, error) {
	time.Sleep(s.trip / 2)
	defer time.Sleep(s.trip / 2)
	return s.KeyValue.Create(ctx, key, value, opts...)
}

func (s slowed) Update(ctx context.Context, key string, value []byte, revision uint64) (uint64, error) {
	time.Sleep(s.trip / 2)
	defer time.Sleep(s.trip / 2)
	return s.KeyValue.Update(ctx, key, value, revision)
}

// The same at a real broker: two workers at different distances, one of which
// comes back after a restart.
func TestBroker(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		js, err := jetstream.New(natsservertest.Connect(t))
		if err != nil {
			t.Fatal(err)
		}
		kv, err := js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "BUDGETS"})
		if err != nil {
			t.Fatal(err)
		}
		r := resilience.Rate{PerSecond: 20, Burst: 10}
		a := &api{transit: transit(r)}
		near := newWorker(t, slowed{kv, 30 * time.Millisecond}, r, a, 100, 2)
		far := newWorker(t, slowed{kv, 110 * time.Millisecond}, r, a, 100, 2)
		if used := run(t, r, a, []*worker{near, far}, 30*time.Second); used < 0.97 {
			t.Errorf("%.3f of the rate is used", used)
		}
		near.budget = New(slowed{kv, 30 * time.Millisecond}, r, near.gates, zerolog.Nop())
		if used := run(t, r, a, []*worker{near, far}, 10*time.Second); used < 0.97 {
			t.Errorf("%.3f of the rate is used after a restart", used)
		}
		if no := a.tooMany(r); no != "" {
			t.Error(no)
		}
		// A bucket in which the key was deleted.
		if err := kv.Purge(t.Context(), Key); err != nil {
			t.Fatal(err)
		}
		if used := run(t, r, a, []*worker{near, far}, 10*time.Second); used < 0.97 {
			t.Errorf("%.3f of the rate is used after the key was purged", used)
		}
		if no := a.tooMany(r); no != "" {
			t.Error(no)
		}
	})
}
