package resilience

import (
	"sync"
	"time"
)

// Reason says what keeps a request from being called.
type Reason string

// In the order in which a gate asks.
const (
	ReasonAccountHold     Reason = "account_hold"
	ReasonProviderHold    Reason = "provider_hold"
	ReasonHold            Reason = "hold"
	ReasonProviderBreaker Reason = "provider_breaker"
	ReasonBreaker         Reason = "breaker"
	ReasonLimit           Reason = "limit"   // the creator's rate
	ReasonSlots           Reason = "slots"   // the creator's calls in flight
	ReasonSlow            Reason = "slow"    // the share of slow creators in the worker's calls
	ReasonWorker          Reason = "worker"  // the worker's calls in flight
	ReasonAccount         Reason = "account" // the account's rate
)

// Shared reports that other creators use up the thing that is missing, and that it
// is no doing of the creator.
func (r Reason) Shared() bool { return r == ReasonWorker || r == ReasonAccount }

// Refusal is the one reason why a call may not be made now.
type Refusal struct {
	Reason Reason
	// NotBefore is when it is worth asking again; zero where no time can be
	// said: when the hold is released, when a call in flight ends, or when
	// the account's limit has tokens again.
	NotBefore time.Time
	Hold      *Hold // the hold, where that is the reason
}

// Gate says whether one creator may be called now. It is safe for concurrent
// use.
type Gate struct {
	creator string
	gates   *Gates

	mu        sync.Mutex
	epoch     int64 // of gates, when this gate last looked
	holds     holds
	brk       *breaker
	lanes     [2]*lane // by Kind; one and the same unless limited apart
	limit     int      // of slots, as configured
	slots     int      // now: the API may want fewer
	streak    int      // successes since slots changed
	inFlight  int
	slow      bool
	congested time.Time     // when the API last wanted fewer slots
	started   time.Time     // of the call that has been in flight longest, about
	latency   time.Duration // moving average
}

// Gate makes a creator's gate. Its limiters hold the tokens that have accrued
// since emptySince, at most a burst; zero: a full burst. A new owner of a creator
// that was called elsewhere a moment ago must not give it a second burst, and
// cannot know how much of the first one is left. So a creator that is called
// as fast as its rate allows has, after a change of owner, had one burst less: that
// many calls, once. It never costs rate, and a creator that pauses gets its
// burst back.
func (g *Gates) Gate(creator string, emptySince time.Time) *Gate {
	l := g.cfg.Creator
	common := newLane(l.Rate)
	gate := &Gate{
		creator: creator, gates: g, epoch: g.epoch.Load(),
		limit: l.Concurrency, slots: l.Concurrency, lanes: [2]*lane{common, common},
	}
	if l.Read != nil {
		gate.lanes[Read] = newLane(*l.Read)
	}
	if l.Write != nil {
		gate.lanes[Write] = newLane(*l.Write)
	}
	if !emptySince.IsZero() {
		for _, l := range gate.lanes {
			if l.limiter != nil {
				l.limiter.AllowN(emptySince, l.limiter.Burst())
			}
		}
	}
	return gate
}

// Admit takes everything that a call of this kind needs, or nothing and says
// why.
func (g *Gate) Admit(now time.Time, kind Kind) (p Permit, no Refusal, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	lane := g.lanes[kind]
	if no, refused := g.refuses(now, lane); refused {
		return Permit{}, no, false
	}
	// From here on a refusal is a race lost to another creator's call. A token
	// lost that way under-admits, which is the safe side.
	p = Permit{gate: g, started: now}
	if no, ok := g.take(&p, now, lane); !ok {
		p.giveBack(now)
		return Permit{}, no, false
	}
	if g.inFlight == 0 {
		g.started = now
	}
	g.inFlight++
	g.gates.calling.Add(1)
	p.call = g.gates.begun.Add(1)
	if g.slow {
		g.gates.slow.Add(1)
	}
	return p, Refusal{}, true
}

// take fills the permit with everything that has to be given back or reported
// on. The breakers come last, because their tickets must always be reported.
func (g *Gate) take(p *Permit, now time.Time, lane *lane) (no Refusal, ok bool) {
	gates, healthy := g.gates, g.brk == nil
	if p.placed = gates.takePlace(); !p.placed {
		return Refusal{Reason: ReasonWorker}, false
	}
	if p.account, no, ok = gates.account.admit(now, ReasonAccountHold, healthy); !ok {
		return no, false
	}
	if p.provider, no, ok = gates.provider.admit(now, ReasonProviderHold, healthy); !ok {
		return no, false
	}
	if !gates.tokens.take(now) {
		return Refusal{Reason: ReasonAccount}, false
	}
	if !lane.take(now) {
		return Refusal{Reason: ReasonLimit, NotBefore: lane.next(now)}, false
	}
	if p.outage, no, ok = gates.outage.admit(now, g.brk.trouble()); !ok {
		return no, false
	}
	if p.breaker, ok = g.brk.allow(); !ok {
		return Refusal{Reason: ReasonBreaker, NotBefore: now.Add(probeWait)}, false
	}
	return Refusal{}, true
}

// Look says what would keep a call, without taking anything.
func (g *Gate) Look(now time.Time, kind Kind) (no Refusal, refused bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.refuses(now, g.lanes[kind])
}

// refuses looks without taking anything.
func (g *Gate) refuses(now time.Time, lane *lane) (Refusal, bool) {
	if no, blocked := g.held(now); blocked {
		return no, true
	}
	if no, blocked := g.gates.outage.blocks(now, g.brk.trouble()); blocked {
		return no, true
	}
	if until, blocked := g.brk.blocks(now); blocked {
		return Refusal{Reason: ReasonBreaker, NotBefore: until}, true
	}
	if at := lane.next(now); at.After(now) {
		return Refusal{Reason: ReasonLimit, NotBefore: at}, true
	}
	if g.inFlight >= g.slots {
		return Refusal{Reason: ReasonSlots}, true
	}
	g.markSlow(g.slow || g.inFlight > 0 && g.gates.isSlow(now.Sub(g.started)))
	if g.slow && g.gates.SlowFull() {
		return Refusal{Reason: ReasonSlow}, true
	}
	if g.gates.Full() {
		return Refusal{Reason: ReasonWorker}, true
	}
	// Last: tokens are leased for calls that nothing else keeps.
	if g.gates.Empty(now) {
		return Refusal{Reason: ReasonAccount}, true
	}
	return Refusal{}, false
}

// held says which hold keeps a call. A hold that has ended is forgotten, and
// the burst that has accrued meanwhile with it.
func (g *Gate) held(now time.Time) (Refusal, bool) {
	healthy := g.brk == nil
	if no, blocked := g.gates.account.blocks(now, ReasonAccountHold, healthy); blocked {
		return no, true
	}
	if no, blocked := g.gates.provider.blocks(now, ReasonProviderHold, healthy); blocked {
		return no, true
	}
	if h := g.holds.standing(now); h != nil {
		return Refusal{Reason: ReasonHold, NotBefore: h.Until, Hold: h}, true
	}
	epoch := g.gates.epoch.Load()
	if g.holds.last() != nil || epoch != g.epoch {
		g.holds, g.epoch = holds{}, epoch
		g.drain(now)
	}
	return Refusal{}, false
}

func (g *Gate) drain(now time.Time) {
	for _, l := range g.lanes {
		l.drain(now)
	}
}

// Hold forbids calls until its end. The API's hold stays if it outlasts h, and
// people's is replaced. It reports whether something changed.
func (g *Gate) Hold(by Authority, h Hold) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.holds.set(by, h)
}

// Held is the hold that stands, the later one where both authorities have
// one, and nil if there is none.
func (g *Gate) Held(now time.Time) *Hold {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.holds.standing(now)
}

// Release ends an authority's hold before its time.
func (g *Gate) Release(now time.Time, by Authority) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.holds[by] != nil {
		g.holds[by] = nil
		g.drain(now)
	}
}

// InFlight is the number of calls that have not ended.
func (g *Gate) InFlight() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.inFlight
}

// Slots is the number of calls that may be in flight at once now.
func (g *Gate) Slots() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.slots
}

// Interval is the time between two calls at the configured rate, 0 if there is
// no limit.
func (g *Gate) Interval(kind Kind) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.lanes[kind].interval
}

// Status is a gate as it is at a moment, for people.
type Status struct {
	Hold         *Hold // that stands, nil if none does
	Breaker      BreakerState
	BreakerUntil time.Time // when it is open
	InFlight     int
	Slots        int
	Limit        int // of slots, as configured
	Slow         bool
	NextToken    time.Time     // when the rate allows the next call
	Latency      time.Duration // of calls, moving average; 0: none has ended
}

// Status looks without changing anything.
func (g *Gate) Status(now time.Time, kind Kind) Status {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := Status{
		Hold: g.holds.standing(now), InFlight: g.inFlight, Slots: g.slots, Limit: g.limit, Slow: g.slow,
		NextToken: g.lanes[kind].next(now), Latency: g.latency,
	}
	s.Breaker, s.BreakerUntil = g.brk.status(now)
	return s
}

// SetLimits changes a creator's limits while it is being called. Its buckets
// keep their tokens, as far as they fit.
func (g *Gate) SetLimits(now time.Time, l Limits) error {
	if err := l.Check(); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	common := g.lanes[Write].changed(now, l.Rate)
	lanes := [2]*lane{common, common}
	for kind, own := range [2]*Rate{l.Read, l.Write} {
		if own != nil {
			lanes[kind] = g.lanes[kind].changed(now, *own)
		}
	}
	g.lanes = lanes
	g.limit = l.Concurrency
	g.slots, g.streak = l.Concurrency, 0
	return nil
}

// Neutral reports that a gate remembers nothing that a new one would not know,
// so that it may be forgotten.
func (g *Gate) Neutral(now time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.inFlight > 0 || g.holds.standing(now) != nil || g.brk != nil || g.slow || g.slots < g.limit && now.Sub(g.congested) < congestedFor {
		return false
	}
	return g.lanes[Read].full(now) && g.lanes[Write].full(now)
}

// markSlow moves the creator's calls in flight into or out of the share that
// slow creators have.
func (g *Gate) markSlow(slow bool) {
	if slow == g.slow {
		return
	}
	g.slow = slow
	if slow {
		g.gates.slow.Add(int64(g.inFlight))
	} else {
		g.gates.slow.Add(-int64(g.inFlight))
	}
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
