package resilience

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// evidence is how many different creators must fail, with no success
	// between, before their trouble is taken for the provider's.
	evidence = 3

	// slowCall is the duration from which a creator's calls count as slow.
	slowCall = time.Second

	// slowShare of the worker's calls in flight is what all slow creators
	// together may have, as a divisor.
	slowShare = 4

	// probeWait is how long others wait for the call that finds out whether
	// an account's or a provider's trouble is over.
	probeWait = 500 * time.Millisecond

	// crowdedFor is for how long it is remembered that an idle creator had too
	// many calls in flight.
	crowdedFor = 10 * time.Minute

	// unknownLatency is taken for that of calls before the first has ended.
	unknownLatency = 100 * time.Millisecond

	// fastest is the least time between two turns.
	fastest = 50 * time.Microsecond

	// replanAbove is how far the turns of a creator must reach into the future
	// for it to be worth giving them anew.
	replanAbove = 5 * time.Second
)

// Gates makes gates and holds what they share. It is safe for concurrent use.
type Gates struct {
	cfg      Config
	account  shared
	provider shared
	outage   outage
	budget   *purse // nil: no limit of the account

	epoch    atomic.Int64 // grows whenever everybody may go on
	begun    atomic.Int64 // calls ever
	calling  atomic.Int64 // calls that have not ended
	inFlight atomic.Int64 // and those that have not been closed
	slow     atomic.Int64 // calls in flight of creators that are slow
}

// NewGates checks cfg and makes the shared part of a worker's gates.
func NewGates(cfg Config) (*Gates, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("gates: %w", err)
	}
	g := &Gates{cfg: cfg, outage: outage{cfg: cfg.Breaker}}
	if !cfg.Account.unlimited() {
		g.budget = &purse{}
	}
	return g, nil
}

// HoldAccount holds every creator, because of what the API said of the API key.
// After its end one call at a time finds out whether the cause is gone.
// It reports whether the hold outlasts what was there.
func (g *Gates) HoldAccount(h Hold) bool { return g.account.set(h) }

// HoldProvider is HoldAccount for trouble of the provider itself.
func (g *Gates) HoldProvider(h Hold) bool { return g.provider.set(h) }

// ReleaseAccount ends the account's hold before its time.
func (g *Gates) ReleaseAccount() { g.release(&g.account) }

// ReleaseProvider ends the provider's hold before its time.
func (g *Gates) ReleaseProvider() { g.release(&g.provider) }

func (g *Gates) release(s *shared) {
	if s.hold.Swap(nil) != nil {
		g.epoch.Add(1)
	}
}

// Blocked reports whether nobody may be called, so that a worker can stop
// pulling instead of sending a backlog round in circles.
func (g *Gates) Blocked(now time.Time) (Refusal, bool) {
	if no, blocked := g.account.blocks(now, ReasonAccountHold); blocked {
		return no, true
	}
	if no, blocked := g.provider.blocks(now, ReasonProviderHold); blocked {
		return no, true
	}
	return g.outage.blocks(now)
}

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

// SlowFull reports the same of the share that slow creators have.
func (g *Gates) SlowFull() bool {
	return g.slow.Load() >= int64(max(1, g.cfg.InFlight/slowShare))
}

// shared is a hold that concerns every creator.
type shared struct {
	hold    atomic.Pointer[Hold]
	probing atomic.Bool
}

func (s *shared) set(h Hold) bool {
	for {
		old := s.hold.Load()
		if !h.Outlasts(old) {
			return false
		}
		if s.hold.CompareAndSwap(old, &h) {
			return true
		}
	}
}

func (s *shared) blocks(now time.Time, r Reason) (Refusal, bool) {
	h := s.hold.Load()
	switch {
	case h == nil:
		return Refusal{}, false
	case h.Stands(now):
		return Refusal{Reason: r, NotBefore: h.Until, Hold: h}, true
	case s.probing.Load():
		return Refusal{Reason: r, NotBefore: now.Add(probeWait), Hold: h}, true
	}
	return Refusal{}, false
}

// probe claims the one call that finds out whether a hold that is over is
// over indeed. ended is nil where there is nothing to find out.
func (s *shared) probe() (ended *Hold, ok bool) {
	h := s.hold.Load()
	if h == nil {
		return nil, true
	}
	return h, s.probing.CompareAndSwap(false, true)
}

// probed takes the probe's outcome: unless there is a new hold by now, a
// callee that answers has forgiven.
func (g *Gates) probed(s *shared, ended *Hold, o Outcome) {
	if ended == nil {
		return
	}
	if o != Failed && s.hold.CompareAndSwap(ended, nil) {
		g.epoch.Add(1)
	}
	s.probing.Store(false)
}

// outage is the provider's breaker. It counts only the failures that different
// creators have in a row, since one creator's say little about the provider.
//
// Failures are often faster than successes. So when there is evidence, the
// calls in flight at that moment are heard first, for up to slowCall: a single
// success among them, and there is no outage.
type outage struct {
	cfg      Breaker
	troubled atomic.Bool // false: nothing to look at, the common case

	mu        sync.Mutex
	failing   map[string]struct{}
	suspected time.Time // when there was evidence first
	last      int64     // the latest call that had begun then
	unheard   int64     // calls in flight then, and still
	brk       *breaker
}

func (o *outage) blocks(now time.Time) (Refusal, bool) {
	if !o.troubled.Load() {
		return Refusal{}, false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	until, blocked := o.brk.blocks(now)
	if blocked && until.IsZero() {
		until = now.Add(probeWait)
	}
	return Refusal{Reason: ReasonProviderBreaker, NotBefore: until}, blocked
}

func (o *outage) allow() (*ticket, bool) {
	if !o.troubled.Load() {
		return nil, true
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.brk.allow()
}

func (o *outage) believed(now time.Time) bool {
	if !o.troubled.Load() {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.confirmed(now)
}

func (o *outage) confirmed(now time.Time) bool {
	return !o.suspected.IsZero() && (o.unheard <= 0 || now.Sub(o.suspected) >= slowCall)
}

// record takes the outcome of the call-th call and reports how it changed the
// breaker. begun and calling are how many calls have begun, and are in flight
// still.
func (o *outage) record(creator string, t *ticket, out Outcome, now time.Time, call, begun, calling int64) (opened, closed bool) {
	if out != Failed && !o.troubled.Load() {
		return false, false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.suspected.IsZero() && call <= o.last {
		o.unheard--
	}
	if out == Failed {
		o.troubled.Store(true)
		if o.failing == nil {
			o.failing = make(map[string]struct{}, evidence)
		}
		if len(o.failing) < evidence {
			o.failing[creator] = struct{}{}
			if len(o.failing) == evidence {
				o.suspected, o.last, o.unheard = now, begun, calling
			}
		}
		if o.brk == nil {
			o.brk = newBreaker(o.cfg, func(consecutive uint32) bool {
				return int(consecutive) >= o.cfg.Failures && o.confirmed(time.Now())
			})
		}
	}
	if o.brk == nil {
		return false, false
	}
	opened, closed = o.brk.record(t, out)
	if out == Success && o.brk.closed() {
		o.brk, o.failing, o.suspected = nil, nil, time.Time{}
		o.troubled.Store(false)
	}
	return opened, closed
}
