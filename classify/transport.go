package classify

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
)

// transport is why there is no answer, in the words of a profile.
type transport string

const (
	noAnswer    transport = "other" // nobody knows why, not even an error
	timedOut    transport = "timeout"
	refused     transport = "refused"
	reset       transport = "reset"
	brokenPipe  transport = "broken_pipe"
	endOfFile   transport = "eof"
	dns         transport = "dns"
	unreachable transport = "unreachable"
	tlsFailed   transport = "tls"
)

var transports = []transport{timedOut, refused, reset, brokenPipe, endOfFile, dns, unreachable, tlsFailed, noAnswer}

// transportOf names the error of an HTTP call that got no answer.
func transportOf(err error) transport {
	var (
		timeout interface{ Timeout() bool }
		lookup  *net.DNSError
		op      *net.OpError
	)
	switch {
	case err == nil:
		return noAnswer
	case errors.As(err, &lookup): // before its timeouts: it says what failed
		return dns
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded),
		errors.As(err, &timeout) && timeout.Timeout():
		return timedOut
	case isTLS(err):
		return tlsFailed
	case errors.Is(err, syscall.ECONNREFUSED):
		return refused
	case isAny(err, syscall.ECONNRESET, syscall.ECONNABORTED, net.ErrClosed), saysReset(err):
		return reset
	case isAny(err, syscall.EPIPE, io.ErrClosedPipe):
		return brokenPipe
	case isAny(err, io.EOF, io.ErrUnexpectedEOF):
		return endOfFile
	case errors.As(err, &op): // no route to host, network is down, …
		return unreachable
	}
	return noAnswer
}

// Uncertain reports whether the API may have done what it was asked although there is
// no answer of its own: the connection broke after it was made, or a gateway gave
// up waiting.
func (a Answer) Uncertain() bool {
	switch a.Status {
	case 0:
	case http.StatusBadGateway, http.StatusGatewayTimeout:
		return true
	default:
		return false
	}
	var op *net.OpError
	switch transportOf(a.Err) {
	case dns, refused, tlsFailed, unreachable:
		return false
	}
	return !errors.As(a.Err, &op) || op.Op != "dial"
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
		// How crypto/tls wraps the alerts of a TCP connection.
		errors.As(err, &op) && (op.Op == "remote error" || op.Op == "local error")
}

// saysReset knows the errors of net/http that have no exported value.
func saysReset(err error) bool {
	s := err.Error()
	return strings.Contains(s, "http2: server sent GOAWAY") || strings.Contains(s, "http2: client connection lost") ||
		strings.Contains(s, "http2: client connection force closed") || strings.Contains(s, "stream error: stream ID") ||
		strings.Contains(s, "http: server closed idle connection")
}

func isAny(err error, targets ...error) bool {
	return slices.ContainsFunc(targets, func(target error) bool { return errors.Is(err, target) })
}
