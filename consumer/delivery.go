package consumer

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// delivery is one message that the server gave to this worker.
type delivery struct {
	msg      *nats.Msg
	seq      uint64 // in the stream
	count    uint64 // deliveries, this one included
	stored   time.Time
	extended time.Time // when the server last heard that it is being worked on

	req  publisher.Request
	op   Operation
	call func(context.Context) classify.Answer // nil: to be prepared again

	record      record // what LEDGER says of it
	expires     time.Time
	waited      bool // has been given a turn
	starved     bool // waits for the worker's calls in flight alone
	unexplained bool // was another worker's when that vanished
	alone       bool // is the one suspect that may be called
	called      bool // in this delivery
	refreshed   bool // the API's credentials were renewed for it
	outcome     bool // is being stored, or is
	panicked    bool
	why         resilience.Refusal
}

// suspect reports whether the request was being called when its worker
// vanished, and that not for the first time.
func (d *delivery) suspect() bool { return d.record.Mark != nil }

// parked is a message that was NAK'd until its turn.
type parked struct {
	id     string
	reply  string
	kind   resilience.Kind
	turn   time.Time // zero: until somebody releases the creator
	record record
	own    bool // its turn is its own backoff, not the creator's
	why    resilience.Refusal

	unexplained bool
}

var (
	ackPayload      = []byte("+ACK")
	nakPayload      = []byte("-NAK")
	progressPayload = []byte("+WPI")
)

func nakAfter(delay time.Duration) []byte {
	if delay <= 0 {
		return nakPayload
	}
	b := append(make([]byte, 0, 40), `-NAK {"delay":`...)
	b = strconv.AppendInt(b, int64(delay), 10)
	return append(b, '}')
}

// open reads what the server says of a delivery; the request in it is read by read.
func open(m *nats.Msg, now time.Time) (*delivery, error) {
	meta, err := m.Metadata()
	if err != nil {
		return nil, fmt.Errorf("read delivery %q: %w", m.Reply, err)
	}
	return &delivery{
		msg: m, seq: meta.Sequence.Stream, count: meta.NumDelivered,
		stored: meta.Timestamp, extended: now,
	}, nil
}
