package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"pgregory.net/rapid"

	"github.com/headgate-io/headgate/publisher"
)

var testOperations = map[string]Operation{
	"top":  {Method: "GET", Path: "/stats/top", Query: map[string]string{"creatorId": "{creator}", "limit": "{limit}"}},
	"send": {Method: "POST", Path: "/creators/{creator}/messages", Payload: true},
	"drop": {Method: "DELETE", Path: "/posts/{post}"},
	"*":    {Method: "POST", Path: "/c/{creator}/{operation}", Payload: true},
}

func newClient(t *testing.T, h http.Handler, change func(*Config)) *Client {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	cfg := Config{
		BaseURL: server.URL + "/v1/", AuthHeader: "apiKey", Key: "secret", CreatorHeader: "x-connection-id",
		Timeout: 5 * time.Second, MaxBody: 1 << 20, InFlight: 10, UserAgent: "headgate/test", Operations: testOperations,
	}
	if change != nil {
		change(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// seen runs one request and returns what reached the server.
func seen(t *testing.T, r *publisher.Request) (got *http.Request, body string) {
	t.Helper()
	c := newClient(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		b, _ := io.ReadAll(req.Body)
		got, body = req.Clone(context.Background()), string(b)
	}), nil)
	call, err := c.Prepare(r)
	if err != nil {
		t.Fatalf("Prepare: %v", err)
	}
	if a := call(t.Context()); a.Status != 200 || a.Err != nil {
		t.Fatalf("answer %d, %v", a.Status, a.Err)
	}
	return got, body
}

func TestCallOfAQuery(t *testing.T) {
	got, _ := seen(t, &publisher.Request{
		ID: "webhook:1", Creator: "lily rose", Operation: "top", Payload: []byte(`{"limit": 10, "other": "x"}`),
		CorrelationID: "corr", Traceparent: "00-1-2-01",
	})
	if got.Method != "GET" || got.URL.String() != "/v1/stats/top?creatorId=lily+rose&limit=10" {
		t.Errorf("called %s %s", got.Method, got.URL)
	}
	for name, want := range map[string]string{
		"apiKey": "secret", "x-connection-id": "lily rose", "X-Correlation-Id": "corr",
		"traceparent": "00-1-2-01", "User-Agent": "headgate/test", "Idempotency-Key": "", "Content-Type": "",
	} {
		if v := got.Header.Get(name); v != want {
			t.Errorf("%s: %q, want %q", name, v, want)
		}
	}
	if got.ContentLength != 0 || len(got.TransferEncoding) != 0 {
		t.Errorf("a GET with a body: %d bytes, %v", got.ContentLength, got.TransferEncoding)
	}
}

func TestCallWithAPayload(t *testing.T) {
	payload := `{"text":"hé",  "n":1}`
	got, body := seen(t, &publisher.Request{
		ID: "id 1", Creator: "a/b", Operation: "send", Payload: []byte(payload),
		Header: nats.Header{"Content-Type": {"application/vnd.x+json"}},
	})
	if body != payload {
		t.Errorf("body %q is not the payload byte for byte", body)
	}
	if got.URL.EscapedPath() != "/v1/creators/a%2Fb/messages" {
		t.Errorf("path %s", got.URL.EscapedPath())
	}
	if k := got.Header.Get("Idempotency-Key"); k != "id 1" {
		t.Errorf("Idempotency-Key %q", k)
	}
	if ct := got.Header.Get("Content-Type"); ct != "application/vnd.x+json" {
		t.Errorf("Content-Type %q", ct)
	}
}

func TestAnyOperation(t *testing.T) {
	got, _ := seen(t, &publisher.Request{ID: "1", Creator: "c", Operation: "whatever"})
	if got.Method != "POST" || got.URL.Path != "/v1/c/c/whatever" {
		t.Errorf("called %s %s", got.Method, got.URL)
	}
	if got.ContentLength != 0 {
		t.Errorf("an empty payload was sent with length %d", got.ContentLength)
	}
}

func TestMalformed(t *testing.T) {
	c := newClient(t, http.NotFoundHandler(), nil)
	for name, tc := range map[string]struct {
		op, payload, want string
	}{
		"no JSON":       {"top", `limit=10`, "must be a JSON object: not JSON"},
		"no object":     {"top", `[1]`, "must be a JSON object: found a JSON array"},
		"empty":         {"top", ``, "must be a JSON object"},
		"lacks":         {"top", `{"max":1}`, `needs the field "limit", which the payload lacks`},
		"null":          {"top", `{"limit":null}`, `needs the field "limit"`},
		"JSON null":     {"top", `null`, `needs the field "limit"`},
		"nested":        {"top", `{"limit":{"a":1}}`, "must be a string, a number or a boolean"},
		"dot segment":   {"drop", `{"post":".."}`, `".." cannot stand in a path`},
		"empty segment": {"drop", `{"post":""}`, `"" cannot stand in a path`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.Prepare(&publisher.Request{ID: "1", Creator: "c", Operation: tc.op, Payload: []byte(tc.payload)})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
	// HTTP trims blanks: the API would take "alice " for alice, and "" for " ".
	for _, creator := range []string{"a\nb", "a\x00", "alice ", " alice", "alice\t", "\talice", " ", "\t"} {
		if _, err := c.Prepare(&publisher.Request{ID: "1", Creator: creator, Operation: "send"}); err == nil {
			t.Errorf("creator %q went into a header", creator)
		}
	}
	if _, err := c.Prepare(&publisher.Request{ID: "1", Creator: "lily rose", Operation: "send"}); err != nil {
		t.Error(err)
	}
	plain := newClient(t, http.NotFoundHandler(), func(cfg *Config) { cfg.CreatorHeader = "" })
	if _, err := plain.Prepare(&publisher.Request{ID: "1", Creator: "alice ", Operation: "send"}); err != nil {
		t.Errorf("in a path a blank stays: %v", err)
	}
}

// TestValueStaysASegment, whatever characters the operation's path has.
func TestValueStaysASegment(t *testing.T) {
	for _, path := range []string{
		"/v1/größe/{id}/end", "/v1/a b/{id}/end", "/v1/\"|^\\<>`/{id}/end", "/v1/[x]/{id}/end", "/v1/%2e%2e/{id}/end", "/v1/a+b,c;d=e/{id}/end", "/v1/\x7f\x01/{id}/end",
		"/v1/%C3%B6/{id}/end", "//evil/{id}/end",
	} {
		var got string
		c := newClient(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = r.RequestURI }), func(cfg *Config) {
			cfg.Operations = map[string]Operation{"op": {Method: "GET", Path: path}}
		})
		for _, id := range []string{"../../../admin", "a/b", "..%2f..", "größe", "x y", "%", "?a=b", "#", "plain"} {
			got = ""
			payload, err := json.Marshal(map[string]string{"id": id})
			if err != nil {
				t.Fatal(err)
			}
			call, err := c.Prepare(&publisher.Request{ID: "1", Creator: "c", Operation: "op", Payload: payload})
			if err != nil {
				t.Errorf("%s with %s: %v", path, id, err)
				continue
			}
			call(t.Context())
			segments := strings.Split(got, "/")
			if len(segments) != strings.Count(path, "/")+2 || segments[len(segments)-1] != "end" || segments[len(segments)-2] != url.PathEscape(id) {
				t.Errorf("%s with %s: called %s", path, id, got)
			}
		}
	}
	for _, path := range []string{"/%", "/%/{id}", "/%zz", "/a%2"} {
		if _, err := New(Config{BaseURL: "http://example.com", Operations: map[string]Operation{"op": {Method: "GET", Path: path}}}); err == nil || !strings.Contains(err.Error(), "%25") {
			t.Errorf("%s is taken for a path: %v", path, err)
		}
	}
}

// TestIdempotencyKeys are one to one with ids, on the wire too.
func TestIdempotencyKeys(t *testing.T) {
	ids := []string{"hook:1", "id 1", "tail", "tail ", " tail", "tail\t", "tail=20", "a\x00b", "a=00b", "a=3D00b", "a\nb", "é"}
	byKey := map[string]string{}
	for _, id := range ids {
		got, _ := seen(t, &publisher.Request{ID: id, Creator: "c", Operation: "send", Payload: []byte("{}")})
		key := got.Header.Get("Idempotency-Key")
		if other, taken := byKey[key]; taken || key == "" {
			t.Errorf("%q and %q have the key %q", id, other, key)
		}
		byKey[key] = id
	}
	if byKey["hook:1"] != "hook:1" || byKey["id 1"] != "id 1" {
		t.Errorf("plain ids are changed: %v", byKey)
	}
}

// Whatever a request holds, it reaches the configured host and its operation's
// endpoint.
func TestRequestChoosesNoTarget(t *testing.T) {
	c := newClient(t, http.NotFoundHandler(), nil)
	rapid.Check(t, func(t *rapid.T) {
		r := &publisher.Request{
			ID: "1", Operation: "send",
			Creator: rapid.OneOf(rapid.String(), rapid.SampledFrom([]string{"..", "../..", "//evil", "a?b", "a#b", "%2e%2e", "@evil", "\\"})).Draw(t, "creator"),
		}
		target, err := c.target(c.ops["send"], r)
		if err != nil {
			return
		}
		segments := strings.Split(target.EscapedPath(), "/")
		if target.Host != c.base.Host || len(segments) != 5 || segments[2] != "creators" || segments[4] != "messages" {
			t.Fatalf("creator %q leads to %s", r.Creator, target)
		}
	})
}

func TestRedirectIsAnAnswer(t *testing.T) {
	c := newClient(t, http.RedirectHandler("http://evil.invalid/", http.StatusFound), nil)
	call, err := c.Prepare(&publisher.Request{ID: "1", Creator: "c", Operation: "send"})
	if err != nil {
		t.Fatal(err)
	}
	if a := call(t.Context()); a.Status != http.StatusFound || a.Err != nil {
		t.Errorf("answer %d, %v", a.Status, a.Err)
	}
}

func TestBodyIsCapped(t *testing.T) {
	for _, size := range []int{99, 100, 101} {
		c := newClient(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write([]byte(strings.Repeat("x", size)))
		}), func(cfg *Config) { cfg.MaxBody = 100 })
		call, err := c.Prepare(&publisher.Request{ID: "1", Creator: "c", Operation: "send"})
		if err != nil {
			t.Fatal(err)
		}
		a := call(t.Context())
		if len(a.Body) != min(size, 100) || a.Truncated != (size > 100) {
			t.Errorf("of %d bytes: %d, truncated %v", size, len(a.Body), a.Truncated)
		}
	}
}

func TestHalfAnAnswerIsNone(t *testing.T) {
	c := newClient(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "1000")
		_, _ = w.Write([]byte("half"))
	}), nil)
	call, err := c.Prepare(&publisher.Request{ID: "1", Creator: "c", Operation: "send"})
	if err != nil {
		t.Fatal(err)
	}
	if a := call(t.Context()); a.Status != 0 || !errors.Is(a.Err, io.ErrUnexpectedEOF) {
		t.Errorf("answer %d, %v", a.Status, a.Err)
	}
}

func TestTimeout(t *testing.T) {
	c := newClient(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
	}), func(cfg *Config) { cfg.Timeout = 20 * time.Millisecond })
	call, err := c.Prepare(&publisher.Request{ID: "1", Creator: "c", Operation: "send"})
	if err != nil {
		t.Fatal(err)
	}
	if a := call(t.Context()); !errors.Is(a.Err, context.DeadlineExceeded) {
		t.Errorf("answer %d, %v", a.Status, a.Err)
	}
}

// A connection that breaks after a second request was sent on it makes
// http.Transport repeat that request by itself. No call may happen that no
// limiter has seen.
func TestNoHiddenRepeats(t *testing.T) {
	for _, op := range []string{"top", "send", "drop", "empty"} {
		t.Run(op, func(t *testing.T) {
			var requests atomic.Int64
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				if requests.Add(1) == 1 {
					return // leaves the connection to be used again
				}
				panic(http.ErrAbortHandler)
			})}
			go func() { _ = server.Serve(listener) }()
			defer server.Close()
			c, err := New(Config{
				BaseURL: "http://" + listener.Addr().String(), Timeout: 5 * time.Second, MaxBody: 100, InFlight: 10, Operations: testOperations,
			})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			for range 2 {
				r := &publisher.Request{ID: "1", Creator: "c", Operation: op, Payload: []byte(`{"limit":1,"post":2}`)}
				if op == "empty" {
					r.Payload = nil
				}
				call, err := c.Prepare(r)
				if err != nil {
					t.Fatal(err)
				}
				call(t.Context())
			}
			if n := requests.Load(); n != 2 {
				t.Errorf("2 calls became %d requests", n)
			}
		})
	}
}

func TestTemplate(t *testing.T) {
	for _, bad := range []string{"/a{b", "/a}b", "/a{}", "/{a{b}}", "/{a/b}"} {
		if _, err := parseTemplate(bad); err == nil {
			t.Errorf("%q is taken for a template", bad)
		}
	}
}
