// Package natsserver runs a NATS server inside the program, so that trying
// Headgate, and small installations, need no other process. It is the only package that
// imports nats-server.
package natsserver

import (
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/gofrs/flock"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// Config of an embedded server.
type Config struct {
	// Dir holds the server's files. Two servers on one folder would both start
	// and both ack, so it is locked.
	Dir string
	// Listen is the address for other programs, e.g. the nats CLI. If its port
	// is taken, the next free one is used. Port 0: any.
	Listen string
	// SyncAlways writes every message to the disk before it is confirmed.
	// Without it a process crash loses nothing, and a power cut up to two
	// minutes.
	SyncAlways bool
	// Monitor serves the server's figures (/varz, /jsz) on a free port of
	// loopback.
	Monitor bool
}

const (
	lockFile = "headgate.lock"
	urlFile  = "headgate.url"

	startTimeout = 20 * time.Second
	maxPorts     = 100 // tried after the one that was asked for
)

// Server is a running server, ours or one that another process runs on the
// same folder.
type Server struct {
	url  string
	dir  string
	srv  *server.Server // nil: not ours
	lock *flock.Flock
}

// Start starts a server on a folder, or finds the one that runs there already.
func Start(cfg Config) (*Server, error) {
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the folder of the embedded server: %w", err)
	}
	lock := flock.New(filepath.Join(cfg.Dir, lockFile))
	for deadline := time.Now().Add(startTimeout); ; {
		locked, err := lock.TryLock()
		if err != nil {
			return nil, fmt.Errorf("lock the folder %s: %w", cfg.Dir, err)
		}
		if locked {
			s, err := start(cfg, lock)
			if err != nil {
				_ = lock.Unlock()
			}
			return s, err
		}
		// Another process has it, and tells where once it accepts connections.
		if s, err := find(cfg.Dir); err == nil {
			return s, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("the folder %s is in use, but no server answers there: end the other process, or name another folder with data_dir", cfg.Dir)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func start(cfg Config, lock *flock.Flock) (*Server, error) {
	_ = os.Remove(filepath.Join(cfg.Dir, urlFile)) // of one that crashed
	host, port, err := splitListen(cfg.Listen)
	if err != nil {
		return nil, err
	}
	if port, err = freePort(host, port); err != nil {
		return nil, err
	}
	opts := &server.Options{
		ServerName: "headgate", Host: host, Port: port,
		JetStream: true, StoreDir: cfg.Dir, SyncAlways: cfg.SyncAlways,
		NoSigs: true, NoLog: true, DisableJetStreamBanner: true,
	}
	if cfg.Monitor {
		opts.HTTPHost, opts.HTTPPort = "127.0.0.1", server.RANDOM_PORT
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		return nil, fmt.Errorf("embedded server: %w", err)
	}
	srv.Start()
	s := &Server{dir: cfg.Dir, srv: srv, lock: lock}
	if !srv.ReadyForConnections(startTimeout) {
		s.shutdown()
		return nil, fmt.Errorf("the embedded server in %s is not ready after %v", cfg.Dir, startTimeout)
	}
	if !srv.JetStreamEnabled() {
		s.shutdown()
		return nil, fmt.Errorf("the embedded server cannot keep its files in %s: make the folder writable", cfg.Dir)
	}
	s.url = srv.ClientURL()
	if err := s.announce(); err != nil {
		s.shutdown()
		return nil, err
	}
	return s, nil
}

// announce tells other processes on the folder where the server is. The file
// appears whole or not at all.
func (s *Server) announce() error {
	path := filepath.Join(s.dir, urlFile)
	if err := os.WriteFile(path+".new", []byte(s.url), 0o644); err != nil {
		return fmt.Errorf("announce the embedded server: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("announce the embedded server: %w", err)
	}
	return nil
}

func find(dir string) (*Server, error) {
	b, err := os.ReadFile(filepath.Join(dir, urlFile))
	if err != nil {
		return nil, err
	}
	u, err := url.Parse(string(b))
	if err != nil {
		return nil, err
	}
	conn, err := net.DialTimeout("tcp", u.Host, time.Second)
	if err != nil {
		return nil, err
	}
	_ = conn.Close()
	return &Server{url: u.String(), dir: dir}, nil
}

// URL is where the server accepts connections.
func (s *Server) URL() string { return s.url }

// MonitorURL is where its figures are, "" unless it is ours and has them.
func (s *Server) MonitorURL() string {
	if s.srv == nil || s.srv.MonitorAddr() == nil {
		return ""
	}
	return "http://" + s.srv.MonitorAddr().String()
}

// Ours reports whether this process runs the server.
func (s *Server) Ours() bool { return s.srv != nil }

// Options are for nats.Connect: a connection to our own server needs no network.
func (s *Server) Options() []nats.Option {
	if s.srv == nil {
		return nil
	}
	return []nats.Option{nats.InProcessServer(s.srv)}
}

// Shutdown stops the server, if it is ours, and waits until its files are
// written.
func (s *Server) Shutdown() {
	if s.srv == nil {
		return
	}
	s.shutdown()
	_ = s.lock.Unlock()
}

func (s *Server) shutdown() {
	_ = os.Remove(filepath.Join(s.dir, urlFile))
	s.srv.Shutdown()
	s.srv.WaitForShutdown()
}

func splitListen(listen string) (host string, port int, err error) {
	if listen == "" {
		return "127.0.0.1", 4222, nil
	}
	host, p, err := net.SplitHostPort(listen)
	if err == nil {
		port, err = strconv.Atoi(p)
	}
	if err != nil || port < 0 || port > 65535 {
		return "", 0, fmt.Errorf("listen address %q must be host:port, e.g. 127.0.0.1:4222", listen)
	}
	return host, port, nil
}

// freePort is the first free port from the one asked for on.
func freePort(host string, port int) (int, error) {
	if port == 0 {
		return server.RANDOM_PORT, nil
	}
	var first error
	for p := port; p <= min(port+maxPorts, 65535); p++ {
		l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(p)))
		if err == nil {
			return p, l.Close()
		}
		if first == nil {
			first = err
		}
	}
	return 0, fmt.Errorf("no free port from %d on: %w", port, first)
}
