package control

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/resilience"
)

// Desk is the place where people hold and release: the commands and the NATS service. It
// writes people's keys of HOLDS, and deletes the API's where people may end them.
type Desk struct {
	js jetstream.JetStream
	kv jetstream.KeyValue
}

// OpenDesk binds to the bucket HOLDS.
func OpenDesk(ctx context.Context, js jetstream.JetStream, bucket string) (*Desk, error) {
	kv, err := js.KeyValue(ctx, bucket)
	if err != nil {
		return nil, fmt.Errorf("bind to bucket %s (has `headgate setup` been run?): %w", bucket, err)
	}
	return &Desk{js, kv}, nil
}

// WaitsForPeople reports whether a hold of the API's is one that people end: it has no
// end of its own, or it is the account's because of something that people put right.
func WaitsForPeople(t Target, h resilience.Hold) bool {
	if h.Until.IsZero() {
		return true
	}
	switch h.Class {
	case classify.Unauthorized, classify.Billing, classify.QuotaExceeded:
		return t.Kind == Account
	}
	return false
}

// Hold puts people's hold of a target. It replaces the one that people put before; the
// API's hold stays, and the later one counts.
func (d *Desk) Hold(ctx context.Context, t Target, h resilience.Hold) error {
	key, value, err := encoded(t, h)
	if err != nil {
		return err
	}
	if _, err := d.kv.Put(ctx, key, value); err != nil {
		return fmt.Errorf("put %s into bucket %s: %w", key, d.kv.Bucket(), err)
	}
	return nil
}

func encoded(t Target, h resilience.Hold) (key string, value []byte, err error) {
	if key, err = t.Key(ByPeople); err != nil {
		return "", nil, err
	}
	value, err = EncodeHold(h)
	return key, value, err
}

// Ended says what a release did.
type Ended struct {
	People *resilience.Hold // people's hold that it ended; nil: none stood
	API    *resilience.Hold // the API's hold that it ended
	Stands *resilience.Hold // the API's hold that it did not end
}

// Release ends people's hold of a target, and the API's if that waits for people or if force
// is set. who is told to the workers.
func (d *Desk) Release(ctx context.Context, t Target, force bool, who string) (Ended, error) {
	var ended Ended
	api, stands, err := d.end(ctx, t, ByAPI, who, func(h resilience.Hold, readable bool) bool {
		return force || readable && (!h.Stands(time.Now()) || WaitsForPeople(t, h))
	})
	if err != nil {
		return ended, err
	}
	ended.API, ended.Stands = api, stands
	ended.People, _, err = d.end(ctx, t, ByPeople, who, func(resilience.Hold, bool) bool { return true })
	return ended, err
}

// end deletes an authority's key if may agrees. It returns the hold that it ended or the one
// that goes on, if that stands.
func (d *Desk) end(ctx context.Context, t Target, by Authority, who string, may func(h resilience.Hold, readable bool) bool) (ended, stands *resilience.Hold, err error) {
	key, err := t.Key(by)
	if err != nil {
		return nil, nil, err
	}
	for {
		entry, err := d.kv.Get(ctx, key)
		switch {
		case errors.Is(err, jetstream.ErrKeyNotFound):
			return nil, nil, nil
		case err != nil:
			return nil, nil, fmt.Errorf("read %s of bucket %s: %w", key, d.kv.Bucket(), err)
		}
		h, err := ParseHold(entry.Value(), entry.Created())
		readable := err == nil
		var hold *resilience.Hold
		if readable && h.Stands(time.Now()) {
			hold = &h
		}
		if !may(h, readable) {
			return nil, hold, nil
		}
		err = d.delete(ctx, key, entry.Revision(), who)
		switch {
		case err == nil:
			return hold, nil, nil
		case !lostRace(err):
			return nil, nil, fmt.Errorf("delete %s of bucket %s: %w", key, d.kv.Bucket(), err)
		}
		if pause(ctx, storeAgain); ctx.Err() != nil {
			return nil, nil, fmt.Errorf("delete %s of bucket %s: %w", key, d.kv.Bucket(), ctx.Err())
		}
	}
}

// delete is KeyValue.Delete of one revision, with a word about who does it.
func (d *Desk) delete(ctx context.Context, key string, revision uint64, who string) error {
	subject := "$KV." + d.kv.Bucket() + "." + key
	if p := apiPrefix(d.js); p != jetstream.DefaultAPIPrefix {
		subject = p + subject // as the client does for another domain
	}
	m := nats.NewMsg(subject)
	m.Header.Set(headerOperation, "DEL")
	if who = printable(who); who != "" {
		m.Header.Set(headerWho, who)
	}
	_, err := d.js.PublishMsg(ctx, m, jetstream.WithExpectLastSequencePerSubject(revision))
	return err
}

// printable leaves out what a header must not have, and shortens.
func printable(text string) string {
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, text)
	const most = 100
	if runes := []rune(text); len(runes) > most {
		return string(runes[:most])
	}
	return text
}

// HoldMeanwhile holds a target for a piece of work, unless people hold it for longer. Undo
// puts back what was there, unless people have put something else meanwhile.
func (d *Desk) HoldMeanwhile(ctx context.Context, t Target, h resilience.Hold) (undo func(context.Context) error, err error) {
	key, value, err := encoded(t, h)
	if err != nil {
		return nil, err
	}
	for {
		var mine uint64
		before, err := d.kv.Get(ctx, key)
		switch {
		case errors.Is(err, jetstream.ErrKeyNotFound):
			before = nil
			mine, err = d.kv.Create(ctx, key, value)
		case err == nil:
			if there, err := ParseHold(before.Value(), before.Created()); err == nil && there.Stands(time.Now()) && !h.Outlasts(&there) {
				return func(context.Context) error { return nil }, nil
			}
			mine, err = d.kv.Update(ctx, key, value, before.Revision())
		}
		switch {
		case err == nil:
			return func(ctx context.Context) error { return d.putBack(ctx, key, mine, before) }, nil
		case !lostRace(err):
			return nil, fmt.Errorf("put %s into bucket %s: %w", key, d.kv.Bucket(), err)
		}
		if pause(ctx, storeAgain); ctx.Err() != nil {
			return nil, fmt.Errorf("put %s into bucket %s: %w", key, d.kv.Bucket(), ctx.Err())
		}
	}
}

// putBack replaces the entry with a revision by the one before it. A duration counts from
// the time at which it was put, so what goes back is a time.
func (d *Desk) putBack(ctx context.Context, key string, revision uint64, before jetstream.KeyValueEntry) error {
	var h resilience.Hold
	err := errors.New("there was none")
	if before != nil {
		h, err = ParseHold(before.Value(), before.Created())
	}
	if err != nil || !h.Stands(time.Now()) {
		err = d.delete(ctx, key, revision, "")
	} else {
		var value []byte
		if value, err = EncodeHold(h); err == nil {
			_, err = d.kv.Update(ctx, key, value, revision)
		}
	}
	if err != nil && !lostRace(err) {
		return fmt.Errorf("put %s of bucket %s back: %w", key, d.kv.Bucket(), err)
	}
	return nil
}
