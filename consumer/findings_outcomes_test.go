package consumer

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
)

// expect fails the test unless a creator has these outcomes.
func (r *rig) expect(creator string, want map[string]int) {
	r.t.Helper()
	if got := r.outcomes(creator); !maps.Equal(got, want) {
		r.t.Errorf("%s: %v, want %v", creator, got, want)
	}
}

// answers makes the API give these answers, one after another, and the last one from then on.
func (r *rig) answers(all ...classify.Answer) {
	var n atomic.Int64
	r.api = func(context.Context, *publisher.Request) classify.Answer {
		return all[min(int(n.Add(1)), len(all))-1]
	}
}

// A request that failed once and cannot be read any more, because its operation left the
// configuration, is a dead letter like any other.
func TestMalformedWithARecord(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, quickly)
		r.answers(answer(503, "Retry-After", "60"))
		_, stop := r.work()
		r.publish("alice", 20)
		r.eventually(time.Minute, "a call", func() bool { return len(r.called("alice")) > 0 })
		time.Sleep(time.Second)
		stop()
		calls := len(r.called("alice"))
		r.cfg.Operations = map[string]Operation{"other": {Retry: DefaultRetry()}}
		before := r.deliveries()
		_, stop = r.work()
		defer stop()
		r.empty(20 * time.Minute)
		r.expect("alice", map[string]int{"MALFORMED_REQUEST": 20})
		if n := r.deliveries() - before; n > 60 || len(r.called("alice")) != calls {
			t.Errorf("%d deliveries, %d calls", n, len(r.called("alice"))-calls)
		}
	})
}

// An id that comes again belongs to another request.
func TestRepeatedIDs(t *testing.T) {
	for name, tc := range map[string]struct {
		answers []classify.Answer
		creator string // of the repeated one
		drop    bool   // the letter is deleted in between
		want    map[string]int
		calls   int
	}{
		"after a dead letter": {
			answers: []classify.Answer{answer(422), answer(503), ok()}, creator: "alice",
			want: map[string]int{"result": 1, "VALIDATION": 1}, calls: 3,
		},
		"after a dead letter that was deleted": {
			answers: []classify.Answer{answer(422), answer(503), ok()}, creator: "alice", drop: true,
			want: map[string]int{"result": 1}, calls: 3,
		},
		"dead again": {
			answers: []classify.Answer{answer(422), answer(503), answer(422)}, creator: "alice", drop: true,
			want: map[string]int{"VALIDATION": 1}, calls: 3,
		},
		"of another creator": {
			answers: []classify.Answer{answer(422), answer(503), ok()}, creator: "bob",
			want: map[string]int{"result": 1}, calls: 2,
		},
	} {
		t.Run(name, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				r := newRig(t, quickly)
				r.answers(tc.answers...)
				_, stop := r.work()
				defer stop()
				r.publishOne("alice", "send", "hook:42")
				r.await(time.Minute, "DLQ", ">", 1)
				r.empty(time.Minute)
				if tc.drop {
					s, err := r.js.Stream(t.Context(), "DLQ")
					if err != nil {
						t.Fatal(err)
					}
					if err := s.Purge(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				r.forgetIDs()
				r.publishOne(tc.creator, "send", "hook:42")
				r.empty(time.Minute)
				r.expect(tc.creator, tc.want)
				if n := len(r.called(tc.creator)); n != tc.calls {
					t.Errorf("%d calls, want %d", n, tc.calls)
				}
			})
		})
	}
}

// Worker and server are killed together, and the server forgets what it delivered. A request that
// is a dead letter by then gets no result, whatever the API says now.
func TestKilledTogether(t *testing.T) {
	for name, first := range map[string]classify.Answer{"dead letter": answer(422), "result": ok()} {
		for _, operation := range []string{"send", "pay"} {
			t.Run(name+"/"+operation, func(t *testing.T) { killedTogether(t, first, operation) })
		}
	}
}

func killedTogether(t *testing.T, first classify.Answer, operation string) {
	natsservertest.Simulate(t, func(t *testing.T) {
		const requests = 30
		r, b := newRigWithBroker(t, func(c *Config) {
			unsafe(c)
			c.Topology.Partitions = 2
		})
		r.expireLeases()
		var later atomic.Bool
		r.api = func(ctx context.Context, req *publisher.Request) classify.Answer {
			switch {
			case !later.Load():
				return first
			case first.Status == 200: // it changes its mind
				return answer(422)
			}
			return ok()
		}
		l := r.lineTo(b)
		_, _, crash := r.workOn(l, "first")
		time.Sleep(time.Second)
		b.SaveConsumers("REQUESTS")
		for n := range requests {
			r.publishOne(fmt.Sprintf("c%d", n%5), operation, fmt.Sprintf("r-%d", n))
		}
		r.eventually(time.Minute, "an outcome", func() bool { return r.count("RESULTS", ">") > requests/2 })
		crash()
		later.Store(true)
		b.Kill("REQUESTS")
		b.Start()
		r.eventually(time.Minute, "the connection", r.nc.IsConnected)
		_, stop, _ := r.workOn(r.lineTo(b), "second")
		defer stop()
		r.empty(10 * time.Minute)
		// Each request has one outcome.
		results, letters := map[string]bool{}, map[string]bool{}
		for _, m := range r.messages("RESULTS", "results.>") {
			if m.Header.Get(publisher.HeaderDeadLetter) == "" {
				results[last(m.Subject)] = true
			}
		}
		for _, m := range r.messages("DLQ", "dlq.>") {
			letters[last(m.Subject)] = true
			if results[last(m.Subject)] {
				t.Errorf("%s has two outcomes", m.Subject)
			}
		}
		if len(results)+len(letters) != requests {
			t.Errorf("%d results and %d dead letters of %d requests", len(results), len(letters), requests)
		}
	})
}

// last is a subject's last token, which is a request's id.
func last(subject string) string { return subject[strings.LastIndex(subject, ".")+1:] }

// A request that no delivery reaches and that cannot be called when it is found is not
// lost again.
func TestFoundAndRefused(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Topology.Partitions = 1 })
		holds := r.bucket("HOLDS")
		if _, err := holds.PutString(t.Context(), "account", "1h"); err != nil {
			t.Fatal(err)
		}
		r.answers(answer(503), answer(429, "Retry-After", "30"), ok())
		_, stop := r.work()
		defer stop()
		time.Sleep(time.Minute) // it is idle, and pulls nothing
		r.publish("alice", 1)
		c, err := r.js.Consumer(t.Context(), "REQUESTS", publisher.ConsumerName(0))
		if err != nil {
			t.Fatal(err)
		}
		m, err := c.Next(jetstream.FetchMaxWait(time.Second))
		if err != nil {
			t.Fatal(err)
		}
		if err := m.NakWithDelay(365 * 24 * time.Hour); err != nil {
			t.Fatal(err)
		}
		if _, err := holds.PutString(t.Context(), "creator.alice", "20m"); err != nil {
			t.Fatal(err)
		}
		if err := holds.Delete(t.Context(), "account"); err != nil {
			t.Fatal(err)
		}
		held := time.Now().Add(20 * time.Minute)
		r.await(time.Hour, "RESULTS", "results.alice.>", 1)
		r.empty(time.Minute)
		r.expect("alice", map[string]int{"result": 1})
		calls := r.called("alice")
		if len(calls) != 3 || calls[0].Before(held) {
			t.Errorf("%d calls", len(calls))
		}
	})
}

// Answers that do not say that nothing was done end what must not be called twice.
func TestUncertainAnswers(t *testing.T) {
	for status, uncertain := range map[int]bool{
		500: true, 502: true, 504: true, 520: true, 521: true, 522: true, 524: true, 408: true,
		503: false, 429: false,
	} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				r := newRig(t, func(c *Config) {
					quickly(c)
					unsafe(c)
				})
				r.answers(answer(status), ok())
				_, stop := r.work()
				defer stop()
				r.publishOne("alice", "pay", "pay-1")
				r.empty(5 * time.Minute)
				got, calls := r.outcomes("alice"), len(r.called("alice"))
				if uncertain && (got["UNCERTAIN"] != 1 || calls != 1) || !uncertain && (got["result"] != 1 || calls != 2) {
					t.Errorf("%v after %d calls", got, calls)
				}
			})
		})
	}
}

// A payment that has its result is not made again because its id comes again.
func TestRepeatedPayment(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, unsafe)
		_, stop := r.work()
		defer stop()
		for range 3 {
			r.publishOne("alice", "pay", "pay-1")
			r.empty(time.Minute)
			r.forgetIDs()
		}
		r.expect("alice", map[string]int{"result": 1})
		if n := len(r.called("alice")); n != 1 {
			t.Errorf("%d calls", n)
		}
	})
}

// A wait of nothing is no wait: the API is not asked again at once, and again.
func TestRetryAfterNothing(t *testing.T) {
	for _, status := range []int{429, 503} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				r := newRig(t, nil)
				began := time.Now()
				r.api = func(context.Context, *publisher.Request) classify.Answer {
					if time.Since(began) < 2500*time.Millisecond {
						return answer(status, "Retry-After", "0")
					}
					return ok()
				}
				_, stop := r.work()
				defer stop()
				r.publish("alice", 1)
				r.empty(time.Minute)
				r.expect("alice", map[string]int{"result": 1})
				if n := len(r.called("alice")); n > 4 {
					t.Errorf("%d calls", n)
				}
			})
		})
	}
}
