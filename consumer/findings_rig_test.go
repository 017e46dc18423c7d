package consumer

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// publishOne stores a request, and returns its sequence. header are names and values.
func (r *rig) publishOne(creator, operation, id string, header ...string) uint64 {
	r.t.Helper()
	m := nats.NewMsg("requests." + creator + "." + operation)
	m.Header.Set(nats.MsgIdHdr, id)
	for i := 0; i < len(header); i += 2 {
		m.Header[header[i]] = []string{header[i+1]}
	}
	ack, err := r.js.PublishMsg(r.t.Context(), m)
	if err != nil {
		r.t.Fatal(err)
	}
	if ack.Duplicate {
		r.t.Fatalf("%s is a duplicate", id)
	}
	return ack.Sequence
}

// eventually waits until something is so.
func (r *rig) eventually(limit time.Duration, what string, so func() bool) {
	r.t.Helper()
	for began := time.Now(); !so(); time.Sleep(max(limit/10_000, 2*time.Millisecond)) {
		if time.Since(began) > limit {
			r.t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// newRigWithBroker is newRig with a broker that can be stopped. Ids are known to it for so
// short a time that they can come again.
func newRigWithBroker(t testing.TB, change func(*Config)) (*rig, *natsservertest.Broker) {
	t.Helper()
	b := natsservertest.NewBroker(t)
	return newRigOn(t, dial(t, b), change), b
}

func dial(t testing.TB, to nats.InProcessConnProvider) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect("", nats.InProcessServer(to), nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond),
		nats.ReconnectBufSize(-1), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// lineTo is a network of a worker's own.
func (r *rig) lineTo(b *natsservertest.Broker) *line0 { return &line0{server: b} }

// workOn runs a worker on a network of its own. crash is kill -9: nothing of it reaches the broker any
// more.
func (r *rig) workOn(l *line0, name string) (w *Worker, stop, crash func()) {
	r.t.Helper()
	r.t.Cleanup(func() { time.Sleep(2 * time.Second) }) // for the bytes that are under way
	cfg := r.cfg
	cfg.Name = name
	w, err := New(r.t.Context(), dial(r.t, l), cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := w.Run(ctx); err != nil {
			r.t.Error(err)
		}
	}()
	stop = func() {
		cancel()
		<-done
	}
	r.t.Cleanup(stop)
	return w, stop, func() {
		l.cut()
		cancel()
	}
}

// expireLeases does for a simulation what the broker's clock does otherwise.
func (r *rig) expireLeases() {
	ctx, cancel := context.WithCancel(context.Background())
	w := &world{t: r.t.(*testing.T), js: r.js}
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.expireLeases(ctx)
	}()
	r.t.Cleanup(func() {
		cancel()
		<-done
	})
}

// messages are all of a stream, on subjects that match.
func (r *rig) messages(stream, subjects string) (all []*jetstream.RawStreamMsg) {
	r.t.Helper()
	s, err := r.js.Stream(r.t.Context(), stream)
	if err != nil {
		r.t.Fatal(err)
	}
	for seq := uint64(1); ; {
		m, err := s.GetMsg(r.t.Context(), seq, jetstream.WithGetMsgSubject(subjects))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return all
		}
		if err != nil {
			r.t.Fatal(err)
		}
		all = append(all, m)
		seq = m.Sequence + 1
	}
}

// outcomes counts a creator's outcomes: its results as "result", its dead letters by class, and
// the requests that have none yet as "waiting".
func (r *rig) outcomes(creator string) map[string]int {
	r.t.Helper()
	all := map[string]int{}
	for _, m := range r.messages("RESULTS", "results."+creator+".>") {
		if m.Header.Get(publisher.HeaderDeadLetter) == "" {
			all["result"]++
		}
	}
	for _, m := range r.messages("DLQ", "dlq.*."+creator+".>") {
		all[strings.Split(m.Subject, ".")[1]]++
	}
	if n := len(r.messages("REQUESTS", "stored.requests.*."+creator+".>")); n > 0 {
		all["waiting"] = n
	}
	return all
}

// quickly makes a rig's operations retry soon.
func quickly(c *Config) {
	for name, op := range c.Operations {
		op.Retry.Backoff = resilience.Backoff{Base: 100 * time.Millisecond, Max: time.Second}
		c.Operations[name] = op
	}
}

// unsafe makes one operation, "pay", of those that must not be called twice.
func unsafe(c *Config) {
	op := c.Operations[AnyOperation]
	op.NotIdempotent = true
	c.Operations["pay"] = op
}

// forgetIDs lets a stream's window pass in which it knows the ids of requests.
func (r *rig) forgetIDs() {
	r.t.Helper()
	s, err := r.js.Stream(r.t.Context(), "REQUESTS")
	if err != nil {
		r.t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	window := cfg.Duplicates
	cfg.Duplicates = 100 * time.Millisecond
	if _, err := r.js.UpdateStream(r.t.Context(), cfg); err != nil {
		r.t.Fatal(err)
	}
	time.Sleep(time.Second)
	cfg.Duplicates = window
	if _, err := r.js.UpdateStream(r.t.Context(), cfg); err != nil {
		r.t.Fatal(err)
	}
}
