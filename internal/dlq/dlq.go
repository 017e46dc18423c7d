// Package dlq finds dead letters and sends their requests through again.
package dlq

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
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
	Creator   string         `json:"creator"`   // "": the request's could not be read
	Operation string         `json:"operation"` // likewise
	RequestID string         `json:"request_id"`
	Attempts  int            `json:"attempts"`
	Replays   int            `json:"replays"` // how often it was sent through again before
	Header    nats.Header    `json:"headers,omitempty"`
	Payload   []byte         `json:"payload,omitempty"`
	// Problem says why the letter cannot be read as a whole; "" if it can.
	Problem string `json:"problem,omitempty"`
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
// first, until do returns an error. Without payloads it reads headers only. A letter that
// cannot be read as a whole has a Problem and does not keep the others from being read.
func (b *Box) Each(ctx context.Context, f Filter, payloads bool, do func(Letter) error) error {
	c, last, err := b.reading(ctx, f, !payloads)
	if c == nil {
		return err
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
			// The letters that were still to come may have been deleted meanwhile. What
			// had been sent when the server said so has arrived by the next time.
			if ended {
				return nil
			}
			ci, err := c.Info(ctx)
			if err != nil && !errors.Is(err, jetstream.ErrConsumerNotFound) { // it is made again
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
		l := b.letter(meta.Sequence.Stream, meta.Timestamp, m.Subject(), m.Headers(), m.Data())
		if f.matches(&l) {
			if payloads {
				b.body(ctx, &l)
			}
			if ctx.Err() != nil {
				return ctx.Err()
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

// reading makes a consumer of the letters that f means, nil if there are none. Those after the
// last one are another time's.
func (b *Box) reading(ctx context.Context, f Filter, headersOnly bool) (c jetstream.Consumer, last uint64, err error) {
	subject, err := b.subject(f)
	if err != nil {
		return nil, 0, err
	}
	info, err := b.stream.Info(ctx)
	if err != nil {
		return nil, 0, fmt.Errorf("look at the DLQ: %w", err)
	}
	cfg := jetstream.OrderedConsumerConfig{FilterSubjects: []string{subject}, HeadersOnly: headersOnly}
	if !f.Since.IsZero() {
		cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &f.Since
	}
	c, err = b.stream.OrderedConsumer(ctx, cfg)
	if err != nil {
		return nil, 0, fmt.Errorf("read the DLQ: %w", err)
	}
	ci, err := c.Info(ctx)
	if err != nil {
		return nil, 0, fmt.Errorf("read the DLQ: %w", err)
	}
	if ci.NumPending == 0 {
		return nil, 0, nil
	}
	return c, info.State.LastSeq, nil
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
	l := b.letter(m.Sequence, m.Time, m.Subject, m.Header, m.Data)
	b.body(ctx, &l)
	return l, ctx.Err()
}

// letter reads a dead letter. Its subject says what it is and whose; headers only say more.
func (b *Box) letter(seq uint64, stored time.Time, subject string, h nats.Header, data []byte) Letter {
	number := func(name string) int {
		n, _ := strconv.Atoi(h.Get(name))
		return n
	}
	l := Letter{
		Sequence: seq, Stored: stored, Header: h, Payload: data,
		Code: h.Get(publisher.DlqCode), Reason: h.Get(publisher.DlqReason),
		Action: h.Get(publisher.DlqAction), Status: number(publisher.DlqHTTPStatus),
		RequestID: h.Get(publisher.DlqMsgID), Attempts: number(publisher.DlqAttempts),
		Replays: publisher.Replays(h.Get(publisher.DlqMsgID)),
	}
	var token string
	var err error
	switch l.Class, l.Creator, l.Operation, token, err = b.ns.ParseDeadLetter(subject); {
	case err != nil:
		l.Problem = err.Error()
	case l.RequestID == "" || publisher.IDToken(l.RequestID) != token:
		l.Problem = fmt.Sprintf("subject %q is not that of request %q, which the header %s names", subject, l.RequestID, publisher.DlqMsgID)
	}
	if l.Class == classify.MalformedRequest && l.Creator == formerlyUnreadable && l.Operation == formerlyUnreadable {
		l.Creator, l.Operation = "", ""
	}
	return l
}

// formerlyUnreadable was the name that an earlier version gave to what it could not read.
const formerlyUnreadable = "unreadable"

// body gets a letter's payload from wherever it is.
func (b *Box) body(ctx context.Context, l *Letter) {
	object := l.Header.Get(publisher.HeaderBodyObject)
	if object != "" && !b.owns(l, object) {
		l.Problem = fmt.Sprintf("its payload is said to be object %q, which is another's", object)
		return
	}
	payload, err := publisher.Body(ctx, b.js, b.ns, l.Header, l.Payload)
	if err != nil {
		l.Problem = err.Error()
		return
	}
	l.Payload = payload
}

// owns reports whether an object is the body of a letter of this creator, operation and id.
func (b *Box) owns(l *Letter, object string) bool {
	subject, err := b.ns.DeadLetterSubject(l.Class, l.Creator, l.Operation, l.RequestID)
	if err != nil {
		return false
	}
	whose := strings.TrimPrefix(subject, b.ns.Subject("dlq", string(l.Class))+".")
	rest, ok := strings.CutPrefix(object, "dlq."+whose)
	return ok && (rest == "" || rest[0] == '.') // "" in an earlier version
}

// Drop deletes a dead letter, and its payload if that is in the object store. Either may be gone
// already.
func (b *Box) Drop(ctx context.Context, l Letter) error {
	if err := b.stream.DeleteMsg(ctx, l.Sequence); err != nil && !errors.Is(err, jetstream.ErrMsgDeleteUnsuccessful) && !notThere(err) {
		return fmt.Errorf("delete the dead letter of %s: %w", l.RequestID, err)
	}
	bucket, object := l.Header.Get(publisher.HeaderBodyBucket), l.Header.Get(publisher.HeaderBodyObject)
	if object == "" || bucket != b.ns.Stream(publisher.Bodies) || !b.owns(&l, object) {
		return nil
	}
	store, err := b.js.ObjectStore(ctx, bucket)
	if err == nil {
		err = store.Delete(ctx, object)
	}
	if err != nil && !errors.Is(err, jetstream.ErrObjectNotFound) && !errors.Is(err, jetstream.ErrBucketNotFound) {
		return fmt.Errorf("delete the payload of the dead letter of %s, object %s of %s: %w", l.RequestID, object, bucket, err)
	}
	return nil
}

func notThere(err error) bool {
	var api *jetstream.APIError
	return errors.Is(err, jetstream.ErrMsgNotFound) || errors.As(err, &api) && (api.ErrorCode == 10043 || api.ErrorCode == 10057)
}
