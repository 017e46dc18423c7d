package publisher

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/nats-io/nats.go"
)

// tombstone is the body of a dead letter's claim on its request's place in RESULTS.
type tombstone struct {
	DeadLetter
	History []Attempt `json:"history,omitempty"`
}

// Tombstone claims the outcome of d's request for d, before the dead letter itself is stored.
// It returns what stands in the request's place: only if that is Dead and of d's source may the
// dead letter be stored. Subscribers of results learn from it that the request has ended badly,
// by the header Headgate-Dead-Letter.
func (p *Publisher) Tombstone(ctx context.Context, d DeadLetter) (stands Outcome, err error) {
	fail := func(err error) (Outcome, error) {
		return Outcome{}, fmt.Errorf("claim dead letter of %s: %w", clip(d.RequestID, 80), err)
	}
	subject, err := p.ns.ResultSubject(d.Creator, d.Operation, d.RequestID)
	if err != nil {
		return fail(err)
	}
	if _, err := p.ns.DeadLetterSubject(d.Class, d.Creator, d.Operation, d.RequestID); err != nil {
		return fail(err) // its letter could not be stored
	}
	d = d.bounded(p.room())
	body, err := json.Marshal(tombstone{d, d.History})
	if err != nil {
		return fail(err)
	}
	h := make(nats.Header, 12)
	h[HeaderDeadLetter] = []string{string(d.Class)}
	identify(h, d.RequestID, d.Creator, d.Operation)
	setSource(h, d.Source, HeaderSourceSeq, HeaderSourceStored)
	set(h, HeaderCorrelationID, d.Header.Get(HeaderCorrelationID), maxHeader)
	set(h, HeaderTraceparent, d.Header.Get(HeaderTraceparent), maxHeader)
	h[HeaderContentType] = []string{"application/json"}

	d.Payload, d.Header = nil, nil
	mine := Outcome{Kind: Dead, Source: d.Source, Letter: &d, History: d.History}
	stands, err = p.take(ctx, &nats.Msg{Subject: subject, Header: h, Data: body}, mine, d.Creator, d.Operation, d.RequestID)
	if err != nil {
		return fail(err)
	}
	return stands, nil
}

// identify says whose outcome a message is. Names and ids are fit for a header as they are, see
// ParseRequest, so that subject and headers agree.
func identify(h nats.Header, id, creator, operation string) {
	h[HeaderRequestID] = []string{id}
	if creator != "" {
		h[HeaderCreator] = []string{creator}
	}
	if operation != "" {
		h[HeaderOperation] = []string{operation}
	}
}
