package dlq

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
)

// Replay says how dead letters are sent through again.
type Replay struct {
	Filter
	Rate       float64 // requests a second; 0: as fast as the stream takes them
	MaxReplays int     // of one request, ever
	KeepGoing  bool    // although they come back
	Progress   func(Replayed)
}

// Replayed counts.
type Replayed struct {
	Done     int `json:"replayed"`
	Skipped  int `json:"skipped"`   // replayed too often before, or of a class that has to be named
	CameBack int `json:"came_back"` // with the class that they had
	Of       int `json:"of"`        // letters that match
}

// ErrCameBack means that what was replayed failed again in the same way.
var ErrCameBack = errors.New("what was replayed comes back with the same class")

// Replays that come back stop the rest if they are at least this many and this part.
const (
	cameBackAtLeast = 20
	cameBackPart    = 0.5
)

// byName are classes that are replayed only if they are named: somebody has to
// look first.
func byName(c classify.Class) bool { return c == classify.Uncertain || c == classify.Poison }

// Selects reports whether a letter is one to replay.
func (r Replay) Selects(l Letter) bool {
	return l.Replays < r.MaxReplays && (r.Class != "" || !byName(l.Class))
}

// Replay publishes the requests of dead letters again, each under an id of its own,
// and deletes the letters. It may be stopped and started again, and run
// in two places: the id says how often the request was replayed, so that the stream
// takes one, and a worker looks a replayed request up before it calls.
func (b *Box) Replay(ctx context.Context, r Replay) (Replayed, error) {
	var (
		mu    sync.Mutex
		done  Replayed
		batch = make(chan Letter)
	)
	if err := b.Each(ctx, r.Filter, false, func(Letter) error { done.Of++; return nil }); err != nil {
		return done, err
	}
	publish := publisher.New(b.js, publisher.Topology{Namespace: b.ns})
	returning, err := b.watchReturns(ctx, r, func() {
		mu.Lock()
		defer mu.Unlock()
		done.CameBack++
	})
	if err != nil {
		return done, err
	}
	defer returning()
	limit := rate.NewLimiter(rate.Inf, 1)
	if r.Rate > 0 {
		limit = rate.NewLimiter(rate.Limit(r.Rate), 1)
	}
	stuck := func() error {
		mu.Lock()
		defer mu.Unlock()
		if r.KeepGoing || done.CameBack < cameBackAtLeast || float64(done.CameBack) < cameBackPart*float64(done.Done) {
			return nil
		}
		return fmt.Errorf("%w: %d of %d replayed so far; put right what they fail of, or insist with --keep-going", ErrCameBack, done.CameBack, done.Done)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(batch)
		return b.Each(gctx, r.Filter, true, func(l Letter) error {
			if err := stuck(); err != nil {
				return err
			}
			if !r.Selects(l) {
				mu.Lock()
				done.Skipped++
				mu.Unlock()
				return nil
			}
			if err := limit.Wait(gctx); err != nil {
				return err
			}
			select {
			case batch <- l:
				return nil
			case <-gctx.Done():
				return gctx.Err()
			}
		})
	})
	for range 16 {
		g.Go(func() error {
			for l := range batch {
				if err := b.again(gctx, publish, l); err != nil {
					return err
				}
				mu.Lock()
				done.Done++
				now := done
				mu.Unlock()
				if r.Progress != nil {
					r.Progress(now)
				}
			}
			return nil
		})
	}
	err = g.Wait()
	mu.Lock()
	defer mu.Unlock()
	return done, err
}

// again publishes one request and then deletes its letter.
func (b *Box) again(ctx context.Context, p *publisher.Publisher, l Letter) error {
	r := publisher.ReplayOf(l.RequestID, l.Replays+1, l.Creator, l.Operation, l.Header, l.Payload)
	for {
		_, err := p.Publish(ctx, r)
		switch {
		case err == nil:
			return b.Drop(ctx, l)
		case !errors.Is(err, publisher.ErrFull):
			return err
		}
		// As many of this creator wait as may; the letter is safe where it is.
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// watchReturns tells of replayed requests that become dead letters of the same
// class, until stop.
func (b *Box) watchReturns(ctx context.Context, r Replay, back func()) (stop func(), err error) {
	subject, err := b.subject(r.Filter)
	if err != nil {
		return nil, err
	}
	c, err := b.stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{subject}, HeadersOnly: true, DeliverPolicy: jetstream.DeliverNewPolicy,
	})
	if err != nil {
		return nil, fmt.Errorf("watch the DLQ: %w", err)
	}
	consuming, err := c.Consume(func(m jetstream.Msg) {
		if h := m.Headers(); h.Get(publisher.HeaderReplay) != "" && h.Get(publisher.HeaderReplayedClass) == h.Get(publisher.DlqClass) {
			back()
		}
	})
	if err != nil {
		return nil, fmt.Errorf("watch the DLQ: %w", err)
	}
	return consuming.Stop, nil
}
