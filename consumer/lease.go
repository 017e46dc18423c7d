package consumer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

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

	mu       sync.Mutex // one at a time renews or releases
	revision uint64     // 0: not held
	value    []byte     // as stored
}

// held reports whether the lease was claimed and has not been given up, even if
// it may have run out.
func (l *lease) held() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.revision != 0
}

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
	l.mu.Lock()
	defer l.mu.Unlock()
	l.value, _ = json.Marshal(storedLease{worker, time.Now().UTC().Truncate(time.Millisecond)})
	return l.put(ctx)
}

// renew makes a lease longer that this worker has. errTaken: not any more.
func (l *lease) renew(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.revision == 0 {
		return nil // released in between
	}
	return l.put(ctx)
}

func (l *lease) put(ctx context.Context) (err error) {
	sent := time.Now()
	if l.revision == 0 {
		l.revision, err = l.kv.Create(ctx, l.key, l.value)
	} else {
		var revision uint64
		if revision, err = l.kv.Update(ctx, l.key, l.value, l.revision); err == nil {
			l.revision = revision
		}
	}
	switch {
	case err == nil:
		until := sent.Add(leaseTTL - leaseMargin)
		l.until.Store(&until)
		return nil
	case writtenBetween(err):
		return l.adopt(ctx)
	}
	return fmt.Errorf("renew %s: %w", l.key, err)
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
		l.revision = entry.Revision()
		return fmt.Errorf("renew %s: a renewal was not confirmed", l.key)
	}
	l.lost()
	return errTaken
}

var errTaken = errors.New("the partition belongs to another worker")

func (l *lease) lost() {
	l.revision = 0
	l.until.Store(nil)
}

// release lets another worker claim at once.
func (l *lease) release(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	revision := l.revision
	if revision == 0 {
		return nil
	}
	l.lost()
	if err := l.kv.Delete(ctx, l.key, jetstream.LastRevision(revision)); err != nil {
		return fmt.Errorf("release %s: %w", l.key, err)
	}
	return nil
}
