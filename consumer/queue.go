package consumer

import (
	"sync"

	"github.com/headgate-io/headgate/resilience"
)

// queue is a line of creators that wait for a place that the whole worker
// shares. First come, first served, whatever partition they are in.
type queue struct {
	mu   sync.Mutex
	line []hungry
}

type hungry struct {
	p *partition
	c *creator
}

func (q *queue) push(h hungry) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !h.c.queued {
		h.c.queued = true
		q.line = append(q.line, h)
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
	h.c.queued = false
	return h, true
}

// starve queues a creator that found the worker, or the share of the slow
// creators in it, full.
func (w *Worker) starve(p *partition, c *creator, r resilience.Reason) {
	q, full := &w.hungry, w.gates.Full
	if r == resilience.ReasonSlow {
		q, full = &w.slow, w.gates.SlowFull
	}
	q.push(hungry{p, c})
	if !full() {
		// The last place came free in between, and nobody may be left who
		// would feed the queue.
		go w.feed()
	}
}

// feed gives free places to those who wait for one.
func (w *Worker) feed() {
	for _, q := range []struct {
		*queue
		full func() bool
	}{{&w.hungry, w.gates.Full}, {&w.slow, w.gates.SlowFull}} {
		for !q.full() {
			h, ok := q.pop()
			if !ok {
				break
			}
			h.p.pump(h.c)
		}
	}
}
