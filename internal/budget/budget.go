// Package budget shares the account's rate limit between workers.
//
// They share one key of BUDGETS: the state of a generic cell rate algorithm (see
// [resilience.Rate.Lease]). A worker takes calls for the near future out of it
// with one compare-and-set, as many as it will need until it comes again, so
// that calls neither wait for NATS nor cost a write each. Each call has its own
// time, so nothing depends on how fast NATS answers: a slow NATS means that
// workers lease for longer, never that the API sees a call too many. While NATS
// cannot be reached nothing is leased and nothing is called, and a restart finds
// the state where it was.
package budget

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/internal/mutant"
	"github.com/headgate-io/headgate/resilience"
)

const (
	// span is for how long a worker leases at once, and at least spanPauses of the
	// pauses between two workers' leases. spanTrips round trips to NATS are added, because one
	// write has to come through in that time.
	span       = 100 * time.Millisecond
	spanPauses = 80
	spanTrips  = 3
	longest    = 10 * time.Second

	// lookAgain is after how long the state is read again, however long there is
	// nothing to be had: it may have been repaired.
	lookAgain = 5 * time.Second

	// timeout of one request to NATS.
	timeout = 5 * time.Second
)

// Store is the part of BUDGETS' [jetstream.KeyValue] that is needed.
type Store interface {
	Get(ctx context.Context, key string) (jetstream.KeyValueEntry, error)
	Create(ctx context.Context, key string, value []byte, opts ...jetstream.KVCreateOpt) (uint64, error)
	Update(ctx context.Context, key string, value []byte, revision uint64) (uint64, error)
	Put(ctx context.Context, key string, value []byte) (uint64, error)
}

// Client is the worker that makes the calls.
type Client interface {
	// Wanted is the number of calls that only the account's limit keeps.
	Wanted() int
	// Workers is the number of live workers, this one included.
	Workers() int
	// Wake is called when the gates have a token that may be used now.
	Wake()
}

// Budget leases tokens for a worker's gates. All methods but Run may be called at
// any time.
type Budget struct {
	store Store
	rate  resilience.Rate
	gates *resilience.Gates
	log   zerolog.Logger

	wanted chan struct{} // for the goroutine that leases
	tokens chan struct{} // for the one that wakes

	mu      sync.Mutex
	trouble error

	// The rest belongs to the goroutine that leases.
	state
	pace  pace
	usage usage
}

// New makes a Budget of the account's limit, whose tokens go to gates.
func New(store Store, rate resilience.Rate, gates *resilience.Gates, log zerolog.Logger) *Budget {
	return &Budget{
		store: store, rate: rate, gates: gates, log: log,
		wanted: make(chan struct{}, 1), tokens: make(chan struct{}, 1),
	}
}

// Want says that a call waits for a token.
func (b *Budget) Want() {
	signal(b.wanted)
	signal(b.tokens)
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Trouble says why no tokens come although the limit is not used up, nil if it
// is or if they do come.
func (b *Budget) Trouble() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.trouble
}

func (b *Budget) setTrouble(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil && b.trouble == nil {
		b.log.Error().Err(err).Msg("no calls: the account's limit cannot be shared with other workers; trying again")
	}
	b.trouble = err
}

// Run keeps the gates in tokens as long as calls wait for some, until ctx ends.
func (b *Budget) Run(ctx context.Context, c Client) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { b.wake(ctx, c) })

	backoff := resilience.Backoff{Base: 100 * time.Millisecond, Max: lookAgain}
	failed := 0
	for ctx.Err() == nil {
		if c.Wanted() == 0 {
			wait(ctx, b.wanted, -1)
			continue
		}
		pause, err := b.lease(ctx, c)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			failed++
			b.setTrouble(err)
			wait(ctx, nil, backoff.Delay(failed, rand.Float64()))
		default:
			failed = 0
			if pause > 0 {
				wait(ctx, b.wanted, pause)
			}
		}
	}
}

// wait returns when c is signalled, d has passed (if it is not negative) or ctx has
// ended.
func wait(ctx context.Context, c <-chan struct{}, d time.Duration) {
	var over <-chan time.Time
	if d >= 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		over = t.C
	}
	select {
	case <-ctx.Done():
	case <-c:
	case <-over:
	}
}

// wake tells the client when a token's time has come.
func (b *Budget) wake(ctx context.Context, c Client) {
	for ctx.Err() == nil {
		now := time.Now()
		at, ok := b.gates.NextToken(now)
		if ok && at.After(now) {
			wait(ctx, b.tokens, at.Sub(now))
			if b.gates.Empty(time.Now()) {
				continue
			}
		} else if !ok {
			wait(ctx, b.tokens, -1)
			continue
		}
		c.Wake()
		if at, ok := b.gates.NextToken(time.Now()); ok && at.After(time.Now()) {
			continue
		}
		// Tokens are left, or there are none: both change with a signal only.
		wait(ctx, b.tokens, -1)
	}
}

// lease takes tokens if the gates run out of them. Otherwise it says after how
// long to ask again.
func (b *Budget) lease(ctx context.Context, c Client) (again time.Duration, err error) {
	for try := 0; ctx.Err() == nil; try++ {
		o, enough := b.order(c)
		if enough {
			return o.span / 4, nil
		}
		if o.workers > 1 && b.pace.due(time.Now()) {
			if err := b.sharePace(ctx); err != nil {
				return 0, err
			}
		}
		// Another worker has probably written, and to learn so by trying takes longer.
		if !b.known || o.workers > 1 || time.Since(b.read) > lookAgain {
			if err := b.look(ctx, o); err != nil {
				return 0, err
			}
		}
		again, written, err := b.take(ctx, o)
		if err != nil || written || again > 0 {
			return again, err
		}
		if try > 0 {
			wait(ctx, nil, time.Duration(rand.Float64()*float64(b.pace.trip)/2))
		}
	}
	return 0, ctx.Err()
}

// order is what a worker needs at a moment.
type order struct {
	n, atOnce int
	workers   int
	span      time.Duration // that a lease is for
}

// order reports whether the gates have tokens enough for now.
func (b *Budget) order(c Client) (o order, enough bool) {
	now := time.Now()
	o.workers = max(1, c.Workers())
	o.span = b.pace.span(b.rate)
	lot := int((o.span-1)/b.rate.Interval()) + 1
	left, used := b.gates.Tokens(now)
	// Calls that wait now, and those that will wait once these have gone.
	wanted := c.Wanted()
	need := wanted + b.usage.recent(now, used, o.span*time.Duration(3*o.workers)/2) - left
	share := (b.rate.Burst + o.workers - 1) / o.workers
	o.n = min(need, lot)
	o.atOnce = min(need, wanted, share)
	return o, o.n < 1 || left > lot/2
}

// take writes a lease and gives its tokens to the gates. Nothing is written
// where another worker was faster, and where the tokens are far away: then
// again is after how long to look again.
func (b *Budget) take(ctx context.Context, o order) (again time.Duration, written bool, err error) {
	began := time.Now()
	arrives := began.Add(b.pace.reckoned())
	tokens, tat, pause := b.rate.Lease(b.tat, arrives, b.state.pause, o.atOnce, o.n)
	if far := tokens[0].From.Sub(arrives) - 2*o.span*time.Duration(o.workers); far > 0 {
		b.setTrouble(nil)
		b.known = false
		return min(far+b.turn(o), lookAgain), false, nil
	}
	switch written, err = b.write(ctx, tat); {
	case err != nil || !written:
		return 0, false, err
	}
	b.tat, b.state.pause = tat, pause
	now := time.Now()
	reckoned := b.pace.reckoned()
	b.pace.measure(now.Sub(began))
	b.gates.AddTokens(now, tokens...)
	if mutant.On(mutant.TokensTwice) {
		b.gates.AddTokens(now, tokens...)
	}
	signal(b.tokens)
	if left, _ := b.gates.Tokens(now); left == 0 {
		b.setTrouble(fmt.Errorf("NATS answers in %v, slower than the %v that were reckoned with: tokens come too late",
			now.Sub(began).Round(time.Millisecond), reckoned.Round(time.Millisecond)))
		return 0, true, nil
	}
	b.setTrouble(nil)
	return 0, true, nil
}

// turn is how much longer a worker waits for tokens that all of them wait for, so
// that the one that has waited longest comes first, and not always the nearest.
func (b *Budget) turn(o order) time.Duration {
	if b.mine == 0 {
		return 0
	}
	ahead := max(0, o.workers-1-int(min(b.revision-b.mine, uint64(o.workers))))
	return time.Duration(ahead) * (2*max(b.pace.trip, b.pace.slowest) + 20*time.Millisecond)
}

// writtenBetween reports that another worker was faster.
func writtenBetween(err error) bool {
	const inFlight = 10164 // a clustered stream has another write to the same subject in flight
	var api *jetstream.APIError
	return errors.Is(err, jetstream.ErrKeyExists) ||
		errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == inFlight)
}
