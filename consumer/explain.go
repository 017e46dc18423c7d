package consumer

import (
	"fmt"
	"time"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
)

// found is what the server knows of a request that was delivered before, or that must not be
// called twice.
type found struct {
	stands publisher.Outcome // in its place
	record record            // its own, or a new one
	other  *record           // of another request with the same id
}

// situation is what this worker knows beside that.
type situation struct {
	source    publisher.Source
	op        Operation
	worker    string
	malformed error
	crashed   bool // its partition's earlier owner vanished after it was stored
	// unsent: this worker marked the call and knows that it was never made.
	unsent bool
	// otherHere: the other request with the same id is being worked on here.
	otherHere bool
	// alive reports whether a worker is.
	alive func(worker string) bool
	now   time.Time
}

const (
	// poisonous is how many calls of a request may begin that never end, because their
	// worker vanishes, until the request itself is to blame.
	poisonous = 3

	// lookAgain is how long a request waits whose call another worker may be making still,
	// and markDoubt for how long that is believed of a worker that is alive.
	lookAgain = 2 * time.Second
	markDoubt = 2 * time.Minute
)

// explain says what is to be done with a request about which the server was asked. It
// is pure. unexplained means that a worker vanished that may have been calling it.
func explain(f found, s situation) (v verdict, unexplained bool) {
	r := f.record
	marked := r.Mark != nil && !s.unsent
	switch {
	case f.stands.Kind == publisher.Answered:
		return verdict{action: acknowledge, reason: "it has a result"}, false
	case f.stands.Kind == publisher.Dead && f.stands.Source.Equal(s.source) && r.Lettered:
		return verdict{action: acknowledge, reason: "its dead letter was stored"}, false
	case f.stands.Kind == publisher.Dead && f.stands.Source.Equal(s.source):
		return verdict{action: finishLetter}, false
	case s.malformed != nil:
		return verdict{action: deadLetter, class: classify.MalformedRequest, reason: s.malformed.Error()}, false
	case f.other != nil && s.otherHere && s.op.NotIdempotent:
		return verdict{action: postpone, after: s.now.Add(lookAgain), reason: "another request with the same id is being called"}, false
	case marked && r.Mark.Worker != s.worker && s.alive(r.Mark.Worker) && s.now.Sub(r.Mark.At) < markDoubt:
		// It lost the partition, and may have the answer in hand.
		return verdict{action: postpone, after: s.now.Add(lookAgain), reason: "worker " + r.Mark.Worker + " began its call"}, false
	case marked && s.op.NotIdempotent && !s.op.RetryUncertain:
		return verdict{action: deadLetter, class: classify.Uncertain, cause: causeUncertain, reason: fmt.Sprintf(
			"it is not known whether the API did what it was asked: worker %s made a call at %s of which no answer is known; look there before it is replayed",
			r.Mark.Worker, r.Mark.At.Format(time.RFC3339))}, false
	case marked && r.Mark.Calls >= poisonous:
		return verdict{action: deadLetter, class: classify.Poison, reason: fmt.Sprintf(
			"%d workers vanished while they called it, the last one, %s, while it called no other suspect; a worker that is killed for want of memory vanishes, too",
			r.Mark.Calls, r.Mark.Worker)}, false
	case r.Due != nil && r.Due.After(s.now):
		return verdict{action: postpone, after: *r.Due, reason: "its next attempt is not due"}, s.crashed
	}
	return verdict{action: call}, s.crashed
}
