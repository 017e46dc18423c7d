package classify

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"syscall"
	"testing"
	"time"
)

// TestExamples runs worked examples of real answers.
func TestExamples(t *testing.T) {
	data, err := os.ReadFile("testdata/examples.json")
	if err != nil {
		t.Fatal(err)
	}
	var examples []struct {
		Name, Profile, Body string
		Status              int
		Headers             map[string]string
		NetworkError        string `json:"network_error"`
		Now                 time.Time
		Expect              struct {
			Class, Scope        string
			Retryable           bool
			RetryAfterMs        *int64 `json:"retry_after_ms"`
			Code, Action, Field *string
			RequestID           *string `json:"request_id"`
		}
	}
	if err := json.Unmarshal(data, &examples); err != nil {
		t.Fatal(err)
	}
	if len(examples) != 79 {
		t.Errorf("%d examples, want 79", len(examples))
	}
	transport := map[string]error{
		"":             nil,
		"conn_refused": syscall.ECONNREFUSED,
		"conn_reset":   syscall.ECONNRESET,
		"timeout":      os.ErrDeadlineExceeded,
	}
	text := func(s *string) string {
		if s == nil {
			return ""
		}
		return *s
	}
	for _, e := range examples {
		t.Run(e.Name, func(t *testing.T) {
			p, ok := Builtin(e.Profile)
			if !ok {
				t.Fatalf("no profile %q", e.Profile)
			}
			cause, ok := transport[e.NetworkError]
			if !ok {
				t.Fatalf("unknown transport error %q", e.NetworkError)
			}
			if cause != nil {
				cause = fmt.Errorf("call: %w", errors.Join(cause))
			}
			h := http.Header{}
			for name, value := range e.Headers {
				h.Add(name, value)
			}
			f, failed := p.Classify(Answer{Status: e.Status, Header: h, Body: []byte(e.Body), Err: cause}, e.Now)
			if !failed {
				t.Fatal("a success")
			}
			want := fmt.Sprint(e.Expect.Class, e.Expect.Scope, e.Expect.Retryable, e.Expect.RetryAfterMs != nil,
				text(e.Expect.Code), text(e.Expect.Action), text(e.Expect.Field), text(e.Expect.RequestID))
			got := fmt.Sprint(f.Class, f.Scope, f.Retryable, f.RetryAfterKnown, f.Code, f.Action, f.Field, f.RequestID)
			if got != want {
				t.Errorf("got  %s\nwant %s\nby %s", got, want, f.Rule)
			}
			if ms := e.Expect.RetryAfterMs; ms != nil && f.RetryAfter != time.Duration(*ms)*time.Millisecond {
				t.Errorf("retry after %v, want %d ms", f.RetryAfter, *ms)
			}
		})
	}
}
