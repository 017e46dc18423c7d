package consumer

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// crowding is a worker with less of something that all creators use than they want of it.
type crowding struct {
	name               string
	creators, requests int
	account            resilience.Rate
	inFlight           int
	latency            time.Duration
	perSecond          float64 // calls
	reason             resilience.Reason
}

var crowdings = []crowding{
	{"account", 40, 100, resilience.Rate{PerSecond: 20, Burst: 20}, 0, 20 * time.Millisecond, 20, resilience.ReasonAccount},
	{"few backlogs", 8, 500, resilience.Rate{PerSecond: 20, Burst: 20}, 0, 20 * time.Millisecond, 20, resilience.ReasonAccount},
	{"worker", 40, 100, resilience.Rate{}, 16, 500 * time.Millisecond, 32, resilience.ReasonWorker},
	{"slow", 40, 100, resilience.Rate{}, 16, 1500 * time.Millisecond, 16 / 1.5, ""},
	{"512 backlogs", 512, 20, resilience.Rate{PerSecond: 100, Burst: 20}, 0, 20 * time.Millisecond, 100, resilience.ReasonAccount},
}

func (w crowding) rig(t *testing.T) *rig {
	r := newRig(t, func(c *Config) {
		c.Topology.Partitions = 1
		c.Gates.Account = w.account
		if w.inFlight > 0 {
			c.Gates.InFlight = w.inFlight
		}
	})
	r.api = func(ctx context.Context, _ *publisher.Request) classify.Answer {
		sleep(ctx, w.latency)
		return ok()
	}
	for n := range w.creators {
		r.publish(fmt.Sprintf("creator-%d", n), w.requests)
	}
	return r
}

// share is how long a creator waits for a call if all have their share.
func (w crowding) share() time.Duration {
	return time.Duration(float64(w.creators+1) / w.perSecond * float64(time.Second))
}

// However long the backlogs of other creators are: one request waits for its creator's share
// of what all use, and not until they have ended.
func TestOneRequestBesideBacklogs(t *testing.T) {
	for _, w := range crowdings {
		for _, when := range []string{"later", "last in the stream"} {
			t.Run(w.name+"/"+when, func(t *testing.T) {
				natsservertest.Simulate(t, func(t *testing.T) {
					r := w.rig(t)
					if when != "later" {
						r.publish("bob", 1)
					}
					began := time.Now()
					_, stop := r.work()
					defer stop()
					if when == "later" {
						time.Sleep(8 * time.Second)
						began = time.Now()
						r.publish("bob", 1)
					}
					// A call's length on top: places come free in steps.
					limit := w.share()*3/2 + w.latency
					for n := 1; ; n++ {
						r.await(10*time.Minute, "RESULTS", "results.bob.>", n)
						waited := r.called("bob")[n-1].Sub(began)
						t.Logf("bob waits %v, his share is %v", waited.Round(10*time.Millisecond), w.share().Round(10*time.Millisecond))
						if waited > limit {
							t.Errorf("bob waits %v, more than %v", waited, limit)
						}
						if n == 4 {
							break
						}
						time.Sleep(time.Duration(n) * 700 * time.Millisecond)
						began = time.Now()
						r.publishOne("bob", "send", fmt.Sprintf("later-%d", n))
					}
				})
			})
		}
	}
}

// While it waits the reason is said, and how many of its creator are ahead.
func TestWhyBesideBacklogs(t *testing.T) {
	for _, w := range crowdings[:3] {
		if w.reason == "" || w.name == "few backlogs" {
			continue
		}
		t.Run(w.name, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				r := w.rig(t)
				worker, stop := r.work()
				defer stop()
				time.Sleep(8 * time.Second)
				r.publish("bob", 100)
				time.Sleep(500 * time.Millisecond)
				why, known := worker.Why("bob")
				if !known || why.Reason != w.reason || why.Waiting+why.Parked == 0 {
					t.Errorf("%v %+v", known, why)
				}
				asked, found := 0, 0
				for n := range 100 {
					id := fmt.Sprintf("bob-%d", n)
					y, known := worker.WhyRequest(id)
					if !known || strings.Contains(y.Text, "called") || strings.Contains(y.Text, "stored") {
						continue // it is, or was
					}
					asked++
					if y.Reason != w.reason && y.Reason != reasonTurn {
						t.Errorf("%s: %+v", id, y)
					}
					called := len(r.called("bob"))
					if y.Ahead >= n-called-8 && y.Ahead <= n {
						found++
					} else {
						t.Errorf("%s: %d ahead, %d were called", id, y.Ahead, called)
					}
				}
				t.Logf("%d of 100 wait, %q", asked, why.Text)
				if asked < 80 || found != asked {
					t.Errorf("%d of %d are told right", found, asked)
				}
			})
		})
	}
}
