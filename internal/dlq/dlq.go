// Package dlq finds dead letters and sends their requests through again.
package dlq

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
)

// Filter says which dead letters are meant. What is left zero does not matter.
type Filter struct {
	Class     classify.Class
	Code      string
	Creator   string
	Operation string
	Status    int // of the API's answer
	Since     time.Time
	Until     time.Time
}

// Letter is a stored dead letter.
type Letter struct {
	Sequence  uint64         `json:"seq"`
	Stored    time.Time      `json:"stored"`
	Class     classify.Class `json:"class"`
	Code      string         `json:"code,omitempty"`
	Reason    string         `json:"reason"`
	Action    string         `json:"action,omitempty"`
	Status    int            `json:"http_status,omitempty"`
	Creator   string         `json:"creator"`
	Operation string         `json:"operation"`
	RequestID string         `json:"request_id"`
	Attempts  int            `json:"attempts"`
	Replays   int            `json:"replays"` // how often it was sent through again before
	Header    nats.Header    `json:"headers,omitempty"`
	Payload   []byte         `json:"payload,omitempty"`
}

// Box is the DLQ of a namespace.
type Box struct {
	js     jetstream.JetStream
	ns     publisher.Namespace
	stream jetstream.Stream
}

// Open binds to the DLQ.
func Open(ctx context.Context, js jetstream.JetStream, ns publisher.Namespace) (*Box, error) {
	name := ns.Stream(publisher.DLQ)
	stream, err := js.Stream(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("bind to stream %s (has `headgate setup` been run?): %w", name, err)
	}
	return &Box{js, ns, stream}, nil
}

// subject narrows a search as far as a subject can.
func (b *Box) subject(f Filter) (string, error) {
	class, creator, operation := "*", "*", "*"
	if f.Class != "" {
		if !slices.Contains(classify.Classes(), f.Class) {
			return "", fmt.Errorf("there is no class %q; there are: %v", f.Class, classify.Classes())
		}
		class = string(f.Class)
	}
	var err error
	if f.Creator != "" {
		if creator, err = publisher.EncodeToken(f.Creator); err != nil {
			return "", fmt.Errorf("creator: %w", err)
		}
	}
	if f.Operation != "" {
		if operation, err = publisher.EncodeToken(f.Operation); err != nil {
			return "", fmt.Errorf("operation: %w", err)
		}
	}
	return b.ns.Subject("dlq", class, creator, operation, "*"), nil
}

func (f Filter) matches(l *Letter) bool {
	return (f.Code == "" || f.Code == l.Code) && (f.Status == 0 || f.Status == l.Status) &&
		(f.Until.IsZero() || l.Stored.Before(f.Until)) && !l.Stored.Before(f.Since)
}

// quiet is how long Each waits before it asks whether there is more to come.
const quiet = time.Second

// Each calls do for every dead letter that is stored now and matches, the oldest
// first, until do returns an error. Without payloads it reads headers only.
func (b *Box) Each(ctx context.Context, f Filter, payloads bool, do func(Letter) error) error {
	subject, err := b.subject(f)
	if err != nil {
		return err
	}
	info, err := b.stream.Info(ctx)
	if err != nil {
		return fmt.Errorf("look at the DLQ: %w", err)
	}
	last := info.State.LastSeq // those that come from now on are another time's
	cfg := jetstream.OrderedConsumerConfig{FilterSubjects: []string{subject}, HeadersOnly: !payloads}
	if !f.Since.IsZero() {
		cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &f.Since
	}
	c, err := b.stream.OrderedConsumer(ctx, cfg)
	if err != nil {
		return fmt.Errorf("read the DLQ: %w", err)
	}
	if ci, err := c.Info(ctx); err != nil {
		return fmt.Errorf("read the DLQ: %w", err)
	} else if ci.NumPending == 0 {
		return nil
	}
	messages, err := c.Messages()
	if err != nil {
		return fmt.Errorf("read the DLQ: %w", err)
	}
	defer messages.Stop()
	stop := context.AfterFunc(ctx, messages.Stop)
	defer stop()
	ended := false
	for {
		m, err := messages.Next(jetstream.NextMaxWait(quiet))
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, nats.ErrTimeout):
			// Somebody else may have deleted the letters that were still to come. What
			// had been sent when the server said so has arrived by the next time.
			if ended {
				return nil
			}
			ci, err := c.Info(ctx)
			if err != nil && !errors.Is(err, jetstream.ErrConsumerNotFound) { // it is made anew
				return fmt.Errorf("read the DLQ: %w", err)
			}
			ended = err == nil && ci.NumPending == 0
			continue
		case err != nil:
			return fmt.Errorf("read the DLQ: %w", err)
		}
		meta, err := m.Metadata()
		if err != nil {
			return fmt.Errorf("read the DLQ: %w", err)
		}
		ended = false
		if meta.Sequence.Stream > last {
			return nil
		}
		l := read(meta, m)
		if f.matches(&l) {
			if payloads {
				if l.Payload, err = publisher.Body(ctx, b.js, l.Header, l.Payload); err != nil {
					return fmt.Errorf("dead letter of %s: %w", l.RequestID, err)
				}
			}
			if err := do(l); err != nil {
				return err
			}
		}
		if meta.NumPending == 0 {
			return nil
		}
	}
}

// Get reads one dead letter by its request's id.
func (b *Box) Get(ctx context.Context, id string) (Letter, error) {
	m, err := b.stream.GetLastMsgForSubject(ctx, b.ns.Subject("dlq", "*", "*", "*", publisher.IDToken(id)))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return Letter{}, fmt.Errorf("there is no dead letter of a request %q", id)
	}
	if err != nil {
		return Letter{}, fmt.Errorf("read the dead letter of %q: %w", id, err)
	}
	l := letter(m.Sequence, m.Time, m.Header, m.Data)
	l.Payload, err = publisher.Body(ctx, b.js, l.Header, l.Payload)
	return l, err
}

func read(meta *jetstream.MsgMetadata, m jetstream.Msg) Letter {
	return letter(meta.Sequence.Stream, meta.Timestamp, m.Headers(), m.Data())
}

func letter(seq uint64, stored time.Time, h nats.Header, data []byte) Letter {
	number := func(name string) int {
		n, _ := strconv.Atoi(h.Get(name))
		return n
	}
	return Letter{
		Sequence: seq, Stored: stored, Header: h, Payload: data,
		Class: classify.Class(h.Get(publisher.DlqClass)), Code: h.Get(publisher.DlqCode), Reason: h.Get(publisher.DlqReason),
		Action: h.Get(publisher.DlqAction), Status: number(publisher.DlqHTTPStatus), Creator: h.Get(publisher.DlqCreator),
		Operation: h.Get(publisher.DlqOperation), RequestID: h.Get(publisher.DlqMsgID), Attempts: number(publisher.DlqAttempts),
		Replays: number(publisher.HeaderReplay),
	}
}

// Drop deletes a dead letter, which may be gone already.
func (b *Box) Drop(ctx context.Context, l Letter) error {
	if err := b.stream.DeleteMsg(ctx, l.Sequence); err != nil && !errors.Is(err, jetstream.ErrMsgDeleteUnsuccessful) && !notThere(err) {
		return fmt.Errorf("delete the dead letter of %s: %w", l.RequestID, err)
	}
	return nil
}

func notThere(err error) bool {
	var api *jetstream.APIError
	return errors.Is(err, jetstream.ErrMsgNotFound) || errors.As(err, &api) && (api.ErrorCode == 10043 || api.ErrorCode == 10057)
}
