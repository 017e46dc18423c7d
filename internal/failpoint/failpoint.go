// Package failpoint lets tests break a worker at the places where it matters:
// between any two steps whose order is a promise. Programs are built without it;
// the build tag failpoints puts it in.
package failpoint

// Point is a place in the code, in the order in which a request passes them.
type Point string

// The places.
const (
	Received    Point = "received"     // a delivery is here
	LookUp      Point = "look-up"      // before the ledger and the results are asked
	Mark        Point = "mark"         // before a call is marked
	Marked      Point = "marked"       // after
	Call        Point = "call"         // before the API is called
	Called      Point = "called"       // after
	Hold        Point = "hold"         // before a hold is stored
	Result      Point = "result"       // before a result is stored
	ResultDone  Point = "result-done"  // after
	Attempt     Point = "attempt"      // before a failed attempt is stored
	AttemptDone Point = "attempt-done" // after
	Claim       Point = "claim"        // before a dead letter is claimed
	Claimed     Point = "claimed"      // after
	Letter      Point = "letter"       // before a dead letter is stored
	LetterDone  Point = "letter-done"  // after
	Ack         Point = "ack"          // before the ack
	Acked       Point = "acked"        // after
	Renew       Point = "renew"        // before a lease is renewed
	Release     Point = "release"      // before a lease is given up
)

// Points are all of them.
var Points = []Point{
	Received, LookUp, Mark, Marked, Call, Called, Hold, Result, ResultDone, Attempt, AttemptDone,
	Claim, Claimed, Letter, LetterDone, Ack, Acked, Renew, Release,
}
