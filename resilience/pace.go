package resilience

import (
	"math"
	"time"
)

// Latency is the moving average of the time that the creator's calls took, 0 before the first
// has ended.
func (g *Gate) Latency() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.latency
}

// Tokens is the number of calls of a kind that the creator's rate allows at once now.
func (g *Gate) Tokens(now time.Time, kind Kind) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	l := g.lanes[kind].limiter
	if l == nil {
		return math.MaxInt32
	}
	return max(0, int(l.TokensAt(now)))
}

// ProviderOpen reports that the provider's breaker is open.
func (g *Gates) ProviderOpen() bool {
	o := &g.outage
	if !o.troubled.Load() {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.open
}

// Late reports whether so much time has passed since the permit was given that its tokens count no
// more: used now, the call could reach the API closer to another one than a limit allows.
func (p Permit) Late(now time.Time) bool {
	g := p.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	limited, single := !g.gates.cfg.Account.unlimited(), g.gates.cfg.Account.Burst == 1
	for _, l := range g.lanes {
		if l.limiter != nil {
			limited, single = true, single || l.limiter.Burst() == 1
		}
	}
	after := transit
	if single { // nothing is kept back for calls that are late
		after = leaseLeast
	}
	return limited && now.Sub(p.started) > after
}
