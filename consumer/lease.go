package consumer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/failpoint"
	"github.com/headgate-io/headgate/publisher"
)

const (
	leaseTTL = publisher.OwnerTTL
	// leaseMargin keeps the last call that starts under a lease clear of its end,
	// for clocks that run at slightly different speeds.
	leaseMargin = time.Second
)

// lease is the right to call the creators of one partition. It ends by this
// worker's own clock, counted from before its last confirmed renewal was sent:
// whoever cannot renew stops calling before anybody else can claim.
type lease struct {
	kv    jetstream.KeyValue
	key   string
	until atomic.Pointer[time.Time]

	turn     chan struct{} // one at a time renews or releases
	revision atomic.Uint64 // 0: not held
	value    []byte        // as stored
}

func newLease(kv jetstream.KeyValue, partition int) lease {
	return lease{kv: kv, key: memberPartition + strconv.Itoa(partition), turn: make(chan struct{}, 1)}
}

// lock waits for the end of what somebody else does with the server.
func (l *lease) lock(ctx context.Context) error {
	select {
	case l.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", l.key, ctx.Err())
	}
}

func (l *lease) unlock() { <-l.turn }

// held reports whether the lease was claimed and has not been given up, even if
// it may have run out.
func (l *lease) held() bool { return l.revision.Load() != 0 }

// holds reports whether a call may be started now. Both clocks have to agree:
// the monotonic one stands still while a machine is suspended, the other one
// can be set back.
func (l *lease) holds(now time.Time) bool {
	until := l.until.Load()
	return until != nil && now.Before(*until) && now.Round(0).Before(until.Round(0))
}

// storedLease is a lease in OWNERS.
type storedLease struct {
	Worker string    `json:"worker"`
	Since  time.Time `json:"since"`
}

// claim takes a lease that nobody has. errTaken: somebody does.
func (l *lease) claim(ctx context.Context, worker string) error {
	if err := l.lock(ctx); err != nil {
		return err
	}
	defer l.unlock()
	l.value, _ = json.Marshal(storedLease{worker, time.Now().UTC().Truncate(time.Millisecond)})
	return l.put(ctx)
}

// renew makes a lease longer that this worker has. errTaken: not any more.
func (l *lease) renew(ctx context.Context) error {
	if err := l.lock(ctx); err != nil {
		return err
	}
	defer l.unlock()
	if !l.held() {
		return nil // released in between
	}
	return l.put(ctx)
}

func (l *lease) put(ctx context.Context) (err error) {
	sent := time.Now()
	var revision uint64
	if before := l.revision.Load(); before == 0 {
		revision, err = l.kv.Create(ctx, l.key, l.value)
	} else {
		revision, err = l.kv.Update(ctx, l.key, l.value, before)
	}
	switch {
	case err == nil:
		l.revision.Store(revision)
		until := sent.Add(leaseTTL - leaseMargin)
		l.until.Store(&until)
		return nil
	case writtenBetween(err):
		return l.adopt(ctx)
	}
	return fmt.Errorf("write lease %s: %w", l.key, err)
}

// writtenBetween reports whether a compare-and-set failed because the key is, or is just being,
// written by somebody else.
func writtenBetween(err error) bool {
	var api *jetstream.APIError
	return errors.Is(err, jetstream.ErrKeyExists) ||
		errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == codeInFlight)
}

// codeInFlight: a clustered stream has another write to the same subject in flight.
const codeInFlight = 10164

// adopt takes up a claim of this worker's whose confirmation got lost, to be
// confirmed by the next renewal; any other one ends the lease.
func (l *lease) adopt(ctx context.Context) error {
	entry, err := l.kv.Get(ctx, l.key)
	if err == nil && bytes.Equal(entry.Value(), l.value) {
		l.revision.Store(entry.Revision())
		return fmt.Errorf("renew %s: a renewal was not confirmed", l.key)
	}
	l.lost()
	return errTaken
}

var errTaken = errors.New("the partition belongs to another worker")

func (l *lease) lost() {
	l.revision.Store(0)
	l.until.Store(nil)
}

// release lets another worker claim at once.
func (l *lease) release(ctx context.Context) error {
	if err := l.lock(ctx); err != nil {
		return err
	}
	defer l.unlock()
	revision := l.revision.Load()
	if revision == 0 {
		return nil
	}
	l.lost()
	if err := failpoint.Hit(failpoint.Release, ""); err != nil {
		return err
	}
	if err := l.kv.Delete(ctx, l.key, jetstream.LastRevision(revision)); err != nil {
		return fmt.Errorf("release %s: %w", l.key, err)
	}
	return nil
}
