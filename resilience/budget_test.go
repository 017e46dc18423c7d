package resilience

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// However several workers lease, and use what they leased, no window of the
// API sees more than rate and burst allow; and while they ask, the rate is
// used.
func TestLease(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := Rate{PerSecond: rapid.Float64Range(0.5, 2000).Draw(t, "rate"), Burst: rapid.IntRange(4, 300).Draw(t, "burst")}
		start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		now, tat := start, time.Time{}
		var calls []time.Time
		span := time.Duration(float64(r.Burst+200) / r.PerSecond * float64(time.Second))
		for now.Before(start.Add(span)) {
			n, newTAT, next := r.Lease(tat, now, rapid.IntRange(1, 40).Draw(t, "n"))
			if n == 0 {
				if !next.After(now) {
					t.Fatalf("no token at %v, and none later", now.Sub(start))
				}
				if again, _, _ := r.Lease(tat, next, 1); again != 1 {
					t.Fatalf("no token at %v, when there was to be one", next.Sub(start))
				}
				now = next
				continue
			}
			tat = newTAT
			for range n {
				late := time.Duration(rapid.Float64Range(0, 2).Draw(t, "late") * float64(r.LeaseLife()))
				calls = append(calls, now.Add(late))
			}
			now = now.Add(time.Duration(rapid.Float64Range(0, 1).Draw(t, "pause") * float64(time.Second) / r.PerSecond))
		}
		slices.SortFunc(calls, time.Time.Compare)
		level, last := float64(r.Burst), calls[0]
		for i, at := range calls {
			level = min(float64(r.Burst), level+at.Sub(last).Seconds()*r.PerSecond) - 1
			last = at
			if level < -1e-3 {
				t.Fatalf("call %d, at %v, is more than %v allows", i, at.Sub(start), r)
			}
		}
		if want := 0.9 * r.PerSecond * span.Seconds(); float64(len(calls)) < want {
			t.Fatalf("%d calls in %v, want at least %.0f", len(calls), span, want)
		}
	})
}

func TestLeaseOfOne(t *testing.T) {
	r := Rate{PerSecond: 1, Burst: 1}
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	n, tat, _ := r.Lease(time.Time{}, now, 5)
	if n != 1 || !tat.Equal(now.Add(time.Second)) {
		t.Fatalf("%d tokens, the next at %v", n, tat.Sub(now))
	}
	if n, _, next := r.Lease(tat, now.Add(time.Millisecond), 5); n != 0 || !next.Equal(now.Add(time.Second)) {
		t.Errorf("%d tokens, the next after %v", n, next.Sub(now))
	}
}

func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, func(c *Config) {
			c.Account = Rate{PerSecond: 10, Burst: 10}
			c.Creator.Concurrency = 1
		})
		a, b := gates.Gate("a", time.Time{}), gates.Gate("b", time.Time{})
		refused(t, a, ReasonAccount)
		gates.Fund(2, time.Now().Add(100*time.Millisecond))
		p := admit(t, a)
		refused(t, a, ReasonSlots) // costs no token
		admit(t, b).End(time.Now(), Success)
		refused(t, b, ReasonAccount)
		p.End(time.Now(), Success)

		gates.Fund(2, time.Now().Add(100*time.Millisecond))
		time.Sleep(100 * time.Millisecond)
		refused(t, a, ReasonAccount) // too late
		if !gates.Broke(time.Now()) {
			t.Error("old tokens count")
		}
	})
}

func TestConcurrency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGates(t, func(c *Config) { c.Creator.Concurrency = 16 }).Gate("a", time.Time{})
		slots := func(want int) {
			t.Helper()
			if got := g.Slots(); got != want {
				t.Errorf("%d slots, want %d", got, want)
			}
		}
		var all []Permit
		for range 16 {
			all = append(all, admit(t, g))
		}
		time.Sleep(time.Millisecond)
		for _, p := range all { // one crowd, one answer to it
			p.Concurrency(time.Now(), 0, 0, true)
			p.End(time.Now(), Excluded)
			p.Close()
		}
		slots(8)
		time.Sleep(time.Millisecond)
		p := admit(t, g)
		p.Concurrency(time.Now(), 5, 3, false) // the API says how many it takes
		p.End(time.Now(), Success)
		p.Close()
		slots(5)
		for range 3 { // for a long time there is one at least
			time.Sleep(time.Millisecond)
			p := admit(t, g)
			p.Concurrency(time.Now(), 0, 0, true)
			p.End(time.Now(), Excluded)
			p.Close()
		}
		slots(1)
		if g.Neutral(time.Now().Add(time.Minute)) {
			t.Error("forgotten at once")
		}
		for range 1 + 2 + 3 { // 1, then 2, then 3 successes
			time.Sleep(time.Millisecond)
			call(t, g, Success)
		}
		slots(4)
		for range 1000 {
			call(t, g, Success)
		}
		slots(16)
	})
}

func TestSetLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGates(t, func(c *Config) { c.Creator.Rate = Rate{PerSecond: 1, Burst: 3} }).Gate("a", time.Time{})
		for range 3 {
			call(t, g, Success)
		}
		// More burst is no gift.
		if err := g.SetLimits(time.Now(), Limits{Rate: Rate{PerSecond: 2, Burst: 10}, Concurrency: 1}); err != nil {
			t.Fatal(err)
		}
		if wait := refused(t, g, ReasonLimit); wait < 490*time.Millisecond || wait > 510*time.Millisecond {
			t.Errorf("the next call in %v, at 2/s", wait)
		}
		time.Sleep(time.Minute)
		p := admit(t, g)
		refused(t, g, ReasonSlots)
		p.End(time.Now(), Success)
		p.Close()
		if err := g.SetLimits(time.Now(), Limits{Concurrency: 0}); err == nil {
			t.Error("no slots at all are taken")
		}
		if err := g.SetLimits(time.Now(), Limits{Concurrency: 3}); err != nil {
			t.Fatal(err)
		}
		for range 100 {
			call(t, g, Success)
		}
	})
}

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
