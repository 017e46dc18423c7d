package resilience

import (
	"math"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"
	"pgregory.net/rapid"
)

func TestParseRate(t *testing.T) {
	for s, want := range map[string]float64{"60/m": 1, "10/s": 10, "3600/h": 1, "0.5/s": 0.5, "8640/d": 0.1} {
		calls, per, err := ParseRate(s)
		if got := calls / per.Seconds(); err != nil || got != want {
			t.Errorf("%s: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "60", "60/x", "0/s", "-1/s", "nan/s", "inf/s", "1e999/s", "/s"} {
		if _, _, err := ParseRate(s); err == nil {
			t.Errorf("%q is taken", s)
		}
	}
}

// What is accepted can be calculated with: a gate always says when to come
// again, after now, and lets the call through then.
func TestBoundsOfRates(t *testing.T) {
	for _, r := range []Rate{
		{PerSecond: 1e-6 / 86400, Burst: 1}, {PerSecond: 1e-300, Burst: 1}, {PerSecond: 1e10, Burst: 1},
		{PerSecond: math.Inf(1), Burst: 1}, {PerSecond: math.NaN(), Burst: 1}, {PerSecond: -1, Burst: 1},
		{PerSecond: 1, Burst: 0}, {PerSecond: 1.0 / 86400, Burst: math.MaxInt}, {PerSecond: 1, Burst: math.MaxInt},
	} {
		if err := r.check("limit"); err == nil {
			t.Errorf("%v is accepted", r)
		}
	}
	day := 24 * time.Hour
	for _, r := range []Rate{
		{}, {PerSecond: 1 / year.Seconds(), Burst: 1}, {PerSecond: 1 / year.Seconds(), Burst: 50}, {PerSecond: 1 / day.Seconds(), Burst: 5000},
		{PerSecond: 1e9, Burst: math.MaxInt32}, {PerSecond: 1, Burst: 1e9},
	} {
		if err := r.check("limit"); err != nil {
			t.Errorf("%v: %v", r, err)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		r := Rate{
			PerSecond: math.Pow(10, rapid.Float64Range(-9, 10).Draw(t, "log of rate")),
			Burst:     rapid.IntRange(1, math.MaxInt).Draw(t, "burst"),
		}
		if r.check("limit") != nil {
			return
		}
		now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		l := newLane(r)
		l.limiter.AllowN(now, l.limiter.Burst())
		if r.PerSecond > 1e6 {
			return // time has no finer grain than its calls
		}
		next := l.next(now)
		if !next.After(now) || next.Sub(now) > year+time.Second {
			t.Fatalf("%v: the next call in %v", r, next.Sub(now))
		}
		if !l.take(next) {
			t.Fatalf("%v: no call after %v", r, next.Sub(now))
		}
	})
}

// An API that counts with an exact token bucket sees no call too many, although
// some of the calls arrive late.
func TestBurstAsTheAPICountsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, r := range []Rate{{1, 90}, {1, 2}, {10, 10}, {2, 5}, {60, 100}} {
			g := newGates(t, func(c *Config) { c.Creator = Limits{Rate: r, Concurrency: 1} }).Gate("a", time.Time{})
			start := time.Now()
			api := rate.NewLimiter(rate.Limit(r.PerSecond), r.Burst)
			seen, refusals := start, 0
			for n := range 3 * r.Burst {
				p, no, ok := g.Admit(time.Now(), Read)
				for !ok {
					time.Sleep(time.Until(no.NotBefore))
					p, no, ok = g.Admit(time.Now(), Read)
				}
				// The first calls wait for their connection.
				at := time.Now()
				if n < r.Burst/4 {
					at = start.Add(min(transit, time.Duration(float64(r.Burst)/4/r.PerSecond*float64(time.Second))))
				}
				seen = later(seen, at)
				if !api.AllowN(seen, 1) {
					refusals++
				}
				p.End(time.Now(), Success)
				p.Close()
			}
			if refusals > 0 {
				t.Errorf("%v: %d calls are refused", r, refusals)
			}
		}
	})
}
