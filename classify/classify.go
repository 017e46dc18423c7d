// Package classify says what an API's answer means: whether the call
// succeeded, and if not, which class of failure it is, whom it concerns, whether
// and when to call again, and who has to act.
//
// It is pure: it does no I/O, reads no clock and never fails. What it knows of a
// provider is data, a [Profile], either built in or read from a user's file.
package classify

import (
	"net/http"
	"time"
)

// Class names a kind of failure. The set is closed: everything that decides on
// failures (retry, hold, dead letter) switches on it.
type Class string

// Classes that an API's answer, or its absence, can have. The first group is
// worth another call, the second is not; Unknown gets few attempts.
const (
	RateLimit        Class = "RATE_LIMIT"
	ConcurrencyLimit Class = "CONCURRENCY_LIMIT"
	ServerError      Class = "SERVER_ERROR"
	UpstreamError    Class = "UPSTREAM_ERROR"
	NetworkError     Class = "NETWORK_ERROR"
	Timeout          Class = "TIMEOUT"
	Locked           Class = "LOCKED"
	RulesOutdated    Class = "RULES_OUTDATED"

	NotFound        Class = "NOT_FOUND"
	Unauthorized    Class = "UNAUTHORIZED"
	SessionExpired  Class = "SESSION_EXPIRED"
	Forbidden       Class = "FORBIDDEN"
	Validation      Class = "VALIDATION"
	Gone            Class = "GONE"
	Conflict        Class = "CONFLICT"
	PayloadTooLarge Class = "PAYLOAD_TOO_LARGE"
	Billing         Class = "BILLING"
	QuotaExceeded   Class = "QUOTA_EXCEEDED"
	NotAcceptable   Class = "NOT_ACCEPTABLE"
	Denied          Class = "DENIED"
	InvalidResponse Class = "INVALID_RESPONSE"

	Unknown Class = "UNKNOWN"
)

// Classes that Headgate itself gives a request, without the API having said so.
const (
	Expired          Class = "EXPIRED"
	MalformedRequest Class = "MALFORMED_REQUEST"
	Poison           Class = "POISON"
	Uncertain        Class = "UNCERTAIN"
	Internal         Class = "INTERNAL"
)

// Retryable reports whether a failure of this class is worth another call. A
// profile's rule, or the answer itself, may say otherwise: see [Failure].
func (c Class) Retryable() bool {
	switch c {
	case RateLimit, ConcurrencyLimit, ServerError, UpstreamError, NetworkError, Timeout, Locked, RulesOutdated, Unknown:
		return true
	}
	return false
}

// Throttled reports whether the class says "later" and not "broken".
func (c Class) Throttled() bool {
	switch c {
	case RateLimit, ConcurrencyLimit, Locked:
		return true
	}
	return false
}

// Unhealthy reports whether the class says that the API is in trouble: what a
// circuit breaker counts. Refusals say nothing about health.
func (c Class) Unhealthy() bool {
	switch c {
	case ServerError, UpstreamError, Timeout, NetworkError:
		return true
	}
	return false
}

// Scope says whom a failure concerns, and so what is held because of it.
type Scope string

// From the narrowest to the widest.
const (
	ScopeRequest  Scope = "request"
	ScopeCreator  Scope = "creator"
	ScopeAccount  Scope = "account" // the API key, and with it every creator
	ScopeProvider Scope = "provider"
)

// Answer is what came back from one API call.
type Answer struct {
	// Status is the HTTP status, 0 when there was no answer.
	Status int
	Header http.Header
	// Body is decoded and already capped by whoever read it.
	Body []byte
	// Truncated: the body was larger than its cap, and is cut off.
	Truncated bool
	// Err is the transport error when there was no answer, or when it broke
	// off: half a success is none, but the status of a failure still counts.
	Err error
	// Credentials numbers those that the call was made with, for whoever renews them.
	Credentials uint64
}

// Failure is the meaning of an answer that is not a success.
type Failure struct {
	Class     Class
	Scope     Scope
	Retryable bool

	// RetryAfter is how long the API asks not to be called, as it said it:
	// never negative, saturating, not capped. It means something only when
	// RetryAfterKnown; zero then says "at once". A failure that is not worth
	// another call may have it too: it says for how long to hold whom it concerns.
	RetryAfter      time.Duration
	RetryAfterKnown bool
	// RetryAfterAssumed: RetryAfter is the minute of a rate limit that did not
	// say for how long, not the API's own word.
	RetryAfterAssumed bool

	// Refresh: the credentials were refused and can be renewed. Renew them
	// once, then call again.
	Refresh bool

	// What the provider said, cut to 1,024 bytes (Message) or 256 (the others).
	// It is a stranger's text and may hold any character.
	Code      string // the provider's own error code
	Message   string // the provider's own words; may hold personal data
	RequestID string // the provider's id of the call, for its support; of a success too
	Action    string // what somebody must do, e.g. relink_connection
	Field     string // the request's field that is at fault

	// Rule names the profile's rule that matched, for whoever asks why.
	Rule string
}
