package classify

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
)

// TestSessionConcernsItsCreator: a 401 that names the creator's session or connection, by its code or by what is to
// be done, says nothing about the key, whatever its spelling and place, in every profile.
func TestSessionConcernsItsCreator(t *testing.T) {
	var bodies []string
	for _, code := range []string{
		"SESSION_EXPIRED", "session_expired", "Session Expired", "session-expired", "sessionExpired", "SESSION_NOT_PROVIDED", "SESSION_INVALID", "INVALID_SESSION",
		"SESSION_REVOKED", "SESSION_NOT_FOUND", "NO_SESSION", "session.expired", "CONNECTION_EXPIRED", "CONNECTION_REVOKED", "connection_not_found",
		"Connection Disconnected", "ACCOUNT_DISCONNECTED", "RECONNECT_REQUIRED", "relink_required", "RELINK", "REAUTH_REQUIRED", "REAUTHENTICATE", "re-authenticate",
		"REAUTHORIZATION_REQUIRED", "LOGIN_REQUIRED", "login_again", "USER_LOGGED_OUT", "NOT_LOGGED_IN", "SIGN_IN_REQUIRED", "signed_out",
	} {
		bodies = append(bodies,
			`{"code":"`+code+`"}`, `{"type":"`+code+`","error":"words for people"}`, `{"error":{"code":"`+code+`","message":"words"}}`,
			`{"errors":[{"code":"`+code+`"}]}`, `{"Error_Code":"`+code+`"}`, `{"error":"`+code+`"}`)
	}
	for _, action := range []string{
		"relink_connection", "Relink Connection", "relink", "reconnect", "reconnect_account", "reauthenticate", "re_authenticate", "reauthorize", "refresh_session",
		"verify_session", "login", "log_in", "log in again", "sign_in", "connect_account",
	} {
		bodies = append(bodies,
			`{"error":"Unauthorized","type":"UNAUTHORIZED","actionRequired":"`+action+`"}`, `{"code":"AUTH_INVALID_KEY","action_required":"`+action+`"}`,
			`{"error":{"action":"`+action+`"}}`)
	}
	for _, profile := range Builtins() {
		for _, body := range bodies {
			f, failed := profileOf(t, profile).Classify(Answer{Status: 401, Body: []byte(body)}, noon)
			if !failed || f.Class != SessionExpired || f.Scope != ScopeCreator || f.Suspect != "" || f.Retryable || f.Action == "" {
				t.Errorf("%s: %s: %s by %s", profile, body, summary(f, failed), f.Rule)
			}
		}
	}
}

// TestUnknown401IsItsCreators: until several creators have met it, as the key may be fine.
func TestUnknown401IsItsCreators(t *testing.T) {
	for _, profile := range Builtins() {
		for _, body := range []string{
			"<html><title>401 Authorization Required</title></html>", `{"code":"SOMETHING_NEW"}`, `{"type":"SOMETHING_NEW","code":"SOMETHING_NEW"}`, "Unauthorized",
		} {
			f, failed := profileOf(t, profile).Classify(Answer{Status: 401, Body: []byte(body)}, noon)
			suspected := f.Scope == ScopeCreator && f.Suspect == ScopeAccount
			// APIFreaks and OFAPI have no codes: what they call one is some text.
			known := profile == "apifreaks" && strings.HasPrefix(body, "{") || profile == "fanfare" && strings.Contains(body, `"type"`)
			if !failed || f.Class != Unauthorized || f.Retryable || !suspected && !known {
				t.Errorf("%s: %s: %s by %s", profile, body, summary(f, failed), f.Rule)
			}
		}
	}
	for profile, body := range map[string]string{
		"ofauth": `{"type":"UNAUTHORIZED"}`, "ofauth-legacy": `{"code":"auth-key-expired"}`, "fanfare": `{"error":"secret key required"}`, "apifreaks": `{"message":"Invalid API key"}`,
	} {
		f, failed := profileOf(t, profile).Classify(Answer{Status: 401, Body: []byte(body)}, noon)
		if !failed || f.Class != Unauthorized || f.Scope != ScopeAccount || f.Suspect != "" {
			t.Errorf("%s: %s: %s by %s", profile, body, summary(f, failed), f.Rule)
		}
	}
}

// TestCodeSpellings: a code that a rule names is recognised in other spellings and places.
func TestCodeSpellings(t *testing.T) {
	p, err := Parse("codes.yaml", []byte("body: {code: [error.code, kind]}\nrules: [{code: [88, TOO_FAST], class: RATE_LIMIT, scope: creator}, {code: 'no-*', class: GONE}, {status: any, code: HALTED, class: DENIED}]"))
	if err != nil {
		t.Fatal(err)
	}
	for body, want := range map[string]Class{
		`{"error":{"code":"TOO_FAST"}}`: RateLimit, `{"error":{"code":"too fast"}}`: RateLimit, `{"error":{"code":"Too-Fast"}}`: RateLimit, `{"error":{"code":"tooFast"}}`: RateLimit,
		`{"error":{"code":88}}`: RateLimit, `{"error":{"code":"88"}}`: RateLimit, `{"error":{"Code":88}}`: RateLimit, `{"kind":"too_fast"}`: RateLimit, `{"kind":88}`: RateLimit,
		`{"code":"TOO_FAST"}`: RateLimit, `{"data":{"error":{"code":"TOO_FAST"}}}`: RateLimit, `{"errors":[{"message":"x"},{"code":"TOO_FAST"}]}`: RateLimit,
		`{"error":{"code":{"name":"TOO_FAST"}}}`: RateLimit, `{"error":{"code":"NO_LUCK"}}`: Gone, `{"error":{"code":"nothing"}}`: Gone,
		`{"error":{"code":"TOO_FASTER"}}`: Validation, `{"message":"TOO_FAST"}`: Validation, `{"field":{"value":88}}`: Validation, `{"error":{"code":""}}`: Validation,
		`{"error":"TOO_FAST"}`: RateLimit, `{"a":{"b":{"c":{"code":"TOO_FAST"}}}}`: Validation,
	} {
		f, failed := p.Classify(Answer{Status: 400, Body: []byte(body)}, noon)
		if !failed || f.Class != want {
			t.Errorf("%s: %s, want %s", body, summary(f, failed), want)
		}
	}
	// Of a success only the profile's own places count.
	for body, want := range map[string]bool{`{"error":{"code":"halted"}}`: true, `{"error":{"code":"Hal ted"}}`: true, `{"code":"HALTED"}`: false, `{"text":"halted"}`: false} {
		if f, failed := p.Classify(Answer{Status: 200, Body: []byte(body)}, noon); failed != want {
			t.Errorf("200 %s: %s", body, summary(f, failed))
		}
	}
}

// TestUncertain: what may have been done must not be done again without being asked.
func TestUncertain(t *testing.T) {
	certain := []int{100, 101, 204, 300, 302, 400, 401, 403, 404, 409, 425, 429, 498, 501, 503}
	uncertain := []int{408, 499, 500, 502, 504, 505, 507, 520, 521, 522, 523, 524, 525, 526, 527, 530, 599, 600, 99, -1}
	for i, status := range append(certain, uncertain...) {
		want := i >= len(certain)
		if got := (Answer{Status: status}).Uncertain(); got != want {
			t.Errorf("%d: uncertain %v", status, got)
		}
		for _, profile := range Builtins() {
			f, failed := profileOf(t, profile).Classify(Answer{Status: status}, noon)
			if failed && f.Done != map[bool]Done{true: DoneMaybe, false: DoneNo}[want] {
				t.Errorf("%s: %d: done %q", profile, status, f.Done)
			}
		}
	}
	dial := func(err error) error {
		return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", err)}
	}
	for _, c := range []struct {
		a    Answer
		want bool
	}{
		{Answer{}, true},
		{Answer{Err: errors.New("odd")}, true},
		{Answer{Err: errors.New("odd"), Unsent: true}, false},
		{Answer{Err: io.ErrUnexpectedEOF}, true},
		{Answer{Status: 200, Err: io.ErrUnexpectedEOF}, true},
		{Answer{Status: 201, Truncated: true}, true},
		{Answer{Status: 200, Unexpected: "it is HTML"}, true},
		{Answer{Status: 400, Err: io.ErrUnexpectedEOF}, false},
		{Answer{Err: context.DeadlineExceeded}, true},
		{Answer{Err: context.DeadlineExceeded, Unsent: true}, false},
		{Answer{Err: syscall.ECONNRESET}, true},
		{Answer{Err: syscall.EPIPE}, true},
		{Answer{Err: syscall.ECONNREFUSED}, false},
		{Answer{Err: dial(syscall.ETIMEDOUT)}, false},
		{Answer{Err: dial(syscall.EHOSTUNREACH)}, false},
		{Answer{Err: dial(syscall.EMFILE)}, false},
		{Answer{Err: dial(syscall.EADDRNOTAVAIL)}, false},
		{Answer{Err: &net.DNSError{IsTimeout: true}}, false},
		{Answer{Err: errors.New("net/http: TLS handshake timeout")}, false},
		{Answer{Err: &net.OpError{Op: "remote error", Err: errors.New("tls: internal error")}}, true}, // may come after the handshake
		{Answer{Err: errors.New("http2: Transport: cannot retry err [http2: Transport received Server's graceful shutdown GOAWAY] after Request.Body was written")}, false},
		{Answer{Err: errors.New("stream error: stream ID 3; REFUSED_STREAM; received from peer")}, false},
		{Answer{Err: errors.New("stream error: stream ID 3; INTERNAL_ERROR; received from peer")}, true},
		{Answer{Err: errors.New(`http2: server sent GOAWAY and closed the connection; LastStreamID=1, ErrCode=NO_ERROR, debug=""`)}, true},
	} {
		if got := c.a.Uncertain(); got != c.want {
			t.Errorf("%d, %v, unsent %v: uncertain %v", c.a.Status, c.a.Err, c.a.Unsent, got)
		}
	}
}

// TestDoneOfARule: a profile knows better than the status.
func TestDoneOfARule(t *testing.T) {
	p, err := Parse("done.yaml", []byte("body: {code: code}\nrules: [{code: NOT_STARTED, class: SERVER_ERROR, done: no}, {status: 503, class: SERVER_ERROR, done: maybe}, {status: any, body: {ok: false}, class: DENIED}]"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		status int
		body   string
		want   Done
	}{
		{500, `{"code":"NOT_STARTED"}`, DoneNo}, {500, `{}`, DoneMaybe}, {503, ``, DoneMaybe}, {200, `{"ok":false}`, DoneNo}, {200, `{"ok":true}`, ""},
	} {
		if f, _ := p.Classify(Answer{Status: c.status, Body: []byte(c.body)}, noon); f.Done != c.want {
			t.Errorf("%d %s: done %q, want %q", c.status, c.body, f.Done, c.want)
		}
	}
	// DENIED is the API's own word, with a 502 too.
	if f, _ := profileOf(t, "fanfare").Classify(Answer{Status: 502, Body: []byte(`{"status":"denied"}`)}, noon); f.Class != Denied || f.Done != DoneNo {
		t.Errorf("a denial: %s, done %q", f.Class, f.Done)
	}
}

// TestAlone: a 500 is no evidence about the provider.
func TestAlone(t *testing.T) {
	p := profileOf(t, "generic")
	for status, alone := range map[int]bool{
		400: true, 401: true, 408: true, 429: true, 500: true, 501: true, 505: true, 507: true, 600: true,
		502: false, 503: false, 504: false, 520: false, 522: false, 524: false, 530: false,
	} {
		if f, _ := p.Classify(Answer{Status: status}, noon); f.Alone != alone {
			t.Errorf("%d: alone %v", status, f.Alone)
		}
	}
	for _, err := range []error{os.ErrDeadlineExceeded, syscall.ECONNREFUSED, io.EOF, &net.DNSError{}} {
		if f, _ := p.Classify(Answer{Err: err}, noon); f.Alone {
			t.Errorf("%v: alone", err)
		}
	}
	own, err := Parse("own.yaml", []byte("rules: [{status: 500, class: SERVER_ERROR, scope: provider}]"))
	if err != nil {
		t.Fatal(err)
	}
	if f, _ := own.Classify(Answer{Status: 500}, noon); f.Alone {
		t.Error("a rule says that a 500 is the provider's: alone")
	}
}

// TestLocal: a worker without file descriptors blames itself.
func TestLocal(t *testing.T) {
	for _, profile := range Builtins() {
		for _, err := range []error{
			syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EADDRNOTAVAIL, fmt.Errorf("read the answer: %w", ErrLocal),
			&net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("socket", syscall.EMFILE)},
			&net.DNSError{Err: "dial udp 10.0.0.2:53: socket: too many open files", Name: "api.example.com", IsTemporary: true},
		} {
			f, failed := profileOf(t, profile).Classify(Answer{Err: err}, noon)
			if !failed || !f.Local || !f.Alone || !f.Retryable || f.Cause != CauseLocal || f.Scope != ScopeRequest || f.Detail == "" {
				t.Errorf("%s: %v: %+v", profile, err, f)
			}
		}
	}
}

// TestDescribe: a failure without a code says why, and nothing that may be secret.
func TestDescribe(t *testing.T) {
	p := profileOf(t, "generic")
	for _, c := range []struct {
		a    Answer
		want string
	}{
		{Answer{Status: 500}, "SERVER_ERROR"},
		{Answer{Status: 500, Body: []byte(`{"code":"E1"}`)}, "SERVER_ERROR (E1)"},
		{Answer{Err: &net.DNSError{Err: "no such host", Name: "api.example.com", IsNotFound: true}}, "NETWORK_ERROR (dns: no such host api.example.com)"},
		{Answer{Err: fmt.Errorf("Get https://api/?key=secret: %w", syscall.ECONNREFUSED)}, "NETWORK_ERROR (refused: connection refused)"},
		{Answer{Err: context.DeadlineExceeded, Unsent: true}, "TIMEOUT (connect_timeout: no connection in time)"},
		{Answer{Err: context.DeadlineExceeded}, "TIMEOUT (read_timeout: no complete answer in time)"},
		{Answer{Err: syscall.EMFILE}, "NETWORK_ERROR (local: the worker has too many open files)"},
		{Answer{Err: fmt.Errorf("malformed HTTP response \"secret\"")}, "INVALID_RESPONSE (invalid: the answer is not valid HTTP)"},
		{Answer{Status: 200, Unexpected: "it is empty"}, "INVALID_RESPONSE (it is empty)"},
		{Answer{}, "UNKNOWN"},
	} {
		f, _ := p.Classify(c.a, noon)
		if got := f.Describe(); got != c.want {
			t.Errorf("%d, %v: %q, want %q", c.a.Status, c.a.Err, got, c.want)
		}
	}
}

// TestDoneIsSafe, of every answer.
func TestDoneIsSafe(t *testing.T) {
	Answer{}.Done()
	released := 0
	a := Answer{Status: http.StatusOK, Release: func() { released++ }}
	a.Done()
	if released != 1 {
		t.Errorf("released %d times", released)
	}
}
