package consumer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// Keys of HOLDS.
const (
	holdAccount  = "account"
	holdProvider = "provider"
	holdCreator  = perCreator
)

// perCreator, and the creator's token, is a key of HOLDS and of LIMITS.
const perCreator = "creator."

// creatorOf is the creator that a key names.
func creatorOf(key string) (string, error) {
	token, ok := strings.CutPrefix(key, perCreator)
	if !ok {
		return "", fmt.Errorf("key %q does not start with %s", key, perCreator)
	}
	return publisher.DecodeToken(token)
}

// holds mirrors the HOLDS bucket, which every worker watches, so that a hold
// outlives the worker that met it and people can set one by hand.
type holds struct {
	kv  jetstream.KeyValue
	log zerolog.Logger

	mu    sync.RWMutex
	known map[string]knownHold // by key
}

// knownHold is a hold and the revision under which it is stored; 0: it is not,
// or not yet.
type knownHold struct {
	resilience.Hold
	revision uint64
}

// storedHold is a hold as JSON in HOLDS.
type storedHold struct {
	Until  *time.Time     `json:"until,omitempty"` // absent: until it is released
	Since  time.Time      `json:"since"`
	Reason string         `json:"reason,omitempty"`
	Class  classify.Class `json:"class,omitempty"`
	Who    string         `json:"who,omitempty"`
}

// parseHold reads what a worker or a person put into HOLDS at a time: JSON, a
// duration from then on, or an RFC 3339 time.
func parseHold(value []byte, put time.Time) (resilience.Hold, error) {
	text := strings.TrimSpace(string(value))
	byHand := resilience.Hold{Since: put, Reason: "held by hand", Who: "operator"}
	if d, err := time.ParseDuration(text); err == nil {
		if d <= 0 {
			return resilience.Hold{}, fmt.Errorf("a hold of %s has no end in the future", d)
		}
		byHand.Until = put.Add(d)
		return byHand, nil
	}
	if at, err := time.Parse(time.RFC3339, text); err == nil {
		byHand.Until = at
		return byHand, nil
	}
	if !strings.HasPrefix(text, "{") {
		return resilience.Hold{}, errors.New(`a hold is a duration ("1h"), an RFC 3339 time, or a JSON object with "until" and "reason"`)
	}
	var s storedHold
	if err := json.Unmarshal(value, &s); err != nil {
		return resilience.Hold{}, fmt.Errorf("a hold's JSON: %w", err)
	}
	h := resilience.Hold{Since: s.Since, Reason: s.Reason, Class: s.Class, Who: s.Who}
	if h.Since.IsZero() {
		h.Since = put
	}
	if s.Until != nil {
		h.Until = *s.Until
	}
	return h, nil
}

// EncodeHold is how a hold stands in HOLDS.
func EncodeHold(h resilience.Hold) ([]byte, error) {
	s := storedHold{Since: h.Since.UTC().Round(0), Reason: h.Reason, Class: h.Class, Who: h.Who}
	if !h.Until.IsZero() {
		until := h.Until.UTC().Round(0)
		s.Until = &until
	}
	return json.Marshal(s)
}

func (hs *holds) of(creator string) (resilience.Hold, bool) {
	token, err := publisher.EncodeToken(creator)
	if err != nil {
		return resilience.Hold{}, false
	}
	hs.mu.RLock()
	defer hs.mu.RUnlock()
	h, ok := hs.known[holdCreator+token]
	return h.Hold, ok
}

// keep remembers a hold, wherever its partition goes meanwhile.
func (hs *holds) keep(key string, h resilience.Hold, revision uint64) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	old, there := hs.known[key]
	switch {
	case !there || h.Outlasts(&old.Hold):
		hs.known[key] = knownHold{h, revision}
	case h.Until.Equal(old.Until):
		old.revision = max(old.revision, revision)
		hs.known[key] = old
	}
}

// drop forgets a hold that was released in the bucket. It reports false if the one
// that is known is newer: news of the bucket may be late.
func (hs *holds) drop(key string, revision uint64) bool {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	if old, there := hs.known[key]; there && (old.revision == 0 || old.revision > revision) {
		return false
	}
	delete(hs.known, key)
	return true
}

// stands reports whether a hold that is known forbids calls.
func (hs *holds) stands(key string) bool {
	hs.mu.RLock()
	defer hs.mu.RUnlock()
	h, there := hs.known[key]
	return there && h.Stands(time.Now())
}

// save stores what could not be stored before.
func (hs *holds) save(ctx context.Context, now time.Time) {
	unsaved := map[string]resilience.Hold{}
	hs.mu.RLock()
	for key, h := range hs.known {
		if h.revision == 0 && h.Stands(now) && now.Sub(h.Since) > beatEvery {
			unsaved[key] = h.Hold
		}
	}
	hs.mu.RUnlock()
	for key, h := range unsaved {
		if err := hs.store(ctx, key, h); err != nil {
			return // the next ones would not fare better
		}
	}
}

// store makes a hold durable and known to all workers, unless a longer one is. It
// compares and sets: a write that a network held up must not shorten what came
// meanwhile.
func (hs *holds) store(ctx context.Context, key string, h resilience.Hold) error {
	value, err := EncodeHold(h)
	if err != nil {
		return fmt.Errorf("encode hold: %w", err)
	}
	for {
		var revision uint64
		entry, err := hs.kv.Get(ctx, key)
		switch {
		case errors.Is(err, jetstream.ErrKeyNotFound):
			revision, err = hs.kv.Create(ctx, key, value)
		case err == nil:
			if there, err := parseHold(entry.Value(), entry.Created()); err == nil && there.Stands(time.Now()) && !h.Outlasts(&there) {
				hs.keep(key, there, entry.Revision())
				return nil
			}
			revision, err = hs.kv.Update(ctx, key, value, entry.Revision())
		}
		switch {
		case err == nil:
			hs.keep(key, h, revision)
			return nil
		case writtenBetween(err) && ctx.Err() == nil:
		default:
			return fmt.Errorf("store hold %s: %w", key, err)
		}
	}
}

// apply takes an entry of HOLDS, as it is or as it has become.
func (hs *holds) apply(w *Worker, entry jetstream.KeyValueEntry) {
	key := entry.Key()
	name, err := creatorOf(key)
	isCreator := err == nil
	if err != nil && key != holdAccount && key != holdProvider {
		hs.log.Warn().Err(err).Str("key", key).Msg("ignored: a key of HOLDS is creator.<encoded creator>, account or provider")
		return
	}

	if entry.Operation() != jetstream.KeyValuePut {
		stood := hs.stands(key)
		if !hs.drop(key, entry.Revision()) {
			return
		}
		if stood {
			w.releasedEvent(key, entry.Revision())
		}
		switch {
		case isCreator:
			w.released(name)
		case key == holdAccount:
			w.gates.ReleaseAccount()
			w.replanAll()
		default:
			w.gates.ReleaseProvider()
			w.replanAll()
		}
		return
	}

	h, err := parseHold(entry.Value(), entry.Created())
	if err != nil {
		hs.log.Warn().Err(err).Str("key", key).Msg("ignored: cannot read this hold")
		return
	}
	if !h.Stands(time.Now()) {
		return
	}
	hs.keep(key, h, entry.Revision())
	switch {
	case isCreator:
		if p := w.partitionOf(name); p != nil {
			p.hold(name, h)
		}
	case key == holdAccount:
		w.gates.HoldAccount(h)
	default:
		w.gates.HoldProvider(h)
	}
}

// expire deletes holds that are over from the bucket, of creators that are this
// worker's. Those of all end with a call that finds out.
func (hs *holds) expire(ctx context.Context, now time.Time, owns func(creator string) bool) {
	var over []string
	hs.mu.Lock()
	for key, h := range hs.known {
		if strings.HasPrefix(key, holdCreator) && !h.Stands(now) {
			over = append(over, key)
			delete(hs.known, key)
		}
	}
	hs.mu.Unlock()
	for _, key := range over {
		if name, err := creatorOf(key); err != nil || !owns(name) {
			continue
		}
		entry, err := hs.kv.Get(ctx, key)
		if err != nil {
			continue
		}
		if h, err := parseHold(entry.Value(), entry.Created()); err == nil && !h.Stands(now) {
			// Only this revision: it may be held again by now.
			_ = hs.kv.Delete(ctx, key, jetstream.LastRevision(entry.Revision()))
		}
	}
}
