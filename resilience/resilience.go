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
// A gate never blocks, reads no clock and starts no goroutine. It plans nothing
// either: waiting, and in which order, is the caller's.
package resilience

import (
	"errors"
	"fmt"
	"time"
)

// Limits is what one creator may do.
type Limits struct {
	Rate
	// Read and Write, where set, limit those calls apart from each other and
	// instead of Rate.
	Read, Write *Rate
	// Concurrency is the number of calls in flight at once, at least 1.
	Concurrency int
}

// Check says which of its values cannot be.
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
	Account  Rate // over all creators and workers, see Gates.AddTokens
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
	// Failed: trouble that can be the provider's (502, 503, 504, a timeout, a
	// network error).
	Failed
	// FailedAlone: trouble that concerns this creator's request (500 and the
	// like). Only the creator's breaker counts it.
	FailedAlone
	// Excluded: the API answered, and the answer says nothing about health (4xx, 429, 402).
	Excluded
	// NotMade: no call was made, or its end is not known because it was cut off.
	NotMade
)

func (o Outcome) failed() bool { return o == Failed || o == FailedAlone }
