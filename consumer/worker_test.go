package consumer

import (
	"github.com/nats-io/nats.go"

	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

func TestNothingIsCalledInsideAWindow(t *testing.T) {
	const creators, windows = 20, 50
	forms := []func(now time.Time, d time.Duration) (answer classify.Answer, until time.Time){
		func(now time.Time, d time.Duration) (classify.Answer, time.Time) {
			return answer(429, "Retry-After", strconv.Itoa(int(d.Seconds()))), now.Add(d.Truncate(time.Second))
		},
		func(now time.Time, d time.Duration) (classify.Answer, time.Time) {
			return answer(429, "Retry-After", strconv.FormatFloat(d.Seconds(), 'f', 3, 64)), now.Add(d)
		},
		func(now time.Time, d time.Duration) (classify.Answer, time.Time) {
			until := now.Add(d + time.Second).Truncate(time.Second)
			return answer(429, "Retry-After", until.UTC().Format(http.TimeFormat), "Date", now.UTC().Format(http.TimeFormat)), until
		},
		func(now time.Time, d time.Duration) (classify.Answer, time.Time) {
			until := now.Add(d + time.Second).Truncate(time.Second)
			return answer(503, "Retry-After", until.UTC().Format(time.RFC3339)), until
		},
		func(now time.Time, d time.Duration) (classify.Answer, time.Time) {
			return answer(429, "Retry-After-Ms", strconv.Itoa(int(d.Milliseconds()))), now.Add(d)
		},
		func(now time.Time, d time.Duration) (classify.Answer, time.Time) {
			until := now.Add(d + time.Second).Truncate(time.Second)
			return answer(429, "X-RateLimit-Remaining", "0", "X-RateLimit-Reset", strconv.FormatInt(until.Unix(), 10)), until
		},
		func(now time.Time, d time.Duration) (classify.Answer, time.Time) {
			until := now.Add(d + time.Second).Truncate(time.Second)
			return answer(200, "X-RateLimit-Remaining", "0", "X-RateLimit-Reset", strconv.FormatInt(until.Unix(), 10)), until
		},
		func(now time.Time, d time.Duration) (classify.Answer, time.Time) {
			return answer(429), now.Add(time.Minute)
		},
	}
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) {
			op := c.Operations[AnyOperation]
			op.Retry.MaxAge, op.Retry.Throttled, op.Retry.Attempts = 5_000*time.Hour, 1000, 1000
			c.Operations[AnyOperation] = op
			c.Gates.Creator.Concurrency = 1
		})
		var mu sync.Mutex
		until := map[string]time.Time{}
		seen := map[string]int{}
		inside, opened := 0, 0
		r.api = func(_ context.Context, req *publisher.Request) classify.Answer {
			mu.Lock()
			defer mu.Unlock()
			now := time.Now()
			if now.Before(until[req.Creator]) {
				inside++
				t.Errorf("%s called %v before its window ends", req.Creator, until[req.Creator].Sub(now))
			}
			n := seen[req.Creator]
			seen[req.Creator]++
			if n%3 != 0 || n/3 >= windows {
				return ok()
			}
			opened++
			// From a second to about five minutes.
			d := time.Second + time.Duration(n*n)*13*time.Millisecond
			var a classify.Answer
			a, until[req.Creator] = forms[(n/3+len(req.Creator))%len(forms)](now, d)
			return a
		}
		_, stop := r.work()
		for n := range creators {
			r.publish(fmt.Sprintf("creator-%d", n), 4*windows)
		}
		began := time.Now()
		r.await(4_000*time.Hour, "RESULTS", "results.>", creators*4*windows)
		stop()
		for n := range creators {
			r.once(fmt.Sprintf("creator-%d", n), 4*windows)
		}
		if opened != creators*windows || inside != 0 {
			t.Errorf("%d windows, %d calls inside", opened, inside)
		}
		t.Logf("%d windows in %v of simulated time: %d calls inside", opened, time.Since(began).Round(time.Minute), inside)
	})
}

// checkRate fails the test if calls ever go over a rate and its burst.
func checkRate(t testing.TB, calls []time.Time, perSecond float64, burst int) {
	t.Helper()
	// A bucket that the calls empty: the same as looking at all windows.
	level, last := float64(burst), calls[0]
	for i, at := range calls {
		level = min(float64(burst), level+at.Sub(last).Seconds()*perSecond) - 1
		last = at
		if level < -1e-6 {
			t.Fatalf("call %d, at %v, is more than %v/s and a burst of %d allow", i, at.Sub(calls[0]), perSecond, burst)
		}
	}
}

func TestTurns(t *testing.T) {
	const requests, perSecond, burst = 5000, 50, 90
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) {
			c.Gates.Creator = resilience.Limits{Rate: resilience.Rate{PerSecond: perSecond, Burst: burst}, Concurrency: 10}
		})
		r.api = func(context.Context, *publisher.Request) classify.Answer {
			time.Sleep(50 * time.Millisecond)
			return ok()
		}
		_, stop := r.work()
		r.publish("alice", requests)
		r.await(10*time.Minute, "RESULTS", "results.>", requests)
		stop()
		r.once("alice", requests)
		calls := r.called("alice")
		checkRate(t, calls, perSecond, burst)
		// After the burst, over any ten seconds.
		least, most := requests, 0
		from := 5 * time.Second
		for from+10*time.Second < calls[len(calls)-1].Sub(calls[0]) {
			n := 0
			for _, at := range calls {
				if d := at.Sub(calls[0]); d >= from && d < from+10*time.Second {
					n++
				}
			}
			least, most = min(least, n), max(most, n)
			from += 500 * time.Millisecond
		}
		each := float64(r.deliveries()) / requests
		t.Logf("%d to %d calls in any 10 s, of 500; %.2f deliveries a request; all in %v", least, most, each, calls[len(calls)-1].Sub(calls[0]))
		if least < 485 || most > 515 {
			t.Errorf("%d to %d calls in 10 s, want 500 ± 3 %%", least, most)
		}
		if each > 2.2 {
			t.Errorf("%.2f deliveries a request", each)
		}
	})
}

// A worker that starts while something stands finds it standing.
func TestRestart(t *testing.T) {
	t.Run("in a hold", func(t *testing.T) {
		natsservertest.Simulate(t, func(t *testing.T) {
			r := newRig(t, nil)
			var until time.Time
			r.api = func(context.Context, *publisher.Request) classify.Answer {
				if until.IsZero() {
					until = time.Now().Add(time.Hour)
					return answer(429, "Retry-After", "3600")
				}
				return ok()
			}
			r.cfg.Gates.Creator.Concurrency = 1
			_, stop := r.work()
			r.publish("alice", 50)
			time.Sleep(time.Minute)
			for range 3 {
				stop()
				_, stop = r.work()
				time.Sleep(10 * time.Minute)
			}
			if calls := r.called("alice"); len(calls) != 1 {
				t.Errorf("%d calls in the hold", len(calls)-1)
			}
			r.await(2*time.Hour, "RESULTS", "results.>", 50)
			stop()
			r.once("alice", 50)
			for _, at := range r.called("alice")[1:] {
				if at.Before(until) {
					t.Errorf("called %v before the hold ended", until.Sub(at))
				}
			}
		})
	})
	t.Run("in a burst", func(t *testing.T) {
		natsservertest.Simulate(t, func(t *testing.T) {
			const perSecond, burst = 2, 40
			r := newRig(t, func(c *Config) {
				c.Gates.Creator.Rate = resilience.Rate{PerSecond: perSecond, Burst: burst}
				c.Gates.Account = resilience.Rate{PerSecond: 3, Burst: 50}
			})
			r.api = func(context.Context, *publisher.Request) classify.Answer {
				time.Sleep(20 * time.Millisecond)
				return ok()
			}
			_, stop := r.work()
			r.publish("alice", 200)
			r.publish("bob", 200)
			for n := range 4 {
				time.Sleep(time.Duration(n) * 150 * time.Millisecond)
				stop()
				_, stop = r.work()
			}
			r.await(time.Hour, "RESULTS", "results.>", 400)
			stop()
			for _, name := range []string{"alice", "bob"} {
				r.once(name, 200)
				checkRate(t, r.called(name), perSecond, burst)
			}
		})
	})
}

// The account's limit holds over all creators, to the last call, and is used.
func TestAccountLimit(t *testing.T) {
	const perSecond, burst, creators, requests = 100, 20, 30, 200
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Gates.Account = resilience.Rate{PerSecond: perSecond, Burst: burst} })
		var all []time.Time
		r.api = func(context.Context, *publisher.Request) classify.Answer {
			r.mu.Lock()
			all = append(all, time.Now())
			r.mu.Unlock()
			time.Sleep(30 * time.Millisecond)
			return ok()
		}
		_, stop := r.work()
		for n := range creators {
			r.publish(fmt.Sprintf("creator-%d", n), requests)
		}
		r.await(time.Hour, "RESULTS", "results.>", creators*requests)
		stop()
		checkRate(t, all, perSecond, burst)
		took := all[len(all)-1].Sub(all[0]).Seconds()
		each := float64(r.deliveries()) / float64(len(all))
		t.Logf("%.1f%% of the limit used, %.2f deliveries a request", 100*float64(len(all))/(took*perSecond+burst), each)
		if float64(len(all)) < 0.97*took*perSecond {
			t.Errorf("%d calls in %.1f s, of %d/s", len(all), took, perSecond)
		}
		if each > 2.2 {
			t.Errorf("%.2f deliveries a request", each)
		}
	})
}

// If the limit cannot be shared, nobody calls.
func TestAccountLimitFailsClosed(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Gates.Account = resilience.Rate{PerSecond: 10, Burst: 10} })
		if err := r.js.DeleteStream(t.Context(), "KV_BUDGETS"); err != nil {
			t.Fatal(err)
		}
		cfg := r.cfg
		r.cfg.Gates.Account = resilience.Rate{}
		if _, err := New(t.Context(), r.nc, cfg); err == nil || !strings.Contains(err.Error(), "headgate setup") {
			t.Errorf("without its bucket: %v", err)
		}
		r.cfg = cfg
		if _, err := r.cfg.Topology.Ensure(t.Context(), r.js); err != nil {
			t.Fatal(err)
		}
		r.work()
		time.Sleep(time.Second)
		if err := r.js.DeleteStream(t.Context(), "KV_BUDGETS"); err != nil {
			t.Fatal(err)
		}
		r.publish("alice", 10)
		time.Sleep(time.Minute)
		if n := len(r.called("alice")); n != 0 {
			t.Fatalf("%d calls without a budget", n)
		}
		if _, err := r.cfg.Topology.Ensure(t.Context(), r.js); err != nil {
			t.Fatal(err)
		}
		r.await(time.Minute, "RESULTS", "results.>", 10)
	})
}

func TestLimitsChangeAtOnce(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Gates.Creator.Rate = resilience.Rate{PerSecond: 1, Burst: 1} })
		kv := r.bucket("LIMITS")
		_, stop := r.work()
		r.publish("alice", 300)
		time.Sleep(30 * time.Second)
		if n := len(r.called("alice")); n < 29 || n > 32 {
			t.Errorf("%d calls in 30 s at 1/s", n)
		}
		for _, bad := range []string{"fast", `{"rate":"10/s","brust":3}`, `{"concurrency":0}`} {
			if _, err := kv.PutString(t.Context(), "creator.alice", bad); err != nil {
				t.Fatal(err)
			}
		}
		before := len(r.called("alice"))
		if _, err := kv.PutString(t.Context(), "creator.alice", `{"rate":"20/s","burst":5}`); err != nil {
			t.Fatal(err)
		}
		time.Sleep(6 * time.Second)
		if n := len(r.called("alice")) - before; n < 100 {
			t.Errorf("%d calls in 6 s at 20/s", n)
		}
		before = len(r.called("alice"))
		if _, err := kv.PutString(t.Context(), "creator.alice", "1/m"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3*time.Minute + time.Second)
		if n := len(r.called("alice")) - before; n > 5 {
			t.Errorf("%d calls in 3 min at 1/m", n)
		}
		if err := kv.Delete(t.Context(), "creator.alice"); err != nil {
			t.Fatal(err)
		}
		r.await(5*time.Minute, "RESULTS", "results.>", 300)
		stop()
		r.once("alice", 300)
	})
}

// An API that takes fewer calls at once gets fewer, not later ones.
func TestConcurrencyLimit(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		profile, err := classify.Load("apifreaks")
		if err != nil {
			t.Fatal(err)
		}
		r := newRig(t, func(c *Config) {
			c.Profile = profile
			c.Gates.Creator.Concurrency = 16
		})
		inFlight, most, refused, late := 0, 3, 0, 0
		r.api = func(context.Context, *publisher.Request) classify.Answer {
			r.mu.Lock()
			inFlight++
			active, limit := inFlight, most
			if active > limit {
				refused++
				late++
			}
			r.mu.Unlock()
			time.Sleep(200 * time.Millisecond)
			r.mu.Lock()
			inFlight--
			r.mu.Unlock()
			if active > limit {
				return answer(429, "X-Concurrent-Threads", strconv.Itoa(limit), "X-Concurrent-Threads-Active", strconv.Itoa(active))
			}
			return ok()
		}
		_, stop := r.work()
		r.publish("alice", 1000)
		time.Sleep(10 * time.Second)
		r.mu.Lock()
		early := refused
		r.mu.Unlock()
		r.await(time.Hour, "RESULTS", "results.>", 1000)
		stop()
		r.once("alice", 1000)
		calls := r.called("alice")
		took := calls[len(calls)-1].Sub(calls[0]).Seconds()
		t.Logf("%d of %d calls refused, %d of them in the first 10 s; %.1f calls/s of the 15 that 3 at once allow", refused, len(calls), early, 1000/took)
		if early > 60 || refused > len(calls)/5 {
			t.Errorf("%d calls refused", refused)
		}
		if 1000/took < 10 {
			t.Errorf("%.1f calls/s, want most of 15", 1000/took)
		}
	})
}

// A creator held for an hour goes on at once when it is released, and none of
// its requests is lost or doubled.
func TestRelease(t *testing.T) {
	const waiting = 10_000
	r := newRig(t, nil)
	kv := r.bucket("HOLDS")
	if _, err := kv.PutString(t.Context(), "creator.alice", "1h"); err != nil {
		t.Fatal(err)
	}
	w, stop := r.work()
	r.publish("alice", waiting)
	parked := func() (n int) {
		for _, p := range w.partitions {
			p.mu.Lock()
			for _, c := range p.creators {
				n += len(c.parked)
			}
			p.mu.Unlock()
		}
		return n
	}
	for began := time.Now(); parked() < waiting; time.Sleep(5 * time.Millisecond) {
		if time.Since(began) > 3*time.Minute {
			t.Fatalf("%d of %d set aside", parked(), waiting)
		}
	}
	if n := len(r.called("alice")); n != 0 {
		t.Fatalf("%d calls in the hold", n)
	}
	released := time.Now()
	if err := kv.Delete(t.Context(), "creator.alice"); err != nil {
		t.Fatal(err)
	}
	r.await(2*time.Minute, "RESULTS", "results.>", waiting)
	stop()
	r.once("alice", waiting)
	calls := r.called("alice")
	t.Logf("first call %v after the release, the last of %d after %v", calls[0].Sub(released).Round(time.Millisecond), len(calls), calls[len(calls)-1].Sub(released).Round(time.Millisecond))
	if d := calls[0].Sub(released); d > 30*time.Second { // real time; by itself it would come back after ten minutes
		t.Errorf("first call %v after the release", d)
	}
	if len(calls) != waiting {
		t.Errorf("%d calls for %d requests", len(calls), waiting)
	}
}

// A backlog of somebody who is held does not keep those behind it in the same
// partition waiting, and none of it is lost.
func TestBacklogOfAHeldCreator(t *testing.T) {
	const backlog, others = 20_000, 500
	r := newRig(t, func(c *Config) { c.Topology.Partitions = 1 })
	kv := r.bucket("HOLDS")
	if _, err := kv.PutString(t.Context(), "creator.held", "24h"); err != nil {
		t.Fatal(err)
	}
	r.publish("held", backlog)
	for n := range 10 {
		r.publish(fmt.Sprintf("other-%d", n), others/10)
	}
	began := time.Now()
	_, stop := r.work()
	r.await(3*time.Minute, "RESULTS", "results.>", others)
	t.Logf("%d requests behind %d are done after %v", others, backlog, time.Since(began).Round(time.Millisecond))
	if n := r.count("RESULTS", "results.held.>"); n != 0 || len(r.called("held")) != 0 {
		t.Errorf("%d results of the held creator", n)
	}
	if err := kv.Delete(t.Context(), "creator.held"); err != nil {
		t.Fatal(err)
	}
	r.await(3*time.Minute, "RESULTS", "results.held.>", backlog)
	stop()
	r.once("held", backlog)
	if n := len(r.called("held")); n != backlog {
		t.Errorf("%d calls for %d requests", n, backlog)
	}
}

// A lease that lapses while calls are in flight, and is renewed after all, as in
// a short outage of the servers, leaves nobody waiting for what has ended.
func TestLeaseLapses(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		broker := natsservertest.NewBroker(t)
		nc, err := nats.Connect("", nats.InProcessServer(broker), nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond), nats.ReconnectBufSize(-1))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		r := newRigOn(t, nc, func(c *Config) { c.Gates.Creator.Concurrency = 1 })
		lapse := make(chan struct{})
		r.api = func(context.Context, *publisher.Request) classify.Answer {
			<-lapse
			return ok()
		}
		_, stop := r.work()
		defer stop()
		r.publish("alice", 20)
		for len(r.called("alice")) == 0 {
			time.Sleep(time.Millisecond)
		}
		broker.Stop()
		time.Sleep(12 * time.Second)
		broker.Start()
		for !nc.IsConnected() {
			time.Sleep(time.Millisecond)
		}
		close(lapse)
		r.await(2*time.Minute, "RESULTS", "results.alice.>", 20)
		r.once("alice", 20)
	})
}

// Turns that were planned while the API was slow are planned anew when it is not.
func TestSlowAPIRecovers(t *testing.T) {
	for name, account := range map[string]resilience.Rate{"no limit of the account": {}, "a limit of the account": {PerSecond: 500, Burst: 50}} {
		t.Run(name, func(t *testing.T) { slowAPIRecovers(t, account) })
	}
}

func slowAPIRecovers(t *testing.T, account resilience.Rate) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) {
			c.Topology.Partitions = 1
			c.Gates.Account = account
			c.Gates.Breaker.OpenFor = 20 * time.Second
		})
		slow := true
		r.api = func(context.Context, *publisher.Request) classify.Answer {
			r.mu.Lock()
			now := slow
			r.mu.Unlock()
			if now {
				time.Sleep(10 * time.Second)
				return classify.Answer{Err: context.DeadlineExceeded}
			}
			return ok()
		}
		_, stop := r.work()
		defer stop()
		r.publish("alice", 20)
		time.Sleep(time.Minute)
		r.publish("bob", 1000)
		time.Sleep(150 * time.Second)
		r.mu.Lock()
		slow = false
		r.mu.Unlock()
		before := r.count("RESULTS", "results.bob.>") + r.count("DLQ", "dlq.*.bob.>")
		began := time.Now()
		for r.count("RESULTS", "results.bob.>")+r.count("DLQ", "dlq.*.bob.>") < 1000 {
			if time.Since(began) > 3*time.Minute {
				t.Fatalf("%d of 1000 after three minutes, %d before", r.count("RESULTS", "results.bob.>"), before)
			}
			time.Sleep(time.Second)
		}
	})
}
