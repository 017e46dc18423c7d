package consumer

import (
	"context"
	"sync"
	"time"
)

// deadlines gives out contexts with a deadline, one for all that ask within the
// same quarter of the time: each message is stored and acked, and a timer and a context for each
// of these are a tenth of what a worker allocates (see BenchmarkDeadlines).
type deadlines struct {
	mu      sync.Mutex
	current context.Context
	cancel  context.CancelFunc // called by its timer at the latest
	until   time.Time          // for which current is given out
}

// context ends when parent does, and after timeout or up to a quarter later.
func (d *deadlines) context(parent context.Context, now time.Time, timeout time.Duration) context.Context {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.current == nil || !now.Before(d.until) {
		d.until = now.Add(timeout / 4)
		d.current, d.cancel = context.WithTimeout(parent, timeout+timeout/4)
	}
	return d.current
}
