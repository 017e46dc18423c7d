// Package classify says what an API's answer means: whether the call
// succeeded, and if not, which class of failure it is, which scope it concerns, whether
// and when to call again, and which action it needs.
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

// Scope says how far a failure reaches, and so what is held because of it.
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
	// Body is decoded and already capped by its reader.
	Body []byte
	// Truncated: the body was larger than its cap, and is cut off.
	Truncated bool
	// Unexpected says why a success is not the answer that its operation
	// promises, such as an HTML page instead of JSON; "": it is, or nothing was promised.
	Unexpected string
	// Err is the transport error when there was no answer, or when it broke
	// off: half a success is none, but the status of a failure still counts.
	Err error
	// Unsent: there was no connection to send the call on, so that the API knows nothing of it.
	Unsent bool
	// Credentials numbers those that the call was made with, for their renewal.
	Credentials uint64
	// Release gives the memory of Body back to its reader's budget; nil: there is none.
	// It may be called more than once.
	Release func()
}

// Done says that Body is no longer used. It is safe to call on every answer, more than
// once, and after it nothing may read Body.
func (a Answer) Done() {
	if a.Release != nil {
		a.Release()
	}
}

// Done says whether an API may have done what it was asked, although its answer is a
// failure.
type Done string

// What an answer can say about that. A success says nothing of the kind.
const (
	DoneNo    Done = "no"    // certain: it was refused, or never reached the API
	DoneMaybe Done = "maybe" // it is not known
)

// Failure is the meaning of an answer that is not a success.
type Failure struct {
	Class     Class
	Scope     Scope
	Retryable bool

	// Suspect is the wider scope that such failures of several creators, with no
	// success between them, would show: one creator's 401 or 429 says little about the
	// key. "": Scope is all that the failure can concern.
	Suspect Scope

	// Done says whether the API may have done what it was asked.
	Done Done

	// Alone: the failure concerns its request or creator alone, and is no evidence of
	// trouble at the provider, as a 500 is not. 502, 503, 504, 52x, timeouts and network
	// errors may be the provider's.
	Alone bool

	// Local: the worker itself lacks file descriptors, ports or memory. Neither the
	// request nor the creator nor the API is to blame, and it is no attempt.
	Local bool

	// Cause and Detail say why there was no answer, or no complete one; "" if there was
	// one. Detail is for people, and holds no URL.
	Cause  Cause
	Detail string

	// RetryAfter is how long the API asks not to be called, as it said it:
	// never negative, saturating, not capped. It means something only when
	// RetryAfterKnown; zero then says "at once". A failure that is not worth
	// another call may have it too: it says for how long its scope is to be held.
	RetryAfter      time.Duration
	RetryAfterKnown bool
	// RetryAfterAssumed: RetryAfter is the minute of a rate limit that did not
	// say for how long, not the API's own word.
	RetryAfterAssumed bool

	// Refresh: the credentials were refused and can be renewed. Renew them
	// once, then call again.
	Refresh bool

	// What the provider said, cut to 1,024 bytes (Message) or 256 (the others).
	// It is foreign text and may hold any character.
	Code      string // the provider's own error code
	Message   string // the provider's own words; may hold personal data
	RequestID string // the provider's id of the call, for its support; of a success too
	Action    string // what a person must do, e.g. relink_connection
	Field     string // the request's field that is at fault

	// Rule names the profile's rule that matched.
	Rule string
}

// Describe names a failure without the provider's own words, which may hold
// personal data: its class, and its code or else the cause of a missing answer.
func (f Failure) Describe() string {
	switch {
	case f.Code != "":
		return string(f.Class) + " (" + f.Code + ")"
	case f.Detail != "" && f.Cause != "":
		return string(f.Class) + " (" + string(f.Cause) + ": " + f.Detail + ")"
	case f.Detail != "":
		return string(f.Class) + " (" + f.Detail + ")"
	case f.Cause != "" && f.Cause != CauseOther:
		return string(f.Class) + " (" + string(f.Cause) + ")"
	}
	return string(f.Class)
}
