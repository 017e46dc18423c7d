package classify

import (
	"bufio"
	"compress/flate"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"os"
	"slices"
	"strings"
	"syscall"
)

// Cause names the reason why there is no answer, in the words of a profile.
type Cause string

// Causes. A profile may write CauseTimeout for both timeouts.
const (
	CauseConnectTimeout Cause = "connect_timeout" // no connection in time: nothing was sent
	CauseReadTimeout    Cause = "read_timeout"    // the call was sent, the answer did not come in time
	CauseRefused        Cause = "refused"
	CauseReset          Cause = "reset"
	CauseBrokenPipe     Cause = "broken_pipe"
	CauseEOF            Cause = "eof" // the connection was closed before the answer was complete
	CauseDNS            Cause = "dns"
	CauseUnreachable    Cause = "unreachable"
	CauseTLS            Cause = "tls"
	CauseInvalid        Cause = "invalid" // the answer is not HTTP
	CauseLocal          Cause = "local"   // the worker's own trouble: file descriptors, ports, memory
	CauseOther          Cause = "other"   // not known, not even by an error

	CauseTimeout Cause = "timeout"
)

var causes = []Cause{
	CauseTimeout, CauseConnectTimeout, CauseReadTimeout, CauseRefused, CauseReset, CauseBrokenPipe, CauseEOF,
	CauseDNS, CauseUnreachable, CauseTLS, CauseInvalid, CauseLocal, CauseOther,
}

// Errors that an HTTP client wraps where it knows more than its transport does.
var (
	// ErrInvalid is the error of an answer that is not valid HTTP, or not
	// the answer to the call.
	ErrInvalid = errors.New("not a valid answer")
	// ErrLocal is the error of a call that failed because the worker itself lacks something.
	ErrLocal = errors.New("the worker itself lacks resources")
)

// matches reports whether a rule for c applies to a call that failed by cause.
func (c Cause) matches(cause Cause) bool {
	return c == cause || c == CauseTimeout && (cause == CauseConnectTimeout || cause == CauseReadTimeout)
}

// Cause names the reason why there is no answer, or no complete one; "" if there is one.
func (a Answer) Cause() Cause {
	if a.Err == nil && a.Status != 0 {
		return ""
	}
	cause := causeOf(a.Err)
	if cause == CauseReadTimeout && a.Unsent {
		return CauseConnectTimeout
	}
	return cause
}

// causeOf names the error of an HTTP call.
func causeOf(err error) Cause {
	var lookup *net.DNSError
	switch {
	case err == nil:
		return CauseOther
	case isLocal(err):
		return CauseLocal
	case errors.As(err, &lookup): // before its timeouts: it says what failed
		return CauseDNS
	case isTimeout(err):
		if neverConnected(err) {
			return CauseConnectTimeout
		}
		return CauseReadTimeout
	case isInvalid(err):
		return CauseInvalid
	case isTLS(err):
		return CauseTLS
	}
	return connectionCause(err)
}

// connectionCause names how a connection failed.
func connectionCause(err error) Cause {
	var op *net.OpError
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return CauseRefused
	case isAny(err, syscall.ECONNRESET, syscall.ECONNABORTED, net.ErrClosed), says(err, resets...):
		return CauseReset
	case isAny(err, syscall.EPIPE, io.ErrClosedPipe):
		return CauseBrokenPipe
	case isAny(err, io.EOF, io.ErrUnexpectedEOF):
		return CauseEOF
	case errors.As(err, &op): // no route to host, network is down, …
		return CauseUnreachable
	}
	return CauseOther
}

// Uncertain reports whether the API may have done what it was asked although its
// answer is a failure, or none: an answer that broke off, a gateway that gave up
// waiting, a server that failed on the way. What an API refuses (4xx, 501, 503) it
// has not done, nor what never reached it.
func (a Answer) Uncertain() bool {
	switch status := a.Status; {
	case status == 0:
		return !a.unsent()
	case isSuccess(status):
		return a.Err != nil || a.Truncated || a.Unexpected != ""
	case status == http.StatusRequestTimeout, status == statusClientClosed:
		return true
	case status == http.StatusNotImplemented, status == http.StatusServiceUnavailable:
		return false
	default:
		// RFC 9110, section 15: a status outside 100 to 599 counts as a 5xx.
		return status < 100 || status > 499
	}
}

// statusClientClosed is nginx's: the proxy's client has gone, the API may not know it.
const statusClientClosed = 499

// unsent reports whether the call provably never reached the API.
func (a Answer) unsent() bool {
	if a.Unsent {
		return true
	}
	var lookup *net.DNSError
	if a.Err == nil {
		return false
	}
	return errors.As(a.Err, &lookup) || neverConnected(a.Err) || says(a.Err, notProcessed...)
}

// neverConnected reports whether an error shows that there was no connection to send
// the call on. An alert of TLS does not: one may come after the handshake.
func neverConnected(err error) bool {
	var (
		op          *net.OpError
		record      tls.RecordHeaderError
		certificate *tls.CertificateVerificationError
		authority   x509.UnknownAuthorityError
		host        x509.HostnameError
		invalid     x509.CertificateInvalidError
	)
	return errors.As(err, &op) && (op.Op == "dial" || op.Op == "proxyconnect") || errors.Is(err, syscall.ECONNREFUSED) ||
		errors.As(err, &certificate) || errors.As(err, &authority) || errors.As(err, &host) || errors.As(err, &invalid) ||
		errors.As(err, &record) && strings.Contains(record.Msg, "first record does not look like a TLS handshake") ||
		says(err, "TLS handshake timeout", "server gave HTTP response to HTTPS client")
}

// Errors of net/http that have no exported value.
var (
	// notProcessed: HTTP/2 servers say of a stream that they have not begun with it
	// (RFC 9113, sections 6.8 and 8.7).
	notProcessed = []string{
		"Transport received Server's graceful shutdown GOAWAY", "Transport received GOAWAY from server", "REFUSED_STREAM",
		"http2: client conn not usable",
	}
	resets = append([]string{
		"http2: server sent GOAWAY", "http2: client connection lost", "http2: client connection force closed",
		"http2: client conn is closed", "stream error: stream ID", "http: server closed idle connection",
	}, notProcessed...)
	invalids = []string{
		"malformed HTTP", "malformed MIME header", "malformed chunked encoding", "malformed response", "invalid header field",
		"invalid byte in chunk length", "chunked line ends with", "chunked encoding contains too much", "too many 1xx informational responses",
		"response headers exceeded", "response header list larger", "bad Content-Length", "invalid Content-Length", "multiple Content-Length", "too many transfer encodings",
		"unsupported transfer encoding", "http chunk length too large", "http: trailer", "empty chunk length", "malformed non-numeric status",
		"missing status pseudo header", "1xx informational response with END_STREAM",
	}
	tooManyFiles = []string{syscall.EMFILE.Error(), syscall.ENFILE.Error(), syscall.ENOMEM.Error(), syscall.ENOBUFS.Error()}
)

// says knows errors by their text.
func says(err error, texts ...string) bool {
	s := err.Error()
	return slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(s, text) })
}

func isLocal(err error) bool {
	if isAny(err, ErrLocal, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS, syscall.EADDRNOTAVAIL) {
		return true
	}
	// The error of a look-up has the text of its cause only.
	var lookup *net.DNSError
	return errors.As(err, &lookup) && says(lookup, tooManyFiles...)
}

func isTimeout(err error) bool {
	var timeout interface{ Timeout() bool }
	return isAny(err, context.DeadlineExceeded, os.ErrDeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

func isInvalid(err error) bool {
	var (
		protocol textproto.ProtocolError
		corrupt  flate.CorruptInputError
	)
	return isAny(err, ErrInvalid, http.ErrLineTooLong, bufio.ErrTooLong, gzip.ErrHeader, gzip.ErrChecksum) ||
		errors.As(err, &protocol) || errors.As(err, &corrupt) || says(err, invalids...)
}

func isTLS(err error) bool {
	var (
		record      tls.RecordHeaderError
		alert       tls.AlertError
		certificate *tls.CertificateVerificationError
		authority   x509.UnknownAuthorityError
		host        x509.HostnameError
		invalid     x509.CertificateInvalidError
		op          *net.OpError
	)
	return errors.As(err, &record) || errors.As(err, &alert) || errors.As(err, &certificate) ||
		errors.As(err, &authority) || errors.As(err, &host) || errors.As(err, &invalid) ||
		says(err, "server gave HTTP response to HTTPS client") ||
		// How crypto/tls wraps the alerts of a TCP connection.
		errors.As(err, &op) && (op.Op == "remote error" || op.Op == "local error")
}

func isAny(err error, targets ...error) bool {
	return slices.ContainsFunc(targets, func(target error) bool { return errors.Is(err, target) })
}

// detail says in words what failed, as far as it is safe to print: the text of an error of
// net/http may hold a URL, and in it what a request asked for.
func (a Answer) detail() string {
	var (
		lookup      *net.DNSError
		certificate *tls.CertificateVerificationError
	)
	cause := a.Cause()
	switch {
	case cause == CauseDNS && errors.As(a.Err, &lookup):
		switch {
		case lookup.IsNotFound:
			return clip("no such host "+lookup.Name, maxID)
		case lookup.IsTimeout:
			return clip("the lookup of "+lookup.Name+" timed out", maxID)
		}
		return clip("the lookup of "+lookup.Name+" failed", maxID)
	case cause == CauseTLS && errors.As(a.Err, &certificate):
		return clip(certificate.Error(), maxID)
	case cause == CauseLocal:
		return localDetail(a.Err)
	}
	return details[cause]
}

var details = map[Cause]string{
	CauseConnectTimeout: "no connection in time",
	CauseReadTimeout:    "no complete answer in time",
	CauseRefused:        "connection refused",
	CauseReset:          "the connection was reset",
	CauseBrokenPipe:     "the connection was closed while the call was sent",
	CauseEOF:            "the connection was closed before the answer was complete",
	CauseDNS:            "no such host",
	CauseUnreachable:    "no way to the host",
	CauseTLS:            "the TLS handshake failed",
	CauseInvalid:        "the answer is not valid HTTP",
}

func localDetail(err error) string {
	switch {
	case isAny(err, syscall.EMFILE, syscall.ENFILE), says(err, tooManyFiles[:2]...):
		return "the worker has too many open files"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return "the worker has no free port"
	}
	return "the worker is short of memory"
}
