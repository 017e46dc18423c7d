package resilience

import (
	"sync"
	"sync/atomic"
	"time"
)

const (
	// evidence is how many different creators must fail, with no success
	// between, before their trouble is taken for the provider's.
	evidence = 3

	// hearing is for how long calls in flight are listened to before that.
	hearing = time.Second

	// firstProbe is how long after the provider's breaker has opened a call
	// finds out whether it opened for no reason. The next ones come every
	// probeEvery for each live worker, but at least every probeAtLeast. An outage
	// costs 15 calls a minute with one or two workers, 20 with three, and 7 more with each
	// worker above.
	firstProbe   = time.Second
	probeEvery   = 4 * time.Second
	probeAtLeast = 9 * time.Second

	// probeAfter is how much longer a creator has to wait for a probe, for each
	// failure in a row of its own, at most troubleMost of them.
	probeAfter  = time.Second
	troubleMost = 5
)

// outage is the provider's breaker. It must not cost healthy creators more than
// a moment, however many others fail:
//
//   - It opens after failures in a row of at least three different creators.
//     Failures that concern one request, and a creator's own half-open probe,
//     are no evidence.
//   - Failures are often faster than successes. So when there is evidence, the
//     calls in flight at that moment are heard first. A single success
//     among them, and there is no outage.
//   - While it is open, a call begins every few seconds, whether or not earlier
//     ones have ended. Creators whose last call went well come first; a creator
//     with failures of its own only probes if no such creator wants to.
//   - One success closes it for every creator.
//
// gobreaker does not fit here: it does not know which creators failed, and its half-open state
// waits for a probe that hangs.
type outage struct {
	failures int          // in a row that open it
	workers  atomic.Int64 // live ones, which all probe
	troubled atomic.Bool  // false: nothing to look at, the common case

	mu        sync.Mutex
	failing   map[string]struct{} // creators that failed since the last success, up to evidence
	row       int                 // failures since then
	suspected time.Time           // when there was evidence first
	last      int64               // the latest call that had begun then
	unheard   int64               // calls in flight then, and still

	open   bool
	next   time.Time // when the next probe may begin
	failed bool      // a probe has: the outage is no mistake
}

// every is the time between two probes of this worker.
func (o *outage) every() time.Duration {
	return min(probeEvery*time.Duration(max(1, o.workers.Load())), probeAtLeast)
}

// blocks says what keeps a call of a creator that has had trouble failures
// in a row, without taking anything.
func (o *outage) blocks(now time.Time, trouble int) (Refusal, bool) {
	if !o.troubled.Load() {
		return Refusal{}, false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.refuses(now, trouble)
}

func (o *outage) refuses(now time.Time, trouble int) (Refusal, bool) {
	if !o.open {
		return Refusal{}, false
	}
	at := o.next.Add(probeAfter * time.Duration(min(trouble, troubleMost)))
	return Refusal{Reason: ReasonProviderBreaker, NotBefore: at}, now.Before(at)
}

// admit takes the probe if there is one to take.
func (o *outage) admit(now time.Time, trouble int) (probing bool, no Refusal, ok bool) {
	if !o.troubled.Load() {
		return false, Refusal{}, true
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if no, refused := o.refuses(now, trouble); refused {
		return false, no, false
	}
	if o.open {
		o.next = now.Add(o.every())
	}
	return o.open, Refusal{}, true
}

// unused gives back a probe that found nothing out.
func (o *outage) unused(at time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if at.Before(o.next) {
		o.next = at
	}
}

// believed reports whether there is evidence that the provider is in trouble.
func (o *outage) believed(now time.Time) bool {
	if !o.troubled.Load() {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.confirmed(now)
}

func (o *outage) confirmed(now time.Time) bool {
	return !o.suspected.IsZero() && (o.unheard <= 0 || now.Sub(o.suspected) >= hearing)
}

// success closes the breaker and clears the suspicion. It reports whether the
// breaker was open, and whether it was an outage indeed.
func (o *outage) success() (closed, over bool) {
	if !o.troubled.Load() {
		return false, false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	closed, over = o.open, o.open && o.failed
	o.failing, o.row, o.suspected = nil, 0, time.Time{}
	o.open, o.failed = false, false
	o.troubled.Store(false)
	return closed, over
}

// failure takes a failure that can be the provider's. begun and calling are how
// many calls have begun, and are in flight still. It reports whether the
// breaker opened.
func (o *outage) failure(creator string, now time.Time, probing bool, begun, calling int64) (opened bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.troubled.Store(true)
	o.failed = o.failed || o.open && probing
	o.row++
	if o.failing == nil {
		o.failing = make(map[string]struct{}, evidence)
	}
	if len(o.failing) < evidence {
		o.failing[creator] = struct{}{}
		if len(o.failing) == evidence {
			o.suspected, o.last, o.unheard = now, begun, calling
		}
	}
	if o.open || o.row < o.failures || !o.confirmed(now) {
		return false
	}
	o.open, o.next = true, now.Add(firstProbe)
	return true
}

// heard notes that the call-th call has ended.
func (o *outage) heard(call int64) {
	if !o.troubled.Load() {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.suspected.IsZero() && call <= o.last {
		o.unheard--
	}
}
