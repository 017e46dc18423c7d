package consumer

import (
	"strconv"
	"time"

	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/control"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// events tells subscribers of EVENTS. The same is stored elsewhere, too, so it
// neither waits nor fails.
type events struct {
	publisher        *publisher.Publisher
	worker, provider string
	log              zerolog.Logger
}

func (es *events) send(e publisher.Event) {
	e.At, e.Worker = time.Now().UTC(), es.worker
	if err := es.publisher.Event(e); err != nil {
		es.log.Debug().Err(err).Str("kind", string(e.Kind)).Msg("an event got lost")
	}
}

// often is how often events that are alike are told.
const often = 10 * time.Minute

// slot names the time in which an event is told once.
func slot(now time.Time) string { return now.UTC().Truncate(often).Format(time.RFC3339) }

func until(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

// held tells of a hold that an answer caused.
func (es *events) held(d *delivery, f classify.Failure, scope classify.Scope, h resilience.Hold) {
	e := publisher.Event{
		Kind: publisher.CreatorHeld, Creator: d.req.Creator, Operation: d.req.Operation, RequestID: d.req.ID,
		Class: h.Class, Code: f.Code, Reason: h.Reason, Until: until(h.Until), Once: h.Until.UTC().Format(time.RFC3339Nano),
	}
	switch scope {
	case classify.ScopeAccount:
		e.Kind, e.Creator, e.RequestID = publisher.AccountHeld, "", ""
	case classify.ScopeProvider:
		e.Kind, e.Creator, e.RequestID = publisher.ProviderHeld, "", ""
	}
	es.send(e)
	if action := actionFor(f, scope); action != "" {
		e.Kind, e.Action, e.Once = publisher.ActionRequired, action, action+slot(h.Since)
		es.send(e)
	}
}

// actionFor names the step that a person must take: the provider's own word for it, otherwise the one
// that the class asks for.
func actionFor(f classify.Failure, scope classify.Scope) string {
	switch {
	case f.Action != "":
		return f.Action
	case f.Class == classify.SessionExpired:
		return "relink_connection"
	case scope == classify.ScopeAccount && !f.Retryable:
		return "check_account"
	}
	return ""
}

// breakers tells what a call did to the breakers.
func (es *events) breakers(creator string, ch resilience.Change) {
	now := time.Now()
	if ch.Opened {
		es.log.Warn().Str("creator", creator).Time("until", ch.OpenUntil).Msg("breaker opened")
		es.send(publisher.Event{Kind: publisher.BreakerOpened, Creator: creator, Until: until(ch.OpenUntil), Once: ch.OpenUntil.UTC().Format(time.RFC3339Nano)})
	}
	if ch.Closed {
		es.log.Info().Str("creator", creator).Msg("breaker closed")
		es.send(publisher.Event{Kind: publisher.BreakerClosed, Creator: creator, Once: now.UTC().Format(time.RFC3339Nano)})
	}
	if ch.ProviderOpened {
		es.log.Error().Str("provider", es.provider).Msg("the provider's breaker opened: several creators fail in a row")
		es.send(publisher.Event{Kind: publisher.BreakerOpened, Reason: "several creators fail in a row", Once: slot(now)})
	}
	if ch.ProviderClosed {
		es.log.Info().Str("provider", es.provider).Msg("the provider's breaker closed")
		es.send(publisher.Event{Kind: publisher.BreakerClosed, Once: slot(now)})
	}
}

// letter tells of the first dead letters of a kind, not of each.
func (es *events) letter(l *publisher.DeadLetter, exhausted bool) {
	now := slot(l.FailedAt)
	e := publisher.Event{
		Kind: publisher.FirstOfClass, Operation: l.Operation, Class: l.Class, Code: l.Code, Reason: l.Reason, Action: l.Action,
		Once: string(l.Class) + now,
	}
	es.send(e)
	if exhausted {
		e.Kind, e.Creator, e.RequestID, e.Once = publisher.AttemptsExhausted, l.Creator, l.RequestID, l.Operation+string(l.Class)+now
		es.send(e)
	}
}

// vanished tells that requests that waited are stored no more. It names none: they may have been erased.
func (es *events) vanished() {
	es.send(publisher.Event{
		Kind: publisher.RequestVanished, Once: slot(time.Now()),
		Reason: "requests that waited for their call were deleted from the stream",
	})
}

// changed returns a function that tells that a hold has ended before its time. The worker that
// calls for the creator tells it.
func (es *events) changed(owns func(creator string) bool) func(control.Change) {
	return func(c control.Change) {
		if c.Kind != control.Released {
			return
		}
		e := publisher.Event{Once: strconv.FormatUint(c.Revision, 10)}
		switch c.Target.Kind {
		case control.Account:
			e.Kind = publisher.AccountReleased
		case control.Provider:
			e.Kind = publisher.ProviderReleased
		default:
			if !owns(c.Target.Creator) {
				return
			}
			e.Kind, e.Creator = publisher.CreatorReleased, c.Target.Creator
		}
		es.send(e)
	}
}
