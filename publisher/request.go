package publisher

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"
)

// ErrInvalid means that a request can never be published as it is.
var ErrInvalid = errors.New("invalid request")

// invalid makes an error an ErrInvalid.
type invalid struct{ error }

func (invalid) Is(target error) bool { return target == ErrInvalid }
func (e invalid) Unwrap() error      { return e.error }

// Request is a call to be made on a creator's behalf.
type Request struct {
	// ID names the request for as long as its result is kept; a repeat under
	// the same id is not a new request. It is one line of at most 1,024 bytes, without blanks
	// at its ends, and does not begin with ~. Empty: Publish makes one.
	ID string
	// Creator and Operation may be any text without control bytes, and without blanks at its
	// ends, whose subject token is not longer than 128 bytes.
	Creator, Operation string
	Payload            []byte
	// CorrelationID and Traceparent travel to the API and to the outcome.
	CorrelationID, Traceparent string
	// Deadline is when the call is of no use any more; zero: when the
	// configured age is reached.
	Deadline time.Time
	// Header holds further headers. They are kept in a dead letter.
	Header nats.Header
}

// RequestID is the id of the request that an event of a webhook source causes, so that
// an event that is delivered twice is one request.
func RequestID(source, eventID string) string { return source + ":" + eventID }

// Ack says what became of a request.
type Ack struct {
	ID        string
	Sequence  uint64 // in the request stream; of the first one, if Duplicate
	Duplicate bool   // the stream has a request with this id
}

// Publish stores a request and waits until it is stored. ErrFull: the stream
// refuses it, and the ingester has to keep it and slow down.
func (p *Publisher) Publish(ctx context.Context, r Request) (Ack, error) {
	if r.ID == "" {
		r.ID = nuid.Next()
	}
	m, err := r.message(p.ns)
	if err != nil {
		return Ack{}, invalid{err}
	}
	ack, err := p.publish(ctx, m)
	switch {
	case errors.Is(err, ErrFull):
		return Ack{}, fmt.Errorf("publish request %s: %w; keep it and try again when some of the backlog is done", clip(r.ID, 80), err)
	case errors.Is(err, jetstream.ErrNoStreamResponse), errors.Is(err, nats.ErrNoResponders):
		return Ack{}, fmt.Errorf("publish request %s: no stream takes %s (has `headgate setup` been run?): %w", clip(r.ID, 80), m.Subject, err)
	case err != nil:
		return Ack{}, fmt.Errorf("publish request %s: %w", clip(r.ID, 80), err)
	}
	return Ack{ID: r.ID, Sequence: ack.Sequence, Duplicate: ack.Duplicate}, nil
}

func (r *Request) message(ns Namespace) (*nats.Msg, error) {
	subject, err := ns.RequestSubject(r.Creator, r.Operation)
	if err != nil {
		return nil, err
	}
	m := &nats.Msg{Subject: subject, Data: r.Payload, Header: nats.Header{}}
	for name, values := range r.Header {
		if strings.HasPrefix(name, "Nats-") {
			return nil, fmt.Errorf("header %s: names that start with Nats- are the server's", name)
		}
		m.Header[name] = values
	}
	if !validID(r.ID) {
		return nil, fmt.Errorf("id %q must be one line of at most %d bytes, without blanks at its ends, and must not begin with %s", clip(r.ID, 80), maxHeader, fallbackMark)
	}
	m.Header[jetstream.MsgIDHeader] = []string{r.ID}
	set(m.Header, HeaderCorrelationID, r.CorrelationID, maxHeader)
	set(m.Header, HeaderTraceparent, r.Traceparent, maxHeader)
	if !r.Deadline.IsZero() {
		m.Header[HeaderDeadline] = []string{r.Deadline.UTC().Format(time.RFC3339Nano)}
	}
	return m, nil
}

// fallbackMark begins the id of a request that has none of its own. An id of a client's that
// begins with it counts as none, so that no client can take another request's fallback id.
const fallbackMark = "~"

// validID reports whether an id stays the same in a subject, a header and a key, and is not a
// fallback id.
func validID(id string) bool {
	return id != "" && id == oneLine(id, maxHeader) && !strings.HasPrefix(id, fallbackMark)
}

// ParseRequest reads a stored request. It trusts nothing, and on an error still
// returns what could be read, so that a dead letter can name it: a creator or an operation that
// cannot be read is empty. A request that has no id, or one that is not valid, is named after
// fallbackID, which has to be its own, with ~ in front.
func ParseRequest(ns Namespace, subject string, h nats.Header, payload []byte, fallbackID string) (Request, error) {
	r := Request{
		ID: h.Get(jetstream.MsgIDHeader), Payload: payload,
		CorrelationID: oneLine(h.Get(HeaderCorrelationID), maxHeader),
		Traceparent:   oneLine(h.Get(HeaderTraceparent), maxHeader),
	}
	if !validID(r.ID) {
		r.ID = fallbackMark + fallbackID
	}
	r.Header = withoutForged(h, r.ID)
	var err error
	if r.Creator, r.Operation, err = ns.ParseStored(subject); err != nil {
		return r, err
	}
	if deadline := h.Get(HeaderDeadline); deadline != "" {
		if r.Deadline, err = time.Parse(time.RFC3339, deadline); err != nil {
			return r, fmt.Errorf("header %s %q must be an RFC 3339 time", HeaderDeadline, clip(deadline, 40))
		}
		if r.Deadline.IsZero() {
			r.Deadline = r.Deadline.Add(1) // the zero time means none
		}
	}
	return r, nil
}

// withoutForged is h without the headers that are not the request's to set.
func withoutForged(h nats.Header, id string) nats.Header {
	cloned := false
	for name := range h {
		if !forged(name, id) {
			continue
		}
		if !cloned {
			h, cloned = maps.Clone(h), true
		}
		delete(h, name)
	}
	return h
}
