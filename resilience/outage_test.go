package resilience

import (
	"container/heap"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// world is workers with queues in front of an API, in simulated time.
type world struct {
	start  time.Time
	events events
	order  int
	gates  []*Gates
	api    func(c *client, at time.Duration) (Outcome, time.Duration)
	calls  []time.Duration
	open   []bool // the provider's breaker, of each worker
	all    []*client
	waits  []wait
}

type wait struct{ ready, waited time.Duration }

// client is a creator at one worker.
type client struct {
	gate    *Gate
	worker  int
	healthy bool
	armed   bool
	queue   []*request
}

type request struct {
	ready    time.Duration // since when it could be called, had it not been for the gate
	failures int
}

type event struct {
	at    time.Duration
	order int
	run   func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].order < e[j].order
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	last := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return last
}

func newWorld(t *testing.T, workers int) *world {
	w := &world{start: time.Now(), open: make([]bool, workers)}
	for range workers {
		// No creator waits for a limit of its own.
		g := newGates(t, func(c *Config) { c.Creator.Rate = Rate{PerSecond: 60, Burst: 90} })
		g.SetWorkers(workers)
		w.gates = append(w.gates, g)
	}
	return w
}

func (w *world) creator(healthy bool) *client {
	n := len(w.all)
	c := &client{worker: n % len(w.gates), healthy: healthy}
	c.gate = w.gates[c.worker].Gate(fmt.Sprint("creator-", n), time.Time{})
	w.all = append(w.all, c)
	return c
}

func (w *world) now() time.Duration { return time.Since(w.start) }

func (w *world) at(d time.Duration, run func()) {
	w.order++
	heap.Push(&w.events, event{d, w.order, run})
}

func (w *world) run(until time.Duration) {
	for len(w.events) > 0 && w.events[0].at <= until {
		e := heap.Pop(&w.events).(event)
		time.Sleep(e.at - w.now())
		e.run()
	}
}

func (w *world) add(c *client, r *request) {
	r.ready = w.now()
	c.queue = append(c.queue, r)
	w.pump(c)
}

// pump calls as many of a creator's requests as its gate lets through.
func (w *world) pump(c *client) {
	for len(c.queue) > 0 {
		p, no, ok := c.gate.Admit(time.Now(), Read)
		if !ok {
			if !no.NotBefore.IsZero() && !c.armed {
				c.armed = true
				w.at(no.NotBefore.Sub(w.start), func() { c.armed = false; w.pump(c) })
			}
			return
		}
		r := c.queue[0]
		c.queue = c.queue[1:]
		now := w.now()
		w.calls = append(w.calls, now)
		if c.healthy {
			w.waits = append(w.waits, wait{r.ready, now - r.ready})
		}
		o, took := w.api(c, now)
		w.at(now+took, func() { w.ended(c, r, p, o) })
	}
}

func (w *world) ended(c *client, r *request, p Permit, o Outcome) {
	change := p.End(time.Now(), o)
	p.Close()
	w.open[c.worker] = (w.open[c.worker] || change.ProviderOpened) && !change.ProviderClosed
	if o != Success {
		r.failures++
		w.at(w.now()+time.Second<<min(r.failures-1, 4), func() { w.add(c, r) })
	}
	w.pump(c)
	if change.ProviderClosed {
		for _, other := range w.all {
			if other.worker == c.worker {
				w.pump(other)
			}
		}
	}
}

// A few failing creators cost the healthy ones next to nothing, whatever their
// failures look like, and an outage is over for them soon after its end.
func TestFailingCreatorsDoNotStarveTheHealthy(t *testing.T) {
	const healthy, span, begin, length = 50, 200 * time.Second, 100 * time.Second, 20 * time.Second
	for _, workers := range []int{1, 3} {
		for _, failing := range []int{3, 5, 20, 200} {
			for _, perSecond := range []float64{0.5, 5, 50} {
				for _, outage := range []bool{false, true} {
					for _, failure := range []Outcome{FailedAlone, Failed} {
						name := fmt.Sprintf("%d workers, %d failing with %d, %v/s, outage %v", workers, failing, failure, perSecond, outage)
						t.Run(name, func(t *testing.T) {
							synctest.Test(t, func(t *testing.T) {
								w := newWorld(t, workers)
								w.api = func(c *client, at time.Duration) (Outcome, time.Duration) {
									switch {
									case outage && at >= begin && at < begin+length:
										return Failed, 10 * time.Millisecond
									case c.healthy:
										return Success, 100 * time.Millisecond
									}
									return failure, 20 * time.Millisecond
								}
								for range failing {
									c := w.creator(false)
									w.at(0, func() {
										for range 100 {
											w.add(c, &request{})
										}
									})
								}
								for i := range healthy {
									c := w.creator(true)
									every := time.Duration(healthy / perSecond * float64(time.Second))
									for at := every * time.Duration(i) / healthy; at < span; at += every {
										w.at(at, func() { w.add(c, &request{}) })
									}
								}
								w.run(span)
								w.check(t, begin, begin+length, outage)
							})
						})
					}
				}
			}
		}
	}
}

func (w *world) check(t *testing.T, begin, end time.Duration, outage bool) {
	t.Helper()
	// Those that wait still have waited until now.
	for _, c := range w.all {
		for _, r := range c.queue {
			if c.healthy {
				w.waits = append(w.waits, wait{r.ready, w.now() - r.ready})
			}
		}
	}
	var all []time.Duration
	for _, x := range w.waits {
		all = append(all, x.waited)
		from := x.ready
		if outage && from >= begin && from < end {
			from = end
		}
		if late := x.ready + x.waited - from; late > 10*time.Second {
			t.Errorf("a healthy request that was ready at %v waited for %v", x.ready, x.waited)
		}
	}
	slices.Sort(all)
	if median := all[len(all)/2]; median > time.Second {
		t.Errorf("healthy requests wait for %v in the median", median)
	}
	t.Logf("%d calls of healthy creators, waited %v in the median, %v at 99 %%, %v at most",
		len(all), all[len(all)/2], all[len(all)*99/100], all[len(all)-1])
}

// An outage costs few calls, and a few more workers do not change that.
func TestAnOutageCostsFewCalls(t *testing.T) {
	for _, workers := range []int{1, 2, 3} {
		for _, hangs := range []time.Duration{10 * time.Millisecond, 30 * time.Second} {
			t.Run(fmt.Sprintf("%d workers, calls end after %v", workers, hangs), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					const begin, span = 10 * time.Second, 15 * time.Minute
					w := newWorld(t, workers)
					w.api = func(c *client, at time.Duration) (Outcome, time.Duration) {
						if at >= begin {
							return Failed, hangs
						}
						return Success, 100 * time.Millisecond
					}
					for i := range 200 {
						c := w.creator(true)
						for at := time.Duration(i) * 20 * time.Millisecond; at < span; at += 10 * time.Second {
							w.at(at, func() { w.add(c, &request{}) })
						}
					}
					w.run(span)
					settled := begin + hangs + 5*time.Second
					for from := settled; from+time.Minute <= span; from += time.Second {
						n := 0
						for _, at := range w.calls {
							if at >= from && at < from+time.Minute {
								n++
							}
						}
						if n > 21 { // 20 on average
							t.Fatalf("%d calls in the minute after %v", n, from)
						}
					}
					n := 0
					for _, at := range w.calls {
						if at >= settled {
							n++
						}
					}
					perMinute := float64(n) / (span - settled).Minutes()
					if perMinute > 20 || perMinute < 6 {
						t.Errorf("%.1f calls a minute", perMinute)
					}
					t.Logf("%.1f calls a minute", perMinute)
				})
			})
		}
	}
}
