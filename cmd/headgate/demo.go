package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jedib0t/go-pretty/v6/progress"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/headgate-io/headgate/consumer"
	"github.com/headgate-io/headgate/internal/config"
	"github.com/headgate-io/headgate/internal/control"
	"github.com/headgate-io/headgate/internal/fakeapi"
	"github.com/headgate-io/headgate/internal/telemetry"
	"github.com/headgate-io/headgate/publisher"
)

// demo is the main job as a new user sees it first: real parts, and an API that
// misbehaves.
type demo struct {
	*session
	dir                string
	listen             string
	creators, requests int
	seed               uint64
	keep               bool

	relinked atomic.Bool
	api      *fakeapi.API
	worker   *consumer.Worker
	started  time.Time
}

func demoCommand() *cobra.Command {
	d := &demo{}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See it work: an embedded server, a misbehaving API, and a few thousand requests",
		Long: `Run the main job on real parts: an embedded NATS server, a fake creator API that
misbehaves as real ones do, a worker between them, and a few thousand requests
for about 50 creators. It takes less than half a minute and needs nothing else.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return d.run(cmd) },
	}
	flags := cmd.Flags()
	flags.StringVar(&d.dir, "dir", "", "`folder` of the embedded server, kept afterwards (default: a temporary one)")
	flags.StringVar(&d.listen, "listen", "127.0.0.1:4222", "`address` of the embedded server; if it is taken, the next free port")
	flags.IntVar(&d.creators, "creators", 50, "number of creators")
	flags.IntVar(&d.requests, "requests", 3000, "number of requests")
	flags.Uint64Var(&d.seed, "seed", 1, "seed of what goes wrong")
	flags.BoolVar(&d.keep, "keep", false, "leave everything running afterwards, to look around, until Ctrl-C")
	return cmd
}

// demoConfig makes waits short, so that everything happens within seconds.
func demoConfig(baseURL string) *config.Config {
	c := config.Default()
	c.Partitions = 8
	c.Provider.Name, c.Provider.Profile, c.Provider.BaseURL = "fake", "ofauth", baseURL
	c.Provider.CreatorHeader, c.Provider.Timeout = creatorHeader, 2*time.Second
	c.Limits.Creator = config.CreatorLimits{Rate: config.Rate{Calls: 600, Per: time.Minute}, Burst: 30, Concurrency: 3}
	c.Breaker.OpenFor = 2 * time.Second
	c.Retry.Base, c.Retry.Max = 200*time.Millisecond, 2*time.Second
	c.Operations = map[string]config.Operation{
		"fans_top":     {Method: "GET", Path: "/stats/fans/top", Query: map[string]string{"creatorId": "{creator}", "limit": "{limit}"}, NotFound: "empty"},
		"earnings":     {Method: "GET", Path: "/creators/{creator}/earnings"},
		"message_send": {Method: "POST", Path: "/creators/{creator}/messages", Body: "payload"},
	}
	return &c
}

func (d *demo) run(cmd *cobra.Command) error {
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()
	if d.creators < 30 || d.requests < d.creators {
		return exitError{exitUsage, fmt.Errorf("the demo needs at least 30 creators, and a request for each")}
	}
	if d.dir == "" {
		dir, err := os.MkdirTemp("", "headgate-demo-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		d.dir = dir
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("serve the fake API: %w", err)
	}
	d.api = fakeapi.New(creatorHeader, d.seed, fakeapi.Cast{Relinked: d.relinked.Load}.Behaviour)
	d.session = &session{cfg: demoConfig("http://" + l.Addr().String())}
	level, _ := cmd.Flags().GetString("log-level")
	format, _ := cmd.Flags().GetString("log-format")
	if d.log, err = telemetry.NewLogger(cmd.ErrOrStderr(), orElse(level, "disabled"), orElse(format, "auto")); err != nil {
		return exitError{exitUsage, err}
	}
	defer d.Close()
	if err := d.embed(ctx, d.dir, d.listen); err != nil {
		return err
	}
	errOut := cmd.ErrOrStderr()
	fmt.Fprintf(errOut, "NATS server on %s, fake creator API on http://%s\n", d.server.URL(), l.Addr())
	if _, err := d.topology().Ensure(ctx, d.js); err != nil {
		return err
	}
	cfg, closeAPI, err := workerConfig(d.session)
	if err != nil {
		return err
	}
	defer closeAPI()
	if d.worker, err = consumer.New(ctx, d.nc, cfg); err != nil {
		return err
	}
	if err := d.offer(ctx, cfg.Name, d.worker); err != nil {
		return err
	}

	d.started = time.Now()
	apiCtx, stopAPI := context.WithCancel(context.WithoutCancel(ctx))
	workCtx, stopWork := context.WithCancel(ctx)
	var servers, work errgroup.Group
	servers.Go(func() error { return serve(apiCtx, l, d.api) })
	work.Go(func() error { return d.worker.Run(workCtx) })
	defer func() {
		stopWork()
		_ = work.Wait()
		stopAPI()
		_ = servers.Wait()
	}()

	if err := d.watchWork(ctx, errOut); err != nil {
		return err
	}
	if err := d.summary(ctx, cmd.OutOrStdout()); err != nil {
		return err
	}
	if d.keep {
		fmt.Fprintln(errOut, "\nStill running, worker included. Ctrl-C ends it.")
		<-ctx.Done()
	}
	return nil
}

// watchWork publishes the requests and shows how they are worked on, until all have an
// outcome.
func (d *demo) watchWork(ctx context.Context, w io.Writer) error {
	var g errgroup.Group
	g.Go(func() error { return d.publish(ctx) })
	g.Go(func() error { return d.relink(ctx) })
	defer func() { _ = g.Wait() }()

	show := d.bar(w)
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			show(-1)
			return ctx.Err()
		case <-t.C:
		}
		s := d.worker.Stats()
		settled := s.Results + s.DeadLetters
		show(settled)
		if settled >= int64(d.requests) {
			return g.Wait()
		}
	}
}

// bar shows how many requests are settled: a bar with the rate on a terminal, otherwise lines.
func (d *demo) bar(w io.Writer) func(settled int64) {
	total := int64(d.requests)
	if !telemetry.IsTerminal(w) {
		next := time.Now()
		return func(settled int64) {
			if now := time.Now(); settled >= total || settled >= 0 && now.After(next) {
				next = now.Add(2 * time.Second)
				elapsed := now.Sub(d.started)
				fmt.Fprintf(w, "%5.1fs  %d of %d requests settled, %.0f/s, %d calls in flight or waiting here\n",
					elapsed.Seconds(), settled, total, float64(settled)/elapsed.Seconds(), d.worker.Working())
			}
		}
	}
	bar := progress.NewWriter()
	bar.SetOutputWriter(w)
	bar.SetUpdateFrequency(100 * time.Millisecond)
	bar.SetStyle(progress.StyleBlocks)
	bar.Style().Visibility.Speed = true
	bar.SetAutoStop(false)
	tracker := &progress.Tracker{Message: "requests settled", Total: total}
	bar.AppendTracker(tracker)
	done := make(chan struct{})
	go func() {
		bar.Render()
		close(done)
	}()
	return func(settled int64) {
		tracker.SetValue(settled)
		if settled < 0 || settled >= total {
			bar.Stop()
			<-done
		}
	}
}

// publish stores the requests as an ingester would.
func (d *demo) publish(ctx context.Context) error {
	p := publisher.New(d.js, d.topology())
	down := fakeapi.Cast{}.Down()
	operations := []string{"fans_top", "earnings", "message_send"}
	var g errgroup.Group
	g.SetLimit(publishing)
	toDown := 0
	for n := range d.requests {
		r := publisher.Request{
			ID:      publisher.RequestID("demo", fmt.Sprint(n)),
			Creator: fakeapi.Name(n % d.creators), Operation: operations[n%len(operations)],
			Payload: []byte(`{"limit":10,"text":"hello"}`),
		}
		if r.Creator == down {
			// Nothing is to be had of this one: a few requests will do, and they
			// must not keep the demo waiting for a day.
			if toDown++; toDown > 12 {
				r.Creator = fakeapi.Name(n / d.creators)
			} else {
				r.Deadline = time.Now().Add(12 * time.Second)
			}
		}
		g.Go(func() error {
			_, err := p.Publish(ctx, r)
			return err
		})
	}
	return g.Wait()
}

// relink does what the creators whose sessions expired would be asked to do, and
// then releases them, as an operator would by hand.
func (d *demo) relink(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(6 * time.Second):
	}
	d.relinked.Store(true)
	desk, err := d.desk(ctx)
	if err != nil {
		return err
	}
	for _, name := range (fakeapi.Cast{}).Expired() {
		if _, err := desk.Release(ctx, control.Target{Creator: name}, false, "relink"); err != nil {
			return fmt.Errorf("release %s: %w", name, err)
		}
	}
	return nil
}

// summary prints what became of the requests, and how to look at it.
func (d *demo) summary(ctx context.Context, w io.Writer) error {
	ns := d.topology().Namespace
	results, err := d.js.Stream(ctx, ns.Stream(publisher.Results))
	if err != nil {
		return err
	}
	dlq, err := d.js.Stream(ctx, ns.Stream(publisher.DLQ))
	if err != nil {
		return err
	}
	info, err := dlq.Info(ctx, jetstream.WithSubjectFilter("dlq.>"))
	if err != nil {
		return err
	}
	classes := map[string]uint64{}
	for subject, n := range info.State.Subjects {
		classes[strings.Split(subject, ".")[1]] += n
	}
	early, calls := 0, 0
	for _, r := range d.api.Reports() {
		early += r.Early
		calls += r.Calls
	}
	s := d.worker.Stats()
	t := table.NewWriter()
	t.SetStyle(table.StyleLight)
	t.AppendHeader(table.Row{fmt.Sprintf("%d requests for %d creators", d.requests, d.creators), fmt.Sprintf("in %.1fs", time.Since(d.started).Seconds())})
	// RESULTS has a tombstone for each dead letter.
	t.AppendRow(table.Row{"results", results.CachedInfo().State.Msgs - info.State.Msgs})
	t.AppendRow(table.Row{"dead letters", info.State.Msgs})
	for _, class := range slices.Sorted(maps.Keys(classes)) {
		t.AppendRow(table.Row{"  " + class, classes[class]})
	}
	t.AppendRow(table.Row{"calls to the API", calls})
	t.AppendRow(table.Row{"retries", s.Retries})
	t.AppendRow(table.Row{"time creators were held", s.Held.Round(100 * time.Millisecond)})
	t.AppendSeparator()
	t.AppendRow(table.Row{"calls inside a Retry-After window", early})
	fmt.Fprintf(w, "\n%s\n", t.Render())

	server := "--server " + d.server.URL()
	fmt.Fprintf(w, `
Look inside with the nats CLI%s:
  nats %[2]s stream ls
  nats %[2]s stream subjects DLQ
  nats %[2]s stream get RESULTS --last-for results.%[3]s.fans_top.demo=3A0
  nats %[2]s stream view DLQ
  nats %[2]s consumer report REQUESTS
  nats %[2]s kv ls HOLDS --verbose --display-value
  nats %[2]s kv put HOLDS creator.%[3]s 1h
`, d.lookHint(), server, fakeapi.Name(0))
	return nil
}

func (d *demo) lookHint() string {
	if d.keep {
		return ""
	}
	return " (while it runs: headgate demo --keep)"
}
