package consumer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// simOutcome is a stored result, tombstone or dead letter.
type simOutcome struct {
	subject string
	place   string // creator, operation and id, as tokens
	seq     uint64
	stored  time.Time
	class   classify.Class // "": a result
	letter  bool           // in the DLQ
	source  uint64         // its request's sequence; 0: it does not say
	number  int            // of the request, in its body; -1: not known
	calls   int            // that it says were made; -1: it does not say
}

func (o simOutcome) String() string {
	return fmt.Sprintf("%s (%s, of request %d, stored as %d)", o.subject, orResult(o.class), o.source, o.seq)
}

func orResult(c classify.Class) string {
	if c == "" {
		return "result"
	}
	return string(c)
}

// read returns all outcomes of a stream.
func (w *world) read(ctx context.Context, stream string) (all []simOutcome, err error) {
	s, err := w.js.Stream(ctx, stream)
	if err != nil {
		return nil, err
	}
	state := s.CachedInfo().State
	for seq := state.FirstSeq; seq <= state.LastSeq && state.Msgs > 0; seq++ {
		m, err := s.GetMsg(ctx, seq)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read message %d of %s: %w", seq, stream, err)
		}
		if strings.HasPrefix(m.Subject, "fence.") {
			continue
		}
		all = append(all, w.outcomeOf(ctx, m))
	}
	return all, nil
}

func (w *world) outcomeOf(ctx context.Context, m *jetstream.RawStreamMsg) simOutcome {
	tokens := strings.Split(m.Subject, ".")
	o := simOutcome{subject: m.Subject, seq: m.Sequence, stored: m.Time, number: -1, calls: callsSaid(m.Header)}
	source := publisher.DlqSourceSeq
	if o.letter = tokens[0] == "dlq"; o.letter {
		o.class = classify.Class(tokens[1])
		tokens = tokens[1:]
	} else {
		source = headerSourceSeq
		o.class = classify.Class(m.Header.Get(headerDeadLetter))
	}
	o.place = strings.Join(tokens[1:], ".")
	o.source, _ = strconv.ParseUint(m.Header.Get(source), 10, 64)
	if o.class != "" && !o.letter {
		return o // a tombstone
	}
	body, err := publisher.Body(ctx, w.js, w.cfg.Topology.Namespace, m.Header, m.Data)
	if err != nil {
		w.violation("the body of %s cannot be read: %v", m.Subject, err)
	}
	if n, err := numberIn(body); err == nil {
		o.number = n
	}
	if o.source == 0 {
		o.source = w.sourceOf(o)
	}
	return o
}

// callsSaid is how many calls an outcome says were made; -1: it does not say.
func callsSaid(h nats.Header) int {
	for _, name := range []string{publisher.HeaderAttempts, publisher.DlqAttempts} {
		if n, err := strconv.Atoi(h.Get(name)); err == nil {
			return n
		}
	}
	return -1
}

// sourceOf finds the request of an outcome that does not say whose it is.
func (w *world) sourceOf(o simOutcome) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range w.requests {
		if r.number >= 0 && r.number == o.number && strings.HasSuffix(o.place, publisher.IDToken("x" + r.replay)[1:]) && (r.replay != "" || !strings.Contains(o.place, "=7Er")) {
			return r.seq
		}
	}
	return 0
}

// Headers of the outcomes in RESULTS.
const (
	headerSourceSeq  = "Headgate-Source-Seq"
	headerDeadLetter = "Headgate-Dead-Letter"
)

// outcomes are all that are stored, or were when an operator removed them.
func (w *world) outcomes() ([]simOutcome, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	results, err := w.read(ctx, "RESULTS")
	if err != nil {
		return nil, err
	}
	letters, err := w.read(ctx, "DLQ")
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	all := append(results, letters...)
	for _, o := range w.gone {
		if !slices.ContainsFunc(all, func(l simOutcome) bool { return l.letter && l.seq == o.seq }) { // once, however often it was tried
			all = append(all, o)
		}
	}
	return all, nil
}

// check compares the requests that are stored, or were, with the outcomes: each has one, and nothing
// else has.
func (w *world) check() (missing string, err error) {
	all, err := w.outcomes()
	if err != nil {
		return "", err
	}
	w.mu.Lock()
	requests := slices.Clone(w.requests)
	w.mu.Unlock()
	bySource, byPlace, known := map[uint64][]simOutcome{}, map[string][]simOutcome{}, map[uint64]bool{}
	for _, o := range all {
		bySource[o.source] = append(bySource[o.source], o)
		byPlace[o.place] = append(byPlace[o.place], o)
	}
	places := map[string]int{}
	for _, r := range requests {
		known[r.seq] = true
		places[r.place()]++
	}
	for _, r := range requests {
		if !w.ended(r, bySource[r.seq], byPlace[r.place()], places[r.place()]) && !r.removed {
			missing = fmt.Sprintf("request %d (%q on %s %s) of %d has no outcome", r.seq, clipID(r.id), r.subject, r.malformed, len(requests))
		}
	}
	for _, o := range all {
		if id := o.place[strings.LastIndex(o.place, ".")+1:]; !known[o.source] && !w.isAsked(id) {
			w.violation("an outcome without a request: %v", o)
		}
	}
	return missing, nil
}

func clipID(s string) string { return s[:min(len(s), 40)] }

// isAsked reports whether an id, as a token, is a request's, or the one of a request without an id.
func (w *world) isAsked(token string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.asked[token] || strings.Contains(token, "-") && strings.Trim(token, "0123456789-") == ""
}

// place is where a request's outcome is expected; "": not known.
func (r *simRequest) place() string {
	if r.id == "" || r.creator == "" {
		return ""
	}
	return r.creator + "." + r.operation + "." + publisher.IDToken(r.id)
}

// ended reports whether a request has its outcome: its own, or the answer that its id has already.
func (w *world) ended(r *simRequest, own, place []simOutcome, sharing int) bool {
	var results, tombstones, letters []simOutcome
	answered := false
	for _, o := range own {
		switch {
		case o.letter:
			letters = append(letters, o)
		case o.class != "":
			tombstones = append(tombstones, o)
		default:
			results = append(results, o)
		}
	}
	if r.place() != "" {
		unsigned := 0
		for _, o := range place {
			if o.class == "" {
				answered = true
				if o.source == 0 {
					unsigned++
				}
			}
		}
		if sharing == 1 && unsigned > 0 && len(letters) > 0 {
			w.violation("request %d has a result and a dead letter: %v", r.seq, place)
		}
		if unsigned > 1 {
			w.violation("%s has %d results: %v", r.place(), unsigned, place)
		}
	}
	dead := len(letters) + len(tombstones)
	switch {
	case len(results) > 0 && dead > 0, len(results) > 1, len(letters) > 1 && !w.cameBack(letters), len(tombstones) > 1:
		w.violation("request %d (%s) has more than one outcome: %v", r.seq, r.malformed, own)
	case len(letters) > 0 && len(tombstones) > 0 && letters[0].class != tombstones[0].class:
		w.violation("request %d: the dead letter is not what its place says: %v", r.seq, own)
	case len(letters) > 0 && len(tombstones) == 0 && tombstonesFirst:
		w.violation("request %d: its dead letter has not taken its place first: %v", r.seq, own)
	}
	for _, o := range own {
		if o.number != r.number && o.number >= 0 && r.number >= 0 && r.malformed == "" {
			w.violation("request %d is number %d, and its outcome says %d: %v", r.seq, r.number, o.number, o)
		}
		w.judgeOutcome(r, o)
	}
	return len(results) > 0 || len(letters) > 0 || answered
}

// cameBack reports whether all but the last one of a request's letters had been removed by an operator, and
// the worker may not have heard that it was stored: then it stores it again.
func (w *world) cameBack(letters []simOutcome) bool {
	slices.SortFunc(letters, func(a, b simOutcome) int { return a.stored.Compare(b.stored) })
	last := len(letters) - 1
	if !w.nasty.lossy && !w.vanished(letters[0].stored.Add(-time.Minute), letters[last].stored) {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range letters[:last] {
		if !slices.ContainsFunc(w.gone, func(o simOutcome) bool { return o.seq == l.seq }) {
			return false
		}
	}
	return true
}

// tombstonesFirst: each dead letter has a tombstone among the results.
const tombstonesFirst = true

// judgeOutcome looks at one outcome of a request.
func (w *world) judgeOutcome(r *simRequest, o simOutcome) {
	calls := w.callsOf(r)
	w.judgeCount(r, o, slices.Clone(calls))
	if !o.letter {
		return
	}
	age := o.stored.Sub(r.stored)
	switch o.class {
	case classify.Uncertain:
		if len(calls) == 0 && r.number >= 0 && !w.vanished(r.stored, o.stored) {
			w.violation("request %d (%s) is UNCERTAIN, and was never called", r.seq, r.id)
		}
	case classify.Expired:
		if age < w.maxAge-time.Minute && r.malformed == "" {
			w.violation("request %d (%s) is EXPIRED after %v", r.seq, r.id, age)
		}
	case classify.Unknown:
		if w.nasty.tokens {
			w.violation("request %d (%s) is UNKNOWN, although the API says what is wrong: a token that cannot be renewed?", r.seq, r.id)
		}
	case classify.Poison:
		if vanished := len(w.crashes) + len(w.troubles); vanished < 3 {
			w.violation("request %d (%s) is POISON, and workers vanished %d times", r.seq, r.id, vanished)
		}
	case classify.MalformedRequest:
		if r.malformed == "" && r.number >= 0 && !strings.HasPrefix(r.id, "m-") && !o.empty(r) {
			w.violation("request %d (%s) is well-formed: %v", r.seq, r.id, o)
		}
	}
	if r.operation == "pay" && o.class != classify.Uncertain && len(calls) > 0 && r.number >= 0 {
		last := calls[len(calls)-1]
		if !last.certain && last.start.Before(o.stored) && !w.ledgerWasLost(last.start, o.stored) {
			w.violation("request %d (%s) must not be called twice; its last call's answer (%d) is not certain, and it is %s, not UNCERTAIN", r.seq, r.id, last.status, o.class)
		}
	}
}

// judgeCount compares the calls that an outcome counts with those that the API saw, where nothing can have
// kept a worker from counting. What became of a call that UNCERTAIN and INTERNAL are about is not counted.
func (w *world) judgeCount(r *simRequest, o simOutcome, calls []*simCall) {
	n := w.nasty
	if !n.on || n.lossy || n.full || n.tokens || o.calls < 0 || r.number < 0 || o.class == classify.Uncertain || o.class == classify.Internal {
		return
	}
	calls = slices.DeleteFunc(calls, func(c *simCall) bool { return c.cut })
	if o.calls == len(calls) {
		return
	}
	from := r.stored
	if len(calls) > 0 {
		from = calls[0].start.Add(-time.Second)
	}
	if !w.vanished(from, o.stored) && !w.ledgerWasLost(from, o.stored) {
		w.violation("request %d (%s): the API saw %d calls, and its outcome says %d: %v", r.seq, clipID(r.id), len(calls), o.calls, o)
	}
}

// empty reports whether a letter is one of a replay whose first letter had lost its payload.
func (o simOutcome) empty(r *simRequest) bool { return r.replay != "" && o.number < 0 }

// callsOf are the calls of one stored request. Requests of one id are told apart by their numbers.
func (w *world) callsOf(r *simRequest) (all []*simCall) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.calls {
		if c.number == r.number && c.replay == r.replay {
			all = append(all, c)
		}
	}
	return all
}

// vanished reports whether a worker may have vanished in a time, before a call that it had marked.
func (w *world) vanished(from, till time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, at := range w.crashes {
		if !at.Before(from) && !at.After(till) {
			return true
		}
	}
	for _, t := range w.troubles {
		if !t.from.After(till) && (t.till.IsZero() || !t.till.Before(from)) {
			return true
		}
	}
	return false
}

// ledgerWasLost reports whether somebody spoilt or removed what LEDGER knew, in a time.
func (w *world) ledgerWasLost(from, till time.Time) bool {
	return slices.ContainsFunc(w.ledgerLost, func(at time.Time) bool { return !at.Before(from.Add(-time.Minute)) && !at.After(till) })
}

// mayCall says what forbids a call that begins; w.mu is held.
func (w *world) mayCall(s *simWorker, c *simCall) {
	if s.crashed.Load() {
		return // what is left of it is not heard
	}
	for _, win := range w.windows[c.creator] {
		if !c.start.After(win.from) || !c.start.Before(win.till) {
			continue
		}
		fleet := !win.known.IsZero() && c.start.After(win.known.Add(time.Second+2*w.nasty.roundTrip)) && w.clear(s.name, win.known, c.start)
		if win.worker == s.name || fleet {
			w.addViolation("at %v %s called %s %v before the window ended that the API had announced to %s at %v",
				c.start.Sub(w.began), s.name, c.creator, win.till.Sub(c.start), win.worker, win.from.Sub(w.began))
		}
	}
	for _, h := range w.holds {
		if h.key == "creator."+c.creator || h.key == "account" || h.key == "provider" {
			w.judgeHold(s, c, h)
		}
	}
}

// judgeHold looks at a call that begins while, maybe, a hold stands; w.mu is held.
func (w *world) judgeHold(s *simWorker, c *simCall, h *personHold) {
	known := h.put.Add(time.Second + 2*w.nasty.roundTrip)
	if !c.start.After(known) || !c.start.Before(h.till) || !h.ended.IsZero() {
		return
	}
	if h.lost && !slices.Contains(h.survivors, s.name) || !h.lost && !w.clear(s.name, h.put, c.start) {
		return
	}
	w.addViolation("at %v %s called %s %v before the hold %s ended that a person had set at %v",
		c.start.Sub(w.began), s.name, c.creator, h.till.Sub(c.start), h.key, h.put.Sub(w.began))
}

// judge looks at the calls.
func (w *world) judge() {
	w.judgeTwice()
	w.judgePay()
	w.judgeLimits()
	w.judgeProbes()
}

// judgeTwice: no request is called more often than its answers and the faults explain.
func (w *world) judgeTwice() {
	w.mu.Lock()
	defer w.mu.Unlock()
	byRequest := map[string][]*simCall{}
	for _, c := range w.calls {
		if c.number >= 0 {
			key := fmt.Sprintf("%d%s", c.number, c.replay)
			byRequest[key] = append(byRequest[key], c)
		}
	}
	for _, all := range byRequest {
		retryable := 0
		for i, c := range all {
			if c.ended && c.retryable {
				retryable++
			}
			if i > 0 && all[i-1].worker == c.worker && (!all[i-1].ended || all[i-1].end.After(c.start)) {
				w.addViolation("%s was called twice at once by %s", c.id, c.worker)
			}
		}
		during := 0
		for _, at := range w.faults {
			if at.After(all[0].start.Add(-2*time.Minute)) && at.Before(all[len(all)-1].start.Add(time.Second)) {
				during++
			}
		}
		if len(all) > 1+retryable+during {
			w.addViolation("%s was called %d times: %d retryable answers, %d faults in between", all[0].id, len(all), retryable, during)
		}
	}
}

// judgePay: what must not be called twice is not, under any request of its id, unless the API said that
// nothing was done or a person was told by a dead letter.
func (w *world) judgePay() {
	all, err := w.outcomes()
	if err != nil {
		w.violation("outcomes: %v", err)
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	sources := map[string]uint64{}
	for _, r := range w.requests {
		sources[fmt.Sprintf("%d%s", r.number, r.replay)] = r.seq
	}
	last := map[string]*simCall{}
	for _, c := range w.calls {
		if c.operation != "pay" || c.number < 0 {
			continue
		}
		key := c.creator + " " + c.id
		before := last[key]
		last[key] = c
		if before == nil || before.certain || w.ledgerWasLost(before.start, c.start) {
			continue
		}
		source := sources[fmt.Sprintf("%d%s", before.number, before.replay)]
		told := slices.ContainsFunc(all, func(o simOutcome) bool {
			return o.class == classify.Uncertain && o.source == source && o.stored.Before(c.start)
		})
		if !told {
			w.addViolation("%s must not be called twice, and was: at %v by %s, although the API had not said that nothing came of the call at %v by %s (%d)",
				c.id, c.start.Sub(w.began), c.worker, before.start.Sub(w.began), before.worker, before.status)
		}
	}
}

// judgeLimits counts as the API does.
func (w *world) judgeLimits() {
	w.mu.Lock()
	defer w.mu.Unlock()
	byCreator := map[string][]*simCall{}
	for _, c := range w.calls {
		byCreator[c.creator] = append(byCreator[c.creator], c)
	}
	for creator, calls := range byCreator {
		segment := limitChange{creator: creator, limit: w.cfg.Gates.Creator}
		from, begin := w.began, 0
		for _, change := range append(slices.Clone(w.limits), limitChange{creator: creator, at: time.Now().Add(time.Hour)}) {
			if change.creator != creator {
				continue
			}
			end := begin
			for end < len(calls) && calls[end].start.Before(change.at) {
				end++
			}
			if !segment.unknown {
				w.judgeSegment(calls[begin:end], from, segment.limit)
			}
			segment, from, begin = change, change.at, end
		}
	}
	if rate := w.nasty.account; rate.PerSecond > 0 {
		w.judgeRate("the account", w.calls, rate, w.budgetLost)
	}
}

// judgeSegment looks at calls under one limit, from when all workers knew it; w.mu is held.
func (w *world) judgeSegment(calls []*simCall, from time.Time, limit resilience.Limits) {
	i := 0
	for i < len(calls) && !from.Equal(w.began) && (calls[i].start.Before(from.Add(simSettling)) || !w.clear("", from, calls[i].start)) {
		i++
	}
	if calls = calls[i:]; len(calls) == 0 {
		return
	}
	w.judgeRate(calls[0].creator, calls, limit.Rate, nil)
	for i, c := range calls {
		flying := 1
		for _, other := range calls[:i] {
			if other.worker == c.worker && (!other.ended || other.end.After(c.start)) {
				flying++
			}
		}
		if limit.Concurrency > 0 && flying > limit.Concurrency {
			w.addViolation("%s has %d calls of %s in flight at %v, and may have %d", c.worker, flying, c.creator, c.start.Sub(w.began), limit.Concurrency)
			return
		}
	}
}

// judgeRate: resets are times after which the bucket may be full again.
func (w *world) judgeRate(name string, calls []*simCall, rate resilience.Rate, resets []time.Time) {
	if len(calls) == 0 {
		return
	}
	level, last := float64(rate.Burst), calls[0].start
	for i, c := range calls {
		for _, at := range resets {
			if at.After(last) && !at.After(c.start) {
				level = float64(rate.Burst) + 1
			}
		}
		level = min(float64(rate.Burst), level+c.start.Sub(last).Seconds()*rate.PerSecond) - 1
		last = c.start
		if level < -1e-6-lateness*rate.PerSecond {
			before := calls[max(i-1, 0)]
			w.addViolation("%s: call %d (%s by %s at %v, %v after %s by %s) is %.3f more than %v/s and a burst of %d allow", name, i,
				c.operation, c.worker, c.start.Sub(w.began), c.start.Sub(before.start), before.operation, before.worker, -level, rate.PerSecond, rate.Burst)
			return
		}
	}
}

// lateness, in seconds, is how much later than its token a call may begin that was marked in
// between: with a burst of one nothing is kept back for it.
const lateness = 0.005

// simFair is how long a healthy creator's only request may wait where nothing is wrong but other creators.
const simFair = time.Minute

// judgeProbes looks at the creators that have one request and an API that always answers.
func (w *world) judgeProbes() {
	all, err := w.outcomes()
	if err != nil {
		w.violation("outcomes: %v", err)
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range w.requests {
		if !strings.HasPrefix(r.creator, "probe") {
			continue
		}
		for _, o := range all {
			if o.place != r.place() {
				continue
			}
			waited := o.stored.Sub(r.stored)
			if waited > simFair && w.calm(r.stored.Add(-2*time.Minute), r.stored.Add(simFair)) {
				w.addViolation("the only request of %s waited %v: stored at %v", r.creator, waited, r.stored.Sub(w.began))
			}
		}
	}
}

// calm reports whether nothing was wrong in a time, with all together; w.mu is held.
func (w *world) calm(from, till time.Time) bool {
	for _, at := range w.faults {
		if at.After(from) && at.Before(till) {
			return false
		}
	}
	for _, t := range w.troubles {
		if t.from.Before(till) && (t.till.IsZero() || t.till.After(from)) {
			return false
		}
	}
	for _, h := range w.holds {
		if !strings.HasPrefix(h.key, "creator.") && h.put.Before(till) && h.till.After(from) {
			return false
		}
	}
	for _, c := range w.calls { // of the account's trouble
		if (c.status == 401 || c.status == 402) && c.start.After(from.Add(-10*time.Minute)) && c.start.Before(till) {
			return false
		}
	}
	return true
}
