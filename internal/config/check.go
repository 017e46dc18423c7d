package config

import (
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"
)

var (
	headerName    = regexp.MustCompile("^[A-Za-z0-9!#$%&'*+.^_`|~-]+$") // RFC 9110 section 5.6.2
	namespaceName = regexp.MustCompile(`^[A-Za-z0-9_-]{0,32}$`)
	placeholders  = regexp.MustCompile(`\{[^{}/?]+\}`)
	methods       = []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete}
	bodiless      = []string{http.MethodGet, http.MethodHead, http.MethodDelete}
)

// problems is everything in c that cannot be meant.
func (c *Config) problems() (found []problem) {
	must := func(ok bool, path, format string, args ...any) {
		if !ok {
			found = append(found, problem{"$." + path, fmt.Sprintf(format, args...)})
		}
	}
	between := func(path string, n, least, most int) {
		must(n >= least && n <= most, path, "must be %d to %d, not %d", least, most, n)
	}
	positive := func(path string, d time.Duration) {
		must(d > 0, path, "must be a duration above 0, not %v", d)
	}
	header := func(path, name string) {
		must(name == "" || headerName.MatchString(name), path, "must be the name of an HTTP header, not %q", name)
	}
	limit := func(path string, r Rate, burst int) {
		must(r.PerSecond() == 0 || burst >= 1, path+".burst", "must be at least 1, not %d", burst)
	}

	between("nats.replicas", c.NATS.Replicas, 1, 5)
	must(c.NATS.URL == "" || c.NATS.Context == "", "nats.context", "and nats.url both name a server; keep one")
	must(namespaceName.MatchString(c.Namespace), "namespace", "may have up to 32 letters, digits, _ and -, not %q", c.Namespace)
	between("partitions", c.Partitions, 1, 1024)

	p := c.Provider
	must(p.Name != "", "provider.name", "must not be empty")
	must(p.Profile != "", "provider.profile", "must name a profile, such as generic, or a file")
	if p.BaseURL != "" {
		u, err := url.Parse(p.BaseURL)
		must(err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != "" && u.User == nil && u.RawQuery == "" && u.Fragment == "",
			"provider.base_url", "must be an absolute http or https URL without user, query and fragment")
	}
	header("provider.auth.header", p.Auth.Header)
	switch a := p.Auth; a.Type {
	case AuthKey:
		must(a.Header == "" || a.Env != "", "provider.auth", "needs env, the variable of the environment that holds the API key")
		must(a.TokenURL == "" && a.RefreshTokenEnv == "", "provider.auth.type", "must be refresh_token if there is a token_url or a refresh_token_env")
	case AuthRefresh:
		must(a.Header != "", "provider.auth", "needs header, which carries the access token, such as Authorization")
		must(a.RefreshTokenEnv != "", "provider.auth", "needs refresh_token_env, the variable of the environment that holds the refresh token")
		u, err := url.Parse(a.TokenURL)
		must(err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != "" && u.User == nil, "provider.auth.token_url", "must be an absolute http or https URL, not %q", a.TokenURL)
	default:
		must(false, "provider.auth.type", "must be key or refresh_token, not %q", a.Type)
	}
	header("provider.creator_header", p.CreatorHeader)
	for name := range p.Headers {
		header("provider.headers", name)
	}
	positive("provider.timeout", p.Timeout)
	must(p.MaxResponseBytes >= 1024, "provider.max_response_bytes", "must be at least 1KiB, not %v", p.MaxResponseBytes)

	limit("limits.creator", c.Limits.Creator.Rate, c.Limits.Creator.Burst)
	between("limits.creator.concurrency", c.Limits.Creator.Concurrency, 1, 10_000)
	if r := c.Limits.Creator.Read; r != nil {
		limit("limits.creator.read", r.Rate, r.Burst)
	}
	if r := c.Limits.Creator.Write; r != nil {
		limit("limits.creator.write", r.Rate, r.Burst)
	}
	if r := c.Limits.Account; r != nil {
		must(r.Rate.PerSecond() > 0, "limits.account", "needs a rate, such as 600/m; leave limits.account out for no limit")
		limit("limits.account", r.Rate, r.Burst)
	}
	between("limits.in_flight", c.Limits.InFlight, 1, 100_000)
	positive("limits.retry_after_cap", c.Limits.RetryAfterCap)
	must(c.Limits.CreditsPerDay >= 0, "limits.credits_per_day", "must not be negative, not %v", c.Limits.CreditsPerDay)

	between("breaker.failures", c.Breaker.Failures, 1, 1_000_000)
	positive("breaker.open_for", c.Breaker.OpenFor)
	between("breaker.successes", c.Breaker.Successes, 1, 1_000_000)

	between("retry.attempts", c.Retry.Attempts, 1, 100)
	positive("retry.base", c.Retry.Base)
	must(c.Retry.Max >= c.Retry.Base, "retry.max", "must not be below retry.base (%v), not %v", c.Retry.Base, c.Retry.Max)
	must(c.Retry.Jitter >= 0 && c.Retry.Jitter <= 1, "retry.jitter", "must be 0 to 1, not %v", c.Retry.Jitter)
	between("retry.throttled", c.Retry.Throttled, 0, 100_000)
	positive("retry.max_age", c.Retry.MaxAge)

	must(c.Results.IDInSubject == nil || *c.Results.IDInSubject, "results.id_in_subject",
		"was removed: the id is always part of a result's subject, or a request could get two outcomes; delete the line, and lower results.max_age if the server's memory is short")
	must(c.Results.MaxAge >= 10*time.Minute, "results.max_age", "must be at least 10m, in which duplicates are known, not %v", c.Results.MaxAge)
	positive("dlq.max_age", c.DLQ.MaxAge)
	must(c.BacklogPerSubject >= 1, "backlog_per_subject", "must be at least 1, not %d", c.BacklogPerSubject)
	must(c.ShutdownGrace >= 0, "shutdown_grace", "must not be negative")
	must(c.DataDir != "", "data_dir", "must not be empty")

	for name, op := range c.Operations {
		path := "operations." + quotePath(name)
		op.check(path, must)
	}
	slices.SortFunc(found, func(a, b problem) int { return strings.Compare(a.path, b.path) })
	return found
}

// check says through must what cannot be meant of an operation, which is at path.
func (o Operation) check(path string, must func(ok bool, path, format string, args ...any)) {
	must(slices.Contains(methods, o.Method), path+".method", "must be one of %s, not %q", strings.Join(methods, ", "), o.Method)
	must(strings.HasPrefix(o.Path, "/") && balanced(o.Path) && !strings.ContainsAny(o.Path, "?#"), path+".path",
		"must start with / and may have {name}s, but no query (use query), not %q", o.Path)
	_, err := url.PathUnescape(placeholders.ReplaceAllString(o.Path, "x"))
	must(err == nil, path+".path", "has a %% that is followed by no two hexadecimal digits; write %%25 for a percent sign")
	for key, value := range o.Query {
		must(balanced(value), path+".query."+quotePath(key), "must be text that may have {name}s, not %q", value)
	}
	must(slices.Contains([]string{"", "none", "payload"}, o.Body), path+".body", "must be payload or none, not %q", o.Body)
	must(o.Body != "payload" || o.Method != http.MethodGet && o.Method != http.MethodHead, path+".body", "cannot be sent with %s", o.Method)
	must(slices.Contains([]string{"", "fail", "empty"}, o.NotFound), path+".not_found", "must be fail or empty, not %q", o.NotFound)
	must(o.Expect == "" || o.Expect == "json", path+".expect", "must be json, or left out, not %q", o.Expect)
	must(slices.Contains([]string{"", "dead_letter", "retry"}, o.Uncertain), path+".uncertain", "must be dead_letter or retry, not %q", o.Uncertain)
	must(o.Uncertain == "" || o.Idempotent != nil && !*o.Idempotent, path+".uncertain", "is for operations with idempotent: false")
	must(o.Timeout >= 0, path+".timeout", "must not be negative")
	if r := o.Retry; r != nil {
		must(r.Attempts >= 0 && r.Attempts <= 100, path+".retry.attempts", "must be 1 to 100, not %d", r.Attempts)
		must(r.Base >= 0 && r.Max >= 0, path+".retry", "must not have negative durations")
	}
}

// SendsPayload reports whether the payload is the call's body, which it is by
// default where a method usually has one.
func (o Operation) SendsPayload() bool {
	if o.Body == "" {
		return !slices.Contains(bodiless, o.Method)
	}
	return o.Body == "payload"
}

// balanced reports whether all braces belong to a {name}.
func balanced(s string) bool {
	return !strings.ContainsAny(placeholders.ReplaceAllString(s, ""), "{}")
}

// quotePath makes a key of the file part of a YAML path.
func quotePath(key string) string {
	if regexp.MustCompile(`^[A-Za-z0-9_]+$`).MatchString(key) {
		return key
	}
	return "'" + strings.ReplaceAll(key, "'", `\'`) + "'"
}
