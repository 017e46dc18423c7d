package consumer

import (
	"context"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/ownership"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// stage is how far a delivery has come.
type stage uint32

// The stages, in the order in which a delivery passes them. A request may go back from
// calling or settling to waiting.
const (
	arrived   stage = iota
	lookingUp       // the server is asked what became of it
	waiting         // for its call
	calling
	settling // its outcome, or its failed attempt, is being stored
)

// delivery is one message that the server gave to this worker.
type delivery struct {
	msg      *nats.Msg
	reply    string // "": the reconciler found it, no delivery did
	seq      uint64 // in the stream
	count    uint64 // deliveries, this one included
	number   uint64 // among all deliveries of the consumer
	pending  uint64 // messages of the partition that the server has not delivered yet
	stored   time.Time
	extended time.Time // when the server last heard that it is being worked on
	lease    *ownership.Lease

	req       publisher.Request
	malformed error // why it cannot be called
	op        Operation
	call      func(context.Context) classify.Answer // nil: to be prepared again
	expires   time.Time
	why       resilience.Refusal // guarded by the partition's lock

	state atomic.Uint32 // a stage
	// The record is changed by the goroutine that works on the delivery. The attempts that
	// other goroutines may read are in tried.
	record record
	tried  atomic.Int64

	// Facts, not states.
	counted     bool // among its creator's requests here
	unexplained bool // another worker vanished that may have been calling it
	starved     bool // waits for a place or a token that other creators use
	called      bool // in this delivery
	marked      bool // the call was marked, and not made yet
	refreshed   bool // the API's credentials were renewed for it
	decided     bool // an outcome is being stored, or is
	exhausted   bool // its dead letter says that it had all its attempts
	panicked    bool
}

func (d *delivery) enter(s stage) { d.state.Store(uint32(s)) }
func (d *delivery) stage() stage  { return stage(d.state.Load()) }

// source names the stored request that d is a delivery of.
func (d *delivery) source() publisher.Source {
	return publisher.Source{Sequence: d.seq, Stored: d.stored}
}

// suspect reports whether the request was being called when its worker
// vanished, and that not for the first time.
func (d *delivery) suspect() bool { return d.record.Mark != nil && !d.marked }

// size is what d takes of the memory for requests that wait.
func (d *delivery) size() int64 { return int64(len(d.msg.Data)) + deliverySize }

// deliverySize is about what a delivery takes beside its payload, in bytes.
const deliverySize = 1 << 10

// attempted adds a failed call to d's record.
func (d *delivery) attempted(a publisher.Attempt) {
	d.record.Attempts = append(d.record.Attempts, a)
	d.tried.Store(int64(len(d.record.Attempts)))
}

// adopt makes r the record of d.
func (d *delivery) adopt(r record) {
	d.record = r
	d.tried.Store(int64(len(r.Attempts)))
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

// open reads the server's part of a delivery; the request in it is read by caller.read.
func open(m *nats.Msg, now time.Time) (*delivery, error) {
	meta, err := m.Metadata()
	if err != nil {
		return nil, fmt.Errorf("read delivery %q: %w", m.Reply, err)
	}
	return &delivery{
		msg: m, reply: m.Reply, seq: meta.Sequence.Stream, number: meta.Sequence.Consumer, count: meta.NumDelivered, pending: meta.NumPending,
		stored: meta.Timestamp, extended: now,
	}, nil
}
