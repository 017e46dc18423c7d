package classify

import (
	"embed"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// Profile is what is known of one provider: where its answers say what went
// wrong, and what that means. It is read-only and safe for concurrent use.
type Profile struct {
	name          string
	notFoundEmpty bool

	code, message, requestID, action, field places
	retryable                               places
	retryAfter, retryAfterMillis            places

	requestIDHeader   []string // canonical, as all header names here
	retryAfterHeader  []string
	windows           []windowHeaders
	concurrencyLimit  string
	concurrencyActive string
	creditsHeader     string

	rules     []*rule
	onSuccess []*rule // those of rules that can make a failure of a success
}

// places is where to look, in this order.
type places []path

//go:embed profiles/*.yaml
var profileFiles embed.FS

//go:embed base.yaml
var baseFile []byte

var builtin = sync.OnceValue(func() map[string]*Profile {
	entries, err := profileFiles.ReadDir("profiles")
	if err != nil {
		panic(err) // the embedded files are tested
	}
	all := make(map[string]*Profile, len(entries))
	for _, e := range entries {
		data, err := profileFiles.ReadFile("profiles/" + e.Name())
		if err != nil {
			panic(err)
		}
		p, err := Parse(e.Name(), data)
		if err != nil {
			panic(err)
		}
		all[p.name] = p
	}
	return all
})

// Builtin returns a profile that comes with Headgate.
func Builtin(name string) (*Profile, bool) {
	p, ok := builtin()[name]
	return p, ok
}

// Builtins names the profiles that come with Headgate, sorted.
func Builtins() []string {
	names := make([]string, 0, len(builtin()))
	for name := range builtin() {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Load returns the built-in profile of that name, or reads a file: what has a
// slash, or ends in .yaml or .yml, is a path.
func Load(nameOrPath string) (*Profile, error) {
	if !strings.ContainsRune(nameOrPath, '/') && !strings.HasSuffix(nameOrPath, ".yaml") && !strings.HasSuffix(nameOrPath, ".yml") {
		if p, ok := Builtin(nameOrPath); ok {
			return p, nil
		}
		return nil, fmt.Errorf("no profile %q: there are %s, or name a file, such as ./my-api.yaml",
			nameOrPath, strings.Join(Builtins(), ", "))
	}
	data, err := os.ReadFile(nameOrPath)
	if err != nil {
		return nil, fmt.Errorf("read profile: %w", err)
	}
	return Parse(nameOrPath, data)
}

// Name returns the profile's name.
func (p *Profile) Name() string { return p.name }

// NotFoundEmpty reports whether, unless an operation says otherwise, a 404 of a
// look-up (GET) is a valid answer: there is nothing. Its class is NOT_FOUND all the same.
func (p *Profile) NotFoundEmpty() bool { return p.notFoundEmpty }

// assumedWait is how long a rate limit lasts that does not say so.
const assumedWait = time.Minute

var truncated = &rule{class: InvalidResponse, name: "the answer is larger than allowed and was cut off"}

// Classify says what an answer means; failed is false for a success, of which
// only the RequestID is filled in. The body's code decides before the status,
// the status before the transport error. now is when the answer came in.
func (p *Profile) Classify(a Answer, now time.Time) (f Failure, failed bool) {
	c := call{status: a.Status, header: a.Header, success: isSuccess(a.Status)}
	if c.success && a.Err != nil {
		c.status, c.success = 0, false
	}
	if c.success && !a.Truncated && !p.mayFail(a.Status, a.Body) {
		return Failure{RequestID: first(c.header, p.requestIDHeader)}, false
	}
	if c.status == 0 {
		c.transport = transportOf(a.Err)
	}
	if !a.Truncated {
		c.body = readObject(a.Body)
	}
	if c.body != nil {
		c.code = p.readCode(c.body)
	}
	if p.concurrencyLimit != "" {
		limit, active := p.slots(c.header)
		c.slots = limit > 0 && active >= limit
	}
	r := p.match(&c)
	if r == nil && c.success && a.Truncated {
		r = truncated
	}
	if r == nil {
		return Failure{RequestID: p.readRequestID(&c)}, false
	}
	return p.failure(r, &c, a.Status, clock{now, a.Header}), true
}

// mayFail is a cheap look whether a success can be a failure by its body.
func (p *Profile) mayFail(status int, body []byte) bool {
	return slices.ContainsFunc(p.onSuccess, func(r *rule) bool {
		return r.statuses.contain(status) && r.possible(body)
	})
}

// match returns the first rule that c meets: of the profile, else of the base,
// which knows every failure. It returns nil for a success.
func (p *Profile) match(c *call) *rule {
	if c.success {
		return firstMatch(p.onSuccess, c)
	}
	if r := firstMatch(p.rules, c); r != nil {
		return r
	}
	return firstMatch(base().rules, c)
}

func firstMatch(rules []*rule, c *call) *rule {
	for _, r := range rules {
		if r.matches(c) {
			return r
		}
	}
	return nil
}

func (p *Profile) failure(r *rule, c *call, status int, clk clock) Failure {
	f := Failure{
		Class: r.class, Scope: r.scope, Retryable: r.retryable, Refresh: r.refresh, Rule: r.name,
		Code:      c.code,
		Message:   p.message.text(c.body, maxMessage),
		RequestID: p.readRequestID(c),
		Action:    p.action.text(c.body, maxID),
		Field:     p.field.text(c.body, maxID),
	}
	if f.Action == "" {
		f.Action = r.action
	}
	if f.Scope == "" {
		f.Scope = defaultScope(r.class, status)
	}
	switch string(p.retryable.raw(c.body)) {
	case "true":
		f.Retryable = true
	case "false":
		f.Retryable = false
	}
	f.RetryAfter, f.RetryAfterKnown = p.readRetryAfter(r.class, c, clk)
	if !f.RetryAfterKnown && (f.Class == RateLimit || status == http.StatusTooManyRequests && f.Retryable) {
		f.RetryAfter, f.RetryAfterKnown, f.RetryAfterAssumed = assumedWait, true, true
	}
	return f
}

// defaultScope is whom a failure concerns when its rule does not say so.
func defaultScope(c Class, status int) Scope {
	switch c {
	case RateLimit, SessionExpired:
		return ScopeCreator
	case Billing, QuotaExceeded, Unauthorized:
		return ScopeAccount
	}
	if c.Retryable() && !c.Throttled() && (status == 502 || status == 503 || status == 504) {
		return ScopeProvider
	}
	return ScopeRequest
}

// readCode returns the provider's code. Where the profile says to look first, any
// text is one; a number, and what is found elsewhere, only if a rule names it.
func (p *Profile) readCode(o object) string {
	for i, at := range p.code {
		raw := o.find(at)
		if s := text(raw, maxID); s != "" && (i == 0 || p.named(s)) {
			return s
		}
		if s := number(raw); s != "" && p.named(s) {
			return s
		}
	}
	return ""
}

func (p *Profile) named(code string) bool {
	return slices.ContainsFunc(p.rules, func(r *rule) bool {
		return slices.ContainsFunc(r.codes, func(c pattern) bool { return c.exactly(code) })
	})
}

func (p *Profile) readRequestID(c *call) string {
	if id := p.requestID.text(c.body, maxID); id != "" {
		return id
	}
	return first(c.header, p.requestIDHeader)
}

func (ps places) text(o object, limit int) string {
	if o == nil {
		return ""
	}
	for _, at := range ps {
		if s := text(o.find(at), limit); s != "" {
			return s
		}
	}
	return ""
}

func (ps places) raw(o object) []byte {
	if o == nil {
		return nil
	}
	for _, at := range ps {
		if raw := o.find(at); raw != nil {
			return raw
		}
	}
	return nil
}

// first returns the first of the headers that says something.
func first(h http.Header, names []string) string {
	for _, name := range names {
		for _, v := range h[name] {
			if v = strings.TrimSpace(v); v != "" {
				return clip(v, maxID)
			}
		}
	}
	return ""
}
