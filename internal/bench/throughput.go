package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/consumer"
	"github.com/headgate-io/headgate/internal/telemetry"
	"github.com/headgate-io/headgate/publisher"
)

// Throughput says what there is to do.
type Throughput struct {
	Runs       int
	Messages   int
	Creators   int
	Partitions int
	InFlight   int
	Latency    time.Duration // of the API
	Body       int           // bytes of the API's answer
	Added      bool          // measure the added latency, too
}

// DefaultThroughput takes about a minute.
func DefaultThroughput() Throughput {
	return Throughput{Runs: 5, Messages: 20_000, Creators: 1000, Partitions: 32, InFlight: 256, Body: 1024, Added: true}
}

// Job is what a process of its own does: one run of the worker or of the bare loop.
type Job struct {
	Kind       string // "headgate" or "bare"
	Server     string
	API        string
	Partitions int
	InFlight   int
	Messages   int64
}

// Usage is what a run took.
type Usage struct {
	Seconds  float64 `json:"seconds"`
	CPU      float64 `json:"cpu_s"`
	Mallocs  uint64  `json:"mallocs"`
	PeakRSS  float64 `json:"peak_rss_mb"`
	Messages int64   `json:"messages"`
}

// RunJob does a job and writes its usage.
func RunJob(ctx context.Context, j Job, out io.Writer) error {
	nc, err := nats.Connect(j.Server)
	if err != nil {
		return err
	}
	defer nc.Close()
	var work func() error
	if j.Kind == "bare" {
		b, err := newBare(nc, j.API, j.InFlight)
		if err != nil {
			return err
		}
		work = func() error { return b.run(ctx, j.Partitions, j.Messages) }
	} else {
		s := &stand{url: j.Server, baseURL: j.API, topology: publisher.Topology{Partitions: j.Partitions}.WithDefaults()}
		metrics := telemetry.NewMetrics()
		work = func() error {
			w, stop, err := s.work(ctx, 10*time.Second, func(c *consumer.Config) {
				c.Gates.InFlight = j.InFlight
				c.Observer = metrics
				// At defaults all protection is on; so is a log that somebody keeps.
				c.Log = zerolog.New(io.Discard).Level(zerolog.InfoLevel).With().Timestamp().Logger()
			})
			if err != nil {
				return err
			}
			for w.Stats().Results < j.Messages && ctx.Err() == nil {
				time.Sleep(2 * time.Millisecond)
			}
			return stop()
		}
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	cpu, _ := usage()
	began := time.Now()
	if err := work(); err != nil {
		return err
	}
	u := Usage{Seconds: time.Since(began).Seconds(), Messages: j.Messages}
	runtime.ReadMemStats(&after)
	u.Mallocs = after.Mallocs - before.Mallocs
	used, peak := usage()
	u.CPU, u.PeakRSS = (used - cpu).Seconds(), peak
	return json.NewEncoder(out).Encode(u)
}

// usage is this process's CPU time, and its peak resident memory in MB.
func usage() (cpu time.Duration, peak float64) {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0, 0
	}
	peak = float64(r.Maxrss) / 1024 // KB on Linux
	if runtime.GOOS == "darwin" {
		peak /= 1024
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano()), peak
}

// one is one run in a process of its own, on a fresh server.
func (b *Bench) one(ctx context.Context, o Throughput, kind string) (u Usage, err error) {
	body := make([]byte, max(o.Body, 2))
	for i := range body {
		body[i] = ' '
	}
	body[0], body[len(body)-1] = '{', '}'
	s, err := b.stand(ctx, publisher.Topology{Partitions: o.Partitions}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		sleep(r.Context(), o.Latency)
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(body)
	}))
	if err != nil {
		return u, err
	}
	defer s.close()
	if err := s.publish(creators(o.Creators), func(string) int { return o.Messages / o.Creators }); err != nil {
		return u, err
	}
	n := int64(o.Messages / o.Creators * o.Creators)
	return b.job(ctx, Job{Kind: kind, Server: s.url, API: s.baseURL, Partitions: o.Partitions, InFlight: o.InFlight, Messages: n})
}

func creators(n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("creator-%d", i)
	}
	return names
}

func (b *Bench) job(ctx context.Context, j Job) (u Usage, err error) {
	spec, err := json.Marshal(j)
	if err != nil {
		return u, err
	}
	cmd := exec.CommandContext(ctx, b.JobCommand[0], append(slices.Clone(b.JobCommand[1:]), string(spec))...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return u, fmt.Errorf("run %s: %w", j.Kind, err)
	}
	return u, json.Unmarshal(out, &u)
}

type throughputFigures struct {
	PerSecond   float64 `json:"messages_per_s"`
	CPU         float64 `json:"cpu_s_per_1000"`
	Allocations float64 `json:"allocations_per_message"`
	PeakRSS     float64 `json:"peak_rss_mb"`
	P50         float64 `json:"added_p50_ms"`
	P99         float64 `json:"added_p99_ms"`
}

// Throughput measures the worker beside the bare loop, in pairs.
func (b *Bench) Throughput(ctx context.Context, o Throughput) error {
	if o.Messages < o.Creators {
		return errors.New("a request for each creator is the least")
	}
	all := map[string][]throughputFigures{}
	var cpu, speed, allocations, memory []float64
	for n := range o.Runs {
		pair := map[string]throughputFigures{}
		for _, kind := range []string{"bare", "headgate"} {
			u, err := b.one(ctx, o, kind)
			if err != nil {
				return err
			}
			m := float64(u.Messages)
			f := throughputFigures{PerSecond: m / u.Seconds, CPU: 1000 * u.CPU / m, Allocations: float64(u.Mallocs) / m, PeakRSS: u.PeakRSS}
			pair[kind] = f
			all[kind] = append(all[kind], f)
		}
		h, y := pair["headgate"], pair["bare"]
		fmt.Fprintf(b.Progress, "pair %d of %d: CPU %.3f s and %.3f s per 1,000, %.0f/s and %.0f/s\n", n+1, o.Runs, y.CPU, h.CPU, y.PerSecond, h.PerSecond)
		cpu, speed = append(cpu, h.CPU/y.CPU), append(speed, h.PerSecond/y.PerSecond)
		allocations, memory = append(allocations, h.Allocations/y.Allocations), append(memory, h.PeakRSS/y.PeakRSS)
	}
	middle := func(kind string, of func(throughputFigures) float64) float64 {
		var values []float64
		for _, f := range all[kind] {
			values = append(values, of(f))
		}
		return median(values)
	}
	figures := map[string]*throughputFigures{}
	for _, kind := range []string{"bare", "headgate"} {
		figures[kind] = &throughputFigures{
			PerSecond:   middle(kind, func(f throughputFigures) float64 { return f.PerSecond }),
			CPU:         middle(kind, func(f throughputFigures) float64 { return f.CPU }),
			Allocations: middle(kind, func(f throughputFigures) float64 { return f.Allocations }),
			PeakRSS:     middle(kind, func(f throughputFigures) float64 { return f.PeakRSS }),
		}
	}
	if o.Added {
		for kind, f := range figures {
			var err error
			if f.P50, f.P99, err = b.added(ctx, o, kind, figures["bare"].PerSecond/2); err != nil {
				return err
			}
		}
	}
	h, y := figures["headgate"], figures["bare"]
	t := table.NewWriter()
	t.SetStyle(table.StyleLight)
	t.AppendHeader(table.Row{fmt.Sprintf("%d messages, %d creators, API %v", o.Messages, o.Creators, o.Latency), "bare loop", "headgate", "ratio of pairs"})
	row := func(name, format string, bare, ours float64, ratio []float64) {
		r := "-"
		if ratio != nil {
			r = fmt.Sprintf("%.2f", median(ratio))
		}
		t.AppendRow(table.Row{name, fmt.Sprintf(format, bare), fmt.Sprintf(format, ours), r})
	}
	row("messages/s", "%.0f", y.PerSecond, h.PerSecond, speed)
	row("CPU s per 1,000", "%.3f", y.CPU, h.CPU, cpu)
	row("allocations per message", "%.0f", y.Allocations, h.Allocations, allocations)
	row("peak RSS, MB", "%.0f", y.PeakRSS, h.PeakRSS, memory)
	if o.Added {
		row("publish → API call at half load, p50 ms", "%.2f", y.P50, h.P50, nil)
		row("publish → API call at half load, p99 ms", "%.2f", y.P99, h.P99, nil)
	}
	fmt.Fprintln(b.Out, t.Render())
	return b.print(map[string]any{
		"bench": "throughput", "options": o, "bare": y, "headgate": h,
		"ratio": map[string]float64{"messages_per_s": median(speed), "cpu": median(cpu), "allocations": median(allocations), "peak_rss": median(memory)},
	})
}

// added measures the time from publishing to the API call at a rate, in
// milliseconds.
func (b *Bench) added(ctx context.Context, o Throughput, kind string, perSecond float64) (p50, p99 float64, err error) {
	var mu sync.Mutex
	var took []float64
	s, err := b.stand(ctx, publisher.Topology{Partitions: o.Partitions}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		now := time.Now()
		body, _ := io.ReadAll(r.Body)
		if at, err := strconv.ParseInt(string(body), 10, 64); err == nil {
			mu.Lock()
			took = append(took, float64(now.Sub(time.Unix(0, at)).Microseconds())/1000)
			mu.Unlock()
		}
		sleep(r.Context(), o.Latency)
		_, _ = io.WriteString(w, "{}")
	}))
	if err != nil {
		return 0, 0, err
	}
	defer s.close()
	n := int(min(perSecond*5, 30_000))
	ended := make(chan error, 1)
	go func() {
		_, err := b.job(ctx, Job{Kind: kind, Server: s.url, API: s.baseURL, Partitions: o.Partitions, InFlight: o.InFlight, Messages: int64(n)})
		ended <- err
	}()
	if !sleep(ctx, time.Second) { // until it pulls
		return 0, 0, ctx.Err()
	}
	fmt.Fprintf(b.Progress, "%s: %d messages at %.0f/s\n", kind, n, perSecond)
	names := creators(o.Creators)
	began := time.Now()
	for i := range n {
		if ahead := time.Duration(float64(i)/perSecond*float64(time.Second)) - time.Since(began); ahead > time.Millisecond {
			sleep(ctx, ahead)
		}
		m := nats.NewMsg("requests." + names[i%len(names)] + ".call")
		m.Header.Set(nats.MsgIdHdr, fmt.Sprintf("r-%d", i))
		m.Data = strconv.AppendInt(nil, time.Now().UnixNano(), 10)
		if _, err := s.js.PublishMsgAsync(m); err != nil {
			return 0, 0, err
		}
	}
	if err := <-ended; err != nil {
		return 0, 0, err
	}
	mu.Lock()
	defer mu.Unlock()
	if len(took) == 0 {
		return 0, 0, errors.New("no call came")
	}
	slices.Sort(took)
	return took[len(took)/2], took[len(took)*99/100], nil
}
