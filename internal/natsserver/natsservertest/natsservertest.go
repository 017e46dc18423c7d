// Package natsservertest gives tests a real broker of their own.
package natsservertest

import (
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats-server/v2/server/ats"
	"github.com/nats-io/nats.go"
)

// Connect starts a broker inside the process, without a network, and connects to
// it. Both end with the test.
func Connect(t testing.TB) *nats.Conn {
	t.Helper()
	return ConnectWithStore(t, 0)
}

// ConnectWithStore is Connect for a broker whose disk has so many bytes; 0: what
// there is.
func ConnectWithStore(t testing.TB, disk int64) *nats.Conn {
	t.Helper()
	srv := run(t, &server.Options{DontListen: true, StoreDir: t.TempDir(), JetStreamMaxStore: disk})
	nc, err := nats.Connect("", nats.InProcessServer(srv), nats.ReconnectBufSize(-1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// Simulate runs a test in a bubble of simulated time, in which hours pass in
// milliseconds while every goroutine waits. A broker that Connect starts works in
// it; what needs a network does not. The broker's clock for the age of messages
// is the real one, a day behind, so that none gets too old, however slow the machine is.
func Simulate(t *testing.T, test func(*testing.T)) {
	t.Helper()
	ats.Register() // the broker's clock must not belong to the bubble
	defer ats.Unregister()
	emptyPools()
	defer emptyPools() // the next test may run without a bubble
	now := time.Now()
	synctest.Test(t, func(t *testing.T) {
		// Bubbles begin in the year 2000, when by the broker's clock everything
		// is too old.
		time.Sleep(time.Until(now.Add(24 * time.Hour)))
		test(t)
	})
}

// emptyPools drops what the broker and its client keep in pools, buffers and timers:
// nothing that was made in a bubble may be used outside of it, nor the other way
// round. The first collection only moves a pool's content aside.
func emptyPools() {
	runtime.GC()
	runtime.GC()
}

// URL starts a broker that listens on loopback, for programs that connect by
// themselves.
func URL(t testing.TB) string {
	t.Helper()
	return run(t, &server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, StoreDir: t.TempDir()}).ClientURL()
}

func run(t testing.TB, opts *server.Options) *server.Server {
	t.Helper()
	opts.JetStream, opts.NoSigs, opts.NoLog = true, true, true
	srv, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() {
		srv.Shutdown()
		srv.WaitForShutdown()
	})
	if !opts.DontListen && !srv.ReadyForConnections(10*time.Second) {
		t.Fatal("the broker does not start")
	}
	return srv
}
