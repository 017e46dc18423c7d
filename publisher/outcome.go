package publisher

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/broker"
	"github.com/headgate-io/headgate/internal/mutant"
)

// RESULTS is the arbiter of outcomes. A request's place there is the subject
// results.<creator>.<operation>.<id>. A result, or the tombstone of a dead letter, takes it by
// compare-and-set on the subject's last sequence, so that the first of two outcomes wins for
// as long as results are kept, over restarts and changes of leader.

// Source names a stored request. An outcome belongs to a stored request and not to an id: the
// same id may be stored again once the stream has forgotten it.
type Source struct {
	Sequence uint64    `json:"seq"`
	Stored   time.Time `json:"stored"`
}

// Equal reports whether both are the same stored request. The time tells a request from one
// with its sequence in a stream that was made again.
func (s Source) Equal(other Source) bool {
	return s.Sequence == other.Sequence && s.Stored.Equal(other.Stored)
}

// OutcomeKind says what stands in a request's place.
type OutcomeKind uint8

const (
	NoOutcome OutcomeKind = iota
	Answered              // a result
	Dead                  // a tombstone: the claim of a dead letter
	Foreign               // a message that is no outcome of this id
)

func (k OutcomeKind) String() string {
	switch k {
	case Answered:
		return "answered"
	case Dead:
		return "dead"
	case Foreign:
		return "foreign"
	}
	return "none"
}

// Outcome is what stands in a request's place.
type Outcome struct {
	Kind OutcomeKind
	// Source is the stored request that it belongs to. It is zero for a result that an earlier
	// version stored.
	Source   Source
	Sequence uint64 // in RESULTS
	// Letter is the dead letter that a tombstone claims, without payload and headers.
	Letter  *DeadLetter
	History []Attempt // of Letter
	// Displaced is the sequence of a message that was no outcome and stood in the place when
	// this one was published over it; 0: there was none.
	Displaced uint64

	object string // the body's name in the object store
}

// decides reports whether o is the outcome of the stored request mine as well. If not, an
// outcome of mine may be published over it, with the sequence that is expected to stand there.
//
//   - Nothing stands there: the place is free.
//   - A result stands, whichever stored request of this id it answers: the first answer is kept.
//   - A tombstone decides its own stored request only.
//   - What is no outcome decides nothing.
func (o Outcome) decides(mine Source) (decided bool, expected uint64) {
	switch o.Kind {
	case Answered:
		return true, 0
	case Dead:
		return o.Source.Equal(mine), o.Sequence
	case Foreign:
		return false, o.Sequence
	}
	return false, 0
}

// Outcome reads what stands in a request's place, through the leader of RESULTS.
func (p *Publisher) Outcome(ctx context.Context, creator, operation, id string) (Outcome, error) {
	subject, err := p.ns.ResultSubject(creator, operation, id)
	if err != nil {
		return Outcome{}, fmt.Errorf("look for the outcome of %s: %w", clip(id, 80), err)
	}
	m, err := p.reader.Last(ctx, p.ns.Stream(Results), subject)
	if err != nil {
		return Outcome{}, fmt.Errorf("look for the outcome of %s: %w", clip(id, 80), err)
	}
	return readOutcome(m, creator, operation, id), nil
}

// readOutcome believes nothing: the server's answers, for one, can be made to land on any
// subject.
func readOutcome(m *broker.Message, creator, operation, id string) Outcome {
	if m == nil {
		return Outcome{}
	}
	foreign := Outcome{Kind: Foreign, Sequence: m.Sequence}
	if m.Header.Get(HeaderRequestID) != id {
		return foreign
	}
	o := Outcome{Sequence: m.Sequence, Source: sourceOf(m.Header, HeaderSourceSeq, HeaderSourceStored), object: m.Header.Get(HeaderBodyObject)}
	class := m.Header.Get(HeaderDeadLetter)
	if class == "" {
		if _, err := strconv.Atoi(m.Header.Get(HeaderStatus)); err != nil {
			return foreign
		}
		o.Kind = Answered
		return o
	}
	var t tombstone
	if json.Unmarshal(m.Data, &t) != nil {
		return foreign
	}
	d := t.DeadLetter
	if string(d.Class) != class || !slices.Contains(classify.Classes(), d.Class) ||
		d.Creator != creator || d.Operation != operation || d.RequestID != id || !d.Source.Equal(o.Source) {
		return foreign
	}
	d.History = t.History
	o.Kind, o.Letter, o.History = Dead, &d, t.History
	return o
}

// setSource says in h which stored request an outcome belongs to.
func setSource(h nats.Header, s Source, seq, stored string) {
	if s.Sequence != 0 {
		h[seq] = []string{strconv.FormatUint(s.Sequence, 10)}
		h[stored] = []string{s.Stored.UTC().Format(time.RFC3339Nano)}
	}
}

func sourceOf(h nats.Header, seq, stored string) Source {
	n, err := strconv.ParseUint(h.Get(seq), 10, 64)
	if err != nil {
		return Source{}
	}
	at, err := time.Parse(time.RFC3339Nano, h.Get(stored))
	if err != nil {
		at = time.Time{}
	}
	return Source{Sequence: n, Stored: at.UTC()}
}

// take puts m, an outcome of a stored request, in the request's place unless an outcome that
// decides the request stands there. It returns what stands, m's own included.
func (p *Publisher) take(ctx context.Context, m *nats.Msg, mine Outcome, creator, operation, id string) (Outcome, error) {
	expected, displaced := uint64(0), uint64(0)
	for {
		m.Header[jetstream.ExpectedLastSubjSeqHeader] = []string{strconv.FormatUint(expected, 10)}
		if mutant.On(mutant.NoArbiter) {
			delete(m.Header, jetstream.ExpectedLastSubjSeqHeader)
		}
		ack, err := p.publish(ctx, m)
		if err == nil {
			mine.Sequence, mine.Displaced, mine.object = ack.Sequence, displaced, m.Header.Get(HeaderBodyObject)
			return mine, nil
		}
		if broker.TroubleOf(err) != broker.WrittenBetween {
			return Outcome{}, err
		}
		stands, err := p.Outcome(ctx, creator, operation, id)
		if err != nil {
			return Outcome{}, err
		}
		decided, next := stands.decides(mine.Source)
		if decided {
			return stands, nil
		}
		if expected, displaced = next, 0; stands.Kind == Foreign {
			displaced = next
		}
	}
}
