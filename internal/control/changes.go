package control

import (
	"context"
	"sync"
)

// changes tell of holds one after another, without making the teller wait.
type changes struct {
	to         func(Change) // may be nil
	releasedBy func(context.Context, Change) string

	mu    sync.Mutex
	queue []Change
	wake  chan struct{}
}

func newChanges(to func(Change), releasedBy func(context.Context, Change) string) *changes {
	return &changes{to: to, releasedBy: releasedBy, wake: make(chan struct{}, 1)}
}

func (c *changes) add(ch Change) {
	if c.to == nil {
		return
	}
	c.mu.Lock()
	c.queue = append(c.queue, ch)
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *changes) run(ctx context.Context) {
	for {
		c.mu.Lock()
		queue := c.queue
		c.queue = nil
		c.mu.Unlock()
		for _, ch := range queue {
			if ch.Kind == Released && ch.Who == "" {
				ch.Who = c.releasedBy(ctx, ch)
			}
			c.to(ch)
		}
		if len(queue) > 0 {
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-c.wake:
		}
	}
}

// releasedBy reads from the bucket who released a hold; "": it does not say.
func (h *Holds) releasedBy(ctx context.Context, c Change) string {
	e, err := h.next(ctx, c.Revision)
	if err != nil || e == nil || e.Revision != c.Revision {
		return ""
	}
	return e.who
}
