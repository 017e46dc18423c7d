package main

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
)

// program runs headgate with a standard input and returns all it says.
func program(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errOut bytes.Buffer
	code = run(context.Background(), args, strings.NewReader(stdin), &out, &errOut)
	return code, out.String(), errOut.String()
}

func TestExitCodes(t *testing.T) {
	t.Setenv("NATS_URL", "")
	for name, tc := range map[string]struct {
		args []string
		code int
		says string
	}{
		"help":              {[]string{"help"}, exitOK, ""},
		"no such command":   {[]string{"fly"}, exitUsage, "unknown command"},
		"no such flag":      {[]string{"run", "--fly"}, exitUsage, "unknown flag"},
		"missing argument":  {[]string{"publish", "alice"}, exitUsage, "arg"},
		"no such file":      {[]string{"run", "-c", "nowhere.yaml"}, exitConfig, "nowhere.yaml"},
		"server not there":  {[]string{"setup", "--server", "nats://127.0.0.1:1"}, exitUnreachable, "connect to NATS"},
		"context not there": {[]string{"setup", "--context", "nowhere"}, exitUnreachable, "nowhere"},
		"log level":         {[]string{"setup", "--log-level", "loud"}, exitUsage, "one of trace"},
		"bench on a server": {[]string{"bench", "limits", "--server", "nats://127.0.0.1:1"}, exitUsage, "takes no --server"},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, stderr := program(t, "", tc.args...)
			if code != tc.code || !strings.Contains(stderr, tc.says) {
				t.Errorf("exit code %d, want %d:\n%s", code, tc.code, stderr)
			}
		})
	}
}

func TestRunNeedsAnAPIAndItsKey(t *testing.T) {
	server := natsservertest.URL(t)
	if code, _, stderr := program(t, "", "run", "--server", server); code != exitConfig || !strings.Contains(stderr, "provider.base_url") {
		t.Errorf("exit code %d:\n%s", code, stderr)
	}
	t.Setenv("HEADGATE_PROVIDER_BASE_URL", "http://127.0.0.1:1")
	t.Setenv("HEADGATE_PROVIDER_AUTH_HEADER", "apiKey")
	t.Setenv("HEADGATE_PROVIDER_AUTH_ENV", "NOT_SET_ANYWHERE")
	if code, _, stderr := program(t, "", "run", "--server", server); code != exitConfig || !strings.Contains(stderr, "NOT_SET_ANYWHERE") {
		t.Errorf("exit code %d:\n%s", code, stderr)
	}
}

func TestPublish(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	if out := w.headgate("publish", "alice", "send", `{"a":1}`, "--id", "r1"); !strings.HasPrefix(out, "published: r1 (sequence 1)") {
		t.Error(out)
	}
	if out := w.headgate("publish", "alice", "send", `{"a":1}`, "--id", "r1"); !strings.HasPrefix(out, "duplicate") {
		t.Error(out)
	}
	for name, args := range map[string][]string{
		"empty creator":    {"publish", "", "send", "{}"},
		"wildcard":         {"publish", "*", "send", "{}"},
		"long creator":     {"publish", strings.Repeat("x", 200), "send", "{}"},
		"server's header":  {"publish", "alice", "send", "{}", "--header", "Nats-TTL=1s"},
		"no header at all": {"publish", "alice", "send", "{}", "--header", "x"},
	} {
		code, _, stderr := program(t, "", append(args, "--server", w.url, "-c", w.config)...)
		if code == exitOK || stderr == "" {
			t.Errorf("%s: exit code %d, %q", name, code, stderr)
		}
	}
	if n := w.messages("REQUESTS"); n != 1 {
		t.Errorf("%d requests are stored", n)
	}
}

func TestPublishFile(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	lines := strings.Join([]string{
		`{"creator":"alice","operation":"send","payload":{"n":1},"id":"1"}`,
		`{"creator":"","operation":"send"}`,
		``,
		`not JSON`,
		`{"creator":"alice","operation":"send","payload_base64":"AAE=","id":"2"}`,
		`{"creator":"alice","opration":"send"}`,
		`{"creator":"alice","operation":"send","payload":{"n":1},"id":"1"}`,
		`{"creator":"alice","operation":"send","payload_base64":"?"}`,
	}, "\n")
	code, stdout, stderr := program(t, lines, "publish", "--file", "-", "--server", w.url, "-c", w.config)
	if code != exitPartly || stdout != "published 2, duplicates 1, failed 4\n" {
		t.Errorf("exit code %d, %q", code, stdout)
	}
	for _, want := range []string{"line 2: creator:", "line 4: not a request", `line 6: not a request: json: unknown field "opration"`, "line 8: payload_base64"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("standard error lacks %q:\n%s", want, stderr)
		}
	}
	if n := w.messages("REQUESTS"); n != 2 {
		t.Errorf("%d requests are stored", n)
	}
}

func TestSetup(t *testing.T) {
	url := natsservertest.URL(t)
	code, plan, _ := program(t, "", "setup", "--dry-run", "--server", url)
	if code != exitOK || !strings.Contains(plan, "REQUESTS") || !strings.Contains(plan, "Nothing was changed.") {
		t.Fatalf("exit code %d\n%s", code, plan)
	}
	if code, again, _ := program(t, "", "setup", "--dry-run", "--server", url); code != exitOK || again != plan {
		t.Errorf("--dry-run changed something: exit code %d\n%s", code, again)
	}
	if code, out, _ := program(t, "", "setup", "-o", "json", "--server", url); code != exitOK || !strings.Contains(out, `"action":"create"`) {
		t.Errorf("exit code %d\n%s", code, out)
	}
	if code, out, _ := program(t, "", "setup", "--server", url); code != exitOK || out != "Nothing to change.\n" {
		t.Errorf("exit code %d\n%s", code, out)
	}
	t.Setenv("HEADGATE_DLQ_MAX_AGE", "240h")
	if code, out, _ := program(t, "", "setup", "--dry-run", "--server", url); code != exitOK || !strings.Contains(out, "max_age: 720h0m0s → 240h0m0s") {
		t.Errorf("exit code %d\n%s", code, out)
	}
}

// The demo is what a new user runs first. A small one, to the end.
func TestDemo(t *testing.T) {
	code, stdout, stderr := program(t, "", "demo", "--requests", "300", "--listen", "127.0.0.1:0")
	if code != exitOK {
		t.Fatalf("exit code %d:\n%s", code, stderr)
	}
	for _, want := range []string{"300 REQUESTS FOR 50 CREATORS", "calls inside a Retry-After window │        0", "stream subjects DLQ"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("the summary lacks %q:\n%s", want, stdout)
		}
	}
	if !strings.Contains(stderr, "300 of 300 requests settled") {
		t.Errorf("not all were settled:\n%s", stderr)
	}
}
