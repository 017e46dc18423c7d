package consumer

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/internal/ownership"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// crowd watches who calls whom, over several workers.
type crowd struct {
	mu     sync.Mutex
	now    map[string]map[string]int // creator → worker → calls in flight
	both   []string                  // creators called by two workers at once
	calls  map[string][]time.Time
	latest map[string]string
}

func (c *crowd) call(worker, creator string, d time.Duration) {
	c.mu.Lock()
	if c.now[creator] == nil {
		c.now[creator] = map[string]int{}
	}
	c.now[creator][worker]++
	if len(c.now[creator]) > 1 {
		c.both = append(c.both, creator+": "+fmt.Sprint(slices.Collect(maps.Keys(c.now[creator]))))
	}
	c.calls[creator] = append(c.calls[creator], time.Now())
	c.latest[creator] = worker
	c.mu.Unlock()
	time.Sleep(d)
	c.mu.Lock()
	if c.now[creator][worker]--; c.now[creator][worker] == 0 {
		delete(c.now[creator], worker)
	}
	c.mu.Unlock()
}

// as makes the rig's API know which worker calls.
type as struct {
	*rig
	worker string
	crowd  *crowd
}

func (a as) Prepare(req *publisher.Request) (func(context.Context) classify.Answer, error) {
	return func(context.Context) classify.Answer {
		a.crowd.call(a.worker, req.Creator, 300*time.Millisecond)
		return ok()
	}, nil
}

// Workers come and go; every creator is always at exactly one of them, and its
// limit, and the account's, are kept over all of them.
func TestWorkersComeAndGo(t *testing.T) {
	const creators, requests, perSecond, burst = 40, 100, 5, 10
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) {
			c.Topology.Partitions = 16
			c.Gates.Creator.Rate = resilience.Rate{PerSecond: perSecond, Burst: burst}
			c.Gates.Account = resilience.Rate{PerSecond: 220, Burst: 40}
		})
		cr := &crowd{now: map[string]map[string]int{}, calls: map[string][]time.Time{}, latest: map[string]string{}}
		type running struct {
			name string
			stop func()
		}
		var workers []running
		n := 0
		start := func() {
			n++
			name := fmt.Sprintf("worker-%d", n)
			r.cfg.API = as{r, name, cr}
			_, stop := r.work(name)
			workers = append(workers, running{name, stop})
		}
		balanced := func(within time.Duration) {
			t.Helper()
			for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
				owners, err := ownership.Owners(t.Context(), r.bucket("OWNERS"))
				if err != nil {
					t.Fatal(err)
				}
				good := len(owners) == len(workers)
				for _, o := range owners {
					n := len(o.Partitions)
					good = good && n >= 16/len(workers) && n <= (16+len(workers)-1)/len(workers)
				}
				if good {
					return
				}
				if time.Since(began) > within {
					t.Fatalf("not balanced over %d workers after %v: %+v", len(workers), within, owners)
				}
			}
		}
		start()
		for n := range creators {
			r.publish(fmt.Sprintf("creator-%d", n), requests)
		}
		balanced(time.Second)
		for _, step := range []int{+1, +1, +1, -1, +1, -1, -1, +1, -1} {
			if step > 0 {
				start()
			} else {
				w := workers[0]
				workers = workers[1:]
				w.stop()
			}
			balanced(5 * time.Second)
			time.Sleep(time.Second)
		}
		r.await(time.Hour, "RESULTS", "results.>", creators*requests)
		for _, w := range workers {
			w.stop()
		}
		if len(cr.both) > 0 {
			t.Errorf("called by two workers at once: %v", cr.both)
		}
		var all []time.Time
		for n := range creators {
			name := fmt.Sprintf("creator-%d", n)
			r.once(name, requests)
			checkRate(t, cr.calls[name], perSecond, burst)
			all = append(all, cr.calls[name]...)
		}
		slices.SortFunc(all, time.Time.Compare)
		checkRate(t, all, 220, 40)
		if len(all) != creators*requests {
			t.Errorf("%d calls for %d requests", len(all), creators*requests)
		}
	})
}

// Four workers with uneven work share the account's limit: it is used, and
// never broken, also when one of them is restarted.
func TestWorkersShareTheAccount(t *testing.T) {
	const perSecond, burst, creators = 250, 40, 30
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) {
			c.Topology.Partitions = 8
			c.Gates.Account = resilience.Rate{PerSecond: perSecond, Burst: burst}
			c.Gates.Creator.Concurrency = 20
		})
		cr := &crowd{now: map[string]map[string]int{}, calls: map[string][]time.Time{}, latest: map[string]string{}}
		stops := map[string]func(){}
		start := func(name string) {
			r.cfg.API = as{r, name, cr}
			_, stops[name] = r.work(name)
		}
		for n := range 4 {
			start(fmt.Sprint("w", n))
		}
		total := 0
		for n := range creators { // from 20 to 600 requests
			r.publish(fmt.Sprintf("creator-%d", n), 20*(n+1))
			total += 20 * (n + 1)
		}
		time.Sleep(10 * time.Second)
		stops["w1"]()
		start("w4")
		r.await(time.Hour, "RESULTS", "results.>", total)
		for _, stop := range stops {
			stop()
		}
		var all []time.Time
		for _, calls := range cr.calls {
			all = append(all, calls...)
		}
		slices.SortFunc(all, time.Time.Compare)
		checkRate(t, all, perSecond, burst)
		// While there is work for everybody.
		span := all[len(all)*8/10].Sub(all[0])
		used := float64(len(all)*8/10) / (span.Seconds() * perSecond)
		t.Logf("%.1f%% of the limit used by 4 workers over %v", 100*used, span.Round(time.Second))
		if used < 0.97 {
			t.Errorf("%.1f%% of the limit used", 100*used)
		}
	})
}

// A worker that the server does not answer says so, again and again.
func TestSilentServer(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		w := newWorld(t, 1)
		var log lockedBuffer
		w.cfg.Log = zerolog.New(&log)
		s := w.start()
		for began := time.Now(); !strings.Contains(log.String(), `"owned"`); time.Sleep(time.Second) {
			if time.Since(began) > time.Minute {
				t.Fatal("it owns nothing")
			}
		}
		s.line.freeze()
		time.Sleep(30 * time.Second)
		for _, says := range []string{"not renewed", "are not told"} {
			if n := strings.Count(log.String(), says); n < 3 {
				t.Errorf("%q is said %d times", says, n)
			}
		}
		s.line.thaw()
		s.stop()
	})
}
