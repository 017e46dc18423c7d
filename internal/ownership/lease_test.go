package ownership

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
)

func mayAlways(*message) error { return nil }

func claim(t *testing.T, l *Lease) *message {
	t.Helper()
	found, err := l.claim(t.Context(), mayAlways)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func dial(t *testing.T, b *natsservertest.Broker, again time.Duration) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect("", nats.InProcessServer(b), nats.ReconnectBufSize(-1), nats.MaxReconnects(-1),
		nats.ReconnectWait(again), nats.ReconnectJitter(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// The last message of a partition's key tells how its owner went.
func TestBefore(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		crashed := Before{Owned: true, Crashed: true}
		for name, c := range map[string]struct {
			goes      func(*rig, *Lease) error
			delivered bool
			want      Before
		}{
			"released":                    {goes: func(r *rig, l *Lease) error { return l.release(r.t.Context(), false) }, want: Before{Owned: true}},
			"released, crashed before":    {goes: func(r *rig, l *Lease) error { return l.release(r.t.Context(), true) }, want: crashed},
			"released by an older worker": {goes: func(r *rig, l *Lease) error { return r.kv.Delete(r.t.Context(), l.key) }, want: Before{Owned: true}},
			"by hand":                     {goes: func(r *rig, l *Lease) error { return r.kv.Purge(r.t.Context(), l.key) }, want: crashed},
			"expired":                     {goes: func(r *rig, l *Lease) error { r.expireNow(r.t.Context(), r.last(l.key)); return nil }, want: crashed},
			"foreign":                     {goes: func(r *rig, l *Lease) error { r.put(l.key, "garbage"); return nil }, want: crashed},
		} {
			r := newRig(t, 1)
			l := r.lease("first", 0)
			claim(t, l)
			if err := c.goes(r, l); err != nil {
				t.Fatal(err)
			}
			found := claim(t, r.lease("second", 0))
			if got := before(found, c.delivered, time.Now()); got.Owned != c.want.Owned || got.Crashed != c.want.Crashed {
				t.Errorf("%s: %+v, want %+v", name, got, c.want)
			}
			r.nc.Close()
		}
	})
}

// What a server does with keys that are not written again, through a restart. In real time: it is the server
// that lets them expire.
func TestExpiry(t *testing.T) {
	broker := natsservertest.NewBroker(t)
	r := &rig{t: t, partitions: 4, ttl: time.Second}
	r.connect(dial(t, broker, 10*time.Millisecond))
	for n, crashed := range []bool{false, true} {
		eventually(t, time.Minute, "it is released before it expires", func() bool {
			l := r.lease("first", n)
			claim(t, l)
			if err := l.release(t.Context(), crashed); err != nil {
				t.Fatal(err)
			}
			m := r.last(l.key)
			return m != nil && m.released()
		})
	}
	claim(t, r.lease("first", 2))
	check := func(when string, m *message, delivered bool, want Before) {
		t.Helper()
		if got := before(m, delivered, time.Now()); got.Owned != want.Owned || got.Crashed != want.Crashed {
			t.Errorf("%s: %+v, want %+v", when, got, want)
		}
	}
	crashed := Before{Owned: true, Crashed: true}
	// The mark of an expiry lives for a TTL, whatever the bucket's marker TTL says.
	var mark *message
	eventually(t, time.Minute, "the lease expires", func() bool { mark = r.last("partition.2"); return mark != nil && mark.marks() })
	if reason := mark.header.Get(jetstream.MarkerReasonHeader); reason != "MaxAge" || mark.released() {
		t.Errorf("the mark of an expiry has the reason %q", reason)
	}
	check("expired", mark, false, crashed)
	eventually(t, time.Minute, "the mark expires", func() bool { return r.last("partition.2") == nil })
	check("expired long ago", nil, true, crashed)
	check("never owned", nil, false, Before{})
	check("released long ago", r.last("partition.0"), true, Before{Owned: true})
	check("released long ago after a crash", r.last("partition.1"), true, crashed)

	broker.Stop()
	broker.Start()
	r.connect(dial(t, broker, 10*time.Millisecond))
	check("released before a restart", r.last("partition.0"), true, Before{Owned: true})
	if old := before(r.last("partition.0"), true, time.Now().Add(publisher.OwnerMarker)); old.Owned || old.Crashed {
		t.Errorf("a quarter of an hour later: %+v", old)
	}
	// It can be claimed like any other.
	if found := claim(t, r.lease("second", 0)); found == nil || !found.released() {
		t.Errorf("the next owner found %+v", found)
	}
}

// A renewal whose confirmation got lost is found and sent again at once: the lease does not lapse.
func TestLostConfirmation(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 1)
		line := &weak{KeyValue: r.kv}
		r.kv = line
		l := r.lease("a", 0)
		line.lose.Store(1) // of the claim
		if _, err := l.claim(t.Context(), mayAlways); err == nil || l.Claimed() {
			t.Fatalf("a claim without confirmation: %v", err)
		}
		if found := claim(t, l); found != nil {
			t.Errorf("the claim found itself: %+v", found)
		}
		time.Sleep(r.ttl / 3)
		line.lose.Store(1)
		if _, err := l.renew(t.Context()); err == nil {
			t.Fatal("a renewal without confirmation")
		}
		time.Sleep(r.ttl / 3)
		sent := time.Now()
		if resumed, err := l.renew(t.Context()); err != nil || resumed {
			t.Fatalf("the next renewal: resumed %v, %v", resumed, err)
		}
		if end := sent.Add(r.ttl - time.Second); !l.Valid(end.Add(-time.Millisecond)) || l.Valid(end.Add(time.Millisecond)) {
			t.Error("it was not renewed at once")
		}
	})
}

// What stands in the place of a lease decides whether its owner goes on.
func TestRenewWithoutLease(t *testing.T) {
	for name, c := range renewals() {
		t.Run(name, func(t *testing.T) {
			natsservertest.Simulate(t, func(t *testing.T) {
				r := newRig(t, 1)
				l := r.lease("a", 0)
				claim(t, l)
				time.Sleep(c.after)
				c.happens(r)
				resumed, err := l.renew(t.Context())
				c.check(t, l, resumed, err)
			})
		})
	}
}

type renewal struct {
	happens func(*rig)
	after   time.Duration // since the last renewal
	resumed bool
	taken   string
	lapsed  bool
}

func renewals() map[string]renewal {
	other := func(r *rig) { claim(r.t.(*testing.T), r.lease("other", 0)) }
	gone := func(r *rig) {
		s, err := r.js.Stream(r.t.Context(), "KV_OWNERS")
		if err == nil {
			err = s.Purge(r.t.Context())
		}
		if err != nil {
			r.t.Fatal(err)
		}
	}
	expired := func(r *rig) { r.expireNow(r.t.Context(), r.last("partition.0")) }
	return map[string]renewal{
		"untouched":             {happens: func(*rig) {}},
		"gone":                  {happens: gone, resumed: true},
		"gone, after an outage": {happens: gone, after: 18 * time.Second, resumed: true},
		"gone for too long":     {happens: gone, after: 20 * time.Second, lapsed: true},
		"expired":               {happens: expired, after: 12 * time.Second, resumed: true},
		"bucket made again":     {happens: func(r *rig) { r.deleteBucket(); r.makeBucket() }, resumed: true},
		"another worker's":      {happens: func(r *rig) { gone(r); other(r) }, taken: "other"},
		"released by another worker": {happens: func(r *rig) {
			gone(r)
			l := r.lease("other", 0)
			claim(r.t.(*testing.T), l)
			_ = l.release(r.t.Context(), false)
		}, lapsed: true},
		"foreign":                  {happens: func(r *rig) { r.put("partition.0", `{"stream":"REQUESTS","seq":1}`) }, resumed: true},
		"foreign, after an outage": {happens: func(r *rig) { r.put("partition.0", "garbage") }, after: 12 * time.Second, lapsed: true},
	}
}

func (c renewal) check(t *testing.T, l *Lease, resumed bool, err error) {
	t.Helper()
	var taken *takenError
	switch {
	case c.taken != "":
		if !errors.As(err, &taken) || taken.worker != c.taken {
			t.Fatalf("%v, want taken by %q", err, c.taken)
		}
	case c.lapsed:
		if !errors.Is(err, errLapsed) {
			t.Fatalf("%v, want %v", err, errLapsed)
		}
	case err != nil || resumed != c.resumed:
		t.Fatalf("resumed %v, %v; want %v", resumed, err, c.resumed)
	}
	ends := c.taken != "" || c.lapsed
	if l.Claimed() == ends || l.Valid(time.Now()) == ends {
		t.Errorf("claimed %v, valid %v", l.Claimed(), l.Valid(time.Now()))
	}
}

// A claim leaves a lease alone, and nothing else.
func TestClaim(t *testing.T) {
	const lease = `{"worker":"b","since":"2026-11-24T00:00:00Z"}`
	for value, taken := range map[string]bool{
		lease: true,
		"":    false, "garbage": false, "[]": false, "1": false, "null": false,
		`{"stream":"REQUESTS","seq":1}`:                          false,
		`{"worker":"b"}`:                                         false,
		`{"worker":"","since":"2026-11-24T00:00:00Z"}`:           false,
		`{"worker":"b","since":"2026-11-24T00:00:00Z","more":1}`: false,
		lease + lease: false,
		`{"worker":"` + strings.Repeat("x", 200) + `","since":"2026-11-24T00:00:00Z"}`: false,
	} {
		natsservertest.Simulate(t, func(t *testing.T) {
			r := newRig(t, 1)
			r.put("partition.0", value)
			l := r.lease("a", 0)
			_, err := l.claim(t.Context(), mayAlways)
			if (err != nil) != taken {
				t.Errorf("over %q: %v", value, err)
			}
			refuses := errors.New("refused")
			_, err = r.lease("c", 0).claim(t.Context(), func(*message) error { return refuses })
			var e *takenError
			if !errors.As(err, &e) {
				t.Errorf("a second claim over %q: %v", value, err)
			}
		})
	}
}

// A lease that is closed permits nothing, and lives until it is released, by which attempt ever.
func TestRelease(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 1)
		l := r.lease("a", 0)
		claim(t, l)
		l.close()
		time.Sleep(5 * time.Second)
		if _, err := l.renew(t.Context()); err != nil || l.Valid(time.Now()) || !l.Claimed() {
			t.Fatalf("renewed after it was closed: %v, valid %v, claimed %v", err, l.Valid(time.Now()), l.Claimed())
		}
		cancelled, cancel := context.WithCancel(t.Context())
		cancel()
		if err := l.release(cancelled, false); err == nil || !l.Claimed() {
			t.Fatalf("released without the server: %v", err)
		}
		// An attempt of which only the confirmation got lost.
		if err := r.store().release(t.Context(), l.key, r.last(l.key).sequence, nats.Header{headerWorker: {"a"}}); err != nil {
			t.Fatal(err)
		}
		if err := l.release(t.Context(), false); err != nil || l.Claimed() {
			t.Fatalf("released again: %v, claimed %v", err, l.Claimed())
		}
		claim(t, l)
		if !l.Valid(time.Now()) {
			t.Error("claimed again, and not valid")
		}
	})
}

// Both clocks end a lease.
func TestFence(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, 1)
		l := r.lease("a", 0)
		sent := time.Now()
		claim(t, l)
		end := sent.Add(r.ttl - time.Second)
		for at, want := range map[time.Time]bool{
			end.Add(-time.Millisecond): true, end.Add(time.Millisecond): false,
			end.Add(time.Millisecond).Round(0): false, // the machine was suspended
		} {
			if got := l.Valid(at); got != want {
				t.Errorf("%v before its end: %v", end.Sub(at), got)
			}
		}
	})
}
