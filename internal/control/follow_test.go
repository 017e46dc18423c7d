package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
)

// A bucket that is deleted and made again is followed from its start, and what the workers
// know of the old one is in it again.
func TestBucketIsMadeAnew(t *testing.T) {
	for name, away := range map[string]time.Duration{"at once": time.Millisecond, "after a moment": 2 * time.Second, "after a minute": time.Minute} {
		t.Run(name, func(t *testing.T) {
			simulate(t, func(r *rig) {
				for i := range 50 { // so that the old sequences are higher than the new ones
					r.put(bucketHolds, fmt.Sprintf("creator.c%d", i), "1s")
					r.put(bucketLimits, fmt.Sprintf("creator.c%d", i), "9/m")
				}
				w := r.startOn(r.js, func(c string) bool { return c != "others" }).ready(t)
				other := r.startOn(r.js, func(c string) bool { return c == "others" }).ready(t)
				r.put(bucketHolds, "creator.alice", "2h")
				r.put(bucketHolds, "creator.others", "2h")
				r.put(bucketHolds, "account", "1h")
				r.put(bucketLimits, "creator.alice", "6/m")
				if err := w.h.Put(r.ctx, theAlice, until(6*time.Hour, "RATE_LIMIT")); err != nil {
					t.Fatal(err)
				}
				within(t, 20*time.Second, "all is known", func() bool {
					return left(other.held(theAlice)) == 6*time.Hour && w.limit("alice").PerSecond == 0.1 && left(w.held(Target{Kind: Account})) == time.Hour
				})
				r.drop(bucketHolds)
				r.drop(bucketLimits)
				time.Sleep(away)
				r.setup()
				r.put(bucketHolds, "creator.bob", "1h")
				r.put(bucketLimits, "creator.bob", "12/m")
				within(t, 15*time.Second, "the new bucket is followed", func() bool {
					return w.held(Target{Creator: "bob"}) != nil && other.held(Target{Creator: "bob"}) != nil && w.limit("bob").PerSecond == 0.2
				})
				within(t, 15*time.Second, "what it lacked is in it", func() bool {
					for _, key := range []string{"creator.alice", "creator.alice.api", "creator.others", "account"} {
						if r.stored(key) == nil {
							return false
						}
					}
					entry, err := r.kv(bucketLimits).Get(r.ctx, "creator.alice")
					return err == nil && string(entry.Value()) == "6/m"
				})
				if left(w.held(theAlice)) == 0 || w.limit("alice").PerSecond != 0.1 {
					t.Error("what was in force is not")
				}
				if w.log.count("holds were written back") != 1 || w.log.count("creators were written back") != 1 || other.log.count("holds were written back") != 1 {
					t.Errorf("the logs say\n%s\n%s", w.log, other.log)
				}
				w.stop()
				r.afterARenewal(other)
			})
		})
	}
}

// afterARenewal looks whether a new worker knows alice's hold, and releases it.
func (r *rig) afterARenewal(other *worker) {
	t := r.t
	t.Helper()
	w := r.start().ready(t)
	if got := left(w.held(theAlice)).Round(time.Minute); got < 6*time.Hour-2*time.Minute {
		t.Errorf("after a restart held for %v", got)
	}
	// A release counts in the new bucket as it did in the old one.
	if _, err := r.desk().Release(r.ctx, theAlice, true, "bob"); err != nil {
		t.Fatal(err)
	}
	within(t, time.Second, "released", func() bool { return w.held(theAlice) == nil && other.held(theAlice) == nil })
	time.Sleep(time.Minute)
	if h := r.stored("creator.alice.api"); h != nil || w.held(theAlice) != nil {
		t.Error("it came back")
	}
}

// What was released in the new bucket, before the workers noticed it, is not written back.
func TestReleasedInTheNewBucket(t *testing.T) {
	simulate(t, func(r *rig) {
		var mine atomic.Bool
		w := r.startOn(r.js, func(string) bool { return mine.Load() }).ready(t)
		r.put(bucketHolds, "creator.alice", "2h")
		r.put(bucketLimits, "creator.alice", "6/m")
		within(t, time.Second, "known", func() bool { return w.held(theAlice) != nil && w.limit("alice").PerSecond == 0.1 })
		r.drop(bucketHolds)
		r.drop(bucketLimits)
		time.Sleep(time.Millisecond)
		r.setup()
		for _, bucket := range []string{bucketHolds, bucketLimits} {
			if err := r.kv(bucket).Delete(r.ctx, "creator.alice"); err != nil {
				t.Fatal(err)
			}
		}
		mine.Store(true)
		within(t, 10*time.Second, "released", func() bool { return w.held(theAlice) == nil && w.limit("alice") == usual })
		time.Sleep(10 * time.Second)
		if keys, err := r.kv(bucketHolds).Keys(r.ctx); !errors.Is(err, jetstream.ErrNoKeysFound) {
			t.Errorf("%q, %v", keys, err)
		}
	})
}

// What was erased without a trace while a worker did not look is forgotten.
func TestErasedWithoutATrace(t *testing.T) {
	simulate(t, func(r *rig) {
		var deaf atomic.Int32
		w := r.startOn(deafJS{r.js, &deaf}, nil).ready(t)
		r.put(bucketHolds, "creator.alice", `{"reason":"no end"}`)
		within(t, time.Second, "held", func() bool { return w.held(theAlice) != nil })
		st, err := r.js.Stream(r.ctx, "KV_HOLDS")
		if err != nil {
			t.Fatal(err)
		}
		deaf.Store(ends)
		if err := st.Purge(r.ctx, jetstream.WithPurgeSubject("$KV.HOLDS.creator.alice")); err != nil {
			t.Fatal(err)
		}
		r.put(bucketHolds, "creator.bob", "1h")
		within(t, 10*time.Second, "watched again", func() bool { return w.held(Target{Creator: "bob"}) != nil })
		time.Sleep(time.Second)
		if w.held(theAlice) != nil || w.held(Target{Creator: "bob"}) == nil {
			t.Error("wrong")
		}
	})
}

// Limits count at once, also by hand; garbage changes nothing.
func TestLimitsAreLive(t *testing.T) {
	simulate(t, func(r *rig) {
		r.put(bucketLimits, "creator.early", "30/m")
		w := r.start().ready(t)
		if got := w.limit("early").PerSecond; got != 0.5 {
			t.Errorf("limits that were there: %v", got)
		}
		r.put(bucketLimits, "creator.alice", `{"rate":"6/m","concurrency":1}`)
		within(t, time.Second, "obeyed", func() bool { l := w.limit("alice"); return l.PerSecond == 0.1 && l.Concurrency == 1 })
		if l, there := w.l.Of("alice"); !there || l.Concurrency != 1 {
			t.Errorf("%+v", l)
		}
		r.put(bucketLimits, "creator.alice", `{"stream":"REQUESTS","seq":1}`)
		r.put(bucketLimits, "creator.bob", "fast")
		r.put(bucketLimits, "bob", "1/s")
		within(t, time.Second, "reported", func() bool {
			return w.log.count("cannot read these limits") == 2 && w.log.count("a key of LIMITS is") == 1
		})
		if l := w.limit("alice"); l.PerSecond != 0.1 {
			t.Errorf("%+v", l)
		}
		within(t, 10*time.Second, "it stands in the bucket again", func() bool {
			e, err := r.kv(bucketLimits).Get(r.ctx, "creator.alice")
			return err == nil && string(e.Value()) == `{"rate":"6/m","concurrency":1}`
		})
		if err := r.kv(bucketLimits).Delete(r.ctx, "creator.alice"); err != nil {
			t.Fatal(err)
		}
		within(t, time.Second, "the usual limits", func() bool { return w.limit("alice") == usual })
		if _, there := w.l.Of("alice"); there {
			t.Error("still special")
		}
	})
}

// deafJS watches a replica that lags, or once ends the watch at its next news.
type deafJS struct {
	jetstream.JetStream
	deaf *atomic.Int32
}

const (
	lags = 1
	ends = 2
)

type deafKV struct {
	jetstream.KeyValue
	deaf *atomic.Int32
}

type deafWatcher struct {
	jetstream.KeyWatcher
	updates chan jetstream.KeyValueEntry
}

func (d deafJS) KeyValue(ctx context.Context, bucket string) (jetstream.KeyValue, error) {
	kv, err := d.JetStream.KeyValue(ctx, bucket)
	return deafKV{kv, d.deaf}, err
}

func (d deafKV) WatchAll(ctx context.Context, opts ...jetstream.WatchOpt) (jetstream.KeyWatcher, error) {
	w, err := d.KeyValue.WatchAll(ctx, opts...)
	if err != nil {
		return nil, err
	}
	dw := deafWatcher{w, make(chan jetstream.KeyValueEntry)}
	go func() {
		defer close(dw.updates)
		for e := range w.Updates() {
			switch {
			case d.deaf.Load() == lags:
				continue
			case d.deaf.CompareAndSwap(ends, 0):
				stop(w)
				return
			}
			select {
			case dw.updates <- e:
			case <-ctx.Done():
				return
			}
		}
	}()
	return dw, nil
}

func (w deafWatcher) Updates() <-chan jetstream.KeyValueEntry { return w.updates }

// A worker that takes a partition over knows what was stored until then, even if its watch
// sits on a replica that lags.
func TestWaitCurrent(t *testing.T) {
	simulate(t, func(r *rig) {
		var deaf atomic.Int32
		w := r.startOn(deafJS{r.js, &deaf}, nil).ready(t)
		former := r.start().ready(t)
		deaf.Store(lags)
		for i := range 20 {
			target := Target{Creator: fmt.Sprintf("c%d", i)}
			if err := former.h.Put(r.ctx, target, until(time.Hour, "RATE_LIMIT")); err != nil {
				t.Fatal(err)
			}
			if err := w.h.WaitCurrent(r.ctx); err != nil {
				t.Fatal(err)
			}
			if _, held := w.h.Of(target.Creator, ByAPI); !held || w.held(target) == nil {
				t.Fatalf("%v's hold is not known", target)
			}
		}
		// A release, and a last message that is gone.
		if _, err := r.desk().Release(r.ctx, Target{Creator: "c3"}, true, "bob"); err != nil {
			t.Fatal(err)
		}
		r.put(bucketHolds, "creator.gone", "1h")
		st, err := r.js.Stream(r.ctx, "KV_HOLDS")
		if err != nil {
			t.Fatal(err)
		}
		if err := st.Purge(r.ctx, jetstream.WithPurgeSubject("$KV.HOLDS.creator.gone")); err != nil {
			t.Fatal(err)
		}
		if err := w.h.WaitCurrent(r.ctx); err != nil || w.held(Target{Creator: "c3"}) != nil {
			t.Errorf("%v, %+v", err, w.held(Target{Creator: "c3"}))
		}
		// What nobody asks for comes all the same.
		r.put(bucketHolds, "creator.late", "1h")
		within(t, 3*lookEvery, "the leader was asked", func() bool { return w.held(Target{Creator: "late"}) != nil })
		r.put(bucketLimits, "creator.late", "6/m")
		if err := w.l.WaitCurrent(r.ctx); err != nil || w.limit("late").PerSecond != 0.1 {
			t.Errorf("%v, %+v", err, w.limit("late"))
		}
	})
}

// A bucket that was made again is current only when it has been read anew.
func TestWaitCurrentOfANewBucket(t *testing.T) {
	simulate(t, func(r *rig) {
		for i := range 20 {
			r.put(bucketHolds, fmt.Sprintf("creator.c%d", i), "1h")
		}
		w := r.start().ready(t)
		r.drop(bucketHolds)
		time.Sleep(time.Millisecond)
		r.setup()
		r.put(bucketHolds, "creator.bob", "1h")
		began := time.Now()
		if err := w.h.WaitCurrent(r.ctx); err != nil || w.held(Target{Creator: "bob"}) == nil {
			t.Errorf("%v, %+v", err, w.held(Target{Creator: "bob"}))
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("it took %v: %s", took, w.log)
		}
		r.drop(bucketHolds)
		short, cancel := context.WithTimeout(r.ctx, 20*time.Second)
		defer cancel()
		if err := w.h.WaitCurrent(short); err == nil {
			t.Error("a bucket that is missing is current")
		}
	})
}

// Feeds begin, apply and end their listings in order, whatever happens to the bucket.
func TestFollow(t *testing.T) {
	simulate(t, func(r *rig) {
		var log []string
		ctx, cancel := context.WithCancel(r.ctx)
		done := make(chan struct{})
		r.put(bucketHolds, "a", "1")
		go func() {
			defer close(done)
			Follow(ctx, r.js, bucketHolds, Feed{
				Begin: func(renewed bool) { log = append(log, fmt.Sprint("begin ", renewed)) },
				Apply: func(e Entry) {
					log = append(log, fmt.Sprintf("%s=%s%s", e.Key, e.Value, map[bool]string{true: "gone"}[e.Operation != jetstream.KeyValuePut]))
				},
				Listed: func() { log = append(log, "listed") },
			})
		}()
		time.Sleep(time.Second)
		r.put(bucketHolds, "b", "2")
		time.Sleep(time.Second)
		if err := r.kv(bucketHolds).Delete(r.ctx, "a"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		r.drop(bucketHolds)
		time.Sleep(time.Millisecond)
		r.setup()
		r.put(bucketHolds, "c", "3")
		time.Sleep(10 * time.Second)
		cancel()
		<-done
		want := []string{"begin false", "a=1", "listed", "b=2", "a=gone", "begin true", "c=3", "listed"}
		if !slices.Equal(log, want) {
			t.Errorf("%q, want %q", log, want)
		}
	})
}

// A worker outlives its server, and looks at the bucket when it is back.
func TestFollowOverARestart(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		b := natsservertest.NewBroker(t)
		r := newRigOn(t, b)
		r.put(bucketHolds, "creator.alice", "1h")
		w := r.start().ready(t)
		b.Stop()
		time.Sleep(time.Minute)
		if left(w.held(theAlice)).Round(time.Minute) != 59*time.Minute {
			t.Error("forgotten")
		}
		if err := w.h.WaitCurrent(t.Context()); err == nil {
			t.Error("current without a server")
		}
		b.Start()
		within(t, 30*time.Second, "connected", r.nc.IsConnected)
		within(t, 30*time.Second, "followed again", func() bool {
			_, err := r.js.Publish(r.ctx, "$KV.HOLDS.creator.bob", []byte("1h"))
			return err == nil && w.held(Target{Creator: "bob"}) != nil
		})
		if w.log.count("made anew") != 0 {
			t.Errorf("the same bucket is said to be another:\n%s", w.log)
		}
		w.stop()
		r.nc.Close()
	})
}
