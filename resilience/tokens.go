package resilience

import (
	"math"
	"sync"
	"time"
)

const (
	// leaseLate is how much later than it should be a leased token may be used.
	leaseLate = 100 * time.Millisecond

	// leaseLeast is that for the last token of a lease, where the burst is too
	// small for it. A pause between the leases of two workers makes up for it.
	leaseLeast = 5 * time.Millisecond

	// leaseUse is the part of a small burst, up to a quarter, that is not kept
	// back for calls that arrive late.
	leaseUse = 20 * time.Millisecond
)

// plan is a Rate as workers share it. Each call has a slot of one interval of
// its own, and slots do not overlap. It begins at most burst - 1 intervals before its
// slot and at most late after the slot's begin, and reaches the API up to transit
// later. So the API sees at most burst + rate × (late + transit + t) calls in
// any time t, and burst is chosen so that this is Burst + rate × t.
//
// A burst of one leaves nothing for late and transit: no two calls begin closer
// together than the rate says, and they arrive as the network brings them. Where
// the calls of a tenth of a second are nearly as many as Burst, or more, transit
// is as long as the burst allows.
type plan struct {
	burst    int
	interval time.Duration
	late     time.Duration
	pause    time.Duration // between two workers' leases
}

func (r Rate) plan() plan {
	perNs := r.PerSecond / float64(time.Second)
	room := float64(r.Burst-1) / perNs // what the burst can cover, in ns
	use := min(room/4, float64(leaseUse))
	late := min(float64(transit), room-use)
	burst := max(1, math.Floor(float64(r.Burst)-perNs*(late+min(use, float64(leaseLeast)))))
	p := plan{
		burst:    int(burst),
		interval: max(1, time.Duration(math.Ceil(1/perNs))),
		late:     time.Duration(min(float64(leaseLate), (float64(r.Burst)-burst)/perNs-late)),
	}
	if burst == 1 {
		p.pause = max(0, leaseLeast-p.late)
	}
	return p
}

// Interval is the time between two calls of a limit that workers share.
func (r Rate) Interval() time.Duration { return r.plan().interval }

// Fill is the time in which a burst that workers share comes back.
func (r Rate) Fill() time.Duration {
	p := r.plan()
	return time.Duration(p.burst) * p.interval
}

// Pause is the time that is lost between the leases of two workers, 0 where the
// burst covers it.
func (r Rate) Pause() time.Duration { return r.plan().pause }

// Tokens are N calls of the account's limit that a worker may begin: the first
// between From and Until, and each further one Step and Every later, up to Last.
// After Until the first one's time is over, and it takes the time of those
// after it, so that the last ones are lost.
type Tokens struct {
	From, Until, Last time.Time
	Step, Every       time.Duration
	N                 int

	pause time.Duration // after Last, in which no other worker calls
}

// Lease takes tokens of a limit that several workers share, for calls from
// a moment on: the moment when the lease will have been stored, or later. Up to
// atOnce come at that moment, as far as the burst allows. If these are fewer
// than n, the rest comes after them, one each interval. The workers share
// tat, the theoretical arrival time of the generic cell rate algorithm (ITU-T
// I.371): when the burst is complete again. Lease returns tat as it has to
// be stored before the tokens may be used.
//
// pause is what the worker's last lease returned if no other worker has
// leased since, otherwise 0: calls that follow that lease's at once need no pause.
func (r Rate) Lease(tat, from time.Time, pause time.Duration, atOnce, n int) (tokens []Tokens, newTAT time.Time, newPause time.Duration) {
	p := r.plan()
	early := time.Duration(p.burst-1) * p.interval // how long before its slot a call may begin
	slot := tat.Add(-pause)
	if slot.Before(from) {
		slot = later(tat, from)
	}
	begin := later(from, slot.Add(-early))
	if k := min(atOnce, int((early-slot.Sub(from))/p.interval)+1); k > 0 && !slot.Add(-early).After(from) && p.burst > 1 {
		tokens = append(tokens, p.tokens(from, slot, 0, k))
		n -= k
		slot = slot.Add(time.Duration(k) * p.interval)
		begin = later(from.Add(p.interval), slot.Add(-early))
	}
	if n > 0 {
		slot = later(slot, begin)
		tokens = append(tokens, p.tokens(begin, slot, p.interval, n))
		slot = slot.Add(time.Duration(n) * p.interval)
	}
	return tokens, slot.Add(p.pause), p.pause
}

func (p plan) tokens(from, slot time.Time, step time.Duration, n int) Tokens {
	until := slot.Add(p.late)
	return Tokens{
		From: from, Until: until, Last: until.Add(time.Duration(n-1) * p.interval),
		Step: step, Every: p.interval, N: n, pause: p.pause,
	}
}

// left is the number of calls that may still begin.
func (t *Tokens) left(now time.Time) int {
	until := later(t.Until, now)
	switch {
	case t.N == 0 || now.After(t.Last.Add(t.pause)):
		return 0
	case until.After(t.Last):
		return 1
	}
	return min(t.N, int(t.Last.Sub(until)/t.Every)+1)
}

func (t *Tokens) take(now time.Time) {
	t.N = t.left(now) - 1
	missed := later(t.Until, now).Sub(t.Until)
	t.From = t.From.Add(missed + t.Step)
	t.Until = t.Until.Add(missed + t.Every)
}

// extend makes more, if its calls are those after t's, with none of another worker
// between, a part of t: they must keep their distance from t's.
func (t *Tokens) extend(more Tokens) bool {
	const rounding = time.Microsecond
	if t.Step == 0 || more.Step == 0 || more.Every != t.Every ||
		more.Until.Sub(t.Last) > t.Every+rounding ||
		(more.Until.Sub(more.From)-t.Until.Sub(t.From)).Abs() > rounding {
		return false
	}
	t.N, t.Last = t.N+more.N, more.Last
	return true
}

// tokens holds the tokens of the account's limit that a worker has leased.
type tokens struct {
	mu   sync.Mutex
	all  []Tokens // in the order in which they were leased
	used uint64
}

func (p *tokens) add(now time.Time, more []Tokens) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tidy(now)
	for _, t := range more {
		if n := len(p.all); n == 0 || !p.all[n-1].extend(t) {
			p.all = append(p.all, t)
		}
	}
}

// tidy forgets tokens that are used up or lost, but the last ones: the next may
// extend them.
func (p *tokens) tidy(now time.Time) {
	for len(p.all) > 1 && p.all[0].left(now) == 0 {
		p.all = p.all[1:]
	}
}

// next is when a call may begin, not before now.
func (p *tokens) next(now time.Time) (at time.Time, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.all {
		t := &p.all[i]
		if t.left(now) == 0 {
			continue
		}
		if from := later(now, t.From); !ok || from.Before(at) {
			at, ok = from, true
		}
	}
	return at, ok
}

func (p *tokens) held(now time.Time) (n int, used uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.all {
		n += p.all[i].left(now)
	}
	return n, p.used
}

func (p *tokens) take(now time.Time) bool {
	if p == nil {
		return true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tidy(now)
	for i := range p.all {
		if t := &p.all[i]; !now.Before(t.From) && t.left(now) > 0 {
			t.take(now)
			p.used++
			return true
		}
	}
	return false
}

// AddTokens gives the gates leased tokens of the account's limit.
func (g *Gates) AddTokens(now time.Time, t ...Tokens) {
	if g.tokens != nil {
		g.tokens.add(now, t)
	}
}

// NextToken is when the account's limit lets the next call of this worker begin;
// not ok if the worker has no tokens. Without such a limit it is now.
func (g *Gates) NextToken(now time.Time) (at time.Time, ok bool) {
	if g.tokens == nil {
		return now, true
	}
	return g.tokens.next(now)
}

// Tokens is the number of calls that the worker may still begin with the tokens it
// has, and how many it has ever begun.
func (g *Gates) Tokens(now time.Time) (left int, used uint64) {
	if g.tokens == nil {
		return 0, 0
	}
	return g.tokens.held(now)
}

// Empty reports whether the account's limit has no token for a call that would
// begin now.
func (g *Gates) Empty(now time.Time) bool {
	at, ok := g.NextToken(now)
	return !ok || at.After(now)
}
