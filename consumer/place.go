package consumer

import (
	"time"

	"github.com/headgate-io/headgate/resilience"
)

const (
	// nearTurn is how far away a call may be for its request to wait in the
	// worker instead of going back to the server.
	nearTurn = 2 * time.Second

	// nearProbe is nearTurn for the next call that finds out whether the provider is back: that is
	// never further away, and a request has to be here to be that call.
	nearProbe = 15 * time.Second

	// maxWaiting bounds the requests of one creator that wait in the worker, maxWaitingFast
	// those of a creator whose calls are so fast that it needs more for nearTurn.
	maxWaiting     = 256
	maxWaitingFast = 2048

	// unknownLatency stands for that of calls before the first has ended.
	unknownLatency = 100 * time.Millisecond
)

// placing is what decides where a request waits that cannot be called now.
type placing struct {
	refusal resilience.Refusal
	now     time.Time
	ahead   int  // requests of its creator that wait in the worker
	behind  bool // requests of its creator that came before it wait at the server
	slots   int  // calls of the creator at once
	limit   int  // requests of the creator that may wait in the worker
	room    bool // the worker has memory for more
	// passing: the worker reads on past requests that wait for what other creators use.
	passing bool
}

// here reports whether a request waits in the worker; otherwise it waits at the server, and is
// fetched back when there is room for it.
func (l placing) here() bool {
	few := l.ahead < l.slots
	switch {
	case far(l.refusal, l.now), l.behind:
		return false
	case l.ahead == 0:
		return true // so that its creator is in line
	case !l.room:
		return false
	case shared(l.refusal.Reason) && l.passing:
		return few
	}
	return few || l.ahead < l.limit
}

// far reports whether a refusal is not over soon.
func far(no resilience.Refusal, now time.Time) bool {
	near := nearTurn
	if no.Reason == resilience.ReasonProviderBreaker {
		near = nearProbe
	}
	return no.NotBefore.Sub(now) > near || no.Hold != nil && no.NotBefore.IsZero()
}

// mayWait is how many requests of a creator with such a time between its calls may wait in the
// worker: as many as are called until more have been fetched.
func mayWait(pace time.Duration) int {
	if pace <= nearTurn/maxWaiting {
		return int(min(nearTurn/max(pace, 1), maxWaitingFast))
	}
	return maxWaiting
}
