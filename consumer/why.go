package consumer

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"slices"
	"time"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/mutant"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// Why says why the requests of a creator wait: the one reason, and when it ends.
type Why struct {
	Creator string            `json:"creator"`
	Request string            `json:"request,omitempty"` // where one was asked for
	Worker  string            `json:"worker"`            // that answers, and owns the creator
	Reason  resilience.Reason `json:"reason,omitempty"`  // "": nothing keeps it
	Until   *time.Time        `json:"until,omitempty"`   // absent: not known, or until a person acts
	Text    string            `json:"text"`              // for people
	Action  string            `json:"action,omitempty"`  // what a person must do

	InFlight  int `json:"in_flight"`  // calls
	Settling  int `json:"settling"`   // requests whose outcome is being stored
	LookingUp int `json:"looking_up"` // requests about which the server is being asked
	Waiting   int `json:"waiting"`    // in the worker
	Parked    int `json:"parked"`     // at the server, until their turn
	Pending   int `json:"pending"`    // requests of the whole partition that have not been looked at
	Ahead     int `json:"ahead"`      // of one request: the creator's that are called before it
	Retrying  int `json:"retrying"`   // of those parked: after a call that failed
	Attempts  int `json:"attempts"`   // the most that one of those had

	Failures []publisher.Attempt `json:"failures,omitempty"` // the latest, the last one first
}

// lastFailures is how many failures are remembered of a creator.
const lastFailures = 5

// failed remembers a failure of a creator.
func (p *partition) failed(name string, a publisher.Attempt) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.creators[name]; c != nil {
		c.failures = append(c.failures[max(0, len(c.failures)-lastFailures+1):len(c.failures):len(c.failures)], a)
	}
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

// Why answers for a creator whose partition this worker owns; otherwise it reports false.
func (w *Worker) Why(name string) (Why, bool) {
	p := w.partitionOf(name)
	if p == nil {
		return Why{}, false
	}
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.active || !p.lease.Valid(now) {
		return Why{}, false
	}
	return p.why(name, now), true
}

// why is Why, under the partition's lock.
func (p *partition) why(name string, now time.Time) Why {
	y := Why{Creator: name, Worker: p.settler.worker, Pending: int(p.pending)}
	c := p.creators[name]
	if c == nil {
		if no, kept := p.whyUnknown(name, now); kept {
			y.explain(no)
		}
		y.idle()
		return y
	}
	y.count(c)
	y.countHere(p, name)
	kind, next := c.nextKind()
	no, refused := c.gate.Look(now, kind)
	waits := y.Waiting+y.Parked > 0
	always := no.Hold != nil || no.Reason == resilience.ReasonBreaker || no.Reason == resilience.ReasonProviderBreaker
	switch {
	// A reason for which a creator is not called at all is said even if nothing waits.
	case refused && always, refused && waits && !shared(no.Reason):
		y.explain(no)
	case p.elsewhere[name]:
		y.explain(resilience.Refusal{Reason: reasonElsewhere})
	case !waits:
	case next != nil && next.own():
		y.explain(next.why)
	case len(c.waiting) > 0 && c.waiting[0].why.Reason != "":
		y.explain(c.waiting[0].why)
	case len(c.suspects) > 0:
		y.explain(resilience.Refusal{Reason: reasonSuspect})
	case refused:
		y.explain(no)
	case next != nil && next.why.Reason != "":
		y.explain(resilience.Refusal{Reason: reasonTurn})
	}
	y.idle()
	return y
}

// whyUnknown is what keeps a creator of which no request is known here.
func (p *partition) whyUnknown(name string, now time.Time) (resilience.Refusal, bool) {
	if no, blocked := p.shared.gates.Blocked(now); blocked {
		return no, true
	}
	var longest *resilience.Hold
	for _, by := range []resilience.Authority{resilience.ByPeople, resilience.ByAPI} {
		if h, held := p.holds.Of(name, by); held && h.Stands(now) && h.Outlasts(longest) {
			longest = &h
		}
	}
	if longest == nil {
		return resilience.Refusal{}, false
	}
	return resilience.Refusal{Reason: resilience.ReasonHold, NotBefore: longest.Until, Hold: longest}, true
}

// count counts the requests of a creator by where they are.
func (y *Why) count(c *creator) {
	y.Waiting, y.Parked = len(c.waiting)+len(c.suspects), len(c.parked)
	y.InFlight = c.gate.InFlight()
	for _, k := range c.parked {
		if n := len(k.record.Attempts); n > 0 {
			y.Retrying++
			y.Attempts = max(y.Attempts, n)
		}
	}
	y.Failures = slices.Clone(c.failures)
	slices.Reverse(y.Failures)
}

// countHere counts the requests of a creator that are looked up or settled.
func (y *Why) countHere(p *partition, name string) {
	for _, d := range p.here {
		if d.req.Creator != name {
			continue
		}
		switch d.stage() {
		case arrived, lookingUp:
			y.LookingUp++
		case settling:
			y.Settling++
		}
	}
}

// nextKind is the kind of the request of c that is called next. That is a parked one, and is returned,
// if none waits in the worker.
func (c *creator) nextKind() (resilience.Kind, *parked) {
	switch {
	case len(c.waiting) > 0:
		return c.waiting[0].op.Kind, nil
	case len(c.suspects) > 0:
		return c.suspects[0].op.Kind, nil
	}
	if seq, there := c.firstReady(); there {
		return c.parked[seq].kind, c.parked[seq]
	}
	var first *parked
	for _, k := range c.parked {
		if first == nil || k.due.Before(first.due) {
			first = k
		}
	}
	if first == nil {
		return resilience.Read, nil
	}
	return first.kind, first
}

// idle is the text where no reason was found.
func (y *Why) idle() {
	switch {
	case mutant.On(mutant.WhyGuesses):
		y.Reason, y.Text = "", "nothing waits, and nothing keeps it"
	case y.Text != "":
	case y.Waiting+y.Parked > 0:
		y.Text = "nothing keeps it: it is about to be called"
	case y.InFlight > 0:
		y.Text = "nothing waits; it is being called"
	case y.LookingUp > 0:
		y.Text = "nothing waits; the server is being asked what became of its requests"
	case y.Settling > 0:
		y.Text = "nothing waits; outcomes of its calls are being stored"
	case y.Pending > 0:
		y.Text = fmt.Sprintf("nothing that this worker has looked at waits, and nothing keeps it; %d requests of its partition have not been looked at yet", y.Pending)
	default:
		y.Text = "nothing waits, and nothing keeps it"
	}
}

// explain puts a refusal into words.
func (y *Why) explain(no resilience.Refusal) {
	y.Reason, y.Until, y.Action = no.Reason, nil, ""
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
			text += "; until it is released"
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
	reasonTurn:                       "it waits for its turn behind the creator's other requests",
	reasonBackoff:                    "a call failed, and the next attempt is not due",
	reasonSuspect:                    "workers vanished while they called it, so it is called alone, and waits until no other such request is being called",
	reasonStorage:                    "outcomes cannot be stored at the moment, so no further calls are made; look at the worker's log and at `headgate doctor`",
	reasonElsewhere:                  "the worker that had the partition before is still calling for the creator",
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
		if named(d.req.ID, id) {
			return p.whyHere(d, now), true
		}
	}
	for _, c := range p.creators {
		for _, k := range c.parked {
			if named(k.id, id) {
				return p.whyParked(c, k, now), true
			}
		}
	}
	return Why{}, false
}

// named reports whether a request has an id, or the digest that stands for one that is too long for a
// subject.
func named(id, asked string) bool {
	return id == asked || len(asked) == digestSize && publisher.IDToken(id) == asked
}

// digestSize is the length of such a digest.
const digestSize = 64

// whyHere explains a request by its stage.
func (p *partition) whyHere(d *delivery, now time.Time) Why {
	y := p.why(d.req.Creator, now)
	y.Request, y.Attempts = d.req.ID, int(d.tried.Load())
	text := ""
	switch d.stage() {
	case calling:
		text = "it is being called"
	case settling:
		text = "its outcome is being stored"
		if p.shared.unstored.Load() > 0 {
			y.explain(resilience.Refusal{Reason: reasonStorage})
			return y
		}
	case arrived, lookingUp:
		text = "the server is being asked what became of it"
	default:
		if d.suspect() {
			y.explain(resilience.Refusal{Reason: reasonSuspect})
			return y
		}
		if i := slices.Index(p.waitingOf(d.req.Creator), d); i > 0 {
			y.Ahead = i
		}
		return y
	}
	y.Reason, y.Until, y.Action, y.Text = "", nil, "", text
	return y
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func (p *partition) waitingOf(creator string) []*delivery {
	if c := p.creators[creator]; c != nil {
		return c.waiting
	}
	return nil
}

// whyParked explains a request that waits at the server.
func (p *partition) whyParked(c *creator, k *parked, now time.Time) Why {
	y := p.why(c.name, now)
	y.Request, y.Attempts = k.id, len(k.record.Attempts)
	y.Ahead = len(c.waiting)
	for seq, other := range c.parked {
		if seq < k.seq && !other.own() {
			y.Ahead++
		}
	}
	switch {
	case k.own():
		no := k.why
		no.NotBefore = k.due
		y.explain(no)
	case y.Reason == "" || y.Reason == reasonBackoff || y.Ahead > 0 && (y.Reason == resilience.ReasonLimit || y.Reason == resilience.ReasonSlots):
		turn := resilience.Refusal{Reason: reasonTurn}
		if interval := c.gate.Interval(k.kind); interval > 0 {
			no, _ := c.gate.Look(now, k.kind)
			turn.NotBefore = latest(no.NotBefore, now).Add(time.Duration(y.Ahead) * interval)
		}
		y.explain(turn)
	}
	return y
}

// Waiting lists the creators of this worker that wait for something, the most urgent
// first, and no more than limit of them.
func (w *Worker) Waiting(limit int) []Why {
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
			all = MostUrgent(all, limit)
		}
	}
	return MostUrgent(all, limit)
}

// MostUrgent sorts creators by urgency: those for which a person must act, then those that are held, then
// those with most requests that wait.
func MostUrgent(all []Why, limit int) []Why {
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
