package consumer

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/headgate-io/headgate/resilience"
)

// Reasons that gates do not know.
const (
	reasonTurn      resilience.Reason = "turn"      // other requests of the creator are ahead
	reasonBackoff   resilience.Reason = "backoff"   // a request's own wait between two attempts
	reasonSuspect   resilience.Reason = "suspect"   // it may be what makes workers vanish, and is called alone
	reasonStorage   resilience.Reason = "storage"   // outcomes cannot be stored
	reasonElsewhere resilience.Reason = "elsewhere" // the partition's former owner is still calling for the creator
)

// maxUnstored is how many answers may be in hand that could not be stored at the first try, until
// the worker makes no further calls.
const maxUnstored = 16

// unsettledPerSlot bounds, per slot of a creator, its calls whose outcome is not stored yet: one
// creator must not fill the worker with them.
const unsettledPerSlot = 4

// admission is what the partitions share: gates, the memory for requests that wait, and the
// queues of creators in front of what all creators use.
type admission struct {
	gates    *resilience.Gates
	memory   memory
	unstored *atomic.Int64            // the settler's
	suspect  atomic.Pointer[delivery] // the one that is being called
	want     func()                   // asks for tokens of the account's limit
	queues   [5]waitQueue
}

func newAdmission(gates *resilience.Gates, bytes int64, inFlight int, unstored *atomic.Int64, want func()) *admission {
	a := &admission{gates: gates, unstored: unstored, want: want}
	a.memory.maxBytes, a.memory.maxCount = bytes, int64(waitingShare*inFlight)
	full := map[resilience.Reason]func() bool{
		resilience.ReasonWorker:  gates.Full,
		resilience.ReasonSlow:    gates.SlowFull,
		resilience.ReasonAccount: func() bool { return gates.Empty(time.Now()) },
		reasonSuspect:            func() bool { return a.suspect.Load() != nil },
		reasonStorage:            a.stuck,
	}
	for i, r := range []resilience.Reason{
		reasonStorage, resilience.ReasonWorker, resilience.ReasonSlow, resilience.ReasonAccount, reasonSuspect,
	} {
		a.queues[i].reason, a.queues[i].full = r, full[r]
	}
	return a
}

// stuck reports that so many answers wait for being stored that no further call is made.
func (a *admission) stuck() bool { return a.unstored.Load() >= maxUnstored }

// shared reports that a refusal is over when a call of another creator ends, or when tokens
// of the account's limit arrive.
func shared(r resilience.Reason) bool {
	return r == resilience.ReasonWorker || r == resilience.ReasonAccount || r == reasonStorage
}

func (a *admission) queue(r resilience.Reason) *waitQueue {
	for i := range a.queues {
		if a.queues[i].reason == r {
			return &a.queues[i]
		}
	}
	return nil
}

// ahead returns the reason for which other creators are in line for the next call, "" if none is.
// A request that comes now does not overtake them.
func (a *admission) ahead() resilience.Reason {
	for i := range a.queues {
		if q := &a.queues[i]; shared(q.reason) && q.length.Load() > 0 {
			return q.reason
		}
	}
	return ""
}

// enqueue puts a creator into the line in front of what it needs. It reports false where there is
// no such line. Its turn may come at once, in another goroutine.
func (a *admission) enqueue(p *partition, c *creator, r resilience.Reason) bool {
	q := a.queue(r)
	if q == nil {
		return false
	}
	q.push(waiter{p, c, max(1, min(len(c.waiting)+len(c.suspects)+len(c.parked), c.gate.Slots()))})
	if r == resilience.ReasonAccount {
		a.want()
	}
	if !q.full() {
		// The last place came free in between, and nothing else may wake the queue.
		p.spawn(a.wake)
	}
	return true
}

// wake gives what is free to the creators in line: one call each, the longest waiting first.
func (a *admission) wake() {
	for i := range a.queues {
		q := &a.queues[i]
		for n := q.length.Load(); n > 0 && !q.full(); n-- {
			e, ok := q.pop()
			if !ok {
				break
			}
			e.partition.turn(e.creator)
		}
	}
}

// wanted is the number of calls that creators in line for the account's limit could make at once.
func (a *admission) wanted() int { return a.queue(resilience.ReasonAccount).wanted() }

// alone claims the one place for a suspect's call.
func (a *admission) alone(d *delivery) bool {
	return a.suspect.CompareAndSwap(nil, d) || a.suspect.Load() == d
}

// notAlone gives that place back, if d has it.
func (a *admission) notAlone(d *delivery) bool {
	return a.suspect.Load() == d && a.suspect.CompareAndSwap(d, nil)
}

// waitQueue is a line of creators in front of what all creators use. Each is in it once.
type waitQueue struct {
	reason resilience.Reason
	full   func() bool
	length atomic.Int64

	mu    sync.Mutex
	line  []waiter
	in    map[*creator]struct{}
	calls int // the sum of the waiters'
}

type waiter struct {
	partition *partition
	creator   *creator
	calls     int // that it could make at once
}

func (q *waitQueue) push(w waiter) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, there := q.in[w.creator]; there {
		return
	}
	if q.in == nil {
		q.in = make(map[*creator]struct{})
	}
	q.in[w.creator] = struct{}{}
	q.line = append(q.line, w)
	q.calls += w.calls
	q.length.Store(int64(len(q.line)))
}

func (q *waitQueue) wanted() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.calls
}

func (q *waitQueue) pop() (waiter, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.line) == 0 {
		return waiter{}, false
	}
	e := q.line[0]
	q.line[0] = waiter{}
	if q.line = q.line[1:]; len(q.line) == 0 {
		q.line = nil
	}
	delete(q.in, e.creator)
	q.calls -= e.calls
	q.length.Store(int64(len(q.line)))
	return e, true
}

// waitingShare bounds the requests of all creators that wait in the worker, as a multiple
// of its calls in flight.
const waitingShare = 4

// memory counts the requests that wait in the worker.
type memory struct {
	maxBytes, maxCount int64
	bytes, count       atomic.Int64
}

// room reports whether one more may wait.
func (m *memory) room() bool {
	return m.count.Load() < m.maxCount && m.bytes.Load() < m.maxBytes
}

func (m *memory) add(d *delivery) {
	m.count.Add(1)
	m.bytes.Add(d.size())
}

func (m *memory) remove(d *delivery) {
	m.count.Add(-1)
	m.bytes.Add(-d.size())
}
