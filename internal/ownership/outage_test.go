package ownership

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
)

// A lease may still be valid although OWNERS does not have it any more.
func TestOwnerOutOfSight(t *testing.T) {
	garbage := func(r *rig) { r.put("partition.0", "garbage") }
	for name, c := range map[string]struct{ hide, again func(*rig) }{
		"hidden by a foreign value": {garbage, garbage},
		"in the bucket before":      {func(r *rig) { r.deleteBucket(); r.makeBucket() }, func(*rig) {}},
	} {
		t.Run(name, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				r := newRig(t, 1)
				r.expire()
				hidden := r.lease("cut off", 0)
				claim(t, hidden)
				end := time.Now().Add(r.ttl)
				c.hide(r)
				w := r.start("a", func(c *Config) { c.Delivered = func(context.Context, int) bool { return true } })
				for time.Now().Before(end.Add(5 * time.Second)) {
					c.again(r)
					if hidden.Valid(time.Now()) && w.Lease(0).Valid(time.Now()) {
						t.Fatal("two owners")
					}
					time.Sleep(300 * time.Millisecond)
				}
				r.all(5*time.Second, w)
				w.stop()
			})
		})
	}
}

func another(t *testing.T, b *natsservertest.Broker, again time.Duration) (*nats.Conn, jetstream.JetStream, jetstream.KeyValue) {
	t.Helper()
	nc := dial(t, b, again)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	kv, err := js.KeyValue(t.Context(), publisher.Owners)
	if err != nil {
		t.Fatal(err)
	}
	return nc, js, kv
}

// After an outage of all workers the first one that is back does not take everything.
func TestFirstAfterAnOutage(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		broker := natsservertest.NewBroker(t)
		r := &rig{t: t, partitions: 16, ttl: 10 * time.Second}
		r.connect(dial(t, broker, 100*time.Millisecond))
		r.expire()
		a := r.start("a")
		nc, js, kv := another(t, broker, 2*time.Second)
		b := r.start("b", func(c *Config) { c.NC, c.JS, c.KV = nc, js, kv })
		r.balanced(10*time.Second, a, b)
		broker.Stop()
		time.Sleep(time.Minute)
		broker.Start()
		back := time.Now()
		for range 200 {
			time.Sleep(100 * time.Millisecond)
			now, n := time.Now(), 0
			for _, p := range a.parts {
				if a.Lease(p.n).Valid(now) {
					n++
				}
			}
			if n > r.partitions/2 {
				t.Fatalf("it has %d of %d partitions %v after the start", n, r.partitions, time.Since(back))
			}
		}
		r.balanced(time.Second, a, b)
	})
}

// A bucket that was deleted and made again is followed from its start: all partitions are owned
// soon, by one worker each, and nothing is said to be another worker's.
func TestBucketMadeAgain(t *testing.T) {
	for name, away := range map[string]time.Duration{"at once": 0, "after a while": 7 * time.Second, "after an outage": time.Minute} {
		t.Run(name, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				r := newRig(t, 16)
				r.expire()
				a, b := r.start("a"), r.start("b")
				r.balanced(10*time.Second, a, b)
				time.Sleep(time.Minute) // sequences grow
				r.deleteBucket()
				time.Sleep(away)
				r.makeBucket()
				for range 300 {
					time.Sleep(100 * time.Millisecond)
					for n := range r.partitions {
						if now := time.Now(); a.Lease(n).Valid(now) && b.Lease(n).Valid(now) {
							t.Fatalf("partition %d has two owners", n)
						}
					}
				}
				r.balanced(time.Second, a, b)
				now := time.Now()
				for n := range r.partitions {
					if !a.Lease(n).Valid(now) && !b.Lease(n).Valid(now) {
						t.Errorf("partition %d: its lease is over", n)
					}
				}
				if n := r.log.count("lost to another worker"); n > 0 {
					t.Errorf("lost to another worker, %d times", n)
				}
				// What comes now is heard of.
				c := r.start("c")
				r.balanced(10*time.Second, a, b, c)
				for _, w := range []*worker{a, b, c} {
					w.stop()
				}
			})
		})
	}
}

// A lease that ran out while the server could not be reached is no other worker's.
func TestLapsed(t *testing.T) {
	for name, c := range map[string]struct {
		away time.Duration
		left bool
		back time.Duration
	}{
		"shortly":      {14 * time.Second, false, 1100 * time.Millisecond}, // with the connection
		"a long while": {time.Minute, true, 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				broker := natsservertest.NewBroker(t)
				r := &rig{t: t, partitions: 4, ttl: 10 * time.Second}
				r.connect(dial(t, broker, 100*time.Millisecond)) // what has expired goes first
				r.expire()
				nc, js, kv := another(t, broker, time.Second)
				w := r.start("a", func(c *Config) { c.NC, c.JS, c.KV = nc, js, kv })
				r.all(5*time.Second, w)
				if err := w.Ready(); err != nil {
					t.Errorf("not ready: %v", err)
				}
				broker.Stop()
				time.Sleep(c.away)
				if w.Lease(0).Valid(time.Now()) {
					t.Error("still valid")
				}
				if err := w.Ready(); err == nil {
					t.Error("ready without the server")
				}
				broker.Start()
				eventually(t, c.back, "all leases are valid", func() bool {
					for n := range r.partitions {
						if !w.Lease(n).Valid(time.Now()) || !w.parts[n].isActive() {
							return false
						}
					}
					return true
				})
				if n := r.log.count("lost to another worker"); n > 0 {
					t.Errorf("lost to another worker, %d times", n)
				}
				if got := w.parts[0].leaves > 0; got != c.left {
					t.Errorf("left %v, want %v", got, c.left)
				}
				w.stop()
			})
		})
	}
}
