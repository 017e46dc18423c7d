package resilience

import "time"

// Backoff is a retry schedule: Base, doubled after each attempt, up to Max.
type Backoff struct {
	Base, Max time.Duration
	Jitter    float64 // the part of the delay by which chance may lengthen it
}

// Delay is the wait after the attempt-th attempt, counted from 1. random is in
// [0, 1). Jitter goes upward only, so that a stated time is never undercut.
func (b Backoff) Delay(attempt int, random float64) time.Duration {
	d := b.Max
	// Shifting further than this overflows, and is over any Max long before.
	if shift := max(attempt, 1) - 1; shift < 32 && b.Base <= b.Max>>shift {
		d = b.Base << shift
	}
	return d + time.Duration(random*b.Jitter*float64(d))
}
