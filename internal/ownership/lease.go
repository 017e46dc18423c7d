package ownership

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/headgate-io/headgate/internal/failpoint"
)

// Lease is the right to call the creators of one partition. It ends by this
// worker's own clock, counted from before its last confirmed renewal was sent:
// a worker that cannot renew stops calling before another one can claim.
type Lease struct {
	store  *store
	key    string
	worker string
	ttl    time.Duration

	until   atomic.Pointer[time.Time]
	claimed atomic.Bool
	closed  atomic.Bool // not valid any more, but kept until it is released

	turn chan struct{} // held by the one goroutine that talks to the server; guards the rest

	value     []byte    // as this worker stored it, or tried to
	found     *message  // the message that value replaced
	revision  uint64    // of value; 0: it is not known to be stored
	sent      time.Time // when the last confirmed write was, by this worker's clock
	releasing bool      // it is not renewed any more
}

func newLease(s *store, worker string, partition int, ttl time.Duration) *Lease {
	return &Lease{store: s, key: keyPartition + strconv.Itoa(partition), worker: worker, ttl: ttl, turn: make(chan struct{}, 1)}
}

// Valid reports whether the lease permits a call now. Both clocks have to agree:
// the monotonic one stands still while a machine is suspended, and the other one
// can be set back.
func (l *Lease) Valid(now time.Time) bool {
	until := l.until.Load()
	return until != nil && !l.closed.Load() && now.Before(*until) && now.Round(0).Before(until.Round(0))
}

// Claimed reports whether the lease was claimed and has not been given up or lost, even if
// it may have run out.
func (l *Lease) Claimed() bool { return l.claimed.Load() }

// margin keeps the last call that starts under a lease clear of its end, for clocks
// that run at slightly different speeds.
func (l *Lease) margin() time.Duration { return min(time.Second, l.ttl/10) }

// storedLease is a lease in OWNERS. A worker takes a value with other fields for a foreign
// one, so a version that adds a field must come after one that knows it.
type storedLease struct {
	Worker string    `json:"worker"`
	Since  time.Time `json:"since"`
}

// takenError means that another worker has the lease.
type takenError struct{ worker string }

func (e *takenError) Error() string {
	return fmt.Sprintf("the partition belongs to worker %s", e.worker)
}

var (
	// errLapsed means that the lease is gone, and that another worker may have had it since.
	errLapsed = errors.New("the lease has lapsed")
	// errNotYet means that a partition may be claimed later: another worker's lease may still be valid.
	errNotYet = errors.New("another worker's lease may still be valid")
)

func (l *Lease) lock(ctx context.Context) error {
	select {
	case l.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", l.key, ctx.Err())
	}
}

func (l *Lease) unlock() { <-l.turn }

// claim takes the lease if no worker has it, and returns the message that it replaced, if
// there was one. may is asked about a message that is no lease, or about nil.
func (l *Lease) claim(ctx context.Context, may func(last *message) error) (found *message, err error) {
	if err := l.lock(ctx); err != nil {
		return nil, err
	}
	defer l.unlock()
	for range attempts {
		var last *message
		if last, err = l.store.last(ctx, l.key); err != nil {
			return nil, err
		}
		if l.mine(last) { // an earlier attempt got through after all
			l.revision = last.sequence
		} else {
			if s := parseLease(last); s != nil {
				return nil, &takenError{s.Worker}
			}
			if err := may(last); err != nil {
				return nil, err
			}
			l.found, l.revision = last, sequence(last)
			l.value, _ = json.Marshal(storedLease{l.worker, time.Now().UTC().Truncate(time.Microsecond)})
		}
		if err = l.write(ctx); err == nil {
			l.claimed.Store(true)
			return l.found, nil
		}
		if !writtenBetween(err) {
			return nil, err
		}
	}
	return nil, err
}

// attempts bounds how often a lease is written again at once.
const attempts = 3

// mine reports whether m is this worker's claim.
func (l *Lease) mine(m *message) bool {
	return m != nil && l.value != nil && bytes.Equal(m.data, l.value)
}

// sequence is m's, 0 if there is none.
func sequence(m *message) uint64 {
	if m == nil {
		return 0
	}
	return m.sequence
}

// write stores the lease, and makes it valid for another TTL.
func (l *Lease) write(ctx context.Context) error {
	sent := time.Now()
	revision, err := l.store.write(ctx, l.key, l.value, l.revision)
	if err != nil {
		return err
	}
	l.revision, l.sent = revision, sent
	until := sent.Add(l.ttl - l.margin())
	l.until.Store(&until)
	if !l.claimed.Load() {
		l.closed.Store(false)
		l.releasing = false
	}
	return nil
}

// renew makes a claimed lease longer. A claim whose confirmation got lost is found and renewed
// at once. If the lease is gone and no other worker can have had it since, it is claimed
// again, and resumed is true. takenError and errLapsed end it.
func (l *Lease) renew(ctx context.Context) (resumed bool, err error) {
	if err := l.lock(ctx); err != nil {
		return false, err
	}
	defer l.unlock()
	if !l.claimed.Load() || l.releasing {
		return false, nil
	}
	if err := failpoint.Hit(failpoint.Renew, ""); err != nil {
		return false, err
	}
	for range attempts {
		if err = l.write(ctx); err == nil || !writtenBetween(err) {
			return resumed, err
		}
		last, readErr := l.store.last(ctx, l.key)
		if readErr != nil {
			return false, readErr
		}
		if l.mine(last) {
			l.revision = last.sequence
			continue
		}
		if s := parseLease(last); s != nil {
			l.forget()
			return false, &takenError{s.Worker}
		}
		if !l.uninterrupted(last, time.Now()) {
			l.forget()
			return false, errLapsed
		}
		l.revision, resumed = sequence(last), true
	}
	return false, err
}

// uninterrupted reports that no other worker has had the lease since it was last renewed: another
// one could have claimed it a TTL later at the earliest, and leaves a mark if it released it,
// and a value for one more TTL if it did not. A foreign value may hide that one.
func (l *Lease) uninterrupted(last *message, now time.Time) bool {
	limit := l.sent.Add(2*l.ttl - l.margin())
	switch {
	case last == nil:
	case last.released():
		return false
	case !last.marks():
		limit = l.sent.Add(l.ttl - l.margin())
	}
	return now.Before(limit) && now.Round(0).Before(limit.Round(0))
}

// close ends the lease as a permission to call. It is still renewed until it is released.
func (l *Lease) close() { l.closed.Store(true) }

// release lets another worker claim at once. crashed passes on that the owner before this one
// crashed, if this one never entered. After an error it may be tried again.
func (l *Lease) release(ctx context.Context, crashed bool) error {
	l.close()
	if err := l.lock(ctx); err != nil {
		return err
	}
	defer l.unlock()
	if !l.claimed.Load() {
		return nil
	}
	l.releasing = true
	if err := failpoint.Hit(failpoint.Release, ""); err != nil {
		return err
	}
	header := nats.Header{headerWorker: {l.worker}}
	if crashed {
		header.Set(headerCrashed, "true")
	}
	for {
		err := l.store.release(ctx, l.key, l.revision, header)
		if err == nil {
			l.forget()
			return nil
		}
		if !writtenBetween(err) {
			return err
		}
		last, err := l.store.last(ctx, l.key)
		if err != nil {
			return err
		}
		if !l.mine(last) { // released by an earlier attempt, or lost
			l.forget()
			return nil
		}
		l.revision = last.sequence
	}
}

// abandon leaves the lease to its expiry.
func (l *Lease) abandon() {
	l.turn <- struct{}{}
	defer l.unlock()
	l.forget()
}

// forget is for the goroutine whose turn it is.
func (l *Lease) forget() {
	l.claimed.Store(false)
	l.until.Store(nil)
	l.value, l.found, l.revision, l.releasing = nil, nil, 0, false
}
