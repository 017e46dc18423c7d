package publisher

import (
	"context"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Fence sees to it that no result of a request is stored from now on, for the
// window in which the stream knows duplicates: it takes the id under
// which one would be stored. A worker that was cut off may have an
// answer under way, which would else become a second outcome beside a dead
// letter. It returns the sequence of what it stored, 0 if there was a result, or another
// fence, before.
func (p *Publisher) Fence(ctx context.Context, id string) (seq uint64, err error) {
	m := &nats.Msg{
		Subject: p.ns.Subject("fence", IDToken(id)),
		Header:  nats.Header{jetstream.MsgIDHeader: {resultMsgID(id)}},
	}
	ack, before, err := p.stored(ctx, m)
	if err != nil {
		return 0, fmt.Errorf("refuse a late result of %s: %w", clip(id, 80), err)
	}
	if before {
		return 0, nil
	}
	return ack.Sequence, nil
}

// resultMsgID is the id under which a request's result is stored.
func resultMsgID(id string) string { return oneLine("result:"+id, 2*maxHeader) }
