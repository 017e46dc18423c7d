package publisher

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
)

// EventKind is what happened. docs/event.schema.json describes the events.
type EventKind string

// Events, on events.<kind>.<creator>, or events.<kind> where no creator is concerned.
const (
	CreatorHeld       EventKind = "creator.held"
	CreatorReleased   EventKind = "creator.released"
	AccountHeld       EventKind = "account.held"
	AccountReleased   EventKind = "account.released"
	ProviderHeld      EventKind = "provider.held"
	ProviderReleased  EventKind = "provider.released"
	BreakerOpened     EventKind = "breaker.opened"
	BreakerClosed     EventKind = "breaker.closed"
	ActionRequired    EventKind = "action.required"   // a person must do Action
	CreditsThreshold  EventKind = "credits.threshold" // Percent of the day's credits are used
	FirstOfClass      EventKind = "dlq.first_of_class"
	AttemptsExhausted EventKind = "attempts.exhausted"
	RequestVanished   EventKind = "request.vanished" // it waited for its call and was deleted from the stream
)

// EventKinds are all of them.
var EventKinds = []EventKind{
	CreatorHeld, CreatorReleased, AccountHeld, AccountReleased, ProviderHeld, ProviderReleased,
	BreakerOpened, BreakerClosed, ActionRequired, CreditsThreshold, FirstOfClass, AttemptsExhausted, RequestVanished,
}

// Event is something that people may have to know, or to react to.
type Event struct {
	Kind      EventKind      `json:"kind"`
	At        time.Time      `json:"at"`
	Creator   string         `json:"creator,omitempty"`
	Operation string         `json:"operation,omitempty"`
	RequestID string         `json:"request_id,omitempty"`
	Class     classify.Class `json:"class,omitempty"`
	Code      string         `json:"code,omitempty"` // the provider's own
	Reason    string         `json:"reason,omitempty"`
	Action    string         `json:"action,omitempty"`
	Until     *time.Time     `json:"until,omitempty"` // of a hold or an open breaker; absent: until a person acts
	Percent   int            `json:"percent,omitempty"`
	Worker    string         `json:"worker,omitempty"`

	// Once is what makes two events one, within the stream's duplicate window: "" is
	// the creator.
	Once string `json:"-"`
}

// Event publishes an event without waiting for it to be stored. Nothing depends
// on it: a lost event is found in the streams and buckets.
func (p *Publisher) Event(e Event) error {
	subject := p.ns.Subject("events", string(e.Kind))
	if e.Creator != "" {
		token, err := EncodeToken(e.Creator)
		if err != nil {
			return fmt.Errorf("publish event %s: creator: %w", e.Kind, err)
		}
		subject += "." + token
	}
	data, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("publish event %s: %w", e.Kind, err)
	}
	id := strings.Join([]string{"event", string(e.Kind), e.Creator, e.Once}, ":")
	m := &nats.Msg{Subject: subject, Data: data, Header: nats.Header{
		jetstream.MsgIDHeader: {oneLine(id, 2*maxHeader)}, HeaderContentType: {"application/json"},
	}}
	if _, err := p.js.PublishMsgAsync(m); err != nil {
		return fmt.Errorf("publish event %s: %w", e.Kind, err)
	}
	return nil
}
