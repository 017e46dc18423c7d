package control

import (
	"context"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/resilience"
)

const (
	// toldWithin is the age up to which a hold by people is told of. It is shorter than the
	// window in which EVENTS knows duplicates, so that after a restart nothing is told twice.
	toldWithin = 5 * time.Minute

	// expireEvery is how often holds that are over are looked for.
	expireEvery = 2 * time.Second

	// expireAfter is for how long a hold is over before it is deleted: by the clocks of other
	// workers it must be over, too, or its deletion would release it early.
	expireAfter = 5 * time.Second
)

// Holds mirror the bucket HOLDS, which every worker follows, so that a hold outlives the
// worker that met it and people can set one by hand.
type Holds struct {
	source
	log     zerolog.Logger
	gates   Gates
	changes *changes

	known      rows[held]
	through    uint64    // highest revision that the feed has brought
	complained time.Time // writeBack's own
}

// held is a hold as it is known.
type held struct {
	resilience.Hold
	storing int  // Puts that are at it
	told    bool // that it is over
	doubt   *doubt
	under   *resilience.Hold // the longest that a Put brought and that this one outlasts
}

// doubt is an entry with a shorter hold of the API's. In the same bucket the longer one was
// released before; in one that was made again it was lost.
type doubt struct {
	Entry
	epoch int
}

// NewHolds makes a mirror of a bucket; changed is told of what happens to holds, from a
// goroutine of its own, and may be nil.
func NewHolds(js jetstream.JetStream, bucket string, gates Gates, changed func(Change), log zerolog.Logger) *Holds {
	h := &Holds{log: log, gates: gates, known: rows[held]{all: map[string]row[held]{}}}
	h.source = newSource(js, bucket, Feed{Begin: h.beginList, Apply: h.fromFeed, Listed: h.endList, Log: log})
	h.changes = newChanges(changed, h.releasedBy)
	return h
}

// Run follows the bucket, stores what could not be stored, and deletes what is over, until
// ctx ends.
func (h *Holds) Run(ctx context.Context) {
	var all sync.WaitGroup
	all.Go(func() { h.run(ctx) })
	all.Go(func() { h.repair(ctx, h.writeBack) })
	all.Go(func() { h.expire(ctx) })
	all.Go(func() { h.changes.run(ctx) })
	all.Wait()
}

// Of is an authority's hold of a creator, if it stands or has ended only just now.
func (h *Holds) Of(creator string, by Authority) (resilience.Hold, bool) {
	key, err := Target{Creator: creator}.Key(by)
	if err != nil {
		return resilience.Hold{}, false
	}
	r, there := h.known.get(key)
	return r.value.Hold, there
}

// Held is the hold that forbids calls to a target now: the later one of the two
// authorities'. nil: none stands.
func (h *Holds) Held(t Target, now time.Time) *resilience.Hold {
	var both [2]*resilience.Hold
	for _, by := range []Authority{ByPeople, ByAPI} {
		if key, err := t.Key(by); err == nil {
			if r, there := h.known.get(key); there {
				both[by] = &r.value.Hold
			}
		}
	}
	return Later(now, both[0], both[1])
}

func (h *Holds) beginList(renewed bool) {
	h.through = 0
	if n := h.known.begin(renewed); renewed {
		h.log.Warn().Int("known", n).Msgf("bucket %s was made anew: the holds that are known and lack in it are written back", h.bucket)
	}
}

func (h *Holds) endList() {
	for _, key := range h.known.unlisted(h.through) {
		h.ended(Entry{Key: key, Revision: h.through, Operation: jetstream.KeyValueDelete})
	}
	h.repairSoon()
}

// fromFeed takes what the bucket's feed brings.
func (h *Holds) fromFeed(e Entry) {
	h.through = max(h.through, e.Revision)
	h.apply(e)
}

// apply takes an entry of the bucket, as it is or as it has become. turn is held.
func (h *Holds) apply(e Entry) {
	t, by, err := ParseKey(e.Key)
	if err != nil {
		if e.Operation == jetstream.KeyValuePut {
			h.log.Warn().Err(err).Str("key", e.Key).Msg("ignored: this key holds nothing")
		}
		return
	}
	if e.Operation != jetstream.KeyValuePut {
		h.ended(e)
		return
	}
	hold, err := ParseHold(e.Value, e.Created)
	if err != nil {
		h.unreadable(e, err)
		return
	}
	h.began(t, by, hold, e, false)
}

// began takes a hold that was put into the bucket; sure: the bucket is the one that the known
// hold was in.
func (h *Holds) began(t Target, by Authority, hold resilience.Hold, e Entry, sure bool) {
	now := time.Now()
	h.known.mu.Lock()
	old, there := h.known.all[e.Key]
	stood := there && old.value.Stands(now)
	longer := stood && old.value.Outlasts(&hold)
	switch {
	case there && old.revision >= e.Revision:
		old.listed = old.listed || old.revision == e.Revision
		h.known.all[e.Key] = old
		h.known.mu.Unlock()
		return
	case by == ByAPI && longer && old.revision == 0:
		// The bucket gets the longer one, by compare-and-set.
		h.known.mu.Unlock()
		h.repairSoon()
		return
	case by == ByAPI && longer && !sure:
		old.value.doubt, old.listed = &doubt{e, h.epoch}, true
		h.known.all[e.Key] = old
		h.known.mu.Unlock()
		h.repairSoon()
		return
	}
	h.known.all[e.Key] = row[held]{value: held{Hold: hold, storing: old.value.storing, under: old.value.under}, revision: e.Revision, listed: true}
	h.known.mu.Unlock()

	stands := hold.Stands(now)
	if stood && (!stands || by == ByAPI && longer) {
		h.gates.Release(t, by)
		h.tell(Change{Kind: Released, Target: t, By: by, Hold: old.value.Hold, Who: hold.Who, Revision: e.Revision})
	}
	if !stands {
		return
	}
	h.gates.Hold(t, by, hold)
	if by == ByPeople && now.Sub(e.Created) < toldWithin && !(there && same(old.value.Hold, hold)) {
		h.tell(Change{Kind: Held, Target: t, By: by, Hold: hold, Who: hold.Who, Revision: e.Revision})
	}
}

func same(a, b resilience.Hold) bool {
	return a.Until.Equal(b.Until) && a.Since.Equal(b.Since) && a.Reason == b.Reason
}

// ended takes the news that a key is gone. What is not stored yet is newer than that.
func (h *Holds) ended(e Entry) {
	t, by, err := ParseKey(e.Key)
	if err != nil {
		return
	}
	h.known.mu.Lock()
	old, there := h.known.all[e.Key]
	if !there || old.revision > e.Revision || old.revision == 0 && old.lost == notLost {
		h.known.mu.Unlock()
		return
	}
	now := time.Now()
	under := old.value.under
	if under.Stands(now) && under.Since.After(e.Created) {
		h.known.all[e.Key] = row[held]{value: held{Hold: *under, storing: old.value.storing}}
	} else {
		delete(h.known.all, e.Key)
		under = nil
	}
	h.known.mu.Unlock()
	stood := old.value.Stands(now)
	if stood || e.Operation == jetstream.KeyValueDelete {
		h.gates.Release(t, by)
	} // else its owner purged what is over: a gate that finds out whether the trouble is may go on
	if stood {
		h.tell(Change{Kind: Released, Target: t, By: by, Hold: old.value.Hold, Revision: e.Revision})
	}
	if under != nil { // an answer that came after the release
		h.gates.Hold(t, by, *under)
		h.changes.add(Change{Kind: Held, Target: t, By: by, Hold: *under, Who: under.Who})
		h.repairSoon()
	}
}

// unreadable takes a value that is no hold. The one that it replaced stays in force, and goes
// back into the bucket.
func (h *Holds) unreadable(e Entry, err error) {
	h.known.mu.Lock()
	old, there := h.known.all[e.Key]
	stays := there && old.value.Stands(time.Now())
	if stays && old.revision > 0 && old.revision < e.Revision {
		old.revision, old.lost, old.lostAt, old.listed = 0, lostAlone, time.Now(), true
		h.known.all[e.Key] = old
	}
	h.known.mu.Unlock()
	log := h.log.Warn().Err(err).Str("key", e.Key)
	if !stays {
		log.Msg("ignored: cannot read this hold")
		return
	}
	log.Msg("ignored: cannot read this hold; the one that it replaced stays and is written back")
	h.repairSoon()
}

// tell passes a change on, if it is this worker's to tell.
func (h *Holds) tell(c Change) {
	if h.owns(c.Target) {
		h.changes.add(c)
	}
}

// owns reports whether this worker looks after a hold. Those of all are looked after by each.
func (h *Holds) owns(t Target) bool {
	return t.Kind != Creator || h.gates.Owns(t.Creator)
}

// expire deletes holds that are over from the bucket, of creators that are this worker's.
func (h *Holds) expire(ctx context.Context) {
	every := time.NewTicker(expireEvery)
	defer every.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-every.C:
		}
		over := h.over(time.Now())
		if len(over) == 0 {
			continue
		}
		short, cancel := context.WithTimeout(ctx, repairWithin)
		err := each(short, over, h.remove)
		cancel()
		if err != nil && ctx.Err() == nil {
			h.log.Warn().Err(err).Int("holds", len(over)).Msg("holds that are over cannot be deleted; trying again")
		}
	}
}

// over returns the keys to delete, and tells of the holds that have ended.
func (h *Holds) over(now time.Time) []string {
	var ended []string
	h.known.mu.RLock()
	for key, r := range h.known.all {
		if !r.value.Stands(now) {
			ended = append(ended, key)
		}
	}
	h.known.mu.RUnlock()
	var remove []string
	for _, key := range ended {
		t, by, err := ParseKey(key)
		owned := err == nil && h.owns(t)
		h.known.mu.Lock()
		r, there := h.known.all[key]
		tell := there && owned && !r.value.told && !r.value.Stands(now)
		switch {
		case !there || r.value.Stands(now):
		case r.revision == 0:
			delete(h.known.all, key) // there is nothing to delete in the bucket
		case owned:
			r.value.told = true
			h.known.all[key] = r
			if now.Sub(r.value.Until) >= expireAfter {
				remove = append(remove, key)
			}
		}
		h.known.mu.Unlock()
		if tell {
			h.changes.add(Change{Kind: Expired, Target: t, By: by, Hold: r.value.Hold, Who: r.value.Who, Revision: r.revision})
		}
	}
	return remove
}

// remove deletes a hold that is over, and no other: it may be held again by now.
func (h *Holds) remove(ctx context.Context, key string) error {
	r, there := h.known.get(key)
	if !there || r.revision == 0 || r.value.Stands(time.Now()) {
		return nil
	}
	kv, err := h.handle(ctx)
	if err != nil {
		return err
	}
	if err := kv.Purge(ctx, key, jetstream.LastRevision(r.revision)); err != nil && !lostRace(err) {
		return err
	}
	h.known.mu.Lock()
	defer h.known.mu.Unlock()
	if now, there := h.known.all[key]; there && now.revision == r.revision {
		delete(h.known.all, key)
	}
	return nil
}
