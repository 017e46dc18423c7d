package resilience

import (
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"
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
	ReasonTurn            Reason = "turn"    // others of this creator wait in front
	ReasonLimit           Reason = "limit"   // the creator's rate
	ReasonSlots           Reason = "slots"   // the creator's calls in flight
	ReasonSlow            Reason = "slow"    // the share of slow creators in the worker's
	ReasonWorker          Reason = "worker"  // the worker's calls in flight
	ReasonAccount         Reason = "account" // the account's rate
)

// Shared reports that what keeps a request is in use by other creators, and is
// no doing of its own.
func (r Reason) Shared() bool { return r == ReasonWorker || r == ReasonAccount }

// Refusal is the one reason why a call may not be made now.
type Refusal struct {
	Reason Reason
	// NotBefore is when it is worth asking again; zero where no time can be
	// said: when somebody releases the hold, when a call in flight ends, or
	// when the account's budget is funded.
	NotBefore time.Time
	Hold      *Hold // the hold, where that is the reason
}

// Gate says whether one creator may be called now. It is safe for concurrent
// use.
type Gate struct {
	creator string
	gates   *Gates

	mu       sync.Mutex
	epoch    int64 // of gates, when this gate last looked
	hold     *Hold
	brk      *breaker
	lanes    [2]*lane  // by Kind; one and the same unless limited apart
	limit    int       // of slots, as configured
	slots    int       // now: the API may want fewer
	calm     int       // successes since slots changed
	crowded  time.Time // when it last wanted fewer
	inFlight int
	slow     bool
	started  time.Time     // of the call that has been in flight longest, about
	latency  time.Duration // moving average
	sharing  time.Time     // since when it cannot have what all creators share
	share    time.Duration // between its calls then, moving average
}

// lane is a line of requests in front of one rate limit.
type lane struct {
	limiter  *rate.Limiter // nil: no limit
	interval time.Duration
	next     time.Time     // the first turn that nobody has, as far as calls at once go
	token    time.Time     // when there is a token for it
	planned  time.Duration // between the last turns given
}

func newLane(r Rate) *lane { return &lane{limiter: r.limiter(), interval: r.interval()} }

// drain leaves one token, so that traffic comes back at the rate and not in
// one burst.
func (l *lane) drain(now time.Time) {
	if l.limiter == nil {
		return
	}
	if n := int(l.limiter.TokensAt(now)) - 1; n > 0 {
		l.limiter.AllowN(now, n)
	}
}

// Gate makes a creator's gate. Its limiters hold what has accrued since
// emptySince, at most a burst; zero: a full burst. A new owner of a creator
// that was called elsewhere a moment ago must not give it a second burst.
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

// Permit is the right to make one call. End must be called when the call has
// ended and Close when the request is settled, once each and in this order.
type Permit struct {
	gate     *Gate
	call     int64 // of all calls, which one
	started  time.Time
	breaker  *ticket
	provider *ticket
	account  *Hold // hold that this call probes
	upstream *Hold
}

// Started is when the permit was given.
func (p Permit) Started() time.Time { return p.started }

// Admit takes everything that a call of this kind needs, or nothing and says
// why. A request that has waited was given a turn by [Gate.Turn]; one that has not
// does not overtake those that have.
func (g *Gate) Admit(now time.Time, kind Kind, waited bool) (p Permit, no Refusal, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	lane := g.lanes[kind]
	if no, refused := g.refuses(now, lane, waited); refused {
		if no.Reason.Shared() {
			if g.sharing.IsZero() {
				g.sharing = now
			}
		}
		return Permit{}, no, false
	}

	if !g.gates.takePlace() {
		return Permit{}, Refusal{Reason: ReasonWorker}, false
	}
	// From here on a refusal is a race lost to another creator's call. A token
	// lost that way under-admits, which is the safe side.
	p = Permit{gate: g, started: now}
	giveBack := func(no Refusal) (Permit, Refusal, bool) {
		g.gates.probed(&g.gates.account, p.account, Failed)
		g.gates.probed(&g.gates.provider, p.upstream, Failed)
		g.gates.inFlight.Add(-1)
		return Permit{}, no, false
	}
	soon := now.Add(probeWait)
	if p.account, ok = g.gates.account.probe(); !ok {
		p.account = nil
		return giveBack(Refusal{Reason: ReasonAccountHold, NotBefore: soon, Hold: g.gates.account.hold.Load()})
	}
	if p.upstream, ok = g.gates.provider.probe(); !ok {
		p.upstream = nil
		return giveBack(Refusal{Reason: ReasonProviderHold, NotBefore: soon, Hold: g.gates.provider.hold.Load()})
	}
	if !g.gates.budget.take(now) {
		return giveBack(Refusal{Reason: ReasonAccount})
	}
	if l := lane.limiter; l != nil && !l.AllowN(now, 1) {
		return giveBack(Refusal{Reason: ReasonLimit, NotBefore: nextToken(l, now)})
	}
	if p.provider, ok = g.gates.outage.allow(); !ok {
		return giveBack(Refusal{Reason: ReasonProviderBreaker, NotBefore: soon})
	}
	if p.breaker, ok = g.brk.allow(); !ok {
		g.gates.outage.record(g.creator, p.provider, Excluded, now, math.MaxInt64, 0, 0)
		return giveBack(Refusal{Reason: ReasonBreaker, NotBefore: soon})
	}

	var starved time.Duration // whoever comes by itself later does not wait
	if !g.sharing.IsZero() {
		starved, g.sharing = now.Sub(g.sharing), time.Time{}
	}
	g.share += (starved - g.share) / 8
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

// InFlight is the number of calls that have not ended.
func (g *Gate) InFlight() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.inFlight
}

// Unlearn forgets how much others leave of what all share, because the creator has not
// asked for any lately: the time in which it did not ask would count as if it had waited.
func (g *Gate) Unlearn() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.share, g.sharing = 0, time.Time{}
}

// Look says what would keep a call that has had its turn, without taking anything.
func (g *Gate) Look(now time.Time, kind Kind) (no Refusal, refused bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.refuses(now, g.lanes[kind], true)
}

// refuses looks without taking anything.
func (g *Gate) refuses(now time.Time, lane *lane, waited bool) (Refusal, bool) {
	if no, blocked := g.gates.account.blocks(now, ReasonAccountHold); blocked {
		return no, true
	}
	if no, blocked := g.gates.provider.blocks(now, ReasonProviderHold); blocked {
		return no, true
	}
	if g.hold != nil {
		if g.hold.Stands(now) {
			return Refusal{Reason: ReasonHold, NotBefore: g.hold.Until, Hold: g.hold}, true
		}
		g.hold = nil
		g.drain(now)
	}
	if epoch := g.gates.epoch.Load(); epoch != g.epoch {
		g.epoch = epoch
		g.drain(now)
	}
	if no, blocked := g.gates.outage.blocks(now); blocked {
		return no, true
	}
	if until, blocked := g.brk.blocks(now); blocked {
		return Refusal{Reason: ReasonBreaker, NotBefore: until}, true
	}
	if !waited && lane.next.After(now) {
		return Refusal{Reason: ReasonTurn, NotBefore: lane.next}, true
	}
	if at := nextToken(lane.limiter, now); at.After(now) {
		return Refusal{Reason: ReasonLimit, NotBefore: at}, true
	}
	if g.inFlight >= g.slots {
		return Refusal{Reason: ReasonSlots}, true
	}
	g.markSlow(g.slow || g.inFlight > 0 && now.Sub(g.started) > slowCall)
	if g.slow && g.gates.SlowFull() {
		return Refusal{Reason: ReasonSlow}, true
	}
	if g.gates.Full() {
		return Refusal{Reason: ReasonWorker}, true
	}
	// Last: tokens are leased for those whom nothing else keeps.
	if g.gates.Broke(now) {
		return Refusal{Reason: ReasonAccount}, true
	}
	return Refusal{}, false
}

func (g *Gate) drain(now time.Time) {
	for _, l := range g.lanes {
		l.drain(now)
	}
}

// nextToken is when l has a token, now if it has one.
func nextToken(l *rate.Limiter, now time.Time) time.Time {
	if l == nil {
		return now
	}
	missing := 1 - l.TokensAt(now)
	if missing <= 0 {
		return now
	}
	// A little later than computed, so that rounding never makes it too early.
	return now.Add(time.Duration(missing/float64(l.Limit())*float64(time.Second)) + time.Microsecond)
}

// Turn gives a request that was refused a time of its own: not before whatever
// forbids a call now is over, and one after another at the pace that the
// creator's limit, or its slots, will allow. So n waiting requests come back
// once each, and an outage does not end in a burst. ahead is how many of the
// creator's requests are waiting for their turn to be called already. jitter
// in [0, 1) moves the first turn after a hold later, so that creators do not
// come back at the same moment. The zero time means that nobody can say.
func (g *Gate) Turn(now time.Time, kind Kind, ahead int, jitter float64) time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	lane := g.lanes[kind]
	pace := g.pace(lane)
	opens, ok := g.opens(now, lane)
	if !ok {
		return time.Time{}
	}
	token := later(lane.token, opens)
	if lane.limiter != nil && !opens.After(now) {
		// Of a burst that is there, the next turns need not be apart.
		saved := time.Duration((lane.limiter.TokensAt(now) - 1) * float64(lane.interval))
		token = later(lane.token, now.Add(-saved))
	}
	at := later(later(lane.next, token), opens)
	at = later(at, now.Add(time.Duration(ahead)*g.alone()))
	if opens.After(now) && at.Equal(opens) {
		at = at.Add(time.Duration(jitter * float64(min(pace, time.Second))))
	}
	lane.token = token.Add(lane.interval)
	lane.next = at.Add(g.alone())
	lane.planned = pace
	return at
}

// Pace is the time between two turns.
func (g *Gate) Pace(kind Kind) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.pace(g.lanes[kind])
}

func (g *Gate) pace(l *lane) time.Duration {
	return max(l.interval, g.alone())
}

// alone is the time between two turns without a rate limit.
func (g *Gate) alone() time.Duration {
	latency := g.latency
	if latency == 0 {
		latency = unknownLatency
	}
	// Slots that were halved are on their way up again.
	return max(latency/time.Duration(min(2*g.slots, g.limit)), g.share, fastest)
}

// opens is the earliest time at which a call is thinkable; not ok where a hold
// waits for somebody to release it.
func (g *Gate) opens(now time.Time, lane *lane) (at time.Time, ok bool) {
	at = nextToken(lane.limiter, now)
	for _, h := range []*Hold{g.gates.account.hold.Load(), g.gates.provider.hold.Load(), g.hold} {
		if !h.Stands(now) {
			continue
		}
		if h.Until.IsZero() {
			return time.Time{}, false
		}
		at = later(at, h.Until)
	}
	if until, blocked := g.brk.blocks(now); blocked {
		at = later(at, until)
	}
	if no, blocked := g.gates.outage.blocks(now); blocked {
		at = later(at, no.NotBefore)
	}
	return at, true
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// Hold forbids calls until its end. A hold that ends before the one that is
// there changes nothing; Hold reports whether this one counts.
func (g *Gate) Hold(h Hold) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !h.Outlasts(g.hold) {
		return false
	}
	g.hold = &h
	return true
}

// Held is the hold that stands, nil if there is none.
func (g *Gate) Held(now time.Time) *Hold {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.hold.Stands(now) {
		return nil
	}
	return g.hold
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
		InFlight: g.inFlight, Slots: g.slots, Limit: g.limit, Slow: g.slow,
		NextToken: nextToken(g.lanes[kind].limiter, now), Latency: g.latency,
	}
	s.Breaker, s.BreakerUntil = g.brk.status(now)
	if g.hold.Stands(now) {
		s.Hold = g.hold
	}
	return s
}

// Release ends a hold before its time. Those who wait have to be given new
// turns, see [Gate.Replan].
func (g *Gate) Release(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.hold != nil {
		g.hold = nil
		g.drain(now)
	}
}

// SetLimits changes a creator's limits while it is being called. Its buckets
// keep what is in them, as far as it fits.
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
	g.slots, g.calm = l.Concurrency, 0
	return nil
}

// changed is a lane with another limit and the turns and tokens of this one.
func (l *lane) changed(now time.Time, r Rate) *lane {
	n := newLane(r)
	n.next, n.token, n.planned = l.next, l.token, l.planned
	if l.limiter != nil && n.limiter != nil {
		if missing := n.limiter.Burst() - int(max(0, l.limiter.TokensAt(now))); missing > 0 {
			n.limiter.AllowN(now, missing)
		}
	}
	return n
}

// Concurrency takes what an answer says about calls at once, before End: how many the
// API takes and has of this creator, 0 where it does not say, and whether
// it refused this one because there were too many. Slots are halved then, once
// for all that were under way, and come back one by one as calls succeed.
func (p Permit) Concurrency(now time.Time, limit, active int, refused bool) {
	g := p.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case refused && !p.started.Before(g.crowded):
		g.slots = max(1, g.slots/2)
	case refused:
	case limit > 0 && (limit < g.slots || active >= limit):
		g.slots = min(g.slots, limit)
	default:
		return
	}
	g.crowded, g.calm = now, 0
}

// Slots is the number of calls that may be in flight at once now.
func (g *Gate) Slots() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.slots
}

// Replan takes all turns back: whoever waits asks for a new one.
func (g *Gate) Replan() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, l := range g.lanes {
		l.next, l.token = time.Time{}, time.Time{}
	}
}

// Neutral reports that a gate remembers nothing that a new one would not know,
// so that it may be forgotten.
func (g *Gate) Neutral(now time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.inFlight > 0 || g.hold.Stands(now) || g.brk != nil || g.slow || g.slots < g.limit && now.Sub(g.crowded) < crowdedFor {
		return false
	}
	for _, l := range g.lanes {
		if l.next.After(now) || l.limiter != nil && l.limiter.TokensAt(now) < float64(l.limiter.Burst()) {
			return false
		}
	}
	return true
}

// Change is what a call's outcome did to the breakers.
type Change struct {
	Opened, Closed                 bool
	ProviderOpened, ProviderClosed bool
	OpenUntil                      time.Time // of the creator's, where it opened
	// Faster: calls end so much sooner than the turns were planned for that
	// they should be given anew, see [Gate.Replan].
	Faster bool
}

// End gives back the creator's slot and tells the breakers how the call went.
// Holds that the answer asks for must be set before, or another call slips
// through in between.
func (p Permit) End(now time.Time, o Outcome) Change {
	g := p.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	g.inFlight--
	calling := g.gates.calling.Add(-1)
	if g.slow {
		g.gates.slow.Add(-1)
	}
	took := now.Sub(p.started)
	if g.latency == 0 {
		g.latency = took
	}
	g.latency += (took - g.latency) / 4
	g.started = now // what is still in flight began before, and is measured from here
	g.markSlow(took > slowCall)

	if o == Success && g.slots < g.limit && !p.started.Before(g.crowded) {
		if g.calm++; g.calm >= g.slots {
			g.slots, g.calm = g.slots+1, 0
		}
	}

	var c Change
	g.gates.probed(&g.gates.account, p.account, o)
	g.gates.probed(&g.gates.provider, p.upstream, o)
	c.ProviderOpened, c.ProviderClosed = g.gates.outage.record(g.creator, p.provider, o, now, p.call, g.gates.begun.Load(), calling)
	if c.ProviderClosed {
		g.gates.epoch.Add(1)
	}

	if g.brk == nil && o == Failed {
		failures := g.gates.cfg.Breaker.Failures
		g.brk = newBreaker(g.gates.cfg.Breaker, func(consecutive uint32) bool { return int(consecutive) >= failures })
	}
	if g.brk != nil {
		c.Opened, c.Closed = g.brk.record(p.breaker, o)
		if c.Opened {
			c.OpenUntil = g.brk.openUntil
		}
		if c.Closed {
			g.drain(now)
		}
		if o == Success && g.brk.closed() {
			g.brk = nil
		}
	}
	for _, l := range g.lanes {
		c.Faster = c.Faster || l.next.Sub(now) > replanAbove && 2*g.pace(l) < l.planned
	}
	return c
}

// Close gives back the worker's place.
func (p Permit) Close() { p.gate.gates.inFlight.Add(-1) }

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
