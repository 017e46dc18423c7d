package consumer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// Credits is what calls may cost in a day (UTC), over all workers, where the API
// says what they cost.
type Credits struct {
	PerDay float64 // 0: no limit; they are counted all the same
	// Hold holds the account when they are used up, until the day ends.
	Hold bool
}

const (
	// creditsEvery is how often a worker adds what its calls cost to the fleet's count.
	creditsEvery = 2 * time.Second

	// creditsWarn is the part of a day's credits of which somebody is told.
	creditsWarn = 80 // percent

	budgetCredits = "credits." // + the day, in BUDGETS
)

// credits counts them: in memory per call, in BUDGETS now and then.
type credits struct {
	kv  jetstream.KeyValue
	cfg Credits
	log zerolog.Logger

	mu      sync.Mutex
	pending map[string]float64 // by day, not yet in BUDGETS
	spent   float64            // of the fleet, today, as last seen
	day     string
	told    int // percent
}

// storedCredits is a day's count.
type storedCredits struct {
	Spent float64 `json:"spent"`
}

func dayOf(now time.Time) string { return now.UTC().Format(time.DateOnly) }

// add counts what a call cost.
func (c *credits) add(cost float64, now time.Time) {
	if cost <= 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pending == nil {
		c.pending = map[string]float64{}
	}
	c.pending[dayOf(now)] += cost
}

// today is what the fleet has spent, as last seen.
func (c *credits) today(now time.Time) float64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.day != dayOf(now) {
		return 0
	}
	return c.spent
}

// flush adds what is pending to the fleet's count and returns that of today.
func (c *credits) flush(ctx context.Context, now time.Time) (spent float64, err error) {
	c.mu.Lock()
	pending := c.pending
	c.pending = nil
	c.mu.Unlock()
	for day, cost := range pending {
		total, err := c.count(ctx, day, cost)
		if err != nil {
			c.mu.Lock()
			if c.pending == nil {
				c.pending = map[string]float64{}
			}
			for day, cost := range pending {
				c.pending[day] += cost
			}
			c.mu.Unlock()
			return 0, err
		}
		delete(pending, day)
		if day == dayOf(now) {
			c.mu.Lock()
			c.day, c.spent = day, total
			c.mu.Unlock()
		}
	}
	return c.today(now), nil
}

// count adds to a day by compare-and-set.
func (c *credits) count(ctx context.Context, day string, cost float64) (total float64, err error) {
	for {
		var s storedCredits
		var revision uint64
		entry, err := c.kv.Get(ctx, budgetCredits+day)
		switch {
		case err == nil:
			revision = entry.Revision()
			if err := json.Unmarshal(entry.Value(), &s); err != nil {
				c.log.Warn().Err(err).Str("key", entry.Key()).Msg("the count of credits cannot be read; it begins anew")
			}
		case !errors.Is(err, jetstream.ErrKeyNotFound):
			return 0, fmt.Errorf("count credits: %w", err)
		}
		s.Spent += cost
		value, err := json.Marshal(s)
		if err != nil {
			return 0, err
		}
		if revision == 0 {
			_, err = c.kv.Create(ctx, budgetCredits+day, value)
		} else {
			_, err = c.kv.Update(ctx, budgetCredits+day, value, revision)
		}
		switch {
		case err == nil:
			return s.Spent, nil
		case writtenBetween(err) && ctx.Err() == nil:
		default:
			return 0, fmt.Errorf("count credits: %w", err)
		}
	}
}

// spend keeps the count of credits until ctx ends, and says when much of them is used.
func (w *Worker) spend(ctx context.Context) {
	t := time.NewTicker(creditsEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), creditsEvery)
			_, _ = w.credits.flush(last, time.Now())
			cancel()
			return
		case now := <-t.C:
			short, cancel := context.WithTimeout(ctx, w.cfg.StoreTimeout)
			spent, err := w.credits.flush(short, now)
			if err != nil && ctx.Err() == nil {
				w.log.Warn().Err(err).Msg("what calls cost is counted later")
			} else {
				w.weigh(short, spent, now)
			}
			cancel()
		}
	}
}

// weigh tells of thresholds and holds the account when the day's credits are used up.
func (w *Worker) weigh(ctx context.Context, spent float64, now time.Time) {
	c := w.credits
	if c.cfg.PerDay <= 0 || spent <= 0 {
		return
	}
	percent := 0
	switch part := 100 * spent / c.cfg.PerDay; {
	case part >= 100:
		percent = 100
	case part >= creditsWarn:
		percent = creditsWarn
	}
	day := dayOf(now)
	c.mu.Lock()
	if c.told > 0 && c.day != day {
		c.told = 0
	}
	tell := percent > c.told
	c.told = max(c.told, percent)
	c.mu.Unlock()
	if tell {
		w.log.Warn().Float64("spent", spent).Float64("per_day", c.cfg.PerDay).Int("percent", percent).Msg("credits of the day are used")
		w.event(publisher.Event{
			Kind: publisher.CreditsThreshold, Percent: percent, Once: fmt.Sprintf("%s:%d", day, percent),
			Reason: fmt.Sprintf("%.0f of %.0f credits of %s are used", spent, c.cfg.PerDay, day),
		})
	}
	if percent < 100 || !c.cfg.Hold {
		return
	}
	h := resilience.Hold{
		Since: now, Until: now.UTC().Truncate(24 * time.Hour).Add(24 * time.Hour), Class: classify.QuotaExceeded, Who: w.cfg.Name,
		Reason: fmt.Sprintf("the credits of %s are used up (limits.credits_per_day)", day),
	}
	if !w.gates.HoldAccount(h) {
		return // as long already
	}
	w.holds.keep(holdAccount, h, 0)
	if err := w.holds.store(ctx, holdAccount, h); err != nil {
		w.log.Error().Err(err).Msg("the account's hold is known to this worker only, until it can be stored; trying again")
	}
	w.event(publisher.Event{Kind: publisher.AccountHeld, Class: h.Class, Reason: h.Reason, Until: until(h.Until), Once: h.Until.Format(time.RFC3339)})
}
