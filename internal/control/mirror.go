package control

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
)

const (
	// repairEvery is how often an entry that is not stored is stored again.
	repairEvery = 3 * time.Second

	// othersAfter is the time that the owner has to write back what was lost.
	othersAfter = 4 * repairEvery

	// repairWithin bounds the writes of one round.
	repairWithin = 10 * time.Second

	// atOnce is how many keys are written, or deleted, at the same time.
	atOnce = 16
)

// row is one key of a bucket as it is known.
type row[V any] struct {
	value    V
	revision uint64 // under which the bucket has it; 0: it has it not, or not yet
	lost     loss
	lostAt   time.Time
	listed   bool // seen since the listing began
}

// mayWriteBack reports whether a worker may put a lost row back into the bucket. The owner
// does so at once. The others do it later, for an owner that has restarted and so
// never knew it.
func (r *row[V]) mayWriteBack(now time.Time, owned bool) bool {
	return r.lost != notLost && (owned || now.Sub(r.lostAt) >= othersAfter)
}

// loss is the reason why a row lacks in the bucket that once had it.
type loss uint8

const (
	notLost   loss = iota
	lostAll        // the bucket was made again
	lostAlone      // something that cannot be read was put over it
)

// rows mirror a bucket.
type rows[V any] struct {
	mu  sync.RWMutex
	all map[string]row[V]
}

// begin prepares for a listing. It returns the number of rows that a bucket which was made
// again may lack.
func (r *rows[V]) begin(renewed bool) (stored int) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	for key, w := range r.all {
		w.listed = false
		if renewed && w.revision > 0 {
			w.revision, w.lost, w.lostAt = 0, lostAll, now
			stored++
		}
		r.all[key] = w
	}
	return stored
}

// unlisted returns the keys that a listing up to a sequence did not have, although they
// were stored before it: they were erased without a trace.
func (r *rows[V]) unlisted(through uint64) []string {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var keys []string
	for key, w := range r.all {
		if !w.listed && w.revision > 0 && w.revision <= through {
			keys = append(keys, key)
		}
	}
	return keys
}

func (r *rows[V]) get(key string) (row[V], bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	w, there := r.all[key]
	return w, there
}

// source follows one bucket for a mirror.
type source struct {
	*follower
	ready chan struct{} // closed when all that was there at the start is known
	wake  chan struct{} // there is something to repair
}

func newSource(js jetstream.JetStream, bucket string, feed Feed) source {
	s := source{ready: make(chan struct{}), wake: make(chan struct{}, 1)}
	listed, once := feed.Listed, sync.OnceFunc(func() { close(s.ready) })
	feed.Listed = func() {
		listed()
		once()
	}
	s.follower = newFollower(js, bucket, feed)
	return s
}

// Ready is closed when all that the bucket had at the start is known and applied.
func (s source) Ready() <-chan struct{} { return s.ready }

// WaitCurrent waits until all that the bucket has at this moment, as its stream's leader
// says, is known and applied. A worker asks it before the first call of a partition that
// it has taken over: the former owner's last hold may have been stored a moment ago.
func (s source) WaitCurrent(ctx context.Context) error { return s.waitCurrent(ctx) }

// repairSoon does not wait for the next round.
func (s source) repairSoon() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// repair calls round now and then, and when there is something to do, until ctx ends.
func (s source) repair(ctx context.Context, round func(context.Context)) {
	every := time.NewTicker(repairEvery)
	defer every.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-every.C:
		case <-s.wake:
		}
		short, cancel := context.WithTimeout(ctx, repairWithin)
		round(short)
		cancel()
	}
}

// each does something for all keys, some at once. It stops at the first error: the
// others would fare no better.
func each(ctx context.Context, keys []string, do func(context.Context, string) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for _, key := range keys {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error { return do(ctx, key) })
	}
	return g.Wait()
}

// lostRace reports that a compare-and-set was not the first: the key has to be read
// again.
func lostRace(err error) bool {
	var api *jetstream.APIError
	return errors.Is(err, jetstream.ErrKeyExists) ||
		errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == codeInFlight)
}

// codeInFlight: a clustered stream has another write to the same subject in flight.
const codeInFlight = 10164
