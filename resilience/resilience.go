// Package resilience decides whether a creator may be called now.
//
// Each creator has a [Gate]. A gate asks, in this order: is there a hold, is a
// circuit breaker open, does the rate limit allow it, is a slot free, does the
// account's budget allow it. It answers with a [Permit], or with a [Refusal] that says
// why not and when to come again, so that "why is this waiting?" always has
// one answer. What gates share (holds of the account and of the provider, the
// provider's breaker, the account's limit, the worker's calls in flight) lives
// in [Gates].
//
// A gate never blocks, reads no clock and starts no goroutine. It gives whoever
// waits a turn of its own ([Gate.Turn]); waiting itself is the caller's.
package resilience

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

// Rate allows PerSecond calls a second on average and Burst at once.
type Rate struct {
	PerSecond float64 // 0: no limit
	Burst     int     // at least 1 where there is a limit
}

var ratePer = map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour, "d": 24 * time.Hour}

// ParseRate reads a rate as people write it: 60/m, 10/s, 600/h, 5000/d, or
// inf for no limit, which is +Inf calls a second.
func ParseRate(s string) (calls float64, per time.Duration, err error) {
	if s == "inf" || s == "unlimited" {
		return math.Inf(1), time.Second, nil
	}
	n, unit, ok := strings.Cut(s, "/")
	calls, err = strconv.ParseFloat(n, 64)
	per = ratePer[unit]
	if !ok || err != nil || per == 0 || calls <= 0 || math.IsInf(calls, 0) || math.IsNaN(calls) {
		return 0, 0, fmt.Errorf("a rate is calls per s, m, h or d, such as 60/m, or inf; not %q", s)
	}
	return calls, per, nil
}

func (r Rate) unlimited() bool { return r.PerSecond <= 0 }

func (r Rate) check(what string) error {
	switch {
	case r.PerSecond < 0 || math.IsNaN(r.PerSecond) || math.IsInf(r.PerSecond, 0):
		return fmt.Errorf("%s: rate must be a number of calls a second from 0 (no limit), not %v", what, r.PerSecond)
	case !r.unlimited() && r.Burst < 1:
		return fmt.Errorf("%s: burst must be at least 1, not %d", what, r.Burst)
	}
	return nil
}

func (r Rate) limiter() *rate.Limiter {
	if r.unlimited() {
		return nil
	}
	return rate.NewLimiter(rate.Limit(r.PerSecond), r.bucket())
}

// bucket is the burst less what may arrive late, see transit.
func (r Rate) bucket() int { return r.Burst - int(r.PerSecond*r.slack().Seconds()) }

// interval is the time between two calls at this rate, 0 without a limit.
func (r Rate) interval() time.Duration {
	if r.unlimited() {
		return 0
	}
	return time.Duration(float64(time.Second) / r.PerSecond)
}

// Limits is what one creator may do.
type Limits struct {
	Rate
	// Read and Write, where set, limit those calls apart from each other and
	// instead of Rate.
	Read, Write *Rate
	// Concurrency is the number of calls in flight at once, at least 1.
	Concurrency int
}

// Check says what is wrong with l.
func (l Limits) Check() error {
	errs := []error{l.Rate.check("creator limit")}
	if l.Read != nil {
		errs = append(errs, l.Read.check("creator read limit"))
	}
	if l.Write != nil {
		errs = append(errs, l.Write.check("creator write limit"))
	}
	if l.Concurrency < 1 {
		errs = append(errs, fmt.Errorf("creator concurrency must be at least 1, not %d", l.Concurrency))
	}
	return errors.Join(errs...)
}

// Breaker says when a circuit breaker opens and closes.
type Breaker struct {
	Failures  int           // consecutive failures that open it
	OpenFor   time.Duration // how long nothing is called then
	Successes int           // consecutive successes, one call at a time, that close it
}

// Config is what a worker's gates are made from.
type Config struct {
	Creator  Limits
	Account  Rate // over all creators and workers, see Gates.Fund
	InFlight int  // calls at once in this worker
	Breaker  Breaker
}

// DefaultConfig has no rate limits, since those are the provider's to say.
func DefaultConfig() Config {
	return Config{
		Creator:  Limits{Concurrency: 3},
		InFlight: 1024,
		Breaker:  Breaker{Failures: 5, OpenFor: 60 * time.Second, Successes: 2},
	}
}

func (c Config) check() error {
	errs := []error{c.Creator.Check(), c.Account.check("account limit")}
	if c.InFlight < 1 {
		errs = append(errs, fmt.Errorf("calls in flight must be at least 1, not %d", c.InFlight))
	}
	if c.Breaker.Failures < 1 || c.Breaker.Successes < 1 || c.Breaker.OpenFor <= 0 {
		errs = append(errs, fmt.Errorf("breaker needs at least 1 failure, 1 success and a time open above 0, not %+v", c.Breaker))
	}
	return errors.Join(errs...)
}

// Kind of a call, for providers that limit reading and writing apart.
type Kind uint8

// A call that changes nothing at the provider is a Read.
const (
	Read Kind = iota
	Write
)

// Outcome of a call, as far as the callee's health goes.
type Outcome uint8

const (
	// Success: the API answered as it should.
	Success Outcome = iota
	// Failed: a server error, a timeout, a network error.
	Failed
	// Excluded: it says nothing about health (4xx, 429, 402, or we gave up).
	Excluded
)
