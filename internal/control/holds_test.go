package control

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

var theAlice = Target{Creator: "alice"}

// A shorter hold by hand shortens nothing that the API asked for, not even after a restart.
func TestTwoAuthorities(t *testing.T) {
	simulate(t, func(r *rig) {
		w := r.start().ready(t)
		if err := w.h.Put(r.ctx, theAlice, until(6*time.Hour, "RATE_LIMIT")); err != nil {
			t.Fatal(err)
		}
		r.put(bucketHolds, "creator.alice", "1m")
		within(t, time.Second, "people's hold is obeyed, too", func() bool {
			_, there := w.h.Of("alice", ByPeople)
			return there
		})
		if got := left(w.h.Held(theAlice, time.Now())); got != 6*time.Hour {
			t.Errorf("held for %v", got)
		}
		w.stop()
		w = r.start().ready(t)
		if got := left(w.held(theAlice)); got != 6*time.Hour {
			t.Errorf("after a restart held for %v", got)
		}
		// The minute is over: its key goes, and releases nothing else.
		time.Sleep(2 * time.Minute)
		if _, err := r.kv(bucketHolds).Get(r.ctx, "creator.alice"); err == nil {
			t.Error("a hold that is over stays in the bucket")
		}
		if got := left(w.held(theAlice)).Round(time.Minute); got != 6*time.Hour-2*time.Minute {
			t.Errorf("held for %v", got)
		}
	})
}

// What servers and services answer can be made to land in the bucket. It destroys nothing.
func TestGarbageDestroysNothing(t *testing.T) {
	for _, by := range []Authority{ByPeople, ByAPI} {
		t.Run(side(by), func(t *testing.T) {
			simulate(t, func(r *rig) {
				if _, err := r.js.CreateStream(r.ctx, jetstream.StreamConfig{Name: "REQUESTS", Subjects: []string{"requests.>"}}); err != nil {
					t.Fatal(err)
				}
				w := r.start().ready(t)
				if by == ByAPI {
					if err := w.h.Put(r.ctx, theAlice, until(6*time.Hour, "RATE_LIMIT")); err != nil {
						t.Fatal(err)
					}
				} else if err := r.desk().Hold(r.ctx, theAlice, until(6*time.Hour, "she asked for it")); err != nil {
					t.Fatal(err)
				}
				within(t, time.Second, "held", func() bool { return left(w.held(theAlice)) == 6*time.Hour })
				for _, key := range []string{alice(by), "account", "creator.eve", "provider.api"} {
					// The server answers with a PubAck, with rights of its own.
					if err := r.nc.PublishMsg(&nats.Msg{Subject: "requests.eve.get", Reply: "$KV.HOLDS." + key, Data: []byte("{}")}); err != nil {
						t.Fatal(err)
					}
				}
				within(t, time.Second, "reported", func() bool { return w.log.count("cannot read this hold") == 4 })
				for _, target := range []Target{{Kind: Account}, {Kind: Provider}, {Creator: "eve"}} {
					if h := w.held(target); h != nil {
						t.Errorf("%v is held: %+v", target, h)
					}
				}
				if got := left(w.held(theAlice)); got != 6*time.Hour {
					t.Errorf("held for %v", got)
				}
				within(t, 10*time.Second, "it stands in the bucket again", func() bool { h := r.stored(alice(by)); return h != nil && left(h) > 5*time.Hour })
				w.stop()
				if w = r.start().ready(t); left(w.held(theAlice)).Round(time.Minute) != 6*time.Hour {
					t.Errorf("after a restart held for %v", left(w.held(theAlice)))
				}
			})
		})
	}
}

// Of two holds by the API the longer one stays, in whatever order they are stored.
func TestPutLongestWins(t *testing.T) {
	simulate(t, func(r *rig) {
		a, b := r.start().ready(t), r.start().ready(t)
		for i, d := range []time.Duration{time.Hour, 3 * time.Hour, 2 * time.Hour, time.Minute} {
			w := a
			if i%2 == 1 {
				w = b
			}
			if err := w.h.Put(r.ctx, theAlice, until(d, fmt.Sprint(d))); err != nil {
				t.Fatal(err)
			}
		}
		var all []func() error
		for i, d := range []time.Duration{5, 9, 7, 3, 8} {
			w := []*worker{a, b}[i%2]
			all = append(all, func() error { return w.h.Put(r.ctx, Target{Kind: Account}, until(d*time.Hour, "x")) })
		}
		done := make(chan error)
		for _, f := range all {
			go func() { done <- f() }()
		}
		for range all {
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
		if h := r.stored(alice(ByAPI)); left(h) != 3*time.Hour {
			t.Errorf("stored for %v", left(h))
		}
		if h := r.stored("account.api"); left(h) != 9*time.Hour {
			t.Errorf("the account's is stored for %v", left(h))
		}
		for _, w := range []*worker{a, b} {
			within(t, time.Second, "known everywhere", func() bool {
				return left(w.held(theAlice)) == 3*time.Hour && left(w.held(Target{Kind: Account})) == 9*time.Hour
			})
		}
	})
}

// A hold that cannot be stored is known at once, and stored as soon as that is possible.
func TestPutIsRetried(t *testing.T) {
	simulate(t, func(r *rig) {
		r.drop(bucketHolds)
		w := r.start()
		short, cancel := context.WithTimeout(r.ctx, time.Second)
		defer cancel()
		if err := w.h.Put(short, theAlice, until(time.Hour, "RATE_LIMIT")); err == nil {
			t.Fatal("stored nowhere")
		}
		if left(w.held(theAlice)) != time.Hour || left(w.h.Held(theAlice, time.Now())) != time.Hour {
			t.Error("not held")
		}
		time.Sleep(time.Minute)
		if n := w.log.count("bucket HOLDS is missing: run `headgate setup`"); n < 5 || n > 8 {
			t.Errorf("said %d times in a minute that the bucket is missing: %s", n, w.log)
		}
		r.setup()
		within(t, 10*time.Second, "stored", func() bool { return r.stored(alice(ByAPI)) != nil })
		other := r.start().ready(t)
		if left(other.held(theAlice)) == 0 {
			t.Error("the other workers do not know")
		}
	})
}

// News that are late, or doubled, end nothing that is newer.
func TestLateNews(t *testing.T) {
	r := newRig(t)
	w := r.start().ready(t)
	h := w.h
	entry := func(revision uint64, value string) {
		h.turn.Lock()
		defer h.turn.Unlock()
		e := Entry{Key: "creator.alice", Revision: revision, Value: []byte(value), Created: time.Now()}
		if value == "" {
			e.Operation = jetstream.KeyValueDelete
		}
		h.apply(e)
	}
	entry(100, "1h")
	entry(90, "")
	entry(95, "1m")
	if got := left(w.held(theAlice)); got != time.Hour {
		t.Errorf("held for %v", got)
	}
	entry(101, "1m") // people shorten theirs
	if got := left(w.held(theAlice)); got != time.Minute {
		t.Errorf("held for %v", got)
	}
	entry(102, "2020-01-01T00:00:00Z") // and end it by a time that is over
	if h := w.held(theAlice); h != nil {
		t.Errorf("held: %+v", h)
	}
}

// What is not stored yet is newer than any news of the bucket.
func TestUnsavedOutlivesARelease(t *testing.T) {
	r := newRig(t)
	w := r.start().ready(t)
	short, cancel := context.WithCancel(r.ctx)
	cancel()
	if err := w.h.Put(short, theAlice, until(time.Hour, "RATE_LIMIT")); err == nil {
		t.Fatal("stored")
	}
	w.h.turn.Lock()
	w.h.apply(Entry{Key: alice(ByAPI), Revision: 100, Operation: jetstream.KeyValueDelete})
	w.h.turn.Unlock()
	if _, there := w.h.Of("alice", ByAPI); !there || w.held(theAlice) == nil {
		t.Error("released")
	}
}

// A shorter hold of another worker's does not replace one that is not stored yet.
func TestUnsavedAndLonger(t *testing.T) {
	simulate(t, func(r *rig) {
		w, other := r.start().ready(t), r.start().ready(t)
		short, cancel := context.WithCancel(r.ctx)
		cancel()
		if err := w.h.Put(short, theAlice, until(6*time.Hour, "RATE_LIMIT")); err == nil {
			t.Fatal("stored")
		}
		if err := other.h.Put(r.ctx, theAlice, until(time.Hour, "RATE_LIMIT")); err != nil {
			t.Fatal(err)
		}
		within(t, 10*time.Second, "the longer one is stored", func() bool { return left(r.stored(alice(ByAPI))).Round(time.Minute) == 6*time.Hour })
		within(t, time.Second, "known everywhere", func() bool {
			return left(w.held(theAlice)).Round(time.Minute) == 6*time.Hour && left(other.held(theAlice)).Round(time.Minute) == 6*time.Hour
		})
	})
}

// An answer that comes after a release counts, even if its worker has not heard of the release;
// one from before it does not.
func TestPutAfterARelease(t *testing.T) {
	simulate(t, func(r *rig) {
		var deaf atomic.Int32
		w := r.startOn(deafJS{r.js, &deaf}, nil).ready(t)
		put := func(d time.Duration) {
			t.Helper()
			if err := w.h.Put(r.ctx, theAlice, until(d, "RATE_LIMIT")); err != nil {
				t.Fatal(err)
			}
		}
		for _, after := range []bool{true, false} {
			put(6 * time.Hour)
			if !after {
				put(time.Hour)
			}
			if err := w.h.WaitCurrent(r.ctx); err != nil {
				t.Fatal(err)
			}
			deaf.Store(lags)
			time.Sleep(time.Second)
			if _, err := r.desk().Release(r.ctx, theAlice, true, "bob"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
			want := time.Duration(0)
			if after {
				want = time.Hour
				put(want)
			}
			within(t, 10*time.Second, "as the answers say", func() bool {
				return left(w.held(theAlice)).Round(time.Minute) == want && left(r.stored(alice(ByAPI))).Round(time.Minute) == want
			})
			deaf.Store(0)
			if _, err := r.desk().Release(r.ctx, theAlice, true, "bob"); err != nil {
				t.Fatal(err)
			}
			within(t, 10*time.Second, "released", func() bool { return w.held(theAlice) == nil })
		}
	})
}

// What was lost with its bucket is not written over a release that is not known here yet.
func TestWriteBackRespectsARelease(t *testing.T) {
	r := newRig(t)
	kv := r.kv(bucketHolds)
	var deaf atomic.Int32
	w := r.startOn(deafJS{r.js, &deaf}, nil).ready(t)
	for _, by := range []Authority{ByPeople, ByAPI} {
		r.put(bucketHolds, alice(by), "1h")
	}
	if err := w.h.WaitCurrent(r.ctx); err != nil {
		t.Fatal(err)
	}
	deaf.Store(lags)
	w.h.turn.Lock() // nothing is applied meanwhile
	for _, by := range []Authority{ByPeople, ByAPI} {
		if err := kv.Delete(r.ctx, alice(by)); err != nil {
			t.Fatal(err)
		}
	}
	w.h.known.begin(true)
	w.h.turn.Unlock()
	for _, by := range []Authority{ByPeople, ByAPI} {
		if wrote, err := w.h.store(r.ctx, alice(by)); wrote || err != nil || r.stored(alice(by)) != nil {
			t.Errorf("%s: wrote %v, %v", side(by), wrote, err)
		}
	}
}

// A release of the API's hold, and a shorter one right after it, may come as one entry: the
// bucket keeps only the last.
func TestReleaseIsOverwritten(t *testing.T) {
	simulate(t, func(r *rig) {
		var deaf atomic.Int32
		w := r.startOn(deafJS{r.js, &deaf}, nil).ready(t)
		if err := w.h.Put(r.ctx, theAlice, until(6*time.Hour, "RATE_LIMIT")); err != nil {
			t.Fatal(err)
		}
		other := r.start().ready(t)
		deaf.Store(lags)
		if _, err := r.desk().Release(r.ctx, theAlice, true, "bob"); err != nil {
			t.Fatal(err)
		}
		within(t, time.Second, "released", func() bool { return other.held(theAlice) == nil })
		if err := other.h.Put(r.ctx, theAlice, until(time.Hour, "RATE_LIMIT")); err != nil {
			t.Fatal(err)
		}
		if err := w.h.WaitCurrent(r.ctx); err != nil {
			t.Fatal(err)
		}
		within(t, time.Second, "the shorter one counts", func() bool {
			return left(w.held(theAlice)) == time.Hour && left(w.h.Held(theAlice, time.Now())) == time.Hour
		})
	})
}

// In a bucket that was made again, a shorter hold says nothing about the longer one, even if
// it comes by the old watch.
func TestShorterInAYoungBucket(t *testing.T) {
	simulate(t, func(r *rig) {
		w := r.startOn(r.js, func(string) bool { return false }).ready(t)
		if err := w.h.Put(r.ctx, theAlice, until(6*time.Hour, "RATE_LIMIT")); err != nil {
			t.Fatal(err)
		}
		if err := w.h.WaitCurrent(r.ctx); err != nil {
			t.Fatal(err)
		}
		r.drop(bucketHolds)
		time.Sleep(time.Millisecond)
		r.setup()
		for range 3 { // by other workers; the old sequences are lower
			r.put(bucketHolds, alice(ByAPI), "1h")
			time.Sleep(500 * time.Millisecond)
		}
		w.h.turn.Lock()
		w.h.apply(Entry{Key: alice(ByAPI), Revision: 3, Value: []byte("1h"), Created: time.Now()})
		w.h.turn.Unlock()
		for range 100 {
			if got := left(w.held(theAlice)).Round(time.Minute); got != 6*time.Hour {
				t.Fatalf("held for %v", got)
			}
			time.Sleep(200 * time.Millisecond)
		}
		if got := left(r.stored(alice(ByAPI))).Round(time.Minute); got != 6*time.Hour {
			t.Errorf("stored for %v", got)
		}
	})
}

// slowJS answers each write after a millisecond.
type slowJS struct{ jetstream.JetStream }

type slowKV struct{ jetstream.KeyValue }

func (s slowJS) KeyValue(ctx context.Context, bucket string) (jetstream.KeyValue, error) {
	kv, err := s.JetStream.KeyValue(ctx, bucket)
	return slowKV{kv}, err
}

func (s slowKV) Purge(ctx context.Context, key string, opts ...jetstream.KVDeleteOpt) error {
	time.Sleep(time.Millisecond)
	return s.KeyValue.Purge(ctx, key, opts...)
}

// Ten thousand holds end at once: they are deleted within seconds, and nothing waits for it.
func TestExpireMany(t *testing.T) {
	const n = 10_000
	simulate(t, func(r *rig) {
		kv := r.kv(bucketHolds)
		for i := range n {
			if _, err := r.js.PublishAsync(fmt.Sprintf("$KV.HOLDS.creator.c%d.api", i), []byte("60s")); err != nil {
				t.Fatal(err)
			}
		}
		<-r.js.PublishAsyncComplete()
		w := r.startOn(slowJS{r.js}, nil).ready(t)
		time.Sleep(time.Minute + expireAfter + expireEvery)
		slowest := time.Duration(0)
		began := time.Now()
		for {
			at := time.Now()
			if err := w.h.Put(r.ctx, theAlice, until(time.Hour+time.Since(began), "RATE_LIMIT")); err != nil {
				t.Fatal(err)
			}
			slowest = max(slowest, time.Since(at))
			keys, err := kv.Keys(r.ctx)
			if err != nil {
				t.Fatal(err)
			}
			if len(keys) == 1 {
				break
			}
			if time.Since(began) > 10*time.Second {
				t.Fatalf("%d holds that are over are left", len(keys)-1)
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Logf("%d holds deleted within %v; meanwhile a Put took %v at most", n, time.Since(began), slowest)
		if slowest > time.Second {
			t.Errorf("a hold waited %v for those that are over", slowest)
		}
		within(t, time.Second, "all are told of", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return len(w.changes) >= n })
		if w.held(Target{Creator: "c5"}) != nil || w.log.count("error") != 0 {
			t.Error(w.log)
		}
		if slices.ContainsFunc(w.calls, func(call string) bool { return strings.HasPrefix(call, "release") }) {
			t.Error("what is over by itself was released")
		}
	})
}

// Only the owner deletes, and a worker that does not own a creator keeps nothing of it for ever.
func TestExpireIsTheOwners(t *testing.T) {
	simulate(t, func(r *rig) {
		var mine atomic.Bool
		w := r.startOn(r.js, func(string) bool { return mine.Load() }).ready(t)
		r.put(bucketHolds, "creator.alice", "30s")
		r.put(bucketHolds, "account", "30s")
		time.Sleep(2 * time.Minute)
		keys, err := r.kv(bucketHolds).Keys(r.ctx)
		if err != nil || !slices.Equal(keys, []string{"creator.alice"}) {
			t.Errorf("%q, %v", keys, err)
		}
		mine.Store(true)
		within(t, 10*time.Second, "deleted by the new owner", func() bool { _, err := r.kv(bucketHolds).Get(r.ctx, "creator.alice"); return err != nil })
		within(t, 10*time.Second, "forgotten", func() bool { _, there := w.h.Of("alice", ByPeople); return !there })
	})
}

// Every hold has a beginning and an end that are told, with the one who did it.
func TestChanges(t *testing.T) {
	simulate(t, func(r *rig) {
		owner := r.start().ready(t)
		other := r.startOn(r.js, func(string) bool { return false }).ready(t)
		desk := r.desk()
		h := until(10*time.Second, "x")
		h.Who = "bob"
		step := func(what string, want ...string) {
			t.Helper()
			within(t, 30*time.Second, what, func() bool { return len(owner.told()) >= len(want) })
			if got := owner.told(); !reflect.DeepEqual(got, want) {
				t.Fatalf("%s: %q, want %q", what, got, want)
			}
			owner.mu.Lock()
			owner.changes = nil
			owner.mu.Unlock()
		}
		if err := desk.Hold(r.ctx, theAlice, h); err != nil {
			t.Fatal(err)
		}
		step("by headgate", "held alice by people, bob")
		step("its end", "expired alice by people, bob")
		time.Sleep(10 * time.Second)
		r.put(bucketHolds, "creator.alice", "1h")
		step("by hand", "held alice by people, operator")
		if _, err := desk.Release(r.ctx, theAlice, false, "bob\r\nX: y"); err != nil {
			t.Fatal(err)
		}
		step("its release", "released alice by people, bobX: y")
		r.put(bucketHolds, "account", "1h")
		step("the account", "held the account by people, operator")
		if err := r.kv(bucketHolds).Delete(r.ctx, "account"); err != nil {
			t.Fatal(err)
		}
		step("its release by hand", "released the account by people, ")
		if err := owner.h.Put(r.ctx, theAlice, until(20*time.Second, "RATE_LIMIT")); err != nil {
			t.Fatal(err)
		}
		step("the API's", "held alice by the API, w1")
		step("the API's end", "expired alice by the API, w1")
		r.put(bucketHolds, "creator.alice", "1h")
		step("one that outlives the worker", "held alice by people, operator")
		time.Sleep(10 * time.Minute) // EVENTS would take it for another one
		owner.stop()
		again := r.start().ready(t)
		time.Sleep(time.Minute)
		if got := again.told(); len(got) != 0 {
			t.Errorf("told again after a restart: %q", got)
		}
		// Of the account every worker tells, in the same words.
		if got := other.told(); !reflect.DeepEqual(got, []string{"held the account by people, operator", "released the account by people, "}) {
			t.Errorf("the other worker told %q", got)
		}
	})
}
