package main

import (
	"bytes"
	"context"
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

	"github.com/headgate-io/headgate/publisher"
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
  timeout: 30s
limits:
  creator: {rate: inf, concurrency: 3}
breaker: {failures: 5, open_for: 1s, successes: 2}
retry: {attempts: 4, base: 100ms, max: 1s, jitter: 0.1, throttled: 20, max_age: 1h}
shutdown_grace: 30s
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
		case <-time.After(patience):
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
		batch, err := consumer.Fetch(n-len(got), jetstream.FetchMaxWait(patience))
		if err != nil {
			w.t.Fatal(err)
		}
		found := false
		for m := range batch.Messages() {
			found = true
			if m.Headers().Get(publisher.HeaderDeadLetter) != "" {
				continue // a tombstone: the dead letter is in DLQ
			}
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

// eventually awaits a condition, for as long as a busy machine may need.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	within(t, patience, what, condition)
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

// forget forgets the calls so far.
func (s *scripted) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = nil
}
