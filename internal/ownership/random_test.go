package ownership

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

// crowd calls creators at all workers, and notices when two call one at once.
type crowd struct {
	mu    sync.Mutex
	calls map[string]map[string]int // by creator and worker
	both  []string
	made  int
}

// count changes how many calls of a creator a worker has in flight. Those of a worker
// that is dead have ended.
func (c *crowd) count(creator, worker string, by int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.calls[creator] == nil {
		c.calls[creator] = map[string]int{}
	}
	if c.calls[creator][worker] += by; c.calls[creator][worker] <= 0 {
		delete(c.calls[creator], worker)
	}
	if len(c.calls[creator]) > 1 {
		c.both = append(c.both, fmt.Sprint(creator, c.calls[creator]))
	}
	if by > 0 {
		c.made++
	}
}

// calls keeps a worker calling until ctx ends: mostly short calls, and some that hang.
func (c *crowd) work(ctx context.Context, wg *sync.WaitGroup, w *worker, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 1))
	for ctx.Err() == nil {
		wait(ctx, time.Duration(random.IntN(100))*time.Millisecond)
		p := w.parts[random.IntN(len(w.parts))]
		creator := fmt.Sprintf("creator-%d-%d", p.n, random.IntN(3))
		if !p.begin(creator) {
			continue
		}
		c.count(creator, w.cfg.Name, +1)
		long := time.Duration(random.IntN(300)) * time.Millisecond
		if random.IntN(20) == 0 {
			long = time.Duration(random.IntN(20)) * time.Second
		}
		wg.Go(func() {
			wait(ctx, long)
			c.count(creator, w.cfg.Name, -1)
			p.end(creator)
		})
	}
}

func comeAndGo(t *testing.T, seed uint64) {
	r := newRig(t, 12)
	r.expire()
	random := rand.New(rand.NewPCG(seed, 0))
	c := &crowd{calls: map[string]map[string]int{}}
	type running struct {
		*worker
		end func()
	}
	var all []running
	var stopping sync.WaitGroup
	start := func(n int) {
		w := r.start(fmt.Sprint("worker-", n), func(c *Config) {
			c.Delivered = func(context.Context, int) bool { return true }
		})
		ctx, cancel := context.WithCancel(context.Background())
		var calls sync.WaitGroup
		calls.Go(func() { c.work(ctx, &calls, w, seed<<8+uint64(n)) })
		all = append(all, running{w, func() { cancel(); calls.Wait() }})
	}
	for n := range 24 {
		switch {
		case len(all) < 2 || len(all) < 6 && random.IntN(2) == 0:
			start(n)
		default:
			i := random.IntN(len(all))
			w := all[i]
			all = append(all[:i], all[i+1:]...)
			if random.IntN(3) == 0 {
				w.end()
				w.kill()
			} else {
				stopping.Go(func() { w.stop(); w.end() })
			}
		}
		time.Sleep(time.Duration(random.IntN(8000)) * time.Millisecond)
	}
	workers := make([]*worker, len(all))
	for i, w := range all {
		workers[i] = w.worker
	}
	r.balanced(time.Minute, workers...)
	for _, w := range all {
		stopping.Go(func() { w.stop(); w.end() })
	}
	stopping.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.both) > 0 {
		t.Errorf("called by two: %v", c.both)
	}
	t.Logf("%d calls", c.made)
}
