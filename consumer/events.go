package consumer

import (
	"strconv"
	"strings"
	"time"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// event tells whoever listens. What it tells is stored elsewhere, too, so it
// neither waits nor fails.
func (w *Worker) event(e publisher.Event) {
	e.At, e.Worker = time.Now().UTC(), w.cfg.Name
	if err := w.publisher.Event(e); err != nil {
		w.log.Debug().Err(err).Str("kind", string(e.Kind)).Msg("an event got lost")
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

// heldEvent tells of a hold that an answer caused.
func (w *Worker) heldEvent(d *delivery, f classify.Failure, scope classify.Scope, h resilience.Hold) {
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
	w.event(e)
	if action := actionFor(f, scope); action != "" {
		e.Kind, e.Action, e.Once = publisher.ActionRequired, action, action+slot(h.Since)
		w.event(e)
	}
}

// actionFor is what somebody must do: what the provider says, else what its
// class means.
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

// breakerEvents tell what a call did to the breakers.
func (w *Worker) breakerEvents(c *creator, ch resilience.Change) {
	now := time.Now()
	if ch.Opened {
		w.event(publisher.Event{Kind: publisher.BreakerOpened, Creator: c.name, Until: until(ch.OpenUntil), Once: ch.OpenUntil.UTC().Format(time.RFC3339Nano)})
	}
	if ch.Closed {
		w.event(publisher.Event{Kind: publisher.BreakerClosed, Creator: c.name, Once: now.UTC().Format(time.RFC3339Nano)})
	}
	if ch.ProviderOpened {
		w.event(publisher.Event{Kind: publisher.BreakerOpened, Reason: "several creators fail in a row", Once: slot(now)})
	}
	if ch.ProviderClosed {
		w.event(publisher.Event{Kind: publisher.BreakerClosed, Once: slot(now)})
	}
}

// letterEvents tell of the first dead letters of a kind, not of each.
func (w *Worker) letterEvents(l *publisher.DeadLetter) {
	now := slot(l.FailedAt)
	e := publisher.Event{
		Kind: publisher.FirstOfClass, Operation: l.Operation, Class: l.Class, Code: l.Code, Reason: l.Reason, Action: l.Action,
		Once: string(l.Class) + now,
	}
	w.event(e)
	if strings.HasPrefix(l.Reason, exhausted) {
		e.Kind, e.Creator, e.RequestID, e.Once = publisher.AttemptsExhausted, l.Creator, l.RequestID, l.Operation+string(l.Class)+now
		w.event(e)
	}
}

// releasedEvent tells that a hold was ended before its time, by whoever calls for
// the creator.
func (w *Worker) releasedEvent(key string, revision uint64) {
	e := publisher.Event{Once: strconv.FormatUint(revision, 10)}
	switch name, err := creatorOf(key); {
	case err == nil:
		if !w.owns(name) {
			return
		}
		e.Kind, e.Creator = publisher.CreatorReleased, name
	case key == holdAccount:
		e.Kind = publisher.AccountReleased
	default:
		e.Kind = publisher.ProviderReleased
	}
	w.event(e)
}
