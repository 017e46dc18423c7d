package resilience

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-io/headgate/classify"
)

// Neither authority shortens what the other says, and each releases its own.
func TestTwoAuthorities(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, nil)
		g := gates.Gate("a", time.Time{})
		now := time.Now()
		at := func(d time.Duration) Hold { return Hold{Until: now.Add(d)} }
		for name, h := range map[string]struct {
			hold    func(Authority, Hold) bool
			release func(Authority)
			held    func(time.Time) *Hold
		}{
			"creator":  {g.Hold, func(by Authority) { g.Release(now, by) }, g.Held},
			"account":  {gates.HoldAccount, gates.ReleaseAccount, gates.AccountHeld},
			"provider": {gates.HoldProvider, gates.ReleaseProvider, gates.ProviderHeld},
		} {
			steps := []struct {
				what    string
				by      Authority
				until   time.Duration // -1: release
				changed bool
				want    time.Duration // held for, 0: not at all
			}{
				{"an operator", ByPeople, 2 * time.Hour, true, 2 * time.Hour},
				{"the same again", ByPeople, 2 * time.Hour, false, 2 * time.Hour},
				{"an answer, shorter", ByAPI, time.Hour, true, 2 * time.Hour},
				{"an answer, shorter still", ByAPI, time.Minute, false, 2 * time.Hour},
				{"the operator releases", ByPeople, -1, true, time.Hour},
				{"an operator, shorter than the answer", ByPeople, time.Minute, true, time.Hour},
				{"an answer, longer", ByAPI, 3 * time.Hour, true, 3 * time.Hour},
				{"the answer's is released", ByAPI, -1, true, time.Minute},
				{"an operator shortens its own", ByPeople, time.Second, true, time.Second},
				{"and releases it", ByPeople, -1, true, 0},
			}
			for _, s := range steps {
				if s.until < 0 {
					h.release(s.by)
				} else if changed := h.hold(s.by, at(s.until)); changed != s.changed {
					t.Errorf("%s: %s: changed is %v", name, s.what, changed)
				}
				var got time.Duration
				if held := h.held(now); held != nil {
					got = held.Until.Sub(now)
				}
				if got != s.want {
					t.Errorf("%s: %s: held for %v, want %v", name, s.what, got, s.want)
				}
			}
		}
	})
}

// A hold that comes between looking and taking is not taken for one that has
// ended.
func TestStandingHoldIsNotProbed(t *testing.T) {
	now := time.Now()
	var s shared
	s.set(ByAPI, Hold{Until: now.Add(time.Minute)})
	if p, no, ok := s.admit(now, ReasonAccountHold, true); ok || p != nil || !no.NotBefore.Equal(now.Add(time.Minute)) {
		t.Errorf("probe %v of a standing hold, %+v", p, no)
	}
}

// Whatever calls are under way, a hold stays until its end.
func TestSharedHoldStays(t *testing.T) {
	gates := newGates(t, nil)
	var stop atomic.Bool
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			g := gates.Gate(fmt.Sprint(i), time.Time{})
			for !stop.Load() {
				if p, _, ok := g.Admit(time.Now(), Read); ok {
					runtime.Gosched()
					p.End(time.Now(), Success)
					p.Close()
				}
			}
		})
	}
	lost := 0
	for range 500 {
		gates.HoldAccount(ByAPI, Hold{Until: time.Now().Add(time.Hour), Class: classify.Billing})
		for range 3 {
			runtime.Gosched()
		}
		if gates.AccountHeld(time.Now()) == nil {
			lost++
		}
		gates.ReleaseAccount(ByAPI)
	}
	stop.Store(true)
	wg.Wait()
	if lost > 0 {
		t.Errorf("in %d rounds the account's hold, which was not released, was gone", lost)
	}
}

func TestProbeOfSharedHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, nil)
		well, ill := gates.Gate("well", time.Time{}), gates.Gate("ill", time.Time{})
		call(t, ill, Failed)
		gates.HoldAccount(ByAPI, Hold{Until: time.Now().Add(time.Minute)})
		time.Sleep(time.Minute)

		// A creator in trouble of its own finds nothing out about the account.
		if d := refused(t, ill, ReasonAccountHold); d != probeFor {
			t.Errorf("a failing creator may ask in %v", d)
		}
		p := admit(t, well)
		refused(t, well, ReasonAccountHold)
		p.End(time.Now(), NotMade) // nothing was found out
		p.Close()
		p = admit(t, well)
		time.Sleep(probeFor) // and a call that hangs keeps the others for a moment only
		next := admit(t, well)
		refused(t, well, ReasonAccountHold)
		p.End(time.Now(), Failed)
		refused(t, well, ReasonAccountHold) // the next one is still under way
		next.End(time.Now(), Excluded)
		admit(t, well)
		admit(t, ill)
	})
}

// A failing creator asks if no other does.
func TestProbeWithoutHealthyCreators(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, nil)
		ill := gates.Gate("ill", time.Time{})
		call(t, ill, FailedAlone)
		gates.HoldProvider(ByPeople, Hold{Until: time.Now().Add(time.Minute)})
		time.Sleep(time.Minute)
		time.Sleep(refused(t, ill, ReasonProviderHold))
		call(t, ill, FailedAlone) // an API that answers has no reason to hold the others
		admit(t, gates.Gate("other", time.Time{}))
	})
}

// A permit says whether a hold has come since, whenever that hold began.
func TestValid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := newGates(t, nil)
		g := gates.Gate("a", time.Time{})
		p := admit(t, g)
		if no, ok := p.Valid(time.Now()); !ok {
			t.Errorf("nothing holds, but %v", no.Reason)
		}
		before := Hold{Since: time.Now().Add(-time.Hour), Until: time.Now().Add(time.Hour)}
		for _, c := range []struct {
			reason  Reason
			hold    func(Authority, Hold) bool
			release func(Authority)
		}{
			{ReasonHold, g.Hold, func(by Authority) { g.Release(time.Now(), by) }},
			{ReasonAccountHold, gates.HoldAccount, gates.ReleaseAccount},
			{ReasonProviderHold, gates.HoldProvider, gates.ReleaseProvider},
		} {
			for _, by := range []Authority{ByPeople, ByAPI} {
				c.hold(by, before)
				if no, ok := p.Valid(time.Now()); ok || no.Reason != c.reason || !no.NotBefore.Equal(before.Until) {
					t.Errorf("%s: %v, %+v", c.reason, ok, no)
				}
				c.release(by)
			}
		}
		if no, ok := p.Valid(time.Now()); !ok {
			t.Errorf("all are released, but %v", no.Reason)
		}
		p.End(time.Now(), NotMade)
		p.Close()
		if s := g.Status(time.Now(), Read); s.Latency != 0 {
			t.Error("a call that was not made has a latency")
		}
	})
}

// A hundred thousand creators are a few dozen megabytes.
func TestMemoryOfAGate(t *testing.T) {
	gates := newGates(t, func(c *Config) {
		c.Creator.Rate = Rate{PerSecond: 1, Burst: 90}
		c.Creator.Write = &Rate{PerSecond: 1, Burst: 10}
	})
	const n = 10_000
	all := make([]*Gate, n)
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	for i := range all {
		all[i] = gates.Gate("creator", time.Time{})
		call(t, all[i], Success)
	}
	if each := (heap() - before) / n; each > 700 {
		t.Errorf("a gate takes %d bytes", each)
	} else {
		t.Logf("a gate takes %d bytes", each)
	}
	runtime.KeepAlive(all)
}
