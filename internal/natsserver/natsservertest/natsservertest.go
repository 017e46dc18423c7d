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
	srv := run(t, &server.Options{DontListen: true, StoreDir: t.TempDir()})
	nc, err := nats.Connect("", nats.InProcessServer(srv))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// Simulate runs a test in a bubble of simulated time, in which hours pass in
// milliseconds while everybody waits. A broker that Connect starts works in
// it; what needs a network does not. The broker's clock for the age of messages
// stands still meanwhile, so that none gets too old.
func Simulate(t *testing.T, test func(*testing.T)) {
	t.Helper()
	ats.Register() // the broker's clock must not belong to the bubble
	defer ats.Unregister()
	// Buffers that the broker pools must not travel between bubbles.
	runtime.GC()
	runtime.GC()
	now := time.Now()
	synctest.Test(t, func(t *testing.T) {
		// Bubbles begin in the year 2000, when by the broker's clock everything
		// is too old.
		time.Sleep(time.Until(now))
		test(t)
	})
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
