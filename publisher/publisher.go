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
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/broker"
)

// Publisher writes to the streams of one namespace. It is safe for concurrent
// use.
type Publisher struct {
	js      jetstream.JetStream
	ns      Namespace
	reader  *broker.Reader
	uploads chan struct{} // has one element an upload in progress
}

// New makes a publisher for streams that Topology.Ensure has made.
func New(js jetstream.JetStream, t Topology) *Publisher {
	return &Publisher{js: js, ns: t.Namespace, reader: broker.NewReader(js), uploads: make(chan struct{}, maxUploads)}
}

// ErrFull means that a stream takes no more messages, or no more of this
// creator and operation. Nothing was stored and nothing was dropped.
var ErrFull = errors.New("the stream is full")

// publish publishes m and waits until it is known to be stored or refused. While another
// message is in flight on its subject, or under its id, nothing is known: it is published again.
func (p *Publisher) publish(ctx context.Context, m *nats.Msg) (*jetstream.PubAck, error) {
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		ack, err := p.once(ctx, m)
		if err == nil {
			return ack, nil
		}
		switch broker.TroubleOf(err) {
		case broker.InFlight:
		case broker.Full:
			return nil, fmt.Errorf("%w: %w", ErrFull, err)
		default:
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w, while a copy of the message was in flight", ctx.Err())
		case <-time.After(wait + rand.N(wait)):
		}
	}
}

func (p *Publisher) once(ctx context.Context, m *nats.Msg) (*jetstream.PubAck, error) {
	future, err := p.js.PublishMsgAsync(m)
	if err != nil {
		return nil, err
	}
	select {
	case ack := <-future.Ok():
		return ack, nil
	case err := <-future.Err():
		return nil, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
