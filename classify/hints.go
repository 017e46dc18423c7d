package classify

import (
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Hints is what the headers of any answer, successes too, say about how to call
// on. The zero value says nothing.
type Hints struct {
	// Exhausted: a window of the rate limit is used up. Do not call for HoldFor.
	Exhausted bool
	HoldFor   time.Duration

	// ConcurrencyLimit is how many calls may be in flight, and
	// ConcurrencyActive how many are, this one included; 0 if not said.
	ConcurrencyLimit, ConcurrencyActive int

	// Credits is what this call cost; 0 if not said.
	Credits float64
}

// Hints reads the headers of an answer that came in at now.
func (p *Profile) Hints(h http.Header, now time.Time) Hints {
	var hints Hints
	hints.HoldFor, hints.Exhausted = p.exhausted(h, clock{now, h}, false)
	if hints.HoldFor == 0 {
		hints.Exhausted = false // until now
	}
	hints.ConcurrencyLimit, hints.ConcurrencyActive = p.slots(h)
	if p.creditsHeader != "" {
		if v := h[p.creditsHeader]; len(v) > 0 {
			credits, err := strconv.ParseFloat(strings.TrimSpace(v[0]), 64)
			if err == nil && credits > 0 && !math.IsInf(credits, 0) {
				hints.Credits = credits
			}
		}
	}
	return hints
}

// slots returns the concurrency limit and the calls in flight, 0 if not said.
func (p *Profile) slots(h http.Header) (limit, active int) {
	read := func(name string) int {
		if v := h[name]; name != "" && len(v) > 0 {
			if n, err := strconv.Atoi(strings.TrimSpace(v[0])); err == nil && n > 0 {
				return n
			}
		}
		return 0
	}
	return read(p.concurrencyLimit), read(p.concurrencyActive)
}

// retryAfterHeaders are read for every profile. All but the last are in seconds,
// or dates.
var retryAfterHeaders = []string{"Retry-After", "X-Ratelimit-Retry-After"}

const retryAfterMillisHeader = "Retry-After-Ms"

// readRetryAfter returns the longest wait that the answer asks for, wherever it
// says so.
func (p *Profile) readRetryAfter(class Class, c *call, clk clock) (time.Duration, bool) {
	var longest time.Duration
	known := false
	note := func(d time.Duration, ok bool) {
		if ok {
			longest, known = max(longest, d), true
		}
	}
	for _, name := range p.retryAfterHeader {
		for _, v := range c.header[name] {
			note(clk.wait(v))
		}
	}
	for _, v := range c.header[retryAfterMillisHeader] {
		note(clk.in(time.Millisecond, v))
	}
	if c.body != nil {
		for _, at := range p.retryAfter {
			note(clk.value(time.Second, c.body.find(at)))
		}
		for _, at := range p.retryAfterMillis {
			note(clk.value(time.Millisecond, c.body.find(at)))
		}
	}
	// A window's end is when to call again only if the window is the trouble.
	if class.Throttled() || class == QuotaExceeded {
		note(p.exhausted(c.header, clk, class == RateLimit || class == QuotaExceeded))
	}
	return longest, known
}

// windowHeaders say how many calls are left in a window, and when it ends.
type windowHeaders struct{ remaining, reset string }

var standardWindows = []windowHeaders{
	{"X-Ratelimit-Remaining", "X-Ratelimit-Reset"},
	{"X-Rate-Limit-Remaining", "X-Rate-Limit-Reset"},
	{"Ratelimit-Remaining", "Ratelimit-Reset"},
}

// exhausted returns when the last of the windows ends that have no calls left. Of
// an answer that says so by itself, refused, a window counts as exhausted
// unless it says that there are calls left.
func (p *Profile) exhausted(h http.Header, clk clock, refused bool) (time.Duration, bool) {
	var longest time.Duration
	known := false
	for _, w := range p.windows {
		resets := h[w.reset]
		if len(resets) == 0 || !spent(h[w.remaining], refused) {
			continue
		}
		for _, v := range resets {
			if d, ok := clk.wait(v); ok {
				longest, known = max(longest, d), true
			}
		}
	}
	for _, v := range h["Ratelimit"] {
		if d, ok := parseRateLimit(v, clk, refused); ok {
			longest, known = max(longest, d), true
		}
	}
	return longest, known
}

// spent reports whether the value of a remaining header is 0, or, of a refused
// call, says nothing.
func spent(values []string, refused bool) bool {
	said := false
	for _, v := range values {
		n, ok := parseDecimal(strings.TrimSpace(v), time.Second)
		if ok && n == 0 {
			return true
		}
		said = said || ok
	}
	return refused && !said
}

// parseRateLimit reads the RateLimit header, in the form of the current draft
// (draft-ietf-httpapi-ratelimit-headers-10: a list of policies, each with r,
// what remains, and t, the seconds until it is more) and in that of the drafts
// before 08 (limit=100, remaining=0, reset=30). It returns the longest wait for
// a policy with nothing left.
func parseRateLimit(s string, clk clock, refused bool) (time.Duration, bool) {
	var longest time.Duration
	known := false
	var old quota
	for s != "" {
		var q quota
		var item string
		item, s = cutUnquoted(s, ',')
		for i := 0; item != ""; i++ {
			var param string
			param, item = cutUnquoted(item, ';')
			name, value, ok := strings.Cut(param, "=")
			if !ok {
				continue // the policy's name
			}
			name, value = strings.TrimSpace(name), strings.TrimSpace(value)
			switch {
			case name == "r":
				q.remaining = []string{value}
			case name == "t":
				q.reset = value
			case name == "remaining" && i == 0:
				old.remaining = []string{value}
			case name == "reset" && i == 0:
				old.reset = value
			}
		}
		if d, ok := q.wait(clk, refused); ok {
			longest, known = max(longest, d), true
		}
	}
	if d, ok := old.wait(clk, refused); ok {
		longest, known = max(longest, d), true
	}
	return longest, known
}

type quota struct {
	remaining []string
	reset     string
}

func (q quota) wait(clk clock, refused bool) (time.Duration, bool) {
	if !spent(q.remaining, refused) {
		return 0, false
	}
	return clk.wait(q.reset)
}

// cutUnquoted cuts s at the first sep outside a quoted string.
func cutUnquoted(s string, sep byte) (before, after string) {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '"':
			quoted = !quoted
		case quoted && s[i] == '\\':
			i++
		case !quoted && s[i] == sep:
			return s[:i], s[i+1:]
		}
	}
	return s, ""
}
