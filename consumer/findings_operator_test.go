package consumer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// What an earlier owner set aside is there for the next one: a hold's end moves it at once.
func TestReleaseAfterATakeOver(t *testing.T) {
	for _, end := range []string{"SIGTERM", "crash"} {
		t.Run(end, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				r, b := newRigWithBroker(t, func(c *Config) { c.Topology.Partitions = 4 })
				r.expireLeases()
				holds := r.bucket("HOLDS")
				if _, err := holds.PutString(t.Context(), "creator.alice", "5h"); err != nil {
					t.Fatal(err)
				}
				first, stopFirst, crash := r.workOn(r.lineTo(b), "first")
				r.publish("alice", 100)
				r.eventually(time.Minute, "all are set aside", func() bool {
					y, _ := first.Why("alice")
					return y.Parked == 100
				})
				time.Sleep(time.Minute)
				if end == "crash" {
					crash()
				} else {
					stopFirst()
				}
				second, stop, _ := r.workOn(r.lineTo(b), "second")
				defer stop()
				r.eventually(time.Minute, "the next owner knows of them", func() bool {
					y, known := second.Why("alice")
					return known && y.Parked == 100 && y.Reason == resilience.ReasonHold
				})
				if err := holds.Delete(t.Context(), "creator.alice"); err != nil {
					t.Fatal(err)
				}
				released := time.Now()
				r.await(time.Minute, "RESULTS", "results.alice.>", 100)
				calls := r.called("alice")
				if first, last := calls[0].Sub(released), calls[99].Sub(released); first > 2*time.Second || last > 10*time.Second {
					t.Errorf("the first is called %v after the release, the last %v", first, last)
				}
				r.once("alice", 100)
			})
		})
	}
}

// A worker whose partition has no consumer owns the others, and takes that one when its consumer is
// made again.
func TestMissingConsumer(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		const partitions, missing = 4, 2
		var log lockedBuffer
		r := newRig(t, func(c *Config) {
			c.Topology.Partitions = partitions
			c.Log = c.Log.Output(&log)
		})
		if err := r.js.DeleteConsumer(t.Context(), "REQUESTS", publisher.ConsumerName(missing)); err != nil {
			t.Fatal(err)
		}
		_, stop := r.work()
		defer stop()
		for p := range partitions {
			r.publishOne(creatorsOf(p, partitions, 1)[0], "send", fmt.Sprintf("r-%d", p))
		}
		r.await(30*time.Second, "RESULTS", "results.>", partitions-1)
		time.Sleep(2 * time.Minute)
		if n := r.count("RESULTS", "results.>"); n != partitions-1 {
			t.Errorf("%d results without the consumer", n)
		}
		if !strings.Contains(log.String(), publisher.ConsumerName(missing)+" is missing") {
			t.Error("the missing consumer is not named")
		}
		if _, err := r.cfg.Topology.Ensure(t.Context(), r.js); err != nil {
			t.Fatal(err)
		}
		r.await(30*time.Second, "RESULTS", "results.>", partitions)
	})
}

// HOLDS is deleted and made again. Holds that come later hold, and those that were known before hold
// still, also after a restart of the worker.
func TestHoldsMadeAgain(t *testing.T) {
	for _, away := range []time.Duration{0, 3 * time.Second, time.Minute} {
		t.Run(away.String(), func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				r := newRig(t, nil)
				var asked atomic.Bool
				r.api = func(_ context.Context, req *publisher.Request) classify.Answer {
					if req.Creator == "api" && asked.CompareAndSwap(false, true) {
						return answer(429, "Retry-After", "7200")
					}
					return ok()
				}
				put := func(key, value string) {
					if _, err := r.bucket("HOLDS").PutString(t.Context(), key, value); err != nil {
						t.Fatal(err)
					}
				}
				for n := range 5 { // the new bucket's sequences are lower
					put(fmt.Sprintf("creator.x%d", n), "1s")
				}
				put("creator.before", "2h")
				_, stop := r.work()
				r.publishOne("api", "send", "api-1")
				r.publishOne("before", "send", "before-1")
				time.Sleep(30 * time.Second)
				if err := r.js.DeleteStream(t.Context(), "KV_HOLDS"); err != nil {
					t.Fatal(err)
				}
				time.Sleep(away)
				if _, err := r.cfg.Topology.Ensure(t.Context(), r.js); err != nil {
					t.Fatal(err)
				}
				time.Sleep(30 * time.Second)
				put("creator.after", "2h")
				time.Sleep(time.Second)
				for _, name := range []string{"after", "before"} {
					r.publishOne(name, "send", name+"-2")
				}
				time.Sleep(time.Minute)
				stop()
				_, stop = r.work()
				defer stop()
				time.Sleep(time.Minute)
				for name, want := range map[string]int{"after": 0, "before": 0, "api": 1} {
					if n := len(r.called(name)); n != want {
						t.Errorf("%s: %d calls, want %d", name, n, want)
					}
				}
				r.await(3*time.Hour, "RESULTS", "results.>", 4)
			})
		})
	}
}

// Trouble with the endpoint of tokens is not the requests': the account is held, few calls are made, and all
// have their results when it is over.
func TestTokenEndpointTrouble(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		const creators = 10
		r := newRig(t, nil)
		profile, err := classify.Load("fanfare")
		if err != nil {
			t.Fatal(err)
		}
		r.cfg.Profile = profile
		var healthy atomic.Bool
		var calls, renewals atomic.Int64
		r.cfg.API = refreshing{r, func() (bool, error) {
			renewals.Add(1)
			if healthy.Load() {
				return true, nil
			}
			return false, errors.New("token endpoint: 500")
		}}
		r.api = func(context.Context, *publisher.Request) classify.Answer {
			calls.Add(1)
			if !healthy.Load() {
				return answer(401)
			}
			return ok()
		}
		w, stop := r.work()
		defer stop()
		for n := range creators {
			r.publish(fmt.Sprintf("c%d", n), 3)
		}
		time.Sleep(5 * time.Minute)
		if n := r.count("DLQ", ">"); n > 0 {
			t.Errorf("%d dead letters", n)
		}
		t.Logf("%d calls, %d renewals in 5 min", calls.Load(), renewals.Load())
		if n := calls.Load(); n > 150 {
			t.Errorf("%d calls", n)
		}
		if y, known := w.Why("c3"); !known || y.Reason != resilience.ReasonAccountHold {
			t.Errorf("%v %+v", known, y)
		}
		healthy.Store(true)
		r.await(2*time.Minute, "RESULTS", "results.>", 3*creators)
		for n := range creators {
			r.once(fmt.Sprintf("c%d", n), 3)
		}
	})
}

// Garbage in LEDGER keeps no request from its outcome, and no other one waiting.
func TestGarbageInLedger(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		garbage := []string{
			"garbage", "[]", "1", "\x00\xff\x01", `{"attempts":5}`, strings.Repeat("[", 100_000), "{}", "null", "", `{"attempts":null}`,
			`{"source":{"seq":1,"stored":"2026-01-01T00:00:00Z"},"mark":{"worker":"","at":"2026-01-01T00:00:00Z","calls":9}}`,
			`{"source":{"seq":1},"mark":{"worker":"x","calls":-1}}`, strings.Repeat("x", 900<<10),
		}
		r := newRig(t, func(c *Config) {
			unsafe(c)
			c.Topology.Partitions = 1
		})
		ledger := r.bucket("LEDGER")
		ids := 0
		publish := func(creator, operation string) {
			for _, value := range garbage {
				id := fmt.Sprintf("r-%d", ids)
				ids++
				if _, err := ledger.PutString(t.Context(), publisher.RecordKey(creator, id), value); err != nil {
					t.Fatal(err)
				}
				r.publishOne(creator, operation, id)
			}
		}
		publish("alice", "pay") // looked up before its first call
		publish("bob", "send")
		var refused sync.Map
		r.api = func(_ context.Context, req *publisher.Request) classify.Answer {
			if _, before := refused.LoadOrStore(req.ID, true); req.Creator == "bob" && !before {
				return answer(503) // writes a record over it
			}
			return ok()
		}
		_, stop := r.work()
		defer stop()
		r.healthy("r0", 5, 2*time.Second)
		r.empty(10 * time.Minute)
		r.expect("alice", map[string]int{"result": len(garbage)})
		r.expect("bob", map[string]int{"result": len(garbage)})
		if n := len(r.called("alice")); n != len(garbage) {
			t.Errorf("%d calls", n)
		}
	})
}

// streamBackup is a stream as the server hands it out.
type streamBackup struct {
	description []byte // its configuration and state
	chunks      [][]byte
}

func (r *rig) backup(stream string) (b streamBackup) {
	r.t.Helper()
	sub, err := r.nc.SubscribeSync(r.nc.NewInbox())
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	answer, err := r.nc.Request("$JS.API.STREAM.SNAPSHOT."+stream, fmt.Appendf(nil, `{"deliver_subject":%q}`, sub.Subject), 5*time.Second)
	if err != nil {
		r.t.Fatal(err)
	}
	var described struct {
		Config json.RawMessage `json:"config"`
		State  json.RawMessage `json:"state"`
	}
	if err := json.Unmarshal(answer.Data, &described); err != nil {
		r.t.Fatal(err)
	}
	b.description = fmt.Appendf(nil, `{"config":%s,"state":%s}`, described.Config, described.State)
	for {
		m, err := sub.NextMsg(5 * time.Second)
		if err != nil {
			r.t.Fatal(err)
		}
		if len(m.Data) == 0 {
			return b
		}
		b.chunks = append(b.chunks, m.Data)
		if m.Reply != "" {
			_ = m.Respond(nil)
		}
	}
}

// restore puts a stream back to what it was.
func (r *rig) restore(stream string, b streamBackup) {
	r.t.Helper()
	if err := r.js.DeleteStream(r.t.Context(), stream); err != nil {
		r.t.Fatal(err)
	}
	ask := func(subject string, data []byte) (answer struct {
		Deliver string `json:"deliver_subject"`
		Error   any    `json:"error"`
	}) {
		m, err := r.nc.Request(subject, data, 5*time.Second)
		if err != nil {
			r.t.Fatal(err)
		}
		if len(m.Data) > 0 {
			if err := json.Unmarshal(m.Data, &answer); err != nil || answer.Error != nil {
				r.t.Fatalf("%s: %v", m.Data, err)
			}
		}
		return answer
	}
	to := ask("$JS.API.STREAM.RESTORE."+stream, b.description).Deliver
	for _, chunk := range b.chunks {
		ask(to, chunk)
	}
	ask(to, nil)
}

// The stream of requests is put back to an older copy under a running worker: it holds the account, and says
// so, as what had its outcome may be stored again.
func TestRestoredStream(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		var log lockedBuffer
		r := newRig(t, func(c *Config) {
			unsafe(c)
			c.Log = c.Log.Output(&log)
		})
		w, stop := r.work()
		defer stop()
		holds := r.bucket("HOLDS")
		if _, err := holds.PutString(t.Context(), "creator.alice", "5h"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second) // the worker knows of it
		for n := range 30 {
			r.publishOne("alice", "pay", fmt.Sprintf("pay-%d", n))
		}
		time.Sleep(30 * time.Second)
		backup := r.backup("REQUESTS")
		if err := holds.Delete(t.Context(), "creator.alice"); err != nil {
			t.Fatal(err)
		}
		r.await(time.Minute, "RESULTS", "results.alice.>", 30)
		r.publishOne("bob", "send", "bob-1")
		r.await(time.Minute, "RESULTS", "results.bob.>", 1)
		time.Sleep(30 * time.Second)
		r.restore("REQUESTS", backup)
		time.Sleep(time.Minute)
		if !strings.Contains(log.String(), "restored from an older copy") {
			t.Error("it is not said")
		}
		if y, known := w.Why("bob"); !known || y.Reason != resilience.ReasonAccountHold {
			t.Errorf("%+v", y)
		}
		if _, err := r.bucket("HOLDS").Get(t.Context(), "account.api"); errors.Is(err, jetstream.ErrKeyNotFound) {
			t.Error("the account is not held")
		}
		if n := len(r.called("alice")); n != 30 {
			t.Errorf("%d calls, 30 requests", n)
		}
	})
}
