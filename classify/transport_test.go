package classify

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"syscall"
	"testing"
	"time"
)

func TestTransportErrors(t *testing.T) {
	dial := func(err error) error {
		return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", err)}
	}
	for _, c := range []struct {
		err   error
		want  Cause
		class Class
		ofapi Class // what ofapi says, if not class
		final bool  // at apifreaks
	}{
		{err: nil, want: CauseOther, class: Unknown, final: true},
		{err: errors.New("odd"), want: CauseOther, class: Unknown, final: true},
		{err: context.Canceled, want: CauseOther, class: Unknown, final: true},
		{err: context.DeadlineExceeded, want: CauseReadTimeout, class: Timeout},
		{err: dial(syscall.ETIMEDOUT), want: CauseConnectTimeout, class: Timeout},
		{err: os.ErrDeadlineExceeded, want: CauseReadTimeout, class: Timeout},
		{err: dial(syscall.ECONNREFUSED), want: CauseRefused, class: NetworkError},
		{err: dial(syscall.ECONNRESET), want: CauseReset, class: NetworkError},
		{err: net.ErrClosed, want: CauseReset, class: NetworkError},
		{err: errors.New(`http2: server sent GOAWAY and closed the connection; LastStreamID=1, ErrCode=NO_ERROR, debug=""`), want: CauseReset, class: NetworkError},
		{err: errors.New("http: server closed idle connection"), want: CauseReset, class: NetworkError},
		{err: dial(syscall.EPIPE), want: CauseBrokenPipe, class: NetworkError},
		{err: io.EOF, want: CauseEOF, class: NetworkError},
		{err: io.ErrUnexpectedEOF, want: CauseEOF, class: NetworkError},
		{err: &net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "api.invalid", IsNotFound: true}}, want: CauseDNS, class: NetworkError},
		{err: &net.DNSError{Err: "timeout", IsTimeout: true}, want: CauseDNS, class: NetworkError},
		{err: dial(syscall.EHOSTUNREACH), want: CauseUnreachable, class: NetworkError},
		{err: tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake"}, want: CauseTLS, class: NetworkError, ofapi: Unknown},
		{err: &tls.CertificateVerificationError{Err: errors.New("expired")}, want: CauseTLS, class: NetworkError, ofapi: Unknown},
	} {
		err := c.err
		if err != nil {
			err = fmt.Errorf("call: %w", err)
		}
		if got := causeOf(err); got != c.want {
			t.Errorf("%v: %s, want %s", c.err, got, c.want)
		}
		for profile, class := range map[string]Class{"generic": c.class, "ofapi": c.class, "apifreaks": c.class} {
			if profile == "ofapi" && c.ofapi != "" {
				class = c.ofapi
			}
			f, failed := profileOf(t, profile).Classify(Answer{Err: err}, noon)
			retry := profile != "apifreaks" || !c.final
			if !failed || f.Class != class || f.Scope != ScopeRequest || f.Retryable != retry || f.RetryAfterKnown {
				t.Errorf("%s: %v: %s", profile, c.err, summary(f, failed))
			}
		}
	}
}

// TestBrokenAnswer: half a success is none; a failure's status counts.
func TestBrokenAnswer(t *testing.T) {
	p := profileOf(t, "fanfare")
	for status, want := range map[int]string{
		200: "NETWORK_ERROR request retry",
		429: "RATE_LIMIT creator?account retry after 1m0s",
		503: "SERVER_ERROR provider retry",
	} {
		f, failed := p.Classify(Answer{Status: status, Body: []byte(`{"status":"DENIED"}`)[:9], Err: io.ErrUnexpectedEOF}, noon)
		if got := summary(f, failed); got != want {
			t.Errorf("%d: %s, want %s", status, got, want)
		}
	}
}

// TestTruncated: a success that is larger than its cap cannot be a result, and
// the rest of a failure's body is not guessed.
func TestTruncated(t *testing.T) {
	for status, want := range map[int]string{
		200: "INVALID_RESPONSE request final",
		403: "FORBIDDEN request final",
	} {
		for _, profile := range Builtins() {
			f, failed := profileOf(t, profile).Classify(Answer{Status: status, Body: []byte(`{"type":"RULES_OUTDATED","status":"DENIED"}`), Truncated: true}, noon)
			if got := summary(f, failed); got != want {
				t.Errorf("%s: %d: %s, want %s", profile, status, got, want)
			}
		}
	}
}

// TestRealServers asks servers that misbehave.
func TestRealServers(t *testing.T) {
	var stuck = make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		switch r.URL.Path {
		case "/reset":
			if err := conn.(*net.TCPConn).SetLinger(0); err != nil {
				t.Error(err)
			}
		case "/stuck":
			<-stuck
		}
	}))
	defer server.Close()
	defer close(stuck)
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer secure.Close()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := "http://" + listener.Addr().String()
	listener.Close()

	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for url, want := range map[string]Cause{
		server.URL + "/close": CauseEOF,
		server.URL + "/reset": CauseReset,
		server.URL + "/stuck": CauseReadTimeout,
		secure.URL:            CauseTLS,
		nobody:                CauseRefused,
	} {
		timeout := time.Minute
		if want == CauseReadTimeout {
			timeout = 50 * time.Millisecond
		}
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err == nil {
			resp.Body.Close()
		}
		if got := causeOf(err); got != want {
			t.Errorf("%s: %v: %s, want %s", url, err, got, want)
		}
		cancel()
	}
}
