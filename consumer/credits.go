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
	"github.com/headgate-io/headgate/internal/broker"
	"github.com/headgate-io/headgate/internal/control"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// Credits is what calls may cost in a day (UTC), over all workers, where the API
// says what they cost.
type Credits struct {
	PerDay float64 // 0: no limit; they are counted all the same
	// Hold holds the account when they are used up, until the day ends, or an operator
	// releases it: then the day goes on without another hold.
	Hold bool
}

const (
	// creditsEvery is how often a worker adds what its calls cost to the fleet's count.
	creditsEvery = 2 * time.Second

	// creditsWarn is the share of the day's credits at which an event is published.
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
	today   storedCredits      // of the fleet, as last seen
	day     string
	told    int // percent
}

// storedCredits is a day's count.
type storedCredits struct {
	Spent float64 `json:"spent"`
	// Held: the account was held for it.
	Held bool `json:"held,omitempty"`
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

// of is what the fleet has spent on the day, as last seen.
func (c *credits) of(now time.Time) storedCredits {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.day != dayOf(now) {
		return storedCredits{}
	}
	return c.today
}

// flush adds what is pending to the fleet's count and returns that of today.
func (c *credits) flush(ctx context.Context, now time.Time) (storedCredits, error) {
	c.mu.Lock()
	pending := c.pending
	c.pending = nil
	c.mu.Unlock()
	for day, cost := range pending {
		total, err := c.count(ctx, day, storedCredits{Spent: cost})
		if err != nil {
			c.mu.Lock()
			if c.pending == nil {
				c.pending = map[string]float64{}
			}
			for day, cost := range pending {
				c.pending[day] += cost
			}
			c.mu.Unlock()
			return storedCredits{}, err
		}
		delete(pending, day)
		c.saw(day, total, now)
	}
	return c.of(now), nil
}

func (c *credits) saw(day string, total storedCredits, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if day == dayOf(now) {
		c.day, c.today = day, total
	}
}

// count adds to a day by compare-and-set.
func (c *credits) count(ctx context.Context, day string, more storedCredits) (storedCredits, error) {
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
			return s, fmt.Errorf("count credits: %w", err)
		}
		s.Spent, s.Held = s.Spent+more.Spent, s.Held || more.Held
		value, err := json.Marshal(s)
		if err != nil {
			return s, fmt.Errorf("count credits: %w", err)
		}
		if revision == 0 {
			_, err = c.kv.Create(ctx, budgetCredits+day, value)
		} else {
			_, err = c.kv.Update(ctx, budgetCredits+day, value, revision)
		}
		switch {
		case err == nil:
			return s, nil
		case broker.TroubleOf(err) == broker.WrittenBetween && ctx.Err() == nil:
		default:
			return s, fmt.Errorf("count credits: %w", err)
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
			today, err := w.credits.flush(short, now)
			if err == nil {
				err = w.weigh(short, today, now)
			}
			cancel()
			if err != nil && ctx.Err() == nil {
				w.log.Warn().Err(err).Msg("what calls cost is counted later")
			}
		}
	}
}

// weigh tells of thresholds and holds the account when the day's credits are used up.
func (w *Worker) weigh(ctx context.Context, today storedCredits, now time.Time) error {
	c := w.credits
	if c.cfg.PerDay <= 0 || today.Spent <= 0 {
		return nil
	}
	percent := 0
	switch part := 100 * today.Spent / c.cfg.PerDay; {
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
		w.log.Warn().Float64("spent", today.Spent).Float64("per_day", c.cfg.PerDay).Int("percent", percent).Msg("credits of the day are used")
		w.events.send(publisher.Event{
			Kind: publisher.CreditsThreshold, Percent: percent, Once: fmt.Sprintf("%s:%d", day, percent),
			Reason: fmt.Sprintf("%.0f of %.0f credits of %s are used", today.Spent, c.cfg.PerDay, day),
		})
	}
	if percent < 100 || !c.cfg.Hold || today.Held {
		return nil
	}
	h := resilience.Hold{
		Since: now, Until: now.UTC().Truncate(24 * time.Hour).Add(24 * time.Hour), Class: classify.QuotaExceeded, Who: w.cfg.Name,
		Reason: fmt.Sprintf("the credits of %s are used up (limits.credits_per_day)", day),
	}
	if w.shared.gates.HoldAccount(resilience.ByAPI, h) { // otherwise it is held for as long already
		if err := w.holds.Put(ctx, control.Target{Kind: control.Account}, h); err != nil {
			w.log.Error().Err(err).Msg("the account's hold is known to this worker only, until it can be stored; trying again")
		}
		w.events.send(publisher.Event{Kind: publisher.AccountHeld, Class: h.Class, Reason: h.Reason, Until: until(h.Until), Once: h.Until.Format(time.RFC3339)})
	}
	total, err := c.count(ctx, day, storedCredits{Held: true})
	if err == nil {
		c.saw(day, total, now)
	}
	return err
}
