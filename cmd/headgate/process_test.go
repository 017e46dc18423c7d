package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/headgate-io/headgate/internal/natsserver"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/internal/ownership"
)

// The test binary is also the program, and a NATS server, for tests that need
// processes of their own.
const (
	asProgram = "TEST_AS_HEADGATE"
	asServer  = "TEST_AS_NATS_SERVER" // its folder
)

// patience is how long a test waits for a command that ought to end by itself.
const patience = 3 * time.Minute

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(asNode) != "":
		runNode()
	case os.Getenv(asProgram) != "":
		main()
	case os.Getenv(asServer) != "":
		s, err := natsserver.Start(natsserver.Config{Dir: os.Getenv(asServer), Listen: "127.0.0.1:0"})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(s.URL())
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n') // until the test ends
		s.Shutdown()
	default:
		os.Exit(m.Run())
	}
}

// externalServer is a nats-server in a process of its own.
func externalServer(t *testing.T) (url string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), asServer+"="+t.TempDir())
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

// process runs the program as a process of its own. One that does not end is made to
// tell where it is.
func (w *world) process(args ...string) *exec.Cmd {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	w.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, os.Args[0], append(args, "-c", w.config, "--server", w.url, "--log-format", "json")...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Env = append(os.Environ(), asProgram+"=1")
	var stderr syncBuffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if w.t.Failed() {
			w.t.Logf("%v:\n%s", args, stderr.String())
		}
	})
	return cmd
}

// Against a server and with workers that are processes of their own: SIGTERM in
// the middle, then another worker, and every request has exactly one outcome.
func TestSIGTERM(t *testing.T) {
	w := newWorld(t, externalServer(t))
	const requests = 300
	for i := range 10 {
		w.api.answer("c"+strconv.Itoa(i), func(n int, rw http.ResponseWriter, r *http.Request) {
			time.Sleep(30 * time.Millisecond)
			status(200, `{}`)(n, rw, r)
		})
	}
	for n := range requests {
		w.publish(fmt.Sprintf("requests.c%d.send", n%10), `{}`, "Nats-Msg-Id", strconv.Itoa(n))
	}
	first := w.process("run")
	eventually(t, "the worker is in the middle", func() bool { return w.messages("RESULTS") > 50 })
	if err := first.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := first.Wait(); err != nil {
		t.Errorf("SIGTERM: %v, want exit code 0", err)
	}
	if n := w.messages("RESULTS"); n == requests {
		t.Error("SIGTERM came when all was done already")
	}
	w.process("run")
	results := w.outcomes("RESULTS", "results.>", requests)
	eventually(t, "all are settled", func() bool { return w.messages("REQUESTS") == 0 })
	if n := w.messages("RESULTS"); n != requests || len(results) != requests {
		t.Errorf("%d results of %d requests", n, requests)
	}
	calls := 0
	for i := range 10 {
		calls += len(w.api.of("c" + strconv.Itoa(i)))
	}
	if calls != requests {
		t.Errorf("%d calls for %d requests, although every call in flight could finish", calls, requests)
	}
}

// Two programs on one folder use one server.
func TestEmbeddedServerIsShared(t *testing.T) {
	t.Setenv("HEADGATE_DATA_DIR", t.TempDir())
	t.Setenv("HEADGATE_LISTEN", "127.0.0.1:0")
	t.Setenv("HEADGATE_PARTITIONS", "2")
	t.Setenv("NATS_URL", "")
	program := func(args ...string) (string, error) {
		cmd := exec.Command(os.Args[0], args...)
		cmd.Env = append(os.Environ(), asProgram+"=1")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	// Each is the only one, and finds what the one before has stored.
	if out, err := program("setup"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if out, err := program("setup", "--dry-run"); err != nil || !strings.Contains(out, "Nothing to change.") {
		t.Fatalf("%v\n%s", err, out)
	}

	w := &world{t: t}
	w.config = t.TempDir() + "/headgate.yaml"
	w.configure("provider: {base_url: \"http://127.0.0.1:1\"}\n")
	worker := exec.Command(os.Args[0], "run", "-c", w.config, "--log-format", "json")
	worker.Env = append(os.Environ(), asProgram+"=1")
	var log syncBuffer
	worker.Stderr = &log
	if err := worker.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = worker.Process.Kill() }()
	eventually(t, "the worker works", func() bool { return strings.Contains(log.String(), `"working"`) })
	out, err := program("publish", "alice", "send", "{}", "--id", "r1", "--log-format", "json")
	if err != nil || !strings.Contains(out, "published: r1") || !strings.Contains(out, "joined the NATS server") {
		t.Errorf("publish beside a worker: %v\n%s", err, out)
	}
	if err := worker.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := worker.Wait(); err != nil {
		t.Errorf("SIGTERM: %v\n%s", err, log.String())
	}
}

// A worker says how it is, to Prometheus, to probes and to people.
func TestWorkerShowsItself(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	port := freePorts(t, 1)[0]
	w.change("shutdown_grace: 30s", fmt.Sprintf("shutdown_grace: 30s\nadmin: 127.0.0.1:%d", port))
	w.api.answer("bob", status(422, "{}"))
	stop := w.worker()
	w.publish("requests.alice.send", `{}`)
	w.publish("requests.bob.send", `{}`)
	w.outcome("RESULTS", "results.alice.>")
	w.outcome("DLQ", "dlq.VALIDATION.bob.>")
	get := func(path string) (int, string) {
		resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d%s", port, path))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body)
	}
	for _, path := range []string{"/livez", "/readyz"} {
		if code, body := get(path); code != 200 {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	eventually(t, "metrics", func() bool {
		_, body := get("/metrics")
		for _, line := range []string{
			`headgate_api_calls_total{class="VALIDATION",operation="*"} 1`, `headgate_api_calls_total{class="ok",operation="*"} 1`,
			`headgate_dead_letters_total{class="VALIDATION"} 1`, "headgate_results_total 1", "headgate_partitions_owned 4", "headgate_api_calls_inside_hold_total 0",
		} {
			if !strings.Contains(body, line+"\n") {
				return false
			}
		}
		return !strings.Contains(body, "alice")
	})
	var workers []ownership.Ownership
	if err := json.Unmarshal([]byte(w.headgate("workers", "-o", "json")), &workers); err != nil || len(workers) != 1 || len(workers[0].Partitions) != 4 {
		t.Errorf("workers: %+v, %v", workers, err)
	}
	var findings []finding
	if err := json.Unmarshal([]byte(w.headgate("doctor", "-o", "json")), &findings); err != nil {
		t.Fatal(err)
	}
	for _, f := range findings {
		if f.Status == isFail || f.Status == isWarn && f.Check != "sync to disk" {
			t.Errorf("%+v", f)
		}
	}
	stop()
	// Without a worker, and without a stream, it says so.
	if err := w.js.DeleteStream(t.Context(), "DLQ"); err != nil {
		t.Fatal(err)
	}
	code, stdout, _ := program(t, "", "doctor", "-c", w.config, "--server", w.url)
	if code != exitFailed || !strings.Contains(stdout, "create stream DLQ") || !strings.Contains(stdout, "no worker runs") {
		t.Errorf("exit code %d: %s", code, stdout)
	}
	if code, _, stderr := program(t, "", "run", "-c", w.config, "--server", w.url); code != exitFailed || !strings.Contains(stderr, "headgate setup") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}
