// Package natsservertest gives tests a real broker of their own.
package natsservertest

import (
	"errors"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
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

// Broker is a broker inside the process, without a network, that can be stopped
// and started again.
type Broker struct {
	t   testing.TB
	dir string
	srv atomic.Pointer[server.Server] // nil: stopped

	mu    sync.Mutex
	conns []net.Conn
}

// NewBroker starts one. It ends with the test.
func NewBroker(t testing.TB) *Broker {
	b := &Broker{t: t, dir: t.TempDir()}
	b.Start()
	t.Cleanup(b.Stop)
	return b
}

// Start starts it again on its old folder.
func (b *Broker) Start() {
	srv, err := server.NewServer(&server.Options{DontListen: true, StoreDir: b.dir, JetStream: true, NoSigs: true, NoLog: true})
	if err != nil {
		b.t.Error(err)
		return
	}
	srv.Start()
	b.srv.Store(srv)
}

// Stop stops it. Its connections break first, and what it was asked has been answered
// by then: its shutdown would wait for what it is doing with locks held, for
// which simulated time does not pass.
func (b *Broker) Stop() {
	if srv := b.srv.Swap(nil); srv != nil {
		b.mu.Lock()
		conns := b.conns
		b.conns = nil
		b.mu.Unlock()
		for _, c := range conns {
			_ = c.Close()
		}
		time.Sleep(10 * time.Millisecond)
		srv.Shutdown()
		srv.WaitForShutdown()
	}
}

// InProcessConn makes it something that nats.InProcessServer connects to, again and
// again.
func (b *Broker) InProcessConn() (net.Conn, error) {
	srv := b.srv.Load()
	if srv == nil {
		return nil, errors.New("the broker is stopped")
	}
	c, err := srv.InProcessConn()
	if err == nil {
		b.mu.Lock()
		b.conns = append(b.conns, c)
		b.mu.Unlock()
	}
	return c, err
}

// Simulate runs a test in a bubble of simulated time, in which hours pass in
// milliseconds while everybody waits. A broker that Connect starts works in
// it; what needs a network does not. The broker's clock for the age of messages
// is the real one, a day behind, so that none gets too old, however slow the machine is.
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
		time.Sleep(time.Until(now.Add(24 * time.Hour)))
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
