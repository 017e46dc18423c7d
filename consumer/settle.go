package consumer

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/broker"
	"github.com/headgate-io/headgate/internal/failpoint"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

const (
	// storeAgain is how long a request waits at the server whose dead letter cannot be stored.
	storeAgain = 30 * time.Second

	// storeTries is how often it is tried to write what can be written later as well.
	storeTries = 3

	// acks is how often an ack is sent that is not confirmed.
	acks = 4
)

// settler gives requests their one durable outcome. It decides nothing, and knows no
// partition and no creator.
type settler struct {
	worker, provider string
	requests         string // the stream
	publisher        *publisher.Publisher
	reader           *broker.Reader
	ledger           *ledger
	nc               *nats.Conn
	timeout          time.Duration // of one attempt to write
	observer         Observer
	events           *events
	stats            *stats
	log              zerolog.Logger

	ctx      context.Context // ends when the worker must not wait for the server any more
	storing  deadlines
	unstored atomic.Int64 // answers in hand that could not be stored at the first try
	trouble  troubles     // what was said of it lately

	mu     sync.Mutex
	unsent map[publisher.Source]*mark // marks of calls that were never made
}

// policy says what to do when the server does not take what it is given.
type policy uint8

const (
	// inHand: an answer of the API, which is lost if it is not stored. It is tried until it is
	// stored, or until the worker must end. It is safe at any time: the request's place takes
	// one outcome.
	inHand policy = iota
	// later: it can be tried when the request is delivered again.
	later
)

// errNotNow means that something was not stored that can be stored later.
type errNotNow struct{ err error }

func (e errNotNow) Error() string { return "not stored yet: " + e.err.Error() }
func (e errNotNow) Unwrap() error { return e.err }

// errNotStored reports that an outcome waits for the server, and not for another worker.
func errNotStored(err error) bool {
	var notNow errNotNow
	return errors.As(err, &notNow)
}

// errUnconfirmed means that the server does not answer an ack.
var errUnconfirmed = errors.New("the server does not confirm the ack")

// store runs f, which writes to or reads from the server, as its policy says. An error that can
// never go away ends it at once.
func (s *settler) store(d *delivery, how policy, size int, f func(context.Context) error) error {
	wait := resilience.Backoff{Base: 50 * time.Millisecond, Max: 5 * time.Second, Jitter: 0.3}
	counted := false
	defer func() {
		if counted {
			s.unstored.Add(-1)
		}
	}()
	for try := 1; ; try++ {
		err := s.once(size, f)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errTaken) || errors.Is(err, errUnconfirmed) || s.ctx.Err() != nil:
			return err
		case broker.TroubleOf(err) == broker.Never:
			return err
		}
		s.say(d, err)
		if how == later && (try >= storeTries || broker.TroubleOf(err) == broker.Full) {
			return errNotNow{err}
		}
		if how == inHand && !counted {
			counted = true
			s.unstored.Add(1)
		}
		select {
		case <-s.ctx.Done():
		case <-time.After(wait.Delay(try, rand.Float64())):
		}
	}
}

// once runs f with a deadline: one that many requests share, or one of its own if it has to
// send a large body.
func (s *settler) once(size int, f func(context.Context) error) error {
	if limit := s.publisher.StoreFor(size); limit > s.publisher.StoreFor(0) {
		ctx, cancel := context.WithTimeout(s.ctx, max(limit, s.timeout))
		defer cancel()
		return f(ctx)
	}
	return f(s.storing.context(s.ctx, time.Now(), s.timeout))
}

// say logs trouble with the server: one line a cause and some seconds, with a count.
func (s *settler) say(d *delivery, err error) {
	if n, due := s.trouble.add(broker.TroubleOf(err).String(), time.Now()); due {
		line(s.log.Error(), d).Err(err).Int("times", n).Msg("cannot settle yet; trying again")
	}
}

// between is f with a place to break at on either side.
func between(d *delivery, before, after failpoint.Point, f func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		if err := failpoint.Hit(before, d.req.ID); err != nil {
			return err
		}
		if err := f(ctx); err != nil {
			return err
		}
		return failpoint.Hit(after, d.req.ID)
	}
}

// result stores the API's answer. It returns the outcome that stands: another one may have been first.
func (s *settler) result(d *delivery, e ending) (stands publisher.Outcome, err error) {
	attempts, throttled := d.record.counts()
	r := publisher.Result{
		Source: d.source(), RequestID: d.req.ID, CorrelationID: d.req.CorrelationID, Traceparent: d.req.Traceparent,
		Creator: d.req.Creator, Operation: d.req.Operation,
		ContentType: e.answer.Header.Get("Content-Type"), UpstreamRequestID: e.answer.Header.Get("X-Request-Id"),
		Status: e.answer.Status, Attempts: attempts + throttled + 1, Duration: e.took(), Empty: e.empty, Body: e.answer.Body,
	}
	if e.failure.RequestID != "" {
		r.UpstreamRequestID = e.failure.RequestID
	}
	d.decided = true
	err = s.store(d, inHand, len(r.Body), between(d, failpoint.Result, failpoint.ResultDone, func(ctx context.Context) (err error) {
		stands, err = s.publisher.Result(ctx, r)
		return err
	}))
	switch {
	case err != nil && broker.TroubleOf(err) == broker.Never && s.ctx.Err() == nil:
		return s.bury(d, verdict{reason: "the API answered, but its answer cannot be stored: " + err.Error()},
			classify.Failure{Class: classify.Internal, Scope: classify.ScopeRequest}, e.answer.Status)
	case err != nil:
		return stands, err
	case stands.Kind == publisher.Dead:
		line(s.log.Warn(), d).Int("status", e.answer.Status).Msg("the answer came too late: the request is a dead letter by now")
		return stands, s.discard(d, stands)
	}
	s.unmark(d)
	s.stats.results.Add(1)
	s.observer.Settled("", r.Attempts)
	line(s.log.Info(), d).Str("outcome", "result").Int("status", r.Status).Int("attempt", r.Attempts).
		Bool("empty", r.Empty).Dur("took_ms", r.Duration).Str("upstream_request", r.UpstreamRequestID).Send()
	return stands, nil
}

// discard drops an outcome because a dead letter stands in the request's place. If that is the
// request's own, it may not be in DLQ yet.
func (s *settler) discard(d *delivery, stands publisher.Outcome) error {
	if !stands.Source.Equal(d.source()) || d.record.Lettered {
		return nil
	}
	_, err := s.finish(d, stands)
	return err
}

// failedAttempt writes down a call that failed and will be made again.
func (s *settler) failedAttempt(d *delivery, e ending) error {
	d.record.Mark, d.unexplained = nil, false
	err := s.store(d, later, 0, between(d, failpoint.Attempt, failpoint.AttemptDone, func(ctx context.Context) error {
		return s.ledger.put(ctx, publisher.RecordKey(d.req.Creator, d.req.ID), &d.record)
	}))
	if err != nil {
		return err
	}
	s.stats.retries.Add(1)
	s.observer.Retried(e.failure.Class)
	line(s.log.Info(), d).Str("outcome", "retry").Str("class", string(e.failure.Class)).Str("code", e.failure.Code).Int("status", e.answer.Status).
		Int("attempt", len(d.record.Attempts)).Time("not_before", e.after).Dur("took_ms", e.took()).Str("upstream_request", e.failure.RequestID).Send()
	return nil
}

// bury makes d a dead letter: its place is taken first, by a tombstone, then the letter is stored.
func (s *settler) bury(d *delivery, v verdict, f classify.Failure, status int) (stands publisher.Outcome, err error) {
	letter := s.letter(d, v, f, status)
	d.decided, d.exhausted = true, v.cause == causeExhausted
	how := later
	if d.called {
		how = inHand
	}
	err = s.store(d, how, 0, between(d, failpoint.Claim, failpoint.Claimed, func(ctx context.Context) (err error) {
		stands, err = s.publisher.Tombstone(ctx, letter)
		return err
	}))
	switch {
	case err != nil:
		return stands, err
	case stands.Kind != publisher.Dead || !stands.Source.Equal(d.source()):
		line(s.log.Warn(), d).Str("class", string(letter.Class)).Msg("no dead letter: the request has an outcome by now")
		s.unmark(d)
		return stands, nil
	}
	return s.finish(d, stands)
}

func (s *settler) letter(d *delivery, v verdict, f classify.Failure, status int) publisher.DeadLetter {
	attempts, throttled := d.record.counts()
	now := time.Now().UTC()
	letter := publisher.DeadLetter{
		Source: d.source(), Class: f.Class, Code: f.Code, Action: f.Action, Scope: f.Scope, Field: f.Field,
		Reason: v.reason, HTTPStatus: status, UpstreamRequestID: f.RequestID,
		Attempts: attempts + throttled, Deliveries: d.count, FailedAt: now, FirstFailedAt: now,
		Provider: s.provider, Creator: d.req.Creator, Operation: d.req.Operation,
		SourceStream: s.requests, SourceSubject: d.msg.Subject, RequestID: d.req.ID,
		History: d.record.Attempts,
	}
	if v.class != "" {
		letter.Class = v.class
	}
	if v.cause == causeUncertain {
		letter.Scope = classify.ScopeRequest
	}
	if len(d.record.Attempts) > 0 {
		letter.FirstFailedAt = d.record.Attempts[0].At
	}
	return letter
}

// finish stores in DLQ the dead letter that stands in the request's place, and writes down
// that it is there.
func (s *settler) finish(d *delivery, stands publisher.Outcome) (publisher.Outcome, error) {
	letter := *stands.Letter
	letter.History = stands.History
	letter.Payload, letter.Header = d.msg.Data, d.msg.Header
	d.decided = true
	err := s.store(d, later, len(letter.Payload), between(d, failpoint.Letter, failpoint.LetterDone, func(ctx context.Context) error {
		if err := s.publisher.DeadLetter(ctx, letter); err != nil {
			return err
		}
		d.record.Mark, d.record.Lettered = nil, true
		err := s.ledger.put(ctx, publisher.RecordKey(d.req.Creator, d.req.ID), &d.record)
		if errors.Is(err, errTaken) {
			return nil // its next owner looks it up, and finds the letter
		}
		return err
	}))
	if err != nil {
		if broker.TroubleOf(err) == broker.Never {
			err = errNotNow{fmt.Errorf("the server refuses the dead letter: %w", err)}
			s.say(d, err)
		}
		return stands, err
	}
	s.stats.deadLetters.Add(1)
	s.events.letter(&letter, d.exhausted)
	s.observer.Settled(letter.Class, letter.Attempts)
	line(s.log.Warn(), d).Str("outcome", "dead letter").Str("class", string(letter.Class)).Str("code", letter.Code).
		Int("status", letter.HTTPStatus).Int("attempt", letter.Attempts).Str("reason", letter.Reason).
		Str("action", letter.Action).Str("upstream_request", letter.UpstreamRequestID).Send()
	return stands, nil
}

// settledBefore says that a request that came again has its outcome.
func (s *settler) settledBefore(d *delivery, reason string) {
	s.unmark(d)
	line(s.log.Debug(), d).Str("outcome", "settled before").Str("reason", reason).Send()
}

// lookUp asks the server what became of a request, through the leaders of the streams.
func (s *settler) lookUp(d *delivery) (f found, err error) {
	err = s.store(d, later, 0, func(ctx context.Context) error {
		err := failpoint.Hit(failpoint.LookUp, d.req.ID)
		if err == nil {
			f.record, f.other, err = s.ledger.get(ctx, publisher.RecordKey(d.req.Creator, d.req.ID), d.source())
		}
		if err == nil {
			f.stands, err = s.publisher.Outcome(ctx, d.req.Creator, d.req.Operation, d.req.ID)
		}
		return err
	})
	return f, err
}

// mark writes down that d is about to be called, if that has to be known should the worker
// vanish: because calling it twice does harm, or because it may be what makes workers vanish. wrote: that
// took a write.
func (s *settler) mark(d *delivery) (wrote bool, err error) {
	if d.marked || !d.op.NotIdempotent && !d.unexplained && d.record.Mark == nil {
		return false, nil
	}
	m := mark{Worker: s.worker, At: time.Now().UTC().Round(0), Calls: 1}
	switch {
	case d.record.Mark != nil && !s.neverSent(d):
		m.Calls += d.record.Mark.Calls
	case d.unexplained:
		m.Calls++ // the one that no worker had marked
	}
	put := s.ledger.put
	if d.op.NotIdempotent {
		put = s.ledger.putFirst
	}
	before := d.record.Mark
	d.record.Source, d.record.Mark = d.source(), &m
	err = s.store(d, later, 0, func(ctx context.Context) error {
		if err := failpoint.Hit(failpoint.Mark, d.req.ID); err != nil {
			return err
		}
		return put(ctx, publisher.RecordKey(d.req.Creator, d.req.ID), &d.record)
	})
	if err == nil {
		err = failpoint.Hit(failpoint.Marked, d.req.ID)
	}
	if err != nil {
		// It may be stored all the same.
		s.remember(d.source(), &m)
		d.record.Mark = before
	}
	return err == nil, err
}

// remember keeps a mark in mind whose call was never made.
func (s *settler) remember(source publisher.Source, m *mark) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unsent == nil || len(s.unsent) > maxUnsent {
		s.unsent = make(map[publisher.Source]*mark)
	}
	s.unsent[source] = m
}

// maxUnsent bounds what remember keeps. A mark that is forgotten makes a request UNCERTAIN.
const maxUnsent = 100_000

// neverSent reports that the mark of d is of a call that this worker knows it never made.
func (s *settler) neverSent(d *delivery) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return d.record.Mark.equal(s.unsent[d.source()])
}

// unmark takes the mark of a call away that has ended, or that never began.
func (s *settler) unmark(d *delivery) { s.takeMark(d, false) }

// unmarkForNow is unmark for a request that this delivery of it will call later. Its record stays, if
// only to be compared with when it is marked again.
func (s *settler) unmarkForNow(d *delivery) { s.takeMark(d, true) }

func (s *settler) takeMark(d *delivery, keep bool) {
	m := d.record.Mark
	if m == nil {
		return
	}
	if !d.called {
		s.remember(d.source(), m)
	}
	d.record.Mark, d.marked = nil, false
	ctx, cancel := context.WithTimeout(s.ctx, s.timeout)
	defer cancel()
	key := publisher.RecordKey(d.req.Creator, d.req.ID)
	var err error
	if d.record.empty() && !keep {
		err = s.ledger.forget(ctx, key, &d.record)
	} else {
		err = s.ledger.put(ctx, key, &d.record)
	}
	if err != nil {
		line(s.log.Debug(), d).Err(err).Msg("its mark stays")
	}
}

// ack settles d for good. An ack that is not confirmed may have got lost, so
// it is sent again, though not for ever: a server that was restarted may know
// nothing of the delivery any more. Should the message come back, its outcome
// is found.
func (s *settler) ack(d *delivery) {
	sent := 0
	err := s.store(d, later, 0, func(ctx context.Context) error {
		if sent++; sent > acks {
			return errUnconfirmed
		}
		if err := failpoint.Hit(failpoint.Ack, d.req.ID); err != nil {
			return err
		}
		if d.reply == "" { // no delivery reached it: the reconciler found it
			return s.reader.Delete(ctx, s.requests, d.seq)
		}
		if _, err := s.nc.RequestWithContext(ctx, d.reply, ackPayload); err != nil {
			return fmt.Errorf("ack: %w", err)
		}
		return failpoint.Hit(failpoint.Acked, d.req.ID)
	})
	if err != nil {
		line(s.log.Warn(), d).Err(err).Msg("the ack is not confirmed; the outcome is stored and will be found")
	}
}

// line starts the canonical log line of a settled message.
func line(e *zerolog.Event, d *delivery) *zerolog.Event {
	return e.Str("request", d.req.ID).Str("correlation", d.req.CorrelationID).
		Str("creator", d.req.Creator).Str("operation", d.req.Operation).
		Uint64("seq", d.seq).Uint64("deliveries", d.count).Dur("age_ms", time.Since(d.stored))
}

// troubles counts errors by kind, so that each kind is logged once in a while.
type troubles struct {
	mu    sync.Mutex
	kinds map[string]*told
}

type told struct {
	at    time.Time
	times int
}

// add counts an error and reports how many there were since the last line, and whether the next one is due.
func (t *troubles) add(kind string, now time.Time) (times int, due bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.kinds == nil {
		t.kinds = make(map[string]*told)
	}
	k := t.kinds[kind]
	if k == nil {
		k = &told{}
		t.kinds[kind] = k
	}
	k.times++
	if !k.at.IsZero() && now.Sub(k.at) < troubleEvery {
		return k.times, false
	}
	times, k.at, k.times = k.times, now, 0
	return times, true
}
