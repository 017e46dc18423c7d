package main

import (
	"flag"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/headgate-io/headgate/internal/failpoint"
)

var long = flag.Bool("long", false, "run chaos at full length instead of a sample")

// chaos skips a test that takes a minute or two where nobody asked for it.
func chaos(t *testing.T) {
	t.Helper()
	if testing.Short() || !failpoint.Enabled && !*long {
		t.Skip("takes a minute or two: -tags failpoints, or at full length -long")
	}
}

// fleetAPI records every call with its worker.
type fleetAPI struct {
	mu       sync.Mutex
	inFlight map[string]map[string]int // creator → worker → calls
	both     []string
	calls    map[string][]time.Time
	keys     map[string]int // Idempotency-Key → calls
	last     time.Time
	gap      time.Duration // longest time without a call
	latency  time.Duration
	paid     map[string]int // calls that must not be made twice, by key
	poison   func(worker string)
}

// flying is how many calls are under way, or have only just ended.
func (a *fleetAPI) flying() (n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	recent := time.Now().Add(-a.latency - 100*time.Millisecond)
	for _, calls := range a.calls {
		for i := len(calls) - 1; i >= 0 && calls[i].After(recent); i-- {
			n++
		}
	}
	return n
}

func (a *fleetAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	creator, worker := r.Header.Get("x-creator"), r.Header.Get("x-worker")
	_, _ = io.Copy(io.Discard, r.Body)
	a.mu.Lock()
	now := time.Now()
	if !a.last.IsZero() {
		a.gap = max(a.gap, now.Sub(a.last))
	}
	a.last = now
	if a.inFlight[creator] == nil {
		a.inFlight[creator] = map[string]int{}
	}
	a.inFlight[creator][worker]++
	if len(a.inFlight[creator]) > 1 {
		a.both = append(a.both, creator)
	}
	a.calls[creator] = append(a.calls[creator], now)
	a.keys[r.Header.Get("Idempotency-Key")]++
	if r.URL.Path == "/pay" {
		if a.paid == nil {
			a.paid = map[string]int{}
		}
		a.paid[r.Header.Get("Idempotency-Key")]++
	}
	latency, poison := a.latency, a.poison
	a.mu.Unlock()
	if poison != nil && r.Header.Get("Idempotency-Key") == "poison" {
		poison(worker)
	}
	wait := time.NewTimer(latency)
	select {
	case <-wait.C:
	case <-r.Context().Done():
	}
	a.mu.Lock()
	if a.inFlight[creator][worker]--; a.inFlight[creator][worker] == 0 {
		delete(a.inFlight[creator], worker)
	}
	a.mu.Unlock()
	_, _ = io.WriteString(w, "{}")
}

func (a *fleetAPI) judge(t *testing.T, perSecond float64, burst int) {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.both) > 0 {
		t.Errorf("%d calls for creators that another worker was calling: %v", len(a.both), a.both[:min(5, len(a.both))])
	}
	var all []time.Time
	for _, calls := range a.calls {
		all = append(all, calls...)
	}
	slices.SortFunc(all, time.Time.Compare)
	keeps(t, "the account", all, 500, 50)
	total, again := 0, a.again()
	for key, n := range a.paid {
		if n > 1 {
			t.Errorf("%s was called %d times, and must not be called twice", key, n)
		}
	}
	for creator, calls := range a.calls {
		total += len(calls)
		keeps(t, creator, calls, perSecond, burst)
	}
	t.Logf("%d calls, %d of them for the second time; longest time without a call %v", total, again, a.gap.Round(time.Millisecond))
}

// again is how many calls were not the first of their request.
func (a *fleetAPI) again() (n int) {
	for _, calls := range a.keys {
		n += calls - 1
	}
	return n
}

// keeps fails the test if calls ever go over a rate and its burst.
func keeps(t *testing.T, who string, calls []time.Time, perSecond float64, burst int) {
	t.Helper()
	level, last := float64(burst), calls[0]
	for i, at := range calls {
		level = min(float64(burst), level+at.Sub(last).Seconds()*perSecond) - 1
		last = at
		if level < 0 {
			t.Errorf("%s: call %d is more than %v/s and a burst of %d allow", who, i, perSecond, burst)
			return
		}
	}
}

func (a *fleetAPI) startGap() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.gap, a.last = 0, time.Now()
}

// Workers are killed, stopped, paused and added under load, on a cluster of
// three servers.
func TestScale(t *testing.T) {
	chaos(t)
	f := newFleet(t)
	stop := f.underLoad(4, 40, 5*time.Millisecond)

	events := []string{"term", "add", "kill", "add"}
	if *long {
		events = nil
		for range 20 {
			events = append(events, []string{"term", "add", "kill", "pause"}[rand.IntN(4)])
		}
	}
	for _, event := range events {
		switch {
		case len(f.workers) < 2:
			event = "add"
		case len(f.workers) > 5 && event == "add":
			event = "term"
		}
		// On a quiet machine 5 s, 13 s after a kill.
		name, within := "", 30*time.Second
		switch event {
		case "term":
			name = f.any()
			f.stop(name)
		case "kill":
			name, within = f.any(), time.Minute
			f.kill(name)
		case "add":
			name = f.start()
		case "pause":
			name, within = f.any(), time.Minute
			p := f.workers[name].Process
			_ = p.Signal(syscall.SIGSTOP)
			time.Sleep(20 * time.Second)
			_ = p.Signal(syscall.SIGCONT)
		}
		t.Logf("%s %s: balanced over %d workers after %v", event, name, len(f.workers), f.balanced(within).Round(time.Millisecond))
		time.Sleep(time.Duration(rand.IntN(2000)) * time.Millisecond)
	}
	stop()
	f.settled(5 * time.Minute)
	f.api.judge(t, 10, 20)
}

// A server is killed and started again, and then all of them at once.
func TestServersFail(t *testing.T) {
	chaos(t)
	f := newFleet(t)
	stop := f.underLoad(2, 40, 10*time.Millisecond)

	times := 2
	if *long {
		times = 5
	}
	f.api.startGap()
	for n := range times {
		f.killServer(n % 3)
		time.Sleep(5 * time.Second)
		f.startServer(n % 3)
		time.Sleep(8 * time.Second)
	}
	f.api.mu.Lock()
	t.Logf("one of three servers killed %d times: longest time without a call %v", times, f.api.gap.Round(time.Millisecond))
	f.api.mu.Unlock()

	for n := range 3 {
		f.killServer(n)
	}
	time.Sleep(2 * time.Second)
	for n := range 3 {
		f.startServer(n)
	}
	time.Sleep(10 * time.Second)
	stop()
	f.settled(5 * time.Minute)
	f.api.judge(t, 10, 20)
}
