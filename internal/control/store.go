package control

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/resilience"
)

// storeAgain is the pause before a compare-and-set that lost is tried again.
const storeAgain = 5 * time.Millisecond

// Put takes a hold that an answer of the API asks for. From this moment on this worker
// knows it, wherever the creator's partition goes, and it is stored for all workers,
// unless a longer one of the API's is. An error says that it is not stored; then it is tried
// again until it is. Put must not be called with locks that Gates.Hold takes.
func (h *Holds) Put(ctx context.Context, t Target, hold resilience.Hold) error {
	key, err := t.Key(ByAPI)
	if err != nil {
		return err
	}
	if h.keep(key, hold) {
		h.turn.Lock()
		h.gates.Hold(t, ByAPI, hold)
		h.turn.Unlock()
		h.changes.add(Change{Kind: Held, Target: t, By: ByAPI, Hold: hold, Who: hold.Who})
	}
	defer h.storing(key, -1)
	_, err = h.store(ctx, key)
	return err
}

// keep remembers a hold of the API's, unless a longer one is known, and reports whether it
// did. A Put is at it from now on.
func (h *Holds) keep(key string, hold resilience.Hold) bool {
	h.known.mu.Lock()
	defer h.known.mu.Unlock()
	old, there := h.known.all[key]
	counts := !there || !old.value.Stands(time.Now()) || hold.Outlasts(&old.value.Hold)
	if old.value.doubt != nil {
		old.revision, old.value.doubt = 0, nil // the bucket gets the longest of the three
	}
	switch {
	case counts:
		old = row[held]{value: held{Hold: hold, storing: old.value.storing}}
	case hold.Outlasts(old.value.under):
		old.value.under = &hold // the longer one may have been released a moment ago
	}
	old.value.storing++
	h.known.all[key] = old
	return counts
}

func (h *Holds) storing(key string, n int) {
	h.known.mu.Lock()
	defer h.known.mu.Unlock()
	if r, there := h.known.all[key]; there {
		r.value.storing = max(0, r.value.storing+n)
		h.known.all[key] = r
	}
}

// store writes the hold that is known for a key into the bucket, by compare-and-set: a
// write that a network held up must not replace what came meanwhile. It reports whether
// it wrote.
func (h *Holds) store(ctx context.Context, key string) (wrote bool, err error) {
	kv, err := h.handle(ctx)
	if err != nil {
		return false, err
	}
	for {
		r, there := h.known.get(key)
		if !there || r.revision > 0 || !r.value.Stands(time.Now()) {
			return false, nil
		}
		epoch, _, _ := h.position()
		revision, stays, err := h.write(ctx, kv, key, r)
		switch {
		case err == nil && stays != nil:
			h.adopt(stays, epoch)
			return false, nil
		case err == nil:
			h.stored(key, r, revision, epoch)
			return true, nil
		case err != nil && !lostRace(err):
			return false, fmt.Errorf("store hold %s in bucket %s: %w", key, h.bucket, err)
		case r.lost != notLost && err != nil:
			return false, nil // the key was put or deleted meanwhile, which the watch brings
		}
		pause(ctx, storeAgain)
		if ctx.Err() != nil {
			return false, fmt.Errorf("store hold %s in bucket %s: %w", key, h.bucket, ctx.Err())
		}
	}
}

// write makes one attempt. It returns the entry that stands there and stays, if one does.
func (h *Holds) write(ctx context.Context, kv jetstream.KeyValue, key string, r row[held]) (revision uint64, stays jetstream.KeyValueEntry, err error) {
	value, err := EncodeHold(r.value.Hold)
	if err != nil {
		return 0, nil, err
	}
	entry, err := kv.Get(ctx, key)
	switch {
	case errors.Is(err, jetstream.ErrKeyNotFound) && r.lost == notLost:
		revision, err = kv.Create(ctx, key, value)
	case errors.Is(err, jetstream.ErrKeyNotFound):
		// A key that was deleted after the bucket was made again was released.
		revision, err = kv.Update(ctx, key, value, 0)
	case err == nil:
		if h.keeps(key, entry, r) {
			return 0, entry, nil
		}
		revision, err = kv.Update(ctx, key, value, entry.Revision())
	}
	return revision, nil, err
}

// keeps reports whether the entry that stands in the bucket stays there: all that people have
// put, and a hold of the API's that is not shorter.
func (h *Holds) keeps(key string, there jetstream.KeyValueEntry, r row[held]) bool {
	hold, err := ParseHold(there.Value(), there.Created())
	if err != nil {
		return false
	}
	_, by, err := ParseKey(key)
	return err == nil && (by == ByPeople || hold.Stands(time.Now()) && !r.value.Outlasts(&hold))
}

// adopt takes an entry that was read instead of written.
func (h *Holds) adopt(e jetstream.KeyValueEntry, epoch int) {
	h.turn.Lock()
	defer h.turn.Unlock()
	if h.epoch == epoch { // else it may be the former bucket's
		h.apply(entryOf(e))
	}
}

// stored notes that the bucket has a hold.
func (h *Holds) stored(key string, r row[held], revision uint64, epoch int) {
	h.turn.Lock()
	defer h.turn.Unlock()
	h.known.mu.Lock()
	defer h.known.mu.Unlock()
	now, there := h.known.all[key]
	if h.epoch == epoch && there && now.revision == 0 && same(now.value.Hold, r.value.Hold) {
		now.revision, now.lost = revision, notLost
		h.known.all[key] = now
	}
}

// resolve applies shorter holds of the API's, once the bucket is found to be the one that the
// longer ones were in: then these were released.
func (h *Holds) resolve(ctx context.Context) {
	var doubts []*doubt
	h.known.mu.RLock()
	for _, r := range h.known.all {
		if r.value.doubt != nil {
			doubts = append(doubts, r.value.doubt)
		}
	}
	h.known.mu.RUnlock()
	if len(doubts) == 0 {
		return
	}
	kv, err := h.handle(ctx)
	if err == nil {
		_, err = h.lookBehind(ctx, kv)
	}
	if err != nil {
		return // in the next round, or never: the bucket was made again
	}
	h.turn.Lock()
	defer h.turn.Unlock()
	for _, d := range doubts {
		r, there := h.known.get(d.Key)
		t, by, keyErr := ParseKey(d.Key)
		hold, err := ParseHold(d.Value, d.Created)
		if there && r.value.doubt == d && d.epoch == h.epoch && r.revision > 0 && keyErr == nil && err == nil {
			h.began(t, by, hold, d.Entry, true)
		}
	}
}

// writeBack stores the holds that the bucket lacks: those that this worker could not store
// before, and those that were lost.
func (h *Holds) writeBack(ctx context.Context) {
	h.resolve(ctx)
	lacking := map[string]row[held]{}
	now := time.Now()
	h.known.mu.RLock()
	for key, r := range h.known.all {
		if r.revision == 0 && r.value.storing == 0 && r.value.Stands(now) {
			lacking[key] = r
		}
	}
	h.known.mu.RUnlock()
	var mine []string
	for key, r := range lacking {
		if t, _, err := ParseKey(key); err == nil && (r.lost == notLost || r.mayWriteBack(now, h.owns(t))) {
			mine = append(mine, key)
		}
	}
	if len(mine) == 0 {
		return
	}
	var back atomic.Int64
	err := each(ctx, mine, func(ctx context.Context, key string) error {
		wrote, err := h.store(ctx, key)
		if wrote && lacking[key].lost == lostAll {
			back.Add(1)
		}
		return err
	})
	if n := back.Load(); n > 0 {
		h.log.Warn().Msgf("bucket %s was made anew: %d holds were written back", h.bucket, n)
	}
	if err != nil {
		h.complainStore(err, len(mine))
	}
}

func (h *Holds) complainStore(err error, n int) {
	if now := time.Now(); now.Sub(h.complained) >= complainEvery {
		h.complained = now
		h.log.Error().Err(err).Int("holds", n).Msg("holds are known to this worker only, until they can be stored; trying again")
	}
}
