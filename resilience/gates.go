package resilience

import (
	"fmt"
	"sync/atomic"
	"time"
)

const (
	// slowCall is the duration from which a creator's calls count as slow, if they
	// also take slowTimes as long as the worker's calls usually do.
	slowCall  = time.Second
	slowTimes = 4

	// slowShare of the worker's calls in flight is what all slow creators
	// together may have while places are short, as a divisor. As much is
	// always left for the others.
	slowShare = 4

	// usualStep is the part by which a call's time moves the usual time.
	usualStep = 16

	// congestedFor is for how long it is remembered that an idle creator had too
	// many calls in flight.
	congestedFor = 10 * time.Minute
)

// Gates makes gates and holds what they share. It is safe for concurrent use.
type Gates struct {
	cfg      Config
	account  shared
	provider shared
	outage   outage
	tokens   *tokens // nil: no limit of the account

	epoch    atomic.Int64 // grows when a shared hold or outage is over
	begun    atomic.Int64 // calls ever
	calling  atomic.Int64 // calls that have not ended
	inFlight atomic.Int64 // and those that have not been closed
	slow     atomic.Int64 // calls in flight of creators that are slow
	usual    atomic.Int64 // nanoseconds that calls take, a moving median
}

// NewGates checks cfg and makes the shared part of a worker's gates.
func NewGates(cfg Config) (*Gates, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("gates: %w", err)
	}
	g := &Gates{cfg: cfg, outage: outage{failures: cfg.Breaker.Failures}}
	if !cfg.Account.unlimited() {
		g.tokens = &tokens{}
	}
	return g, nil
}

// HoldAccount holds every creator, because of what the API said of the API key.
// After its end one call at a time finds out whether the cause is gone. The
// API's hold stays if it outlasts h, and people's is replaced. It
// reports whether something changed.
func (g *Gates) HoldAccount(by Authority, h Hold) bool { return g.account.set(by, h) }

// HoldProvider is HoldAccount for trouble of the provider itself.
func (g *Gates) HoldProvider(by Authority, h Hold) bool { return g.provider.set(by, h) }

// ReleaseAccount ends an authority's hold of the account before its time.
func (g *Gates) ReleaseAccount(by Authority) { g.release(&g.account, by) }

// ReleaseProvider ends an authority's hold of the provider before its time.
func (g *Gates) ReleaseProvider(by Authority) { g.release(&g.provider, by) }

func (g *Gates) release(s *shared, by Authority) {
	if s.release(by) {
		g.epoch.Add(1)
	}
}

// report takes the outcome of the first call after a shared hold.
func (g *Gates) report(s *shared, p *probe, o Outcome) {
	if s.report(p, o) {
		g.epoch.Add(1)
	}
}

// AccountHeld is the account's hold that stands, the later one where both
// authorities have one, and nil if there is none.
func (g *Gates) AccountHeld(now time.Time) *Hold { return g.account.standing(now) }

// ProviderHeld is AccountHeld for the provider.
func (g *Gates) ProviderHeld(now time.Time) *Hold { return g.provider.standing(now) }

// Blocked reports whether a hold of the account or of the provider stands, so
// that a worker can stop pulling instead of sending a backlog round in circles.
func (g *Gates) Blocked(now time.Time) (Refusal, bool) {
	if h := g.account.standing(now); h != nil {
		return Refusal{Reason: ReasonAccountHold, NotBefore: h.Until, Hold: h}, true
	}
	if h := g.provider.standing(now); h != nil {
		return Refusal{Reason: ReasonProviderHold, NotBefore: h.Until, Hold: h}, true
	}
	return Refusal{}, false
}

// SetWorkers says how many workers are alive. They all find out whether an outage of the
// provider is over, and share the calls that this costs.
func (g *Gates) SetWorkers(n int) { g.outage.workers.Store(int64(n)) }

// ProviderFailing reports whether enough different creators have failed, with
// no success between, to believe that the provider is in trouble.
func (g *Gates) ProviderFailing(now time.Time) bool { return g.outage.believed(now) }

// InFlight is the number of permits that have not been closed.
func (g *Gates) InFlight() int { return int(g.inFlight.Load()) }

// takePlace takes one of the worker's calls in flight.
func (g *Gates) takePlace() bool {
	if g.inFlight.Add(1) > int64(g.cfg.InFlight) {
		g.inFlight.Add(-1)
		return false
	}
	return true
}

// Full reports whether the worker has no call in flight left to give.
func (g *Gates) Full() bool { return g.inFlight.Load() >= int64(g.cfg.InFlight) }

// SlowFull reports whether the slow creators have their share of the worker's
// calls in flight, and others need the rest.
func (g *Gates) SlowFull() bool {
	share := int64(max(1, g.cfg.InFlight/slowShare))
	free := int64(g.cfg.InFlight) - g.inFlight.Load()
	return g.slow.Load() >= share && free < share
}

// took moves the usual time of the worker's calls, a median, towards a call's.
func (g *Gates) took(d time.Duration) {
	for {
		old := g.usual.Load()
		usual := old
		switch {
		case old == 0:
			usual = int64(d)
		case int64(d) > old:
			usual += old/usualStep + 1
		case int64(d) < old:
			usual -= old / usualStep
		}
		if g.usual.CompareAndSwap(old, usual) {
			return
		}
	}
}

// isSlow reports whether a call that takes so long is slow for this worker. If
// the API itself is slow, no creator is.
func (g *Gates) isSlow(d time.Duration) bool {
	return d > max(slowCall, slowTimes*time.Duration(g.usual.Load()))
}
