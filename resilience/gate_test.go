package resilience

import (
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/headgate-io/headgate/classify"
)

func newGates(t testing.TB, change func(*Config)) *Gates {
	t.Helper()
	cfg := DefaultConfig()
	if change != nil {
		change(&cfg)
	}
	g, err := NewGates(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// admit expects a permit.
func admit(t testing.TB, g *Gate) Permit {
	t.Helper()
	p, no, ok := g.Admit(time.Now(), Read, true)
	if !ok {
		t.Fatalf("refused: %+v", no)
	}
	return p
}

// refused expects a refusal for a reason and returns how long it says to wait.
func refused(t testing.TB, g *Gate, want Reason) time.Duration {
	t.Helper()
	now := time.Now()
	p, no, ok := g.Admit(now, Read, true)
	if ok {
		p.End(now, Excluded)
		p.Close()
		t.Fatalf("admitted, want a refusal for %s", want)
	}
	if no.Reason != want {
		t.Fatalf("refused for %s, want %s", no.Reason, want)
	}
	if no.NotBefore.IsZero() {
		return 0
	}
	return no.NotBefore.Sub(now)
}

func call(t testing.TB, g *Gate, o Outcome) Change {
	t.Helper()
	p := admit(t, g)
	defer p.Close()
	return p.End(time.Now(), o)
}

func TestSlots(t *testing.T) {
	gates := newGates(t, func(c *Config) { c.Creator.Concurrency = 2 })
	g := gates.Gate("a", time.Time{})
	first, second := admit(t, g), admit(t, g)
	refused(t, g, ReasonSlots)
	admit(t, gates.Gate("b", time.Time{})) // another creator's slots are its own
	first.End(time.Now(), Success)
	third := admit(t, g) // free before the message is settled
	refused(t, g, ReasonSlots)
	second.End(time.Now(), Success)
	third.End(time.Now(), Success)
}

func TestWorkerIsFull(t *testing.T) {
	gates := newGates(t, func(c *Config) { c.InFlight = 2 })
	a, b := gates.Gate("a", time.Time{}), gates.Gate("b", time.Time{})
	p := admit(t, a)
	admit(t, b)
	refused(t, b, ReasonWorker)
	p.End(time.Now(), Success)
	refused(t, b, ReasonWorker) // not settled yet
	p.Close()
	admit(t, b)
}

func TestLimitIsExact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, func(c *Config) { c.Creator.Rate = Rate{PerSecond: 2, Burst: 3} })
		g := gates.Gate("a", time.Time{})
		start := time.Now()
		var at []time.Duration
		for len(at) < 10 {
			p, no, ok := g.Admit(time.Now(), Read, true)
			if !ok {
				if no.Reason != ReasonLimit {
					t.Fatalf("refused for %s", no.Reason)
				}
				time.Sleep(time.Until(no.NotBefore))
				continue
			}
			at = append(at, time.Since(start).Round(time.Millisecond))
			p.End(time.Now(), Success)
			p.Close()
		}
		for i, d := range at {
			if want := time.Duration(max(0, i-2)) * 500 * time.Millisecond; d != want {
				t.Errorf("call %d after %v, want %v", i, d, want)
			}
		}
	})
}

func TestReadAndWriteApart(t *testing.T) {
	gates := newGates(t, func(c *Config) { c.Creator.Write = &Rate{PerSecond: 1, Burst: 1} })
	g := gates.Gate("a", time.Time{})
	now := time.Now()
	if p, _, ok := g.Admit(now, Write, false); !ok {
		t.Fatal("first write refused")
	} else {
		p.End(now, Success)
	}
	if _, no, ok := g.Admit(now, Write, false); ok || no.Reason != ReasonLimit {
		t.Errorf("second write: %v %v", ok, no.Reason)
	}
	if _, no, ok := g.Admit(now, Read, false); !ok {
		t.Errorf("a read waits for writes: %v", no.Reason)
	}
}

func TestHoldIsMonotonic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGates(t, nil).Gate("a", time.Time{})
		now := time.Now()
		if !g.Hold(Hold{Until: now.Add(time.Hour), Class: classify.RateLimit}) {
			t.Error("the first hold does not count")
		}
		if g.Hold(Hold{Until: now.Add(time.Minute)}) {
			t.Error("a shorter hold counts")
		}
		if d := refused(t, g, ReasonHold); d != time.Hour {
			t.Errorf("held for %v, want 1h", d)
		}
		if !g.Hold(Hold{}) { // until released
			t.Error("a hold without an end does not outlast one with")
		}
		if g.Hold(Hold{Until: now.Add(1000 * time.Hour)}) {
			t.Error("a hold with an end outlasts one without")
		}
		time.Sleep(2 * time.Hour)
		refused(t, g, ReasonHold)
		g.Release(time.Now())
		admit(t, g)
	})
}

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
		refused(t, healthy, ReasonProviderBreaker)
		if no, blocked := gates.Blocked(time.Now()); !blocked || no.Reason != ReasonProviderBreaker {
			t.Error("an open provider breaker does not stop pulling")
		}
		time.Sleep(61 * time.Second)
		probe := admit(t, healthy)
		refused(t, b, ReasonProviderBreaker) // one call finds out
		probe.End(time.Now(), Success)
		if ch := call(t, b, Success); !ch.ProviderClosed {
			t.Error("not closed by two successes")
		}
		admit(t, healthy)
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
		time.Sleep(slowCall)
		if c := call(t, gates.Gate("z", time.Time{}), Failed); !c.ProviderOpened {
			t.Error("a call that hangs keeps an outage from being seen")
		}
	})
}

func TestAccountHoldIsProbed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, nil)
		a, b := gates.Gate("a", time.Time{}), gates.Gate("b", time.Time{})
		gates.HoldAccount(Hold{Until: time.Now().Add(time.Minute), Class: classify.Billing})
		refused(t, a, ReasonAccountHold)
		refused(t, b, ReasonAccountHold)
		time.Sleep(time.Minute)
		probe := admit(t, a)
		refused(t, b, ReasonAccountHold)
		refused(t, a, ReasonAccountHold)

		gates.HoldAccount(Hold{Until: time.Now().Add(time.Minute), Class: classify.Billing})
		probe.End(time.Now(), Excluded)
		refused(t, b, ReasonAccountHold)
		time.Sleep(time.Minute)
		probe = admit(t, b)
		probe.End(time.Now(), Success)
		admit(t, a)
		admit(t, b)
	})
}

// After a hold the burst that has accrued meanwhile is not spent at once.
func TestSlowReturn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, func(c *Config) {
			c.Creator.Rate, c.Creator.Concurrency = Rate{PerSecond: 1, Burst: 50}, 100
		})
		g := gates.Gate("a", time.Time{})
		g.Hold(Hold{Until: time.Now().Add(time.Minute)})
		time.Sleep(time.Minute)
		admit(t, g)
		if d := refused(t, g, ReasonLimit); d < 900*time.Millisecond {
			t.Errorf("the second call after a hold may come after %v", d)
		}

		// The same when everybody was held.
		other := gates.Gate("b", time.Time{})
		gates.HoldAccount(Hold{Until: time.Now().Add(time.Minute)})
		gates.ReleaseAccount()
		admit(t, other)
		refused(t, other, ReasonLimit)
	})
}

func TestTurnsAreDistinct(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, func(c *Config) { c.Creator.Rate = Rate{PerSecond: 10, Burst: 5} })
		g := gates.Gate("a", time.Time{})
		until := time.Now().Add(time.Minute)
		g.Hold(Hold{Until: until})
		for i := range 100 {
			turn := g.Turn(time.Now(), Read, 0, 0)
			if want := until.Add(time.Duration(i) * 100 * time.Millisecond); !turn.Equal(want) {
				t.Fatalf("turn %d at %v, want %v", i, turn.Sub(until), want.Sub(until))
			}
		}
		time.Sleep(time.Minute)
		// A new request does not overtake those who have a turn.
		if _, no, ok := g.Admit(time.Now(), Read, false); ok || no.Reason != ReasonTurn {
			t.Errorf("admitted %v, %v", ok, no.Reason)
		}
		admit(t, g)
		g.Replan()
		if turn := g.Turn(time.Now(), Read, 0, 0); time.Until(turn) > 101*time.Millisecond {
			t.Errorf("after Replan the first turn is in %v", time.Until(turn))
		}
		g.Hold(Hold{})
		if turn := g.Turn(time.Now(), Read, 0, 0); !turn.IsZero() {
			t.Errorf("a turn in %v under a hold that has no end", time.Until(turn))
		}
	})
}

// Slots that turn over faster than planned make new turns worth while.
func TestFaster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGates(t, func(c *Config) { c.Creator.Concurrency = 1 }).Gate("a", time.Time{})
		slow := admit(t, g)
		time.Sleep(10 * time.Second)
		slow.End(time.Now(), Failed)
		for range 10 {
			g.Turn(time.Now(), Read, 0, 0)
		}
		var c Change
		for range 4 {
			c = call(t, g, Success)
		}
		if !c.Faster {
			t.Error("turns planned for calls of 10 s are kept although calls take no time")
		}
		g.Replan()
		if c := call(t, g, Success); c.Faster {
			t.Error("Faster again, with no turns given")
		}
	})
}

func TestBulkheadForSlowCreators(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, func(c *Config) { c.InFlight, c.Creator.Concurrency = 8, 2 })
		a, b, healthy := gates.Gate("a", time.Time{}), gates.Gate("b", time.Time{}), gates.Gate("h", time.Time{})
		one, two := admit(t, a), admit(t, b)
		time.Sleep(1100 * time.Millisecond)
		// Both are slow now, by their calls still in flight, and share a quarter of 8.
		three := admit(t, a)
		refused(t, b, ReasonSlow)
		admit(t, healthy)
		one.End(time.Now(), Success)
		two.End(time.Now(), Success)
		three.End(time.Now(), Success)
		call(t, b, Success)
		fast := admit(t, a)
		fast.End(time.Now(), Success)
		if a.slow {
			t.Error("a fast call does not make a creator fast again")
		}
		if n := gates.slow.Load(); n != 0 {
			t.Errorf("%d slow calls are counted with none in flight", n)
		}
	})
}

func TestNewOwnerHasNoSecondBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, func(c *Config) { c.Creator.Rate = Rate{PerSecond: 1, Burst: 10} })
		since := time.Now()
		time.Sleep(3 * time.Second)
		g := gates.Gate("a", since)
		for range 3 {
			call(t, g, Success)
		}
		refused(t, g, ReasonLimit)
	})
}

func TestNeutral(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, func(c *Config) { c.Creator.Rate = Rate{PerSecond: 1, Burst: 2} })
		g := gates.Gate("a", time.Time{})
		neutral := func(want bool, when string) {
			t.Helper()
			if g.Neutral(time.Now()) != want {
				t.Errorf("%s: neutral is %v", when, !want)
			}
		}
		neutral(true, "new")
		p := admit(t, g)
		neutral(false, "in flight")
		p.End(time.Now(), Failed)
		time.Sleep(10 * time.Second)
		neutral(false, "after a failure")
		call(t, g, Success)
		neutral(false, "with a token missing")
		time.Sleep(10 * time.Second)
		neutral(true, "with all tokens back")
		g.Hold(Hold{Until: time.Now().Add(time.Second)})
		neutral(false, "held")
	})
}

// Whatever happens, in whatever order: what was taken is given back, and no
// window of time sees more calls than the limit allows.
func TestGateProperties(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		synctest.Test(t, func(*testing.T) {
			perSecond := rapid.Float64Range(0.5, 200).Draw(rt, "rate")
			burst := rapid.IntRange(1, 20).Draw(rt, "burst")
			slots := rapid.IntRange(1, 5).Draw(rt, "slots")
			gates := newGates(t, func(c *Config) {
				c.Creator = Limits{Rate: Rate{PerSecond: perSecond, Burst: burst}, Concurrency: slots}
				c.InFlight = 6
			})
			g := gates.Gate("a", time.Time{})
			var flying []Permit
			var starts []time.Time
			var held time.Time
			for range rapid.IntRange(1, 150).Draw(rt, "steps") {
				switch rapid.IntRange(0, 5).Draw(rt, "step") {
				case 0, 1:
					p, no, ok := g.Admit(time.Now(), Read, true)
					if !ok {
						if d := time.Until(no.NotBefore); !no.NotBefore.IsZero() && d < time.Hour {
							time.Sleep(d)
						}
						continue
					}
					if time.Now().Before(held) {
						rt.Fatal("a call inside a hold")
					}
					flying, starts = append(flying, p), append(starts, time.Now())
					if len(flying) > slots {
						rt.Fatalf("%d calls in flight, %d slots", len(flying), slots)
					}
				case 2, 3:
					if len(flying) == 0 {
						continue
					}
					i := rapid.IntRange(0, len(flying)-1).Draw(rt, "which")
					flying[i].End(time.Now(), rapid.SampledFrom([]Outcome{Success, Failed, Excluded}).Draw(rt, "outcome"))
					flying[i].Close()
					flying = append(flying[:i], flying[i+1:]...)
				case 4:
					time.Sleep(time.Duration(rapid.IntRange(0, 3000).Draw(rt, "ms")) * time.Millisecond)
				case 5:
					until := time.Now().Add(time.Duration(rapid.IntRange(1, 5000).Draw(rt, "hold")) * time.Millisecond)
					g.Hold(Hold{Until: until})
					held = later(held, until)
				}
			}
			for i := range starts {
				for j := i; j < len(starts); j++ {
					window := starts[j].Sub(starts[i]).Seconds()
					if n := j - i + 1; float64(n) > math.Floor(window*perSecond+1e-6)+float64(burst) {
						rt.Fatalf("%d calls in %.3f s at %.3f/s with a burst of %d", n, window, perSecond, burst)
					}
				}
			}
			for _, p := range flying {
				p.End(time.Now(), Success)
				p.Close()
			}
			if n := gates.InFlight(); n != 0 || g.inFlight != 0 || gates.slow.Load() != 0 {
				rt.Fatalf("left over: worker %d, creator %d, slow %d", n, g.inFlight, gates.slow.Load())
			}
		})
	})
}

func TestGatesAreSafeForConcurrentUse(t *testing.T) {
	gates := newGates(t, func(c *Config) { c.InFlight, c.Creator.Concurrency = 4, 2 })
	a, b := gates.Gate("a", time.Time{}), gates.Gate("b", time.Time{})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			g := []*Gate{a, b}[i%2]
			for n := range 500 {
				p, _, ok := g.Admit(time.Now(), Kind(n%2), n%3 == 0)
				if !ok {
					g.Turn(time.Now(), Read, 0, 0.5)
					continue
				}
				p.End(time.Now(), Outcome(n%3))
				p.Close()
				if n%100 == 0 {
					g.Release(time.Now())
				}
			}
		})
	}
	wg.Wait()
	if n := gates.InFlight(); n != 0 {
		t.Errorf("%d in flight at the end", n)
	}
}

func BenchmarkAdmit(b *testing.B) {
	gates := newGates(b, func(c *Config) { c.Creator.Rate = Rate{PerSecond: 1e9, Burst: 1e9} })
	g := gates.Gate("a", time.Time{})
	b.ReportAllocs()
	for b.Loop() {
		now := time.Now()
		p, _, ok := g.Admit(now, Read, false)
		if !ok {
			b.Fatal("refused")
		}
		p.End(now, Success)
		p.Close()
	}
}
