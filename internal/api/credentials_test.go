package api

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

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

func TestRefreshFails(t *testing.T) {
	s, c := newTokens(t)
	refused := answerOf(t, c)
	s.status = http.StatusServiceUnavailable
	ok, err := c.Refresh(t.Context(), refused)
	if ok || err == nil {
		t.Errorf("a token endpoint that is down: %v, %v", ok, err)
	}
	if err != nil && strings.Contains(err.Error(), "refresh-0") {
		t.Errorf("the error tells the refresh token: %v", err)
	}
	s.status = 0
	s.refresh = "another"
	if ok, err := c.Refresh(t.Context(), refused); ok || err != nil {
		t.Errorf("a refresh token that is refused: %v, %v", ok, err)
	}
	plain := newClient(t, s, nil)
	if ok, err := plain.Refresh(t.Context(), refused); ok || err != nil {
		t.Errorf("a key that cannot be renewed: %v, %v", ok, err)
	}
}
