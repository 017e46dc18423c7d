package consumer

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// rig is a broker and what workers need. Its API is a function: HTTP is tested
// elsewhere.
type rig struct {
	t   testing.TB
	nc  *nats.Conn
	js  jetstream.JetStream
	cfg Config
	api func(ctx context.Context, req *publisher.Request) classify.Answer

	mu    sync.Mutex
	calls map[string][]time.Time // by creator
}

func newRig(t testing.TB, change func(*Config)) *rig {
	t.Helper()
	return newRigOn(t, natsservertest.Connect(t), change)
}

func newRigOn(t testing.TB, nc *nats.Conn, change func(*Config)) *rig {
	t.Helper()
	profile, err := classify.Load("generic")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, nc: nc, calls: map[string][]time.Time{}}
	r.api = func(context.Context, *publisher.Request) classify.Answer { return ok() }
	out := io.Discard
	if os.Getenv("HEADGATE_TEST_LOG") != "" {
		out = os.Stderr
	}
	r.cfg = Config{
		Topology: publisher.Topology{Partitions: 4, MaxAge: 10_000 * time.Hour}.WithDefaults(), Profile: profile, API: r,
		Operations: map[string]Operation{AnyOperation: {Kind: resilience.Write, Retry: DefaultRetry()}},
		Gates:      resilience.DefaultConfig(), Grace: time.Second,
		Log: zerolog.New(out),
	}
	if change != nil {
		change(&r.cfg)
	}
	if r.js, err = jetstream.New(r.nc, jetstream.WithPublishAsyncMaxPending(4096)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.cfg.Topology.Ensure(t.Context(), r.js); err != nil {
		t.Fatal(err)
	}
	return r
}

func ok() classify.Answer { return answer(200) }

func answer(status int, header ...string) classify.Answer {
	a := classify.Answer{Status: status, Header: http.Header{}}
	for i := 0; i < len(header); i += 2 {
		a.Header.Set(header[i], header[i+1])
	}
	return a
}

// Prepare makes the rig an API.
func (r *rig) Prepare(req *publisher.Request) (func(context.Context) classify.Answer, error) {
	if req.Operation == "malformed" {
		return nil, fmt.Errorf("this operation needs what the request lacks")
	}
	return func(ctx context.Context) classify.Answer {
		r.mu.Lock()
		r.calls[req.Creator] = append(r.calls[req.Creator], time.Now())
		r.mu.Unlock()
		return r.api(ctx, req)
	}, nil
}

func (r *rig) called(creator string) []time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]time.Time(nil), r.calls[creator]...)
}

// publish stores n requests of a creator.
func (r *rig) publish(creator string, n int) {
	r.t.Helper()
	futures := make([]jetstream.PubAckFuture, n)
	for i := range n {
		m := nats.NewMsg("requests." + creator + ".send")
		m.Header.Set(nats.MsgIdHdr, creator+"-"+strconv.Itoa(i))
		var err error
		if futures[i], err = r.js.PublishMsgAsync(m); err != nil {
			r.t.Fatal(err)
		}
	}
	for _, f := range futures {
		select {
		case <-f.Ok():
		case err := <-f.Err():
			r.t.Fatal(err)
		}
	}
}

// work runs a worker until stop.
func (r *rig) work(name ...string) (w *Worker, stop func()) {
	r.t.Helper()
	cfg := r.cfg
	cfg.Name = fmt.Sprintf("worker-%d", time.Now().UnixNano())
	if len(name) > 0 {
		cfg.Name = name[0]
	}
	w, err := New(r.t.Context(), r.nc, cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var g errgroup.Group
	g.Go(func() error { return w.Run(ctx) })
	stop = sync.OnceFunc(func() {
		cancel()
		if err := g.Wait(); err != nil {
			r.t.Error(err)
		}
	})
	r.t.Cleanup(stop)
	return w, stop
}

// count is the number of messages of a stream, on subjects that match.
func (r *rig) count(stream, subjects string) int {
	r.t.Helper()
	s, err := r.js.Stream(r.t.Context(), stream)
	if err != nil {
		r.t.Fatal(err)
	}
	info, err := s.Info(r.t.Context(), jetstream.WithSubjectFilter(subjects))
	if err != nil {
		r.t.Fatal(err)
	}
	n := 0
	for _, m := range info.State.Subjects {
		n += int(m)
	}
	return n
}

// await waits until a stream has n messages on subjects that match.
func (r *rig) await(limit time.Duration, stream, subjects string, n int) {
	r.t.Helper()
	began := time.Now()
	for {
		if r.count(stream, subjects) >= n {
			return
		}
		if time.Since(began) > limit {
			r.t.Fatalf("%d of %d messages on %s after %v", r.count(stream, subjects), n, subjects, limit)
		}
		time.Sleep(max(limit/10_000, 2*time.Millisecond))
	}
}

// deliveries is how often messages were delivered, ever.
func (r *rig) deliveries() (n int) {
	r.t.Helper()
	for p := range r.cfg.Topology.Partitions {
		c, err := r.js.Consumer(r.t.Context(), "REQUESTS", publisher.ConsumerName(p))
		if err != nil {
			r.t.Fatal(err)
		}
		n += int(c.CachedInfo().Delivered.Consumer)
	}
	return n
}

func (r *rig) bucket(name string) jetstream.KeyValue {
	r.t.Helper()
	kv, err := r.js.KeyValue(r.t.Context(), name)
	if err != nil {
		r.t.Fatal(err)
	}
	return kv
}

// once fails the test unless each of a creator's n requests has one outcome,
// a result, and nothing is left.
func (r *rig) once(creator string, n int) {
	r.t.Helper()
	if got := r.count("RESULTS", "results."+creator+".>"); got != n {
		r.t.Errorf("%s: %d results, want %d", creator, got, n)
	}
	if got := r.count("DLQ", "dlq.*."+creator+".>"); got != 0 {
		r.t.Errorf("%s: %d dead letters", creator, got)
	}
}

// empty waits until no request is stored.
func (r *rig) empty(limit time.Duration) {
	r.t.Helper()
	began := time.Now()
	for {
		stream, err := r.js.Stream(r.t.Context(), "REQUESTS")
		if err != nil {
			r.t.Fatal(err)
		}
		n := stream.CachedInfo().State.Msgs
		if n == 0 {
			return
		}
		if time.Since(began) > limit {
			r.t.Fatalf("%d requests are still stored after %v", n, limit)
		}
		time.Sleep(max(limit/10_000, 2*time.Millisecond))
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
