// Package bench measures what Headgate promises, on real parts: a NATS server in a
// process of its own, an HTTP API, a worker between them. People run it with
// `headgate bench` to see for themselves.
package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/consumer"
	"github.com/headgate-io/headgate/internal/api"
	"github.com/headgate-io/headgate/internal/natsserver"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// Bench is where a benchmark runs and what it writes to.
type Bench struct {
	// ServerCommand starts ServeNATS in a process of its own: its figures must
	// not be mixed with the worker's.
	ServerCommand []string
	JobCommand    []string  // does a Job in a process of its own
	Server        string    // URL of a server to use instead, for Throughput
	Out           io.Writer // tables and JSON
	Progress      io.Writer
}

// creatorHeader is where the API finds the creator.
const creatorHeader = "x-creator"

// ServeNATS runs a server on a folder until in ends. It writes its URL and
// that of its figures, and then, for each line, the seconds of CPU time that it
// has used.
func ServeNATS(dir string, in io.Reader, out io.Writer) error {
	s, err := natsserver.Start(natsserver.Config{Dir: dir, Listen: "127.0.0.1:0", Monitor: true})
	if err != nil {
		return err
	}
	defer s.Shutdown()
	if _, err := fmt.Fprintf(out, "%s %s\n", s.URL(), s.MonitorURL()); err != nil {
		return err
	}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		cpu, _ := usage()
		if _, err := fmt.Fprintln(out, cpu.Seconds()); err != nil {
			return err
		}
	}
	return lines.Err()
}

// stand is one set-up: a fresh server and an API.
type stand struct {
	b        *Bench
	dir      string
	server   *exec.Cmd
	url      string
	stdin    io.WriteCloser
	stdout   *bufio.Reader
	nc       *nats.Conn
	js       jetstream.JetStream
	monitor  string
	workers  int
	topology publisher.Topology
	baseURL  string
	http     *http.Server
}

func (b *Bench) stand(ctx context.Context, topology publisher.Topology, handler http.Handler) (s *stand, err error) {
	s = &stand{b: b, topology: topology.WithDefaults()}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if b.Server != "" {
		// Among what is there, under a namespace that goes with the benchmark.
		s.url, s.topology.Namespace = b.Server, publisher.Namespace("bench-"+nuid.Next()[14:])
	} else if err = s.startServer(); err != nil {
		return s, err
	}
	if s.nc, err = nats.Connect(s.url); err != nil {
		return s, err
	}
	if s.js, err = jetstream.New(s.nc, jetstream.WithPublishAsyncMaxPending(8192)); err != nil {
		return s, err
	}
	if _, err = s.topology.Ensure(ctx, s.js); err != nil {
		return s, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return s, err
	}
	s.baseURL = "http://" + l.Addr().String()
	s.http = &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = s.http.Serve(l) }()
	return s, nil
}

func (s *stand) startServer() (err error) {
	if s.dir, err = os.MkdirTemp("", "headgate-bench-"); err != nil {
		return err
	}
	s.server = exec.Command(s.b.ServerCommand[0], append(s.b.ServerCommand[1:], s.dir)...)
	s.server.Stderr = os.Stderr
	if s.stdin, err = s.server.StdinPipe(); err != nil {
		return err
	}
	stdout, err := s.server.StdoutPipe()
	if err != nil {
		return err
	}
	if err = s.server.Start(); err != nil {
		return fmt.Errorf("start the NATS server: %w", err)
	}
	s.stdout = bufio.NewReader(stdout)
	line, err := s.stdout.ReadString('\n')
	if err != nil {
		return fmt.Errorf("start the NATS server: %w", err)
	}
	s.url, s.monitor, _ = strings.Cut(strings.TrimSpace(line), " ")
	return nil
}

// cpu is how many seconds of CPU time the server has used; 0 if it is not ours.
func (s *stand) cpu() (seconds float64, err error) {
	if s.server == nil {
		return 0, nil // the server is not this benchmark's
	}
	if _, err := fmt.Fprintln(s.stdin); err != nil {
		return 0, err
	}
	_, err = fmt.Fscanln(s.stdout, &seconds)
	return seconds, err
}

func (s *stand) close() {
	if s.http != nil {
		_ = s.http.Close()
	}
	if s.nc != nil {
		if s.server == nil && s.js != nil {
			s.remove()
		}
		s.nc.Close()
	}
	if s.stdin != nil {
		_ = s.stdin.Close()
		_ = s.server.Wait()
	}
	if s.dir != "" {
		_ = os.RemoveAll(s.dir)
	}
}

// remove deletes what a benchmark left on a server that is not its own.
func (s *stand) remove() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	prefix := s.topology.Namespace.Stream("")
	names := s.js.StreamNames(ctx)
	for name := range names.Name() {
		if strings.HasPrefix(name, prefix) || strings.HasPrefix(name, "KV_"+prefix) || strings.HasPrefix(name, "OBJ_"+prefix) {
			_ = s.js.DeleteStream(ctx, name)
		}
	}
}

// work runs a worker with the defaults, as changed, until stop.
func (s *stand) work(ctx context.Context, timeout time.Duration, change func(*consumer.Config)) (w *consumer.Worker, stop func() error, err error) {
	profile, ok := classify.Builtin("ofauth")
	if !ok {
		return nil, nil, errors.New("no profile ofauth")
	}
	s.workers++
	cfg := consumer.Config{
		Name: fmt.Sprintf("bench-%d", s.workers), Provider: "bench", Topology: s.topology, Profile: profile,
		Operations: map[string]consumer.Operation{consumer.AnyOperation: {Kind: resilience.Write, Retry: consumer.DefaultRetry()}},
		Gates:      resilience.DefaultConfig(), Log: zerolog.New(io.Discard).Level(zerolog.InfoLevel),
	}
	if change != nil {
		change(&cfg)
	}
	client, err := api.New(api.Config{
		BaseURL: s.baseURL, CreatorHeader: creatorHeader, Timeout: timeout, MaxBody: 16 << 20,
		InFlight: cfg.Gates.InFlight, UserAgent: "headgate-bench",
		Operations: map[string]api.Operation{consumer.AnyOperation: {Method: http.MethodPost, Path: "/call", Payload: true}},
	})
	if err != nil {
		return nil, nil, err
	}
	cfg.API = client
	nc, err := nats.Connect(s.url, nats.ReconnectBufSize(-1))
	if err != nil {
		return nil, nil, err
	}
	if w, err = consumer.New(ctx, nc, cfg); err != nil {
		nc.Close()
		return nil, nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var g errgroup.Group
	g.Go(func() error { return w.Run(ctx) })
	return w, func() error {
		cancel()
		defer nc.Close()
		defer client.Close()
		return g.Wait()
	}, nil
}

// publish stores requests, spread evenly over each other: the n-th of every
// creator before the n+1st of any.
func (s *stand) publish(creators []string, each func(creator string) int) error {
	var futures []jetstream.PubAckFuture
	for n, more := 0, true; more; n++ {
		more = false
		for _, name := range creators {
			if n >= each(name) {
				continue
			}
			more = true
			m := nats.NewMsg(s.topology.Namespace.Subject("requests", name, "call"))
			m.Header.Set(nats.MsgIdHdr, fmt.Sprintf("%s-%d", name, n))
			m.Data = []byte(`{"text":"hello"}`)
			f, err := s.js.PublishMsgAsync(m)
			if err != nil {
				return fmt.Errorf("publish: %w", err)
			}
			futures = append(futures, f)
		}
	}
	for _, f := range futures {
		select {
		case <-f.Ok():
		case err := <-f.Err():
			return fmt.Errorf("publish: %w", err)
		}
	}
	return nil
}

// varz are the server's own figures.
type varz struct {
	Mem int64   `json:"mem"` // bytes
	CPU float64 `json:"cpu"` // percent of a core
}

func (s *stand) varz(ctx context.Context) (v varz, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.monitor+"/varz", nil)
	if err != nil {
		return v, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return v, err
	}
	defer resp.Body.Close()
	return v, json.NewDecoder(resp.Body).Decode(&v)
}

// await waits until done, and no longer than limit.
func await(ctx context.Context, limit time.Duration, what string, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: not within %v", what, limit)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func median[T float64 | time.Duration](all []T) T {
	sorted := slices.Clone(all)
	slices.Sort(sorted)
	return sorted[len(sorted)/2]
}

// print writes a benchmark's figures as one line of JSON.
func (b *Bench) print(figures any) error {
	line, err := json.Marshal(figures)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(b.Out, "\n%s\n", line)
	return err
}
