package resilience

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/headgate-io/headgate/classify"
)

// String names the authority for people.
func (a Authority) String() string {
	if a == ByAPI {
		return "the API"
	}
	return "people"
}

// Authority says on whose word a hold stands. Each has a hold of its own, and
// neither can shorten the other's.
type Authority uint8

const (
	// ByPeople is an operator, or a webhook that acts for one.
	ByPeople Authority = iota
	// ByAPI is the API, by its answers.
	ByAPI

	authorities = 2
)

// Hold forbids calls until a time, for a reason that people can read.
type Hold struct {
	// Until is when it ends; zero: when it is released.
	Until  time.Time
	Since  time.Time
	Reason string         // for people
	Class  classify.Class // of the answer that caused it, if one did
	Who    string         // worker or operator
}

// Stands reports whether the hold still forbids calls.
func (h *Hold) Stands(now time.Time) bool {
	return h != nil && (h.Until.IsZero() || now.Before(h.Until))
}

// Outlasts reports whether h ends later than other; a hold without an end
// outlasts every hold that has one.
func (h *Hold) Outlasts(other *Hold) bool {
	switch {
	case other == nil:
		return true
	case h.Until.IsZero():
		return !other.Until.IsZero()
	}
	return !other.Until.IsZero() && h.Until.After(other.Until)
}

func (h *Hold) same(other *Hold) bool {
	return other != nil && h.Until.Equal(other.Until) && h.Since.Equal(other.Since) &&
		h.Reason == other.Reason && h.Class == other.Class && h.Who == other.Who
}

// holds has a place for each authority's hold. It needs the caller's lock.
type holds [authorities]*Hold

// set reports whether h changed something: people replace their hold, and the
// API's can only get longer.
func (hs *holds) set(by Authority, h Hold) bool {
	switch old := hs[by]; {
	case by == ByAPI && !h.Outlasts(old):
		return false
	case h.same(old):
		return false
	}
	hs[by] = &h
	return true
}

// standing is the hold that forbids calls for longest, nil if none does.
func (hs *holds) standing(now time.Time) (longest *Hold) {
	for _, h := range hs {
		if h.Stands(now) && h.Outlasts(longest) {
			longest = h
		}
	}
	return longest
}

// last is the hold that ended last, nil if there was none.
func (hs *holds) last() (last *Hold) {
	for _, h := range hs {
		if h != nil && h.Outlasts(last) {
			last = h
		}
	}
	return last
}

const (
	// probeWait is after how long it is worth asking again, while one call finds
	// out whether the trouble behind a shared hold is over.
	probeWait = 500 * time.Millisecond

	// probeFor is for how long that call is waited for, before another may do
	// the same.
	probeFor = 5 * time.Second
)

// shared is what holds every creator, by either authority. After its end one
// call finds out whether the cause is gone, before the others follow.
type shared struct {
	held atomic.Bool // false: there is nothing to look at, the common case

	mu      sync.Mutex
	holds   holds
	probing int64     // the probe under way, 0: none
	probes  int64     // ever
	probed  time.Time // when the last one began
}

func (s *shared) set(by Authority, h Hold) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := s.holds.set(by, h)
	s.held.Store(s.held.Load() || changed)
	return changed
}

// release reports whether there was a hold.
func (s *shared) release(by Authority) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	had := s.holds[by] != nil
	s.holds[by] = nil
	s.held.Store(s.holds.last() != nil)
	return had
}

func (s *shared) standing(now time.Time) *Hold {
	if !s.held.Load() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.holds.standing(now)
}

// blocks says what keeps a call, without taking anything.
func (s *shared) blocks(now time.Time, r Reason, healthy bool) (Refusal, bool) {
	if !s.held.Load() {
		return Refusal{}, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refuses(now, r, healthy)
}

func (s *shared) refuses(now time.Time, r Reason, healthy bool) (Refusal, bool) {
	if h := s.holds.standing(now); h != nil {
		return Refusal{Reason: r, NotBefore: h.Until, Hold: h}, true
	}
	last := s.holds.last()
	switch {
	case last == nil:
		return Refusal{}, false
	case s.probing != 0 && now.Before(s.probed.Add(probeFor)):
		return Refusal{Reason: r, NotBefore: now.Add(probeWait), Hold: last}, true
	case healthy:
		return Refusal{}, false
	}
	// A creator in trouble of its own would find out about itself. It is asked
	// only if no other comes.
	if alone := later(last.Until, s.probed).Add(probeFor); now.Before(alone) {
		return Refusal{Reason: r, NotBefore: alone, Hold: last}, true
	}
	return Refusal{}, false
}

// probe is the duty to report how a shared hold's first call went.
type probe struct {
	number int64
	ended  holds // what it finds out about
}

// admit takes the probe if there is one to take. Looking and taking are one
// step, so that a hold that stands is never taken for one that has ended.
func (s *shared) admit(now time.Time, r Reason, healthy bool) (p *probe, no Refusal, ok bool) {
	if !s.held.Load() {
		return nil, Refusal{}, true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if no, refused := s.refuses(now, r, healthy); refused {
		return nil, no, false
	}
	if s.holds.last() == nil {
		return nil, Refusal{}, true
	}
	s.probes++
	s.probing, s.probed = s.probes, now
	return &probe{number: s.probes, ended: s.holds}, Refusal{}, true
}

// report takes the probe's outcome: an API that answers has forgiven, unless
// there is a new hold by now. It reports whether the others may follow.
func (s *shared) report(p *probe, o Outcome) bool {
	if p == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.probing == p.number {
		s.probing = 0
	}
	if o == Failed || o == NotMade {
		return false
	}
	gone := false
	for by, h := range p.ended {
		if h != nil && s.holds[by] == h {
			s.holds[by], gone = nil, true
		}
	}
	free := s.holds.last() == nil
	s.held.Store(!free)
	return gone && free
}
