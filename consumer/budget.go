package consumer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/resilience"
)

// budget leases tokens of the account's limit, which all workers share: its
// state is one key of BUDGETS, and a lease of any number of tokens one
// compare-and-set. If NATS cannot be reached nothing is leased and nobody
// calls, and a restart finds the state where it was.
type budget struct {
	kv     jetstream.KeyValue
	rate   resilience.Rate
	log    zerolog.Logger
	wanted chan struct{} // somebody waits for a token

	// As last seen. Whoever is behind fails to write and reads again.
	revision uint64
	tat      time.Time
}

// budgetAccount is the key of the account's limit.
const budgetAccount = "account"

// clockSkew is the difference between the clocks of two workers that is worth
// a word.
const clockSkew = time.Second

// storedBudget is a limit's state. Rate and burst are those under which it was
// written.
type storedBudget struct {
	TAT   time.Time `json:"tat"`
	Rate  float64   `json:"rate"` // calls a second
	Burst int       `json:"burst"`
}

func (b *budget) want() {
	select {
	case b.wanted <- struct{}{}:
	default:
	}
}

// lease takes up to n tokens, to be used before until. If there are none it says when there
// will be.
func (b *budget) lease(ctx context.Context, n int) (granted int, until, next time.Time, err error) {
	for ctx.Err() == nil {
		now := time.Now()
		granted, tat, next := b.rate.Lease(b.tat, now, n)
		if granted == 0 {
			return 0, time.Time{}, next, nil
		}
		value, err := json.Marshal(storedBudget{tat.UTC().Round(0), b.rate.PerSecond, b.rate.Burst})
		if err != nil {
			return 0, time.Time{}, time.Time{}, fmt.Errorf("encode budget: %w", err)
		}
		var revision uint64
		if b.revision == 0 {
			revision, err = b.kv.Create(ctx, budgetAccount, value)
		} else {
			revision, err = b.kv.Update(ctx, budgetAccount, value, b.revision)
		}
		switch {
		case err == nil:
			b.revision, b.tat = revision, tat
			return granted, now.Add(b.rate.LeaseLife()), time.Time{}, nil
		case writtenBetween(err):
			if err := b.read(ctx); err != nil {
				return 0, time.Time{}, time.Time{}, err
			}
		default:
			return 0, time.Time{}, time.Time{}, fmt.Errorf("lease calls of the account's limit: %w", err)
		}
	}
	return 0, time.Time{}, time.Time{}, ctx.Err()
}

func (b *budget) read(ctx context.Context) error {
	entry, err := b.kv.Get(ctx, budgetAccount)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		b.revision = 0
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the account's budget: %w", err)
	}
	b.revision = entry.Revision()
	full := time.Duration(float64(b.rate.Burst) / b.rate.PerSecond * float64(time.Second))
	empty := time.Now().Add(full)
	var s storedBudget
	if err := json.Unmarshal(entry.Value(), &s); err != nil || s.Rate != b.rate.PerSecond || s.Burst != b.rate.Burst {
		// Written by hand, or under another limit: begin without a burst.
		b.tat = empty
		return nil
	}
	b.tat = s.TAT
	if ahead := s.TAT.Sub(empty); ahead > clockSkew {
		b.log.Warn().Dur("ahead_ms", ahead).Msg("the clocks of two workers differ; the account's limit is used less than it could be")
	}
	return nil
}

// fund keeps the gates in tokens of the account's limit, as long as creators wait for
// some.
func (w *Worker) fund(ctx context.Context) {
	line := &w.lines[2]
	trouble := resilience.Backoff{Base: 100 * time.Millisecond, Max: 5 * time.Second}
	failed := 0
	for {
		n := min(line.wanted(), max(1, w.cfg.Gates.Account.Burst/w.members.count()))
		if n == 0 {
			select {
			case <-ctx.Done():
				return
			case <-w.budget.wanted:
				continue
			}
		}
		leaseCtx, cancel := context.WithTimeout(ctx, w.cfg.StoreTimeout)
		granted, until, next, err := w.budget.lease(leaseCtx, n)
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			if failed++; failed == 1 {
				w.log.Error().Err(err).Msg("nobody is called: the account's limit cannot be shared with other workers; trying again")
			}
			sleep(ctx, trouble.Delay(failed, 0))
		case granted == 0:
			failed = 0
			sleep(ctx, time.Until(next))
		default:
			failed = 0
			w.gates.Fund(granted, until)
			w.feed()
		}
	}
}
