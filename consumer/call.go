package consumer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/control"
	"github.com/headgate-io/headgate/internal/failpoint"
	"github.com/headgate-io/headgate/internal/mutant"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// caller turns requests into calls.
type caller struct {
	namespace  publisher.Namespace
	api        API
	profile    *classify.Profile
	operations map[string]Operation
	maxAge     time.Duration // of a request whose operation is not known
	observer   Observer
	stats      *stats
	created    time.Time // when the stream was, for requests without an id
	log        zerolog.Logger

	ctx context.Context // of calls
}

// read reads the request in d, and prepares its call. It has an id even if it cannot be read; a
// creator or an operation that cannot be read is empty.
func (c *caller) read(d *delivery) {
	fallback := fmt.Sprintf("%d-%d", c.created.Unix(), d.seq)
	d.req, d.malformed = publisher.ParseRequest(c.namespace, d.msg.Subject, d.msg.Header, d.msg.Data, fallback)
	d.record.Source = d.source()
	d.expires = d.stored.Add(c.maxAge)
	if d.malformed != nil {
		return
	}
	if d.op, d.call, d.malformed = c.prepare(&d.req); d.op.Retry.MaxAge > 0 {
		d.expires = d.stored.Add(d.op.Retry.MaxAge)
	}
	if t := d.req.Deadline; !t.IsZero() && t.Before(d.expires) {
		d.expires = t
	}
}

// prepare finds a request's operation and turns it into a call.
func (c *caller) prepare(req *publisher.Request) (Operation, func(context.Context) classify.Answer, error) {
	op, ok := c.operations[req.Operation]
	op.name = req.Operation
	if !ok {
		op, ok = c.operations[AnyOperation]
		op.name = AnyOperation
	}
	if !ok {
		known := slices.Sorted(maps.Keys(c.operations))
		return op, nil, fmt.Errorf("no operation %q is configured; there are: %s", req.Operation, strings.Join(known, ", "))
	}
	call, err := c.api.Prepare(req)
	return op, call, err
}

// ending is how the work on a request ended: what is to be done with it, and why.
type ending struct {
	verdict
	health         resilience.Outcome // what breakers make of it
	answer         classify.Answer
	failure        classify.Failure
	started, ended time.Time
	inside         bool // the call began although a hold was known
}

func (e ending) took() time.Duration { return e.ended.Sub(e.started) }

// noCall is the end of an attempt in which no call was made, or none that counts.
func noCall(a action) ending {
	return ending{verdict: verdict{action: a}, health: resilience.NotMade}
}

// attempt makes the call and decides what its answer means.
func (p *partition) attempt(d *delivery, permit resilience.Permit) (e ending) {
	defer func() {
		if r := recover(); r != nil { // the permit ends all the same
			p.panicked(d, r)
			e = noCall(giveBack)
		}
	}()
	if !p.lease.Valid(time.Now()) {
		return noCall(giveBack)
	}
	if d.call == nil {
		if _, d.call, d.malformed = p.caller.prepare(&d.req); d.malformed != nil {
			e = noCall(deadLetter)
			e.failure = classify.Failure{Class: classify.MalformedRequest, Scope: classify.ScopeRequest}
			e.reason = d.malformed.Error()
			return e
		}
	}
	wrote, err := p.settler.mark(d)
	if err != nil {
		return noCall(giveBack)
	}
	started := time.Now()
	if wrote && permit.Late(started) {
		// It takes new tokens, and has its mark already.
		d.marked = true
		return noCall(callAgain)
	}
	if !p.lease.Valid(started) || failpoint.Hit(failpoint.Call, d.req.ID) != nil {
		p.settler.unmark(d)
		return noCall(giveBack)
	}
	// A hold may have come since the permit was given, while the call was marked.
	if _, ok := permit.Valid(started); !ok && !mutant.On(mutant.HoldAfterMark) {
		p.settler.unmarkForNow(d)
		return noCall(callAgain)
	}
	d.called, d.marked = true, false
	_, outside := permit.Valid(time.Now()) // counted: it must not happen
	answer := d.call(p.caller.ctx)
	ended := time.Now()
	p.caller.stats.calls.Add(1)
	if p.caller.ctx.Err() != nil && answer.Status == 0 || failpoint.Hit(failpoint.Called, d.req.ID) != nil {
		// Cut off by the end of the grace time: what came of it is not known.
		answer.Done()
		return noCall(giveBack)
	}
	return p.understand(d, permit, ending{answer: answer, started: started, ended: ended, inside: !outside})
}

// understand finds out what an answer means, for the request and for its creator.
func (p *partition) understand(d *delivery, permit resilience.Permit, e ending) ending {
	c, now := p.caller, e.ended
	failure, failed := c.profile.Classify(e.answer, now)
	hints := c.profile.Hints(e.answer.Header, now)
	p.credits.add(hints.Credits, now)
	c.observer.Called(d.op.name, failure.Class, e.answer.Status, e.took(), e.inside)
	if failed && failure.Refresh && !d.refreshed {
		if renewed, ok := p.renew(d, e.answer); ok {
			e.answer.Done()
			return renewed
		}
	}
	if failed && failure.Local && !(d.op.NotIdempotent && failure.Done == classify.DoneMaybe) {
		// The worker's own trouble, out of descriptors for one, says nothing about the request.
		p.settler.unmarkForNow(d)
		e.verdict = verdict{action: postpone, after: now.Add(localPause)}
		e.health, e.failure = resilience.NotMade, failure
		if n, due := p.settler.trouble.add("local", now); due {
			p.log.Error().Str("cause", string(failure.Cause)).Int("times", n).Msg("the worker itself cannot make calls; its requests wait")
		}
		return e
	}
	o := facts{failure: failure, failed: failed, uncertain: d.op.NotIdempotent && failed && failure.Done == classify.DoneMaybe, now: now, random: rand.Float64()}
	if hints.Exhausted {
		o.window = hints.HoldFor
	}
	if failed && !(failure.Class == classify.NotFound && d.op.NotFoundEmpty) {
		a := publisher.Attempt{
			At: e.started.UTC().Round(0), Ms: e.took().Milliseconds(), Class: failure.Class,
			Status: e.answer.Status, Code: failure.Code,
		}
		d.attempted(a)
		p.failed(d.req.Creator, a)
	}
	o.attempts, o.throttled = d.record.counts()
	o.providerFailing = p.shared.gates.ProviderFailing(now)
	e.verdict, e.failure, e.health = decide(o, d.op), failure, health(failure, failed)
	if e.answer.Truncated && e.action == deadLetter {
		e.reason += fmt.Sprintf("; more than %d bytes of %.60q came with status %d, and were not kept", len(e.answer.Body), e.answer.Header.Get("Content-Type"), e.answer.Status)
	}
	if e.hold != nil {
		p.heldBy(d, e.verdict, failure)
	}
	if crowded := failed && failure.Class == classify.ConcurrencyLimit; crowded || hints.ConcurrencyLimit > 0 {
		permit.Concurrency(now, hints.ConcurrencyLimit, hints.ConcurrencyActive, crowded)
	}
	return e
}

const (
	// localPause is how long a request waits if the worker cannot make calls.
	localPause = 5 * time.Second

	// refreshTimeout bounds the renewal of credentials.
	refreshTimeout = 10 * time.Second

	// refreshPause is how long the account is held if its credentials could not be renewed.
	refreshPause = 5 * time.Second
)

// renew renews the API's credentials, with which a call was refused. It reports false where that
// changes nothing, so that the refusal counts.
func (p *partition) renew(d *delivery, refused classify.Answer) (ending, bool) {
	api, ok := p.caller.api.(Refresher)
	if !ok {
		return ending{}, false
	}
	d.refreshed = true
	ctx, cancel := context.WithTimeout(p.caller.ctx, refreshTimeout)
	defer cancel()
	renewed, err := api.Refresh(ctx, refused)
	switch {
	case err != nil:
		// The call was refused, that is certain. The renewal failed, which is no doing of the request.
		p.log.Error().Err(err).Msg("the API's credentials could not be renewed; the account is held, and it is tried again")
		d.refreshed = false
		p.settler.unmarkForNow(d)
		now := time.Now()
		e := noCall(postpone)
		e.health, e.after = resilience.Excluded, now.Add(refreshPause)
		var later interface{ RetryAt() time.Time }
		if errors.As(err, &later) {
			e.after = latest(e.after, later.RetryAt())
		}
		h := resilience.Hold{Since: now, Until: e.after, Class: classify.Unauthorized, Reason: "the API's credentials could not be renewed"}
		p.heldBy(d, verdict{hold: &h, scope: classify.ScopeAccount}, classify.Failure{Class: classify.Unauthorized, Retryable: true})
		return e, true
	case renewed:
		p.log.Info().Msg("the API's credentials were renewed")
		p.settler.unmarkForNow(d)
		e := noCall(callAgain)
		e.health = resilience.Excluded
		return e, true
	}
	return ending{}, false
}

// health is what a breaker makes of an answer.
func health(f classify.Failure, failed bool) resilience.Outcome {
	switch {
	case !failed:
		return resilience.Success
	case f.Class.Unhealthy() && f.Alone:
		return resilience.FailedAlone
	case f.Class.Unhealthy():
		return resilience.Failed
	}
	return resilience.Excluded
}

// heldBy applies the hold that an answer asks for, here at once and then, before
// the message is settled, for every worker and after a restart.
func (p *partition) heldBy(d *delivery, v verdict, f classify.Failure) {
	h := *v.hold
	h.Who = p.settler.worker
	target := control.Target{Kind: control.Creator, Creator: d.req.Creator}
	counts := false
	switch v.scope {
	case classify.ScopeAccount:
		target = control.Target{Kind: control.Account}
		counts = p.shared.gates.HoldAccount(resilience.ByAPI, h)
	case classify.ScopeProvider:
		target = control.Target{Kind: control.Provider}
		counts = p.shared.gates.HoldProvider(resilience.ByAPI, h)
	default:
		counts = p.hold(d.req.Creator, resilience.ByAPI, h)
	}
	if !counts {
		return
	}
	event := p.log.Warn().Str("held", target.String()).Str("class", string(h.Class)).Str("reason", h.Reason).Str("request", d.req.ID)
	if !h.Until.IsZero() {
		event = event.Time("until", h.Until)
		p.caller.stats.held.Add(int64(h.Until.Sub(h.Since)))
	}
	event.Msg("held")
	p.events.held(d, f, v.scope, h)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(p.settler.ctx), p.settler.timeout)
	defer cancel()
	err := failpoint.Hit(failpoint.Hold, d.req.ID)
	if err == nil {
		err = p.holds.Put(ctx, target, h)
	}
	if err != nil {
		p.log.Error().Err(err).Str("held", target.String()).Msg("a hold is known to this worker only, until it can be stored; trying again")
	}
}

// ended tells people what a call did to the breakers, and lets the creator's next call go.
func (p *partition) ended(d *delivery, ch resilience.Change) {
	p.events.breakers(d.req.Creator, ch)
	if ch.ProviderClosed {
		p.pumpEverywhere()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.creators[d.req.Creator]; c != nil {
		c.settling++
		p.pump(c)
	}
}

// settled lets the creator go on that had too many calls without an outcome.
func (p *partition) settled(d *delivery) {
	p.mu.Lock()
	if c := p.creators[d.req.Creator]; c != nil {
		c.settling = max(0, c.settling-1)
		p.pump(c)
	}
	p.mu.Unlock()
	p.pull()
}

// hold takes a hold for a creator that may or may not be known here yet. It reports whether it
// changes anything.
func (p *partition) hold(name string, by resilience.Authority, h resilience.Hold) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.active {
		return true
	}
	c := p.creators[name]
	if c == nil {
		return true // it will find the hold when it comes
	}
	counts := c.gate.Hold(by, h)
	if counts {
		p.pump(c)
	}
	return counts
}

// release ends c's hold.
func (p *partition) release(name string, by resilience.Authority) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.creators[name]
	if c == nil {
		return
	}
	now := time.Now()
	if h := c.gate.Held(now); h != nil && h.Until.IsZero() {
		p.caller.stats.held.Add(int64(now.Sub(h.Since)))
	}
	c.gate.Release(now, by)
	p.pump(c)
}

// limit changes the limits of a creator that may or may not be known here yet.
func (p *partition) limit(name string, l resilience.Limits) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.creators[name]; c != nil {
		_ = c.gate.SetLimits(time.Now(), l) // checked when it was read
		p.pump(c)
	}
}

// pumpAll lets every creator go on, because a hold of all of them has ended.
func (p *partition) pumpAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.creators {
		p.pump(c)
	}
}
