package consumer

import (
	"fmt"
	"time"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/resilience"
)

// Retry says how often, and how far apart, a request is tried.
type Retry struct {
	resilience.Backoff
	// Attempts is how many calls a request gets, the first included.
	Attempts int
	// Throttled is how many answers that say "later" a request may get
	// beside its attempts: they do not say that anything is broken.
	Throttled int
	// MaxAge bounds the life of a request, from the moment it was stored.
	MaxAge time.Duration
	// Cap bounds what an API can ask for with Retry-After, so that a bad
	// header cannot stop a creator for a year.
	Cap time.Duration
}

// DefaultRetry is four attempts, a second and doubling apart.
func DefaultRetry() Retry {
	return Retry{
		Backoff:  resilience.Backoff{Base: time.Second, Max: 30 * time.Second, Jitter: 0.3},
		Attempts: 4, Throttled: 20, MaxAge: 24 * time.Hour, Cap: 24 * time.Hour,
	}
}

// action is what is to be done with a request.
type action uint8

const (
	call         action = iota // call the API; explain's usual answer
	succeed                    // store the result
	deadLetter                 // store the dead letter
	finishLetter               // its place is taken by its dead letter: store that in DLQ, too
	acknowledge                // it has its outcome
	retry                      // store the failed attempt, and try again
	postpone                   // try again, without having tried
	callAgain                  // try again at once
	giveBack                   // leave it to the server
)

// cause is why a verdict is what it is, for code that has to know.
type cause uint8

const (
	causeNone      cause = iota
	causeExhausted       // it has had all its attempts
	causeUncertain       // it is not known whether the API did what it was asked
)

// unknownAttempts is how many calls a failure gets that no rule names.
const unknownAttempts = 2

// accountPause is how long an account is held whose key, credit or quota the API
// refuses, without saying for how long. Then one call finds out.
const accountPause = 5 * time.Minute

// facts are all that a verdict depends on.
type facts struct {
	failure   classify.Failure
	failed    bool
	attempts  int // calls so far that were not throttled, this one included
	throttled int // calls so far that were, this one included
	// providerFailing: enough creators fail to believe in an outage.
	providerFailing bool
	uncertain       bool          // the API may have done what must not be done twice
	window          time.Duration // for which the API says that no calls are left; 0: it does not
	now             time.Time
	random          float64 // in [0, 1)
}

// verdict is what is to be done with a request, and who is held because of the answer.
type verdict struct {
	action action
	empty  bool           // succeed, with nothing found
	after  time.Time      // retry, postpone: not before
	class  classify.Class // deadLetter, if it is not the failure's
	cause  cause
	reason string // of a dead letter, for people
	hold   *resilience.Hold
	scope  classify.Scope // of hold
}

// decide says what an answer means. It is pure: the same facts have the same verdict.
func decide(o facts, op Operation) verdict {
	f := o.failure
	empty := f.Class == classify.NotFound && op.NotFoundEmpty
	if !o.failed || empty {
		v := verdict{action: succeed, empty: empty}
		v.hold, v.scope = windowHold(o, op.Retry.Cap)
		return v
	}
	v := verdict{action: retry}
	v.hold, v.scope = holdFor(o, op.Retry)
	if v.hold == nil {
		v.hold, v.scope = windowHold(o, op.Retry.Cap)
	}
	switch attempts := allowed(f.Class, op.Retry); {
	// First: a failure that is not worth another call is not certain for that.
	case o.uncertain && !op.RetryUncertain:
		v.action, v.class, v.cause = deadLetter, classify.Uncertain, causeUncertain
		v.reason = "it is not known whether the API did what it was asked: " + f.Describe() + "; look there before it is replayed"
	case !f.Retryable:
		v.action, v.reason = deadLetter, "terminal: "+f.Describe()
	case f.Class.Throttled() && o.throttled > op.Retry.Throttled:
		v.action, v.cause = deadLetter, causeExhausted
		v.reason = fmt.Sprintf("throttled %d times, more than %d: %s", o.throttled, op.Retry.Throttled, f.Describe())
	case !f.Class.Throttled() && o.attempts >= attempts:
		v.action, v.cause = deadLetter, causeExhausted
		v.reason = fmt.Sprintf("attempts exhausted, %d of %d: %s", o.attempts, attempts, f.Describe())
	default:
		v.after = o.now.Add(backoff(o, op.Retry))
	}
	return v
}

// backoff is how long a request waits for its next attempt: what the API stated, and no
// less than the backoff that grows with each refusal. Chance moves it upward only: never
// before the time that the API stated.
func backoff(o facts, r Retry) time.Duration {
	f := o.failure
	n := max(o.attempts, 1)
	if f.Class.Throttled() {
		n = max(o.throttled, 1)
	}
	switch {
	case f.Class == classify.ConcurrencyLimit && f.RetryAfterAssumed:
		// Fewer calls at once help, longer waiting does not.
		return r.Delay(1, o.random)
	case f.RetryAfterKnown:
		stated := min(f.RetryAfter, r.Cap)
		wait := max(stated, min(r.Delay(n, 0), r.Cap))
		return wait + time.Duration(o.random*r.Jitter*float64(min(wait, r.Base)))
	}
	return r.Delay(n, o.random)
}

func allowed(c classify.Class, r Retry) int {
	if c == classify.Unknown {
		return min(unknownAttempts, r.Attempts)
	}
	return r.Attempts
}

// holdFor says who must not be called because of this answer, and until when.
func holdFor(o facts, r Retry) (*resilience.Hold, classify.Scope) {
	f := o.failure
	h := &resilience.Hold{Since: o.now, Class: f.Class, Reason: f.Describe()}
	if f.RetryAfterKnown {
		h.Until = o.now.Add(min(f.RetryAfter, r.Cap))
	}
	switch {
	case f.Class == classify.RateLimit:
		// A stated wait of nothing is no wait: the next request would be refused, too.
		wait := max(f.RetryAfter, r.Delay(max(o.throttled, 1), 0))
		h.Until = o.now.Add(min(wait, r.Cap))
		return h, heldScope(f.Scope)
	case f.Class == classify.SessionExpired:
		// Nothing gets better by itself: a person must act, and release.
		h.Until = time.Time{}
		return h, classify.ScopeCreator
	case f.Scope == classify.ScopeAccount && !f.Retryable:
		if !f.RetryAfterKnown {
			h.Until = o.now.Add(accountPause)
		}
		return h, classify.ScopeAccount
	case f.Class.Unhealthy() && f.RetryAfterKnown && f.RetryAfter > 0:
		// One creator's 503 says little about the provider.
		if f.Scope == classify.ScopeProvider && o.providerFailing {
			return h, classify.ScopeProvider
		}
		return h, classify.ScopeCreator
	}
	return nil, ""
}

// windowHold waits for the end of a window that has no calls left, instead of for
// the refusal of the next call.
func windowHold(o facts, limit time.Duration) (*resilience.Hold, classify.Scope) {
	if o.window <= 0 {
		return nil, ""
	}
	return &resilience.Hold{
		Since: o.now, Until: o.now.Add(min(o.window, limit)),
		Class: classify.RateLimit, Reason: "no calls are left in the API's window",
	}, classify.ScopeCreator
}

// heldScope: a refusal that concerns a request holds its creator.
func heldScope(s classify.Scope) classify.Scope {
	if s == classify.ScopeRequest || s == "" {
		return classify.ScopeCreator
	}
	return s
}
