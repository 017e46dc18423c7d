package resilience

import (
	"testing"
	"testing/synctest"
	"time"
)

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
		g := newGates(t, func(c *Config) { c.Creator.Rate = Rate{PerSecond: 1, Burst: 4} }).Gate("a", time.Time{})
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
