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

// healthy publishes a request of each of n creators and fails the test unless each has its
// result soon.
func (r *rig) healthy(round string, n int, within time.Duration) {
	r.t.Helper()
	began := time.Now()
	for i := range n {
		r.publishOne(fmt.Sprintf("good-%d", i), "send", fmt.Sprintf("good-%d-%s", i, round))
	}
	waited := time.Duration(0)
	r.eventually(2*time.Minute, fmt.Sprintf("%s: the requests of %d healthy creators have results", round, n), func() bool {
		waited = time.Since(began)
		return len(r.resultsOf(round)) == n
	})
	if waited > within {
		r.t.Errorf("%s: a healthy creator waited %v", round, waited)
	}
}

// resultsOf are the results of a round's healthy creators.
func (r *rig) resultsOf(round string) (all []string) {
	for _, m := range r.messages("RESULTS", "results.*.send.*") {
		if strings.HasSuffix(m.Header.Get(publisher.HeaderRequestID), "-"+round) && m.Header.Get(publisher.HeaderDeadLetter) == "" {
			all = append(all, m.Subject)
		}
	}
	return all
}

// While DLQ takes nothing, those go on that need no dead letter.
func TestFullDLQStopsNoOther(t *testing.T) {
	for name, header := range map[string][]string{
		"called":     nil,
		"not called": {publisher.HeaderDeadline, "2001-01-01T00:00:00Z"},
	} {
		t.Run(name, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				const bad = 300
				r := newRig(t, func(c *Config) {
					c.Topology.Partitions = 1
					c.Gates.InFlight = 32
				})
				r.api = func(_ context.Context, req *publisher.Request) classify.Answer {
					if req.Creator == "mallory" {
						return answer(422)
					}
					return ok()
				}
				r.full("DLQ", 1)
				_, stop := r.work()
				defer stop()
				for n := range bad {
					r.publishOne("mallory", "send", fmt.Sprintf("bad-%d", n), header...)
				}
				for round := range 5 {
					r.healthy(fmt.Sprintf("r%d", round), 10, 2*time.Second)
					time.Sleep(20 * time.Second)
				}
				r.full("DLQ", -1)
				r.await(3*time.Minute, "DLQ", "dlq.*.mallory.>", bad)
				r.empty(time.Minute)
				if calls := len(r.called("mallory")); calls > bad || header != nil && calls > 0 {
					t.Errorf("%d calls for %d requests", calls, bad)
				}
				if n := r.count("RESULTS", "results.mallory.>"); n != bad {
					t.Errorf("%d places are taken, want %d tombstones", n, bad)
				}
			})
		})
	}
}

// While RESULTS takes nothing no result can be stored, so only a few more calls are made, and what
// the API answered is stored as soon as there is room.
func TestFullResultsStopCalls(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		const creators, requests, inFlight = 40, 25, 32
		r := newRig(t, func(c *Config) {
			c.Topology.Partitions = 1
			c.Gates.InFlight = inFlight
		})
		r.api = func(ctx context.Context, _ *publisher.Request) classify.Answer {
			sleep(ctx, 20*time.Millisecond)
			return ok()
		}
		r.full("RESULTS", 100)
		w, stop := r.work()
		defer stop()
		for n := range creators {
			r.publish(fmt.Sprintf("creator-%d", n), requests)
		}
		total := func() (n int) {
			for i := range creators {
				n += len(r.called(fmt.Sprintf("creator-%d", i)))
			}
			return n
		}
		r.await(time.Minute, "RESULTS", ">", 100)
		time.Sleep(5 * time.Minute)
		if n := total(); n > 100+maxUnstored+inFlight {
			t.Errorf("%d calls, and 100 results can be stored", n)
		}
		if y, known := w.Why("creator-3"); !known || y.Reason != reasonStorage {
			t.Errorf("%v, %+v", known, y)
		}
		r.full("RESULTS", -1)
		r.await(15*time.Second, "RESULTS", ">", creators*requests)
		r.empty(15 * time.Second)
		if n := total(); n != creators*requests {
			t.Errorf("%d calls for %d requests", n, creators*requests)
		}
	})
}

// One creator has no more calls in hand without a stored outcome than a few per slot.
func TestUnstoredOfOneCreator(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) {
			c.Topology.Partitions = 1
			c.Gates.InFlight = 256
		})
		r.full("RESULTS", 1)
		_, stop := r.work()
		defer stop()
		r.publish("alice", 300)
		time.Sleep(time.Minute)
		if n := len(r.called("alice")); n > 1+unsettledPerSlot*r.cfg.Gates.Creator.Concurrency+r.cfg.Gates.Creator.Concurrency {
			t.Errorf("%d calls of one creator", n)
		}
		r.full("RESULTS", -1)
		r.await(15*time.Second, "RESULTS", ">", 300)
		r.once("alice", 300)
	})
}

// A request whose headers leave no room for those of its dead letter ends, and keeps no other
// waiting.
func TestHeadersWithoutRoom(t *testing.T) {
	for name, attempts := range map[string]int{"called": 0, "malformed": 0, "expired": 0, "a long history": 20} {
		t.Run(name, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				const bad = 64
				r := newRig(t, func(c *Config) {
					c.Topology.Partitions = 1
					c.Gates.InFlight = 64
					op := c.Operations[AnyOperation]
					if attempts > 0 {
						op.Retry.Attempts = attempts
						op.Retry.Backoff = resilience.Backoff{Base: 10 * time.Millisecond, Max: 10 * time.Millisecond}
					}
					c.Operations[AnyOperation] = op
					c.Gates.Breaker.Failures = 100_000
				})
				r.api = func(_ context.Context, req *publisher.Request) classify.Answer {
					switch {
					case req.Creator != "mallory":
						return ok()
					case attempts > 0:
						return answer(500)
					}
					return answer(422)
				}
				operation, header := "send", []string{"X-Long", strings.Repeat("x", 65_300)}
				switch name {
				case "malformed":
					operation = "malformed"
				case "expired":
					header = append(header, publisher.HeaderDeadline, "2001-01-01T00:00:00Z")
				}
				_, stop := r.work()
				defer stop()
				for n := range bad {
					r.publishOne("mallory", operation, fmt.Sprintf("bad-%d", n), header...)
				}
				r.healthy("r0", 10, 2*time.Second)
				r.await(2*time.Minute, "DLQ", "dlq.*.mallory.>", bad)
				r.healthy("r1", 10, 2*time.Second)
				r.empty(time.Minute)
			})
		})
	}
}

// A request with a header name that is no token is stored by the server and cannot be
// published again by a client. It ends as a dead letter, and keeps no other waiting.
func TestHeaderNamesThatAreNone(t *testing.T) {
	const bad = 1440
	for name, line := range map[string]string{"a space": "X : y", "a control character": "\x01: c", "two words": "a b: c"} {
		t.Run(name, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				r, b := newRigWithBroker(t, func(c *Config) {
					c.Topology.Partitions = 1
					c.Gates.InFlight = 64
				})
				_, stop := r.work()
				defer stop()
				n := bad
				if name != "a space" {
					n = 64
				}
				for i := range n {
					if _, err := b.PublishRaw(fmt.Sprintf("requests.evil-%d.send", i%50), []string{
						fmt.Sprintf("Nats-Msg-Id: bad-%d", i), line, "Headgate-Deadline: 2001-01-01T00:00:00Z",
					}, []byte("payload")); err != nil {
						t.Fatal(err)
					}
				}
				r.healthy("r0", 20, 2*time.Second)
				r.await(2*time.Minute, "DLQ", "dlq.>", n)
				r.healthy("r1", 20, 2*time.Second)
				r.empty(time.Minute)
				if calls := len(r.called("evil-1")); calls != 0 {
					t.Errorf("%d calls after the deadline", calls)
				}
			})
		})
	}
}
