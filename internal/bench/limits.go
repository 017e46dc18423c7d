package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"

	"github.com/headgate-io/headgate/consumer"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// Limits says what is limited, and how much there is to do.
type Limits struct {
	Requests int           // of one creator
	Creator  float64       // its calls a second
	Burst    int           // at once
	Creators int           // that share the account's limit
	Account  float64       // their calls a second, together
	AccBurst int           // at once
	Seconds  float64       // of work for the account
	Workers  int           // that share it
	Latency  time.Duration // of the API
}

// DefaultLimits takes about a minute and a half.
func DefaultLimits() Limits {
	return Limits{Requests: 3000, Creator: 50, Burst: 90, Creators: 50, Account: 500, AccBurst: 50, Seconds: 30, Workers: 4, Latency: 20 * time.Millisecond}
}

// limitFigures are one limit's, as the API counts it.
type limitFigures struct {
	Limit      string  `json:"limit"`
	Rate       float64 `json:"per_s"`
	Burst      int     `json:"burst"`
	Calls      int     `json:"calls"`
	Over       int     `json:"calls_over_the_limit"`   // must be 0
	Least      int     `json:"least_in_10s,omitempty"` // after the burst
	Most       int     `json:"most_in_10s,omitempty"`
	Used       float64 `json:"used"` // of what the limit allows
	Deliveries float64 `json:"deliveries_per_request"`
}

// Limits measures how exactly limits are kept, and how much of them is used, by what
// arrives at the API.
func (b *Bench) Limits(ctx context.Context, o Limits) error {
	creator, err := b.limited(ctx, "creator", o, 1, 1, o.Requests, resilience.Rate{PerSecond: o.Creator, Burst: o.Burst}, func(c *consumer.Config, r resilience.Rate) {
		c.Gates.Creator = resilience.Limits{Rate: r, Concurrency: 10}
	})
	if err != nil {
		return err
	}
	each := int(o.Seconds * o.Account / float64(o.Creators))
	account, err := b.limited(ctx, "account", o, o.Workers, o.Creators, each, resilience.Rate{PerSecond: o.Account, Burst: o.AccBurst}, func(c *consumer.Config, r resilience.Rate) {
		c.Gates.Account = r
	})
	if err != nil {
		return err
	}
	t := table.NewWriter()
	t.SetStyle(table.StyleLight)
	t.AppendHeader(table.Row{"limit", "calls", "over the limit", "in any 10 s", "used", "deliveries a request"})
	for _, f := range []limitFigures{creator, account} {
		t.AppendRow(table.Row{
			fmt.Sprintf("%s: %v/s, burst %d", f.Limit, f.Rate, f.Burst), f.Calls, f.Over,
			fmt.Sprintf("%d to %d", f.Least, f.Most), fmt.Sprintf("%.1f %%", 100*f.Used), fmt.Sprintf("%.2f", f.Deliveries),
		})
	}
	fmt.Fprintln(b.Out, t.Render())
	return b.print(map[string]any{"bench": "limits", "options": o, "limits": []limitFigures{creator, account}})
}

func (b *Bench) limited(ctx context.Context, name string, o Limits, workers, creators, each int, limit resilience.Rate, set func(*consumer.Config, resilience.Rate)) (f limitFigures, err error) {
	var mu sync.Mutex
	var calls []time.Time
	s, err := b.stand(ctx, publisher.Topology{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		now := time.Now()
		mu.Lock()
		calls = append(calls, now)
		mu.Unlock()
		_, _ = io.Copy(io.Discard, r.Body)
		sleep(r.Context(), o.Latency)
		_, _ = io.WriteString(w, `{"ok":true}`)
	}))
	if err != nil {
		return f, err
	}
	defer s.close()
	var names []string
	for n := range creators {
		names = append(names, fmt.Sprintf("creator-%d", n))
	}
	if err := s.publish(names, func(string) int { return each }); err != nil {
		return f, err
	}
	var all []*consumer.Worker
	var stops []func() error
	for range workers {
		w, stop, err := s.work(ctx, 10*time.Second, func(c *consumer.Config) { set(c, limit) })
		if err != nil {
			return f, err
		}
		all, stops = append(all, w), append(stops, stop)
	}
	total := creators * each
	shown := time.Now()
	err = await(ctx, 2*time.Hour, "all requests", func() (bool, error) {
		done := 0
		for _, w := range all {
			done += int(w.Stats().Results)
		}
		if time.Since(shown) > 5*time.Second {
			shown = time.Now()
			fmt.Fprintf(b.Progress, "%s's limit: %d of %d\n", name, done, total)
		}
		return done >= total, nil
	})
	for _, stop := range stops {
		err = errors.Join(err, stop())
	}
	if err != nil {
		return f, err
	}
	deliveries := 0
	for n := range s.topology.Partitions {
		c, err := s.js.Consumer(ctx, "REQUESTS", publisher.ConsumerName(n))
		if err != nil {
			return f, err
		}
		deliveries += int(c.CachedInfo().Delivered.Consumer)
	}
	mu.Lock()
	defer mu.Unlock()
	f = judge(calls, limit)
	f.Limit, f.Deliveries = name, float64(deliveries)/float64(total)
	return f, nil
}

// judge counts what an API would: a bucket that fills at the rate and that each
// call empties by one. That is the same as looking at every window.
func judge(calls []time.Time, limit resilience.Rate) limitFigures {
	slices.SortFunc(calls, time.Time.Compare)
	f := limitFigures{Rate: limit.PerSecond, Burst: limit.Burst, Calls: len(calls), Least: len(calls)}
	level, last := float64(limit.Burst), calls[0]
	for _, at := range calls {
		level = min(float64(limit.Burst), level+at.Sub(last).Seconds()*limit.PerSecond) - 1
		last = at
		if level < 0 {
			f.Over++
			level = 0
		}
	}
	took := calls[len(calls)-1].Sub(calls[0])
	f.Used = float64(len(calls)) / (took.Seconds()*limit.PerSecond + float64(limit.Burst))
	for from := 5 * time.Second; from+10*time.Second < took; from += 250 * time.Millisecond {
		n := 0
		for _, at := range calls {
			if d := at.Sub(calls[0]); d >= from && d < from+10*time.Second {
				n++
			}
		}
		f.Least, f.Most = min(f.Least, n), max(f.Most, n)
	}
	return f
}
