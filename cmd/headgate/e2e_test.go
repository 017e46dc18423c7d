package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
)

// world is a broker, an API and the real program between them. Requests are
// published by a plain NATS client, which knows nothing of Headgate.
type world struct {
	t      *testing.T
	url    string
	nc     *nats.Conn
	js     jetstream.JetStream
	api    *scripted
	config string // file
}

const testConfig = `
partitions: 4
provider:
  name: test
  profile: generic
  base_url: %s
  auth: {header: apiKey, env: HEADGATE_TEST_KEY}
  creator_header: x-connection-id
  timeout: 2s
limits:
  creator: {rate: inf, concurrency: 3}
breaker: {failures: 5, open_for: 1s, successes: 2}
retry: {attempts: 4, base: 100ms, max: 1s, jitter: 0.1, throttled: 20, max_age: 1h}
shutdown_grace: 2s
operations:
  top: {method: GET, path: /top, query: {creatorId: "{creator}", limit: "{limit}"}, not_found: empty}
  "*": {method: POST, path: "/c/{creator}/{operation}", body: payload}
`

func newWorld(t *testing.T, url string) *world {
	t.Helper()
	t.Setenv("HEADGATE_TEST_KEY", "s3cret")
	w := &world{t: t, url: url, api: &scripted{}}
	server := httptest.NewServer(w.api)
	t.Cleanup(server.Close)
	w.config = filepath.Join(t.TempDir(), "headgate.yaml")
	w.configure(fmt.Sprintf(testConfig, server.URL))
	var err error
	if w.nc, err = nats.Connect(url); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.nc.Close)
	if w.js, err = jetstream.New(w.nc); err != nil {
		t.Fatal(err)
	}
	w.headgate("setup")
	return w
}

// configure writes the configuration that the program reads when it starts.
func (w *world) configure(text string) {
	w.t.Helper()
	if err := os.WriteFile(w.config, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// change replaces a part of the configuration.
func (w *world) change(old, by string) {
	w.t.Helper()
	text, err := os.ReadFile(w.config)
	if err != nil || !strings.Contains(string(text), old) {
		w.t.Fatalf("change %q: %v", old, err)
	}
	w.configure(strings.ReplaceAll(string(text), old, by))
}

// headgate runs the program to its end.
func (w *world) headgate(args ...string) string {
	w.t.Helper()
	var stdout, stderr bytes.Buffer
	args = append(args, "-c", w.config, "--server", w.url)
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	if code := run(ctx, args, strings.NewReader(""), &stdout, &stderr); code != exitOK {
		w.t.Fatalf("headgate %s: exit code %d\n%s", strings.Join(args, " "), code, &stderr)
	}
	return stdout.String()
}

// worker runs the program until stop, which is what a SIGTERM does.
func (w *world) worker() (stop func() string) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var stderr syncBuffer
	ended := make(chan int, 1)
	go func() {
		ended <- run(ctx, []string{"run", "-c", w.config, "--server", w.url, "--log-format", "json"}, strings.NewReader(""), io.Discard, &stderr)
	}()
	stop = sync.OnceValue(func() string {
		cancel()
		select {
		case code := <-ended:
			if code != exitOK {
				w.t.Errorf("the worker ended with %d:\n%s", code, stderr.String())
			}
		case <-time.After(30 * time.Second):
			w.t.Errorf("the worker does not end:\n%s", stderr.String())
		}
		if log := stderr.String(); strings.Contains(log, "s3cret") {
			w.t.Error("the API key is in the log")
		}
		return stderr.String()
	})
	w.t.Cleanup(func() { stop() })
	return stop
}

// publish is one publish of a plain client.
func (w *world) publish(subject, payload string, header ...string) *jetstream.PubAck {
	w.t.Helper()
	m := nats.NewMsg(subject)
	m.Data = []byte(payload)
	for i := 0; i < len(header); i += 2 {
		m.Header[header[i]] = []string{header[i+1]}
	}
	ack, err := w.js.PublishMsg(w.t.Context(), m)
	if err != nil {
		w.t.Fatalf("publish %s: %v", subject, err)
	}
	return ack
}

// publishMany publishes n requests to their creators, all at once.
func (w *world) publishMany(n int, request func(i int) *nats.Msg) {
	w.t.Helper()
	js, err := jetstream.New(w.nc, jetstream.WithPublishAsyncMaxPending(n+1))
	if err != nil {
		w.t.Fatal(err)
	}
	acks := make([]jetstream.PubAckFuture, n)
	for i := range acks {
		if acks[i], err = js.PublishMsgAsync(request(i)); err != nil {
			w.t.Fatal(err)
		}
	}
	timeout := time.After(patience)
	for i, ack := range acks {
		select {
		case <-ack.Ok():
		case err := <-ack.Err():
			w.t.Fatalf("request %d: %v", i, err)
		case <-timeout:
			w.t.Fatalf("request %d of %d is not acknowledged", i, n)
		}
	}
}

// outcomes awaits n outcomes below a subject and returns them by request id.
func (w *world) outcomes(stream, subject string, n int) map[string]jetstream.Msg {
	w.t.Helper()
	consumer, err := w.js.OrderedConsumer(w.t.Context(), stream, jetstream.OrderedConsumerConfig{FilterSubjects: []string{subject}})
	if err != nil {
		w.t.Fatal(err)
	}
	got := map[string]jetstream.Msg{}
	for len(got) < n {
		batch, err := consumer.Fetch(n-len(got), jetstream.FetchMaxWait(20*time.Second))
		if err != nil {
			w.t.Fatal(err)
		}
		found := false
		for m := range batch.Messages() {
			found = true
			tokens := strings.Split(m.Subject(), ".")
			id := tokens[len(tokens)-1]
			if got[id] != nil {
				w.t.Errorf("a second outcome of %s: %s", id, m.Subject())
			}
			got[id] = m
		}
		if !found {
			w.t.Fatalf("%d of %d outcomes on %s", len(got), n, subject)
		}
	}
	return got
}

func (w *world) outcome(stream, subject string) jetstream.Msg {
	w.t.Helper()
	for _, m := range w.outcomes(stream, subject, 1) {
		return m
	}
	return nil
}

func (w *world) messages(stream string) uint64 {
	w.t.Helper()
	s, err := w.js.Stream(w.t.Context(), stream)
	if err != nil {
		w.t.Fatal(err)
	}
	return s.CachedInfo().State.Msgs
}

// eventually awaits a condition.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	within(t, 20*time.Second, what, condition)
}

func within(t *testing.T, limit time.Duration, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// scripted is an API that answers each creator as it is told and remembers
// who called when.
type scripted struct {
	mu      sync.Mutex
	calls   map[string][]apiCall
	answers map[string]func(n int, w http.ResponseWriter, r *http.Request) // by creator; n counts from 1
}

type apiCall struct {
	at     time.Time
	header http.Header
	url    string
	body   string
}

func (s *scripted) answer(creator string, f func(n int, w http.ResponseWriter, r *http.Request)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.answers == nil {
		s.answers = map[string]func(int, http.ResponseWriter, *http.Request){}
	}
	s.answers[creator] = f
}

func (s *scripted) of(creator string) []apiCall {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]apiCall(nil), s.calls[creator]...)
}

func (s *scripted) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	creator := r.Header.Get("x-connection-id")
	s.mu.Lock()
	if s.calls == nil {
		s.calls = map[string][]apiCall{}
	}
	s.calls[creator] = append(s.calls[creator], apiCall{time.Now(), r.Header.Clone(), r.URL.String(), string(body)})
	n, answer := len(s.calls[creator]), s.answers[creator]
	s.mu.Unlock()
	if answer != nil {
		answer(n, w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Request-Id", "up-"+strconv.Itoa(n))
	fmt.Fprintf(w, `{"creator":%q,"n":%d}`, creator, n)
}

func status(code int, body string, header ...string) func(int, http.ResponseWriter, *http.Request) {
	return func(_ int, w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func checkHeaders(t *testing.T, got nats.Header, want map[string]string) {
	t.Helper()
	for name, value := range want {
		if v := got.Get(name); v != value {
			t.Errorf("%s: %q, want %q", name, v, value)
		}
	}
}

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
	if ms, err := strconv.Atoi(m.Headers().Get("Headgate-Duration-Ms")); err != nil || ms < 0 || ms > 2000 {
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
	w := newWorld(t, natsservertest.URL(t))
	var until time.Time
	var mu sync.Mutex
	w.api.answer("alice", func(n int, rw http.ResponseWriter, r *http.Request) {
		if n == 1 {
			status(429, "", "Retry-After", "2")(n, rw, r)
			mu.Lock()
			until = time.Now().Add(2 * time.Second)
			mu.Unlock()
			return
		}
		status(200, `{}`)(n, rw, r)
	})
	w.worker()
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
		t.Fatal("the others were served only after the hold")
	}
	results := w.outcomes("RESULTS", "results.alice.>", 6)
	checkHeaders(t, results["first"].Headers(), map[string]string{"Headgate-Attempts": "2"})
	checkHeaders(t, results["later0"].Headers(), map[string]string{"Headgate-Attempts": "1"})
	calls := w.api.of("alice")
	if len(calls) != 7 {
		t.Errorf("%d calls for 6 requests of which one was throttled once", len(calls))
	}
	for _, c := range calls[1:] {
		if c.at.Before(end.Add(-20 * time.Millisecond)) { // the server's clock stops after it has answered
			t.Errorf("called %v before Retry-After was over", end.Sub(c.at))
		}
	}
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
	var gap time.Duration
	for i, a := range attempts {
		at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(a["at"]))
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			if at.Sub(last) <= gap {
				t.Errorf("attempt %d after %v, the one before after %v", i+1, at.Sub(last), gap)
			}
			gap = at.Sub(last)
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

	results, dead := int(w.messages("RESULTS")), int(w.messages("DLQ"))
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

// forget forgets the calls so far.
func (s *scripted) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = nil
}
