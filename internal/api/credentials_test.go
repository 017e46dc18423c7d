package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
)

// tokens is an API whose access tokens are renewed, and its token endpoint, which
// takes each refresh token once.
type tokens struct {
	mu       sync.Mutex
	access   string
	refresh  string
	renewals int
	status   int // of the token endpoint; 0: it works
}

func (s *tokens) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.URL.Path != "/token" {
		if r.Header.Get("Authorization") != "Bearer "+s.access {
			w.WriteHeader(http.StatusUnauthorized)
		}
		return
	}
	s.renewals++
	switch {
	case s.status != 0:
		w.WriteHeader(s.status)
		fmt.Fprintf(w, `{"error":"x","leaked":%q}`, r.FormValue("refresh_token"))
	case r.FormValue("grant_type") != "refresh_token" || r.FormValue("refresh_token") != s.refresh:
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprint(w, `{"error":"invalid_grant"}`)
	default:
		s.access, s.refresh = fmt.Sprintf("access-%d", s.renewals), fmt.Sprintf("refresh-%d", s.renewals)
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"access_token":%q,"token_type":"bearer","refresh_token":%q,"expires_in":60}`, s.access, s.refresh)
	}
}

func newTokens(t *testing.T) (*tokens, *Client) {
	t.Helper()
	s := &tokens{access: "access-0", refresh: "refresh-0"}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	return s, newClient(t, s, func(c *Config) {
		c.AuthHeader, c.KeyPrefix, c.Key = "Authorization", "Bearer ", "stale"
		c.Refresh = &Refresh{TokenURL: server.URL + "/token", ClientID: "us", Token: "refresh-0"}
	})
}

func answerOf(t *testing.T, c *Client) classify.Answer {
	t.Helper()
	call, err := c.Prepare(&publisher.Request{ID: "r", Creator: "alice", Operation: "send"})
	if err != nil {
		t.Fatal(err)
	}
	return call(t.Context())
}

// However many calls are refused with a token, it is renewed once, and the next
// time with the new refresh token.
func TestRefreshOnce(t *testing.T) {
	s, c := newTokens(t)
	for round := 1; round <= 3; round++ {
		var refused []classify.Answer
		for range 20 {
			if a := answerOf(t, c); a.Status != http.StatusUnauthorized {
				t.Fatalf("round %d: status %d", round, a.Status)
			} else {
				refused = append(refused, a)
			}
		}
		var g sync.WaitGroup
		var failed atomic.Int64
		for _, a := range refused {
			g.Go(func() {
				if ok, err := c.Refresh(t.Context(), a); !ok || err != nil {
					failed.Add(1)
				}
			})
		}
		g.Wait()
		if failed.Load() != 0 || s.renewals != round {
			t.Errorf("round %d: %d of 20 failed, %d renewals", round, failed.Load(), s.renewals)
		}
		if a := answerOf(t, c); a.Status != http.StatusOK {
			t.Errorf("round %d: status %d with the new token", round, a.Status)
		}
		s.mu.Lock()
		s.access = "revoked"
		s.mu.Unlock()
	}
}

func TestRefreshRefused(t *testing.T) {
	s, c := newTokens(t)
	refused := answerOf(t, c)
	s.refresh = "another"
	if ok, err := c.Refresh(t.Context(), refused); ok || err != nil {
		t.Errorf("a refresh token that is refused: %v, %v", ok, err)
	}
	plain := newClient(t, s, nil)
	if ok, err := plain.Refresh(t.Context(), refused); ok || err != nil {
		t.Errorf("a key that cannot be renewed: %v, %v", ok, err)
	}
}

// endpoint is a token endpoint without a network.
type endpoint func(*http.Request) (*http.Response, error)

func (e endpoint) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	return e(r)
}

func answering(status int, contentType, body string, headers ...string) endpoint {
	return func(*http.Request) (*http.Response, error) {
		w := httptest.NewRecorder()
		w.Header().Set("Content-Type", contentType)
		for _, h := range headers {
			name, value, _ := strings.Cut(h, ": ")
			w.Header().Set(name, value)
		}
		w.WriteHeader(status)
		_, _ = w.WriteString(body)
		return w.Result(), nil
	}
}

func newTestCredentials(e endpoint, change func(*Refresh)) *credentials {
	cfg := Config{AuthHeader: "Authorization", KeyPrefix: "Bearer ", Key: "stale", Refresh: &Refresh{
		TokenURL: "https://user:hunter2@auth.example.com/token?key=hunter3", ClientID: "us", Token: "refresh-0",
	}}
	if change != nil {
		change(cfg.Refresh)
	}
	return newCredentials(&cfg, e)
}

// TestRenewalFails: trouble at the token endpoint is an error that says so and until when, tried once
// a pause for all calls, and nothing secret is told.
func TestRenewalFails(t *testing.T) {
	const js = "application/json"
	for name, e := range map[string]endpoint{
		"500":         answering(500, js, `{"error":"hunter4"}`),
		"429":         answering(429, js, ""),
		"408":         answering(408, js, ""),
		"204":         answering(204, "", ""),
		"302":         answering(302, "", "", "Location: http://evil.invalid/"),
		"garbage":     answering(200, js, "hunter4"),
		"HTML":        answering(200, "text/html", "<html>hunter4</html>"),
		"nothing":     answering(200, js, ""),
		"no token":    answering(200, js, "{}"),
		"empty token": answering(200, js, `{"access_token":""}`),
		"a number":    answering(200, js, `{"access_token":7}`),
		"line break":  answering(200, js, `{"access_token":"hunter4\r\nX: y"}`),
		"NUL":         answering(200, js, `{"accessToken":"hunter4\u0000"}`),
		"blank":       answering(200, js, `{"accessToken":"hunter4 "}`),
		"cut":         answering(200, js, `{"access_token":"hunter4`),
		"5 MB":        answering(200, js, `{"x":"`+strings.Repeat("x", 5<<20)+`"}`),
		"an error":    answering(200, js, `{"error":"server_error"}`),
		"no network": func(*http.Request) (*http.Response, error) {
			return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
		},
		"no such host": func(*http.Request) (*http.Response, error) {
			return nil, &net.DNSError{IsNotFound: true, Name: "auth.example.com"}
		},
		"no answer": func(r *http.Request) (*http.Response, error) { <-r.Context().Done(); return nil, r.Context().Err() },
		"not HTTP": func(*http.Request) (*http.Response, error) {
			return nil, errors.New(`malformed HTTP response "hunter4"`)
		},
		"101":            answering(101, "", ""),
		"half an answer": func(*http.Request) (*http.Response, error) { return brokenAnswer(), nil },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tries := 0
				c := newTestCredentials(func(r *http.Request) (*http.Response, error) { tries++; return e(r) }, nil)
				for _, pause := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
					tries = 0
					var failed *RenewError
					for range 10 {
						ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
						ok, err := c.renew(ctx, 1)
						cancel()
						if ok || !errors.As(err, &failed) {
							t.Fatalf("renewed %v, %v", ok, err)
						}
						if strings.Contains(err.Error(), "hunter") || !strings.Contains(err.Error(), "https://auth.example.com/token ") {
							t.Fatalf("the error: %v", err)
						}
					}
					if wait := time.Until(failed.RetryAt()); tries != 1 || wait > pause*time.Second || wait < pause*time.Second-200*time.Millisecond {
						t.Fatalf("%d tries; the next in %v, want %v", tries, wait, pause*time.Second)
					}
					time.Sleep(time.Until(failed.Retry)) // of the bubble
				}
				// It ends as soon as the endpoint is well.
				e = answering(200, js, `{"access_token":"new"}`)
				if ok, err := c.renew(t.Context(), 1); !ok || err != nil || c.current.Load().value[0] != "Bearer new" {
					t.Errorf("well again: %v, %v", ok, err)
				}
			})
		})
	}
}

func brokenAnswer() *http.Response {
	return &http.Response{StatusCode: 200, Header: http.Header{}, Body: io.NopCloser(io.MultiReader(strings.NewReader(`{"acc`), iotest.ErrReader(io.ErrUnexpectedEOF)))}
}

func TestTokenForms(t *testing.T) {
	for body, want := range map[string][2]string{
		`{"access_token":"a","refresh_token":"r","expires_in":60}`:           {"a", "r"},
		`{"accessToken":"a","refreshToken":"r","expiresIn":3600}`:            {"a", "r"},
		`{"accessToken":"a","expiresIn":{"odd":true}}`:                       {"a", "refresh-0"},
		`{"access_token":"a","refresh_token":"","expires_in":"soon"}`:        {"a", "refresh-0"},
		`{"access_token":"a","refresh_token":"r\r\n","token_type":"bearer"}`: {"a", "r\r\n"},
	} {
		c := newTestCredentials(answering(200, "text/plain", body), nil)
		ok, err := c.renew(t.Context(), 1)
		if got := [2]string{strings.TrimPrefix(c.current.Load().value[0], "Bearer "), c.refresh.Token}; !ok || err != nil || got != want {
			t.Errorf("%s: %v, %v: %q, want %q", body, ok, err, got, want)
		}
	}
}

// TestClientSecret goes into a header, as each server must understand, and into the body where that is refused.
func TestClientSecret(t *testing.T) {
	for _, inBody := range []bool{false, true} {
		tries := 0
		c := newTestCredentials(func(r *http.Request) (*http.Response, error) {
			tries++
			_, password, _ := r.BasicAuth()
			if inBody {
				password = r.PostFormValue("client_secret")
			}
			if password != "s3cret" {
				return answering(401, "application/json", `{"error":"invalid_client"}`)(r)
			}
			return answering(200, "application/json", `{"access_token":"a"}`)(r)
		}, func(r *Refresh) { r.ClientSecret = "s3cret" })
		for number := range uint64(3) {
			if ok, err := c.renew(t.Context(), number+1); !ok || err != nil {
				t.Fatalf("in the body %v: %v, %v", inBody, ok, err)
			}
		}
		if want := map[bool]int{false: 3, true: 4}[inBody]; tries != want {
			t.Errorf("in the body %v: %d tries, want %d", inBody, tries, want)
		}
	}
}

// TestRetryAfterOfTheTokenEndpoint is kept to, within reason.
func TestRetryAfterOfTheTokenEndpoint(t *testing.T) {
	for said, want := range map[string]time.Duration{"40": 40 * time.Second, "0": time.Second, "86400": maxStatedPause, "soon": time.Second} {
		synctest.Test(t, func(t *testing.T) {
			c := newTestCredentials(answering(503, "", "", "Retry-After: "+said), nil)
			var failed *RenewError
			if _, err := c.renew(t.Context(), 1); !errors.As(err, &failed) || time.Until(failed.Retry) != want {
				t.Errorf("Retry-After %s: %v", said, err)
			}
		})
	}
}

// TestKeyThatNoHeaderCarries is found at once.
func TestKeyThatNoHeaderCarries(t *testing.T) {
	if _, err := New(Config{BaseURL: "http://example.com", AuthHeader: "apiKey", Key: "secret\n"}); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("a key with a line break: %v", err)
	}
}
