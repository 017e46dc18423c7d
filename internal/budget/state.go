package budget

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

const (
	// Key of the account's limit.
	Key = "account"

	// farAway is how much later than a burst used up the state may be, at least, before
	// it is not believed.
	farAway = 30 * time.Second

	// skew is the difference between a worker's clock and the server's that is
	// worth a word, said at most every sayAgain.
	skew     = time.Second
	sayAgain = time.Minute
)

// stored is the state of a limit in the bucket. Rate and burst are those under
// which it was written.
type stored struct {
	TAT   time.Time `json:"tat"`
	Rate  float64   `json:"rate"` // calls a second
	Burst int       `json:"burst"`
	At    time.Time `json:"at,omitzero"` // by the writer's clock
}

// state is the limit as last seen. A worker that is behind fails to write, and
// looks again.
type state struct {
	known    bool
	revision uint64
	mine     uint64 // the revision that this worker wrote last, 0: none
	tat      time.Time
	pause    time.Duration // returned with tat by this worker's lease, 0: by another's
	read     time.Time     // or written
	said     time.Time     // when a complaint was last logged
}

// look reads the state.
func (b *Budget) look(ctx context.Context, o order) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	began := time.Now()
	entry, err := b.store.Get(ctx, Key)
	now := time.Now()
	switch {
	case errors.Is(err, jetstream.ErrKeyNotFound):
		// Deleted or never written. What this worker knows of it still counts.
		b.revision, b.mine, b.pause = 0, 0, 0
	case err != nil:
		return fmt.Errorf("read the account's budget: %w", err)
	case entry.Revision() != b.revision:
		b.revision, b.pause = entry.Revision(), 0
		b.tat = b.believe(entry, now, o)
	}
	b.pace.measure(now.Sub(began))
	b.known, b.read = true, now
	return nil
}

// believe reads tat, and takes the burst for used up where it cannot be right.
func (b *Budget) believe(entry jetstream.KeyValueEntry, now time.Time, o order) time.Time {
	usedUp := now.Add(b.rate.Fill())
	var s stored
	if err := json.Unmarshal(entry.Value(), &s); err != nil {
		b.say(now, "the account's budget cannot be read, and is taken for used up", err)
		return usedUp
	}
	if !s.At.IsZero() {
		if ahead := s.At.Sub(entry.Created()); ahead > skew || ahead < -skew-timeout {
			b.say(now, "the clock of a worker differs from the server's; the account's limit may be broken, or used less than it could be",
				fmt.Errorf("it is ahead by %v", ahead.Round(time.Millisecond)))
		}
	}
	legitimate := max(farAway, 8*o.span*time.Duration(o.workers)) + b.rate.Interval()
	switch ahead := s.TAT.Sub(usedUp); {
	case ahead > legitimate:
		b.say(now, "the account's budget is used up for longer than it can be, by a clock that is ahead or by hand, and is taken for used up now",
			fmt.Errorf("by %v", ahead.Round(time.Second)))
		return usedUp
	case ahead < 0 && (s.Rate != b.rate.PerSecond || s.Burst != b.rate.Burst):
		return usedUp // under another limit: begin without a burst
	}
	return s.TAT
}

func (b *Budget) say(now time.Time, what string, err error) {
	if now.Sub(b.said) >= sayAgain {
		b.said = now
		b.log.Warn().Err(err).Str("key", Key).Msg(what)
	}
}

// write reports whether no other worker was faster.
func (b *Budget) write(ctx context.Context, tat time.Time) (bool, error) {
	value, err := json.Marshal(stored{tat.UTC().Round(0), b.rate.PerSecond, b.rate.Burst, time.Now().UTC().Round(0)})
	if err != nil {
		return false, fmt.Errorf("encode the account's budget: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var revision uint64
	if b.revision == 0 {
		revision, err = b.store.Create(ctx, Key, value)
	} else {
		revision, err = b.store.Update(ctx, Key, value, b.revision)
	}
	switch {
	case err == nil:
		b.revision, b.mine, b.read = revision, revision, time.Now()
		return true, nil
	case writtenBetween(err):
		b.known = false
		return false, nil
	}
	b.known = false // it may have been written
	return false, fmt.Errorf("lease calls of the account's limit: %w", err)
}
