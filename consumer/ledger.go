package consumer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/broker"
	"github.com/headgate-io/headgate/publisher"
)

// record is a request's entry in LEDGER: the attempts that failed, the mark of a call that
// must be known should its worker vanish, and whether its dead letter was stored. It
// is written on failure paths only; a request that succeeds at once has none.
type record struct {
	// Source is the stored request that the record belongs to. An id may come again, and is
	// another request then.
	Source   publisher.Source    `json:"source"`
	Attempts []publisher.Attempt `json:"attempts,omitempty"`
	Due      *time.Time          `json:"due,omitempty"` // when the next attempt may be made
	Mark     *mark               `json:"mark,omitempty"`
	// Lettered: the dead letter was stored. Should it be there no more, an operator has
	// deleted or replayed it.
	Lettered bool `json:"lettered,omitempty"`

	revision uint64 // 0: not stored
}

// mark says that a call is being made. One that is found on a request that no worker is
// calling tells that a worker vanished during the call.
type mark struct {
	Worker string    `json:"worker"`
	At     time.Time `json:"at"`
	// Calls counts those that were begun and never ended, this one included.
	Calls int `json:"calls"`
}

func (m *mark) equal(o *mark) bool {
	return m != nil && o != nil && m.Worker == o.Worker && m.At.Equal(o.At) && m.Calls == o.Calls
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

// empty reports that a record says nothing that is worth keeping.
func (r record) empty() bool { return len(r.Attempts) == 0 && r.Mark == nil && !r.Lettered }

// errTaken means that another owner of the partition wrote the request's record.
var errTaken = errors.New("the request's ledger record was written by another worker")

// ledger reads and writes records.
type ledger struct {
	kv     jetstream.KeyValue
	reader *broker.Reader
}

func (l *ledger) stream() string { return "KV_" + l.kv.Bucket() }

// put stores r, unless another worker wrote the record of the same request since it was read. A
// record of another request with the same id is written over.
func (l *ledger) put(ctx context.Context, key string, r *record) error {
	return l.write(ctx, key, r, func(there record) bool {
		return there.Source.Equal(r.Source) && !there.empty()
	})
}

// putFirst stores r, unless any record of its id was written since it was read: that another request
// with the same id was marked and has ended is a reason to look again.
func (l *ledger) putFirst(ctx context.Context, key string, r *record) error {
	return l.write(ctx, key, r, func(record) bool { return true })
}

// write stores r if the revision that it was read with is the last one, or if taken says that the
// record that is there instead does not count.
func (l *ledger) write(ctx context.Context, key string, r *record, taken func(there record) bool) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode ledger record: %w", err)
	}
	for {
		// Revision 0: there must be none, and none that was deleted.
		revision, err := l.kv.Update(ctx, key, data, r.revision)
		if err == nil {
			r.revision = revision
			return nil
		}
		if broker.TroubleOf(err) != broker.WrittenBetween {
			return fmt.Errorf("write ledger record: %w", err)
		}
		there, stored, err := l.read(ctx, key)
		if err != nil {
			return err
		}
		switch {
		case bytes.Equal(stored, data):
			r.revision = there.revision // an answer of the server got lost
			return nil
		case taken(there):
			return errTaken
		}
		r.revision = there.revision
	}
}

// forget deletes a record that is of no use any more.
func (l *ledger) forget(ctx context.Context, key string, r *record) error {
	if r.revision == 0 {
		return nil
	}
	if err := l.kv.Delete(ctx, key, jetstream.LastRevision(r.revision)); err != nil {
		return fmt.Errorf("delete ledger record: %w", err)
	}
	r.revision = 0
	return nil
}

// get reads the record of a request, a new one if there is none or if it belongs to another
// request. other is that one.
func (l *ledger) get(ctx context.Context, key string, source publisher.Source) (r record, other *record, err error) {
	there, _, err := l.read(ctx, key)
	switch {
	case err != nil:
		return record{}, nil, err
	case there.Source.Equal(source):
		return there, nil, nil
	case there.revision != 0 && !there.empty():
		other = &there
	}
	return record{Source: source, revision: there.revision}, other, nil
}

// read reads a record with its bytes. One that is no record counts as one that says nothing, so that
// garbage in the bucket keeps no request from its outcome.
func (l *ledger) read(ctx context.Context, key string) (record, []byte, error) {
	stored, err := l.reader.Last(ctx, l.stream(), "$KV."+l.kv.Bucket()+"."+key)
	if err != nil {
		return record{}, nil, fmt.Errorf("read ledger record: %w", err)
	}
	if stored == nil {
		return record{}, nil, nil
	}
	r, ok := parseRecord(stored.Data)
	if !ok {
		r = record{}
	}
	r.revision = stored.Sequence
	return r, stored.Data, nil
}

// parseRecord reads a record strictly: a reply subject can put any JSON into the bucket.
func parseRecord(data []byte) (r record, ok bool) {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if d.Decode(&r) != nil {
		return record{}, false
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return record{}, false
	}
	if r.Mark != nil && (r.Mark.Calls < 1 || r.Mark.Calls > maxMarked || r.Mark.Worker == "") {
		return record{}, false
	}
	return r, r.Source.Sequence != 0
}

// maxMarked bounds what a mark can say: a request is POISON long before.
const maxMarked = 1000
