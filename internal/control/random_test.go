package control

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/headgate-io/headgate/resilience"
)

// Whatever people, answers, forged values and deletions of the bucket do, in whatever order:
// no worker forgets a hold that the API asked for and that was not ended by force, and
// in the end all workers know what the bucket has, and nothing else.
func TestRandom(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			simulate(t, func(r *rig) { newChaos(r, seed).run() })
		})
	}
}

type chaos struct {
	*rig
	rnd     *rand.Rand
	workers []*worker
	asked   map[Target]time.Time // the latest end that the API asked for
}

var chaosTargets = []Target{{Creator: "alice"}, {Creator: "bob"}, {Kind: Account}, {Kind: Provider}}

func newChaos(r *rig, seed uint64) *chaos {
	c := &chaos{rig: r, rnd: rand.New(rand.NewPCG(seed, 1)), asked: map[Target]time.Time{}}
	for i := range 2 {
		owned := []string{"alice", "bob"}[i]
		c.workers = append(c.workers, r.startOn(r.js, func(name string) bool { return name == owned }).ready(r.t))
	}
	return c
}

func (c *chaos) run() {
	for range 80 {
		c.step(chaosTargets[c.rnd.IntN(len(chaosTargets))])
		time.Sleep(time.Duration(c.rnd.ExpFloat64() * float64(400*time.Millisecond)))
		c.check()
	}
	c.setup()
	time.Sleep(time.Minute)
	c.check()
	c.converged()
}

func (c *chaos) step(target Target) {
	ctx, cancel := context.WithTimeout(c.ctx, time.Second)
	defer cancel()
	people, _ := target.Key(ByPeople)
	api, _ := target.Key(ByAPI)
	during := time.Hour + time.Duration(c.rnd.IntN(3600))*time.Second
	switch c.rnd.IntN(12) {
	case 0, 1, 2:
		h := until(during, "RATE_LIMIT")
		_ = c.workers[c.rnd.IntN(2)].h.Put(ctx, target, h) // kept in any case
		if h.Until.After(c.asked[target]) {
			c.asked[target] = h.Until
		}
	case 3, 4:
		_, _ = c.js.Publish(ctx, "$KV.HOLDS."+people, fmt.Appendf(nil, "%v", during))
	case 5:
		_, _ = c.js.Publish(ctx, "$KV.HOLDS."+people, []byte(`{"stream":"REQUESTS","seq":7}`))
	case 6:
		_, _ = c.js.Publish(ctx, "$KV.HOLDS."+api, []byte(`{"stream":"REQUESTS","seq":7}`))
	case 7, 8:
		c.release(ctx, target, false)
	case 9:
		c.release(ctx, target, true)
	case 10:
		_ = c.js.DeleteKeyValue(ctx, bucketHolds)
		time.Sleep(time.Duration(1+c.rnd.IntN(2000)) * time.Millisecond)
		c.setup()
	case 11:
		_ = c.workers[c.rnd.IntN(2)].h.WaitCurrent(ctx)
	}
}

func (c *chaos) release(ctx context.Context, target Target, force bool) {
	if desk, err := OpenDesk(ctx, c.js, bucketHolds); err == nil {
		if _, err := desk.Release(ctx, target, force, "bob"); err == nil && force {
			delete(c.asked, target)
		}
	}
}

// check looks whether the one who put a hold, and after a moment the others, still know it.
func (c *chaos) check() {
	c.t.Helper()
	for target, end := range c.asked {
		known := false
		for _, w := range c.workers {
			h := w.h.Held(target, time.Now())
			known = known || h != nil && !h.Until.Before(end)
		}
		if !known {
			c.t.Fatalf("%v: a hold until %v is known to no worker", target, end)
		}
	}
}

func (c *chaos) converged() {
	c.t.Helper()
	for _, target := range chaosTargets {
		for _, by := range []Authority{ByPeople, ByAPI} {
			key, _ := target.Key(by)
			stored := c.stored(key)
			for i, w := range c.workers {
				r, there := w.h.known.get(key)
				var known *resilience.Hold
				if there {
					known = &r.value.Hold
				}
				if left(stored) != left(known) {
					c.t.Errorf("%s: the bucket has %+v, worker %d knows %+v (%+v)", key, stored, i, known, r)
				}
				if r.value.storing != 0 || there && r.revision == 0 {
					c.t.Errorf("%s: worker %d has %+v", key, i, r)
				}
			}
			if by == ByAPI && left(stored) < time.Until(c.asked[target]).Round(time.Second) {
				c.t.Errorf("%s: stored for %v, asked for until %v", key, left(stored), c.asked[target])
			}
		}
		for i, w := range c.workers {
			if got, want := left(w.held(target)), left(w.h.Held(target, time.Now())); got != want {
				c.t.Errorf("%v: worker %d's gate obeys %v, the mirror has %v", target, i, got, want)
			}
		}
	}
}
