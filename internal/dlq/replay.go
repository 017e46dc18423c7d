package dlq

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/broker"
	"github.com/headgate-io/headgate/publisher"
)

// Replay says how dead letters are sent through again.
type Replay struct {
	Filter
	Rate       float64 // requests a second; 0: as fast as the stream takes them
	MaxReplays int     // of one request, ever
	KeepGoing  bool    // although they come back
	Progress   func(Replayed)
	Failed     func(Letter, error) // called for each letter that cannot be replayed, one at a time
}

// Replayed counts.
type Replayed struct {
	Done     int `json:"replayed"`
	Skipped  int `json:"skipped"`   // replayed too often before, of a class that has to be named, or without a creator
	Failed   int `json:"failed"`    // cannot be read or replayed
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

// byName are classes that are replayed only if they are named: a person has to
// look first.
func byName(c classify.Class) bool { return c == classify.Uncertain || c == classify.Poison }

// Selects reports whether a letter is one to replay. What could not be read of a request cannot
// be published again.
func (r Replay) Selects(l Letter) bool {
	return l.Creator != "" && l.Operation != "" && l.Replays < r.MaxReplays && (r.Class != "" || !byName(l.Class))
}

// Replay publishes the requests of dead letters again, each under an id of its own,
// and deletes the letters. It may be stopped and started again, and run
// in two places: the id says how often the request was replayed, so that the stream
// takes one, and a worker looks a replayed request up before it calls. A letter that cannot be
// replayed is counted and reported, and stays.
func (b *Box) Replay(ctx context.Context, r Replay) (Replayed, error) {
	run := &replaying{Box: b, Replay: r, published: make(map[string]classify.Class)}
	if err := b.Each(ctx, r.Filter, false, func(Letter) error { run.done.Of++; return nil }); err != nil {
		return run.done, err
	}
	run.publisher = publisher.New(b.js, publisher.Topology{Namespace: b.ns})
	stop, err := run.watchReturns(ctx)
	if err != nil {
		return run.done, err
	}
	defer stop()
	limit := rate.NewLimiter(rate.Inf, 1)
	if r.Rate > 0 {
		limit = rate.NewLimiter(rate.Limit(r.Rate), 1)
	}
	letters := make(chan Letter)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(letters)
		return b.Each(gctx, r.Filter, true, func(l Letter) error {
			if err := run.stuck(); err != nil {
				return err
			}
			switch {
			case l.Problem != "":
				run.failed(l, errors.New(l.Problem))
				return nil
			case !r.Selects(l):
				run.count(func(done *Replayed) { done.Skipped++ })
				return nil
			}
			if err := limit.Wait(gctx); err != nil {
				return err
			}
			select {
			case letters <- l:
				return nil
			case <-gctx.Done():
				return gctx.Err()
			}
		})
	})
	for range 16 {
		g.Go(func() error {
			for l := range letters {
				if err := run.again(gctx, l); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err = g.Wait()
	return run.count(nil), err
}

// replaying is one run of Replay.
type replaying struct {
	*Box
	Replay
	publisher *publisher.Publisher

	mu        sync.Mutex
	done      Replayed
	published map[string]classify.Class // ids, and what their requests died of the last time
}

func (r *replaying) count(change func(*Replayed)) Replayed {
	r.mu.Lock()
	defer r.mu.Unlock()
	if change != nil {
		change(&r.done)
	}
	return r.done
}

func (r *replaying) failed(l Letter, err error) {
	r.count(func(done *Replayed) {
		done.Failed++
		if r.Replay.Failed != nil {
			r.Replay.Failed(l, err)
		}
	})
}

// stuck is an error if too much comes back.
func (r *replaying) stuck() error {
	done := r.count(nil)
	if r.KeepGoing || done.CameBack < cameBackAtLeast || float64(done.CameBack) < cameBackPart*float64(done.Done) {
		return nil
	}
	return fmt.Errorf("%w: %d of %d replayed so far; put right what they fail of, or insist with --keep-going", ErrCameBack, done.CameBack, done.Done)
}

// errTaken means that the id of a replay belongs to another request.
var errTaken = errors.New("another request has the id under which it would be replayed; drop that letter, or publish its request under a new id")

// again publishes one request and then deletes its letter. Its error concerns the whole run.
func (r *replaying) again(ctx context.Context, l Letter) error {
	request := publisher.ReplayOf(l.RequestID, l.Replays+1, l.Creator, l.Operation, l.Header, l.Payload)
	r.mu.Lock()
	r.published[request.ID] = l.Class
	r.mu.Unlock()
	err := r.publishOnce(ctx, request)
	if err == nil {
		err = r.Drop(ctx, l)
	}
	switch {
	case err == nil:
		if done := r.count(func(done *Replayed) { done.Done++ }); r.Progress != nil {
			r.Progress(done)
		}
		return nil
	case errors.Is(err, publisher.ErrInvalid), errors.Is(err, errTaken), broker.TroubleOf(err) == broker.Never:
		r.failed(l, err)
		return nil
	}
	return err
}

// retries is how often a replay is tried again that the server does not answer.
const retries = 3

func (r *replaying) publishOnce(ctx context.Context, request publisher.Request) error {
	for try := 0; ; try++ {
		ack, err := r.publisher.Publish(ctx, request)
		switch {
		case err == nil && ack.Duplicate:
			return r.isReplay(ctx, request, ack.Sequence)
		case err == nil:
			return nil
		case errors.Is(err, publisher.ErrFull):
			// As many of this creator wait as may; the letter is safe where it is.
			try = 0
		case errors.Is(err, publisher.ErrInvalid), broker.TroubleOf(err) == broker.Never, try == retries:
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// isReplay looks at what the stream had already under a replay's id: the letter may be deleted
// only if that is this replay, by another run of it or by one that was interrupted. Any client
// can publish under any id.
func (r *replaying) isReplay(ctx context.Context, request publisher.Request, seq uint64) error {
	reader := broker.NewReader(r.js)
	m, err := reader.At(ctx, r.ns.Stream(publisher.Requests), seq)
	if err != nil {
		return err
	}
	if m != nil {
		creator, operation, err := r.ns.ParseStored(m.Subject)
		if err != nil || creator != request.Creator || operation != request.Operation || !bytes.Equal(m.Data, request.Payload) {
			return errTaken
		}
		return nil
	}
	// It was settled in the meantime: its outcome is in its place, or its letter was dropped.
	o, err := r.publisher.Outcome(ctx, request.Creator, request.Operation, request.ID)
	if err == nil && o.Kind != publisher.Answered && o.Kind != publisher.Dead {
		err = errTaken
	}
	return err
}

// watchReturns counts requests of this run that become dead letters of the class that they had,
// until stop.
func (r *replaying) watchReturns(ctx context.Context) (stop func(), err error) {
	subject, err := r.subject(r.Filter)
	if err != nil {
		return nil, err
	}
	c, err := r.stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{subject}, HeadersOnly: true, DeliverPolicy: jetstream.DeliverNewPolicy,
	})
	if err != nil {
		return nil, fmt.Errorf("watch the DLQ: %w", err)
	}
	consuming, err := c.Consume(func(m jetstream.Msg) {
		r.mu.Lock()
		defer r.mu.Unlock()
		h := m.Headers()
		if class, ours := r.published[h.Get(publisher.DlqMsgID)]; ours && string(class) == h.Get(publisher.DlqClass) {
			r.done.CameBack++
		}
	})
	if err != nil {
		return nil, fmt.Errorf("watch the DLQ: %w", err)
	}
	return consuming.Stop, nil
}
