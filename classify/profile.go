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

// Profile is the knowledge of one provider: where its answers say what went
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

// Rules for answers that the rules of profiles do not see.
var (
	truncated  = &rule{class: InvalidResponse, name: "the answer is larger than allowed and was cut off"}
	unexpected = &rule{class: InvalidResponse, name: "the answer is not what the operation expects"}
)

// Classify says what an answer means; failed is false for a success, of which
// only the RequestID is filled in. The body's code decides before the status,
// the status before the transport error. now is when the answer came in.
func (p *Profile) Classify(a Answer, now time.Time) (f Failure, failed bool) {
	c := call{status: a.Status, header: a.Header, success: isSuccess(a.Status)}
	if c.success && a.Err != nil {
		c.status, c.success = 0, false
	}
	wrong := c.success && (a.Truncated || a.Unexpected != "")
	if c.success && !wrong && !p.mayFail(a.Status, a.Body) {
		return Failure{RequestID: first(c.header, p.requestIDHeader)}, false
	}
	if c.status == 0 {
		c.cause = a.Cause()
	}
	if !a.Truncated {
		c.body = readObject(a.Body)
	}
	if c.body != nil {
		c.code = p.readCode(c.body, !c.success)
		c.folded = fold(c.code)
	}
	if p.concurrencyLimit != "" {
		limit, active := p.slots(c.header)
		c.slots = limit > 0 && active >= limit
	}
	r := p.match(&c)
	switch {
	case r != nil:
	case c.success && a.Truncated:
		r = truncated
	case wrong:
		r = unexpected
	default:
		return Failure{RequestID: p.readRequestID(&c)}, false
	}
	return p.failure(r, &c, a, clock{now, a.Header}), true
}

// mayFail is a cheap look whether a success can be a failure by its body.
func (p *Profile) mayFail(status int, body []byte) bool {
	return slices.ContainsFunc(p.onSuccess, func(r *rule) bool {
		return r.statuses.contain(status) && r.possible(body)
	})
}

// match returns the first rule that c meets: of the profile, otherwise of the base,
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

func (p *Profile) failure(r *rule, c *call, a Answer, clk clock) Failure {
	f := Failure{
		Class: r.class, Retryable: r.retryable, Refresh: r.refresh, Rule: r.name,
		Code:      c.code,
		Message:   p.message.text(c.body, maxMessage),
		RequestID: p.readRequestID(c),
		Action:    p.action.text(c.body, maxID),
		Field:     p.field.text(c.body, maxID),
		Done:      r.certainty(c, a),
		Alone:     r.alone(c),
		Cause:     c.cause,
	}
	if said := r.codeFrom.text(c.body, maxID); said != "" {
		f.Code = said
	}
	f.Scope, f.Suspect = p.scope(r, c, a)
	if r.mayBeSession(c) {
		p.noticeSession(&f, c)
	}
	if f.Action == "" {
		f.Action = r.action
	}
	if f.Action == "" && f.Class == SessionExpired {
		f.Action = relink
	}
	p.wait(&f, c, a, clk)
	switch {
	case c.status == 0:
		f.Detail = a.detail()
		f.Local = c.cause == CauseLocal
		f.Retryable = f.Retryable || f.Local
	case r == unexpected:
		f.Detail = a.Unexpected
	}
	return f
}

// wait says whether and when f is worth another call.
func (p *Profile) wait(f *Failure, c *call, a Answer, clk clock) {
	switch string(p.retryable.raw(c.body)) {
	case "true":
		f.Retryable = true
	case "false":
		f.Retryable = false
	}
	f.RetryAfter, f.RetryAfterKnown = p.readRetryAfter(f.Class, c, clk)
	if !f.RetryAfterKnown && (f.Class == RateLimit || a.Status == http.StatusTooManyRequests && f.Retryable) {
		f.RetryAfter, f.RetryAfterKnown, f.RetryAfterAssumed = assumedWait, true, true
	}
}

// relink is what a person must do about a session that expired, unless the API
// says otherwise.
const relink = "relink_connection"

// scope returns what a failure concerns, and the wider scope that several of its kind
// would show. A rule's own word counts, and so does a code that a rule names. One
// creator's 401 or 429 says little about the key.
func (p *Profile) scope(r *rule, c *call, a Answer) (scope, suspect Scope) {
	switch {
	case r.class == Unauthorized && r.bare() && c.status == http.StatusUnauthorized && (r.scope == "" || r.scope == ScopeAccount && p.foreign(c, a)):
		return ScopeCreator, ScopeAccount
	case r.scope != "":
		return r.scope, ""
	case r.class == RateLimit:
		return ScopeCreator, ScopeAccount
	}
	return defaultScope(r.class, a.Status), ""
}

// foreign reports whether an answer is not in the form in which the provider answers: a
// page of something in front of it, or a code that the profile does not know.
func (p *Profile) foreign(c *call, a Answer) bool {
	return c.body == nil && len(a.Body) > 0 || c.code != "" && !p.named(c.code)
}

// defaultScope is what a failure concerns when its rule does not say so.
func defaultScope(c Class, status int) Scope {
	switch c {
	case SessionExpired:
		return ScopeCreator
	case Billing, QuotaExceeded, Unauthorized:
		return ScopeAccount
	}
	if c.Retryable() && !c.Throttled() && (status == 502 || status == 503 || status == 504) {
		return ScopeProvider
	}
	return ScopeRequest
}

// certainty says whether the API may have done what it was asked.
func (r *rule) certainty(c *call, a Answer) Done {
	switch {
	case r.done != "":
		return r.done
	case c.success && r != truncated && r != unexpected:
		return DoneNo // the answer itself says that it failed
	case a.Uncertain():
		return DoneMaybe
	}
	return DoneNo
}

// alone reports whether a failure is no evidence about the provider's health.
func (r *rule) alone(c *call) bool {
	switch {
	case r.scope == ScopeProvider:
		return false
	case !r.class.Unhealthy(), c.cause == CauseLocal:
		return true
	case c.status == 0:
		return false
	}
	return !slices.ContainsFunc(gateways, func(s span) bool { return s.from <= c.status && c.status <= s.to })
}

// gateways are the statuses by which a gateway, or the provider itself, says that the
// provider is in trouble: those of RFC 9110, and Cloudflare's.
var gateways = []span{{502, 504}, {520, 530}, {598, 599}}

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
