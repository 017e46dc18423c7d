package publisher

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/broker"
)

// Attempt is one call that failed.
type Attempt struct {
	At     time.Time      `json:"at"`
	Ms     int64          `json:"ms"` // how long it took
	Class  classify.Class `json:"class"`
	Status int            `json:"status,omitempty"`
	Code   string         `json:"code,omitempty"`
}

// DeadLetter is a request that will not be called any more, and why.
type DeadLetter struct {
	Class             classify.Class `json:"class"`
	Code              string         `json:"code,omitempty"`
	Reason            string         `json:"reason"`
	Action            string         `json:"action,omitempty"`
	Scope             classify.Scope `json:"scope,omitempty"`
	Field             string         `json:"field,omitempty"`
	HTTPStatus        int            `json:"http_status,omitempty"`
	Attempts          int            `json:"attempts"` // calls made
	Deliveries        uint64         `json:"deliveries"`
	FirstFailedAt     time.Time      `json:"first_failed_at"`
	FailedAt          time.Time      `json:"failed_at"`
	UpstreamRequestID string         `json:"upstream_request_id,omitempty"`
	Provider          string         `json:"provider"`
	Creator           string         `json:"creator"`
	Operation         string         `json:"operation"`
	SourceStream      string         `json:"source_stream"`
	SourceSubject     string         `json:"source_subject"`
	Source            Source         `json:"source"` // the stored request
	RequestID         string         `json:"request_id"`

	History []Attempt `json:"-"`
	// Payload and Header are the request's own.
	Payload []byte      `json:"-"`
	Header  nats.Header `json:"-"`
}

// DeadLetter stores a dead letter and returns nil once it is stored, now or before. Another
// stored request's letter under the same subject stays in the stream, below this one. See
// Tombstone, which comes first.
func (p *Publisher) DeadLetter(ctx context.Context, d DeadLetter) error {
	fail := func(err error) error {
		return fmt.Errorf("publish dead letter of %s: %w", clip(d.RequestID, 80), err)
	}
	subject, err := p.ns.DeadLetterSubject(d.Class, d.Creator, d.Operation, d.RequestID)
	if err != nil {
		return fail(err)
	}
	d = d.bounded(p.room())
	m := &nats.Msg{Subject: subject, Header: d.headers(p.room()), Data: d.Payload}
	name, err := objectName("dlq", d.Creator, d.Operation, d.RequestID, d.Source)
	if err != nil {
		return fail(err)
	}
	if err := p.storing(ctx, m, name, func() error { return p.putLetter(ctx, m, &d) }); err != nil {
		return fail(err)
	}
	return nil
}

// putLetter publishes a letter unless it is stored already.
func (p *Publisher) putLetter(ctx context.Context, m *nats.Msg, d *DeadLetter) error {
	for expected := uint64(0); ; {
		m.Header[jetstream.ExpectedLastSubjSeqHeader] = []string{strconv.FormatUint(expected, 10)}
		_, err := p.publish(ctx, m)
		if err == nil {
			return nil
		}
		if broker.TroubleOf(err) != broker.WrittenBetween {
			return err
		}
		there, err := p.reader.Last(ctx, p.ns.Stream(DLQ), m.Subject)
		switch {
		case err != nil:
			return err
		case there == nil:
			expected = 0
		case d.isLetter(there):
			return nil
		default:
			expected = there.Sequence
		}
	}
}

// isLetter reports whether a stored message is this dead letter. Letters of earlier versions do
// not say when their request was stored.
func (d *DeadLetter) isLetter(m *broker.Message) bool {
	s := sourceOf(m.Header, DlqSourceSeq, DlqSourceStored)
	if s.Stored.IsZero() {
		s.Stored = d.Source.Stored
	}
	return s.Equal(d.Source) && m.Header.Get(DlqMsgID) == d.RequestID
}
