package budget

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/resilience"
)

const (
	// tripKey has the round trip to NATS of the worker that is farthest away, as a
	// duration. If the others wrote more often than that, it could never write.
	tripKey = Key + ".trip"

	// tripEvery is how often it is read, tripAgain how often the slowest worker
	// writes it, and after tripOld it is not believed any more.
	tripEvery = 5 * time.Second
	tripAgain = 20 * time.Second
	tripOld   = time.Minute
)

// pace is how fast NATS answers.
type pace struct {
	trip time.Duration // of this worker, a moving maximum

	slowest  time.Duration // of another one
	revision uint64
	seen     time.Time // when slowest was news
	read     time.Time
	written  time.Time
}

func (p *pace) measure(trip time.Duration) { p.trip = max(trip, p.trip-(p.trip-trip)/32) }

// reckoned is after how long a lease will be there.
func (p *pace) reckoned() time.Duration { return p.trip + p.trip/4 + time.Millisecond }

// span is for how long a worker should lease at once.
func (p *pace) span(r resilience.Rate) time.Duration {
	base := max(span, spanPauses*r.Pause())
	return min(base+spanTrips*max(p.trip, p.slowest), longest)
}

func (p *pace) due(now time.Time) bool { return now.Sub(p.read) >= tripEvery }

// sharePace reads how far away other workers are, and tells them about this one if
// it is farther.
func (b *Budget) sharePace(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	p := &b.pace
	entry, err := b.store.Get(ctx, tripKey)
	now := time.Now()
	switch {
	case err == nil && entry.Revision() != p.revision:
		p.revision, p.seen = entry.Revision(), now
		p.slowest, _ = time.ParseDuration(string(entry.Value())) // garbage: none is known
		p.slowest = max(0, min(p.slowest, longest))
	case err != nil && !errors.Is(err, jetstream.ErrKeyNotFound):
		return fmt.Errorf("read how far away other workers are: %w", err)
	}
	if now.Sub(p.seen) > tripOld {
		p.slowest = 0
	}
	p.read = now
	if p.trip > p.slowest*3/2 || p.trip >= p.slowest && now.Sub(p.written) > tripAgain {
		if p.revision, err = b.store.Put(ctx, tripKey, []byte(p.trip.String())); err != nil {
			return fmt.Errorf("tell other workers how far away this one is: %w", err)
		}
		p.slowest, p.seen, p.written = p.trip, now, now
	}
	return nil
}

// usage remembers how many tokens were used lately.
type usage struct {
	marks []mark
}

type mark struct {
	at   time.Time
	used uint64
}

// recent is the number of tokens used in the time before now, of which used is
// the count so far.
func (u *usage) recent(now time.Time, used uint64, before time.Duration) int {
	const apart = 32 // marks in that time
	if n := len(u.marks); n == 0 || now.Sub(u.marks[n-1].at) >= before/apart {
		u.marks = append(u.marks, mark{now, used})
	}
	for len(u.marks) > 1 && now.Sub(u.marks[0].at) > before {
		u.marks = u.marks[1:]
	}
	return int(used - u.marks[0].used)
}
