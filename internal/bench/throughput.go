package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
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
	Workers    int
	Messages   int
	Creators   int
	Partitions int
	InFlight   int
	Latency    time.Duration // of the API
	Body       int           // bytes of the API's answer
	Added      bool          // measure the added latency, too
	Profile    string        // folder for CPU profiles of both; "": none
}

// DefaultThroughput takes about a minute.
func DefaultThroughput() Throughput {
	return Throughput{Runs: 5, Workers: 1, Messages: 20_000, Creators: 1000, Partitions: 32, InFlight: 256, Body: 1024, Added: true}
}

// Job is what a process of its own does: it works as the worker or as the bare
// loop.
type Job struct {
	Kind       string // "headgate" or "bare"
	Name       string
	Namespace  publisher.Namespace
	Server     string
	API        string
	Partitions int
	InFlight   int
	Profile    string // file
}

// Usage is what a job took.
type Usage struct {
	CPU     float64 `json:"cpu_s"`
	Mallocs uint64  `json:"mallocs"`
	PeakRSS float64 `json:"peak_rss_mb"`
}

// RunJob does a job until in ends, and then writes its usage.
func RunJob(ctx context.Context, j Job, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, in)
		cancel()
	}()
	if j.Profile != "" {
		f, err := os.Create(j.Profile)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	cpu, _ := usage()
	var err error
	if j.Kind == "bare" {
		err = runBare(ctx, j)
	} else {
		err = runHeadgate(ctx, j)
	}
	if err != nil {
		return err
	}
	used, peak := usage()
	runtime.ReadMemStats(&after)
	return json.NewEncoder(out).Encode(Usage{CPU: (used - cpu).Seconds(), Mallocs: after.Mallocs - before.Mallocs, PeakRSS: peak})
}

func runBare(ctx context.Context, j Job) error {
	nc, err := nats.Connect(j.Server)
	if err != nil {
		return err
	}
	defer nc.Close()
	b, err := newBare(nc, j)
	if err != nil {
		return err
	}
	return b.run(ctx, j.Partitions)
}

func runHeadgate(ctx context.Context, j Job) error {
	s := &stand{url: j.Server, baseURL: j.API, topology: publisher.Topology{Namespace: j.Namespace, Partitions: j.Partitions}.WithDefaults()}
	metrics := telemetry.NewMetrics()
	w, stop, err := s.work(context.WithoutCancel(ctx), 10*time.Second, func(c *consumer.Config) {
		c.Name = j.Name
		c.Gates.InFlight = j.InFlight
		c.Observer = metrics
		// A log that is kept, as by default.
		c.Log = zerolog.New(io.Discard).Level(zerolog.InfoLevel).With().Timestamp().Logger()
	})
	if err != nil {
		return err
	}
	metrics.Watch(w.Snapshot)
	<-ctx.Done()
	return stop()
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
	// On Linux a process begins with the peak of the one that started it.
	if status, err := os.ReadFile("/proc/self/status"); err == nil {
		if _, rest, ok := strings.Cut(string(status), "VmHWM:"); ok {
			var kb float64
			if _, err := fmt.Sscan(rest, &kb); err == nil {
				peak = kb / 1024
			}
		}
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano()), peak
}

// run is what one run came to.
type run struct {
	Usage
	first     float64 // seconds from the start of the process to the first call
	seconds   float64 // from the first call to the last result
	serverCPU float64
	messages  int
}

// one is one run: processes of their own, on a fresh server.
func (b *Bench) one(ctx context.Context, o Throughput, kind string) (r run, err error) {
	body := make([]byte, max(o.Body, 2))
	for i := range body {
		body[i] = ' '
	}
	body[0], body[len(body)-1] = '{', '}'
	var first sync.Once
	var began time.Time
	s, err := b.stand(ctx, publisher.Topology{Partitions: o.Partitions}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		first.Do(func() { began = time.Now() })
		_, _ = io.Copy(io.Discard, r.Body)
		sleep(r.Context(), o.Latency)
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(body)
	}))
	if err != nil {
		return r, err
	}
	defer s.close()
	each := o.Messages / o.Creators
	r.messages = each * o.Creators
	if err := s.publish(creators(o.Creators), func(string) int { return each }); err != nil {
		return r, err
	}
	before, err := s.cpu()
	if err != nil {
		return r, err
	}
	started := time.Now()
	jobs, err := b.start(ctx, o, kind, s)
	if err != nil {
		return r, err
	}
	if err := s.results(ctx, r.messages); err != nil {
		return r, errors.Join(err, jobs.stop(&r.Usage))
	}
	r.seconds, r.first = time.Since(began).Seconds(), began.Sub(started).Seconds()
	after, err := s.cpu()
	r.serverCPU = after - before
	return r, errors.Join(err, jobs.stop(&r.Usage))
}

// results waits until n are stored.
func (s *stand) results(ctx context.Context, n int) error {
	stream, err := s.js.Stream(ctx, s.topology.Namespace.Stream(publisher.Results))
	if err != nil {
		return err
	}
	return await(ctx, time.Hour, fmt.Sprintf("%d results", n), func() (bool, error) {
		time.Sleep(8 * time.Millisecond)
		info, err := stream.Info(ctx)
		return err == nil && int(info.State.Msgs) >= n, err
	})
}

func creators(n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("creator-%d", i)
	}
	return names
}

// jobs are processes that work.
type jobs []*job

type job struct {
	cmd *exec.Cmd
	in  io.Closer
	out bytes.Buffer
}

func (b *Bench) start(ctx context.Context, o Throughput, kind string, s *stand) (all jobs, err error) {
	for n := range o.Workers {
		j := Job{
			Kind: kind, Name: fmt.Sprintf("bench-%d", n+1), Namespace: s.topology.Namespace, Server: s.url, API: s.baseURL,
			Partitions: o.Partitions, InFlight: o.InFlight,
		}
		if o.Profile != "" {
			j.Profile = filepath.Join(o.Profile, fmt.Sprintf("%s-%d.pprof", kind, n+1))
		}
		spec, err := json.Marshal(j)
		if err != nil {
			return nil, err
		}
		p := &job{cmd: exec.CommandContext(ctx, b.JobCommand[0], append(slices.Clone(b.JobCommand[1:]), string(spec))...)}
		p.cmd.Stdout, p.cmd.Stderr = &p.out, os.Stderr
		if p.in, err = p.cmd.StdinPipe(); err != nil {
			return nil, err
		}
		if err := p.cmd.Start(); err != nil {
			return nil, fmt.Errorf("start %s: %w", kind, err)
		}
		all = append(all, p)
	}
	return all, nil
}

// stop ends them and adds up what they took.
func (all jobs) stop(u *Usage) error {
	for _, j := range all {
		_ = j.in.Close()
	}
	for _, j := range all {
		if err := j.cmd.Wait(); err != nil {
			return fmt.Errorf("run %v: %w", j.cmd.Args, err)
		}
		var one Usage
		if err := json.Unmarshal(j.out.Bytes(), &one); err != nil {
			return err
		}
		u.CPU, u.Mallocs, u.PeakRSS = u.CPU+one.CPU, u.Mallocs+one.Mallocs, u.PeakRSS+one.PeakRSS
	}
	return nil
}

type throughputFigures struct {
	PerSecond   float64 `json:"messages_per_s"`
	CPU         float64 `json:"cpu_s_per_1000"`
	ServerCPU   float64 `json:"server_cpu_s_per_1000"`
	Allocations float64 `json:"allocations_per_message"`
	PeakRSS     float64 `json:"peak_rss_mb"`
	First       float64 `json:"first_call_s"`
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
			r, err := b.one(ctx, o, kind)
			if err != nil {
				return err
			}
			m := float64(r.messages)
			f := throughputFigures{PerSecond: m / r.seconds, CPU: 1000 * r.CPU / m, ServerCPU: 1000 * r.serverCPU / m, Allocations: float64(r.Mallocs) / m, PeakRSS: r.PeakRSS, First: r.first}
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
			ServerCPU:   middle(kind, func(f throughputFigures) float64 { return f.ServerCPU }),
			Allocations: middle(kind, func(f throughputFigures) float64 { return f.Allocations }),
			PeakRSS:     middle(kind, func(f throughputFigures) float64 { return f.PeakRSS }),
			First:       middle(kind, func(f throughputFigures) float64 { return f.First }),
		}
	}
	if o.Added {
		p50, p99 := map[string][]float64{}, map[string][]float64{}
		for range min(o.Runs, 3) {
			for _, kind := range []string{"bare", "headgate"} {
				half, most, err := b.added(ctx, o, kind, figures["bare"].PerSecond/2)
				if err != nil {
					return err
				}
				p50[kind], p99[kind] = append(p50[kind], half), append(p99[kind], most)
			}
		}
		for kind, f := range figures {
			f.P50, f.P99 = median(p50[kind]), median(p99[kind])
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
	row("the server's", "%.3f", y.ServerCPU, h.ServerCPU, nil)
	row("allocations per message", "%.0f", y.Allocations, h.Allocations, allocations)
	row("peak RSS, MB", "%.0f", y.PeakRSS, h.PeakRSS, memory)
	row("start → first API call, s", "%.2f", y.First, h.First, nil)
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
	jobs, err := b.start(ctx, o, kind, s)
	if err != nil {
		return 0, 0, err
	}
	if !sleep(ctx, 2*time.Second) { // until it pulls
		return 0, 0, ctx.Err()
	}
	fmt.Fprintf(b.Progress, "%s: %d messages at %.0f/s\n", kind, n, perSecond)
	names := creators(o.Creators)
	began := time.Now()
	for i := range n {
		if ahead := time.Duration(float64(i)/perSecond*float64(time.Second)) - time.Since(began); ahead > time.Millisecond {
			sleep(ctx, ahead)
		}
		m := nats.NewMsg(s.topology.Namespace.Subject("requests", names[i%len(names)], "call"))
		m.Header.Set(nats.MsgIdHdr, fmt.Sprintf("r-%d", i))
		m.Data = strconv.AppendInt(nil, time.Now().UnixNano(), 10)
		if _, err := s.js.PublishMsgAsync(m); err != nil {
			return 0, 0, err
		}
	}
	var u Usage
	if err := errors.Join(s.results(ctx, n), jobs.stop(&u)); err != nil {
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
