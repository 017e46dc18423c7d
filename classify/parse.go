package classify

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// base says what a status or a transport error means where a profile is silent.
var base = sync.OnceValue(func() *Profile {
	p, err := Parse("base.yaml", baseFile)
	if err != nil {
		panic(err) // the embedded file is tested
	}
	return p
})

// Parse reads and checks a profile. filename stands in its errors, of which one
// about the contents is a [*ParseError].
func Parse(filename string, data []byte) (*Profile, error) {
	file, err := readFile(filename, data)
	if err != nil {
		return nil, err
	}
	h := file.Headers
	p := &Profile{
		name:          string(file.Name),
		notFoundEmpty: file.NotFound == "empty",

		code: places(file.Body.Code), message: places(file.Body.Message), requestID: places(file.Body.RequestID),
		action: places(file.Body.Action), field: places(file.Body.Field), retryable: places(file.Body.Retryable),
		retryAfter: places(file.Body.RetryAfter), retryAfterMillis: places(file.Body.RetryAfterMS),

		requestIDHeader:  h.RequestID,
		retryAfterHeader: slices.Concat(retryAfterHeaders, h.RetryAfter),
		windows:          slices.Clone(standardWindows),
		concurrencyLimit: string(h.ConcurrencyLimit), concurrencyActive: string(h.ConcurrencyActive),
		creditsHeader: string(h.Credits),
	}
	if len(h.RequestID) == 0 {
		p.requestIDHeader = []string{"X-Request-Id"}
	}
	if (h.Remaining == "") != (h.Reset == "") {
		return nil, place(filename, failAt(h.at, "remaining and reset go together; name both or none"))
	}
	if h.Remaining != "" {
		p.windows = append(p.windows, windowHeaders{string(h.Remaining), string(h.Reset)})
	}
	for i := range file.Rules {
		r, err := file.Rules[i].compile(filename, p)
		if err != nil {
			return nil, place(filename, err)
		}
		p.rules = append(p.rules, r)
	}
	if err := reachable(p.rules, file.Rules); err != nil {
		return nil, place(filename, err)
	}
	// What a code means beats what a status means, whatever their order.
	slices.SortStableFunc(p.rules, func(a, b *rule) int { return min(len(b.codes), 1) - min(len(a.codes), 1) })
	for _, r := range p.rules {
		if r.statuses.containSuccess() {
			p.onSuccess = append(p.onSuccess, r)
		}
	}
	return p, nil
}

// compile checks what no single value can tell.
func (f *ruleFile) compile(filename string, p *Profile) (*rule, error) {
	r := &rule{
		codes: f.Code, statuses: statuses(f.Status), errors: f.Error, body: f.Body, headers: f.Headers,
		slots: f.Concurrency != "",
		class: Class(f.Class), scope: Scope(f.Scope), action: clip(string(f.Action), maxID), refresh: f.Refresh.value,
		done: Done(f.Done), codeFrom: places(f.CodeFrom),
	}
	switch {
	case r.class == "":
		return nil, failAt(f.at, "the rule has no class; there are %s", join(ruleClasses))
	case len(r.errors) > 0 && (len(r.codes)+len(r.statuses)+len(r.body)+len(r.headers) > 0 || r.slots):
		return nil, failAt(f.at, "error stands for no answer at all; it goes with no other condition")
	case len(r.codes) > 0 && len(p.code) == 0:
		return nil, failAt(f.at, "no code can match: say where in the body it is, such as body: {code: error.code}")
	case r.slots && (p.concurrencyLimit == "" || p.concurrencyActive == ""):
		return nil, failAt(f.at, "concurrency: reached needs headers.concurrency_limit and headers.concurrency_active")
	case r.statuses.containSuccess() && len(r.codes)+len(r.body) == 0:
		return nil, failAt(f.at, "the rule makes a failure of every success; add a code or a body condition, or leave 2xx out")
	case r.refresh && r.class != Unauthorized:
		return nil, failAt(f.at, "refresh is for credentials, that is, for the class %s", Unauthorized)
	}
	r.retryable = r.class.Retryable()
	if f.Retryable.said {
		r.retryable = f.Retryable.value
	}
	r.name = fmt.Sprintf("%s:%d: %s", filepath.Base(filename), f.at.Position.Line, r.describe())
	if f.Note != "" {
		r.name += " (" + strings.TrimSpace(string(f.Note)) + ")"
	}
	return r, nil
}

// reachable refuses a rule that can never match, because rules before it leave it
// no status.
func reachable(rules []*rule, files ruleList) error {
	const outside = 1000 // stands for all that is not 100 to 999
	taken := map[int]*ruleFile{}
	for i, r := range rules {
		if len(r.errors) > 0 || len(r.codes) > 0 {
			continue
		}
		var by *ruleFile
		free := false
		for status := 100; status <= outside && !free; status++ {
			if r.statuses.contain(status) {
				by, free = taken[status], taken[status] == nil
			}
		}
		if !free && by != nil {
			return failAt(files[i].at, "the rule can never match: the one in line %d comes first and matches all that this one does",
				by.at.Position.Line)
		}
		if r.bare() {
			for status := 100; status <= outside; status++ {
				if r.statuses.contain(status) && taken[status] == nil {
					taken[status] = &files[i]
				}
			}
		}
	}
	return nil
}
