package consumer

import (
	"sync"

	"github.com/headgate-io/headgate/resilience"
)

// queue is a line of creators that wait for a place that the whole worker
// shares. First come, first served, whatever partition they are in.
type queue struct {
	mu    sync.Mutex
	line  []hungry
	wants int
}

type hungry struct {
	p     *partition
	c     *creator
	wants int // calls that could be made at once
}

func (q *queue) push(h hungry) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !h.c.queued {
		h.c.queued = true
		q.line = append(q.line, h)
		q.wants += h.wants
	}
}

func (q *queue) pop() (hungry, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.line) == 0 {
		q.line = nil
		return hungry{}, false
	}
	h := q.line[0]
	q.line[0] = hungry{}
	q.line = q.line[1:]
	q.wants -= h.wants
	h.c.queued = false
	return h, true
}

// wanted is the number of calls that those in the line could make at once.
func (q *queue) wanted() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.wants
}

// starve queues a creator that found the worker, the share of the slow creators in
// it, or the account's budget used up.
func (w *Worker) starve(p *partition, c *creator, r resilience.Reason) {
	for i := range w.lines {
		if l := &w.lines[i]; l.reason == r {
			l.push(hungry{p, c, min(len(c.waiting), c.gate.Slots())})
			if !l.full() {
				// The last place came free in between, and nobody may be left who
				// would feed the queue.
				go w.feed()
			}
			if r == resilience.ReasonAccount {
				w.budget.want()
			}
		}
	}
}

// line is a queue in front of something that the whole worker shares.
type line struct {
	queue
	reason resilience.Reason
	full   func() bool
}

// feed gives free places to those who wait for one.
func (w *Worker) feed() {
	for i := range w.lines {
		l := &w.lines[i]
		for !l.full() {
			h, ok := l.pop()
			if !ok {
				break
			}
			h.p.pump(h.c)
		}
	}
}
