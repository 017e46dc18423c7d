package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// classifyRun runs the command by itself.
func classifyRun(stdin string, args ...string) (stdout, stderr string, err error) {
	cmd := classifyCommand()
	var out, errs bytes.Buffer
	cmd.SetArgs(args)
	cmd.SetIn(strings.NewReader(stdin))
	cmd.SetOut(&out)
	cmd.SetErr(&errs)
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	err = cmd.Execute()
	return out.String(), errs.String(), err
}

func TestClassifyExamples(t *testing.T) {
	data, err := os.ReadFile("../../classify/testdata/examples.json")
	if err != nil {
		t.Fatal(err)
	}
	var cases []map[string]any
	if err := json.Unmarshal(data, &cases); err != nil {
		t.Fatal(err)
	}
	var in strings.Builder
	for _, c := range cases {
		line, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		in.Write(append(line, '\n'))
	}
	out, stderr, err := classifyRun(in.String(), "--batch")
	if err != nil || stderr != "" {
		t.Fatal(err, stderr)
	}
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	if len(lines) != len(cases) {
		t.Fatalf("%d answers to %d cases", len(lines), len(cases))
	}
	for i, c := range cases {
		var got map[string]any
		if err := json.Unmarshal([]byte(lines[i]), &got); err != nil {
			t.Fatal(err)
		}
		want := c["expect"].(map[string]any)
		want["name"] = c["name"]
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got  %v\nwant %v", got, want)
		}
	}
}

func TestClassifyBatch(t *testing.T) {
	for name, c := range map[string]struct{ in, want string }{
		"success":         {`{"name":"a","status":204}`, `{"name":"a","class":null,"retryable":false,"retry_after_ms":null,"code":null,"request_id":null,"action":null,"scope":null,"field":null}`},
		"no name":         {`{"status":404}`, `{"name":null,"class":"NOT_FOUND","retryable":false,"retry_after_ms":null,"code":null,"request_id":null,"action":null,"scope":"request","field":null}`},
		"nothing":         {`{}`, `"class":"UNKNOWN","retryable":true`},
		"all null":        {`{"name":null,"profile":null,"status":null,"headers":null,"body":null,"network_error":null,"now":null}`, `"class":"UNKNOWN"`},
		"spelled oddly":   {`{"status":429,"headers":{"rETRY-aFTER":"3"}}`, `"retry_after_ms":3000`},
		"several lines":   {`{"status":429,"headers":{"Retry-After":["3","9"]}}`, `"retry_after_ms":9000`},
		"a number":        {`{"status":429,"headers":{"Retry-After":4}}`, `"retry_after_ms":4000`},
		"never early":     {`{"status":429,"headers":{"Retry-After":"0.0001"}}`, `"retry_after_ms":1,`},
		"saturates":       {`{"status":429,"headers":{"Retry-After":"99999999999999999999"}}`, `"retry_after_ms":9223372036855,`},
		"body as JSON":    {`{"profile":"ofauth","status":401,"body":{"type":"SESSION_EXPIRED"}}`, `"class":"SESSION_EXPIRED"`},
		"no end of line":  {"\n\n" + `{"status":410}`, `"class":"GONE"`},
		"own file":        {`{"profile":"../../examples/my-api.yaml","status":526}`, `"class":"UPSTREAM_ERROR"`},
		"code with signs": {`{"status":400,"body":"{\"code\":\"<&>\"}"}`, `"code":"<&>"`},
	} {
		out, stderr, err := classifyRun(c.in, "--batch")
		if err != nil || stderr != "" || !strings.Contains(out, c.want) {
			t.Errorf("%s: %v %s\ngot  %swant %s", name, err, stderr, out, c.want)
		}
	}
}

// TestClassifyBatchGoesOn: what is wrong with a line does not cost the others.
func TestClassifyBatchGoesOn(t *testing.T) {
	long := strings.Repeat("x", 1<<20)
	in := strings.Join([]string{
		`{"name":"1","status":404}`, `oops`, `{"name":"3","profile":"nope"}`, `{"name":"4","status":"x"}`, `{"name":"5","now":"noon"}`,
		`{"name":"6","headers":{"A":{}}}`, `{"name":"7","body":7}`, fmt.Sprintf(`{"name":"8","status":400,"body":"{\"code\":\"%s\"}"}`, long),
		`{"name":"9","status":500}`,
	}, "\n")
	out, stderr, err := classifyRun(in, "--batch")
	var exit exitError
	if !errors.As(err, &exit) || exit.code != exitPartly || !strings.Contains(err.Error(), "6 of the lines") {
		t.Errorf("%v", err)
	}
	for i, want := range []string{"line 2: not a case", `line 3: no profile "nope": there are apifreaks,`, "line 4: not a case", "line 5: now \"noon\" must be an RFC 3339 time",
		"a header is a text or a list of texts", "body is a text"} {
		if lines := strings.Split(stderr, "\n"); !strings.Contains(lines[i], want) {
			t.Errorf("stderr %q, want %q", lines[i], want)
		}
	}
	var names []string
	for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
		var a answerJSON
		if err := json.Unmarshal([]byte(line), &a); err != nil {
			t.Fatal(err)
		}
		names = append(names, *a.Name)
		if a.Code != nil && len(*a.Code) > 256 {
			t.Errorf("a code of %d bytes", len(*a.Code))
		}
	}
	if got := strings.Join(names, " "); got != "1 8 9" {
		t.Errorf("answers to %s, want 1 8 9", got)
	}
}

func TestNetworkErrorNames(t *testing.T) {
	for class, names := range map[string]string{
		"NETWORK_ERROR": "conn_refused ECONNREFUSED connection-refused conn_reset ECONNRESET socket_hang_up dns dns_error ENOTFOUND EAI_AGAIN no_such_host broken_pipe EPIPE eof unexpected_eof connection_closed tls ssl_error cert_expired host_unreachable ENETUNREACH no_route_to_host",
		"TIMEOUT":       "timeout ETIMEDOUT connect_timeout read-timeout deadline_exceeded timed_out tls_handshake_timeout",
		"UNKNOWN":       "odd",
	} {
		for _, name := range strings.Fields(names) {
			out, _, err := classifyRun(fmt.Sprintf(`{"network_error":%q}`, name), "--batch")
			if err != nil || !strings.Contains(out, fmt.Sprintf(`"class":%q`, class)) {
				t.Errorf("%s: %v %s, want %s", name, err, out, class)
			}
		}
	}
}

func TestClassifyExplains(t *testing.T) {
	body := filepath.Join(t.TempDir(), "body.json")
	if err := os.WriteFile(body, []byte(`{"type":"SESSION_EXPIRED","error":"gone\u001b[31m","requestId":"r1","actionRequired":"relink_connection"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args, stdin string
		want        []string
	}{
		"session": {args: "--profile ofauth --status 401 --body @" + body, want: []string{
			"ofauth.yaml:", "code SESSION_NOT_PROVIDED, SESSION_EXPIRED", "class         SESSION_EXPIRED", "scope         creator", `action        "relink_connection"`,
			`"gone\x1b[31m"`, `request id    "r1"`, "not called again: a dead letter", "the creator until a person acts"}},
		"limit":       {args: "--status 429 --header Retry-After:90", want: []string{"called again in 1m30s", "the creator for 1m30s"}},
		"limit, mute": {args: "--status 429", want: []string{"called again in 1m0s (the API did not say for how long)"}},
		"success":     {args: "--status 200", want: []string{"success: the answer is the result"}},
		"outage":      {args: "--status 503 --header Retry-After:5", want: []string{"SERVER_ERROR", "if several creators fail, the provider; for 5s"}},
		"backoff":     {args: "--status 500", want: []string{"called again, with backoff"}},
		"401":         {args: "--status 401", want: []string{"suspected     account", "until several creators in a row have met it: then the account"}},
		"key":         {args: `--profile ofauth --status 401 --body {"type":"UNAUTHORIZED"}`, want: []string{"the account, that is, every creator, until a call now and then finds it well"}},
		"refresh":     {args: "--profile fanfare --status 401", want: []string{"the credentials are renewed once"}},
		"slots":       {args: "--profile apifreaks --status 429 --header X-Concurrent-Threads:2 --header X-Concurrent-Threads-Active:2", want: []string{"CONCURRENCY_LIMIT", "fewer calls at once", "2 of 2 in use"}},
		"look-up":     {args: "--profile apifreaks --status 404", want: []string{"an empty result if the operation looks something up"}},
		"no answer":   {args: "--network-error dns", want: []string{"NETWORK_ERROR", "no answer: refused, reset, broken_pipe, eof, dns"}},
		"stdin":       {args: "--profile fanfare --status 200 --body -", stdin: `{"status":"DENIED"}`, want: []string{"DENIED"}},
		"date":        {args: "--status 429 --now 2026-03-01T12:00:00Z --header=Retry-After:2026-03-01T12:00:05Z", want: []string{"in 5s"}},
		"json":        {args: "--status 429 -o json", want: []string{`"class":"RATE_LIMIT"`, `"rule":"base.yaml:`, `"held":"the creator for 1m0s"`}},
		"json, good":  {args: "--status 200 -o json", want: []string{`"class":null`, `"effect":"success`, `"held":null`}},
	} {
		out, stderr, err := classifyRun(c.stdin, strings.Fields(c.args)...)
		if err != nil || stderr != "" {
			t.Errorf("%s: %v %s", name, err, stderr)
		}
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("%s: no %q in\n%s", name, want, out)
			}
		}
	}
}

func TestClassifyRefuses(t *testing.T) {
	wrong := filepath.Join(t.TempDir(), "wrong.yaml")
	if err := os.WriteFile(wrong, []byte("rules:\n- class: LOST\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]struct {
		code int
		text string
	}{
		"":                               {exitUsage, "name --status, --network-error or --batch"},
		"--status 1 -o yaml":             {exitUsage, `unknown output "yaml"; there are table and json`},
		"--status 1 --header oops":       {exitUsage, `header "oops" must be written 'Name: value'`},
		"--status 1 --now noon":          {exitUsage, "must be an RFC 3339 time"},
		"--status 1 --profile nope":      {exitConfig, "there are apifreaks,"},
		"--status 1 --profile " + wrong:  {exitConfig, `wrong.yaml:2:10: unknown class "LOST"; there are RATE_LIMIT`},
		"--status 1 --body @/no/such":    {-1, "read the body"},
		"--batch --status 1":             {-1, "[batch status]"},
		"--status 1 --profile ./no.yaml": {exitConfig, "read profile"},
	} {
		_, _, err := classifyRun("", strings.Fields(args)...)
		var exit exitError
		if err == nil || !strings.Contains(err.Error(), want.text) || want.code >= 0 && (!errors.As(err, &exit) || exit.code != want.code) {
			t.Errorf("%q: %v, want %q and exit code %d", args, err, want.text, want.code)
		}
	}
}
