package consumer

import (
	"context"
	"encoding/base64"
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
	Claim    *claim              `json:"claim,omitempty"`

	revision uint64 // 0: not stored
}

// claim fixes a request's outcome before it is published, so that a crash in
// between, or two owners, cannot give a request two.
type claim struct {
	// Dead is the dead letter without payload and headers, which are still
	// the request's; nil: a result.
	Dead *publisher.DeadLetter `json:"dead,omitempty"`
	At   time.Time             `json:"at"`
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
	Sequence uint64
	Data     []byte
}

// last reads the last message of a subject, nil if there is none, through the
// stream's leader: a direct get may be answered by a replica that lags, and
// "there is no outcome yet" has to be true.
func (l *ledger) last(ctx context.Context, stream, subject string) (*storedMessage, error) {
	request, err := json.Marshal(map[string]string{"last_by_subj": subject})
	if err != nil {
		return nil, err
	}
	m, err := l.nc.RequestWithContext(ctx, l.api+"STREAM.MSG.GET."+stream, request)
	if err != nil {
		return nil, fmt.Errorf("get last message of %s in %s: %w", subject, stream, err)
	}
	var answer struct {
		Error   *jetstream.APIError `json:"error"`
		Message struct {
			Sequence uint64 `json:"seq"`
			Data     string `json:"data"`
		} `json:"message"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		return nil, fmt.Errorf("get last message of %s in %s: %w", subject, stream, err)
	}
	switch e := answer.Error; {
	case e == nil:
	case e.ErrorCode == jetstream.JSErrCodeMessageNotFound:
		return nil, nil
	default:
		return nil, fmt.Errorf("get last message of %s in %s: %w", subject, stream, e)
	}
	data, err := base64.StdEncoding.DecodeString(answer.Message.Data)
	if err != nil {
		return nil, fmt.Errorf("get last message of %s in %s: %w", subject, stream, err)
	}
	return &storedMessage{Sequence: answer.Message.Sequence, Data: data}, nil
}
