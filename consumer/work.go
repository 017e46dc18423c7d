package consumer

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"time"

	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/failpoint"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// work makes one call, decides what its answer means and settles the message.
// The creator's slot is free as soon as the call has ended; the worker's place only when
// the message is settled, so that a server that cannot store results slows
// the worker down instead of filling its memory.
func (w *Worker) work(p *partition, c *creator, d *delivery, permit resilience.Permit) {
	ended, pumped := false, false
	end := func(o resilience.Outcome) resilience.Change {
		ended = true
		return permit.End(time.Now(), o)
	}
	defer func() {
		permit.Close()
		if !pumped {
			p.pump(c) // others may wait for this slot, whatever came of it
		}
		w.feed()
	}()
	w.guarded(p, d, func() {
		defer func() {
			if !ended { // a panic
				end(resilience.Excluded)
			}
		}()
		w.attempt(p, c, d, permit, end, &pumped)
	})
}

// attempt is work without what has to happen in any case.
func (w *Worker) attempt(p *partition, c *creator, d *delivery, permit resilience.Permit, end func(resilience.Outcome) resilience.Change, pumped *bool) {
	if !p.lease.holds(time.Now()) {
		end(resilience.Excluded)
		w.giveBack(p, d)
		return
	}
	call := d.call
	if call == nil {
		var err error
		if _, call, err = w.prepare(&d.req); err != nil {
			end(resilience.Excluded)
			w.malformed(p, d, err)
			return
		}
	}
	if err := w.mark(p, d); err != nil {
		end(resilience.Excluded)
		w.giveBack(p, d)
		return
	}
	started := time.Now()
	if !p.lease.holds(started) || failpoint.Hit(failpoint.Call, d.req.ID) != nil {
		end(resilience.Excluded)
		w.unmark(d)
		w.giveBack(p, d)
		return
	}
	held := c.gate.Held(started)
	inside := held != nil && held.Since.Before(permit.Started())
	if held != nil && !inside {
		// Another call's answer has come since this one was admitted, while it was marked.
		end(resilience.Excluded)
		w.unmark(d)
		p.again(c, d, started)
		return
	}
	d.called = true
	answer := call(w.callCtx)
	now := time.Now()
	w.stats.calls.Add(1)
	if w.callCtx.Err() != nil && answer.Status == 0 || failpoint.Hit(failpoint.Called, d.req.ID) != nil {
		// Cut off by the end of the grace time: what came of it is not known.
		end(resilience.Excluded)
		w.giveBack(p, d)
		return
	}

	failure, failed := w.cfg.Profile.Classify(answer, now)
	hints := w.cfg.Profile.Hints(answer.Header, now)
	w.credits.add(hints.Credits, now)
	took := now.Sub(started)
	w.cfg.Observer.Called(d.op.name, failure.Class, answer.Status, took, inside)
	if failed && failure.Refresh && !d.refreshed {
		d.refreshed = true
		switch renewed, err := w.refresh(answer); {
		case renewed:
			end(resilience.Excluded)
			w.unmark(d)
			p.atOnce(c, d)
			return
		case err != nil:
			// What failed is the renewal. The call itself was refused: that is certain.
			failure, failed = w.cfg.Profile.Classify(classify.Answer{Err: err}, now)
		}
	}
	o := outcome{failure: failure, failed: failed, uncertain: d.op.NotIdempotent && answer.Uncertain(), now: now, random: rand.Float64()}
	if hints.Exhausted {
		o.window = hints.HoldFor
	}
	if failed && !(failure.Class == classify.NotFound && d.op.NotFoundEmpty) {
		a := publisher.Attempt{
			At: started.UTC().Round(0), Ms: took.Milliseconds(), Class: failure.Class,
			Status: answer.Status, Code: failure.Code,
		}
		d.record.Attempts = append(d.record.Attempts, a)
		p.failed(c, a)
	}
	o.attempts, o.throttled = d.record.counts()
	o.providerFailing = w.gates.ProviderFailing(now)
	v := decide(o, d.op)
	if v.hold != nil {
		w.hold(c, d, v, failure)
	}
	if crowded := failed && failure.Class == classify.ConcurrencyLimit; crowded || hints.ConcurrencyLimit > 0 {
		permit.Concurrency(now, hints.ConcurrencyLimit, hints.ConcurrencyActive, crowded)
	}
	w.changed(p, c, end(health(failure, failed)))
	p.pump(c)
	*pumped = true

	switch v.fate {
	case succeed:
		w.succeed(p, d, answer, failure, v.empty, took)
	case retry:
		w.retry(p, c, d, failure, answer.Status, v.after, took)
	case bury:
		if answer.Truncated {
			v.reason += fmt.Sprintf("; more than %d bytes of %q came with status %d, and were not kept", len(answer.Body), answer.Header.Get("Content-Type"), answer.Status)
		}
		if v.uncertain {
			failure.Class, failure.Scope, failure.Retryable = classify.Uncertain, classify.ScopeRequest, false
		}
		w.bury(p, d, failure, v.reason, answer.Status)
	}
}

// refresh renews the API's credentials, if it is an API that can.
func (w *Worker) refresh(refused classify.Answer) (bool, error) {
	api, ok := w.cfg.API.(Refresher)
	if !ok {
		return false, nil
	}
	ctx, cancel := context.WithTimeout(w.callCtx, refreshTimeout)
	defer cancel()
	renewed, err := api.Refresh(ctx, refused)
	switch {
	case err != nil:
		w.log.Error().Err(err).Msg("the API's credentials could not be renewed; trying again")
	case renewed:
		w.log.Info().Msg("the API's credentials were renewed")
	}
	return renewed, err
}

// refreshTimeout bounds the renewal of credentials.
const refreshTimeout = 10 * time.Second

// guarded runs f, which handles d. Should it panic, d becomes a dead letter, unless an
// outcome is on its way: then it is given back, and its outcome found.
func (w *Worker) guarded(p *partition, d *delivery, f func()) {
	defer func() {
		if r := recover(); r != nil {
			w.panicked(p, d, r)
		}
	}()
	f()
}

func (w *Worker) panicked(p *partition, d *delivery, r any) {
	w.log.Error().Str("request", d.req.ID).Interface("panic", r).Bytes("stack", debug.Stack()).Msg("handling a request panicked")
	if d.outcome || d.panicked {
		w.giveBack(p, d)
		return
	}
	d.panicked = true
	if d.req.ID == "" {
		d.req, _ = w.read(d)
	}
	class := classify.Internal
	if d.called && d.op.NotIdempotent && !d.op.RetryUncertain {
		class = classify.Uncertain
	}
	w.guarded(p, d, func() {
		w.bury(p, d, classify.Failure{Class: class, Scope: classify.ScopeRequest},
			fmt.Sprintf("handling the request panicked: %v", r), 0)
	})
}

// health is what a breaker makes of an answer.
func health(f classify.Failure, failed bool) resilience.Outcome {
	switch {
	case !failed:
		return resilience.Success
	case f.Class.Unhealthy():
		return resilience.Failed
	}
	return resilience.Excluded
}

// hold applies the hold that an answer asks for, here at once and then, before
// the message is settled, for every worker and after a restart.
func (w *Worker) hold(c *creator, d *delivery, v verdict, f classify.Failure) {
	h := *v.hold
	h.Who = w.cfg.Name
	var key string
	var counts bool
	switch v.scope {
	case classify.ScopeAccount:
		key, counts = holdAccount, w.gates.HoldAccount(h)
	case classify.ScopeProvider:
		key, counts = holdProvider, w.gates.HoldProvider(h)
	default:
		token, err := publisher.EncodeToken(c.name)
		if err != nil {
			return // a request with such a creator is malformed and was not called
		}
		key, counts = holdCreator+token, c.gate.Hold(h)
	}
	if !counts {
		return
	}
	w.holds.keep(key, h, 0)
	event := w.log.Warn().Str("held", key).Str("class", string(h.Class)).Str("reason", h.Reason).Str("request", d.req.ID)
	if !h.Until.IsZero() {
		event = event.Time("until", h.Until)
		w.stats.held.Add(int64(h.Until.Sub(h.Since)))
	}
	event.Msg("held")
	w.heldEvent(d, f, v.scope, h)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(w.settleCtx), w.cfg.StoreTimeout)
	defer cancel()
	err := failpoint.Hit(failpoint.Hold, d.req.ID)
	if err == nil {
		err = w.holds.store(ctx, key, h)
	}
	if err != nil {
		w.log.Error().Err(err).Str("held", key).Msg("a hold is known to this worker only, until it can be stored; trying again")
	}
}

// changed tells people what a call did to the breakers.
func (w *Worker) changed(p *partition, c *creator, ch resilience.Change) {
	if ch.Opened {
		w.log.Warn().Str("creator", c.name).Time("until", ch.OpenUntil).Msg("breaker opened")
	}
	if ch.Closed {
		w.log.Info().Str("creator", c.name).Msg("breaker closed")
	}
	if ch.ProviderOpened {
		w.log.Error().Str("provider", w.cfg.Provider).Msg("the provider's breaker opened: several creators fail in a row")
	}
	if ch.ProviderClosed {
		w.log.Info().Str("provider", w.cfg.Provider).Msg("the provider's breaker closed")
	}
	w.breakerEvents(c, ch)
	if ch.Faster {
		p.replan(c)
	}
}

func (w *Worker) succeed(p *partition, d *delivery, a classify.Answer, f classify.Failure, empty bool, took time.Duration) {
	attempts, throttled := d.record.counts()
	r := publisher.Result{
		RequestID: d.req.ID, CorrelationID: d.req.CorrelationID, Traceparent: d.req.Traceparent,
		Creator: d.req.Creator, Operation: d.req.Operation,
		ContentType: a.Header.Get("Content-Type"), UpstreamRequestID: a.Header.Get("X-Request-Id"),
		Status: a.Status, Attempts: attempts + throttled + 1, Duration: took, Empty: empty, Body: a.Body,
	}
	if f.RequestID != "" {
		r.UpstreamRequestID = f.RequestID
	}
	d.outcome = true
	err := w.storeBetween(p, d, failpoint.Result, failpoint.ResultDone, func(ctx context.Context) error {
		return w.publisher.Result(ctx, r)
	})
	if err != nil {
		w.giveBack(p, d)
		return
	}
	w.stats.results.Add(1)
	w.cfg.Observer.Settled("", r.Attempts)
	w.ack(p, d)
	w.unmark(d)
	w.line(w.log.Info(), d).Str("outcome", "result").Int("status", a.Status).Int("attempt", r.Attempts).
		Bool("empty", empty).Dur("took_ms", took).Str("upstream_request", r.UpstreamRequestID).Send()
}

func (w *Worker) retry(p *partition, c *creator, d *delivery, f classify.Failure, status int, after time.Time, took time.Duration) {
	d.record.Mark, d.unexplained = nil, false
	err := w.storeBetween(p, d, failpoint.Attempt, failpoint.AttemptDone, func(ctx context.Context) error {
		return w.ledger.put(ctx, d.req.ID, &d.record)
	})
	if err != nil {
		w.giveBack(p, d)
		return
	}
	w.stats.retries.Add(1)
	w.cfg.Observer.Retried(f.Class)
	w.line(w.log.Info(), d).Str("outcome", "retry").Str("class", string(f.Class)).Str("code", f.Code).Int("status", status).
		Int("attempt", len(d.record.Attempts)).Time("not_before", after).Dur("took_ms", took).Str("upstream_request", f.RequestID).Send()
	p.again(c, d, after)
}

// bury makes d a dead letter: claimed first, then published, then acked.
func (w *Worker) bury(p *partition, d *delivery, f classify.Failure, reason string, status int) {
	attempts, throttled := d.record.counts()
	letter := publisher.DeadLetter{
		Class: f.Class, Code: f.Code, Action: f.Action, Scope: f.Scope, Field: f.Field,
		Reason: reason, HTTPStatus: status, UpstreamRequestID: f.RequestID,
		Attempts: attempts + throttled, Deliveries: d.count, FailedAt: time.Now().UTC(), FirstFailedAt: time.Now().UTC(),
		Provider: w.cfg.Provider, Creator: d.req.Creator, Operation: d.req.Operation,
		SourceStream: w.requests, SourceSubject: d.msg.Subject, SourceSequence: d.seq, RequestID: d.req.ID,
	}
	if len(d.record.Attempts) > 0 {
		letter.FirstFailedAt = d.record.Attempts[0].At
	}
	d.outcome = true
	d.record.Mark, d.record.Claim = nil, &claim{Dead: &letter, At: letter.FailedAt}
	err := w.storeBetween(p, d, failpoint.Claim, failpoint.Claimed, func(ctx context.Context) error {
		return w.ledger.put(ctx, d.req.ID, &d.record)
	})
	if err != nil {
		w.giveBack(p, d)
		return
	}
	w.publishDead(p, d)
}

// publishDead publishes the dead letter that d's record claims.
func (w *Worker) publishDead(p *partition, d *delivery) {
	letter := *d.record.Claim.Dead
	letter.History = d.record.Attempts
	letter.Payload, letter.Header = d.msg.Data, d.msg.Header
	d.outcome = true
	answered := false
	err := w.storeBetween(p, d, failpoint.Letter, failpoint.LetterDone, func(ctx context.Context) (err error) {
		if answered, err = w.publishFenced(ctx, letter); err != nil || answered {
			return err
		}
		d.record.Claim.Stored = true
		return w.ledger.put(ctx, d.req.ID, &d.record)
	})
	switch {
	case err != nil:
		w.giveBack(p, d)
		return
	case answered:
		w.line(w.log.Warn(), d).Str("class", string(letter.Class)).Msg("no dead letter: the request has a result by now")
		w.ack(p, d)
		return
	}
	w.stats.deadLetters.Add(1)
	w.letterEvents(&letter)
	w.cfg.Observer.Settled(letter.Class, letter.Attempts)
	w.ack(p, d)
	w.line(w.log.Warn(), d).Str("outcome", "dead letter").Str("class", string(letter.Class)).Str("code", letter.Code).
		Int("status", letter.HTTPStatus).Int("attempt", letter.Attempts).Str("reason", letter.Reason).
		Str("action", letter.Action).Str("upstream_request", letter.UpstreamRequestID).Send()
}

// publishFenced publishes a dead letter unless its request has a result.
func (w *Worker) publishFenced(ctx context.Context, letter publisher.DeadLetter) (answered bool, err error) {
	// Another worker's answer may be on its way, held up by a network: from here on it comes
	// too late.
	if answered, err = w.fence(ctx, letter); err != nil || answered {
		return answered, err
	}
	return false, w.publisher.DeadLetter(ctx, letter)
}

// fence refuses a result that comes from now on, and reports whether one has come.
func (w *Worker) fence(ctx context.Context, letter publisher.DeadLetter) (answered bool, err error) {
	if w.cfg.Topology.NoIDInSubject {
		return false, nil
	}
	seq, err := w.publisher.Fence(ctx, letter.RequestID)
	if err != nil {
		return false, err
	}
	if answered, err = w.answered(ctx, letter.Creator, letter.Operation, letter.RequestID); err != nil {
		return false, err
	}
	if seq != 0 {
		// Its id stays known; the message itself is of no use to anybody.
		if err := w.ledger.remove(ctx, w.results, seq); err != nil {
			w.log.Debug().Err(err).Msg("a fence stays until it is too old")
		}
	}
	return answered, nil
}

// answered reports whether a request has a result.
func (w *Worker) answered(ctx context.Context, creator, operation, id string) (bool, error) {
	subject, err := w.cfg.Topology.Namespace.ResultSubject(creator, operation, id)
	if err != nil {
		return false, err
	}
	result, err := w.ledger.last(ctx, w.results, subject)
	return result != nil, err
}

func (w *Worker) malformed(p *partition, d *delivery, err error) {
	w.bury(p, d, classify.Failure{Class: classify.MalformedRequest, Scope: classify.ScopeRequest}, err.Error(), 0)
}

func (w *Worker) expired(p *partition, d *delivery) {
	reason := "too old to be called"
	if d.why.Reason != "" {
		reason += "; it waited for: " + string(d.why.Reason)
		if h := d.why.Hold; h != nil && h.Reason != "" {
			reason += " (" + h.Reason + ")"
		}
	}
	w.bury(p, d, classify.Failure{Class: classify.Expired, Scope: classify.ScopeRequest}, reason, 0)
}

// lookUp finds out what became of a message that was delivered before and that
// this worker knows nothing of, before it is called again.
func (w *Worker) lookUp(p *partition, c *creator, d *delivery) {
	var answered bool
	err := w.store(p, d, func(ctx context.Context) error {
		err := failpoint.Hit(failpoint.LookUp, d.req.ID)
		if err != nil {
			return err
		}
		if d.record, err = w.ledger.get(ctx, d.req.ID); err != nil {
			return err
		}
		if w.cfg.Topology.NoIDInSubject {
			return nil
		}
		answered, err = w.answered(ctx, d.req.Creator, d.req.Operation, d.req.ID)
		return err
	})
	switch {
	case err != nil:
		w.giveBack(p, d)
	case d.record.Claim != nil && d.record.Claim.Stored:
		w.ack(p, d)
	case d.record.Claim != nil && d.record.Claim.Dead != nil:
		w.publishDead(p, d)
	case answered:
		w.ack(p, d)
		w.unmark(d)
	case d.suspect() && d.op.NotIdempotent && !d.op.RetryUncertain:
		m := d.record.Mark
		w.bury(p, d, classify.Failure{Class: classify.Uncertain, Scope: classify.ScopeRequest},
			fmt.Sprintf("it is not known whether the API did what it was asked: worker %s vanished during the call that began at %s; "+
				"look there before it is replayed", m.Worker, m.At.Format(time.RFC3339)), 0)
	case d.suspect() && d.record.Mark.Calls >= poisonous:
		w.bury(p, d, classify.Failure{Class: classify.Poison, Scope: classify.ScopeRequest},
			fmt.Sprintf("%d workers vanished while they called it, the last one, %s, while it called no other suspect", d.record.Mark.Calls, d.record.Mark.Worker), 0)
	default:
		p.mu.Lock()
		defer p.mu.Unlock()
		switch {
		case !p.active:
			w.reply(d.msg.Reply, nakPayload)
			delete(p.here, d.seq)
		case d.suspect():
			p.admitAlone(c, d, time.Now())
		default:
			d.unexplained = p.crashed
			p.admit(c, d, time.Now())
		}
	}
}

// errLost means that this worker must not settle the message any more.
var errLost = errors.New("the partition is not this worker's any more")

// errUnconfirmed means that the server does not answer an ack.
var errUnconfirmed = errors.New("the server does not confirm the ack")

// store runs f, which writes to or reads from the server, until it succeeds.
// The message stays unsettled meanwhile and the server is told that it is
// being worked on: the answer in hand is worth waiting for. It gives up when
// the partition is lost or the worker must end.
func (w *Worker) store(p *partition, d *delivery, f func(context.Context) error) error {
	wait := resilience.Backoff{Base: 50 * time.Millisecond, Max: 5 * time.Second, Jitter: 0.3}
	for attempt := 1; ; attempt++ {
		err := f(w.storing.context(w.settleCtx, time.Now(), w.cfg.StoreTimeout))
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errClaimed) || errors.Is(err, errUnconfirmed) || w.settleCtx.Err() != nil:
			return err
		case !p.lease.holds(time.Now()):
			return errLost
		}
		w.line(w.log.Error(), d).Err(err).Int("try", attempt).Msg("cannot settle yet; trying again")
		select {
		case <-w.settleCtx.Done():
		case <-time.After(wait.Delay(attempt, rand.Float64())):
		}
	}
}

// storeBetween is store with a place to break at on either side of f.
func (w *Worker) storeBetween(p *partition, d *delivery, before, after failpoint.Point, f func(context.Context) error) error {
	return w.store(p, d, func(ctx context.Context) error {
		if err := failpoint.Hit(before, d.req.ID); err != nil {
			return err
		}
		if err := f(ctx); err != nil {
			return err
		}
		return failpoint.Hit(after, d.req.ID)
	})
}

// acks is how often an ack is sent that is not confirmed.
const acks = 4

// ack settles d for good. An ack that is not confirmed may have got lost, so
// it is sent again, though not for ever: a server that was restarted may know
// nothing of the delivery any more. Should the message come back, its outcome
// is found.
func (w *Worker) ack(p *partition, d *delivery) {
	sent := 0
	err := w.store(p, d, func(ctx context.Context) error {
		if sent++; sent > acks {
			return errUnconfirmed
		}
		if err := failpoint.Hit(failpoint.Ack, d.req.ID); err != nil {
			return err
		}
		if d.msg.Reply == "" { // no delivery reached it: the sweeper found it
			return w.ledger.remove(ctx, w.requests, d.seq)
		}
		if _, err := w.nc.RequestWithContext(ctx, d.msg.Reply, ackPayload); err != nil {
			return fmt.Errorf("ack: %w", err)
		}
		return failpoint.Hit(failpoint.Acked, d.req.ID)
	})
	if err != nil {
		w.line(w.log.Warn(), d).Err(err).Msg("the ack is not confirmed; the outcome is stored and will be found")
	}
	p.finish(d)
}

// giveBack lets the message be delivered again, to whoever owns it then.
func (w *Worker) giveBack(p *partition, d *delivery) {
	if !d.op.NotIdempotent || !d.called {
		w.unmark(d)
	}
	if p.lease.holds(time.Now()) {
		w.reply(d.msg.Reply, nakPayload)
	}
	p.finish(d)
}

// line starts the canonical log line of a settled message.
func (w *Worker) line(e *zerolog.Event, d *delivery) *zerolog.Event {
	return e.Str("request", d.req.ID).Str("correlation", d.req.CorrelationID).
		Str("creator", d.req.Creator).Str("operation", d.req.Operation).
		Uint64("seq", d.seq).Uint64("deliveries", d.count).Dur("age_ms", time.Since(d.stored))
}
