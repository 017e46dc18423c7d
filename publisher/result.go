package publisher

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
)

// Result is the API's answer to a request.
type Result struct {
	Source                                Source // the stored request
	RequestID, CorrelationID, Traceparent string
	Creator, Operation                    string
	ContentType, UpstreamRequestID        string
	Status                                int
	Attempts                              int // calls made, the last one included
	Duration                              time.Duration
	Empty                                 bool   // nothing was found, which is a valid answer
	Body                                  []byte // as it came
}

// Result puts a result in its request's place and returns what stands there: this result, or an
// outcome that was there before. An answer is this request's if stands is Answered. A body that
// is too large for the server goes to the object store.
func (p *Publisher) Result(ctx context.Context, r Result) (stands Outcome, err error) {
	fail := func(err error) (Outcome, error) {
		return Outcome{}, fmt.Errorf("publish result of %s: %w", clip(r.RequestID, 80), err)
	}
	subject, err := p.ns.ResultSubject(r.Creator, r.Operation, r.RequestID)
	if err != nil {
		return fail(err)
	}
	name, err := objectName("results", r.Creator, r.Operation, r.RequestID, r.Source)
	if err != nil {
		return fail(err)
	}
	m := &nats.Msg{Subject: subject, Header: r.headers(), Data: r.Body}
	mine := Outcome{Kind: Answered, Source: r.Source}
	err = p.storing(ctx, m, name, func() (err error) {
		stands, err = p.take(ctx, m, mine, r.Creator, r.Operation, r.RequestID)
		return err
	})
	if err != nil {
		return fail(err)
	}
	if object := m.Header.Get(HeaderBodyObject); object != "" && object != stands.object {
		p.discard(ctx, object)
	}
	return stands, nil
}

func (r *Result) headers() nats.Header {
	h := make(nats.Header, 16)
	identify(h, r.RequestID, r.Creator, r.Operation)
	setSource(h, r.Source, HeaderSourceSeq, HeaderSourceStored)
	set(h, HeaderContentType, r.ContentType, maxHeader)
	set(h, HeaderCorrelationID, r.CorrelationID, maxHeader)
	set(h, HeaderTraceparent, r.Traceparent, maxHeader)
	set(h, HeaderUpstreamRequestID, r.UpstreamRequestID, maxHeader)
	h[HeaderStatus] = []string{strconv.Itoa(r.Status)}
	h[HeaderAttempts] = []string{strconv.Itoa(r.Attempts)}
	h[HeaderDurationMs] = []string{strconv.FormatInt(r.Duration.Milliseconds(), 10)}
	if r.Empty {
		h[HeaderEmpty] = []string{"true"}
	}
	return h
}
