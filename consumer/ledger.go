package consumer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/publisher"
)

// record is what LEDGER remembers of a request: the attempts that failed and,
// once it is decided, its terminal outcome. It is written on failure paths
// only; a request that succeeds at once has none.
type record struct {
	Attempts []publisher.Attempt `json:"attempts,omitempty"`
	Mark     *mark               `json:"mark,omitempty"`
	Claim    *claim              `json:"claim,omitempty"`

	revision uint64 // 0: not stored
}

// mark says that a call is being made. Where one is found on a request that
// nobody is calling, its worker vanished during the call.
type mark struct {
	Worker string    `json:"worker"`
	At     time.Time `json:"at"`
	// Calls counts those that were begun and never ended, this one included.
	Calls int `json:"calls"`
}

// claim fixes a request's outcome before it is published, so that a crash in
// between, or two owners, cannot give a request two.
type claim struct {
	// Dead is the dead letter without payload and headers, which are still
	// the request's; nil: a result.
	Dead *publisher.DeadLetter `json:"dead,omitempty"`
	At   time.Time             `json:"at"`
	// Stored: the dead letter was published. Should it be there no more, somebody has
	// deleted or replayed it.
	Stored bool `json:"stored,omitempty"`
}

func (r record) counts() (attempts, throttled int) {
	for _, a := range r.Attempts {
		if a.Class.Throttled() {
			throttled++
		} else {
			attempts++
		}
	}
	return attempts, throttled
}

// ClaimedFor is the creator of the dead letter that a record of LEDGER claims, "" if it claims none.
func ClaimedFor(stored []byte) string {
	var r record
	if json.Unmarshal(stored, &r) != nil || r.Claim == nil || r.Claim.Dead == nil {
		return ""
	}
	return r.Claim.Dead.Creator
}

// errClaimed means that somebody else wrote a request's record in between.
var errClaimed = errors.New("the request's ledger record was written by another worker")

// ledger reads and writes records.
type ledger struct {
	nc     *nats.Conn
	kv     jetstream.KeyValue
	stream string // behind kv
	api    string // prefix of the JetStream API
}

// put stores r if nobody else did since it was read.
func (l *ledger) put(ctx context.Context, id string, r *record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode ledger record: %w", err)
	}
	key := publisher.IDToken(id)
	var revision uint64
	if r.revision == 0 {
		revision, err = l.kv.Create(ctx, key, data)
	} else {
		revision, err = l.kv.Update(ctx, key, data, r.revision)
	}
	var api *jetstream.APIError
	switch {
	case err == nil:
		r.revision = revision
		return nil
	case errors.Is(err, jetstream.ErrKeyExists),
		errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence:
		return errClaimed
	}
	return fmt.Errorf("write ledger record: %w", err)
}

// forget deletes a record that is of no use any more.
func (l *ledger) forget(ctx context.Context, id string, r *record) error {
	if err := l.kv.Delete(ctx, publisher.IDToken(id), jetstream.LastRevision(r.revision)); err != nil {
		return fmt.Errorf("delete ledger record: %w", err)
	}
	r.revision = 0
	return nil
}

// get reads a record, the zero one if there is none.
func (l *ledger) get(ctx context.Context, id string) (record, error) {
	stored, err := l.last(ctx, l.stream, "$KV."+l.kv.Bucket()+"."+publisher.IDToken(id))
	if err != nil {
		return record{}, fmt.Errorf("read ledger record: %w", err)
	}
	if stored == nil {
		return record{}, nil
	}
	r := record{revision: stored.Sequence}
	if len(stored.Data) == 0 { // deleted
		return r, nil
	}
	if err := json.Unmarshal(stored.Data, &r); err != nil {
		return record{}, fmt.Errorf("read ledger record: %w", err)
	}
	return r, nil
}

type storedMessage struct {
	Subject  string
	Sequence uint64
	Header   nats.Header
	Data     []byte
	Time     time.Time
}

// last reads the last message of a subject, nil if there is none.
func (l *ledger) last(ctx context.Context, stream, subject string) (*storedMessage, error) {
	return l.message(ctx, stream, map[string]any{"last_by_subj": subject})
}

// next reads the first message from a sequence on whose subject matches, nil if
// there is none.
func (l *ledger) next(ctx context.Context, stream string, from uint64, subject string) (*storedMessage, error) {
	return l.message(ctx, stream, map[string]any{"seq": from, "next_by_subj": subject})
}

// message reads a stored message, nil if there is none, through the stream's
// leader: a direct get may be answered by a replica that lags, and "there is no
// outcome yet" has to be true.
func (l *ledger) message(ctx context.Context, stream string, which map[string]any) (*storedMessage, error) {
	fail := func(err error) (*storedMessage, error) {
		return nil, fmt.Errorf("get a message of %s (%v): %w", stream, which, err)
	}
	request, err := json.Marshal(which)
	if err != nil {
		return fail(err)
	}
	m, err := l.nc.RequestWithContext(ctx, l.api+"STREAM.MSG.GET."+stream, request)
	if err != nil {
		return fail(err)
	}
	var answer struct {
		Error   *jetstream.APIError `json:"error"`
		Message struct {
			Subject  string    `json:"subject"`
			Sequence uint64    `json:"seq"`
			Header   []byte    `json:"hdrs"`
			Data     []byte    `json:"data"`
			Time     time.Time `json:"time"`
		} `json:"message"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		return fail(err)
	}
	switch e := answer.Error; {
	case e == nil:
	case e.ErrorCode == jetstream.JSErrCodeMessageNotFound:
		return nil, nil
	default:
		return fail(e)
	}
	stored := answer.Message
	s := &storedMessage{Subject: stored.Subject, Sequence: stored.Sequence, Data: stored.Data, Time: stored.Time}
	if len(stored.Header) > 0 {
		if s.Header, err = nats.DecodeHeadersMsg(stored.Header); err != nil {
			return fail(err)
		}
	}
	return s, nil
}

// remove deletes a stored message.
func (l *ledger) remove(ctx context.Context, stream string, seq uint64) error {
	request := fmt.Appendf(nil, `{"seq":%d,"no_erase":true}`, seq)
	m, err := l.nc.RequestWithContext(ctx, l.api+"STREAM.MSG.DELETE."+stream, request)
	if err != nil {
		return fmt.Errorf("delete message %d of %s: %w", seq, stream, err)
	}
	var answer struct {
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		return fmt.Errorf("delete message %d of %s: %w", seq, stream, err)
	}
	if e := answer.Error; e != nil && e.ErrorCode != codeSequenceNotFound {
		return fmt.Errorf("delete message %d of %s: %w", seq, stream, e)
	}
	return nil
}

// codeSequenceNotFound: there is no such message, not any more.
const codeSequenceNotFound = 10043
