package bench

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"

	"github.com/headgate-io/headgate/consumer"
	"github.com/headgate-io/headgate/publisher"
)

// Isolation sets the work of the healthy creators, and the trouble beside them.
type Isolation struct {
	Runs     int           // pairs, of which the median counts
	Creators int           // healthy ones
	Requests int           // theirs, together
	Trouble  int           // requests of each creator in trouble
	Latency  time.Duration // of the API
	Timeout  time.Duration // of a call
	Hanging  int           // creators that hang at once, in the last scenario
}

// DefaultIsolation is one creator in trouble beside 999.
func DefaultIsolation() Isolation {
	return Isolation{Runs: 5, Creators: 999, Requests: 20_000, Trouble: 5_000, Latency: 20 * time.Millisecond, Timeout: 5 * time.Second, Hanging: 100}
}

// trouble is a way to misbehave.
type trouble struct {
	name    string
	retry   time.Duration // window in which no call may come
	answer  func(w http.ResponseWriter, r *http.Request)
	several bool    // Hanging creators instead of one
	bound   float64 // of the healthy ones' time, as a multiple of that without trouble
}

func troubles() []trouble {
	answer := func(status int, retryAfter, body string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) {
			if retryAfter != "" {
				w.Header().Set("Retry-After", retryAfter)
			}
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		}
	}
	hang := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	return []trouble{
		{name: "429, Retry-After 30 s", retry: 30 * time.Second, bound: 1.1, answer: answer(429, "30", `{"type":"RATE_LIMIT_EXCEEDED"}`)},
		{name: "hangs until the timeout", bound: 1.1, answer: hang},
		{name: "503, Retry-After a year", retry: 24 * time.Hour, bound: 1.1, answer: answer(503, "31536000", "")},
		{name: "session expired", retry: 24 * time.Hour, bound: 1.1, answer: answer(401, "", `{"type":"SESSION_EXPIRED","actionRequired":"relink_connection"}`)},
		{name: "many hang", bound: 1.5, answer: hang, several: true},
	}
}

// isolationFigures are one scenario's.
type isolationFigures struct {
	Scenario   string  `json:"scenario"`
	Creators   int     `json:"creators_in_trouble"`
	Without    float64 `json:"without_s"` // medians
	With       float64 `json:"with_s"`
	Ratio      float64 `json:"ratio"` // median of the pairs'
	Bound      float64 `json:"bound"`
	Calls      int     `json:"calls_in_trouble"` // the most a creator got in a run
	PerWindow  int     `json:"most_calls_in_a_window"`
	WindowSecs float64 `json:"window_s,omitempty"`
	Held       bool    `json:"held"`
}

// Isolation measures what creators in trouble cost the others: the time in which the
// healthy ones are done, with and without them, in turn.
func (b *Bench) Isolation(ctx context.Context, o Isolation) error {
	t := table.NewWriter()
	t.SetStyle(table.StyleLight)
	t.AppendHeader(table.Row{"beside " + fmt.Sprint(o.Creators) + " healthy creators", "without", "with", "ratio", "bound", "its calls in a window"})
	var all []isolationFigures
	for _, tr := range troubles() {
		f := isolationFigures{Scenario: tr.name, Bound: tr.bound, Creators: 1, WindowSecs: tr.retry.Seconds()}
		if tr.several {
			f.Creators = o.Hanging
		}
		var without, with, ratios []float64
		for n := range o.Runs {
			alone, _, err := b.isolated(ctx, o, tr, 0)
			if err != nil {
				return err
			}
			beside, calls, err := b.isolated(ctx, o, tr, f.Creators)
			if err != nil {
				return err
			}
			without, with = append(without, alone.Seconds()), append(with, beside.Seconds())
			ratios = append(ratios, beside.Seconds()/alone.Seconds())
			f.Calls = max(f.Calls, calls.total)
			f.PerWindow = max(f.PerWindow, calls.perWindow)
			fmt.Fprintf(b.Progress, "%s, pair %d of %d: %.2f s without, %.2f s with\n", tr.name, n+1, o.Runs, alone.Seconds(), beside.Seconds())
		}
		f.Without, f.With, f.Ratio = median(without), median(with), median(ratios)
		f.Held = f.Ratio <= f.Bound
		all = append(all, f)
		window := "-"
		if tr.retry > 0 {
			window = fmt.Sprint(f.PerWindow)
		}
		t.AppendRow(table.Row{fmt.Sprintf("%s (%d)", tr.name, f.Creators), fmt.Sprintf("%.2f s", f.Without), fmt.Sprintf("%.2f s", f.With), fmt.Sprintf("%.3f", f.Ratio), fmt.Sprint(f.Bound), window})
	}
	fmt.Fprintln(b.Out, t.Render())
	return b.print(map[string]any{"bench": "isolation", "options": o, "scenarios": all})
}

type troubleCalls struct{ total, perWindow int }

// isolated is one run: how long the healthy creators took.
func (b *Bench) isolated(ctx context.Context, o Isolation, tr trouble, inTrouble int) (took time.Duration, calls troubleCalls, err error) {
	var healthy atomic.Int64
	var mu sync.Mutex
	seen := map[string][]time.Time{}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := r.Header.Get(creatorHeader)
		if name[0] == 't' {
			mu.Lock()
			seen[name] = append(seen[name], time.Now())
			mu.Unlock()
			_, _ = io.Copy(io.Discard, r.Body)
			tr.answer(w, r)
			return
		}
		if sleep(r.Context(), o.Latency) {
			_, _ = io.WriteString(w, `{"ok":true}`)
			healthy.Add(1)
		}
	})
	s, err := b.stand(ctx, publisher.Topology{}, handler)
	if err != nil {
		return 0, calls, err
	}
	defer s.close()
	creators := make([]string, 0, o.Creators+inTrouble)
	for n := range o.Creators {
		creators = append(creators, fmt.Sprintf("healthy-%d", n))
	}
	for n := range inTrouble {
		creators = append(creators, fmt.Sprintf("trouble-%d", n))
	}
	trouble := o.Trouble / max(inTrouble, 1)
	each := o.Requests / o.Creators
	err = s.publish(creators, func(name string) int {
		if name[0] == 't' {
			return max(trouble, each)
		}
		return each
	})
	if err != nil {
		return 0, calls, err
	}
	want := int64(each * o.Creators)
	began := time.Now()
	_, stop, err := s.work(ctx, o.Timeout, func(c *consumer.Config) { c.Grace = 0 })
	if err != nil {
		return 0, calls, err
	}
	err = await(ctx, 5*time.Minute, "the healthy creators' requests", func() (bool, error) { return healthy.Load() >= want, nil })
	took = time.Since(began)
	if stopErr := stop(); err == nil {
		err = stopErr
	}
	mu.Lock()
	defer mu.Unlock()
	for _, times := range seen {
		calls.total = max(calls.total, len(times))
		for i := range times {
			n := 0
			for _, at := range times[i:] {
				if at.Sub(times[i]) < tr.retry {
					n++
				}
			}
			calls.perWindow = max(calls.perWindow, n)
		}
	}
	return took, calls, err
}

func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return true
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
