package publisher

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
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
	SourceSequence    uint64         `json:"source_seq"`
	RequestID         string         `json:"request_id"`

	History []Attempt `json:"-"`
	// Payload and Header are the request's own.
	Payload []byte      `json:"-"`
	Header  nats.Header `json:"-"`
}

// DeadLetter stores a dead letter and returns nil once it is stored, now or
// before.
func (p *Publisher) DeadLetter(ctx context.Context, d DeadLetter) error {
	subject, err := p.ns.DeadLetterSubject(d.Class, d.Creator, d.Operation, d.RequestID)
	if err != nil {
		return fmt.Errorf("publish dead letter of %s: %w", clip(d.RequestID, 80), err)
	}
	h := d.headers()
	h[jetstream.MsgIDHeader] = []string{oneLine("dlq:"+d.RequestID, 2*maxHeader)}
	h[jetstream.ExpectedLastSubjSeqHeader] = []string{"0"}
	m := &nats.Msg{Subject: subject, Header: h, Data: d.Payload}
	if !p.fits(m) {
		name, err := objectName("dlq", d.Creator, d.Operation, d.RequestID)
		if err == nil {
			err = p.outsource(ctx, m, name)
		}
		if err != nil {
			return fmt.Errorf("publish dead letter of %s: %w", clip(d.RequestID, 80), err)
		}
	}
	if _, _, err := p.stored(ctx, m); err != nil {
		return fmt.Errorf("publish dead letter of %s: %w", clip(d.RequestID, 80), err)
	}
	return nil
}

// headers are the request's own, without those that are the server's, which
// would act again, and those that may carry credentials.
func (d *DeadLetter) headers() nats.Header {
	h := make(nats.Header, len(d.Header)+20)
	for name, values := range d.Header {
		if !strings.HasPrefix(name, "Nats-") && !strings.HasPrefix(name, "Dlq-") && !secret(name) {
			h[name] = values
		}
	}
	for name, value := range map[string]string{
		DlqClass: string(d.Class), DlqCode: d.Code, DlqReason: d.Reason, DlqAction: d.Action,
		DlqScope: string(d.Scope), DlqField: d.Field, DlqHTTPStatus: positive(d.HTTPStatus),
		DlqAttempts: strconv.Itoa(d.Attempts), DlqDeliveries: strconv.FormatUint(d.Deliveries, 10),
		DlqFirstFailedAt: timestamp(d.FirstFailedAt), DlqFailedAt: timestamp(d.FailedAt),
		DlqUpstreamRequestID: d.UpstreamRequestID, DlqProvider: d.Provider,
		DlqCreator: d.Creator, DlqOperation: d.Operation, DlqSourceStream: d.SourceStream,
		DlqSourceSubject: d.SourceSubject, DlqSourceSeq: strconv.FormatUint(d.SourceSequence, 10),
		DlqMsgID: d.RequestID,
	} {
		set(h, name, value, maxHeader)
	}
	if len(d.History) > 0 {
		set(h, DlqHistory, history(d.History), maxHistory)
	}
	return h
}

// history is the attempts as JSON; of too many, the latest.
func history(attempts []Attempt) string {
	for {
		b, err := json.Marshal(attempts)
		if err != nil {
			return ""
		}
		if len(b) <= maxHistory {
			return string(b)
		}
		attempts = attempts[(len(attempts)+1)/2:]
	}
}

func positive(n int) string {
	if n <= 0 {
		return ""
	}
	return strconv.Itoa(n)
}

func timestamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}
