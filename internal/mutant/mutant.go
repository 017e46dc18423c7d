// Package mutant holds bugs that are planted on purpose, one at a time, so that a test can
// tell whether the simulation finds them. Programs are built without it; the build tag mutants
// puts it in. Without the tag On is a constant, and the compiler leaves the bug out.
package mutant

// Names of bugs.
const (
	// AckBeforeStore acks a request before its result is stored.
	AckBeforeStore = "ack-before-store"
	// HoldAfterMark does not ask, once a call is marked, whether a hold has come meanwhile.
	HoldAfterMark = "hold-after-mark"
	// NoArbiter stores outcomes without regard to what has their place.
	NoArbiter = "no-arbiter"
	// LedgerByID keys LEDGER by the request's id alone.
	LedgerByID = "ledger-by-id"
	// WhyGuesses says that nothing waits where it is not known.
	WhyGuesses = "why-guesses"
	// SweepInUse forgets a creator that is in use.
	SweepInUse = "sweep-in-use"
	// TokensTwice counts the leased tokens of the account's limit twice.
	TokensTwice = "tokens-twice"
)

// Names are all of them.
var Names = []string{AckBeforeStore, HoldAfterMark, NoArbiter, LedgerByID, WhyGuesses, SweepInUse, TokensTwice}
