package resilience

import (
	"time"

	"github.com/headgate-io/headgate/classify"
)

// Hold forbids calls until a time, for a reason that somebody can read.
type Hold struct {
	// Until is when it ends; zero: when somebody releases it.
	Until  time.Time
	Since  time.Time
	Reason string         // for people
	Class  classify.Class // of the answer that caused it, if one did
	Who    string         // worker or operator
}

// Stands reports whether the hold still forbids calls.
func (h *Hold) Stands(now time.Time) bool {
	return h != nil && (h.Until.IsZero() || now.Before(h.Until))
}

// Outlasts makes holds monotonic: a later, shorter one never shortens a
// longer one.
func (h *Hold) Outlasts(other *Hold) bool {
	switch {
	case other == nil:
		return true
	case h.Until.IsZero():
		return !other.Until.IsZero()
	}
	return !other.Until.IsZero() && h.Until.After(other.Until)
}
