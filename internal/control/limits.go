package control

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/resilience"
)

// Limits mirror the bucket LIMITS: creators whose limits differ from those that are
// configured. Changes count at once.
type Limits struct {
	source
	log   zerolog.Logger
	gates Gates
	usual resilience.Limits

	known      rows[special]
	through    uint64    // highest revision that the feed has brought
	complained time.Time // writeBack's own
}

// special are the limits of one creator, and the value that says so.
type special struct {
	resilience.Limits
	text []byte
}

// NewLimits makes a mirror of a bucket; usual are the limits of all other creators.
func NewLimits(js jetstream.JetStream, bucket string, usual resilience.Limits, gates Gates, log zerolog.Logger) *Limits {
	l := &Limits{log: log, gates: gates, usual: usual, known: rows[special]{all: map[string]row[special]{}}}
	l.source = newSource(js, bucket, Feed{Begin: l.beginList, Apply: l.fromFeed, Listed: l.endList, Log: log})
	return l
}

// Run follows the bucket until ctx ends.
func (l *Limits) Run(ctx context.Context) {
	var both sync.WaitGroup
	both.Go(func() { l.run(ctx) })
	both.Go(func() { l.repair(ctx, l.writeBack) })
	both.Wait()
}

// Of are a creator's own limits, if it has any.
func (l *Limits) Of(creator string) (resilience.Limits, bool) {
	key, err := Target{Creator: creator}.Key(ByPeople)
	if err != nil {
		return resilience.Limits{}, false
	}
	r, there := l.known.get(key)
	return r.value.Limits, there
}

func (l *Limits) beginList(renewed bool) {
	l.through = 0
	if n := l.known.begin(renewed); renewed {
		l.log.Warn().Int("known", n).Msgf("bucket %s was made anew: the limits that are known and lack in it are written back", l.bucket)
	}
}

func (l *Limits) endList() {
	for _, key := range l.known.unlisted(l.through) {
		l.apply(Entry{Key: key, Revision: l.through, Operation: jetstream.KeyValueDelete})
	}
	l.repairSoon()
}

// fromFeed takes what the bucket's feed brings.
func (l *Limits) fromFeed(e Entry) {
	l.through = max(l.through, e.Revision)
	l.apply(e)
}

// apply takes an entry of the bucket, as it is or as it has become.
func (l *Limits) apply(e Entry) {
	put := e.Operation == jetstream.KeyValuePut
	name, err := creatorOf(e.Key)
	if err != nil {
		if put {
			l.log.Warn().Err(err).Str("key", e.Key).Msg("ignored: a key of LIMITS is creator.<encoded creator>")
		}
		return
	}
	limits := l.usual
	if put {
		if limits, err = ParseLimits(e.Value, l.usual); err != nil {
			l.unreadable(e, err)
			return
		}
	}
	before, news := l.note(e, limits)
	if !news {
		return
	}
	l.gates.Limit(name, limits)
	if recent := time.Since(e.Created) < time.Minute; (recent || before != nil) && (before == nil || *before != limits) { // not those read at the start
		l.log.Info().Str("creator", name).Bool("special", put).Msg("limits changed")
	}
}

// note remembers limits, or that there are none any more. It returns those of before, nil if
// there were none, and reports whether the entry is news.
func (l *Limits) note(e Entry, limits resilience.Limits) (before *resilience.Limits, news bool) {
	put := e.Operation == jetstream.KeyValuePut
	l.known.mu.Lock()
	defer l.known.mu.Unlock()
	old, there := l.known.all[e.Key]
	switch {
	case !there && !put:
		return nil, false
	case there && (old.revision > e.Revision || put && old.revision == e.Revision):
		old.listed = old.listed || old.revision == e.Revision
		l.known.all[e.Key] = old
		return nil, false
	case put:
		l.known.all[e.Key] = row[special]{value: special{limits, e.Value}, revision: e.Revision, listed: true}
	default:
		delete(l.known.all, e.Key)
	}
	if there {
		before = &old.value.Limits
	}
	return before, true
}

// unreadable takes a value that says nothing of limits. The one that it replaced stays in
// force, and goes back into the bucket.
func (l *Limits) unreadable(e Entry, err error) {
	l.known.mu.Lock()
	old, stays := l.known.all[e.Key]
	if stays && old.revision > 0 && old.revision < e.Revision {
		old.revision, old.lost, old.lostAt, old.listed = 0, lostAlone, time.Now(), true
		l.known.all[e.Key] = old
	}
	l.known.mu.Unlock()
	log := l.log.Warn().Err(err).Str("key", e.Key)
	if !stays {
		log.Msg("ignored: cannot read these limits")
		return
	}
	log.Msg("ignored: cannot read these limits; those that it replaced stay and are written back")
	l.repairSoon()
}

// writeBack stores the limits that the bucket has lost.
func (l *Limits) writeBack(ctx context.Context) {
	lost := map[string]row[special]{}
	l.known.mu.RLock()
	for key, r := range l.known.all {
		if r.lost != notLost {
			lost[key] = r
		}
	}
	l.known.mu.RUnlock()
	var mine []string
	now := time.Now()
	for key, r := range lost {
		if name, err := creatorOf(key); err == nil && r.mayWriteBack(now, l.gates.Owns(name)) {
			mine = append(mine, key)
		}
	}
	if len(mine) == 0 {
		return
	}
	var back atomic.Int64
	err := each(ctx, mine, func(ctx context.Context, key string) error {
		wrote, err := l.store(ctx, key)
		if wrote {
			back.Add(1)
		}
		return err
	})
	if n := back.Load(); n > 0 {
		l.log.Warn().Msgf("bucket %s was made anew: the limits of %d creators were written back", l.bucket, n)
	}
	if now := time.Now(); err != nil && now.Sub(l.complained) >= complainEvery {
		l.complained = now
		l.log.Error().Err(err).Int("creators", len(mine)).Msg("limits are known to the workers only, until they can be stored; trying again")
	}
}

// store writes limits that were lost, unless the bucket has others meanwhile. It reports
// whether it wrote them because the bucket was made again.
func (l *Limits) store(ctx context.Context, key string) (wrote bool, err error) {
	r, there := l.known.get(key)
	if !there || r.lost == notLost {
		return false, nil
	}
	kv, err := l.handle(ctx)
	if err != nil {
		return false, err
	}
	epoch, _, _ := l.position()
	entry, err := kv.Get(ctx, key)
	var revision uint64
	switch {
	case errors.Is(err, jetstream.ErrKeyNotFound):
		// Not if it was deleted: then the usual limits were put back.
		revision, err = kv.Update(ctx, key, r.value.text, 0)
	case err == nil:
		if _, err := ParseLimits(entry.Value(), l.usual); err == nil {
			return false, nil // the watch brings it
		}
		revision, err = kv.Update(ctx, key, r.value.text, entry.Revision())
	}
	switch {
	case lostRace(err):
		return false, nil // what came between decides
	case err != nil:
		return false, fmt.Errorf("store limits %s in bucket %s: %w", key, l.bucket, err)
	}
	l.turn.Lock()
	defer l.turn.Unlock()
	l.known.mu.Lock()
	defer l.known.mu.Unlock()
	if now, there := l.known.all[key]; l.epoch == epoch && there && now.lost != notLost {
		now.revision, now.lost = revision, notLost
		l.known.all[key] = now
	}
	return r.lost == lostAll, nil
}
