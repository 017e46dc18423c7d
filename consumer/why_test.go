package consumer

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// The true reason, on the real broker, in each case.
func TestWhy(t *testing.T) {
	for name, tc := range map[string]struct {
		limits func(*Config)
		api    func(n int) classify.Answer
		before func(r *rig)
		n      int // requests of alice
		after  time.Duration

		request string // asked about, instead of alice
		reason  resilience.Reason
		until   time.Duration // about, from when it is asked; 0: none, or not looked at
		says    string
		action  string
	}{
		"Retry-After": {
			api: func(int) classify.Answer { return answer(429, "Retry-After", "600") }, n: 3, after: 10 * time.Second,
			reason: resilience.ReasonHold, until: 590 * time.Second, says: "RATE_LIMIT",
		},
		"breaker": {
			limits: func(c *Config) { c.Gates.Breaker.Failures = 2 },
			api:    func(int) classify.Answer { return answer(503) }, n: 6, after: 5 * time.Second,
			reason: resilience.ReasonBreaker, until: time.Minute, says: "circuit breaker is open",
		},
		"limiter": {
			limits: func(c *Config) { c.Gates.Creator.Rate = resilience.Rate{PerSecond: 0.5, Burst: 1} }, n: 5, after: time.Second,
			reason: resilience.ReasonLimit, says: "rate limit",
		},
		"slots": {
			limits: func(c *Config) { c.Gates.Creator.Concurrency = 1 },
			api:    func(int) classify.Answer { time.Sleep(time.Minute); return ok() }, n: 3, after: 5 * time.Second,
			reason: resilience.ReasonSlots, says: "in flight",
		},
		"account hold": {
			api: func(int) classify.Answer { return answer(402) }, n: 5, after: 10 * time.Second,
			reason: resilience.ReasonAccountHold, until: 290 * time.Second, says: "BILLING", action: "billing",
		},
		"operator hold": {
			before: func(r *rig) {
				if _, err := r.bucket("HOLDS").PutString(r.t.Context(), "creator.alice", "1h"); err != nil {
					r.t.Fatal(err)
				}
			}, n: 2, after: 60 * time.Second,
			reason: resilience.ReasonHold, until: 59 * time.Minute, says: "operator",
		},
		"session expired": {
			limits: func(c *Config) {
				profile, err := classify.Load("ofauth")
				if err != nil {
					panic(err)
				}
				c.Profile = profile
			},
			api: func(int) classify.Answer {
				a := answer(401)
				a.Body = []byte(`{"type":"SESSION_EXPIRED"}`)
				return a
			}, n: 3, after: 10 * time.Second,
			reason: resilience.ReasonHold, says: "SESSION_EXPIRED", action: "headgate release alice",
		},
		"backoff": {
			limits: func(c *Config) {
				op := c.Operations[AnyOperation]
				op.Retry.Base, op.Retry.Max, op.Retry.Jitter = 30*time.Second, time.Minute, 0
				c.Operations[AnyOperation] = op
			},
			api: func(int) classify.Answer { return answer(503) }, n: 1, after: 10 * time.Second,
			reason: reasonBackoff, until: 20 * time.Second, says: "next attempt",
		},
		"turn": {
			limits: func(c *Config) { c.Gates.Creator.Rate = resilience.Rate{PerSecond: 0.1, Burst: 1} }, n: 20, after: time.Second,
			request: "alice-19", reason: reasonTurn, until: 190 * time.Second, says: "its turn",
		},
		"nothing": {n: 3, after: 10 * time.Second, reason: "", says: "nothing waits"},
	} {
		t.Run(name, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				r := newRig(t, tc.limits)
				n := 0
				r.api = func(context.Context, *publisher.Request) classify.Answer {
					r.mu.Lock()
					n++
					call := n
					r.mu.Unlock()
					if tc.api == nil {
						return ok()
					}
					return tc.api(call)
				}
				if tc.before != nil {
					tc.before(r)
				}
				w, stop := r.work()
				defer stop()
				time.Sleep(5 * time.Second)
				r.publish("alice", tc.n)
				time.Sleep(tc.after)
				ask := func() (Why, bool) {
					if tc.request != "" {
						return w.WhyRequest(tc.request)
					}
					return w.Why("alice")
				}
				y, mine := ask()
				for range 100 { // turns and tokens change from moment to moment
					if y.Reason == tc.reason {
						break
					}
					time.Sleep(20 * time.Millisecond)
					y, mine = ask()
				}
				if !mine {
					t.Fatal("nobody answers")
				}
				if y.Reason != tc.reason || !strings.Contains(y.Text, tc.says) || !strings.Contains(y.Action, tc.action) || (y.Action == "") != (tc.action == "") {
					t.Errorf("%+v", y)
				}
				if tc.until != 0 {
					if y.Until == nil {
						t.Errorf("no end: %+v", y)
					} else if d := time.Until(*y.Until); d < tc.until-10*time.Second || d > tc.until+10*time.Second {
						t.Errorf("ends in %v, want about %v", d, tc.until)
					}
				}
			})
		})
	}
}

// PartitionOf says what the server does.
func TestPartitionOf(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Topology.Partitions = 7 })
	for i := range 200 {
		name := fmt.Sprintf("creator %d/é", i)
		subject, err := r.cfg.Topology.Namespace.RequestSubject(name, "send")
		if err != nil {
			t.Fatal(err)
		}
		ack, err := r.js.PublishMsg(t.Context(), nats.NewMsg(subject))
		if err != nil {
			t.Fatal(err)
		}
		stream, err := r.js.Stream(t.Context(), "REQUESTS")
		if err != nil {
			t.Fatal(err)
		}
		m, err := stream.GetMsg(t.Context(), ack.Sequence)
		if err != nil {
			t.Fatal(err)
		}
		n, err := PartitionOf(name, 7)
		if err != nil || fmt.Sprint(n) != strings.Split(m.Subject, ".")[1] {
			t.Fatalf("%s: %d, %v", m.Subject, n, err)
		}
	}
}
