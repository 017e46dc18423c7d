package resilience

import (
	"errors"
	"time"

	"github.com/sony/gobreaker/v2"
)

// breaker is a circuit breaker that can say until when it is open, which
// gobreaker cannot. The caller must hold the lock of the gate that owns it.
//
// It exists only while there is something to remember: the first failure makes
// it and the success that closes it or clears its count ends it, so that a healthy creator
// costs neither its memory nor gobreaker's allocation for each call.
type breaker struct {
	cb        *gobreaker.TwoStepCircuitBreaker[struct{}]
	state     gobreaker.State
	openUntil time.Time // means something when state is open
	probing   bool      // one call is finding out
}

var (
	errFailed   = errors.New("failed")
	errExcluded = errors.New("excluded")
)

// newBreaker makes a closed breaker. trips is asked after each failure.
func newBreaker(cfg Breaker, trips func(consecutive uint32) bool) *breaker {
	b := &breaker{}
	b.cb = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		MaxRequests:  uint32(cfg.Successes),
		Timeout:      cfg.OpenFor,
		ReadyToTrip:  func(c gobreaker.Counts) bool { return trips(c.ConsecutiveFailures) },
		IsSuccessful: func(err error) bool { return err == nil },
		IsExcluded:   func(err error) bool { return errors.Is(err, errExcluded) },
		// Runs under gobreaker's mutex: State and Counts would deadlock here.
		OnStateChange: func(_ string, _, to gobreaker.State) {
			b.state = to
			if to == gobreaker.StateOpen {
				// At exactly its timeout gobreaker is still open.
				b.openUntil = time.Now().Add(cfg.OpenFor + time.Nanosecond)
			}
		},
	})
	return b
}

// blocks says whether a call must wait, without taking anything: until the
// returned time, or, if that is zero, until the probing call has ended.
func (b *breaker) blocks(now time.Time) (until time.Time, blocked bool) {
	switch {
	case b == nil || b.state == gobreaker.StateClosed:
		return time.Time{}, false
	case b.probing:
		return time.Time{}, true
	case b.state == gobreaker.StateOpen && now.Before(b.openUntil):
		return b.openUntil, true
	}
	return time.Time{}, false
}

// BreakerState is that of a circuit breaker.
type BreakerState string

// A half-open breaker is finding out with one call at a time.
const (
	BreakerClosed   BreakerState = "closed"
	BreakerOpen     BreakerState = "open"
	BreakerHalfOpen BreakerState = "half_open"
)

func (b *breaker) status(now time.Time) (s BreakerState, until time.Time) {
	switch {
	case b.closed():
		return BreakerClosed, time.Time{}
	case b.state == gobreaker.StateOpen && now.Before(b.openUntil):
		return BreakerOpen, b.openUntil
	}
	return BreakerHalfOpen, time.Time{}
}

// allow takes a place. The returned ticket must be given to record; a nil one
// means that the breaker is closed and needs none.
func (b *breaker) allow() (t *ticket, ok bool) {
	if b == nil || b.state == gobreaker.StateClosed {
		return nil, true
	}
	done, err := b.cb.Allow()
	if err != nil {
		return nil, false
	}
	b.probing = true
	return &ticket{b: b, done: done}, true
}

// ticket is a probe's duty to report its outcome.
type ticket struct {
	b    *breaker
	done func(error)
}

// record counts an outcome and says what it changed. Calls that began before the breaker opened say
// nothing about what it finds out since, so only a closed breaker counts
// outcomes without a ticket.
func (b *breaker) record(t *ticket, o Outcome) (opened, closed bool) {
	wasClosed, wasUntil := b.closed(), b.openUntil
	done := func(error) {}
	switch {
	case t != nil:
		t.b.probing = false
		done = t.done
	case b.state == gobreaker.StateClosed:
		if d, err := b.cb.Allow(); err == nil {
			done = d
		}
	}
	switch o {
	case Success:
		done(nil)
	case Failed, FailedAlone:
		done(errFailed)
	default:
		done(errExcluded)
	}
	return !b.openUntil.Equal(wasUntil), !wasClosed && b.closed()
}

// trouble is the number of failures in a row of a creator; all that
// count where its breaker is not closed.
func (b *breaker) trouble() int {
	switch {
	case b == nil:
		return 0
	case b.state != gobreaker.StateClosed:
		return troubleMost
	}
	return int(b.cb.Counts().ConsecutiveFailures)
}

func (b *breaker) closed() bool { return b == nil || b.state == gobreaker.StateClosed }
