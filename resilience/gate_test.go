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
	p, no, ok := g.Admit(time.Now(), Read)
	if !ok {
		t.Fatalf("refused: %+v", no)
	}
	return p
}

// refused expects a refusal for a reason and returns how long it says to wait.
func refused(t testing.TB, g *Gate, want Reason) time.Duration {
	t.Helper()
	now := time.Now()
	p, no, ok := g.Admit(now, Read)
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
			p, no, ok := g.Admit(time.Now(), Read)
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
			if want := time.Duration(max(0, i-1)) * 500 * time.Millisecond; d != want {
				t.Errorf("call %d after %v, want %v", i, d, want)
			}
		}
	})
}

func TestReadAndWriteApart(t *testing.T) {
	gates := newGates(t, func(c *Config) { c.Creator.Write = &Rate{PerSecond: 1, Burst: 1} })
	g := gates.Gate("a", time.Time{})
	now := time.Now()
	if p, _, ok := g.Admit(now, Write); !ok {
		t.Fatal("first write refused")
	} else {
		p.End(now, Success)
	}
	if _, no, ok := g.Admit(now, Write); ok || no.Reason != ReasonLimit {
		t.Errorf("second write: %v %v", ok, no.Reason)
	}
	if _, no, ok := g.Admit(now, Read); !ok {
		t.Errorf("a read waits for writes: %v", no.Reason)
	}
}

func TestHoldIsMonotonic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGates(t, nil).Gate("a", time.Time{})
		now := time.Now()
		if !g.Hold(ByAPI, Hold{Until: now.Add(time.Hour), Class: classify.RateLimit}) {
			t.Error("the first hold does not count")
		}
		if g.Hold(ByAPI, Hold{Until: now.Add(time.Minute)}) {
			t.Error("a shorter hold counts")
		}
		if d := refused(t, g, ReasonHold); d != time.Hour {
			t.Errorf("held for %v, want 1h", d)
		}
		if !g.Hold(ByAPI, Hold{}) { // until released
			t.Error("a hold without an end does not outlast one with")
		}
		if g.Hold(ByAPI, Hold{Until: now.Add(1000 * time.Hour)}) {
			t.Error("a hold with an end outlasts one without")
		}
		time.Sleep(2 * time.Hour)
		refused(t, g, ReasonHold)
		g.Release(time.Now(), ByAPI)
		admit(t, g)
	})
}

func TestAccountHoldIsProbed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, nil)
		a, b := gates.Gate("a", time.Time{}), gates.Gate("b", time.Time{})
		gates.HoldAccount(ByAPI, Hold{Until: time.Now().Add(time.Minute), Class: classify.Billing})
		refused(t, a, ReasonAccountHold)
		refused(t, b, ReasonAccountHold)
		time.Sleep(time.Minute)
		probe := admit(t, a)
		refused(t, b, ReasonAccountHold)
		refused(t, a, ReasonAccountHold)

		gates.HoldAccount(ByAPI, Hold{Until: time.Now().Add(time.Minute), Class: classify.Billing})
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
		g.Hold(ByAPI, Hold{Until: time.Now().Add(time.Minute)})
		time.Sleep(time.Minute)
		admit(t, g)
		if d := refused(t, g, ReasonLimit); d < 900*time.Millisecond {
			t.Errorf("the second call after a hold may come after %v", d)
		}

		// The same when all creators were held.
		other := gates.Gate("b", time.Time{})
		gates.HoldAccount(ByAPI, Hold{Until: time.Now().Add(time.Minute)})
		gates.ReleaseAccount(ByAPI)
		admit(t, other)
		refused(t, other, ReasonLimit)
	})
}

func TestBulkheadForSlowCreators(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, func(c *Config) { c.InFlight, c.Creator.Concurrency = 8, 4 })
		a, b := gates.Gate("a", time.Time{}), gates.Gate("b", time.Time{})
		well := []*Gate{gates.Gate("c", time.Time{}), gates.Gate("d", time.Time{}), gates.Gate("e", time.Time{})}
		one, two := admit(t, a), admit(t, b)
		time.Sleep(1100 * time.Millisecond)
		// Both are slow now, by their calls still in flight, and may have a quarter of 8
		// and whatever is left over.
		all := []Permit{one, two, admit(t, a)}
		for _, g := range well {
			all = append(all, admit(t, g))
		}
		all = append(all, admit(t, b)) // one place is left
		refused(t, a, ReasonSlow)
		all = append(all, admit(t, well[0]))
		refused(t, well[0], ReasonWorker)
		for _, p := range all {
			p.End(time.Now(), Success)
			p.Close()
		}
		call(t, b, Success)
		call(t, a, Success)
		if a.slow {
			t.Error("a fast call does not make a creator fast again")
		}
		if n := gates.slow.Load(); n != 0 {
			t.Errorf("%d slow calls are counted with none in flight", n)
		}
	})
}

// Where every call takes long, no creator is slow, and the worker is used to
// the last place.
func TestSlowAPI(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, func(c *Config) { c.InFlight, c.Creator.Concurrency = 64, 4 })
		var all []*Gate
		for i := range 16 {
			all = append(all, gates.Gate(string(rune('a'+i)), time.Time{}))
		}
		admitted := 0
		for range 20 {
			var flying []Permit
			for _, g := range all {
				for range 4 {
					if p, _, ok := g.Admit(time.Now(), Read); ok {
						flying = append(flying, p)
					}
				}
			}
			admitted += len(flying)
			time.Sleep(1500 * time.Millisecond)
			for _, p := range flying {
				p.End(time.Now(), Success)
				p.Close()
			}
		}
		if admitted != 20*64 {
			t.Errorf("%d calls of %d possible", admitted, 20*64)
		}
		// One that takes long even then is slow.
		p := admit(t, all[0])
		time.Sleep(10 * time.Second)
		p.End(time.Now(), Success)
		p.Close()
		if !all[0].slow || all[1].slow {
			t.Errorf("slow: %v, %v", all[0].slow, all[1].slow)
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
		g.Hold(ByAPI, Hold{Until: time.Now().Add(time.Second)})
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
					p, no, ok := g.Admit(time.Now(), Read)
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
					g.Hold(ByAPI, Hold{Until: until})
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
				p, _, ok := g.Admit(time.Now(), Kind(n%2))
				if !ok {
					continue
				}
				p.End(time.Now(), Outcome(n%3))
				p.Close()
				if n%100 == 0 {
					g.Release(time.Now(), ByAPI)
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
		p, _, ok := g.Admit(now, Read)
		if !ok {
			b.Fatal("refused")
		}
		p.End(now, Success)
		p.Close()
	}
}
