package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/headgate-io/headgate/consumer"
	"github.com/headgate-io/headgate/internal/telemetry"
)

// maxAdminPorts are tried after the configured one: several workers may share a
// machine.
const maxAdminPorts = 100

// serveAdmin serves a worker's metrics and probes until ctx ends. An empty
// address serves nothing.
func serveAdmin(ctx context.Context, address string, w *consumer.Worker, m *telemetry.Metrics) (served string, err error) {
	if address == "" {
		return "", nil
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", exitError{exitConfig, fmt.Errorf("admin: %q must be host:port, such as 127.0.0.1:9464", address)}
	}
	first, err := strconv.Atoi(port)
	if err != nil {
		return "", exitError{exitConfig, fmt.Errorf("admin: %q must be host:port, such as 127.0.0.1:9464", address)}
	}
	var l net.Listener
	for p := first; p <= first+maxAdminPorts && l == nil; p++ {
		var failed error
		if l, failed = net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(p))); failed != nil && err == nil {
			err = failed
		}
	}
	if l == nil {
		return "", fmt.Errorf("serve metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.Registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /livez", func(rw http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(rw, "ok\n") })
	mux.HandleFunc("GET /readyz", func(rw http.ResponseWriter, _ *http.Request) {
		if err := w.Ready(); err != nil {
			http.Error(rw, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(rw, "ok\n")
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	context.AfterFunc(ctx, func() { _ = server.Close() })
	go func() {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			_ = l.Close()
		}
	}()
	return l.Addr().String(), nil
}
