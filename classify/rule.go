package classify

import (
	"bytes"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// rule says what an answer means that meets all of its conditions.
type rule struct {
	// Conditions. One that is not given is met.
	codes    []pattern // any of them
	statuses statuses
	errors   []Cause     // any of them
	body     []condition // all of them
	headers  []condition
	slots    bool // the concurrency headers say that all slots are taken

	class     Class
	scope     Scope // "": by class and status
	action    string
	retryable bool
	refresh   bool
	done      Done   // "": by the answer
	codeFrom  places // where the code of an answer without one is

	name string // for Failure.Rule
}

// call is one answer, and what has been read from it so far.
type call struct {
	status  int  // 0: no answer
	success bool // by its status
	cause   Cause
	header  http.Header
	body    object
	code    string
	folded  string // code
	slots   bool
}

func (r *rule) matches(c *call) bool {
	if len(r.errors) > 0 {
		return c.status == 0 && slices.ContainsFunc(r.errors, func(e Cause) bool { return e.matches(c.cause) })
	}
	return c.status != 0 && r.statuses.contain(c.status) && (!r.slots || c.slots) &&
		(len(r.codes) == 0 || c.code != "" && matchesFolded(r.codes, c.code, c.folded)) &&
		!slices.ContainsFunc(r.body, func(b condition) bool { return !b.inBody(c.body) }) &&
		!slices.ContainsFunc(r.headers, func(h condition) bool { return !h.inHeader(c.header) })
}

// bare reports whether the status alone decides.
func (r *rule) bare() bool {
	return len(r.codes)+len(r.errors)+len(r.body)+len(r.headers) == 0 && !r.slots
}

// possible is a cheap look whether a success with this body may meet the rule's
// conditions on it. It may err on the side of yes.
func (r *rule) possible(body []byte) bool {
	if len(r.codes) > 0 && !mentionsAny(body, r.codes) {
		return false
	}
	return !slices.ContainsFunc(r.body, func(b condition) bool { return !mentionsAny(body, b.values) })
}

func mentionsAny(body []byte, patterns []pattern) bool {
	return slices.ContainsFunc(patterns, func(p pattern) bool {
		return p.exact || bytes.Contains(body, p.escape) || mayContainFolded(body, p.text)
	})
}

// condition is on one value of the body or one header.
type condition struct {
	path   path
	header string
	values []pattern // any of them
}

func (c condition) inBody(o object) bool {
	s, ok := scalar(o.find(c.path), maxMessage)
	return ok && matchesAny(c.values, s)
}

func (c condition) inHeader(h http.Header) bool {
	return slices.ContainsFunc(h[c.header], func(v string) bool { return matchesAny(c.values, v) })
}

// pattern is a text, of which a * at the start or the end stands for anything. It is
// compared as fold makes it, unless that leaves nothing of it.
type pattern struct {
	written        string
	text           string // folded
	exact          bool
	anyHead, anyTo bool
	escape         []byte // a body without it has text as it is, if at all
}

func parsePattern(s string) pattern {
	p := pattern{written: s, escape: []byte(`\u`)}
	s, p.anyTo = strings.CutSuffix(s, "*")
	s, p.anyHead = strings.CutPrefix(s, "*")
	if p.text = fold(s); p.text == "" {
		p.text, p.exact = s, s != ""
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == '"' || r == '\\' || r == '/' }) {
		p.escape = []byte(`\`)
	}
	return p
}

func (p pattern) matches(s, folded string) bool {
	if !p.exact {
		s = folded
	}
	switch {
	case p.anyHead && p.anyTo:
		return strings.Contains(s, p.text)
	case p.anyHead:
		return strings.HasSuffix(s, p.text)
	case p.anyTo:
		return strings.HasPrefix(s, p.text)
	}
	return s == p.text
}

func (p pattern) names(s, folded string) bool { return !p.anyHead && !p.anyTo && p.matches(s, folded) }

func matchesAny(patterns []pattern, s string) bool { return matchesFolded(patterns, s, fold(s)) }

func matchesFolded(patterns []pattern, s, folded string) bool {
	return slices.ContainsFunc(patterns, func(p pattern) bool { return p.matches(s, folded) })
}

// statuses is a set of HTTP statuses; the empty one stands for all but 2xx.
type statuses []span

type span struct{ from, to int }

var anyStatus = span{-1 << 62, 1 << 62}

func (s statuses) contain(status int) bool {
	if len(s) == 0 {
		return !isSuccess(status)
	}
	return slices.ContainsFunc(s, func(r span) bool { return r.from <= status && status <= r.to })
}

func (s statuses) containSuccess() bool {
	return slices.ContainsFunc(s, func(r span) bool { return r.from <= 299 && 200 <= r.to })
}

func isSuccess(status int) bool { return 200 <= status && status <= 299 }

// parseStatus reads 404, 4xx, 500-599 or any.
func parseStatus(s string) (span, bool) {
	if s == "any" {
		return anyStatus, true
	}
	if family, ok := strings.CutSuffix(s, "xx"); ok && len(family) == 1 && '1' <= family[0] && family[0] <= '9' {
		from := int(family[0]-'0') * 100
		return span{from, from + 99}, true
	}
	first, last, isRange := strings.Cut(s, "-")
	from, err := strconv.Atoi(first)
	to := from
	if err == nil && isRange {
		to, err = strconv.Atoi(last)
	}
	if err != nil || from < 100 || to > 999 || from > to {
		return span{}, false
	}
	return span{from, to}, true
}

func (s span) String() string {
	switch {
	case s == anyStatus:
		return "any"
	case s.from == s.to:
		return strconv.Itoa(s.from)
	case s.from%100 == 0 && s.to == s.from+99:
		return strconv.Itoa(s.from/100) + "xx"
	}
	return fmt.Sprintf("%d-%d", s.from, s.to)
}

// describe says in words what the rule asks for.
func (r *rule) describe() string {
	var conditions []string
	say := func(what string, values ...string) {
		conditions = append(conditions, what+" "+strings.Join(values, ", "))
	}
	if len(r.codes) > 0 {
		say("code", texts(r.codes)...)
	}
	if len(r.statuses) > 0 {
		var list []string
		for _, s := range r.statuses {
			list = append(list, s.String())
		}
		say("status", list...)
	}
	for _, c := range r.body {
		say("body "+c.path.String()+" is", texts(c.values)...)
	}
	for _, c := range r.headers {
		say("header "+c.header+" is", texts(c.values)...)
	}
	if r.slots {
		say("all concurrent calls in use")
	}
	for i, e := range r.errors {
		if i == 0 {
			say("no answer:", string(e))
		} else {
			conditions[len(conditions)-1] += ", " + string(e)
		}
	}
	if len(conditions) == 0 {
		return "any other failure"
	}
	return strings.TrimSpace(strings.Join(conditions, "; "))
}

func texts(patterns []pattern) []string {
	list := make([]string, len(patterns))
	for i, p := range patterns {
		list[i] = p.written
	}
	return list
}
