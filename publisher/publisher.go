// Package publisher is everything that writes to a stream: the subjects and
// streams, and what is published on them: requests, results, dead letters and
// events.
//
// An ingester needs [New] and [Publisher.Publish]. Any NATS client in any
// language does the same with one publish on requests.<creator>.<operation>
// and a Nats-Msg-Id header.
package publisher

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Publisher writes to the streams of one namespace. It is safe for concurrent
// use.
type Publisher struct {
	js          jetstream.JetStream
	ns          Namespace
	idInSubject bool
}

// New makes a publisher for streams that Topology.Ensure has made.
func New(js jetstream.JetStream, t Topology) *Publisher {
	return &Publisher{js: js, ns: t.Namespace, idInSubject: !t.NoIDInSubject}
}

// JetStream's error codes that say what became of a message.
const (
	codeStored        = 10071 // the subject has its one message already
	codeInFlight      = 10158 // a message with this id is being stored
	codeInFlightBySeq = 10164 // a message on this subject is being stored
	codeNotStored     = 10077 // "maximum messages per subject exceeded" and the like
)

// ErrFull means that a stream takes no more messages, or no more of this
// creator and operation. Nothing was stored and nothing was dropped.
var ErrFull = errors.New("the stream is full")

// stored publishes m until it is known to be stored, and reports whether it was
// there before. A message in flight is in doubt: it is published again.
func (p *Publisher) stored(ctx context.Context, m *nats.Msg, opts ...jetstream.PublishOpt) (ack *jetstream.PubAck, before bool, err error) {
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		future, err := p.js.PublishMsgAsync(m, opts...)
		if err != nil {
			return nil, false, err
		}
		select {
		case ack := <-future.Ok():
			return ack, ack.Duplicate, nil
		case err = <-future.Err():
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
		var api *jetstream.APIError
		if !errors.As(err, &api) {
			return nil, false, err
		}
		switch api.ErrorCode {
		case codeStored:
			return nil, true, nil
		case codeInFlight, codeInFlightBySeq:
		case codeNotStored:
			if strings.HasPrefix(api.Description, "maximum") {
				return nil, false, fmt.Errorf("%w: %s", ErrFull, api.Description)
			}
			return nil, false, err
		default:
			return nil, false, err
		}
		select {
		case <-ctx.Done():
			return nil, false, fmt.Errorf("%w, while a copy of the message was in flight", ctx.Err())
		case <-time.After(wait + rand.N(wait)):
		}
	}
}
