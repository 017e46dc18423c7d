package consumer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
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

// A request that makes its worker vanish is a POISON dead letter after three
// times. None of the thousand that were in flight with it each time is called
// poison, and its creator's other requests go on.
func TestPoison(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		w := newWorld(t, 1)
		w.cfg.Gates.InFlight = 1024
		w.cfg.Gates.Creator = resilience.Limits{Rate: resilience.Rate{PerSecond: 1000, Burst: 1000}, Concurrency: 3}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go w.expireLeases(ctx)

		const creators, each = 1100, 2
		crashes, most := 0, 0
		var mu sync.Mutex
		var current *simWorker
		crashed := make(chan struct{}, 10)
		w.answer = func(ctx context.Context, s *simWorker, req *publisher.Request) classify.Answer {
			if req.ID == "poison" {
				flying := 0
				for range 15 { // until as many others have been called
					if flying = w.flying(s.name); flying > 1000 {
						break
					}
					sleep(ctx, time.Second)
				}
				mu.Lock()
				defer mu.Unlock()
				crashes++
				most = max(most, flying)
				s.crash()
				crashed <- struct{}{}
				return ok()
			}
			mu.Lock()
			latency := 20 * time.Second
			if crashes > 1 {
				latency = 50 * time.Millisecond
			}
			mu.Unlock()
			sleep(ctx, latency)
			return ok()
		}
		for n := range creators * each {
			w.publishAs(fmt.Sprintf("r-%d", n), fmt.Sprintf("c%d", n%creators), "send")
			if n == creators/2 {
				w.publishAs("poison", "c7", "send")
			}
		}
		current = w.start()
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-ctx.Done():
					return
				case <-crashed:
					mu.Lock()
					current = w.start()
					mu.Unlock()
				}
			}
		}()
		w.drained(nil, 6*time.Hour)
		cancel()
		<-done
		current.stop()

		if crashes != 3 {
			t.Errorf("it was called %d times, want 3", crashes)
		}
		if most < 900 {
			t.Errorf("at most %d calls were in flight with it", most)
		}
		letters := w.subjects("DLQ")
		if len(letters) != 1 || letters["dlq.POISON.c7.send.poison"] != 1 {
			t.Errorf("dead letters: %v", letters)
		}
		if n := len(w.answered()); n != creators*each {
			t.Errorf("%d results, want %d", n, creators*each)
		}
		for _, f := range w.found {
			t.Error(f)
		}
	})
}

// What must not be called twice and was being called when its worker vanished is
// a dead letter, unless its operation says otherwise.
func TestUncertain(t *testing.T) {
	for name, tc := range map[string]struct {
		retry     bool
		calls     int
		outcome   string
		interrupt func(s *simWorker) classify.Answer
	}{
		"the worker vanishes": {false, 1, "dlq.UNCERTAIN.alice.pay.r-0", func(s *simWorker) classify.Answer {
			s.crash()
			return ok()
		}},
		"the connection breaks": {false, 1, "dlq.UNCERTAIN.alice.pay.r-0", func(*simWorker) classify.Answer {
			return classify.Answer{Err: errors.New("unexpected EOF")}
		}},
		"a gateway gives up": {false, 1, "dlq.UNCERTAIN.alice.pay.r-0", func(*simWorker) classify.Answer { return answer(504) }},
		"the API is busy":    {false, 2, "results.alice.pay.r-0", func(*simWorker) classify.Answer { return answer(503) }},
		"the API's client panics": {false, 1, "dlq.UNCERTAIN.alice.pay.r-0", func(*simWorker) classify.Answer {
			panic("the API's client panics")
		}},
		"the worker vanishes, and the operation says retry": {true, 2, "results.alice.pay.r-0", func(s *simWorker) classify.Answer {
			s.crash()
			return ok()
		}},
	} {
		t.Run(name, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				w := newWorld(t, 1)
				op := w.cfg.Operations["pay"]
				op.RetryUncertain = tc.retry
				w.cfg.Operations["pay"] = op
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				go w.expireLeases(ctx)
				var calls atomic.Int64
				w.answer = func(_ context.Context, s *simWorker, _ *publisher.Request) classify.Answer {
					if calls.Add(1) == 1 {
						return tc.interrupt(s)
					}
					return ok()
				}
				first, second := w.start(), w.start()
				w.publishAs("r-0", "alice", "pay")
				w.drained(nil, time.Hour)
				cancel()
				first.stop()
				second.stop()
				if n := int(calls.Load()); n != tc.calls {
					t.Errorf("%d calls, want %d", n, tc.calls)
				}
				all := w.answered()
				for s, n := range w.subjects("DLQ") {
					all[s] = n
				}
				if len(all) != 1 || all[tc.outcome] != 1 {
					t.Errorf("outcomes %v, want %s", all, tc.outcome)
				}
			})
		})
	}
}

// full makes a stream take no more than n messages.
func (r *rig) full(stream string, n int64) {
	r.t.Helper()
	s, err := r.js.Stream(r.t.Context(), stream)
	if err != nil {
		r.t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	cfg.MaxMsgs = n
	if _, err := r.js.UpdateStream(r.t.Context(), cfg); err != nil {
		r.t.Fatal(err)
	}
}

// Nothing is acked while its outcome cannot be stored; the worker says so, and goes
// on by itself.
func TestFullStreams(t *testing.T) {
	for _, stream := range []string{"RESULTS", "DLQ"} {
		t.Run(stream, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				var log lockedBuffer
				r := newRig(t, func(c *Config) { c.Log = zerolog.New(&log) })
				if stream == "DLQ" {
					r.api = func(context.Context, *publisher.Request) classify.Answer { return answer(422) }
				}
				r.full(stream, 5)
				_, stop := r.work()
				defer stop()
				r.publish("alice", 20)
				r.await(time.Minute, stream, ">", 5)
				time.Sleep(10 * time.Minute)
				if n := r.count("REQUESTS", ">"); n != 15 {
					t.Errorf("%d requests are left, want 15", n)
				}
				if !strings.Contains(log.String(), "the stream is full") {
					t.Error("nobody is told")
				}
				before := len(r.called("alice"))
				r.full(stream, -1)
				r.await(time.Minute, stream, ">", 20)
				if n := len(r.called("alice")); n != 20 || before > 20 {
					t.Errorf("%d calls for 20 requests", n)
				}
			})
		})
	}
}

// A server without room on its disk takes nothing either.
func TestFullDisk(t *testing.T) {
	nc := natsservertest.ConnectWithStore(t, 400<<10)
	r := newRigOn(t, nc, func(c *Config) { c.Topology.Partitions = 1 })
	body := bytes.Repeat([]byte("x"), 50<<10)
	r.api = func(context.Context, *publisher.Request) classify.Answer {
		a := ok()
		a.Body = body
		return a
	}
	_, stop := r.work()
	defer stop()
	r.publish("alice", 12)
	r.await(time.Minute, "RESULTS", ">", 3)
	var last int
	for range 20 { // nothing more comes, and nothing gets lost
		time.Sleep(50 * time.Millisecond)
		last = r.count("RESULTS", ">")
		if left := r.count("REQUESTS", ">"); last+left < 12 {
			t.Fatalf("%d results and %d requests of 12", last, left)
		}
	}
	if last == 12 {
		t.Fatal("the disk was large enough")
	}
	// Somebody makes room, again and again: old results go.
	results, err := r.js.Stream(t.Context(), "RESULTS")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for began := time.Now(); seen < 12; {
		if time.Since(began) > 3*time.Minute {
			t.Fatalf("%d of 12 results", seen)
		}
		info, err := results.Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		seen = int(info.State.LastSeq)
		if err := results.Purge(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// A body that is too large for a message is in the object store, whole.
func TestLargeBodies(t *testing.T) {
	r := newRig(t, nil)
	large := bytes.Repeat([]byte("0123456789abcdef"), 200<<10)
	r.api = func(_ context.Context, req *publisher.Request) classify.Answer {
		a := answer(200, "Content-Type", "application/x-large")
		a.Body = large
		if req.Creator == "bob" {
			a = answer(422)
		}
		return a
	}
	_, stop := r.work()
	defer stop()
	r.publish("alice", 1)
	r.await(time.Minute, "RESULTS", "results.alice.>", 1)
	stream, err := r.js.Stream(t.Context(), "RESULTS")
	if err != nil {
		t.Fatal(err)
	}
	m, err := stream.GetLastMsgForSubject(t.Context(), "results.alice.send.alice-0")
	if err != nil {
		t.Fatal(err)
	}
	if m.Header.Get(publisher.HeaderBodyBucket) != "BODIES" || m.Header.Get(publisher.HeaderBodySize) != fmt.Sprint(len(large)) ||
		!strings.HasPrefix(m.Header.Get(publisher.HeaderBodyDigest), "SHA-256=") || m.Header.Get(publisher.HeaderBodyContentType) != "application/x-large" ||
		!bytes.Contains(m.Data, []byte("nats object get BODIES results.alice.send.alice-0")) {
		t.Errorf("headers %v, body %.200s", m.Header, m.Data)
	}
	if got, err := publisher.Body(t.Context(), r.js, "", m.Header, m.Data); err != nil || !bytes.Equal(got, large) {
		t.Errorf("%d bytes, %v", len(got), err)
	}

	// A payload that fits into a request does not fit into a dead letter, which has more headers.
	payload := bytes.Repeat([]byte("x"), int(r.nc.MaxPayload())-100)
	msg := nats.NewMsg("requests.bob.send")
	msg.Header.Set(nats.MsgIdHdr, "big")
	msg.Data = payload
	if _, err := r.js.PublishMsg(t.Context(), msg); err != nil {
		t.Fatal(err)
	}
	r.await(time.Minute, "DLQ", "dlq.*.bob.>", 1)
	if stream, err = r.js.Stream(t.Context(), "DLQ"); err != nil {
		t.Fatal(err)
	}
	if m, err = stream.GetLastMsgForSubject(t.Context(), "dlq.VALIDATION.bob.send.big"); err != nil {
		t.Fatal(err)
	}
	if got, err := publisher.Body(t.Context(), r.js, "", m.Header, m.Data); err != nil || !bytes.Equal(got, payload) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// More than an answer may have is described, and not kept.
func TestTruncatedAnswer(t *testing.T) {
	r := newRig(t, nil)
	r.api = func(context.Context, *publisher.Request) classify.Answer {
		a := answer(200, "Content-Type", "video/mp4")
		a.Body, a.Truncated = make([]byte, 1000), true
		return a
	}
	_, stop := r.work()
	defer stop()
	r.publish("alice", 1)
	r.await(time.Minute, "DLQ", "dlq.INVALID_RESPONSE.>", 1)
	stream, _ := r.js.Stream(t.Context(), "DLQ")
	m, err := stream.GetLastMsgForSubject(t.Context(), "dlq.>")
	if err != nil {
		t.Fatal(err)
	}
	if reason := m.Header.Get(publisher.DlqReason); !strings.Contains(reason, `more than 1000 bytes of "video/mp4" came with status 200`) {
		t.Errorf("reason %q", reason)
	}
}

// refreshing is an API whose credentials can be renewed.
type refreshing struct {
	*rig
	renew func() (bool, error)
}

func (a refreshing) Refresh(context.Context, classify.Answer) (bool, error) { return a.renew() }

func TestRefresh(t *testing.T) {
	for name, tc := range map[string]struct {
		renewed   bool
		err       error
		refused   int // calls
		outcome   string
		renewals  int
		untouched bool // the account is not held
	}{
		"renewed":               {true, nil, 1, "results.alice.send.alice-0", 1, true},
		"refused all the same":  {true, nil, 9, "dlq.UNAUTHORIZED.alice.send.alice-0", 1, false},
		"cannot be renewed":     {false, nil, 9, "dlq.UNAUTHORIZED.alice.send.alice-0", 1, false},
		"not now, but later on": {true, errors.New("token endpoint: 503"), 2, "results.alice.send.alice-0", 2, false},
	} {
		t.Run(name, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				var renewals, calls atomic.Int64
				r := newRig(t, nil)
				op := r.cfg.Operations[AnyOperation]
				op.NotIdempotent = true // a refusal is certain, whatever becomes of the renewal
				r.cfg.Operations[AnyOperation] = op
				profile, err := classify.Load("fanfare")
				if err != nil {
					t.Fatal(err)
				}
				r.cfg.Profile = profile
				r.cfg.API = refreshing{r, func() (bool, error) {
					if renewals.Add(1) == 1 && tc.err != nil {
						return false, tc.err
					}
					return tc.renewed, nil
				}}
				r.api = func(context.Context, *publisher.Request) classify.Answer {
					if calls.Add(1) <= int64(tc.refused) {
						return answer(401)
					}
					return ok()
				}
				_, stop := r.work()
				defer stop()
				r.publish("alice", 1)
				stream := "RESULTS"
				if strings.HasPrefix(tc.outcome, "dlq") {
					stream = "DLQ"
				}
				r.await(time.Minute, stream, tc.outcome, 1)
				if n := int(renewals.Load()); n != tc.renewals {
					t.Errorf("%d renewals, want %d", n, tc.renewals)
				}
				if _, err := r.bucket("HOLDS").Get(t.Context(), "account.api"); errors.Is(err, jetstream.ErrKeyNotFound) != tc.untouched {
					t.Errorf("the account's hold: %v", err)
				}
			})
		})
	}
}

// A request that no delivery reaches is found, and called.
func TestReconcileFindsWhatIsNotDelivered(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Topology.Partitions = 1 })
		holds := r.bucket("HOLDS")
		if _, err := holds.PutString(t.Context(), "account", "1h"); err != nil {
			t.Fatal(err)
		}
		_, stop := r.work()
		defer stop()
		time.Sleep(time.Minute) // it is idle, and pulls nothing
		r.publish("alice", 3)
		// Another client takes one, and asks for it in a year.
		c, err := r.js.Consumer(t.Context(), "REQUESTS", publisher.ConsumerName(0))
		if err != nil {
			t.Fatal(err)
		}
		m, err := c.Next(jetstream.FetchMaxWait(time.Second))
		if err != nil {
			t.Fatal(err)
		}
		if err := m.NakWithDelay(365 * 24 * time.Hour); err != nil {
			t.Fatal(err)
		}
		if err := holds.Delete(t.Context(), "account"); err != nil {
			t.Fatal(err)
		}
		r.await(time.Minute, "RESULTS", "results.alice.>", 2)
		r.await(5*time.Minute, "RESULTS", "results.alice.>", 3)
		r.empty(time.Minute)
		r.once("alice", 3)
	})
}

// Requests that the server stores and gives to no consumer become dead letters: those with
// wildcards for tokens, and with byte 0x7f.
func TestReconcileFindsStrays(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Topology.Partitions = 2 })
		for i, subject := range []string{"requests.*.op", "requests.alice.*", "requests.>.op", "requests.*.*", "requests.a\x7fb.op"} {
			m := nats.NewMsg(subject)
			m.Header.Set(nats.MsgIdHdr, fmt.Sprintf("stray-%d", i))
			if _, err := r.js.PublishMsg(t.Context(), m); err != nil {
				t.Fatalf("%q: %v", subject, err)
			}
		}
		_, stop := r.work()
		defer stop()
		r.await(10*time.Minute, "DLQ", "dlq.MALFORMED_REQUEST.>", 5)
		r.empty(time.Minute)
	})
}

// A consumer that was deleted and made again counts deliveries from one; what has
// its outcome is not called again.
func TestConsumerMadeAgain(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Topology.Partitions = 1 })
		r.publish("alice", 1)
		// It has a result, and its ack got lost with the consumer.
		p := publisher.New(r.js, r.cfg.Topology)
		if _, err := p.Result(t.Context(), publisher.Result{RequestID: "alice-0", Creator: "alice", Operation: "send", Status: 200}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if err := r.js.DeleteConsumer(t.Context(), "REQUESTS", publisher.ConsumerName(0)); err != nil {
			t.Fatal(err)
		}
		if _, err := r.cfg.Topology.Ensure(t.Context(), r.js); err != nil {
			t.Fatal(err)
		}
		_, stop := r.work()
		defer stop()
		r.empty(time.Minute)
		if n := len(r.called("alice")); n != 0 {
			t.Errorf("%d calls", n)
		}
	})
}

// A worker must not send what it wrote while it was cut off.
func TestConnectionMustNotBuffer(t *testing.T) {
	r := newRig(t, nil)
	nc, err := nats.Connect(natsservertest.URL(t))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if _, err := New(t.Context(), nc, r.cfg); err == nil || !strings.Contains(err.Error(), "ReconnectBufSize(-1)") {
		t.Errorf("New: %v", err)
	}
}

// answered are the places in RESULTS that hold a result, and not a dead letter's tombstone.
func (w *world) answered() map[string]uint64 {
	all := map[string]uint64{}
	for subject, n := range w.subjects("RESULTS") {
		stream, err := w.js.Stream(w.t.Context(), "RESULTS")
		if err != nil {
			w.t.Fatal(err)
		}
		m, err := stream.GetLastMsgForSubject(w.t.Context(), subject)
		if err != nil {
			w.t.Fatal(err)
		}
		if m.Header.Get(publisher.HeaderDeadLetter) == "" {
			all[subject] = n
		}
	}
	return all
}
