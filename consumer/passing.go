package consumer

import "time"

const (
	// passAfter is for how long reading has to stand still until it is asked whether requests wait
	// behind it for too long.
	passAfter = 250 * time.Millisecond

	// fairWithin is the time within which all that is stored in a partition is read in any case. If
	// it would take longer, because what all creators use is scarce, the worker reads on past the
	// requests that wait for it: a request of another creator must not wait behind their backlogs.
	// That costs a second delivery of each, so it is not done where the end of the backlog is near.
	fairWithin = 10 * time.Second
)

// passing decides whether a partition reads on past requests that wait for what other creators
// use.
type passing struct {
	on      bool
	since   time.Time // when reading stopped
	started int       // calls so far
	then    int       // and when reading stopped
}

// judge decides it for p.
func (p *partition) judge(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.active {
		p.pass.judge(now, 2*p.starved >= p.puller.window, p.pending)
	}
}

// judge looks at a partition whose reading has stopped, or goes on. pending is the number of messages that
// were not read.
func (s *passing) judge(now time.Time, stopped bool, pending uint64) {
	switch {
	case !stopped:
		s.on, s.since = false, time.Time{}
		return
	case s.since.IsZero():
		s.since, s.then = now, s.started
		return
	}
	elapsed := now.Sub(s.since)
	if elapsed < passAfter {
		return
	}
	calls := max(s.started-s.then, 1)
	read := time.Duration(float64(pending) * float64(elapsed) / float64(calls))
	// If none is pending it is not known what has come since: reading on tells.
	s.on = pending == 0 || read > fairWithin
	if elapsed > 20*passAfter { // what was long ago counts no more
		s.since, s.then = now.Add(-passAfter), s.started-calls*int(passAfter)/int(elapsed)
	}
}
