package consumer

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/dlq"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// republish makes the request stream tell what it stores.
var republish = &jetstream.RePublish{Source: ">", Destination: "stored.>"}

// personHold is a hold that a person has put into HOLDS.
type personHold struct {
	key       string
	put, till time.Time
	ended     time.Time // released, or another one took its place; zero: neither
	// lost: its bucket was made anew, and the hold is known to those workers only.
	lost      bool
	survivors []string
}

// limitChange is a creator's limit as a person has put it into LIMITS.
type limitChange struct {
	creator string
	at      time.Time
	limit   resilience.Limits
	unknown bool // its bucket was made anew: it may be what it was, or as usual
}

// operator does what an operator may do at any moment, with plain NATS.
func (w *world) operator(creators int, helpers *sync.WaitGroup) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	creator := fmt.Sprintf("c%d", w.rng.IntN(creators))
	switch w.rng.IntN(9) {
	case 0, 1:
		w.personHolds(ctx, creator)
	case 2:
		w.personReleases(ctx, "creator."+creator)
	case 3:
		w.personLimits(ctx, creator)
	case 4:
		w.purgeSubject(ctx, creator)
	case 5:
		w.deleteRequest(ctx)
	case 6:
		w.dropLetter(ctx)
	case 7, 8:
		helpers.Go(w.replayLetters)
	}
}

func (w *world) personHolds(ctx context.Context, creator string) {
	key := "creator." + creator
	longest := 10 * time.Minute
	switch w.rng.IntN(12) {
	case 0:
		key, longest = "account", time.Minute
	case 1:
		key, longest = "provider", time.Minute
	}
	d := (time.Duration(w.rng.IntN(int(longest.Seconds()))) + 2) * time.Second
	value := d.String()
	switch w.rng.IntN(3) {
	case 0:
		value = time.Now().Add(d).UTC().Format(time.RFC3339Nano)
	case 1:
		value = fmt.Sprintf(`{"until":%q,"reason":"a person says so","who":"simulation"}`, time.Now().Add(d).UTC().Format(time.RFC3339Nano))
	}
	kv, err := w.js.KeyValue(ctx, "HOLDS")
	if err != nil {
		return
	}
	before := time.Now()
	if _, err := kv.PutString(ctx, key, value); err != nil {
		w.fault()
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endHolds(key)
	w.holds = append(w.holds, &personHold{key: key, put: time.Now(), till: before.Add(d)})
}

// endHolds ends the holds under a key; w.mu is held.
func (w *world) endHolds(key string) {
	for _, h := range w.holds {
		if h.key == key && h.ended.IsZero() {
			h.ended = time.Now()
		}
	}
}

// personReleases ends a person's hold, and now and then what the API has asked for as well.
func (w *world) personReleases(ctx context.Context, key string) {
	kv, err := w.js.KeyValue(ctx, "HOLDS")
	if err != nil {
		return
	}
	w.mu.Lock()
	w.endHolds(key) // before: it may be gone although the answer does not come
	w.mu.Unlock()
	_ = kv.Delete(ctx, key)
	if w.rng.IntN(4) == 0 {
		w.mu.Lock()
		delete(w.windows, strings.TrimPrefix(key, "creator."))
		w.mu.Unlock()
		_ = kv.Delete(ctx, key+".api")
	}
}

func (w *world) personLimits(ctx context.Context, creator string) {
	kv, err := w.js.KeyValue(ctx, "LIMITS")
	if err != nil {
		return
	}
	change := limitChange{creator: creator, at: time.Now(), limit: w.cfg.Gates.Creator}
	if w.rng.IntN(3) == 0 {
		err = kv.Delete(ctx, "creator."+creator)
	} else {
		change.limit.PerSecond, change.limit.Burst, change.limit.Concurrency = float64(1+w.rng.IntN(8)), 1+w.rng.IntN(12), 1+w.rng.IntN(3)
		value := fmt.Sprintf(`{"rate":"%d/s","burst":%d,"concurrency":%d}`, int(change.limit.PerSecond), change.limit.Burst, change.limit.Concurrency)
		_, err = kv.PutString(ctx, "creator."+creator, value)
	}
	change.unknown = err != nil
	w.mu.Lock()
	defer w.mu.Unlock()
	w.limits = append(w.limits, change)
}

// purgeSubject removes the stored requests of a creator, or of one of its operations.
func (w *world) purgeSubject(ctx context.Context, creator string) {
	s, err := w.js.Stream(ctx, "REQUESTS")
	if err != nil {
		return
	}
	operation := []string{"*", "send", "pay"}[w.rng.IntN(3)]
	last := s.CachedInfo().State.LastSeq
	w.mu.Lock()
	for _, r := range w.requests {
		if r.seq <= last && r.creator == creator && (operation == "*" || r.operation == operation) {
			r.removed = true
		}
	}
	w.mu.Unlock()
	_ = s.Purge(ctx, jetstream.WithPurgeSubject("requests.*."+creator+"."+operation))
}

func (w *world) deleteRequest(ctx context.Context) {
	s, err := w.js.Stream(ctx, "REQUESTS")
	if err != nil || s.CachedInfo().State.Msgs == 0 {
		return
	}
	state := s.CachedInfo().State
	seq := state.FirstSeq + uint64(w.rng.IntN(int(state.LastSeq-state.FirstSeq)+1))
	w.mu.Lock()
	for _, r := range w.requests {
		if r.seq == seq {
			r.removed = true
		}
	}
	w.mu.Unlock()
	_ = s.DeleteMsg(ctx, seq)
}

func (w *world) dropLetter(ctx context.Context) {
	letters, err := w.read(ctx, "DLQ")
	if err != nil || len(letters) == 0 {
		return
	}
	letter := letters[w.rng.IntN(len(letters))]
	w.mu.Lock()
	w.gone = append(w.gone, letter)
	w.mu.Unlock()
	if s, err := w.js.Stream(ctx, "DLQ"); err == nil {
		_ = s.DeleteMsg(ctx, letter.seq)
	}
}

// replayLetters replays all letters, or those of one class.
func (w *world) replayLetters() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	before, err := w.read(ctx, "DLQ")
	if err != nil || len(before) == 0 {
		return
	}
	box, err := dlq.Open(ctx, w.js, "")
	if err != nil {
		return
	}
	filter := dlq.Filter{}
	if w.chance(2) == 0 {
		filter.Class = before[w.chance(len(before))].class
	}
	w.mu.Lock()
	quiet := len(w.troubles)
	w.mu.Unlock()
	_, err = box.Replay(ctx, dlq.Replay{Filter: filter, MaxReplays: 3, KeepGoing: true})
	after, failed := w.read(ctx, "DLQ")
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil && quiet == len(w.troubles) && !w.troubled("") {
		w.addViolation("a replay of %d letters ends with: %v", len(before), err)
	}
	for _, l := range before {
		if failed != nil || !slices.ContainsFunc(after, func(o simOutcome) bool { return o.seq == l.seq }) {
			w.gone = append(w.gone, l)
		}
	}
}

// trouble is a time in which a worker, or all of them (""), cannot know everything.
type simTrouble struct {
	worker     string
	from, till time.Time // till: zero while it lasts
}

// trouble begins one; the caller ends it.
func (w *world) trouble(worker string) (end func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(w.troubles)
	w.troubles = append(w.troubles, simTrouble{worker: worker, from: time.Now()})
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.troubles[n].till = time.Now()
	}
}

// troubled reports whether there is trouble of a worker now; w.mu is held.
func (w *world) troubled(worker string) bool {
	return slices.ContainsFunc(w.troubles, func(t simTrouble) bool { return t.till.IsZero() && (t.worker == "" || t.worker == worker) })
}

// simSettling is how long after its trouble a worker knows again all that it should.
const simSettling = 20 * time.Second

// clear reports whether a worker could know at a time what had been so since another; w.mu is held.
func (w *world) clear(worker string, since, at time.Time) bool {
	for _, t := range w.troubles {
		if t.worker != "" && t.worker != worker || t.from.After(at) {
			continue
		}
		if t.till.IsZero() || t.till.After(since) && t.till.Add(simSettling).After(at) {
			return false
		}
	}
	return true
}

// remake deletes a bucket and makes it anew.
func (w *world) remake(workers []*simWorker) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	name := []string{"HOLDS", "LIMITS", "LEDGER", "BUDGETS"}[w.rng.IntN(4)]
	w.fault()
	end := w.trouble("")
	now := time.Now()
	w.mu.Lock()
	switch name {
	case "HOLDS":
		w.loseHolds(workers)
	case "LIMITS":
		for _, l := range w.limits {
			w.limits = append(w.limits, limitChange{creator: l.creator, at: now, unknown: true})
		}
	case "LEDGER":
		w.ledgerLost = append(w.ledgerLost, now)
	case "BUDGETS":
		w.budgetLost = append(w.budgetLost, now)
	}
	w.mu.Unlock()
	_ = w.js.DeleteKeyValue(ctx, name)
	time.Sleep(time.Duration(w.rng.IntN(5000)) * time.Millisecond)
	for ctx.Err() == nil {
		if _, err := w.cfg.Topology.Ensure(ctx, w.js); err == nil {
			break
		}
		time.Sleep(time.Second)
	}
	end()
	w.rewatch()
}

// loseHolds: who has known of a hold for a second still does, the others do not; w.mu is held.
func (w *world) loseHolds(workers []*simWorker) {
	now := time.Now()
	for creator := range w.windows {
		for i := range w.windows[creator] {
			w.windows[creator][i].known = time.Time{}
		}
	}
	for _, h := range w.holds {
		if !h.ended.IsZero() || h.lost || !h.till.After(now) {
			continue
		}
		h.lost, h.survivors = true, nil
		for _, s := range workers {
			if s.worker.Load() != nil && s.started.Add(simSettling).Before(now) && h.put.Add(2*time.Second).Before(now) && w.clear(s.name, h.put, now.Add(-time.Millisecond)) {
				h.survivors = append(h.survivors, s.name)
			}
		}
	}
}

// garbage is put into buckets.
var simGarbage = []string{"garbage", "[]", "1", "", "null", "{", `{"attempts":5}`, "\x00\xff\xfe", strings.Repeat("[", 1000), `{"tat":"nonsense"}`}

// litter puts garbage where programs keep what they know.
func (w *world) litter() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	value := simGarbage[w.rng.IntN(len(simGarbage))]
	switch w.rng.IntN(5) {
	case 0, 1:
		w.litterLedger(ctx, value)
	case 2:
		w.litterBudgets(ctx, value)
	case 3:
		_, _ = w.js.Publish(ctx, "$O.BODIES.M."+[]string{"Z2FyYmFnZQ==", "garbage", "cmVzdWx0cw=="}[w.rng.IntN(3)], []byte(value))
	case 4:
		if kv, err := w.js.KeyValue(ctx, "OWNERS"); err == nil {
			_, _ = kv.PutString(ctx, []string{"worker.x", "worker.=zz", "partition.x", "other"}[w.rng.IntN(4)], value)
		}
		if kv, err := w.js.KeyValue(ctx, "LIMITS"); err == nil {
			_, _ = kv.PutString(ctx, []string{"creator.=zz", "other", "creator.nobody"}[w.rng.IntN(3)], value)
		}
	}
}

// litterLedger spoils the records of some requests.
func (w *world) litterLedger(ctx context.Context, value string) {
	kv, err := w.js.KeyValue(ctx, "LEDGER")
	if err != nil {
		return
	}
	w.mu.Lock()
	w.ledgerLost = append(w.ledgerLost, time.Now())
	w.mu.Unlock()
	keys, err := kv.Keys(ctx)
	if err == nil && len(keys) > 0 && w.rng.IntN(2) == 0 {
		_, _ = kv.PutString(ctx, keys[w.rng.IntN(len(keys))], value)
	}
	if r := w.pick(); r != nil {
		_, _ = kv.PutString(ctx, publisher.IDToken(r.id), value)
		_, _ = kv.PutString(ctx, r.creator+"."+publisher.IDToken(r.id), value)
	}
}

// litterBudgets spoils the account's budget, or moves it into the future.
func (w *world) litterBudgets(ctx context.Context, value string) {
	kv, err := w.js.KeyValue(ctx, "BUDGETS")
	if err != nil {
		return
	}
	if entry, err := kv.Get(ctx, "account"); err == nil && w.rng.IntN(2) == 0 {
		var fields map[string]any
		if json.Unmarshal(entry.Value(), &fields) == nil {
			for name, v := range fields {
				if text, ok := v.(string); ok {
					if at, err := time.Parse(time.RFC3339Nano, text); err == nil {
						fields[name] = at.Add(time.Hour)
					}
				}
			}
			if b, err := json.Marshal(fields); err == nil {
				value = string(b)
			}
		}
	}
	_, _ = kv.PutString(ctx, "account", value)
}

// remakeConsumers deletes consumers of partitions and makes them anew.
func (w *world) remakeConsumers() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	w.fault()
	end := w.trouble("")
	defer end()
	for range 1 + w.rng.IntN(2) {
		_ = w.js.DeleteConsumer(ctx, "REQUESTS", publisher.ConsumerName(w.rng.IntN(w.cfg.Topology.Partitions)))
	}
	time.Sleep(time.Duration(w.rng.IntN(3000)) * time.Millisecond)
	for ctx.Err() == nil {
		if _, err := w.cfg.Topology.Ensure(ctx, w.js); err == nil {
			return
		}
		time.Sleep(time.Second)
	}
}

// fill makes a stream take nothing more, for a minute.
func (w *world) fill(helpers *sync.WaitGroup) {
	stream := []string{"RESULTS", "DLQ"}[w.rng.IntN(2)]
	limit := func(none bool) bool {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		s, err := w.js.Stream(ctx, stream)
		if err != nil {
			return false
		}
		cfg := s.CachedInfo().Config
		cfg.MaxMsgs, cfg.MaxBytes = -1, -1
		if none && w.chance(2) == 0 {
			cfg.MaxMsgs = max(1, int64(s.CachedInfo().State.Msgs))
		} else if none {
			cfg.MaxBytes = max(1, int64(s.CachedInfo().State.Bytes))
		}
		_, err = w.js.UpdateStream(ctx, cfg)
		return err == nil
	}
	w.fault()
	end := w.trouble("")
	if !limit(true) {
		end()
		return
	}
	helpers.Go(func() {
		time.Sleep(time.Minute)
		for !limit(false) {
			time.Sleep(time.Second)
		}
		end()
		w.fault()
	})
}

// expireToken makes the API refuse its token, and the endpoint of new ones fail for a while.
func (w *world) expireToken(helpers *sync.WaitGroup) {
	d := time.Duration(w.rng.IntN(180)) * time.Second
	w.mu.Lock()
	w.expired, w.endpointFails = true, true
	w.mu.Unlock()
	w.fault()
	end := w.trouble("")
	helpers.Go(func() {
		time.Sleep(d)
		w.mu.Lock()
		w.endpointFails = false
		w.mu.Unlock()
		end()
		w.fault()
	})
}
