package consumer

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"slices"
	"time"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// Why says why a creator's requests wait: the one reason, and when it ends.
type Why struct {
	Creator string            `json:"creator"`
	Request string            `json:"request,omitempty"` // where one was asked for
	Worker  string            `json:"worker"`            // who answers, and owns the creator
	Reason  resilience.Reason `json:"reason,omitempty"`  // "": nothing keeps it
	Until   *time.Time        `json:"until,omitempty"`   // absent: not known, or until somebody acts
	Text    string            `json:"text"`              // for people
	Action  string            `json:"action,omitempty"`  // what somebody must do

	InFlight int `json:"in_flight"` // calls
	Waiting  int `json:"waiting"`   // in the worker
	Parked   int `json:"parked"`    // at the server, until their turn
	Retrying int `json:"retrying"`  // of those: after a call that failed
	Attempts int `json:"attempts"`  // the most that one of those had

	Failures []publisher.Attempt `json:"failures,omitempty"` // the latest, the last one first
}

// lastFailures is how many failures are remembered of a creator.
const lastFailures = 5

// failed remembers a failure of c.
func (p *partition) failed(c *creator, a publisher.Attempt) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c.failures = append(c.failures[max(0, len(c.failures)-lastFailures+1):len(c.failures):len(c.failures)], a)
}

// PartitionOf is the partition that the server puts a creator's requests into:
// its subject transform's partition(), FNV-1a of the token.
func PartitionOf(creator string, partitions int) (int, error) {
	token, err := publisher.EncodeToken(creator)
	if err != nil {
		return 0, err
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(token))
	return int(h.Sum32() % uint32(partitions)), nil
}

// Why answers for a creator whose partition this worker owns; else it reports false.
func (w *Worker) Why(name string) (Why, bool) {
	p := w.partitionOf(name)
	if p == nil {
		return Why{}, false
	}
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.active || !p.lease.holds(now) {
		return Why{}, false
	}
	return p.why(name, now), true
}

// why is Why, under the partition's lock.
func (p *partition) why(name string, now time.Time) Why {
	y := Why{Creator: name, Worker: p.w.cfg.Name}
	c := p.creators[name]
	if c == nil {
		c = &creator{name: name} // nothing is known of it, which is well
		if h, held := p.w.holds.of(name); held && h.Stands(now) {
			y.explain(resilience.Refusal{Reason: resilience.ReasonHold, NotBefore: h.Until, Hold: &h})
			return y
		}
		if no, blocked := p.w.gates.Blocked(now); blocked {
			y.explain(no)
			return y
		}
		y.Text = "nothing waits, and nothing keeps it"
		return y
	}
	y.Waiting, y.Parked = len(c.waiting), len(c.parked)
	var backoff, turn time.Time
	for _, k := range c.parked {
		if k.own {
			y.Retrying++
			y.Attempts = max(y.Attempts, len(k.record.Attempts))
			if backoff.IsZero() || k.turn.Before(backoff) {
				backoff = k.turn
			}
		} else if turn.IsZero() || k.turn.Before(turn) {
			turn = k.turn
		}
	}
	y.InFlight = c.gate.Status(now, resilience.Read).InFlight
	y.Failures = slices.Clone(c.failures)
	slices.Reverse(y.Failures)

	kind := resilience.Read
	if len(c.waiting) > 0 {
		kind = c.waiting[0].op.Kind
	} else {
		for _, k := range c.parked {
			kind = k.kind
			break
		}
	}
	no, refused := c.gate.Look(now, kind)
	if no.Reason == resilience.ReasonAccount && y.Waiting == 0 {
		refused = false // tokens are leased for those who wait here: nobody does
	}
	queued := y.Waiting+y.Parked > 0
	switch {
	// What keeps a creator from being called at all is said even if nobody waits.
	case refused && (queued || no.Hold != nil || no.Reason == resilience.ReasonBreaker || no.Reason == resilience.ReasonProviderBreaker):
		y.explain(no)
	case y.Waiting == 0 && !turn.IsZero() && (backoff.IsZero() || turn.Before(backoff)):
		y.explain(resilience.Refusal{Reason: resilience.ReasonTurn, NotBefore: turn})
	case y.Waiting == 0 && !backoff.IsZero():
		y.explain(resilience.Refusal{Reason: reasonBackoff, NotBefore: backoff})
	case queued:
		y.Text = "nothing keeps it: it is about to be called"
	case y.InFlight > 0:
		y.Text = "nothing waits; it is being called"
	default:
		y.Text = "nothing waits, and nothing keeps it"
	}
	return y
}

// explain puts a refusal into words.
func (y *Why) explain(no resilience.Refusal) {
	y.Reason = no.Reason
	if !no.NotBefore.IsZero() {
		y.Until = &no.NotBefore
	}
	held := func(who string) string {
		h := no.Hold
		text := who + " is held"
		if h == nil {
			return text
		}
		if h.Reason != "" {
			text += ": " + h.Reason
		}
		if h.Who != "" {
			text += fmt.Sprintf(" (by %s, since %s)", h.Who, h.Since.UTC().Format(time.RFC3339))
		}
		if h.Until.IsZero() {
			text += "; until somebody releases it"
		}
		return text
	}
	switch no.Reason {
	case resilience.ReasonHold:
		y.Text = held("the creator")
		if no.Hold != nil && no.Hold.Class == classify.SessionExpired {
			y.Action = fmt.Sprintf("let the creator log in again, then: headgate release %s", y.Creator)
		} else if no.Hold != nil && no.Hold.Until.IsZero() {
			y.Action = "headgate release " + y.Creator
		}
	case resilience.ReasonAccountHold:
		y.Text = held("the account")
		y.Action = "look at the provider's billing, quota and API key; then: headgate release --account"
	case resilience.ReasonProviderHold:
		y.Text = held("the provider")
	default:
		y.Text = cmp.Or(reasons[no.Reason], string(no.Reason))
	}
}

// reasons puts those into words that need no more than the word.
var reasons = map[resilience.Reason]string{
	resilience.ReasonProviderBreaker: "the provider's circuit breaker is open: several creators failed in a row",
	resilience.ReasonBreaker:         "the creator's circuit breaker is open: its calls failed in a row",
	resilience.ReasonLimit:           "the creator's rate limit is used up",
	resilience.ReasonSlots:           "as many of the creator's calls are in flight as may be",
	resilience.ReasonSlow:            "the creator is slow, and the share of slow creators in the worker's calls is used up",
	resilience.ReasonWorker:          "the worker has as many calls in flight as it may have",
	resilience.ReasonAccount:         "the account's rate limit, which all creators share, is used up",
	resilience.ReasonTurn:            "it waits for its turn behind the creator's other requests",
	reasonBackoff:                    "a call failed, and the next attempt is not due",
}

// WhyRequest says why one request waits, if it is known to this worker. Its
// creator's reason is its own, unless it is being called, or in its own backoff.
func (w *Worker) WhyRequest(id string) (Why, bool) {
	now := time.Now()
	for _, p := range w.partitions {
		p.mu.Lock()
		y, found := p.whyRequest(id, now)
		p.mu.Unlock()
		if found {
			return y, true
		}
	}
	return Why{}, false
}

func (p *partition) whyRequest(id string, now time.Time) (Why, bool) {
	if !p.active {
		return Why{}, false
	}
	for _, d := range p.here {
		if d.req.ID != id {
			continue
		}
		y := p.why(d.req.Creator, now)
		y.Request, y.Attempts = id, len(d.record.Attempts)
		if c := p.creators[d.req.Creator]; c == nil || !slices.Contains(c.waiting, d) {
			y.Reason, y.Until, y.Text = "", nil, "it is being called, or its outcome is being stored"
		}
		return y, true
	}
	for _, c := range p.creators {
		for _, k := range c.parked {
			if k.id != id {
				continue
			}
			y := p.why(c.name, now)
			y.Request, y.Attempts = id, len(k.record.Attempts)
			switch {
			case k.own:
				y.explain(resilience.Refusal{Reason: reasonBackoff, NotBefore: k.turn})
			case y.Reason == "" || y.Reason == reasonBackoff || y.Reason == resilience.ReasonLimit || y.Reason == resilience.ReasonSlots:
				// Others are in front.
				y.explain(resilience.Refusal{Reason: resilience.ReasonTurn, NotBefore: k.turn})
			}
			return y, true
		}
	}
	return Why{}, false
}

// Trouble lists the creators of this worker that wait for something, the worst
// first, and no more than limit of them.
func (w *Worker) Trouble(limit int) []Why {
	now := time.Now()
	var all []Why
	for _, p := range w.partitions {
		p.mu.Lock()
		if p.active {
			for name := range p.creators {
				if y := p.why(name, now); y.Reason != "" {
					all = append(all, y)
				}
			}
		}
		p.mu.Unlock()
		if len(all) > 4*limit {
			all = Worst(all, limit)
		}
	}
	return Worst(all, limit)
}

// Worst sorts creators by trouble: those that need somebody, then those that wait
// for longest, then those with most that waits.
func Worst(all []Why, limit int) []Why {
	slices.SortFunc(all, func(a, b Why) int {
		return cmp.Or(
			-cmp.Compare(a.urgency(), b.urgency()),
			-cmp.Compare(a.Waiting+a.Parked, b.Waiting+b.Parked),
			cmp.Compare(a.Creator, b.Creator),
		)
	})
	return all[:min(len(all), limit)]
}

func (y Why) urgency() int {
	switch {
	case y.Action != "":
		return 3
	case y.Reason == resilience.ReasonHold || y.Reason == resilience.ReasonBreaker:
		return 2
	case y.Reason == reasonBackoff:
		return 1
	}
	return 0
}
