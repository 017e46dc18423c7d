package consumer

import (
	"context"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/jsonschema-go/jsonschema"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/control"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// events reads all that were told, and holds them against their schema.
func (r *rig) events() (all []publisher.Event, subjects []string) {
	r.t.Helper()
	text, err := os.ReadFile("../docs/event.schema.json")
	if err != nil {
		r.t.Fatal(err)
	}
	var schema jsonschema.Schema
	if err := json.Unmarshal(text, &schema); err != nil {
		r.t.Fatal(err)
	}
	resolved, err := schema.Resolve(nil)
	if err != nil {
		r.t.Fatal(err)
	}
	stream, err := r.js.Stream(r.t.Context(), "EVENTS")
	if err != nil {
		r.t.Fatal(err)
	}
	for seq := uint64(1); seq <= stream.CachedInfo().State.LastSeq; seq++ {
		m, err := stream.GetMsg(r.t.Context(), seq)
		if err != nil {
			r.t.Fatal(err)
		}
		var any map[string]any
		var e publisher.Event
		if err := json.Unmarshal(m.Data, &any); err != nil {
			r.t.Fatal(err)
		}
		if err := resolved.Validate(any); err != nil {
			r.t.Errorf("%s: %v", m.Data, err)
		}
		if err := json.Unmarshal(m.Data, &e); err != nil {
			r.t.Fatal(err)
		}
		all, subjects = append(all, e), append(subjects, m.Subject)
	}
	return all, subjects
}

// Somebody who listens knows what happened, once.
func TestEvents(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) {
			profile, err := classify.Load("ofauth")
			if err != nil {
				t.Fatal(err)
			}
			c.Profile = profile
			c.Gates.Creator = resilience.Limits{Concurrency: 1}
			c.Gates.Breaker.Failures = 2
			c.Gates.Breaker.OpenFor = 10 * time.Second
			op := c.Operations[AnyOperation]
			op.Retry.Attempts = 3
			c.Operations[AnyOperation] = op
		})
		failures := 0
		r.api = func(_ context.Context, req *publisher.Request) classify.Answer {
			switch req.Creator {
			case "throttled":
				if len(r.called("throttled")) == 1 {
					return answer(429, "Retry-After", "600")
				}
			case "expired":
				a := answer(401)
				a.Body = []byte(`{"type":"SESSION_EXPIRED"}`)
				return a
			case "broken":
				if failures++; failures <= 3 {
					return answer(503)
				}
			case "wrong":
				return answer(422)
			}
			return ok()
		}
		_, stop := r.work()
		r.publish("throttled", 1)
		r.publish("expired", 1)
		r.publish("broken", 1)
		r.publish("wrong", 20)
		r.await(time.Minute, "DLQ", ">", 22)
		time.Sleep(time.Minute)
		r.publish("broken", 1)
		if err := r.bucket("HOLDS").Delete(t.Context(), "creator.throttled.api"); err != nil {
			t.Fatal(err)
		}
		r.await(time.Minute, "RESULTS", "results.throttled.>", 1)
		r.await(time.Minute, "EVENTS", "events.creator.released.throttled", 1)
		stop()

		_, subjects := r.events()
		count := map[string]int{}
		for _, s := range subjects {
			count[s]++
		}
		for subject, want := range map[string]int{
			"events.creator.held.throttled":     1,
			"events.creator.released.throttled": 1,
			"events.creator.held.expired":       1,
			"events.action.required.expired":    1,
			"events.breaker.opened.broken":      1,
			"events.dlq.first_of_class":         3, // SESSION_EXPIRED, SERVER_ERROR, VALIDATION
			"events.attempts.exhausted.broken":  1,
		} {
			if n := count[subject]; n != want && (subject != "events.breaker.opened.broken" || n != 2) { // the third failure opens it again
				t.Errorf("%s: %d events, want %d; all: %v", subject, count[subject], want, count)
			}
		}
	})
}

// The schema knows every kind, and no other.
func TestEventKinds(t *testing.T) {
	text, err := os.ReadFile("../docs/event.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var s struct {
		Properties struct {
			Kind struct{ Enum []publisher.EventKind }
		}
	}
	if err := json.Unmarshal(text, &s); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(s.Properties.Kind.Enum, publisher.EventKinds) {
		t.Errorf("schema %v, code %v", s.Properties.Kind.Enum, publisher.EventKinds)
	}
}

// What calls cost is counted over workers; somebody is told at 80 %, and at 100 %
// the account is held until the day ends.
func TestCredits(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) {
			profile, err := classify.Load("apifreaks")
			if err != nil {
				t.Fatal(err)
			}
			c.Profile = profile
			c.Credits = Credits{PerDay: 100, Hold: true}
			c.Gates.Creator = resilience.Limits{Concurrency: 1}
		})
		r.api = func(context.Context, *publisher.Request) classify.Answer {
			time.Sleep(time.Second)
			return answer(200, "X-Af-Credits-Cost", "2")
		}
		// Half an hour before the end of a day.
		now := time.Now().UTC()
		time.Sleep(now.Truncate(24 * time.Hour).Add(47*time.Hour + 30*time.Minute).Sub(now))
		first, _ := r.work("first")
		r.work("second")
		time.Sleep(10 * time.Second)
		for _, name := range []string{"alice", "bob", "carol", "dave", "eve", "frank"} {
			r.publish(name, 20)
		}
		time.Sleep(3 * time.Minute)
		held := r.count("RESULTS", "results.>")
		if held < 50 || held > 75 { // 100 credits, and what was called until it was known
			t.Errorf("%d calls for 50", held)
		}
		s := first.Snapshot()
		if !s.Account || s.Credits < 100 {
			t.Errorf("%+v", s)
		}
		kinds := map[string]int{}
		all, _ := r.events()
		for _, e := range all {
			kinds[string(e.Kind)]++
			if e.Kind == publisher.CreditsThreshold {
				kinds[strings.Repeat("%", e.Percent/20)]++
			}
		}
		if kinds["%%%%"] != 1 || kinds["%%%%%"] != 1 || kinds["account.held"] != 1 {
			t.Errorf("events: %v", kinds)
		}
		entry, err := r.bucket("HOLDS").Get(t.Context(), "account.api")
		if err != nil {
			t.Fatal(err)
		}
		h, err := control.ParseHold(entry.Value(), entry.Created())
		if err != nil || h.Until.UTC().Hour() != 0 || time.Until(h.Until) < 20*time.Minute {
			t.Errorf("%+v, %v", h, err)
		}
		// The next day it goes on.
		r.await(time.Hour, "RESULTS", "results.>", held+20)
	})
}

// Somebody who releases the account has bought more credits, or insists: it is not held again
// that day.
func TestCreditsReleased(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) {
			profile, err := classify.Load("apifreaks")
			if err != nil {
				t.Fatal(err)
			}
			c.Profile = profile
			c.Credits = Credits{PerDay: 10, Hold: true}
			c.Gates.Creator = resilience.Limits{Concurrency: 1}
		})
		r.api = func(context.Context, *publisher.Request) classify.Answer {
			time.Sleep(time.Second)
			return answer(200, "X-Af-Credits-Cost", "2")
		}
		now := time.Now().UTC()
		time.Sleep(now.Truncate(24 * time.Hour).Add(36 * time.Hour).Sub(now)) // the middle of a day
		r.work("first")
		r.work("second")
		time.Sleep(10 * time.Second)
		creators := []string{"alice", "bob", "carol", "dave"}
		for _, name := range creators {
			r.publish(name, 20)
		}
		time.Sleep(time.Minute)
		if n := r.count("RESULTS", "results.>"); n > 40 {
			t.Fatalf("it was not held: %d results", n)
		}
		if err := r.bucket("HOLDS").Delete(t.Context(), "account.api"); err != nil {
			t.Fatal(err)
		}
		r.await(10*time.Minute, "RESULTS", "results.>", 20*len(creators))
	})
}
