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

// fate is what becomes of a request after a call.
type fate uint8

const (
	succeed fate = iota
	retry
	bury // dead letter
)

// unknownAttempts is how many calls a failure gets that nobody can name.
const unknownAttempts = 2

// accountPause is how long an account is held whose key, credit or quota the API
// refuses, without saying for how long. Then one call finds out.
const accountPause = 5 * time.Minute

// outcome is all that a request's fate depends on.
type outcome struct {
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

// verdict is a request's fate, and who is held because of the answer.
type verdict struct {
	fate   fate
	empty  bool      // succeed, with nothing found
	after  time.Time // retry, not before
	reason string    // of a dead letter, for people
	hold   *resilience.Hold
	scope  classify.Scope // of hold

	uncertain bool // bury: because nobody knows whether it was done
}

// exhausted is how the reason of a dead letter begins that has had all its attempts.
const exhausted = "attempts exhausted"

// decide is pure: the same outcome has the same verdict.
func decide(o outcome, op Operation) verdict {
	f := o.failure
	empty := f.Class == classify.NotFound && op.NotFoundEmpty
	if !o.failed || empty {
		v := verdict{fate: succeed, empty: empty}
		v.hold, v.scope = windowHold(o, op.Retry.Cap)
		return v
	}

	v := verdict{fate: retry}
	v.hold, v.scope = holdFor(o, op.Retry.Cap)
	if v.hold == nil {
		v.hold, v.scope = windowHold(o, op.Retry.Cap)
	}
	switch attempts := allowed(f.Class, op.Retry); {
	case !f.Retryable:
		v.fate, v.reason = bury, "terminal: "+describe(f)
	case o.uncertain && !op.RetryUncertain:
		v.fate, v.uncertain = bury, true
		v.reason = "it is not known whether the API did what it was asked: " + describe(f) + "; look there before it is replayed"
	case f.Class.Throttled() && o.throttled > op.Retry.Throttled:
		v.fate = bury
		v.reason = fmt.Sprintf("throttled %d times, more than %d: %s", o.throttled, op.Retry.Throttled, describe(f))
	case !f.Class.Throttled() && o.attempts >= attempts:
		v.fate = bury
		v.reason = fmt.Sprintf(exhausted+", %d of %d: %s", o.attempts, attempts, describe(f))
	case f.Class == classify.ConcurrencyLimit && f.RetryAfterAssumed:
		// Fewer calls at once help, longer waiting does not.
		v.after = o.now.Add(op.Retry.Delay(1, o.random))
	case f.RetryAfterKnown:
		wait := min(f.RetryAfter, op.Retry.Cap)
		// Upward only: never before the time that the API stated.
		wait += time.Duration(o.random * op.Retry.Jitter * float64(min(wait, op.Retry.Base)))
		v.after = o.now.Add(wait)
	default:
		v.after = o.now.Add(op.Retry.Delay(max(o.attempts, 1), o.random))
	}
	return v
}

func allowed(c classify.Class, r Retry) int {
	if c == classify.Unknown {
		return min(unknownAttempts, r.Attempts)
	}
	return r.Attempts
}

// holdFor says who must not be called because of this answer, and until when.
func holdFor(o outcome, limit time.Duration) (*resilience.Hold, classify.Scope) {
	f := o.failure
	h := &resilience.Hold{Since: o.now, Class: f.Class, Reason: describe(f)}
	if f.RetryAfterKnown {
		h.Until = o.now.Add(min(f.RetryAfter, limit))
	}
	switch {
	case f.Class == classify.RateLimit && f.RetryAfter > 0:
		return h, heldScope(f.Scope)
	case f.Class == classify.SessionExpired:
		// Nothing gets better by itself: somebody must act, and release.
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
func windowHold(o outcome, limit time.Duration) (*resilience.Hold, classify.Scope) {
	if o.window <= 0 {
		return nil, ""
	}
	return &resilience.Hold{
		Since: o.now, Until: o.now.Add(min(o.window, limit)),
		Class: classify.RateLimit, Reason: "no calls are left in the API's window",
	}, classify.ScopeCreator
}

// heldScope: what concerns a request is held for its creator.
func heldScope(s classify.Scope) classify.Scope {
	if s == classify.ScopeRequest || s == "" {
		return classify.ScopeCreator
	}
	return s
}

// describe names a failure without the provider's own words, which may hold
// personal data.
func describe(f classify.Failure) string {
	if f.Code == "" {
		return string(f.Class)
	}
	return string(f.Class) + " (" + f.Code + ")"
}
