package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const allInOneConfig = `
listen: 127.0.0.1:PORT
data_dir: DIR
partitions: 4
provider:
  name: alone
  profile: generic
  base_url: %s
  creator_header: x-creator
  timeout: 10s
limits:
  creator: {rate: inf, concurrency: 3}
retry: {attempts: 4, base: 100ms, max: 1s, max_age: 1h}
operations:
  "*": {method: POST, path: "/{operation}", body: payload}
  pay: {method: POST, path: /pay, body: payload, idempotent: false}
`

// TestAllInOneKilled kills -9, again and again under load, a program that is worker and server in one, so
// that what the server had not written to its disk is forgotten together with all that the worker knew. The
// API changes its mind, and ids are used again: by then the server has forgotten them.
func TestAllInOneKilled(t *testing.T) {
	chaos(t)
	kills := 6
	if *long {
		kills = 300
	}
	api := &mindAPI{latency: 40 * time.Millisecond}
	server := httptest.NewServer(api)
	defer server.Close()
	dir := t.TempDir()
	port := freePorts(t, 1)[0]
	config := strings.NewReplacer("PORT", fmt.Sprint(port), "DIR", filepath.Join(dir, "nats")).Replace(fmt.Sprintf(allInOneConfig, server.URL))
	path := filepath.Join(dir, "headgate.yaml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	start := func(n int) *exec.Cmd {
		cmd := exec.Command(os.Args[0], "run", "-c", path, "--log-format", "json")
		cmd.Env = append(os.Environ(), asProgram+"=1", "NATS_URL=")
		log, err := os.Create(filepath.Join(dir, fmt.Sprintf("run-%d.log", n)))
		if err != nil {
			t.Fatal(err)
		}
		defer log.Close()
		cmd.Stderr = log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	worker := start(0)
	defer func() {
		_ = worker.Process.Kill()
		_ = worker.Wait()
	}()
	var nc *nats.Conn
	eventually(t, "the server takes connections", func() (ok bool) {
		var err error
		nc, err = nats.Connect(fmt.Sprintf("nats://127.0.0.1:%d", port), nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond))
		return err == nil
	})
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	var books books
	ctx, cancel := context.WithCancel(t.Context())
	var load sync.WaitGroup
	load.Go(func() { publishAgain(ctx, js, &books, 40, 8*time.Millisecond) })
	defer load.Wait()
	defer cancel()

	for n := range kills {
		within(t, patience, "calls are in flight", func() bool { return api.inFlight() > 3 })
		time.Sleep(time.Duration(rand.IntN(400)) * time.Millisecond)
		if exited(worker.Process.Pid) {
			log, _ := os.ReadFile(filepath.Join(dir, fmt.Sprintf("run-%d.log", n)))
			t.Fatalf("the program ended by itself:\n%s", log[max(0, len(log)-2000):])
		}
		_ = worker.Process.Kill()
		_ = worker.Wait()
		worker = start(n + 1)
	}
	time.Sleep(2 * time.Second)
	cancel()
	load.Wait()
	api.judge(t, allSettled(t, js, &books, 5*time.Minute))
}

// publishAgain publishes requests until ctx ends. One in ten has an id that was used before, by the
// same creator, as a rule, or by another one.
func publishAgain(ctx context.Context, js jetstream.JetStream, b *books, creators int, every time.Duration) {
	t := time.NewTicker(every)
	defer t.Stop()
	var before []entry
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		e := entry{fmt.Sprintf("creator-%d", n%creators), []string{"send", "pay"}[n%4/3], fmt.Sprintf("r-%d", n)}
		if len(before) > 200 && rand.IntN(10) == 0 {
			old := before[rand.IntN(len(before))]
			e.id = old.id
			if rand.IntN(3) > 0 {
				e = old
			}
		}
		b.publish(ctx, js, e)
		before = append(before, e)
	}
}

// allSettled waits until every acknowledged request has its outcome, and none has two.
func allSettled(t *testing.T, js jetstream.JetStream, b *books, within time.Duration) []storedOutcome {
	t.Helper()
	nothingLeft := time.Time{}
	for began := time.Now(); ; time.Sleep(time.Second) {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		missing, double, all, err := b.compare(ctx, js)
		if s, err := js.Stream(ctx, "REQUESTS"); err != nil || s.CachedInfo().State.Msgs > 0 {
			nothingLeft = time.Time{}
		} else if nothingLeft.IsZero() {
			nothingLeft = time.Now()
		}
		cancel()
		if len(double) > 0 {
			t.Errorf("%d requests have two outcomes: %v", len(double), double[:min(5, len(double))])
			return all
		}
		if err == nil && len(missing) == 0 {
			t.Logf("%d acknowledged requests have their outcomes, %v after the last", b.count(), time.Since(began).Round(time.Millisecond))
			return all
		}
		if time.Since(began) > within || !nothingLeft.IsZero() && time.Since(nothingLeft) > 30*time.Second {
			t.Errorf("%d of %d requests have no outcome: %v (%v)", len(missing), b.count(), missing[:min(5, len(missing))], err)
			return all
		}
	}
}
