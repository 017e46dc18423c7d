package resilience

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGates(t, nil).Gate("a", time.Time{})
		for range 4 {
			call(t, g, Failed)
		}
		call(t, g, Success) // starts the count again
		for range 4 {
			call(t, g, Failed)
		}
		call(t, g, Excluded) // says nothing
		if c := call(t, g, Failed); !c.Opened || !c.OpenUntil.After(time.Now()) {
			t.Fatalf("5 failures in a row: %+v", c)
		}
		if d := refused(t, g, ReasonBreaker); d.Round(time.Second) != time.Minute {
			t.Errorf("open for %v, want 1m", d)
		}
		time.Sleep(time.Minute)
		refused(t, g, ReasonBreaker) // at exactly its timeout gobreaker is open
		time.Sleep(time.Nanosecond * 2)

		probe := admit(t, g)
		if d := refused(t, g, ReasonBreaker); d != 0 {
			t.Errorf("a second probe beside the first is told to wait %v, want for its end", d)
		}
		if c := probe.End(time.Now(), Success); c.Closed {
			t.Error("closed after one success of two")
		}
		if c := call(t, g, Success); !c.Closed {
			t.Error("not closed after two successes")
		}
		admit(t, g)
		admit(t, g)
	})
}

func TestBreakerReopens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGates(t, nil).Gate("a", time.Time{})
		for range 5 {
			call(t, g, Failed)
		}
		for range 3 {
			time.Sleep(61 * time.Second)
			call(t, g, Excluded) // a probe that finds nothing out wedges nothing
			if c := call(t, g, Failed); !c.Opened {
				t.Fatal("a failed probe does not open the breaker again")
			}
			refused(t, g, ReasonBreaker)
		}
	})
}

// Calls that began while the breaker was closed say nothing once it is open.
func TestLateFailureDoesNotExtend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGates(t, func(c *Config) { c.Creator.Concurrency = 10 }).Gate("a", time.Time{})
		late := admit(t, g)
		for range 5 {
			call(t, g, Failed)
		}
		time.Sleep(61 * time.Second)
		probe := admit(t, g)
		late.End(time.Now(), Failed)
		if c := probe.End(time.Now(), Success); c.Opened {
			t.Error("a late failure opened the breaker again")
		}
		call(t, g, Success)
		if !g.Neutral(time.Now()) {
			t.Error("not closed by two successes")
		}
	})
}

// One creator's trouble is its own; three creators' in a row is the provider's.
func TestProviderBreakerNeedsEvidence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, func(c *Config) { c.Breaker.Failures = 5 })
		a, b, c, healthy := gates.Gate("a", time.Time{}), gates.Gate("b", time.Time{}), gates.Gate("c", time.Time{}), gates.Gate("h", time.Time{})
		for range 5 {
			call(t, a, Failed)
		}
		call(t, b, Failed)
		if gates.ProviderFailing(time.Now()) {
			t.Error("two creators are no evidence")
		}
		call(t, healthy, Success) // a success between
		call(t, b, Failed)
		call(t, c, Failed)
		if gates.ProviderFailing(time.Now()) {
			t.Error("a success between does not count")
		}
		call(t, healthy, Failed)
		if !gates.ProviderFailing(time.Now()) {
			t.Error("three creators are evidence")
		}
		call(t, healthy, Failed)
		ch := call(t, c, Failed)
		if !ch.ProviderOpened {
			t.Fatalf("5 failures of 3 creators in a row: %+v", ch)
		}
		if d := refused(t, gates.Gate("new", time.Time{}), ReasonProviderBreaker); d != firstProbe {
			t.Errorf("a creator without trouble is tried in %v", d)
		}
		if d := refused(t, b, ReasonProviderBreaker); d != firstProbe+2*probeAfter {
			t.Errorf("a creator that failed twice may try in %v", d)
		}
		if no, blocked := gates.Blocked(time.Now()); blocked {
			t.Errorf("messages are not pulled for the probe: %v", no)
		}
	})
}

// While the provider's breaker is open a call begins every few seconds, and
// hangs or fails without keeping the next one. One success ends it.
func TestProviderBreakerIsProbed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, nil)
		gates.SetWorkers(2)
		outage := func() {
			t.Helper()
			for _, name := range []string{"a", "b", "c", "d", "e"} {
				call(t, gates.Gate(name, time.Time{}), Failed)
			}
		}
		outage()
		g := gates.Gate("well", time.Time{})
		time.Sleep(refused(t, g, ReasonProviderBreaker))
		hangs := admit(t, g)
		if d := refused(t, g, ReasonProviderBreaker); d != 8*time.Second {
			t.Errorf("after a probe the next one of two workers comes in %v", d)
		}
		time.Sleep(8 * time.Second)
		other := gates.Gate("other", time.Time{})
		call(t, other, Excluded) // answered, but not well enough to tell
		time.Sleep(refused(t, other, ReasonProviderBreaker))
		call(t, other, Failed)
		gates.SetWorkers(100)
		time.Sleep(8 * time.Second)
		call(t, gates.Gate("fifth", time.Time{}), Failed)
		if d := refused(t, gates.Gate("sixth", time.Time{}), ReasonProviderBreaker); d != probeAtLeast {
			t.Errorf("the next probe of very many workers comes in %v", d)
		}
		if c := hangs.End(time.Now(), Success); !c.ProviderClosed {
			t.Error("a success does not close the provider's breaker")
		}
		for _, name := range []string{"a", "well", "other"} {
			call(t, gates.Gate(name, time.Time{}), Success)
		}
		// Creators that failed probe if no other wants to.
		gates.SetWorkers(1)
		outage()
		ill := gates.Gate("ill", time.Time{})
		ill.brk = newBreaker(gates.cfg.Breaker, func(n uint32) bool { return n >= 5 })
		ill.brk.record(nil, Failed)
		time.Sleep(refused(t, ill, ReasonProviderBreaker))
		if c := call(t, ill, Success); !c.ProviderClosed {
			t.Error("no creator without failures: the breaker stays open")
		}
	})
}

// A failure that concerns one request, and a creator's own half-open probe, say
// nothing about the provider.
func TestNoEvidence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, nil)
		var all []*Gate
		for i := range 10 {
			g := gates.Gate(string(rune('a'+i)), time.Time{})
			all = append(all, g)
			for range 5 {
				if c := call(t, g, FailedAlone); c.ProviderOpened || gates.ProviderFailing(time.Now()) {
					t.Fatalf("creator %d: a 500 is evidence", i)
				}
			}
			refused(t, g, ReasonBreaker)
		}
		for range 3 {
			time.Sleep(61 * time.Second)
			for i, g := range all {
				if c := call(t, g, Failed); c.ProviderOpened || gates.ProviderFailing(time.Now()) {
					t.Fatalf("creator %d: its own probe is evidence", i)
				}
			}
		}
	})
}

// Failures are faster than successes: calls in flight when suspicion arises are
// heard before the provider is judged.
func TestProviderBreakerHearsCallsInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, healthy := range []bool{true, false} {
			gates := newGates(t, nil)
			pending := admit(t, gates.Gate("slow", time.Time{}))
			opened := false
			for i := range 10 {
				opened = opened || call(t, gates.Gate(string(rune('a'+i)), time.Time{}), Failed).ProviderOpened
			}
			if opened || gates.ProviderFailing(time.Now()) {
				t.Error("judged with a call in flight that was not heard")
			}
			time.Sleep(50 * time.Millisecond)
			outcome := Failed
			if healthy {
				outcome = Success
			}
			if c := pending.End(time.Now(), outcome); c.ProviderOpened == healthy {
				t.Errorf("the last call in flight ended with %v: %+v", outcome, c)
			}
		}
	})
}

func TestProviderBreakerDoesNotHearForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, nil)
		admit(t, gates.Gate("hangs", time.Time{}))
		for i := range 10 {
			call(t, gates.Gate(string(rune('a'+i)), time.Time{}), Failed)
		}
		time.Sleep(hearing)
		if c := call(t, gates.Gate("z", time.Time{}), Failed); !c.ProviderOpened {
			t.Error("a call that hangs keeps an outage from being seen")
		}
	})
}
