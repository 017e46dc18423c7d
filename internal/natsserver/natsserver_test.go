package natsserver

import (
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

func begin(t *testing.T, cfg Config) *Server {
	t.Helper()
	s, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	return s
}

func publish(t *testing.T, s *Server, stream string) (messages uint64) {
	t.Helper()
	nc, err := nats.Connect(s.URL(), s.Options()...)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := nc.JetStream()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.AddStream(&nats.StreamConfig{Name: stream, Subjects: []string{stream}}); err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(stream, nil); err != nil {
		t.Fatal(err)
	}
	info, err := js.StreamInfo(stream)
	if err != nil {
		t.Fatal(err)
	}
	return info.State.Msgs
}

// Two servers on one folder would both start and both ack: the second joins.
func TestOneServerAFolder(t *testing.T) {
	dir := t.TempDir()
	first := begin(t, Config{Dir: dir, Listen: "127.0.0.1:0"})
	publish(t, first, "S")
	second := begin(t, Config{Dir: dir, Listen: "127.0.0.1:0"})
	if !first.Ours() || second.Ours() || first.URL() != second.URL() {
		t.Fatalf("first %v at %s, second %v at %s", first.Ours(), first.URL(), second.Ours(), second.URL())
	}
	if n := publish(t, second, "S"); n != 2 {
		t.Errorf("%d messages, want both", n)
	}
	second.Shutdown() // not its server
	if n := publish(t, first, "S"); n != 3 {
		t.Errorf("%d messages, want 3", n)
	}
	first.Shutdown()
	third := begin(t, Config{Dir: dir, Listen: "127.0.0.1:0"})
	if n := publish(t, third, "S"); !third.Ours() || n != 4 {
		t.Errorf("after a restart: ours %v, %d messages, want 4", third.Ours(), n)
	}
}

// What a crash leaves behind does not keep the next one from starting.
func TestAfterACrash(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{lockFile: "", urlFile: "nats://127.0.0.1:1"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s := begin(t, Config{Dir: dir, Listen: "127.0.0.1:0"})
	if !s.Ours() {
		t.Error("joined a server that is not there")
	}
}

func TestPortIsTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	s := begin(t, Config{Dir: t.TempDir(), Listen: l.Addr().String()})
	u, err := url.Parse(s.URL())
	if err != nil {
		t.Fatal(err)
	}
	if u.Host == l.Addr().String() {
		t.Errorf("listens at %s, which is taken", u.Host)
	}
	publish(t, s, "S")
}

func TestRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for complaint, cfg := range map[string]Config{
		"host:port":       {Dir: t.TempDir(), Listen: "4222"},
		"make the folder": {Dir: filepath.Join(file, "data")},
	} {
		if s, err := Start(cfg); err == nil || !strings.Contains(err.Error(), complaint) {
			t.Errorf("%+v: got %v, %v, want %q", cfg, s, err, complaint)
		}
	}
}

// The nats.conf that people start from starts a server.
func TestConfigurationFile(t *testing.T) {
	opts, err := server.ProcessConfigFile("../../nats.conf")
	if err != nil {
		t.Fatal(err)
	}
	if !opts.JetStream || opts.StoreDir != "/data" || opts.MaxPayload != 1<<20 {
		t.Errorf("JetStream %v in %q, payloads up to %d", opts.JetStream, opts.StoreDir, opts.MaxPayload)
	}
	opts.StoreDir, opts.Host, opts.Port, opts.HTTPPort = t.TempDir(), "127.0.0.1", server.RANDOM_PORT, 0
	opts.NoSigs, opts.NoLog = true, true
	srv, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() { srv.Shutdown(); srv.WaitForShutdown() })
	if !srv.ReadyForConnections(startTimeout) || !srv.JetStreamEnabled() {
		t.Error("the server does not start")
	}
}
