package resilience

import (
	"math"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// tooMany is the first call that an API would refuse that counts with an exact token
// bucket, -1 if there is none.
func tooMany(calls []time.Time, r Rate) (which int) {
	slices.SortFunc(calls, time.Time.Compare)
	level, last := float64(r.Burst), calls[0]
	for i, at := range calls {
		level = min(float64(r.Burst), level+at.Sub(last).Seconds()*r.PerSecond) - 1
		last = at
		if level < -1e-3 {
			return i
		}
	}
	return -1
}

// late is how much later than others a call may arrive, as Rate and plan say.
func (r Rate) late() time.Duration {
	room := float64(r.Burst-1) / r.PerSecond
	return min(transit, seconds(room*3/4))
}

// However several workers lease, and whenever they use their tokens, the API sees no
// call too many.
func TestLeaseIsExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := Rate{PerSecond: math.Pow(10, rapid.Float64Range(-1, 3).Draw(t, "log of rate")), Burst: rapid.IntRange(1, 100).Draw(t, "burst")}
		interval := r.Interval()
		upTo := func(d time.Duration, what string) time.Duration {
			return time.Duration(rapid.Float64Range(0, 1).Draw(t, what) * float64(d))
		}
		workers := make([]struct {
			tokens tokens
			pause  time.Duration
			lease  []Tokens
			comes  time.Time
		}, rapid.IntRange(1, 3).Draw(t, "workers"))
		start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		now, tat, last := start, time.Time{}, 0
		var calls []time.Time
		for range rapid.IntRange(1, 400).Draw(t, "steps") {
			now = now.Add(upTo(2*interval, "pause"))
			i := rapid.IntRange(0, len(workers)-1).Draw(t, "worker")
			w := &workers[i]
			switch {
			case w.lease != nil && !now.Before(w.comes):
				w.tokens.add(now, w.lease)
				w.lease = nil
			case w.lease == nil && rapid.Bool().Draw(t, "lease"):
				if last != i {
					w.pause = 0
				}
				from := now.Add(upTo(300*time.Millisecond, "arrives"))
				w.comes = now.Add(upTo(400*time.Millisecond, "comes"))
				n := rapid.IntRange(1, 30).Draw(t, "n")
				w.lease, tat, w.pause = r.Lease(tat, from, w.pause, rapid.IntRange(0, n).Draw(t, "at once"), n)
				last = i
			}
			for range rapid.IntRange(0, 5).Draw(t, "calls") {
				if at, ok := w.tokens.next(now); ok && at.After(now) && rapid.Bool().Draw(t, "prompt") {
					now = at
				}
				if w.tokens.take(now) {
					calls = append(calls, now.Add(upTo(r.late(), "transit")))
				}
			}
		}
		if len(calls) == 0 {
			return
		}
		if i := tooMany(calls, r); i >= 0 {
			t.Fatalf("call %d of %d, at %v, is more than %v allows (%+v)", i, len(calls), calls[i].Sub(start), r, r.plan())
		}
	})
}

// A worker that leases in time uses the whole rate, also with a burst of one
// and tokens that it uses a moment late.
func TestLeaseUsesTheRate(t *testing.T) {
	for _, r := range []Rate{{10, 1}, {0.5, 1}, {10, 2}, {10, 100}, {500, 50}, {100, 10}} {
		var p tokens
		now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		start, tat, pause := now, time.Time{}, time.Duration(0)
		span := 60 * time.Second
		used := 0
		for now.Before(start.Add(span)) {
			if left, _ := p.held(now); left < int(r.PerSecond*0.3)+2 {
				var more []Tokens
				more, tat, pause = r.Lease(tat, now.Add(10*time.Millisecond), pause, 1, int(r.PerSecond*0.3)+1)
				p.add(now, more)
			}
			at, ok := p.next(now)
			if !ok {
				t.Fatalf("%v: no tokens at %v", r, now.Sub(start))
			}
			now = at.Add(100 * time.Microsecond)
			for p.take(now) {
				used++
			}
		}
		if want := 0.97 * r.PerSecond * span.Seconds(); float64(used) < want {
			t.Errorf("%v: %d calls in %v, want at least %.0f (%+v)", r, used, span, want, r.plan())
		}
	}
}

func TestTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := Rate{PerSecond: 10, Burst: 10}
		gates := newGates(t, func(c *Config) {
			c.Account = r
			c.Creator.Concurrency = 1
		})
		a, b := gates.Gate("a", time.Time{}), gates.Gate("b", time.Time{})
		refused(t, a, ReasonAccount)
		lease := func(n int, from time.Duration) {
			tokens, _, _ := r.Lease(time.Time{}, time.Now().Add(from), 0, n, n)
			gates.AddTokens(time.Now(), tokens...)
		}
		lease(2, 50*time.Millisecond)
		refused(t, a, ReasonAccount) // not yet
		at, ok := gates.NextToken(time.Now())
		if !ok || time.Until(at) != 50*time.Millisecond {
			t.Errorf("the first token in %v", time.Until(at))
		}
		time.Sleep(time.Until(at))
		p := admit(t, a)
		refused(t, a, ReasonSlots) // costs no token
		admit(t, b).End(time.Now(), Success)
		refused(t, b, ReasonAccount)
		p.End(time.Now(), Success)
		if left, used := gates.Tokens(time.Now()); left != 0 || used != 2 {
			t.Errorf("%d tokens left, %d used", left, used)
		}
		lease(2, 0)
		time.Sleep(time.Second)
		refused(t, a, ReasonAccount) // too late
		if !gates.Empty(time.Now()) {
			t.Error("old tokens count")
		}
	})
}
