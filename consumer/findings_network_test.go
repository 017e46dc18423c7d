package consumer

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
)

// A server's answers get lost. What was written all the same is known to be the worker's own: no
// request that was called and answered, or that was never called, is UNCERTAIN.
func TestLostAnswersMakeNothingUncertain(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		const creators, requests = 10, 15
		r, b := newRigWithBroker(t, unsafe)
		r.expireLeases()
		random := rand.New(rand.NewPCG(7, 7))
		var mu sync.Mutex
		l := r.lineTo(b)
		l.loses = func() bool {
			mu.Lock()
			defer mu.Unlock()
			return random.IntN(6) == 0
		}
		_, stop, _ := r.workOn(l, "w1")
		defer stop()
		for n := range creators * requests {
			r.publishOne(fmt.Sprintf("c%d", n%creators), "pay", fmt.Sprintf("r-%d", n))
		}
		r.empty(2 * time.Hour)
		for n := range creators {
			name := fmt.Sprintf("c%d", n)
			r.expect(name, map[string]int{"result": requests})
			if n := len(r.called(name)); n != requests {
				t.Errorf("%s: %d calls", name, n)
			}
		}
	})
}

// An answer that is in hand while the broker is away is stored when it is back, also if the lease
// lapsed.
func TestAnswerInHandDuringAnOutage(t *testing.T) {
	for _, away := range []time.Duration{12 * time.Second, 40 * time.Second, 5 * time.Minute} {
		t.Run(away.String(), func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				r, b := newRigWithBroker(t, unsafe)
				r.expireLeases()
				r.api = func(ctx context.Context, _ *publisher.Request) classify.Answer {
					sleep(ctx, 2*time.Second)
					return ok()
				}
				_, stop, _ := r.workOn(r.lineTo(b), "w1")
				defer stop()
				r.publishOne("alice", "pay", "pay-1")
				r.publishOne("bob", "send", "send-1")
				r.eventually(time.Minute, "both are called", func() bool { return len(r.called("alice"))+len(r.called("bob")) == 2 })
				b.Stop()
				time.Sleep(away)
				b.Start()
				r.eventually(time.Minute, "the connection", r.nc.IsConnected)
				r.empty(2 * time.Minute)
				for _, name := range []string{"alice", "bob"} {
					r.expect(name, map[string]int{"result": 1})
					if n := len(r.called(name)); n != 1 {
						t.Errorf("%s: %d calls", name, n)
					}
				}
			})
		})
	}
}

// The broker's disk is full: leases lapse, too. Answers that are in hand are stored when there is room.
func TestAnswerInHandWhileTheStoreIsFull(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		const creators = 20
		r := newRigOn(t, natsservertest.ConnectWithStore(t, 4<<20), func(c *Config) {
			unsafe(c)
			c.Topology.Partitions = 2
		})
		r.expireLeases()
		answered := make(chan struct{})
		r.api = func(ctx context.Context, _ *publisher.Request) classify.Answer {
			<-answered
			return ok()
		}
		_, stop := r.work()
		defer stop()
		for n := range creators {
			r.publishOne(fmt.Sprintf("c%d", n), []string{"pay", "send"}[n%2], fmt.Sprintf("r-%d", n))
		}
		calls := func() (n int) {
			for i := range creators {
				n += len(r.called(fmt.Sprintf("c%d", i)))
			}
			return n
		}
		r.eventually(time.Minute, "all are called", func() bool { return calls() == creators })
		if _, err := r.js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "FILL", Subjects: []string{"fill"}}); err != nil {
			t.Fatal(err)
		}
		for size := 512 << 10; size > 0; size /= 4 {
			for n := 0; n < 1000; n++ {
				if _, err := r.js.Publish(t.Context(), "fill", make([]byte, size)); err != nil {
					break
				}
			}
		}
		close(answered)
		time.Sleep(40 * time.Second)
		if n := r.count("RESULTS", ">"); n > 0 {
			t.Fatalf("the disk is not full: %d results", n)
		}
		if err := r.js.DeleteStream(t.Context(), "FILL"); err != nil {
			t.Fatal(err)
		}
		r.empty(2 * time.Minute)
		for n := range creators {
			r.expect(fmt.Sprintf("c%d", n), map[string]int{"result": 1})
		}
		if n := calls(); n != creators {
			t.Errorf("%d calls for %d requests", n, creators)
		}
	})
}

// A worker that was cut off while it called has an answer in hand that comes too late: its request has
// its outcome from the next owner, and gets no second one.
func TestLateAnswer(t *testing.T) {
	for operation, want := range map[string]string{"pay": "UNCERTAIN", "send": "VALIDATION"} {
		t.Run(operation, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				r, b := newRigWithBroker(t, unsafe)
				r.expireLeases()
				answered := make(chan struct{})
				var calls atomic.Int64
				r.api = func(context.Context, *publisher.Request) classify.Answer {
					if calls.Add(1) == 1 {
						<-answered
						return ok()
					}
					return answer(422)
				}
				l := r.lineTo(b)
				_, stopFirst, _ := r.workOn(l, "first")
				r.publishOne("alice", operation, "r-1")
				r.eventually(time.Minute, "it is called", func() bool { return len(r.called("alice")) == 1 })
				l.freeze()
				_, stopSecond, _ := r.workOn(r.lineTo(b), "second")
				r.await(10*time.Minute, "DLQ", "dlq."+want+".alice.>", 1)
				l.thaw()
				close(answered)
				time.Sleep(time.Minute)
				r.expect("alice", map[string]int{want: 1})
				r.empty(time.Minute)
				stopFirst()
				stopSecond()
				if n := len(r.messages("RESULTS", "results.alice.>")); n != 1 {
					t.Errorf("%d outcomes in the request's place", n)
				}
			})
		})
	}
}

// slowLine is a network that carries so many bytes a second to the broker.
type slowLine struct {
	*line0
	perSecond int
	mu        sync.Mutex
	sent      int
}

func (l *slowLine) InProcessConn() (net.Conn, error) {
	c, err := l.line0.InProcessConn()
	if err != nil {
		return nil, err
	}
	return &slowConn{lineConn: c.(*lineConn), line: l}, nil
}

type slowConn struct {
	*lineConn
	line *slowLine
	free time.Time
}

func (c *slowConn) Write(b []byte) (int, error) {
	c.line.mu.Lock()
	defer c.line.mu.Unlock()
	c.line.sent += len(b)
	if now := time.Now(); c.free.Before(now) {
		c.free = now
	}
	if c.settled() {
		c.free = c.free.Add(time.Duration(len(b)) * time.Second / time.Duration(c.line.perSecond))
	}
	if !c.out.put(bytes.Clone(b), c.free) {
		return 0, net.ErrClosed
	}
	return len(b), nil
}

// A large answer that takes longer to upload than one attempt to store may take is stored, and
// uploaded once.
func TestSlowUpload(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		const size = 10 << 20
		r, b := newRigWithBroker(t, nil)
		r.expireLeases()
		body := bytes.Repeat([]byte("0123456789abcdef"), size/16)
		r.api = func(context.Context, *publisher.Request) classify.Answer {
			a := ok()
			a.Body = body
			return a
		}
		l := &slowLine{line0: r.lineTo(b), perSecond: 1200 << 10}
		before := r.nc
		r.nc = dial(t, l)
		_, stop := r.work("w1")
		r.nc = before
		defer stop()
		time.Sleep(2 * time.Second)
		r.publish("alice", 1)
		r.empty(2 * time.Minute)
		r.expect("alice", map[string]int{"result": 1})
		l.mu.Lock()
		defer l.mu.Unlock()
		if len(r.called("alice")) != 1 || l.sent > size*3/2 {
			t.Errorf("%d calls, %d bytes were sent", len(r.called("alice")), l.sent)
		}
	})
}

// A hold that comes while a call is being marked forbids the call, whatever its beginning.
func TestHoldAfterTheMark(t *testing.T) {
	const oneWay = 400 * time.Millisecond
	for _, key := range []string{"creator.alice", "account", "provider"} {
		t.Run(key, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				r, b := newRigWithBroker(t, unsafe)
				r.expireLeases()
				l := r.lineTo(b)
				l.delay = func() time.Duration { return oneWay }
				w, stop, _ := r.workOn(l, "w1")
				defer stop()
				holds := r.bucket("HOLDS")
				time.Sleep(20 * time.Second)
				stopped := 0
				for n := range 30 {
					id := fmt.Sprintf("pay-%d", n)
					calls := len(r.called("alice"))
					r.publishOne("alice", "pay", id)
					time.Sleep(time.Duration(n) * 137 * time.Millisecond)
					value := fmt.Sprintf(`{"since":%q,"reason":"people"}`, time.Now().Add(-time.Hour).UTC().Format(time.RFC3339))
					if _, err := holds.PutString(t.Context(), key, value); err != nil {
						t.Fatal(err)
					}
					known := time.Now().Add(oneWay + time.Millisecond)
					time.Sleep(5 * time.Second)
					all := r.called("alice")
					if len(all) == calls {
						stopped++
					} else if at := all[len(all)-1]; at.After(known) {
						t.Errorf("after %v: called %v after the hold was known", time.Duration(n)*137*time.Millisecond, at.Sub(known))
					}
					if err := holds.Delete(t.Context(), key); err != nil {
						t.Fatal(err)
					}
					released := time.Now()
					for r.count("REQUESTS", ">") > 0 {
						if time.Since(released) > 10*time.Second {
							y, _ := w.Why("alice")
							t.Fatalf("it does not go on: %+v", y)
						}
						time.Sleep(100 * time.Millisecond)
					}
				}
				t.Logf("%d of 30 were stopped", stopped)
				if stopped < 5 || stopped == 30 {
					t.Errorf("%d of 30 were stopped", stopped)
				}
				r.expect("alice", map[string]int{"result": 30})
			})
		})
	}
}
