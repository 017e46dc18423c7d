package consumer

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
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

var (
	seeds     = flag.Int("seeds", 10, "simulated runs")
	firstSeed = flag.Uint64("seed", 1, "the first run's seed")
)

// TestSimulation runs whole workers on the real broker through simulated hours
// of faults, and then holds what the API saw against what is stored.
func TestSimulation(t *testing.T) {
	failed := 0
	for n := range uint64(*seeds) {
		seed := *firstSeed + n
		hangs := time.AfterFunc(20*time.Second, func() { panic(fmt.Sprintf("seed %d hangs", seed)) })
		natsservertest.Simulate(t, func(t *testing.T) {
			if found := simulate(t, seed, false); len(found) > 0 {
				failed++
				t.Errorf("seed %d:\n%s", seed, strings.Join(found, "\n"))
			}
		})
		hangs.Stop()
		if failed > 3 {
			t.Fatal("enough")
		}
	}
	t.Logf("%d runs from seed %d, %d with violations", *seeds, *firstSeed, failed)
}

// A worker that acks before the result is stored loses requests; the simulation
// notices.
func TestSimulationFindsAnEarlyAck(t *testing.T) {
	for seed := range uint64(50) {
		var found []string
		natsservertest.Simulate(t, func(t *testing.T) { found = simulate(t, seed, true) })
		if len(found) > 0 {
			t.Logf("found with seed %d: %s", seed, found[0])
			return
		}
	}
	t.Error("not found in 50 runs")
}

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
	from, till time.Time
}

func simulate(t *testing.T, seed uint64, planted bool) (found []string) {
	w := newWorld(t, seed)
	w.planted = planted
	w.run()
	return w.found
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

// run is the course of a simulation.
func (w *world) run() {
	ctx, cancel := context.WithCancel(context.Background())
	var helpers sync.WaitGroup
	defer helpers.Wait()
	defer cancel()
	helpers.Go(func() { w.expireLeases(ctx) })

	var workers []*simWorker
	defer func() {
		for _, s := range workers {
			s.stop()
		}
	}()
	start := func() {
		if s := w.start(); s != nil {
			workers = append(workers, s)
		}
	}
	remove := func(i int) *simWorker {
		s := workers[i]
		workers = append(workers[:i], workers[i+1:]...)
		return s
	}
	start()
	start()
	requests := 30 + w.rng.IntN(60)
	creators := 2 + w.rng.IntN(8)
	next := 0
	for events := 3 + w.rng.IntN(8); events > 0 || next < requests; {
		for range w.rng.IntN(10) {
			if next < requests {
				w.publish(next, creators)
				next++
			}
		}
		time.Sleep(time.Duration(w.rng.IntN(12_000)) * time.Millisecond)
		if events == 0 {
			continue
		}
		events--
		w.fault()
		switch kind := w.rng.IntN(7); {
		case kind == 0 && len(workers) < 4:
			start()
		case kind == 1 && len(workers) > 0:
			s := remove(w.rng.IntN(len(workers)))
			helpers.Go(s.stop)
		case kind <= 3 && len(workers) > 0:
			remove(w.rng.IntN(len(workers))).crash()
			start()
		case kind == 4:
			w.broker.Stop()
			time.Sleep(time.Duration(w.rng.IntN(25_000)) * time.Millisecond)
			w.broker.Start()
		case len(workers) > 0:
			// Nothing reaches the server, nor comes from it, for a while; then all of it does.
			s := workers[w.rng.IntN(len(workers))]
			d := time.Duration(w.rng.IntN(90_000)) * time.Millisecond
			s.line.freeze()
			helpers.Go(func() {
				time.Sleep(d)
				s.line.thaw()
				w.fault()
			})
		}
	}
	// From here on nothing is broken.
	for _, s := range workers {
		s.line.thaw()
	}
	w.fault()
	start()
	w.drained(time.Hour)
	time.Sleep(3 * time.Minute) // for whatever comes late
	if missing, err := w.check(); err != nil || missing != "" {
		w.violation("at the end: %s (%v)", missing, err)
	}
	w.judge()
}

// drained waits until every request with a PubAck has its outcome.
func (w *world) drained(limit time.Duration) {
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Second) {
		missing, err := w.check()
		if err == nil && missing == "" {
			return
		}
		if time.Now().After(deadline) {
			w.violation("not drained after %v: %s (%v)", limit, missing, err)
			return
		}
	}
}

func (w *world) fault() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.faults = append(w.faults, time.Now())
}

func (w *world) violation(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.found) < 5 {
		w.found = append(w.found, fmt.Sprintf(format, args...))
	}
}

func (w *world) publish(n, creators int) {
	operation := "send"
	if w.rng.IntN(4) == 0 {
		operation = "pay"
	}
	w.publishAs(fmt.Sprintf("r-%d", n), fmt.Sprintf("c%d", w.rng.IntN(creators)), operation)
}

func (w *world) publishAs(id, creator, operation string) {
	w.mu.Lock()
	w.asked[id] = true
	w.mu.Unlock()
	m := nats.NewMsg("requests." + creator + "." + operation)
	m.Header.Set(nats.MsgIdHdr, id)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if ack, err := w.js.PublishMsg(ctx, m); err == nil {
		w.mu.Lock()
		w.acked[id] = ack.Sequence
		w.mu.Unlock()
	}
}

// expireLeases does what the broker does with OWNERS, whose clock stands still in
// a simulation.
func (w *world) expireLeases(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
		short, cancel := context.WithTimeout(ctx, 3*time.Second)
		if kv, err := w.js.KeyValue(short, "OWNERS"); err == nil {
			if keys, err := kv.Keys(short); err == nil {
				for _, key := range keys {
					if e, err := kv.Get(short, key); err == nil && time.Since(e.Created()) > leaseTTL {
						_ = kv.Purge(short, key, jetstream.LastRevision(e.Revision()))
					}
				}
			}
		}
		cancel()
	}
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
		w.windows[req.Creator] = append(w.windows[req.Creator], window{a.s.name, now, now.Add(time.Duration(d) * time.Second)})
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

// subjects of a stream and how many messages each has.
func (w *world) subjects(stream string) map[string]uint64 {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, err := w.js.Stream(ctx, stream)
	if err != nil {
		w.t.Fatal(err)
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(">"))
	if err != nil {
		w.t.Fatal(err)
	}
	return info.State.Subjects
}

// check compares the requests with a PubAck with what is stored: each has one
// outcome, and nothing else has.
func (w *world) check() (missing string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	outcomes := map[string][]string{}
	for stream, at := range map[string]int{"RESULTS": 3, "DLQ": 4} {
		s, err := w.js.Stream(ctx, stream)
		if err != nil {
			return "", err
		}
		info, err := s.Info(ctx, jetstream.WithSubjectFilter(">"))
		if err != nil {
			return "", err
		}
		for subject, n := range info.State.Subjects {
			tokens := strings.Split(subject, ".")
			if tokens[0] == "fence" {
				continue
			}
			for range n {
				outcomes[tokens[at]] = append(outcomes[tokens[at]], subject)
			}
		}
	}
	w.mu.Lock()
	acked, lost := len(w.acked), ""
	for id := range w.acked {
		if len(outcomes[id]) == 0 {
			lost = id
		}
	}
	w.mu.Unlock()
	for id, all := range outcomes {
		if len(all) > 1 {
			w.violation("%s has %d outcomes: %v", id, len(all), all)
		}
		if !w.asked[id] {
			w.violation("an outcome without a request: %v", all)
		}
	}
	if lost != "" {
		return fmt.Sprintf("%s of %d requests has no outcome; stored: %v", lost, acked, w.stored(ctx)), nil
	}
	return "", nil
}

func (w *world) stored(ctx context.Context) any {
	s, err := w.js.Stream(ctx, "REQUESTS")
	if err != nil {
		return err
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(">"))
	if err != nil {
		return err
	}
	return info.State.Subjects
}

// judge looks at the calls.
func (w *world) judge() {
	w.mu.Lock()
	calls, faults := w.calls, w.faults
	w.mu.Unlock()
	for id, all := range calls {
		retryable := 0
		for i, c := range all {
			if c.ended && c.retryable {
				retryable++
			}
			if i > 0 && all[i-1].worker == c.worker && !all[i-1].ended && c.start.After(all[i-1].start) {
				w.violation("%s was called twice at once by %s", id, c.worker)
			}
			if i > 0 && c.operation == "pay" && !all[i-1].certain {
				w.violation("%s must not be called twice, and was: at %v by %s, although nobody knew what came of the call at %v by %s",
					id, c.start.Sub(w.began), c.worker, all[i-1].start.Sub(w.began), all[i-1].worker)
			}
		}
		during := 0
		for _, at := range faults {
			if at.After(all[0].start.Add(-2*time.Minute)) && at.Before(all[len(all)-1].start.Add(time.Second)) {
				during++
			}
		}
		if len(all) > 1+retryable+during {
			w.violation("%s was called %d times: %d retryable answers, %d faults in between", id, len(all), retryable, during)
		}
	}
}

// flying is how many calls a worker has in flight.
func (w *world) flying(worker string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, calls := range w.calls {
		for _, c := range calls {
			if !c.ended && c.worker == worker {
				n++
			}
		}
	}
	return n
}
