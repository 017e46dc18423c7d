package consumer

import (
	"bytes"
	"errors"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
)

// line0 is the network between a worker and the broker.
type line0 struct {
	server *natsservertest.Broker
	// delay is how long the next bytes are under way, in one direction; nil: they are there at once.
	delay func() time.Duration
	// loses reports whether the server's next answer gets lost; nil: none does.
	loses func() bool

	mu      sync.Mutex
	frozen  chan struct{} // closed when it thaws
	dead    bool
	open    []*lineConn
	instant time.Time // for which latency was asked last
	latency time.Duration
}

func (l *line0) InProcessConn() (net.Conn, error) {
	l.mu.Lock()
	cut := l.dead || l.frozen != nil
	l.mu.Unlock()
	if cut {
		return nil, errors.New("the broker cannot be reached")
	}
	conn, err := l.server.InProcessConn()
	if err != nil {
		return nil, err
	}
	c := newLineConn(conn, l)
	l.mu.Lock()
	l.open = append(l.open, c)
	l.mu.Unlock()
	return c, nil
}

func (l *line0) freeze() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.frozen == nil {
		l.frozen = make(chan struct{})
	}
}

func (l *line0) thaw() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.frozen != nil {
		close(l.frozen)
		l.frozen = nil
	}
}

// cut ends all connections. What is under way on a frozen line is lost.
func (l *line0) cut() {
	l.mu.Lock()
	l.dead = true
	open, frozen := l.open, l.frozen != nil
	l.mu.Unlock()
	for _, c := range open {
		if frozen {
			c.out.drop()
		}
		_ = c.Close()
	}
	l.thaw()
}

// lineConn is a connection whose bytes are under way for a time in both directions. It
// keeps what is written while the line is frozen, as the buffers of a kernel do, and
// sends it later, even if the writer has gone.
type lineConn struct {
	net.Conn
	line    *line0
	made    time.Time
	out, in *simPipe

	reading sync.Once
	closing sync.Once
	frames  simFrames
	rest    []byte // of what was read last
}

func newLineConn(conn net.Conn, l *line0) *lineConn {
	c := &lineConn{Conn: conn, line: l, made: time.Now(), out: newSimPipe(), in: newSimPipe()}
	go func() {
		for {
			b, ok := c.out.next(c.thawed)
			if !ok {
				break
			}
			if _, err := c.Conn.Write(b); err != nil {
				break
			}
		}
		_ = c.Conn.Close()
	}()
	return c
}

// settled reports whether the connection has been made. Until then the line is spared: the client
// holds a lock meanwhile, for which simulated time does not pass.
func (c *lineConn) settled() bool { return time.Since(c.made) >= time.Second }

// thawed waits while the line is frozen.
func (c *lineConn) thawed() {
	c.line.mu.Lock()
	frozen := c.line.frozen
	c.line.mu.Unlock()
	if frozen != nil && c.settled() {
		<-frozen
	}
}

// due is when bytes arrive that are sent now. Those of one moment arrive in one moment: the client
// holds a lock from when it asks for a watch until the answer is there, and what comes between the
// answer and the first entry would wait for it.
func (c *lineConn) due() time.Time {
	now := time.Now()
	if c.line.delay == nil || !c.settled() {
		return now
	}
	c.line.mu.Lock()
	defer c.line.mu.Unlock()
	if !c.line.instant.Equal(now) {
		c.line.instant, c.line.latency = now, c.line.delay()
	}
	return now.Add(c.line.latency)
}

func (c *lineConn) Read(b []byte) (int, error) {
	c.reading.Do(func() { go c.receive() })
	if len(c.rest) == 0 {
		var ok bool
		if c.rest, ok = c.in.next(c.thawed); !ok {
			return 0, net.ErrClosed
		}
	}
	n := copy(b, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// receive takes what the server sends.
func (c *lineConn) receive() {
	defer c.in.close()
	buffer := make([]byte, 64<<10)
	for {
		n, err := c.Conn.Read(buffer)
		if n > 0 {
			b := bytes.Clone(buffer[:n])
			if c.line.loses != nil {
				b = c.frames.filter(b, func() bool { return c.settled() && c.line.loses() })
			}
			c.in.put(b, c.due())
		}
		if err != nil {
			return
		}
	}
}

func (c *lineConn) Write(b []byte) (int, error) {
	c.line.mu.Lock()
	dead := c.line.dead
	c.line.mu.Unlock()
	if dead {
		return 0, net.ErrClosed
	}
	if c.line.loses != nil {
		c.frames.asked(b)
	}
	if !c.out.put(bytes.Clone(b), c.due()) {
		return 0, net.ErrClosed
	}
	return len(b), nil
}

// Close leaves what was written under way.
func (c *lineConn) Close() error {
	c.out.close()
	c.closing.Do(func() { close(c.in.gone) })
	c.in.close()
	return nil
}

// pipe holds bytes until they are due.
type simPipe struct {
	mu     sync.Mutex
	more   sync.Cond
	queue  [][]byte
	due    []time.Time
	last   time.Time
	closed bool
	gone   chan struct{} // closed when the reader has
}

func newSimPipe() *simPipe {
	p := &simPipe{gone: make(chan struct{})}
	p.more.L = &p.mu
	return p
}

func (p *simPipe) put(b []byte, due time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	if due.Before(p.last) { // bytes do not overtake each other
		due = p.last
	}
	p.last = due
	if len(b) > 0 {
		p.queue, p.due = append(p.queue, b), append(p.due, due)
		p.more.Signal()
	}
	return true
}

// next waits for bytes, until they are due, and for thawed. It reports false when the pipe is closed and
// empty.
func (p *simPipe) next(thawed func()) ([]byte, bool) {
	p.mu.Lock()
	for len(p.queue) == 0 && !p.closed {
		p.more.Wait()
	}
	if len(p.queue) == 0 {
		p.mu.Unlock()
		return nil, false
	}
	due := p.due[0]
	p.mu.Unlock()
	if wait := time.Until(due); wait > 0 {
		select {
		case <-time.After(wait):
		case <-p.gone:
			return nil, false
		}
	}
	thawed()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) == 0 { // dropped meanwhile
		return nil, true
	}
	b := p.queue[0]
	p.queue, p.due = p.queue[1:], p.due[1:]
	return b, true
}

func (p *simPipe) drop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.queue, p.due = nil, nil
}

func (p *simPipe) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.more.Broadcast()
}

// frames takes the server's bytes apart into what NATS calls protocol messages.
type simFrames struct {
	partial []byte

	mu     sync.Mutex
	spared map[string]bool // inboxes whose answers do not get lost
}

// asked looks at what a client sends. It must not wait for the answer to a question for a watch: until it
// comes the client holds a lock that the watch's entries wait for, and simulated time does not pass.
func (f *simFrames) asked(b []byte) {
	question := []byte("$JS.API.CONSUMER.CREATE.")
	for {
		i := bytes.Index(b, question)
		if i < 0 {
			return
		}
		b = b[i:]
		line, _, _ := bytes.Cut(b, []byte("\r\n"))
		if words := bytes.Fields(line); len(words) > 1 {
			f.mu.Lock()
			if f.spared == nil {
				f.spared = map[string]bool{}
			}
			f.spared[string(words[1])] = true
			f.mu.Unlock()
		}
		b = b[len(question):]
	}
}

// filter returns the whole frames of what has come so far, without answers that get lost. An answer
// is a message to an inbox that is neither a delivery, which has a reply subject, nor a status of the
// server: a connection loses no delivery, but may break before an answer.
func (f *simFrames) filter(b []byte, lost func() bool) []byte {
	f.partial = append(f.partial, b...)
	var out []byte
	for {
		size, answer := f.first()
		if size == 0 {
			return out
		}
		if !answer || !lost() {
			out = append(out, f.partial[:size]...)
		}
		f.partial = f.partial[size:]
	}
}

// first is the size of the first frame, 0 if it is not whole yet.
func (f *simFrames) first() (size int, answer bool) {
	line, _, whole := bytes.Cut(f.partial, []byte("\r\n"))
	if !whole {
		return 0, false
	}
	size = len(line) + 2
	words := bytes.Fields(line)
	if len(words) == 0 || !bytes.Equal(words[0], []byte("MSG")) && !bytes.Equal(words[0], []byte("HMSG")) {
		return size, false
	}
	payload, err := strconv.Atoi(string(words[len(words)-1]))
	if err != nil {
		return size, false
	}
	head := size
	if size += payload + 2; len(f.partial) < size {
		return 0, false
	}
	fixed := 4 // MSG subject sid size
	if words[0][0] == 'H' {
		fixed = 5
	}
	status := fixed == 5 && bytes.HasPrefix(f.partial[head:], []byte("NATS/1.0 "))
	f.mu.Lock()
	defer f.mu.Unlock()
	return size, bytes.HasPrefix(words[1], []byte("_INBOX.")) && len(words) == fixed && !status && !f.spared[string(words[1])]
}
