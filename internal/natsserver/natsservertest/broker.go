package natsservertest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// Broker is a broker inside the process, without a network, that can be stopped
// and started again.
type Broker struct {
	t          testing.TB
	dir        string
	maxPayload int32
	srv        atomic.Pointer[server.Server] // nil: stopped

	mu    sync.Mutex
	conns []net.Conn
	saved map[string][]byte // files with the state of consumers, by path
}

// NewBroker starts one. It ends with the test.
func NewBroker(t testing.TB) *Broker { return NewSmallBroker(t, 0) }

// NewSmallBroker is NewBroker for one that takes no larger messages than maxPayload
// bytes; 0: the usual limit.
func NewSmallBroker(t testing.TB, maxPayload int32) *Broker {
	b := &Broker{t: t, dir: t.TempDir(), maxPayload: maxPayload}
	b.Start()
	t.Cleanup(b.Stop)
	return b
}

// Start starts it again on its old folder.
func (b *Broker) Start() {
	srv, err := server.NewServer(&server.Options{DontListen: true, StoreDir: b.dir, MaxPayload: b.maxPayload, JetStream: true, NoSigs: true, NoLog: true})
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

// consumerFiles are those in which the broker keeps what a stream's consumers were given.
func (b *Broker) consumerFiles(stream string) []string {
	files, err := filepath.Glob(filepath.Join(b.dir, "jetstream", "*", "streams", stream, "obs", "*", "o.dat"))
	if err != nil {
		b.t.Error(err)
	}
	return files
}

// SaveConsumers remembers what a stream's consumers have been given so far.
func (b *Broker) SaveConsumers(stream string) {
	saved := map[string][]byte{}
	for _, name := range b.consumerFiles(stream) {
		if state, err := os.ReadFile(name); err == nil {
			saved[name] = state
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.saved = saved
}

// Kill stops it as kill -9 may: what a stream's consumers were given, and what was acked,
// since SaveConsumers is forgotten, and all of it for those that had no state then.
// What streams have stored stays.
func (b *Broker) Kill(stream string) {
	b.Stop()
	b.mu.Lock()
	saved := b.saved
	b.mu.Unlock()
	for _, name := range b.consumerFiles(stream) {
		var err error
		if state, ok := saved[name]; ok {
			err = os.WriteFile(name, state, 0o600)
		} else {
			err = os.Remove(name)
		}
		if err != nil {
			b.t.Error(err)
		}
	}
}

// PublishRaw publishes what client libraries refuse to send: header lines and a subject that
// are sent as they are. It returns the answer, which is a PubAck in JSON.
func (b *Broker) PublishRaw(subject string, header []string, payload []byte) ([]byte, error) {
	conn, err := b.InProcessConn()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return nil, err
	}
	in := bufio.NewReader(conn)
	if _, err := in.ReadString('\n'); err != nil { // INFO
		return nil, err
	}
	inbox := nats.NewInbox()
	lines := "NATS/1.0\r\n" + strings.Join(append(header, ""), "\r\n") + "\r\n"
	message := fmt.Sprintf("CONNECT {\"verbose\":false,\"pedantic\":false,\"headers\":true,\"no_responders\":true}\r\nSUB %s 1\r\nHPUB %s %s %d %d\r\n%s%s\r\n",
		inbox, subject, inbox, len(lines), len(lines)+len(payload), lines, payload)
	written := make(chan error, 1)
	go func() {
		_, err := conn.Write([]byte(message))
		written <- err
	}()
	defer func() { <-written }()
	answer, err := readAnswer(in)
	if err != nil {
		_ = conn.Close() // ends the write
	}
	return answer, err
}

// readAnswer reads up to the first message and returns its payload.
func readAnswer(in *bufio.Reader) ([]byte, error) {
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return nil, err
		}
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		switch words[0] {
		case "-ERR":
			return nil, errors.New(strings.TrimSpace(line))
		case "MSG":
			size, err := strconv.Atoi(words[len(words)-1])
			if err != nil {
				return nil, err
			}
			payload := make([]byte, size)
			_, err = io.ReadFull(in, payload)
			return payload, err
		case "HMSG":
			return nil, nats.ErrNoResponders
		}
	}
}
