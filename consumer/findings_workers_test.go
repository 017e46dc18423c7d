package consumer

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/internal/ownership"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// creatorsOf finds n creators of a partition.
func creatorsOf(partition, partitions, n int) (names []string) {
	for i := 0; len(names) < n; i++ {
		name := fmt.Sprintf("p%d-%d", partition, i)
		if p, _ := PartitionOf(name, partitions); p == partition {
			names = append(names, name)
		}
	}
	return names
}

// owned are the partitions of a worker, by name.
func (r *rig) owned(worker string) []int {
	r.t.Helper()
	owners, err := ownership.Owners(r.t.Context(), r.bucket("OWNERS"))
	if err != nil {
		r.t.Fatal(err)
	}
	for _, o := range owners {
		if o.Worker == worker {
			return o.Partitions
		}
	}
	return nil
}

// A worker that stops while one call hangs gives up its other partitions at once, and
// the one of the hanging call soon: all of its other creators go on elsewhere.
func TestStopWithAHangingCall(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		const partitions = 8
		r, b := newRigWithBroker(t, func(c *Config) {
			c.Topology.Partitions = partitions
			c.Grace = 20 * time.Second
		})
		r.expireLeases()
		r.api = func(ctx context.Context, req *publisher.Request) classify.Answer {
			if strings.HasPrefix(req.ID, "hang") {
				sleep(ctx, time.Hour)
			}
			return ok()
		}
		_, stopFirst, _ := r.workOn(r.lineTo(b), "first")
		_, stopSecond, _ := r.workOn(r.lineTo(b), "second")
		defer stopSecond()
		var of []int
		r.eventually(time.Minute, "both own half", func() bool {
			of = r.owned("first")
			return len(of) == partitions/2 && len(r.owned("second")) == partitions/2
		})
		names := creatorsOf(of[0], partitions, 2)
		hanging, beside := names[0], names[1]
		elsewhere := creatorsOf(of[1], partitions, 1)[0]
		r.publishOne(hanging, "send", "hang-1")
		r.eventually(time.Minute, "it hangs", func() bool { return len(r.called(hanging)) == 1 })
		stopped := time.Now()
		var waiting sync.WaitGroup
		waiting.Go(stopFirst)
		defer waiting.Wait()
		time.Sleep(10 * time.Millisecond)
		for _, name := range []string{beside, elsewhere} {
			r.publishOne(name, "send", name)
		}
		r.publishOne(hanging, "send", "other-1")
		for name, limit := range map[string]time.Duration{elsewhere: 2 * time.Second, beside: 6 * time.Second} {
			r.await(time.Minute, "RESULTS", "results."+name+".>", 1)
			if waited := r.called(name)[0].Sub(stopped); waited > limit {
				t.Errorf("%s waits %v", name, waited)
			}
		}
		// Its creator is not called by two workers at once.
		r.await(time.Minute, "RESULTS", "results."+hanging+".>", 1)
		if waited := r.called(hanging)[1].Sub(stopped); waited < 20*time.Second {
			t.Errorf("the hanging creator is called again after %v", waited)
		}
	})
}

// Where all calls are slow no creator is slower than the others: all of the worker is used.
func TestSlowAPIHasTheWholeWorker(t *testing.T) {
	for _, latency := range []time.Duration{900 * time.Millisecond, 1500 * time.Millisecond, 5 * time.Second} {
		t.Run(latency.String(), func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				const creators, requests, inFlight = 100, 20, 64
				r := newRig(t, func(c *Config) {
					c.Gates.InFlight = inFlight
				})
				r.api = func(ctx context.Context, _ *publisher.Request) classify.Answer {
					sleep(ctx, latency)
					return ok()
				}
				for n := range creators {
					r.publish(fmt.Sprintf("c%d", n), requests)
				}
				began := time.Now()
				_, stop := r.work()
				defer stop()
				r.await(time.Hour, "RESULTS", "results.>", creators*requests)
				possible := time.Duration(creators*requests/inFlight) * latency
				took := time.Since(began)
				t.Logf("%v, %v is possible", took.Round(time.Second), possible)
				if took > possible*12/10+2*latency {
					t.Errorf("all in %v, %v is possible", took, possible)
				}
			})
		})
	}
}

// Requests that were removed from the stream are forgotten, and hide none that the server does not
// deliver.
func TestPurgedRequestsAreForgotten(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Topology.Partitions = 1 })
		holds := r.bucket("HOLDS")
		if _, err := holds.PutString(t.Context(), "creator.alice", "30m"); err != nil {
			t.Fatal(err)
		}
		w, stop := r.work()
		defer stop()
		r.publish("alice", 500)
		r.eventually(time.Minute, "all are set aside", func() bool {
			y, _ := w.Why("alice")
			return y.Parked == 500
		})
		s, err := r.js.Stream(t.Context(), "REQUESTS")
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Purge(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(40 * time.Minute)
		y, known := w.Why("alice")
		if !known || y.Parked+y.Waiting != 0 || y.Reason != "" {
			t.Errorf("%v %+v", known, y)
		}
		if y, known := w.WhyRequest("alice-3"); known {
			t.Errorf("%+v", y)
		}
		// And it goes on.
		r.publishOne("alice", "send", "alice-later")
		r.await(time.Minute, "RESULTS", "results.alice.>", 1)
	})
}

// The same for a creator that has a rate, and is called when they are removed.
func TestPurgeOfABacklog(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) {
			c.Topology.Partitions = 1
			c.Gates.Creator.Rate = resilience.Rate{PerSecond: 1, Burst: 1}
		})
		w, stop := r.work()
		defer stop()
		r.publish("alice", 500)
		time.Sleep(20 * time.Second)
		s, err := r.js.Stream(t.Context(), "REQUESTS")
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Purge(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		before := len(r.called("alice"))
		time.Sleep(20 * time.Minute)
		y, known := w.Why("alice")
		if !known || y.Parked+y.Waiting != 0 || y.Reason != "" {
			t.Errorf("%v %+v", known, y)
		}
		if n := len(r.called("alice")) - before; n > 0 {
			t.Errorf("%d calls of requests that were removed a minute before", n)
		}
		r.publishOne("alice", "send", "alice-later")
		r.eventually(time.Minute, "the next one is called", func() bool { return r.count("REQUESTS", ">") == 0 })
	})
}

// A consumer that is deleted and made again under a running worker counts deliveries from one.
// That is noticed: what has its outcome is not called again, and the worker goes on soon.
func TestConsumerMadeAgainUnderAWorker(t *testing.T) {
	for _, gone := range []time.Duration{0, 100 * time.Millisecond, 3 * time.Second, time.Minute} {
		for _, idle := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v, %v", gone, idle), func(t *testing.T) { madeAgain(t, gone, idle) })
		}
	}
}

func madeAgain(t *testing.T, gone time.Duration, idle bool) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Topology.Partitions = 1 })
		holds := r.bucket("HOLDS")
		_, stop := r.work()
		defer stop()
		r.publish("bob", 30)
		r.await(time.Minute, "RESULTS", "results.bob.>", 30)
		if _, err := holds.PutString(t.Context(), "account", "24h"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute) // it pulls nothing
		r.publish("alice", 20)
		// Half of them have a result, and the acks got lost.
		p := publisher.New(r.js, r.cfg.Topology)
		for n := range 10 {
			if _, err := p.Result(t.Context(), publisher.Result{RequestID: fmt.Sprintf("alice-%d", n), Creator: "alice", Operation: "send", Status: 200}); err != nil {
				t.Fatal(err)
			}
		}
		release := func() {
			if err := holds.Delete(t.Context(), "account"); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.js.DeleteConsumer(t.Context(), "REQUESTS", publisher.ConsumerName(0)); err != nil {
			t.Fatal(err)
		}
		if !idle { // it asks for messages while the consumer is away
			release()
		}
		time.Sleep(gone)
		if _, err := r.cfg.Topology.Ensure(t.Context(), r.js); err != nil {
			t.Fatal(err)
		}
		made := time.Now()
		if idle {
			time.Sleep(time.Second)
			release()
		}
		r.empty(5 * time.Minute)
		if waited := time.Since(made); waited > 15*time.Second {
			t.Errorf("the worker goes on after %v", waited)
		}
		if n := len(r.called("alice")); n != 10 {
			t.Errorf("%d calls, 10 of 20 had their result", n)
		}
		r.once("alice", 20)
	})
}

// Two requests of one id wait at once. One of them is called, and the other gets no outcome
// of its own.
func TestTwoLiveRequestsOfOneID(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, unsafe)
		r.api = func(ctx context.Context, _ *publisher.Request) classify.Answer {
			sleep(ctx, 3*time.Second)
			return ok()
		}
		holds := r.bucket("HOLDS")
		if _, err := holds.PutString(t.Context(), "creator.alice", "1h"); err != nil {
			t.Fatal(err)
		}
		_, stop := r.work()
		defer stop()
		r.publishOne("alice", "pay", "pay-1")
		r.forgetIDs()
		r.publishOne("alice", "pay", "pay-1")
		time.Sleep(time.Minute)
		if err := holds.Delete(t.Context(), "creator.alice"); err != nil {
			t.Fatal(err)
		}
		r.empty(10 * time.Minute)
		r.expect("alice", map[string]int{"result": 1})
		if n := len(r.called("alice")); n != 1 {
			t.Errorf("%d calls", n)
		}
	})
}

// A creator has one gate, also while the sweeper forgets creators whose request is being looked up.
func TestOneGateForACreator(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		const creators, requests = 10, 30
		r, b := newRigWithBroker(t, func(c *Config) {
			unsafe(c)
			c.Topology.Partitions = 1
			c.Gates.Creator.Concurrency = 1
		})
		r.expireLeases()
		var mu sync.Mutex
		now, most := map[string]int{}, 0
		r.api = func(ctx context.Context, req *publisher.Request) classify.Answer {
			mu.Lock()
			now[req.Creator]++
			most = max(most, now[req.Creator])
			mu.Unlock()
			sleep(ctx, 200*time.Millisecond)
			mu.Lock()
			now[req.Creator]--
			mu.Unlock()
			return ok()
		}
		l := r.lineTo(b)
		l.delay = func() time.Duration { return 50 * time.Millisecond }
		w, stop, _ := r.workOn(l, "w1")
		defer stop()
		done := make(chan struct{})
		defer close(done)
		go func() {
			for {
				select {
				case <-done:
					return
				case <-time.After(7 * time.Millisecond):
					w.partitions[0].sweep(time.Now())
				}
			}
		}()
		for n := range creators * requests {
			r.publishOne(fmt.Sprintf("c%d", n%creators), "pay", fmt.Sprintf("r-%d", n))
			if n%(2*creators) == 0 {
				time.Sleep(700 * time.Millisecond) // and they are idle
			}
		}
		r.empty(10 * time.Minute)
		if most != 1 {
			t.Errorf("%d calls of one creator at once", most)
		}
		for n := range creators {
			r.once(fmt.Sprintf("c%d", n), requests)
		}
	})
}

// A request is POISON after three workers vanished while they called it, and not after two because an
// earlier worker had stopped or vanished before.
func TestOlderCrashesDoNotCount(t *testing.T) {
	for _, before := range []string{"stopped long ago", "crashed before"} {
		t.Run(before, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				r, b := newRigWithBroker(t, func(c *Config) { c.Topology.Partitions = 2 })
				r.expireLeases()
				var crash func()
				var mu sync.Mutex
				crashed := make(chan struct{}, 10)
				r.api = func(ctx context.Context, req *publisher.Request) classify.Answer {
					if req.ID != "poison" {
						return ok()
					}
					mu.Lock()
					end := crash
					mu.Unlock()
					end()
					crashed <- struct{}{}
					sleep(ctx, time.Hour)
					return ok()
				}
				start := func(name string) (stop func()) {
					_, stop, end := r.workOn(r.lineTo(b), name)
					mu.Lock()
					crash = end
					mu.Unlock()
					return stop
				}
				stop := start("w0")
				r.publish("alice", 5)
				r.await(time.Minute, "RESULTS", "results.alice.>", 5)
				if before == "crashed before" {
					crash()
				} else {
					stop()
				}
				time.Sleep(time.Minute)
				start("w1")
				time.Sleep(time.Minute)
				r.publishOne("alice", "send", "poison")
				for n := 2; ; n++ {
					select {
					case <-crashed:
						start(fmt.Sprintf("w%d", n))
						continue
					case <-time.After(5 * time.Minute):
					}
					break
				}
				if n := len(r.called("alice")) - 5; n != poisonous {
					t.Errorf("POISON after %d calls, want %d", n, poisonous)
				}
				if got := r.outcomes("alice"); got["POISON"] != 1 {
					t.Errorf("%v", got)
				}
			})
		})
	}
}

// A suspect that waits until another one has been called is told, and so is a request with a
// long id.
func TestWhySuspectsAndLongIDs(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r, b := newRigWithBroker(t, func(c *Config) { c.Topology.Partitions = 1 })
		r.expireLeases()
		r.api = func(ctx context.Context, _ *publisher.Request) classify.Answer {
			sleep(ctx, time.Hour)
			return ok()
		}
		r.cfg.Grace = 0
		called := func() int { return len(r.called("alice")) + len(r.called("bob")) + len(r.called("carol")) }
		for n, creator := range []string{"alice", "bob", "carol"} {
			r.publishOne(creator, "send", fmt.Sprintf("s-%d", n))
		}
		for n := range 2 {
			_, _, crash := r.workOn(r.lineTo(b), fmt.Sprintf("w%d", n))
			r.eventually(5*time.Minute, "they are called", func() bool { return called() >= 3*n+1 })
			time.Sleep(10 * time.Second)
			crash()
			time.Sleep(20 * time.Second)
		}
		w, stop, _ := r.workOn(r.lineTo(b), "last")
		defer stop()
		time.Sleep(2 * time.Minute)
		reasons := map[resilience.Reason]int{}
		for n := range 3 {
			y, known := w.WhyRequest(fmt.Sprintf("s-%d", n))
			if !known {
				t.Errorf("s-%d is not known", n)
			}
			reasons[y.Reason]++
			if of, _ := w.Why(y.Creator); of.Reason != y.Reason {
				t.Errorf("%s: %q, its creator: %q", y.Creator, y.Reason, of.Reason)
			}
		}
		t.Logf("%v after %d calls", reasons, called())
		if reasons[reasonSuspect] < 1 {
			t.Errorf("no suspect waits: %v", reasons)
		}
		long := strings.Repeat("long-", 60)
		if _, err := r.bucket("HOLDS").PutString(t.Context(), "creator.dave", "1h"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second) // the worker knows of it
		m := nats.NewMsg("requests.dave.send")
		m.Header.Set(nats.MsgIdHdr, long)
		if _, err := r.js.PublishMsg(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		for _, id := range []string{long, publisher.IDToken(long)} {
			if y, known := w.WhyRequest(id); !known || y.Reason != resilience.ReasonHold {
				t.Errorf("%v %+v", known, y)
			}
		}
	})
}
