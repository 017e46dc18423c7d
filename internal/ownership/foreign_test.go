package ownership

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
)

// Values that no worker wrote do not keep partitions from their owners.
func TestForeignValues(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 8)
		r.expire()
		const answer = `{"stream":"REQUESTS","seq":1}`
		for n := range r.partitions {
			r.put(fmt.Sprint("partition.", n), answer)
		}
		for _, key := range []string{"worker.x", "worker.=zz", "worker.y", "partition.x", "partition.08", "partition.999", "calling.1.x", "calling", "other"} {
			r.put(key, answer)
		}
		r.put("worker.y", `{"worker":"x","pid":1,"since":"2026-11-24T00:00:00Z"}`)
		a := r.start("a")
		// Without a hint at an earlier owner they are free.
		took := r.all(patience, a)
		t.Logf("all owned after %v", took)
		if n := a.Members(); n != 1 {
			t.Errorf("%d workers", n)
		}
		lost := false
		for range 20 {
			for n := range r.partitions {
				r.put(fmt.Sprint("partition.", n), answer)
				r.put("worker.a", "garbage")
			}
			time.Sleep(3 * time.Second)
			for n := range r.partitions {
				lost = lost || !a.Lease(n).Valid(time.Now())
			}
		}
		for _, p := range a.parts {
			lost = lost || p.leaves > 0
		}
		if lost {
			t.Error("a partition was lost to a foreign value")
		}
		if n := r.log.count("lost to another worker"); n > 0 {
			t.Errorf("lost to another worker, %d times", n)
		}
		for _, key := range []string{"partition.0", "worker.x", "other"} {
			if n := r.log.count(fmt.Sprintf(`"key":%q`, key)); n != 1 {
				t.Errorf("%s is reported %d times", key, n)
			}
		}
		a.stop()
	})
}

// Workers that come and go without end do not keep free partitions from being claimed.
func TestNeverQuiet(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 16)
		r.expire()
		a, b := r.start("a"), r.start("b")
		r.balanced(10*time.Second, a, b)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			for n := 0; ctx.Err() == nil; n++ {
				name := fmt.Sprint("ghost-", n)
				r.put("worker."+name, fmt.Sprintf(`{"worker":%q,"pid":1,"since":"2026-11-24T00:00:00Z"}`, name))
				wait(ctx, 400*time.Millisecond)
			}
		}()
		time.Sleep(20 * time.Second)
		if len(a.owned())+len(b.owned()) != r.partitions {
			t.Errorf("%v and %v are owned while ghosts come and go", a.owned(), b.owned())
		}
		a.kill()
		took := r.all(r.ttl+2*patience, b)
		t.Logf("replaced after %v", took)
		cancel()
		<-done
	})
}

// A name that is alive and claims nothing does not keep partitions from being served.
func TestOwnerThatDoesNotClaim(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 8)
		r.expire()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			for ctx.Err() == nil {
				r.put("worker.idle", `{"worker":"idle","pid":1,"since":"2026-11-24T00:00:00Z"}`)
				wait(ctx, 3*time.Second)
			}
		}()
		a := r.start("a")
		took := r.all(patience+5*time.Second, a)
		t.Logf("all owned after %v", took)
		time.Sleep(keepFor / 2)
		for _, p := range a.parts {
			if p.leaves > 0 {
				t.Errorf("partition %d is handed over and taken back", p.n)
			}
		}
		cancel()
		<-done
		a.stop()
	})
}
