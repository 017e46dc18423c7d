package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
)

const traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

func TestResult(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	w.worker()
	w.publish("requests.alice.top", `{"limit":5}`, "Nats-Msg-Id", "hook:42",
		"Headgate-Correlation-Id", "corr-1", "traceparent", traceparent)
	m := w.outcome("RESULTS", "results.alice.top.>")
	if got := string(m.Data()); got != `{"creator":"alice","n":1}` {
		t.Errorf("body %s", got)
	}
	if m.Subject() != "results.alice.top.hook=3A42" {
		t.Errorf("subject %s", m.Subject())
	}
	checkHeaders(t, m.Headers(), map[string]string{
		"Content-Type": "application/json", "Headgate-Request-Id": "hook:42", "Headgate-Correlation-Id": "corr-1",
		"Headgate-Creator": "alice", "Headgate-Operation": "top", "Headgate-Status": "200", "Headgate-Attempts": "1",
		"Headgate-Upstream-Request-Id": "up-1", "Headgate-Empty": "", "traceparent": traceparent,
	})
	if ms, err := strconv.Atoi(m.Headers().Get("Headgate-Duration-Ms")); err != nil || ms < 0 || ms > int(patience.Milliseconds()) {
		t.Errorf("Headgate-Duration-Ms: %q", m.Headers().Get("Headgate-Duration-Ms"))
	}
	call := w.api.of("alice")[0]
	if call.url != "/top?creatorId=alice&limit=5" || call.header.Get("apiKey") != "s3cret" ||
		call.header.Get("X-Correlation-Id") != "corr-1" || call.header.Get("traceparent") != traceparent {
		t.Errorf("called %s with %v", call.url, call.header)
	}
	eventually(t, "the request is acked", func() bool { return w.messages("REQUESTS") == 0 })
}

func TestNothingFoundIsAnEmptyResult(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	w.api.answer("alice", status(404, `{"title":"nobody"}`))
	w.worker()
	w.publish("requests.alice.top", `{"limit":5}`)
	w.publish("requests.alice.send", `{}`)
	checkHeaders(t, w.outcome("RESULTS", "results.alice.top.>").Headers(), map[string]string{
		"Headgate-Empty": "true", "Headgate-Status": "404",
	})
	w.outcome("DLQ", "dlq.NOT_FOUND.alice.send.>")
}

func TestTerminalFailureIsADeadLetter(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	w.api.answer("alice", status(422, `{"title":"no","code":"too_long","detail":"x"}`, "X-Request-Id", "up-9"))
	w.worker()
	payload := "{\"text\": \"h\u00e9\",\n \"n\": 1.0}\x00"
	w.publish("requests.alice.send", payload, "Nats-Msg-Id", "r1", "X-Own", "kept", "Headgate-Correlation-Id", "corr",
		"traceparent", traceparent, "Authorization", "Bearer s3cret")
	m := w.outcome("DLQ", "dlq.VALIDATION.alice.send.r1")
	if string(m.Data()) != payload {
		t.Errorf("payload %q is not the request's byte for byte", m.Data())
	}
	checkHeaders(t, m.Headers(), map[string]string{
		"Dlq-Class": "VALIDATION", "Dlq-Code": "too_long", "Dlq-Scope": "request", "Dlq-Http-Status": "422", "Dlq-Attempts": "1",
		"Dlq-Deliveries": "1", "Dlq-Upstream-Request-Id": "up-9", "Dlq-Provider": "test", "Dlq-Creator": "alice", "Dlq-Operation": "send",
		"Dlq-Source-Stream": "REQUESTS", "Dlq-Source-Seq": "1", "Dlq-Msg-Id": "r1", "Dlq-Action": "", "Dlq-Field": "",
		"X-Own": "kept", "Headgate-Correlation-Id": "corr", "traceparent": traceparent, "Authorization": "",
	})
	for _, name := range []string{"Dlq-Reason", "Dlq-First-Failed-At", "Dlq-Failed-At", "Dlq-Source-Subject"} {
		if m.Headers().Get(name) == "" {
			t.Errorf("%s is missing", name)
		}
	}
	if n := len(history(t, m)); n != 1 {
		t.Errorf("history of %d attempts", n)
	}
}

func history(t *testing.T, m jetstream.Msg) (attempts []map[string]any) {
	t.Helper()
	if err := json.Unmarshal([]byte(m.Headers().Get("Dlq-History")), &attempts); err != nil {
		t.Fatalf("Dlq-History %q: %v", m.Headers().Get("Dlq-History"), err)
	}
	return attempts
}

func TestThrottledCreatorIsLeftAlone(t *testing.T) {
	// A busy machine needs longer to serve the others than the shortest hold lasts.
	for hold := 2 * time.Second; !throttledCreatorIsLeftAlone(t, hold); hold *= 2 {
		if hold > patience {
			t.Fatalf("in a hold of %v the others are not served", hold)
		}
	}
}

// throttledCreatorIsLeftAlone reports false if the hold ended before the others were served.
func throttledCreatorIsLeftAlone(t *testing.T, hold time.Duration) bool {
	w := newWorld(t, natsservertest.URL(t))
	var until time.Time
	var mu sync.Mutex
	w.api.answer("alice", func(n int, rw http.ResponseWriter, r *http.Request) {
		if n == 1 {
			mu.Lock()
			until = time.Now().Add(hold)
			mu.Unlock()
			status(429, "", "Retry-After", strconv.Itoa(int(hold.Seconds())))(n, rw, r)
			return
		}
		status(200, `{}`)(n, rw, r)
	})
	defer w.worker()()
	w.publish("requests.alice.send", `{}`, "Nats-Msg-Id", "first")
	eventually(t, "the hold is stored", func() bool { return w.messages("KV_HOLDS") == 1 })
	for i := range 5 {
		w.publish("requests.alice.send", `{}`, "Nats-Msg-Id", "later"+strconv.Itoa(i))
		w.publish("requests.bob.send", `{}`)
	}
	w.outcomes("RESULTS", "results.bob.>", 5) // nobody else waits
	mu.Lock()
	end := until
	mu.Unlock()
	if time.Now().After(end) {
		return false
	}
	results := w.outcomes("RESULTS", "results.alice.>", 6)
	checkHeaders(t, results["first"].Headers(), map[string]string{"Headgate-Attempts": "2"})
	checkHeaders(t, results["later0"].Headers(), map[string]string{"Headgate-Attempts": "1"})
	calls := w.api.of("alice")
	if len(calls) != 7 {
		t.Errorf("%d calls for 6 requests of which one was throttled once", len(calls))
	}
	for _, c := range calls[1:] {
		if c.at.Before(end) {
			t.Errorf("called %v before Retry-After was over", end.Sub(c.at))
		}
	}
	return true
}

func TestRefusedConnection(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	dead := httptest.NewServer(http.NotFoundHandler())
	dead.Close()
	w.configure(fmt.Sprintf(testConfig, dead.URL))
	w.worker()
	w.publish("requests.alice.send", `{}`)
	m := w.outcome("DLQ", "dlq.NETWORK_ERROR.alice.send.>")
	checkHeaders(t, m.Headers(), map[string]string{"Dlq-Attempts": "4", "Dlq-Http-Status": ""})
	if !strings.Contains(m.Headers().Get("Dlq-Reason"), "attempts exhausted") {
		t.Errorf("Dlq-Reason: %s", m.Headers().Get("Dlq-Reason"))
	}
	attempts := history(t, m)
	if len(attempts) != 4 {
		t.Fatalf("history of %d attempts", len(attempts))
	}
	var last time.Time
	for i, a := range attempts {
		at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(a["at"]))
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			// Base 100 ms, doubling, seen by two clocks.
			if least := 90 * time.Millisecond << (i - 1); at.Sub(last) < least {
				t.Errorf("attempt %d after %v, want at least %v", i+1, at.Sub(last), least)
			}
		}
		last = at
	}
}

func TestBreakerOpensProbesAndCloses(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	w.api.answer("alice", func(n int, rw http.ResponseWriter, r *http.Request) {
		if n <= 5 {
			status(503, "")(n, rw, r)
			return
		}
		time.Sleep(50 * time.Millisecond) // so that calls at the same time would be seen
		status(200, `{}`)(n, rw, r)
	})
	w.change("concurrency: 3", "concurrency: 1") // or calls in flight go on when it opens
	stop := w.worker()
	for i := range 8 {
		w.publish("requests.alice.send", `{}`, "Nats-Msg-Id", strconv.Itoa(i))
	}
	w.outcomes("RESULTS", "results.alice.>", 8)
	calls := w.api.of("alice")
	if len(calls) != 13 {
		t.Errorf("%d calls for 8 requests and 5 failures", len(calls))
	}
	if gap := calls[5].at.Sub(calls[4].at); gap < time.Second {
		t.Errorf("called %v after the breaker opened, for 1 s", gap)
	}
	if gap := calls[6].at.Sub(calls[5].at); gap < 50*time.Millisecond {
		t.Errorf("a second probe %v after the first, which took 50 ms", gap)
	}
	if gap := calls[7].at.Sub(calls[6].at); gap < 50*time.Millisecond {
		t.Errorf("a third call %v after the second, which took 50 ms", gap)
	}
	log := stop()
	if !strings.Contains(log, "breaker opened") || !strings.Contains(log, "breaker closed") {
		t.Errorf("the log does not tell of the breaker:\n%s", log)
	}
}

func TestMalformedRequests(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	w.worker()
	w.publish("requests.alice.top", `{}`, "Nats-Msg-Id", "lacks")
	w.publish("requests.alice.top", `limit=5`, "Nats-Msg-Id", "nojson")
	w.publish("requests.alice.top", `{"limit":1}`, "Nats-Msg-Id", "fine")
	got := w.outcomes("DLQ", "dlq.MALFORMED_REQUEST.>", 2)
	if r := got["lacks"].Headers().Get("Dlq-Reason"); !strings.Contains(r, `"limit"`) {
		t.Errorf("Dlq-Reason: %s", r)
	}
	if r := got["nojson"].Headers().Get("Dlq-Reason"); !strings.Contains(r, "JSON object") {
		t.Errorf("Dlq-Reason: %s", r)
	}
	w.outcomes("RESULTS", "results.alice.>", 1)
	if n := len(w.api.of("alice")); n != 1 {
		t.Errorf("%d calls", n)
	}
}

// What the server stores without complaint, a worker survives: each is a dead
// letter, and the partition goes on.
func TestHostileSubjects(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	w.worker()
	long := strings.Repeat("x", 200)
	bad := []string{"requests.a*b.send", "requests.=.send", "requests.=6c.send", "requests.\x1b[31m.send", "requests." + long + ".send", "requests.alice.caf\u00e9"}
	for _, subject := range bad {
		w.publish(subject, `{}`)
	}
	// A request without a body whose header says what a server's status says.
	for _, code := range []string{"100", "400", "404", "408", "409", "503"} {
		w.publish("requests.status.send", "", "Status", code, "Description", "Consumer Deleted", "Nats-Msg-Id", "s"+code)
	}
	w.publish("requests.fine.send", `{}`)
	w.outcomes("RESULTS", "results.fine.>", 1)
	w.outcomes("RESULTS", "results.status.>", 6)
	w.outcomes("DLQ", "dlq.MALFORMED_REQUEST.>", len(bad))
	eventually(t, "all are settled", func() bool { return w.messages("REQUESTS") == 0 })
}

// A worker that is told to stop in the middle, and another one after it: every
// request has exactly one outcome.
func TestRestartInTheMiddle(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	const creators, each = 20, 25
	for i := range creators {
		w.api.answer("c"+strconv.Itoa(i), func(n int, rw http.ResponseWriter, r *http.Request) {
			time.Sleep(time.Duration(5+n%20) * time.Millisecond)
			switch {
			case n%17 == 5:
				status(500, "")(n, rw, r)
			case n%19 == 7:
				status(422, `{}`)(n, rw, r)
			case n%23 == 9:
				status(429, "", "Retry-After", "0.2")(n, rw, r)
			default:
				status(200, `{}`)(n, rw, r)
			}
		})
		for n := range each {
			w.publish(fmt.Sprintf("requests.c%d.send", i), `{}`, "Nats-Msg-Id", fmt.Sprintf("r-%d-%d", i, n))
		}
	}
	for range 3 {
		before := w.messages("RESULTS")
		stop := w.worker()
		eventually(t, "the worker is in the middle", func() bool { return w.messages("RESULTS") > before+50 })
		stop()
	}
	w.worker()
	eventually(t, "all are settled", func() bool { return w.messages("REQUESTS") == 0 })

	dead := int(w.messages("DLQ"))
	results := int(w.messages("RESULTS")) - dead // a dead letter has its tombstone there
	if results+dead != creators*each {
		t.Fatalf("%d results and %d dead letters for %d requests", results, dead, creators*each)
	}
	got := w.outcomes("RESULTS", "results.>", results)
	for id, m := range w.outcomes("DLQ", "dlq.>", dead) {
		if got[id] != nil {
			t.Errorf("%s has a result and a dead letter", id)
		}
		got[id] = m
	}
	for i := range creators {
		for n := range each {
			if id := fmt.Sprintf("r-%d-%d", i, n); got[id] == nil {
				t.Errorf("%s has no outcome", id)
			}
		}
	}
}
