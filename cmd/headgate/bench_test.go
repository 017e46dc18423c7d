package main

import (
	"encoding/json"
	"strings"
	"testing"
)

// Each benchmark runs, small, and ends with a line of JSON.
func TestBench(t *testing.T) {
	t.Setenv(asProgram, "1") // for the server, a process of its own
	for _, args := range []string{
		"isolation --runs 1 --creators 20 --requests 200 --trouble 50 --hanging 5 --latency 1ms --timeout 1s",
		"limits --requests 60 --rate 50 --burst 20 --creators 2 --account-rate 20 --account-burst 5 --account-seconds 2 --latency 1ms",
		"throughput --runs 1 --messages 200 --creators 20 --partitions 4 --latency 1ms",
		"memory --creators 200 --backlog 1000 --others 100 --idle 1",
	} {
		name, _, _ := strings.Cut(args, " ")
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			code, stdout, stderr := program(t, "", append([]string{"bench"}, strings.Fields(args)...)...)
			if code != exitOK {
				t.Fatalf("exit code %d: %s", code, stderr)
			}
			lines := strings.Split(strings.TrimSpace(stdout), "\n")
			var figures struct{ Bench string }
			if err := json.Unmarshal([]byte(lines[len(lines)-1]), &figures); err != nil || figures.Bench != name {
				t.Errorf("%v: %s", err, stdout)
			}
		})
	}
}
