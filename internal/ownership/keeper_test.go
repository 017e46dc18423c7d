package ownership

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
)

// When a worker stops, each partition is released when its own calls are over; that of a call
// that hangs after two seconds, and its next owner does not call the creator meanwhile.
func TestStopWithAHangingCall(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 8)
		r.expire()
		a := r.start("a")
		r.all(5*time.Second, a)
		b := r.start("b")
		r.balanced(10*time.Second, a, b)
		mine := a.owned()
		hangs, slow := mine[0], mine[1]
		if !a.parts[hangs].begin("hangs") || !a.parts[slow].begin("slow") {
			t.Fatal("no call")
		}
		a.begin()
		took := eventually(t, time.Second, "the others are released", func() bool { return len(b.owned()) == 6 })
		t.Logf("the partitions without calls moved within %v", took)
		time.Sleep(time.Second)
		a.parts[slow].end("slow")
		eventually(t, 500*time.Millisecond, "the slow call's is released", func() bool { return b.parts[slow].isActive() })
		if b.parts[hangs].isActive() {
			t.Error("the hanging call was not waited for")
		}
		eventually(t, 2*time.Second, "the hanging call's is released", func() bool { return b.parts[hangs].isActive() })
		if got := b.parts[hangs].befores()[0]; got.Crashed || !got.Owned || !slices.Equal(got.Calling, []string{"hangs"}) {
			t.Errorf("the next owner entered with %+v", got)
		}
		if a.Lease(hangs).Valid(time.Now()) || b.parts[hangs].begin("hangs") {
			t.Error("called by two")
		}
		if !b.parts[hangs].begin("other") {
			t.Error("another creator of the partition cannot be called")
		}
		b.parts[hangs].end("other")
		time.Sleep(time.Minute) // it is repeated as long as the call lasts
		if b.parts[hangs].begin("hangs") {
			t.Error("called by two, after a minute")
		}
		a.parts[hangs].end("hangs")
		eventually(t, time.Second, "the creator may be called", func() bool { return b.parts[hangs].begin("hangs") })
		b.parts[hangs].end("hangs")
		a.stop()
		if n := a.parts[hangs].early; n > 0 {
			t.Error("it was told who is called while a call could still start")
		}
	})
}

// A new owner learns from the stream's leader which creators are still called, however late its watch is.
func TestCallsThatTheWatchDoesNotTell(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 2)
		r.expire()
		const calls = `{"worker":"former","creators":["alice"]}`
		r.put("calling.1.former", calls)
		a := r.start("a", func(c *Config) { c.KV = deaf{c.KV} })
		r.all(5*time.Second, a)
		if got := a.parts[1].befores()[0]; !slices.Equal(got.Calling, []string{"alice"}) {
			t.Errorf("entered with %+v", got)
		}
		for range 20 {
			time.Sleep(3 * time.Second)
			r.put("calling.1.former", calls)
			if got := a.parts[1].stillCalled(); !slices.Equal(got, []string{"alice"}) {
				t.Fatalf("still called: %q", got)
			}
		}
		eventually(t, 30*time.Second, "the calls are over", func() bool { return a.parts[1].stillCalled() == nil })
		a.stop()
	})
}

// A worker that joins gets its share without waiting for a call that hangs. If the former owner dies
// while it calls, that counts no more either.
func TestHandOverWithAHangingCall(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 8)
		r.expire()
		a := r.start("a")
		r.all(5*time.Second, a)
		for n := range r.partitions {
			a.parts[n].begin(fmt.Sprint("creator-\u00fc.-", n)) // which is no subject token as it is
		}
		b := r.start("b")
		took := r.balanced(handOverWait+2*time.Second, a, b)
		t.Logf("balanced within %v", took)
		for _, n := range b.owned() {
			creator := fmt.Sprint("creator-\u00fc.-", n)
			if got := b.parts[n].stillCalled(); !slices.Equal(got, []string{creator}) {
				t.Errorf("partition %d: still called: %q", n, got)
			}
			if a.parts[n].begin("new") {
				t.Errorf("partition %d: the former owner starts a call", n)
			}
		}
		for _, n := range a.owned() {
			if got := a.parts[n].stillCalled(); got != nil {
				t.Errorf("partition %d: still called: %q", n, got)
			}
		}
		// The third owner knows of the first one's call as well.
		c := r.start("c")
		r.balanced(10*time.Second, a, b, c)
		for _, n := range c.owned() {
			if got := c.parts[n].stillCalled(); !slices.Equal(got, []string{fmt.Sprint("creator-\u00fc.-", n)}) {
				t.Errorf("partition %d at its third owner: still called: %q", n, got)
			}
		}
		a.kill()
		eventually(t, 30*time.Second, "the dead worker's calls count no more", func() bool {
			for _, w := range []*worker{b, c} {
				for _, n := range w.owned() {
					if w.parts[n].stillCalled() != nil {
						return false
					}
				}
			}
			return len(b.owned())+len(c.owned()) == r.partitions
		})
	})
}

// A worker that is killed is replaced, and its partitions are those of a crash; those of one that
// stops are not, however long no worker runs.
func TestCrashedOrReleased(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 4)
		r.expire()
		enters := func(name string, want Before) *worker {
			t.Helper()
			w := r.start(name, func(c *Config) { c.Delivered = func(context.Context, int) bool { return true } })
			r.all(30*time.Second, w)
			for _, p := range w.parts {
				if got := p.befores()[0]; got.Owned != want.Owned || got.Crashed != want.Crashed {
					t.Errorf("%s, partition %d: %+v, want %+v", name, p.n, got, want)
				}
			}
			return w
		}
		a := r.start("a")
		r.all(5*time.Second, a)
		a.stop()
		time.Sleep(time.Minute)
		enters("b", Before{Owned: true}).kill()
		c := enters("c", Before{Owned: true, Crashed: true})
		c.stop()
		time.Sleep(publisher.OwnerMarker)
		enters("d", Before{}).stop()
	})
}

// One partition that cannot be entered costs the others nothing, is named once, and is entered as
// soon as it can be. How its owner before went is not forgotten.
func TestOneCannotBeEntered(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 4)
		r.expire()
		a := r.start("a")
		r.all(5*time.Second, a)
		a.kill()
		time.Sleep(10 * time.Second)
		missing := errors.New("consumer partition-2 is missing: run `headgate setup`")
		fails := func(w *worker) *worker { w.parts[2].fail.Store(&missing); return w }
		b := fails(r.start("b"))
		eventually(t, 10*time.Second, "the others are owned", func() bool { return slices.Equal(b.owned(), []int{0, 1, 3}) })
		time.Sleep(time.Minute)
		if n := r.log.count("its messages cannot be taken"); n != 1 {
			t.Errorf("said %d times", n)
		}
		if got := b.Troubles(); len(got) != 1 || got[2] != missing.Error() {
			t.Errorf("troubles: %v", got)
		}
		if err := b.Ready(); err != nil {
			t.Errorf("not ready: %v", err)
		}
		if b.parts[2].left == 0 {
			t.Error("it was not told to leave after its error")
		}
		b.stop() // it never entered
		c := fails(r.start("c"))
		eventually(t, 10*time.Second, "the others are owned", func() bool { return slices.Equal(c.owned(), []int{0, 1, 3}) })
		time.Sleep(time.Minute)
		c.parts[2].fail.Store(nil)
		r.all(retryMost+time.Second, c)
		if got := c.parts[2].befores()[0]; !got.Crashed {
			t.Errorf("partition 2: %+v", got)
		}
		if got := c.parts[0].befores()[0]; got.Crashed {
			t.Errorf("partition 0: %+v", got)
		}
		if got := c.Troubles(); len(got) != 0 {
			t.Errorf("troubles: %v", got)
		}
	})
}

// BeforeEnter comes after the claims and before the first Enter, once for all.
func TestBeforeEnter(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 16)
		var w *worker
		started := make(chan struct{})
		asked, early, unclaimed := 0, 0, 0
		fails := errors.New("HOLDS cannot be read")
		w = r.start("a", func(c *Config) {
			c.BeforeEnter = func(context.Context) error {
				if asked++; asked == 1 {
					return fails
				}
				<-started
				early += len(w.owned())
				for n := range r.partitions {
					if !w.Lease(n).Claimed() {
						unclaimed++
					}
				}
				return nil
			}
		})
		close(started)
		r.all(10*time.Second, w)
		if asked != 2 || early != 0 || unclaimed != 0 {
			t.Errorf("asked %d times; %d were entered before, %d not claimed", asked, early, unclaimed)
		}
		w.stop()
	})
}

// Ready names the trouble, also of a worker that owns nothing.
func TestReady(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 1)
		r.expire()
		a, b := r.start("a"), r.start("b")
		r.all(5*time.Second, a, b)
		ready := func(w *worker, want string) {
			t.Helper()
			if err := w.Ready(); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q", w.cfg.Name, err, want)
			}
		}
		ready(a, "")
		ready(b, "")
		if a.Members() != 2 {
			t.Errorf("%d workers", a.Members())
		}
		r.deleteBucket()
		time.Sleep(2 * r.ttl)
		ready(a, "have not been renewed lately")
		ready(b, "have not been renewed lately")
		r.makeBucket()
		time.Sleep(2 * r.ttl)
		ready(a, "")
		ready(b, "")
		a.stop()
		ready(a, "stopping")
	})
}

// A lease in the name of another worker names it in the log.
func TestLostToAnother(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 4)
		r.expire()
		a := r.start("a")
		r.all(5*time.Second, a)
		a.parts[1].begin("called")
		r.put("partition.1", `{"worker":"thief","since":"2026-11-24T00:00:00Z"}`)
		eventually(t, time.Second, "it is left", func() bool { return !a.parts[1].isActive() && !a.Lease(1).Valid(time.Now()) })
		if n := r.log.count(`"owner":"thief"`); n != 1 || r.log.count("has not been heard of") != 1 {
			t.Errorf("the owner is named %d times", n)
		}
		// Its calls are told all the same, and it does not come back before they are over.
		eventually(t, time.Second, "its calls are told", func() bool { m := r.last("calling.1.a"); return m != nil && !m.marks() })
		time.Sleep(time.Minute)
		if a.parts[1].isActive() {
			t.Error("entered while a call of an earlier time is in flight")
		}
		a.parts[1].end("called")
		r.all(5*time.Second, a)
		if m := r.last("calling.1.a"); m != nil && !m.marks() {
			t.Error("it still says that it calls")
		}
		a.stop()
	})
}

// A partition with a call of an earlier time is left to others.
func TestNotIdle(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 2)
		r.expire()
		a := r.start("a")
		a.parts[1].busy.Store(true)
		time.Sleep(time.Minute)
		if got := a.owned(); !slices.Equal(got, []int{0}) {
			t.Errorf("it owns %v", got)
		}
		b := r.start("b")
		r.all(10*time.Second, a, b)
		if !b.parts[1].isActive() {
			t.Error("the other worker does not own it")
		}
	})
}

// A thousand partitions on a slow line are kept by one worker, and the bucket is read through its leader.
func TestManyPartitions(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 1024)
		direct := 0
		if _, err := r.nc.Subscribe("$JS.API.DIRECT.GET.>", func(*nats.Msg) { direct++ }); err != nil {
			t.Fatal(err)
		}
		w := r.start("a", func(c *Config) { c.KV = &weak{KeyValue: c.KV, delay: 100 * time.Millisecond} })
		took := r.all(10*time.Second, w)
		t.Logf("all owned after %v", took)
		for range 40 {
			time.Sleep(time.Second)
			for n := range r.partitions {
				if !w.Lease(n).Valid(time.Now()) {
					t.Fatalf("the lease of partition %d is over", n)
				}
			}
		}
		w.stop()
		if direct > 0 {
			t.Errorf("%d direct gets", direct)
		}
	})
}

// Owners leaves out what no worker wrote.
func TestOwners(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 4)
		a := r.start("a")
		r.all(5*time.Second, a)
		r.put("partition.7", `{"worker":"gone","since":"2026-11-24T00:00:00Z"}`)
		r.put("partition.8", `{"stream":"REQUESTS","seq":1}`)
		r.put("worker.x", `{"stream":"REQUESTS","seq":1}`)
		owners, err := Owners(t.Context(), r.kv)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, o := range owners {
			got = append(got, fmt.Sprint(o.Worker, " ", o.Partitions, " ", o.Since.IsZero()))
		}
		if want := "a [0 1 2 3] false, gone [7] true"; strings.Join(got, ", ") != want {
			t.Errorf("%v, want %v", got, want)
		}
		a.stop()
	})
}

// Workers come, go and die at random, with calls that hang: no creator is ever called by two, and
// all partitions are owned soon after.
func TestNeverTwo(t *testing.T) {
	for seed := range 4 {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) { comeAndGo(t, uint64(seed)) })
		})
	}
}
