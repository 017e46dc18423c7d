package consumer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
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
	nc      *nats.Conn
	js      jetstream.JetStream
	cfg     Config
	nasty   nasty
	planted bool
	began   time.Time
	maxAge  time.Duration // of a request
	answer  func(context.Context, *simWorker, *publisher.Request) classify.Answer

	mu       sync.Mutex
	fates    *rand.Rand
	asked    map[string]bool // ids of requests, as tokens
	requests []*simRequest   // as far as they are known to be stored
	calls    []*simCall
	faults   []time.Time
	troubles []simTrouble
	windows  map[string][]window // by creator
	holds    []*personHold
	limits   []limitChange
	gone     []simOutcome // dead letters that an operator dropped or replayed
	healed   bool         // from now on nothing is broken
	found    []string
	crashes  []time.Time // of workers

	expired, endpointFails bool        // the API's token
	ledgerLost, budgetLost []time.Time // when somebody spoilt them
	stopWatch              context.CancelFunc

	number int // of workers
	count  int // of requests
	log    io.Writer

	closing sync.WaitGroup // connections of workers that crashed
}

// simRequest is a message of the request stream.
type simRequest struct {
	number             int // in its payload
	replay             string
	id                 string // its header's
	creator, operation string
	subject            string // as published
	malformed          string // how
	seq                uint64
	stored             time.Time
	removed            bool // by an operator
}

type simCall struct {
	worker, id, creator, operation string
	number                         int
	replay                         string
	start, end                     time.Time
	status                         int
	// certain: the API said that nothing was done.
	certain   bool
	retryable bool
	ended     bool
	cut       bool // off, by the end of its worker's grace time
}

// window is a time in which a creator must not be called, as the API announced to a worker.
type window struct {
	worker     string
	request    string
	from, till time.Time
	known      time.Time // when HOLDS had it; zero: it does not
}

func newWorld(t *testing.T, seed uint64) *world {
	t.Helper()
	return newWorldOf(t, seed, nasty{})
}

func newWorldOf(t *testing.T, seed uint64, n nasty) *world {
	t.Helper()
	w := &world{
		t: t, rng: rand.New(rand.NewPCG(seed, 1)), fates: rand.New(rand.NewPCG(seed, 2)), began: time.Now(), nasty: n,
		asked: map[string]bool{}, windows: map[string][]window{}, log: io.Discard, maxAge: 24 * time.Hour,
	}
	if os.Getenv("HEADGATE_TEST_LOG") != "" {
		w.log = os.Stderr
	}
	w.broker = natsservertest.NewSmallBroker(t, n.maxPayload)
	var err error
	w.nc, err = nats.Connect("", nats.InProcessServer(w.broker), nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond),
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.nc.Close)
	t.Cleanup(w.closing.Wait)
	if w.js, err = jetstream.New(w.nc, jetstream.WithDefaultTimeout(2*time.Second)); err != nil {
		t.Fatal(err)
	}
	profile, err := classify.Load("generic")
	if err != nil {
		t.Fatal(err)
	}
	if n.stray {
		w.maxAge = 30 * time.Minute // requests that no consumer is given are found by their age
	}
	retry := DefaultRetry()
	retry.Attempts, retry.MaxAge = 6, w.maxAge
	topology := publisher.Topology{Partitions: 4 + w.rng.IntN(5), MaxAge: 10_000 * time.Hour}
	if n.stray {
		topology.MaxAge = w.maxAge
	}
	w.cfg = Config{
		Topology: topology.WithDefaults(), Profile: profile,
		Operations: map[string]Operation{
			"send": {Kind: resilience.Write, Retry: retry},
			"pay":  {Kind: resilience.Write, Retry: retry, NotIdempotent: true},
		},
		Gates: resilience.DefaultConfig(), Grace: 2 * time.Second, Log: zerolog.New(w.log),
	}
	w.cfg.Gates.Creator.PerSecond, w.cfg.Gates.Creator.Burst = 5, 10
	w.cfg.Gates.Account = n.account
	w.answer = w.fate
	if n.on {
		w.answer = w.nastyFate
	}
	if _, err := w.cfg.Topology.Ensure(t.Context(), w.js); err != nil {
		t.Fatal(err)
	}
	return w
}

// simWorker is a worker with a connection of its own.
type simWorker struct {
	name    string
	nc      *nats.Conn
	line    *line0
	end     context.CancelFunc
	done    chan struct{}
	started time.Time
	worker  atomic.Pointer[Worker] // nil: not yet
	crashed atomic.Bool

	w *world
}

func (w *world) start() *simWorker {
	w.number++
	s := &simWorker{
		name: fmt.Sprintf("w%d", w.number), w: w, done: make(chan struct{}), started: time.Now(),
		line: w.nasty.line(w),
	}
	var err error
	s.nc, err = nats.Connect("", nats.InProcessServer(s.line), nats.MaxReconnects(-1), nats.ReconnectWait(200*time.Millisecond),
		nats.ReconnectBufSize(-1), nats.RetryOnFailedConnect(true), nats.PingInterval(20*time.Second),
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
	if err != nil {
		w.t.Error(err)
		return nil
	}
	cfg := w.cfg
	cfg.Name, cfg.API = s.name, simAPI{w, s}
	if w.nasty.tokens {
		cfg.API = tokenAPI{simAPI{w, s}}
	}
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
				s.worker.Store(worker)
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
	s.crashed.Store(true)
	s.w.mu.Lock()
	s.w.crashes = append(s.w.crashes, time.Now())
	s.w.mu.Unlock()
	s.line.cut()
	s.end()
	// A moment later: nats.go leaks a goroutine if it is closed between the two steps of its first
	// asynchronous publish.
	s.w.closing.Go(func() {
		time.Sleep(time.Millisecond)
		s.nc.Close()
	})
}

// simAPI is the API as one worker sees it.
type simAPI struct {
	w *world
	s *simWorker
}

// payload is what a request of the simulation asks for.
type simPayload struct {
	N   *int   `json:"n"`
	Pad string `json:"pad,omitempty"`
}

func numberIn(body []byte) (int, error) {
	var p simPayload
	if err := json.Unmarshal(body, &p); err != nil {
		return -1, err
	}
	if p.N == nil {
		return -1, errors.New("a payload needs a number")
	}
	return *p.N, nil
}

func (a simAPI) Prepare(req *publisher.Request) (func(context.Context) classify.Answer, error) {
	n, err := numberIn(req.Payload)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) classify.Answer { return a.call(ctx, req, n) }, nil
}

func (a simAPI) call(ctx context.Context, req *publisher.Request, number int) classify.Answer {
	w := a.w
	c := &simCall{
		worker: a.s.name, id: req.ID, creator: req.Creator, operation: req.Operation, start: time.Now(),
		number: number, replay: simReplayOf(req.ID),
	}
	if a.s.crashed.Load() {
		return classify.Answer{Err: net.ErrClosed} // it does not exist any more
	}
	w.mu.Lock()
	w.calls = append(w.calls, c)
	w.mayCall(a.s, c)
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		c.ended, c.end = true, time.Now()
		w.mu.Unlock()
	}()
	ans := w.answer(ctx, a.s, req)
	w.mu.Lock()
	c.status, c.cut = ans.Status, ctx.Err() != nil
	c.certain = ans.Status >= 400 && ans.Status < 500 && ans.Status != 408 || ans.Status == 503 || ans.Status == 501
	c.retryable = ans.Status == 429 || ans.Status >= 500 || ans.Status == 408 || ans.Status == 401 || ans.Err != nil
	w.announced(a.s, req, ans)
	w.mu.Unlock()
	if w.planted && ans.Status == 200 {
		// What an ack before the result is stored comes to.
		w.deleteStored(number)
	}
	return ans
}

// announced remembers the window that an answer opens; w.mu is held.
func (w *world) announced(s *simWorker, req *publisher.Request, ans classify.Answer) {
	value, now := ans.Header.Get("Retry-After"), time.Now()
	till := now
	if d, err := strconv.Atoi(value); err == nil {
		till = now.Add(time.Duration(d) * time.Second)
	} else if at, err := http.ParseTime(value); err == nil {
		till = at
	}
	if till.After(now) {
		w.windows[req.Creator] = append(w.windows[req.Creator], window{worker: s.name, request: req.ID, from: now, till: till})
	}
}

// deleteStored deletes a request from its stream.
func (w *world) deleteStored(number int) {
	w.mu.Lock()
	var seq uint64
	for _, r := range w.requests {
		if r.number == number {
			seq = r.seq
		}
	}
	w.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if stream, err := w.js.Stream(ctx, "REQUESTS"); err == nil && seq > 0 {
		_ = stream.DeleteMsg(ctx, seq)
	}
}

// chance is a number of the API's own source.
func (w *world) chance(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fates.IntN(n)
}

// fate is what chance makes of a call.
func (w *world) fate(ctx context.Context, _ *simWorker, req *publisher.Request) classify.Answer {
	fate, latency := w.chance(100), time.Duration(w.chance(3000))*time.Millisecond
	hold := strconv.Itoa(1 + w.chance(90))
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
	return simDone(req)
}

// done is the API's answer to a request: it says which one.
func simDone(req *publisher.Request) classify.Answer {
	a := ok()
	n, _ := numberIn(req.Payload)
	a.Body, _ = json.Marshal(simPayload{N: &n})
	return a
}
