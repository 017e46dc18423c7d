package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/headgate-io/headgate/classify"
)

func classifyCommand() *cobra.Command {
	var o classifyOptions
	cmd := &cobra.Command{
		Use:   "classify",
		Short: "Say what an API's answer means: retry, hold, dead letter, and why",
		Long: `Say what Headgate would make of an API's answer, by a profile: one of
` + strings.Join(classify.Builtins(), ", ") + `, or a file (docs/profiles.md).

With --batch it reads cases from standard input, one JSON object a line, with the
keys name, profile, status, headers, body, network_error and now, and writes one
JSON object a line: name, class, retryable, retry_after_ms, code, request_id,
action, scope and field; null is unknown, and the class of a success.`,
		Example: `  headgate classify --profile ofauth --status 401 --body '{"type":"SESSION_EXPIRED"}'
  headgate classify --profile ./my-api.yaml --status 429 --header 'Retry-After: 5'
  headgate classify --network-error conn_reset -o json
  headgate classify --batch < cases.jsonl`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.batch {
				return classifyBatch(cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr(), o.profile)
			}
			return classifyOne(cmd, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.profile, "profile", "generic", "built-in profile or YAML `file`")
	f.IntVar(&o.status, "status", 0, "HTTP status")
	f.StringArrayVar(&o.headers, "header", nil, "response header, `'Name: value'`; repeat for more")
	f.StringVar(&o.body, "body", "", "response body; `@file` reads a file, - standard input")
	f.StringVar(&o.network, "network-error", "", "what went wrong when there was no answer, such as timeout, conn_reset or dns")
	f.StringVar(&o.now, "now", "", "when the answer came, RFC 3339 (default: now)")
	f.StringVarP(&o.output, "output", "o", "table", "table or json")
	f.BoolVar(&o.batch, "batch", false, "read cases from standard input, one JSON object a line")
	for _, single := range []string{"status", "header", "body", "network-error", "now", "output"} {
		cmd.MarkFlagsMutuallyExclusive("batch", single)
	}
	return cmd
}

type classifyOptions struct {
	profile, body, network, now, output string
	status                              int
	headers                             []string
	batch                               bool
}

func classifyOne(cmd *cobra.Command, o classifyOptions) error {
	usage := func(format string, args ...any) error { return exitError{exitUsage, fmt.Errorf(format, args...)} }
	switch {
	case o.output != "table" && o.output != "json":
		return usage("unknown output %q; there are table and json", o.output)
	case !cmd.Flags().Changed("status") && o.network == "":
		return usage("nothing to classify: name --status, --network-error or --batch")
	}
	p, err := classify.Load(o.profile)
	if err != nil {
		return exitError{exitConfig, err}
	}
	a := classify.Answer{Status: o.status, Header: http.Header{}, Err: networkError(o.network)}
	for _, h := range o.headers {
		name, value, ok := strings.Cut(h, ":")
		if name = strings.TrimSpace(name); !ok || name == "" {
			return usage("header %q must be written 'Name: value'", h)
		}
		a.Header.Add(name, strings.TrimSpace(value))
	}
	now := time.Now()
	if o.now != "" {
		if now, err = time.Parse(time.RFC3339, o.now); err != nil {
			return usage("--now %q must be an RFC 3339 time such as 2026-03-01T12:00:00Z", o.now)
		}
	}
	switch file, isFile := strings.CutPrefix(o.body, "@"); {
	case o.body == "-":
		a.Body, err = io.ReadAll(cmd.InOrStdin())
	case isFile:
		a.Body, err = os.ReadFile(file)
	default:
		a.Body = []byte(o.body)
	}
	if err != nil {
		return fmt.Errorf("read the body: %w", err)
	}

	f, failed := p.Classify(a, now)
	if o.output == "json" {
		return json.NewEncoder(cmd.OutOrStdout()).Encode(struct {
			answerJSON
			Rule   *string `json:"rule"`
			Effect string  `json:"effect"`
			Held   *string `json:"held"`
		}{answer(nil, f, failed), orNull(f.Rule), effect(p, f, failed), orNull(held(f, failed))})
	}
	return explain(cmd.OutOrStdout(), p, a, f, failed)
}

// explain prints a failure for people.
func explain(w io.Writer, p *classify.Profile, a classify.Answer, f classify.Failure, failed bool) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(what, value string) {
		if value != "" {
			fmt.Fprintf(t, "%s\t%s\n", what, value)
		}
	}
	quoted := func(s string) string {
		if s == "" {
			return ""
		}
		return strconv.Quote(s) // the provider's words may hold anything
	}
	row("profile", p.Name())
	row("rule", f.Rule)
	row("class", string(f.Class))
	row("scope", string(f.Scope))
	row("suspected", string(f.Suspect))
	row("cause", string(f.Cause))
	row("detail", quoted(f.Detail))
	row("code", quoted(f.Code))
	row("message", quoted(f.Message))
	row("field", quoted(f.Field))
	row("request id", quoted(f.RequestID))
	row("action", quoted(f.Action))
	row("what happens", effect(p, f, failed))
	row("held", held(f, failed))
	if hints := p.Hints(a.Header, time.Now()); hints.ConcurrencyLimit > 0 {
		row("slots", fmt.Sprintf("%d of %d in use", hints.ConcurrencyActive, hints.ConcurrencyLimit))
	}
	return t.Flush()
}

// effect says what becomes of the request.
func effect(p *classify.Profile, f classify.Failure, failed bool) string {
	switch {
	case !failed:
		return "success: the answer is the result"
	case f.Class == classify.NotFound && p.NotFoundEmpty():
		return "an empty result if the operation looks something up, else a dead letter"
	case f.Refresh:
		return "the credentials are renewed once and the request is called again; then a dead letter"
	case !f.Retryable:
		return "not called again: a dead letter"
	case f.RetryAfterAssumed:
		return fmt.Sprintf("called again in %v (the API did not say for how long)", f.RetryAfter)
	case f.RetryAfterKnown:
		return fmt.Sprintf("called again in %v", f.RetryAfter)
	case f.Class == classify.Unknown:
		return "called again, with backoff, very few times"
	}
	return "called again, with backoff"
}

// held says which creators wait because of a failure.
func held(f classify.Failure, failed bool) string {
	who := "the creator"
	switch f.Scope {
	case classify.ScopeAccount:
		who = "the account, that is, every creator,"
	case classify.ScopeProvider:
		who = "the creator; if several creators fail, the provider;"
	}
	switch {
	case !failed:
	case f.Class == classify.SessionExpired:
		return who + " until a person acts"
	case f.Class == classify.ConcurrencyLimit:
		return "no creator: fewer calls at once"
	case f.Class == classify.RateLimit && f.RetryAfter > 0, f.Class.Unhealthy() && f.RetryAfter > 0:
		return fmt.Sprintf("%s for %v", who, f.RetryAfter)
	case f.Scope == classify.ScopeAccount && !f.Retryable && f.RetryAfter > 0:
		return fmt.Sprintf("%s for %v", who, f.RetryAfter)
	case f.Suspect == classify.ScopeAccount && !f.Retryable:
		return "no creator, until several creators in a row have met it: then the account"
	case f.Scope == classify.ScopeAccount && !f.Retryable:
		return who + " until a call now and then finds it well, or an operator releases it"
	}
	return ""
}

// caseJSON is one line of a batch.
type caseJSON struct {
	Name         *string                `json:"name"`
	Profile      string                 `json:"profile"`
	Status       *int                   `json:"status"`
	Headers      map[string]headerLines `json:"headers"`
	Body         bodyText               `json:"body"`
	NetworkError string                 `json:"network_error"`
	Now          string                 `json:"now"`
}

// headerLines is one value, or a list of them.
type headerLines []string

func (l *headerLines) UnmarshalJSON(data []byte) error {
	switch data[0] {
	case 'n': // null
	case '[':
		return json.Unmarshal(data, (*[]string)(l))
	case '"':
		*l = []string{""}
		return json.Unmarshal(data, &(*l)[0])
	case '{', 't', 'f':
		return errors.New("a header is a text or a list of texts")
	default:
		*l = []string{string(data)}
	}
	return nil
}

// bodyText is a text; an object stands for its own text.
type bodyText []byte

func (b *bodyText) UnmarshalJSON(data []byte) error {
	var s string
	if data[0] == '{' || data[0] == '[' {
		s = string(data)
	} else if err := json.Unmarshal(data, &s); err != nil {
		return errors.New("body is a text")
	}
	*b = bodyText(s)
	return nil
}

// answerJSON is what a batch says of a case.
type answerJSON struct {
	Name         *string         `json:"name"`
	Class        *classify.Class `json:"class"`
	Retryable    bool            `json:"retryable"`
	RetryAfterMS *int64          `json:"retry_after_ms"`
	Code         *string         `json:"code"`
	RequestID    *string         `json:"request_id"`
	Action       *string         `json:"action"`
	Scope        *classify.Scope `json:"scope"`
	Field        *string         `json:"field"`
}

func answer(name *string, f classify.Failure, failed bool) answerJSON {
	a := answerJSON{
		Name: name, Retryable: f.Retryable,
		Code: orNull(f.Code), RequestID: orNull(f.RequestID), Action: orNull(f.Action), Field: orNull(f.Field),
	}
	if failed {
		a.Class, a.Scope = &f.Class, &f.Scope
	}
	if f.RetryAfterKnown {
		ms := f.RetryAfter.Milliseconds()
		if f.RetryAfter%time.Millisecond > 0 {
			ms++ // never early
		}
		a.RetryAfterMS = &ms
	}
	return a
}

func orNull(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

// classifyBatch answers a case a line, in order. What is wrong with a line is said on
// stderr, and the others still go.
func classifyBatch(in io.Reader, out, stderr io.Writer, defaultProfile string) error {
	lines, w := bufio.NewReader(in), bufio.NewWriter(out)
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	profiles := map[string]*classify.Profile{}
	bad := 0
	for number := 1; ; number++ {
		line, readErr := lines.ReadBytes('\n')
		if line = bytes.TrimSpace(line); len(line) > 0 {
			result, err := classifyCase(line, profiles, defaultProfile)
			if err != nil {
				bad++
				fmt.Fprintf(stderr, "line %d: %v\n", number, err)
			} else if err := encoder.Encode(result); err != nil {
				return fmt.Errorf("write the answers: %w", err)
			}
		}
		if readErr == io.EOF {
			break
		}
		if readErr != nil {
			return errors.Join(fmt.Errorf("read the cases: %w", readErr), w.Flush())
		}
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("write the answers: %w", err)
	}
	if bad > 0 {
		return exitError{exitPartly, fmt.Errorf("%d of the lines could not be classified", bad)}
	}
	return nil
}

func classifyCase(line []byte, profiles map[string]*classify.Profile, defaultProfile string) (answerJSON, error) {
	var c caseJSON
	if err := json.Unmarshal(line, &c); err != nil {
		return answerJSON{}, fmt.Errorf("not a case, which is a JSON object in one line: %w", err)
	}
	if c.Profile == "" {
		c.Profile = defaultProfile
	}
	p := profiles[c.Profile]
	if p == nil {
		var err error
		if p, err = classify.Load(c.Profile); err != nil {
			return answerJSON{}, err
		}
		profiles[c.Profile] = p
	}
	now := time.Now()
	if c.Now != "" {
		var err error
		if now, err = time.Parse(time.RFC3339, c.Now); err != nil {
			return answerJSON{}, fmt.Errorf("now %q must be an RFC 3339 time such as 2026-03-01T12:00:00Z", c.Now)
		}
	}
	a := classify.Answer{Header: http.Header{}, Body: c.Body, Err: networkError(c.NetworkError)}
	if c.Status != nil {
		a.Status = *c.Status
	}
	for _, name := range slices.Sorted(maps.Keys(c.Headers)) {
		for _, v := range c.Headers[name] {
			a.Header.Add(name, v)
		}
	}
	f, failed := p.Classify(a, now)
	return answer(c.Name, f, failed), nil
}

// networkErrors are the words by which people name transport errors, in the order in
// which they are looked for: ETIMEDOUT, conn_refused, "socket hang up".
var networkErrors = []struct {
	words []string
	err   error
}{
	{[]string{"dns", "enotfound", "eai_", "getaddrinfo", "no_such_host", "resol"}, &net.DNSError{Err: "no such host"}},
	{[]string{"timeout", "timedout", "timed_out", "deadline"}, os.ErrDeadlineExceeded},
	{[]string{"refused"}, syscall.ECONNREFUSED},
	{[]string{"reset", "abort", "hang_up", "hangup", "goaway"}, syscall.ECONNRESET},
	{[]string{"pipe"}, syscall.EPIPE},
	{[]string{"tls", "ssl", "cert", "x509"}, &net.OpError{Op: "remote error", Err: errors.New("tls: handshake failure")}},
	{[]string{"eof", "closed", "disconnect"}, io.ErrUnexpectedEOF},
	{[]string{"unreach", "no_route"}, &net.OpError{Op: "dial", Err: syscall.EHOSTUNREACH}},
}

// networkError makes the error of a transport from its name. One that it does not
// know is an error of which nothing is known.
func networkError(name string) error {
	if name == "" {
		return nil
	}
	plain := strings.NewReplacer("-", "_", " ", "_").Replace(strings.ToLower(name))
	for _, e := range networkErrors {
		for _, word := range e.words {
			if strings.Contains(plain, word) {
				return e.err
			}
		}
	}
	return errors.New(name)
}
