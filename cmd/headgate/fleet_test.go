package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/internal/ownership"
)

const asNode = "TEST_AS_NATS_NODE" // a natsservertest.Node as JSON

// runNode is a NATS server of a cluster, until standard input ends.
func runNode() {
	var n natsservertest.Node
	if err := json.Unmarshal([]byte(os.Getenv(asNode)), &n); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	srv, err := n.Start()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	srv.Shutdown()
	srv.WaitForShutdown()
}

// fleet is a cluster of three servers, workers, all of them processes, and an API
// that remembers which worker called for whom.
type fleet struct {
	t       *testing.T
	nodes   []natsservertest.Node
	servers []*exec.Cmd
	nc      *nats.Conn
	js      jetstream.JetStream
	dir     string
	config  string
	workers map[string]*exec.Cmd
	number  int
	api     *fleetAPI
	apiURL  string
	through string // where the workers find the servers; "": where they are
	pay     bool   // every fifth request is one that must not be called twice

	mu    sync.Mutex // of the workers, where a test ends them by itself
	books books
}

const fleetConfig = `
nats: {replicas: REPLICAS}
partitions: 16
provider:
  name: fleet
  profile: generic
  base_url: %s
  creator_header: x-creator
  headers: {x-worker: WORKER}
  timeout: 5s
limits:
  creator: {rate: 10/s, burst: 20, concurrency: 3}
  account: {rate: 500/s, burst: 50}
shutdown_grace: 5s
operations:
  "*": {method: POST, path: "/{operation}", body: payload}
  pay: {method: POST, path: /pay, body: payload, idempotent: false}
`

func freePorts(t *testing.T, n int) (ports []int) {
	t.Helper()
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	return newFleetOf(t, 3)
}

func newFleetOf(t *testing.T, servers int) *fleet {
	t.Helper()
	f := &fleet{t: t, dir: t.TempDir(), workers: map[string]*exec.Cmd{}, servers: make([]*exec.Cmd, servers)}
	ports := freePorts(t, 2*servers)
	for n := range servers {
		node := natsservertest.Node{
			Conf: "../../nats.conf", Name: fmt.Sprintf("nats-%d", n+1), Dir: filepath.Join(f.dir, fmt.Sprint(n)),
			Port: ports[n], Route: ports[servers+n],
		}
		if servers > 1 {
			node.Conf, node.Routes = "../../deploy/cluster/nats.conf", ports[servers:]
		}
		f.nodes = append(f.nodes, node)
		f.startServer(n)
	}
	t.Cleanup(func() {
		for name := range f.workers {
			f.kill(name)
		}
		for n := range f.servers {
			f.killServer(n)
		}
	})
	f.api = &fleetAPI{inFlight: map[string]map[string]int{}, calls: map[string][]time.Time{}, keys: map[string]int{}, latency: 30 * time.Millisecond}
	server := httptest.NewServer(f.api)
	t.Cleanup(server.Close)
	f.apiURL = server.URL
	f.config = strings.Replace(fmt.Sprintf(fleetConfig, server.URL), "REPLICAS", fmt.Sprint(servers), 1)

	var err error
	eventually(t, "the cluster takes connections", func() bool {
		f.nc, err = nats.Connect(natsservertest.URLs(f.nodes), nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond))
		return err == nil
	})
	t.Cleanup(f.nc.Close)
	if f.js, err = jetstream.New(f.nc); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the cluster has a leader", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := f.js.AccountInfo(ctx)
		return err == nil
	})
	eventually(t, "headgate setup", func() bool {
		out, err := f.run("setup")
		if err != nil {
			t.Logf("setup: %s", out)
		}
		return err == nil
	})
	return f
}

func (f *fleet) startServer(n int) {
	f.t.Helper()
	node, err := json.Marshal(f.nodes[n])
	if err != nil {
		f.t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), asNode+"="+string(node))
	cmd.Stderr = os.Stderr
	// Kept open until the test ends; the server ends with it.
	if _, err := cmd.StdinPipe(); err != nil {
		f.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		f.t.Fatal(err)
	}
	f.servers[n] = cmd
}

func (f *fleet) killServer(n int) {
	if cmd := f.servers[n]; cmd != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		f.servers[n] = nil
	}
}

func (f *fleet) command(worker string, args ...string) *exec.Cmd {
	path := filepath.Join(f.dir, worker+".yaml")
	if err := os.WriteFile(path, []byte(strings.Replace(f.config, "WORKER", worker, 1)), 0o600); err != nil {
		f.t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], append(args, "-c", path, "--server", orElse(f.through, natsservertest.URLs(f.nodes)), "--log-format", "json")...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	return cmd
}

func (f *fleet) run(args ...string) (string, error) {
	var out bytes.Buffer
	cmd := f.command("tool", args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

func (f *fleet) start() string {
	f.t.Helper()
	f.number++
	name := fmt.Sprintf("w%d", f.number)
	cmd := f.command(name, "run")
	log, err := os.Create(filepath.Join(f.dir, name+".log"))
	if err != nil {
		f.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		f.t.Fatal(err)
	}
	f.workers[name] = cmd
	return name
}

func (f *fleet) kill(name string) {
	cmd := f.workers[name]
	delete(f.workers, name)
	_ = cmd.Process.Signal(syscall.SIGCONT)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

func (f *fleet) stop(name string) {
	f.t.Helper()
	cmd := f.workers[name]
	delete(f.workers, name)
	_ = cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		log, _ := os.ReadFile(filepath.Join(f.dir, name+".log"))
		f.t.Errorf("%s ended with %v:\n%s", name, err, log[max(0, len(log)-2000):])
	}
}

func (f *fleet) any() string {
	names := make([]string, 0, len(f.workers))
	for name := range f.workers {
		names = append(names, name)
	}
	slices.Sort(names)
	return names[rand.IntN(len(names))]
}

// balanced waits until every live worker has its share, and says how long that
// took.
func (f *fleet) balanced(within time.Duration) time.Duration {
	f.t.Helper()
	began := time.Now()
	var owners []ownership.Ownership
	for {
		ctx, cancel := context.WithTimeout(f.t.Context(), 2*time.Second)
		kv, err := f.js.KeyValue(ctx, "OWNERS")
		if err == nil {
			owners, err = ownership.Owners(ctx, kv)
		}
		cancel()
		good := err == nil && len(owners) == len(f.workers)
		total := 0
		for _, o := range owners {
			n := len(o.Partitions)
			total += n
			good = good && n >= 16/len(f.workers) && n <= (16+len(f.workers)-1)/len(f.workers)
		}
		took := time.Since(began)
		if good && total == 16 {
			return took
		}
		if took > within {
			f.t.Errorf("not balanced over %d workers after %v: %v", len(f.workers), within, owners)
			return took
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// load publishes requests until the context ends.
func (f *fleet) load(ctx context.Context, creators int, every time.Duration) {
	t := time.NewTicker(every)
	defer t.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		operation := "send"
		if f.pay && n%5 == 0 {
			operation = "pay"
		}
		f.books.publish(ctx, f.js, entry{fmt.Sprintf("creator-%d", n%creators), operation, fmt.Sprintf("r-%d", n)})
	}
}

// underLoad starts workers and gives them requests until stop.
func (f *fleet) underLoad(workers, creators int, every time.Duration) (stop func()) {
	f.t.Helper()
	for range workers {
		f.start()
	}
	f.t.Logf("%d workers balanced after %v", workers, f.balanced(2*time.Minute).Round(time.Millisecond))
	ctx, cancel := context.WithCancel(f.t.Context())
	var load sync.WaitGroup
	load.Go(func() { f.load(ctx, creators, every) })
	stop = func() {
		cancel()
		load.Wait()
	}
	f.t.Cleanup(stop)
	eventually(f.t, "calls", func() bool { return f.api.flying() > 0 })
	return stop
}

// settled waits until every acknowledged request has its one outcome.
func (f *fleet) settled(within time.Duration) []storedOutcome {
	f.t.Helper()
	began := time.Now()
	for {
		ctx, cancel := context.WithTimeout(f.t.Context(), 30*time.Second)
		missing, double, all, err := f.books.compare(ctx, f.js)
		cancel()
		if len(double) > 0 {
			f.t.Fatalf("%d requests have two outcomes: %v", len(double), double[:min(5, len(double))])
		}
		if err == nil && len(missing) == 0 {
			f.t.Logf("%d acknowledged requests have their outcomes, %v after the last", f.books.count(), time.Since(began).Round(time.Millisecond))
			return all
		}
		if time.Since(began) > within {
			f.dump(missing)
			f.t.Fatalf("%d of %d requests have no outcome: %v (%v)", len(missing), f.books.count(), missing[:min(5, len(missing))], err)
		}
		time.Sleep(time.Second)
	}
}

// dump shows where requests are that do not come through.
func (f *fleet) dump(missing []string) {
	ctx, cancel := context.WithTimeout(f.t.Context(), 10*time.Second)
	defer cancel()
	if kv, err := f.js.KeyValue(ctx, "OWNERS"); err == nil {
		owners, err := ownership.Owners(ctx, kv)
		f.t.Logf("owners: %+v, %v", owners, err)
	}
	if s, err := f.js.Stream(ctx, "REQUESTS"); err == nil {
		info, err := s.Info(ctx, jetstream.WithSubjectFilter(">"))
		if err == nil {
			f.t.Logf("REQUESTS: %d stored, %v", info.State.Msgs, info.State.Subjects)
		}
		list := s.ListConsumers(ctx)
		for c := range list.Info() {
			if c.NumPending > 0 || c.NumAckPending > 0 {
				f.t.Logf("%s: %d pending, %d waiting for an ack, %d redelivered, %d pulls, ack floor %+v, delivered %+v", c.Name, c.NumPending, c.NumAckPending, c.NumRedelivered, c.NumWaiting, c.AckFloor, c.Delivered)
			}
		}
	}
	if len(missing) == 0 {
		return
	}
	creator, rest, _ := strings.Cut(missing[0], ".")
	_, rest, _ = strings.Cut(rest, ".")
	id, _, _ := strings.Cut(rest, " ")
	for _, args := range [][]string{{"status"}, {"creators"}, {"why", creator}, {"why", "--request", id}} {
		out, err := f.run(args...)
		f.t.Logf("headgate %v: %v\n%s", args, err, out)
	}
	logs, _ := filepath.Glob(filepath.Join(f.dir, "*.log"))
	for _, name := range logs {
		log, _ := os.ReadFile(name)
		for line := range strings.Lines(string(log)) {
			if strings.Contains(line, `"`+id+`"`) || strings.Contains(line, "POISON") {
				f.t.Logf("%s: %s", filepath.Base(name), line)
			}
		}
	}
	for name, cmd := range f.workers {
		log, _ := os.ReadFile(filepath.Join(f.dir, name+".log"))
		if _, rest, ok := strings.Cut(string(log), `"admin":"`); ok {
			admin, _, _ := strings.Cut(rest, `"`)
			if resp, err := http.Get("http://" + admin + "/metrics"); err == nil {
				metrics, _ := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				for line := range strings.Lines(string(metrics)) {
					if strings.HasPrefix(line, "headgate_") && !strings.Contains(line, "_bucket") && !strings.HasSuffix(line, " 0\n") {
						f.t.Log(name + ": " + strings.TrimSpace(line))
					}
				}
			}
		}
		_ = cmd.Process.Signal(syscall.SIGQUIT) // its goroutines
		_ = cmd.Wait()
		log, _ = os.ReadFile(filepath.Join(f.dir, name+".log"))
		var lines []string
		for line := range strings.Lines(string(log)) {
			if !strings.Contains(line, `"outcome":"result"`) {
				lines = append(lines, line)
			}
		}
		f.t.Logf("%s:\n%s", name, strings.Join(lines[max(0, len(lines)-600):], ""))
	}
}

func (f *fleet) collect(stream string, token int, outcomes map[string]int) error {
	ctx, cancel := context.WithTimeout(f.t.Context(), 5*time.Second)
	defer cancel()
	s, err := f.js.Stream(ctx, stream)
	if err != nil {
		return err
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(">"))
	if err != nil {
		return err
	}
	for subject, n := range info.State.Subjects {
		if tokens := strings.Split(subject, "."); len(tokens) > token { // else a fence
			outcomes[tokens[token]] += int(n)
		}
	}
	return nil
}
