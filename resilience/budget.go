package resilience

import (
	"math"
	"sync"
	"time"
)

// transit is how much later than others a call may reach the API, which counts it
// then: while its connection is made, for one. Burst has to cover that.
const transit = 100 * time.Millisecond

// slack is transit, but at most a quarter of a burst.
func (r Rate) slack() time.Duration {
	if r.unlimited() {
		return 0
	}
	return time.Duration(min(float64(transit), float64(r.Burst)/4*float64(time.Second)/r.PerSecond))
}

// LeaseLife is for how long leased tokens may be used. What is not used by then is
// lost, so that nobody can hoard tokens and break a window with them.
func (r Rate) LeaseLife() time.Duration { return r.slack() }

// Lease takes up to n tokens of a limit that several workers share. All that
// they share is tat, the theoretical arrival time of the generic cell rate
// algorithm (ITU-T I.371): when the bucket is full again. It returns how many are taken,
// the state that has to be stored before they may be used, and, if there
// are none, when there will be one.
//
// The tokens may be used for LeaseLife and reach the API after a further delay, so the
// burst is made smaller by both: however they are used, no window of the API
// sees more than its rate and burst allow.
func (r Rate) Lease(tat, now time.Time, n int) (granted int, newTAT, next time.Time) {
	interval := float64(time.Second) / r.PerSecond
	tolerance := max(interval, float64(r.Burst)*interval-2*float64(r.slack()))
	if tat.Before(now) {
		tat = now
	}
	room := tolerance - float64(tat.Sub(now))
	// Rounding must not refuse the one token that is there.
	granted = min(n, int(math.Floor(room/interval+1e-9)))
	if granted < 1 {
		return 0, tat, now.Add(time.Duration(math.Ceil(interval - room)))
	}
	return granted, tat.Add(time.Duration(math.Ceil(float64(granted) * interval))), time.Time{}
}

// purse holds the tokens of the account's limit that a worker has leased.
type purse struct {
	mu     sync.Mutex
	tokens int
	until  time.Time
}

func (p *purse) has(now time.Time) bool {
	if p == nil {
		return true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tokens > 0 && now.Before(p.until)
}

func (p *purse) take(now time.Time) bool {
	if p == nil {
		return true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tokens < 1 || !now.Before(p.until) {
		return false
	}
	p.tokens--
	return true
}

// Fund gives the gates n leased tokens of the account's limit, to be used
// before until. What was left of earlier ones is lost.
func (g *Gates) Fund(n int, until time.Time) {
	p := g.budget
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tokens, p.until = n, until
}

// Broke reports whether there is no token of the account's limit to be used.
func (g *Gates) Broke(now time.Time) bool { return !g.budget.has(now) }
