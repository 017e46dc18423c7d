package publisher

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Result is the API's answer to a request.
type Result struct {
	RequestID, CorrelationID, Traceparent string
	Creator, Operation                    string
	ContentType, UpstreamRequestID        string
	Status                                int
	Attempts                              int // calls made, the last one included
	Duration                              time.Duration
	Empty                                 bool   // nothing was found, which is a valid answer
	Body                                  []byte // as it came
}

// Result stores a result and returns nil once it is stored, now or before: a
// request has one. With the id in its subject a second one is impossible. A body
// that is too large for the server goes to the object store.
func (p *Publisher) Result(ctx context.Context, r Result) error {
	id := ""
	if p.idInSubject {
		id = r.RequestID
	}
	subject, err := p.ns.ResultSubject(r.Creator, r.Operation, id)
	if err != nil {
		return fmt.Errorf("publish result of %s: %w", clip(r.RequestID, 80), err)
	}
	h := make(nats.Header, 16)
	h[jetstream.MsgIDHeader] = []string{resultMsgID(r.RequestID)}
	if p.idInSubject {
		h[jetstream.ExpectedLastSubjSeqHeader] = []string{"0"}
	}
	set(h, HeaderContentType, r.ContentType, maxHeader)
	set(h, HeaderRequestID, r.RequestID, maxHeader)
	set(h, HeaderCorrelationID, r.CorrelationID, maxHeader)
	set(h, HeaderTraceparent, r.Traceparent, maxHeader)
	set(h, HeaderCreator, r.Creator, maxHeader)
	set(h, HeaderOperation, r.Operation, maxHeader)
	set(h, HeaderUpstreamRequestID, r.UpstreamRequestID, maxHeader)
	h[HeaderStatus] = []string{strconv.Itoa(r.Status)}
	h[HeaderAttempts] = []string{strconv.Itoa(r.Attempts)}
	h[HeaderDurationMs] = []string{strconv.FormatInt(r.Duration.Milliseconds(), 10)}
	if r.Empty {
		h[HeaderEmpty] = []string{"true"}
	}
	m := &nats.Msg{Subject: subject, Header: h, Data: r.Body}
	if !p.fits(m) {
		name, err := objectName("results", r.Creator, r.Operation, r.RequestID)
		if err == nil {
			err = p.outsource(ctx, m, name)
		}
		if err != nil {
			return fmt.Errorf("publish result of %s: %w", clip(r.RequestID, 80), err)
		}
	}
	if _, _, err := p.stored(ctx, m); err != nil {
		return fmt.Errorf("publish result of %s: %w", clip(r.RequestID, 80), err)
	}
	return nil
}
