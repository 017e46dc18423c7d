package main

import (
	"strconv"
	"testing"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
)

// What a provider's answer means, from the API to the dead letter and to who is
// held.
func TestProviders(t *testing.T) {
	for _, c := range []struct {
		name, profile string
		status        int
		body          string
		header        []string
		class         string
		headers       map[string]string
		held          string // key in HOLDS
		calls         int    // of two requests
	}{
		{
			name: "session expired", profile: "ofauth", status: 401, class: "SESSION_EXPIRED", held: "creator.alice", calls: 1,
			body:    `{"error":"Session expired","type":"SESSION_EXPIRED","requestId":"r1","actionRequired":"relink_connection"}`,
			headers: map[string]string{"Dlq-Code": "SESSION_EXPIRED", "Dlq-Action": "relink_connection", "Dlq-Scope": "creator", "Dlq-Upstream-Request-Id": "r1", "Dlq-Attempts": "1"},
		},
		{
			name: "wrong key", profile: "ofauth", status: 401, class: "UNAUTHORIZED", held: "account", calls: 1,
			body:    `{"error":"Wrong key","type":"UNAUTHORIZED","requestId":"r2"}`,
			headers: map[string]string{"Dlq-Scope": "account"},
		},
		{
			name: "no credits", profile: "apifreaks", status: 402, class: "BILLING", held: "account", calls: 1,
			body: `{"message":"out of credits"}`, headers: map[string]string{"Dlq-Http-Status": "402"},
		},
		{
			name: "quota", profile: "ofauth-legacy", status: 429, class: "QUOTA_EXCEEDED", held: "account", calls: 1,
			body: `{"error":"Quota","code":"RATE_LIMIT_QUOTA_EXCEEDED"}`, headers: map[string]string{"Dlq-Code": "RATE_LIMIT_QUOTA_EXCEEDED"},
		},
		{
			name: "field", profile: "ofauth-legacy", status: 422, class: "VALIDATION", calls: 2,
			body:    `{"error":"Too long","code":"VALIDATION_FIELD_TOO_LONG","details":{"field":"text"}}`,
			headers: map[string]string{"Dlq-Field": "text"},
		},
		{
			name: "denied although 200", profile: "fanfare", status: 200, class: "DENIED", calls: 2,
			body: `{"status":"DENIED","denyReason":"not on the list"}`, header: []string{"X-Request-Id", "f-7"},
			headers: map[string]string{"Dlq-Http-Status": "200", "Dlq-Upstream-Request-Id": "f-7"},
		},
		{
			name: "rules are outdated", profile: "ofauth", status: 401, class: "RULES_OUTDATED", calls: 8,
			body: `{"error":"Rules","type":"RULES_OUTDATED","actionRequired":"refresh_rules"}`, headers: map[string]string{"Dlq-Attempts": "4"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, natsservertest.URL(t))
			w.change("profile: generic", "profile: "+c.profile)
			w.change("concurrency: 3", "concurrency: 1")
			w.change("base: 100ms", "base: 10ms")
			w.api.answer("alice", status(c.status, c.body, c.header...))
			for n := range 2 {
				w.publish("requests.alice.send", `{}`, "Nats-Msg-Id", "m"+strconv.Itoa(n))
			}
			w.worker()
			n := 2
			if c.held != "" {
				n = 1 // the other one waits
			}
			for _, m := range w.outcomes("DLQ", "dlq."+c.class+".alice.send.>", n) {
				checkHeaders(t, m.Headers(), c.headers)
			}
			if c.held != "" {
				holds, err := w.js.KeyValue(t.Context(), "HOLDS")
				if err != nil {
					t.Fatal(err)
				}
				if _, err := holds.Get(t.Context(), c.held+".api"); err != nil {
					t.Errorf("%s is not held: %v", c.held, err)
				}
			}
			if got := len(w.api.of("alice")); got != c.calls {
				t.Errorf("%d calls, want %d", got, c.calls)
			}
		})
	}
}
