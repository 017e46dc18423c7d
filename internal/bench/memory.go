package bench

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"

	"github.com/headgate-io/headgate/consumer"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// Memory says how many creators are active and how large a backlog is.
type Memory struct {
	Creators int // active at once
	Backlog  int // requests of a held creator
	Others   int // requests of others behind them, in the same partition
	Idle     int // seconds for which the server is watched while they wait
}

// DefaultMemory is 100,000 creators, then 200,000 waiting requests.
func DefaultMemory() Memory {
	return Memory{Creators: 100_000, Backlog: 200_000, Others: 1000, Idle: 15}
}

type memoryFigures struct {
	Creators       int     `json:"creators"`
	PerCreator     float64 `json:"bytes_per_creator"` // of the worker's heap
	Backlog        int     `json:"backlog"`
	OthersSecs     float64 `json:"others_done_s"`
	AsideSecs      float64 `json:"set_aside_s"`
	ServerMB       float64 `json:"server_mb"`
	ServerMBBefore float64 `json:"server_mb_before"`
	ServerIdle     float64 `json:"server_idle_cpu_percent"` // of a core, while they wait
	WorkerIdle     float64 `json:"worker_heap_mb"`
	FirstSecs      float64 `json:"first_call_after_release_s"`
	AllSecs        float64 `json:"all_done_after_release_s"`
	Missing        int     `json:"missing"`
	Doubled        int     `json:"called_twice"`
}

// Memory measures what active creators and waiting requests cost.
func (b *Bench) Memory(ctx context.Context, o Memory) error {
	f := memoryFigures{Creators: o.Creators, Backlog: o.Backlog}
	if err := b.perCreator(ctx, o, &f); err != nil {
		return err
	}
	if err := b.backlog(ctx, o, &f); err != nil {
		return err
	}
	t := table.NewWriter()
	t.SetStyle(table.StyleLight)
	t.AppendRow(table.Row{fmt.Sprintf("worker's heap for each of %d active creators", f.Creators), fmt.Sprintf("%.0f bytes", f.PerCreator)})
	t.AppendSeparator()
	t.AppendRow(table.Row{fmt.Sprintf("%d requests of others, behind %d of a held creator: done after", o.Others, f.Backlog), fmt.Sprintf("%.1f s", f.OthersSecs)})
	t.AppendRow(table.Row{"all of the held creator's set aside after", fmt.Sprintf("%.1f s", f.AsideSecs)})
	t.AppendRow(table.Row{"server's memory, before and with them waiting", fmt.Sprintf("%.0f MB, %.0f MB", f.ServerMBBefore, f.ServerMB)})
	t.AppendRow(table.Row{"server's CPU while they wait", fmt.Sprintf("%.1f %% of a core", f.ServerIdle)})
	t.AppendRow(table.Row{"worker's heap while they wait", fmt.Sprintf("%.0f MB", f.WorkerIdle)})
	t.AppendRow(table.Row{"first call after the release", fmt.Sprintf("%.2f s", f.FirstSecs)})
	t.AppendRow(table.Row{"all called after the release", fmt.Sprintf("%.1f s", f.AllSecs)})
	t.AppendRow(table.Row{"missing, called twice", fmt.Sprintf("%d, %d", f.Missing, f.Doubled)})
	fmt.Fprintln(b.Out, t.Render())
	return b.print(map[string]any{"bench": "memory", "figures": f})
}

// perCreator measures the heap with every creator's gate remembering something.
func (b *Bench) perCreator(ctx context.Context, o Memory, f *memoryFigures) error {
	s, err := b.stand(ctx, publisher.Topology{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, `{"ok":true}`)
	}))
	if err != nil {
		return err
	}
	defer s.close()
	w, stop, err := s.work(ctx, 10*time.Second, func(c *consumer.Config) {
		// One call an hour: no bucket is full again, so no gate is forgotten.
		c.Gates.Creator.Rate = resilience.Rate{PerSecond: 1.0 / 3600, Burst: 90}
		c.Gates.InFlight = 256
	})
	if err != nil {
		return err
	}
	call := func(from, to int) error {
		var names []string
		for n := from; n < to; n++ {
			names = append(names, fmt.Sprintf("creator-%07d", n))
		}
		before := w.Stats().Results
		if err := s.publish(names, func(string) int { return 1 }); err != nil {
			return err
		}
		return await(ctx, 10*time.Minute, "all requests", func() (bool, error) {
			return w.Stats().Results-before >= int64(to-from), nil
		})
	}
	warm := o.Creators / 10
	if err := call(0, warm); err != nil {
		return err
	}
	before := heap()
	fmt.Fprintf(b.Progress, "calling for %d creators\n", o.Creators)
	if err := call(warm, warm+o.Creators); err != nil {
		return err
	}
	f.PerCreator = float64(int64(heap())-int64(before)) / float64(o.Creators)
	return stop()
}

// heap is what is in use after a collection.
func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// backlog measures one held creator's requests in front of those of others.
func (b *Bench) backlog(ctx context.Context, o Memory, f *memoryFigures) error {
	var others atomic.Int64
	var mu sync.Mutex
	calls := map[string]int{}
	var first time.Time
	s, err := b.stand(ctx, publisher.Topology{Partitions: 1, BacklogPerSubject: int64(o.Backlog)}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.Header.Get(creatorHeader) == "held" {
			mu.Lock()
			if first.IsZero() {
				first = time.Now()
			}
			calls[r.Header.Get("Idempotency-Key")]++
			mu.Unlock()
		} else {
			others.Add(1)
		}
		_, _ = io.WriteString(w, `{"ok":true}`)
	}))
	if err != nil {
		return err
	}
	defer s.close()
	before, err := s.varz(ctx)
	if err != nil {
		return err
	}
	holds, err := s.js.KeyValue(ctx, "HOLDS")
	if err != nil {
		return err
	}
	if _, err := holds.PutString(ctx, "creator.held", "24h"); err != nil {
		return err
	}
	fmt.Fprintf(b.Progress, "publishing %d requests of a held creator, then %d of others\n", o.Backlog, o.Others)
	if err := s.publish([]string{"held"}, func(string) int { return o.Backlog }); err != nil {
		return err
	}
	var names []string
	for n := range 100 {
		names = append(names, fmt.Sprintf("other-%d", n))
	}
	if err := s.publish(names, func(string) int { return o.Others / len(names) }); err != nil {
		return err
	}

	began := time.Now()
	w, stop, err := s.work(ctx, 10*time.Second, nil)
	if err != nil {
		return err
	}
	want := int64(o.Others / len(names) * len(names))
	if err := await(ctx, 5*time.Minute, "the others' requests", func() (bool, error) { return others.Load() >= want, nil }); err != nil {
		return err
	}
	f.OthersSecs = time.Since(began).Seconds()
	consumer, err := s.js.Consumer(ctx, "REQUESTS", publisher.ConsumerName(0))
	if err != nil {
		return err
	}
	err = await(ctx, 5*time.Minute, "the held creator's requests to be set aside", func() (bool, error) {
		info, err := consumer.Info(ctx)
		return err == nil && info.NumPending == 0 && w.Working() == 0, err
	})
	if err != nil {
		return err
	}
	f.AsideSecs = time.Since(began).Seconds()
	f.WorkerIdle = float64(heap()) / 1e6
	fmt.Fprintf(b.Progress, "all are set aside; watching the server for %d s\n", o.Idle)
	var samples []float64
	for range o.Idle {
		sleep(ctx, time.Second)
		v, err := s.varz(ctx)
		if err != nil {
			return err
		}
		samples = append(samples, v.CPU)
		f.ServerMB = max(f.ServerMB, float64(v.Mem)/1e6)
	}
	f.ServerIdle, f.ServerMBBefore = mean(samples[len(samples)/4:]), float64(before.Mem)/1e6

	fmt.Fprintln(b.Progress, "releasing")
	released := time.Now()
	if err := holds.Delete(ctx, "creator.held"); err != nil {
		return err
	}
	limits, err := s.js.KeyValue(ctx, "LIMITS")
	if err != nil {
		return err
	}
	if _, err := limits.PutString(ctx, "creator.held", `{"concurrency":200}`); err != nil {
		return err
	}
	shown := time.Now()
	err = await(ctx, 20*time.Minute, "the released creator's requests", func() (bool, error) {
		done := int(w.Stats().Results) - int(want)
		if time.Since(shown) > 5*time.Second {
			shown = time.Now()
			fmt.Fprintf(b.Progress, "%d of %d\n", done, o.Backlog)
		}
		return done >= o.Backlog, nil
	})
	if err != nil {
		return err
	}
	f.AllSecs = time.Since(released).Seconds()
	if err := stop(); err != nil {
		return err
	}
	mu.Lock()
	defer mu.Unlock()
	f.FirstSecs = first.Sub(released).Seconds()
	f.Missing = o.Backlog - len(calls)
	for _, n := range calls {
		if n > 1 {
			f.Doubled++
		}
	}
	return nil
}

func mean(all []float64) float64 {
	sum := 0.0
	for _, x := range all {
		sum += x
	}
	return sum / float64(len(all))
}
