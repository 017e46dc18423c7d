package consumer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// world is one run: a broker, workers that come and go, an API that answers as it
// likes, and what all of them did.
type world struct {
	t       *testing.T
	rng     *rand.Rand // of the run's course; what calls get has a source of its own
	broker  *natsservertest.Broker
	js      jetstream.JetStream
	cfg     Config
	planted bool
	began   time.Time
	answer  func(context.Context, *simWorker, *publisher.Request) classify.Answer

	mu      sync.Mutex
	fates   *rand.Rand
	asked   map[string]bool   // requests
	acked   map[string]uint64 // those with a PubAck, and where they are stored
	calls   map[string][]*simCall
	faults  []time.Time
	windows map[string][]window // by creator
	found   []string
	number  int
	log     io.Writer

	closing sync.WaitGroup // connections of workers that crashed
}

type simCall struct {
	worker    string
	operation string
	start     time.Time
	// certain: the worker got an answer that says that nothing was done.
	certain   bool
	retryable bool
	ended     bool
}

// window is a time in which a creator must not be called, as a worker was told.
type window struct {
	worker     string
	request    string
	from, till time.Time
}

func newWorld(t *testing.T, seed uint64) *world {
	t.Helper()
	w := &world{
		t: t, rng: rand.New(rand.NewPCG(seed, 1)), fates: rand.New(rand.NewPCG(seed, 2)), began: time.Now(),
		asked: map[string]bool{}, acked: map[string]uint64{}, calls: map[string][]*simCall{}, windows: map[string][]window{}, log: io.Discard,
	}
	if os.Getenv("HEADGATE_TEST_LOG") != "" {
		w.log = os.Stderr
	}
	w.broker = natsservertest.NewBroker(t)
	nc, err := nats.Connect("", nats.InProcessServer(w.broker), nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	t.Cleanup(w.closing.Wait)
	if w.js, err = jetstream.New(nc, jetstream.WithDefaultTimeout(2*time.Second)); err != nil {
		t.Fatal(err)
	}
	profile, err := classify.Load("generic")
	if err != nil {
		t.Fatal(err)
	}
	retry := DefaultRetry()
	retry.Attempts = 6
	w.cfg = Config{
		Topology: publisher.Topology{Partitions: 4 + w.rng.IntN(5), MaxAge: 10_000 * time.Hour}.WithDefaults(), Profile: profile,
		Operations: map[string]Operation{
			"send": {Kind: resilience.Write, Retry: retry},
			"pay":  {Kind: resilience.Write, Retry: retry, NotIdempotent: true},
		},
		Gates: resilience.DefaultConfig(), Grace: 2 * time.Second, Log: zerolog.New(w.log),
	}
	w.cfg.Gates.Creator.PerSecond, w.cfg.Gates.Creator.Burst = 5, 10
	w.answer = w.fate
	if _, err := w.cfg.Topology.Ensure(t.Context(), w.js); err != nil {
		t.Fatal(err)
	}
	return w
}

// simWorker is a worker with a connection of its own.
type simWorker struct {
	name string
	nc   *nats.Conn
	line *line0
	end  context.CancelFunc
	done chan struct{}

	closing *sync.WaitGroup
}

func (w *world) start() *simWorker {
	w.number++
	s := &simWorker{name: fmt.Sprintf("w%d", w.number), closing: &w.closing, line: &line0{server: w.broker}, done: make(chan struct{})}
	var err error
	s.nc, err = nats.Connect("", nats.InProcessServer(s.line), nats.MaxReconnects(-1), nats.ReconnectWait(200*time.Millisecond),
		nats.ReconnectBufSize(-1), nats.RetryOnFailedConnect(true), nats.PingInterval(20*time.Second))
	if err != nil {
		w.t.Error(err)
		return nil
	}
	cfg := w.cfg
	cfg.Name, cfg.API = s.name, simAPI{w, s}
	cfg.Log = cfg.Log.With().Str("worker", s.name).Logger().Hook(zerolog.HookFunc(func(e *zerolog.Event, _ zerolog.Level, _ string) {
		e.Dur("at_ms", time.Since(w.began))
	}))
	ctx, cancel := context.WithCancel(context.Background())
	s.end = cancel
	go func() {
		defer close(s.done)
		for ctx.Err() == nil {
			short, stop := context.WithTimeout(ctx, 10*time.Second)
			worker, err := New(short, s.nc, cfg)
			stop()
			if err == nil {
				_ = worker.Run(ctx)
				return
			}
			sleep(ctx, time.Second)
		}
	}()
	return s
}

// stop is SIGTERM.
func (s *simWorker) stop() {
	s.end()
	<-s.done
	s.nc.Close()
}

// crash is kill -9: from one moment to the next nothing of it reaches the server.
func (s *simWorker) crash() {
	s.line.cut()
	s.end()
	// A moment later: nats.go leaks a goroutine if it is closed between the two steps of its first
	// asynchronous publish.
	s.closing.Go(func() {
		time.Sleep(time.Millisecond)
		s.nc.Close()
	})
}

// line0 is the network between a worker and the broker.
type line0 struct {
	server *natsservertest.Broker

	mu     sync.Mutex
	frozen chan struct{} // closed when it thaws
	dead   bool
	open   []*lineConn
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
	c := &lineConn{Conn: conn, line: l, made: time.Now()}
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
	frozen, open := l.frozen, l.open
	l.frozen = nil
	l.mu.Unlock()
	if frozen == nil {
		return
	}
	close(frozen)
	for _, c := range open {
		c.flush()
	}
}

func (l *line0) cut() {
	l.mu.Lock()
	l.dead = true
	open := l.open
	l.mu.Unlock()
	for _, c := range open {
		_ = c.Conn.Close()
	}
	l.thaw()
}

// lineConn keeps what is written while the line is frozen, as the buffers of a
// kernel do, and sends it later, even if the writer has gone.
type lineConn struct {
	net.Conn
	line *line0
	made time.Time

	writing sync.Mutex
	late    []byte
}

// state of the line. A connection that is just being made is spared: the client
// holds a lock meanwhile, for which simulated time does not pass.
func (c *lineConn) state() (dead bool, frozen chan struct{}) {
	c.line.mu.Lock()
	defer c.line.mu.Unlock()
	if time.Since(c.made) < time.Second {
		return c.line.dead, nil
	}
	return c.line.dead, c.line.frozen
}

func (c *lineConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	_, frozen := c.state()
	if frozen != nil {
		<-frozen
	}
	return n, err
}

func (c *lineConn) Write(b []byte) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	dead, frozen := c.state()
	switch {
	case dead:
		return 0, net.ErrClosed
	case frozen != nil || len(c.late) > 0:
		c.late = append(c.late, b...)
		return len(b), nil
	}
	return c.Conn.Write(b)
}

func (c *lineConn) flush() {
	c.writing.Lock()
	defer c.writing.Unlock()
	if len(c.late) > 0 {
		_, _ = c.Conn.Write(c.late)
		c.late = nil
	}
}

// Close of a frozen line leaves what was written under way.
func (c *lineConn) Close() error {
	_, frozen := c.state()
	if frozen == nil {
		return c.Conn.Close()
	}
	go func() {
		<-frozen
		time.Sleep(time.Millisecond)
		_ = c.Conn.Close()
	}()
	return nil
}

// simAPI is the API as one worker sees it.
type simAPI struct {
	w *world
	s *simWorker
}

func (a simAPI) Prepare(req *publisher.Request) (func(context.Context) classify.Answer, error) {
	return func(ctx context.Context) classify.Answer { return a.call(ctx, req) }, nil
}

func (a simAPI) call(ctx context.Context, req *publisher.Request) classify.Answer {
	w := a.w
	c := &simCall{worker: a.s.name, operation: req.Operation, start: time.Now()}
	w.mu.Lock()
	w.calls[req.ID] = append(w.calls[req.ID], c)
	for _, win := range w.windows[req.Creator] {
		if win.worker == a.s.name && c.start.After(win.from) && c.start.Before(win.till) {
			w.found = append(w.found, fmt.Sprintf("at %v %s called %s %v before a window ended that it knew since %v",
				c.start.Sub(w.began), a.s.name, req.Creator, win.till.Sub(c.start), win.from.Sub(w.began)))
		}
	}
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		c.ended = true
		w.mu.Unlock()
	}()
	ans := w.answer(ctx, a.s, req)
	w.mu.Lock()
	c.retryable = ans.Status == 429 || ans.Status == 503 || ans.Err != nil
	c.certain = ans.Status == 429 || ans.Status == 503
	if d, err := strconv.Atoi(ans.Header.Get("Retry-After")); err == nil {
		now := time.Now()
		w.windows[req.Creator] = append(w.windows[req.Creator], window{a.s.name, req.ID, now, now.Add(time.Duration(d) * time.Second)})
	}
	seq, known := w.acked[req.ID]
	w.mu.Unlock()
	if w.planted && known && ans.Status == 200 {
		// What an ack before the result is stored comes to.
		short, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if stream, err := w.js.Stream(short, "REQUESTS"); err == nil {
			_ = stream.DeleteMsg(short, seq)
		}
	}
	return ans
}

// fate is what chance makes of a call.
func (w *world) fate(ctx context.Context, _ *simWorker, _ *publisher.Request) classify.Answer {
	w.mu.Lock()
	fate, latency := w.fates.IntN(100), time.Duration(w.fates.IntN(3000))*time.Millisecond
	hold := strconv.Itoa(1 + w.fates.IntN(90))
	w.mu.Unlock()
	select {
	case <-time.After(latency):
	case <-ctx.Done():
		return classify.Answer{Err: ctx.Err()}
	}
	switch {
	case fate < 8:
		return answer(429, "Retry-After", hold)
	case fate < 14:
		return answer(503)
	case fate < 16:
		return answer(503, "Retry-After", hold)
	case fate < 18:
		return answer(404)
	case fate < 20:
		return answer(422)
	case fate < 23:
		return classify.Answer{Err: syscall.ECONNRESET}
	case fate < 24:
		panic("the API's client panics")
	}
	return ok()
}
