package resilience

import (
	"time"

	"golang.org/x/time/rate"
)

// lane is one rate limit of a creator. Both kinds of calls share one, unless
// they are limited apart. It needs the gate's lock.
type lane struct {
	limiter  *rate.Limiter // nil: no limit
	interval time.Duration // between two calls at the rate, 0: no limit
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

// next is when the lane has a token, now if it has one.
func (l *lane) next(now time.Time) time.Time {
	if l.limiter == nil {
		return now
	}
	missing := 1 - l.limiter.TokensAt(now)
	if missing <= 0 {
		return now
	}
	// A little later than computed, so that rounding never makes it too early.
	return now.Add(seconds(missing/float64(l.limiter.Limit())) + time.Microsecond)
}

// take reports whether there was a token.
func (l *lane) take(now time.Time) bool { return l.limiter == nil || l.limiter.AllowN(now, 1) }

func (l *lane) full(now time.Time) bool {
	return l.limiter == nil || l.limiter.TokensAt(now) >= float64(l.limiter.Burst())
}

// changed is a lane with another limit and the tokens of this one.
func (l *lane) changed(now time.Time, r Rate) *lane {
	n := newLane(r)
	if l.limiter != nil && n.limiter != nil {
		if missing := n.limiter.Burst() - int(max(0, l.limiter.TokensAt(now))); missing > 0 {
			n.limiter.AllowN(now, missing)
		}
	}
	return n
}
