package consumer

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/publisher"
)

const (
	// countEvery is how often what is stored is compared with what is known.
	countEvery = 5 * time.Minute

	// countedAtOnce bounds what one comparison looks at.
	countedAtOnce = 10_000

	// claimAge is when a claim is too old to be on its way, and claimKnown when it
	// has been looked at often enough.
	claimAge   = 2 * time.Minute
	claimKnown = claimAge + 3*countEvery
)

// count looks for what is stored and known to nobody, and drives it on, until
// ctx ends: messages that the server does not deliver, dead letters that were
// claimed and not published.
func (w *Worker) count(ctx context.Context) {
	t := time.NewTicker(countEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		for _, p := range w.partitions {
			if err := p.count(ctx); err != nil && ctx.Err() == nil {
				w.log.Warn().Err(err).Int("partition", p.number).Msg("what is stored could not be compared with what is known; trying again")
			}
		}
		if w.partitions[0].lease.holds(time.Now()) { // one worker does it for all
			if err := w.countClaims(ctx); err != nil && ctx.Err() == nil {
				w.log.Warn().Err(err).Msg("claims could not be compared with dead letters; trying again")
			}
		}
	}
}

// countable reports whether everything that is stored ought to be known here: all
// that an earlier owner set aside has been due since, and the server has
// requests for messages and nothing to answer them with.
func (p *partition) countable(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	settled := p.w.cfg.Topology.AckWait + longestPark + time.Minute
	return p.active && p.lease.holds(now) && now.Sub(p.entered) > settled && p.puller.waits()
}

// count looks for messages of this partition that the server delivered once and
// does not deliver any more: somebody may have taken them with another
// client, and asked for a delay of years.
func (p *partition) count(ctx context.Context) error {
	now := time.Now()
	if _, blocked := p.w.gates.Blocked(now); blocked || !p.countable(now) {
		return nil
	}
	consumer, err := p.w.stream.Consumer(ctx, publisher.ConsumerName(p.number))
	if err != nil {
		return fmt.Errorf("look at the consumer: %w", err)
	}
	info := consumer.CachedInfo()
	subject := p.w.cfg.Topology.Namespace.StoredSubjects(p.number)
	p.mu.Lock()
	known := len(p.here)
	for _, c := range p.creators {
		known += len(c.parked)
	}
	p.mu.Unlock()
	stream, err := p.w.stream.Info(ctx, jetstream.WithSubjectFilter(subject))
	if err != nil {
		return fmt.Errorf("look at the stream: %w", err)
	}
	stored := 0
	for _, n := range stream.State.Subjects {
		stored += int(n)
	}
	if stored <= known+int(info.NumPending) {
		p.missed = nil
		return nil
	}

	// Some are unknown: which? Only those that were so the last time, too.
	missed := map[uint64]bool{}
	from := p.countFrom
	p.countFrom = 0
	for n := 0; ; n++ {
		m, err := p.w.ledger.next(ctx, p.w.requests, from, subject)
		if err != nil {
			return err
		}
		if m == nil || m.Sequence > info.Delivered.Stream {
			break
		}
		if n == countedAtOnce {
			p.countFrom = m.Sequence
			break
		}
		from = m.Sequence + 1
		if p.knows(m) {
			continue
		}
		missed[m.Sequence] = true
		if p.missed[m.Sequence] {
			p.w.log.Warn().Uint64("seq", m.Sequence).Int("partition", p.number).Time("stored", m.Time).
				Msg("a request is stored that the server does not deliver; it is taken from the stream")
			p.take(m)
		}
	}
	p.missed = missed
	return nil
}

func (p *partition) knows(m *storedMessage) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.here[m.Sequence] != nil {
		return true
	}
	creator, _, err := p.w.cfg.Topology.Namespace.ParseStored(m.Subject)
	if err != nil {
		creator = unreadable
	}
	c := p.creators[creator]
	return c != nil && c.parked[m.Sequence] != nil
}

// take handles a stored message as if it had been delivered. It is settled
// by deleting it.
func (p *partition) take(m *storedMessage) {
	now := time.Now()
	d := &delivery{
		msg: &nats.Msg{Subject: m.Subject, Header: m.Header, Data: m.Data},
		seq: m.Sequence, count: 2, stored: m.Time, extended: now, // 2: it may have an outcome
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.active && p.here[d.seq] == nil {
		p.handle(d, now)
	}
}

// countClaims publishes the dead letters that were claimed by a worker that then
// vanished, if the request is not there any more to be delivered again.
func (w *Worker) countClaims(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, countEvery)
	defer cancel()
	watcher, err := w.ledger.kv.WatchAll(ctx, jetstream.IgnoreDeletes())
	if err != nil {
		return fmt.Errorf("read the ledger: %w", err)
	}
	defer func() { _ = watcher.Stop() }()
	for {
		var e jetstream.KeyValueEntry
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e = <-watcher.Updates():
		}
		if e == nil {
			return nil
		}
		var r record
		if json.Unmarshal(e.Value(), &r) != nil || r.Claim == nil || r.Claim.Dead == nil || r.Claim.Stored {
			continue
		}
		if age := time.Since(r.Claim.At); age < claimAge || age > claimKnown {
			continue
		}
		if err := w.driveClaim(ctx, r); err != nil {
			return err
		}
	}
}

func (w *Worker) driveClaim(ctx context.Context, r record) error {
	letter := *r.Claim.Dead
	ns := w.cfg.Topology.Namespace
	subject, err := ns.DeadLetterSubject(letter.Class, letter.Creator, letter.Operation, letter.RequestID)
	if err != nil {
		return nil // nothing of ours
	}
	published, err := w.ledger.last(ctx, ns.Stream(publisher.DLQ), subject)
	if err != nil || published != nil {
		return err
	}
	stored, err := w.ledger.next(ctx, w.requests, letter.SourceSequence, letter.SourceSubject)
	if err != nil {
		return err
	}
	if stored != nil && stored.Sequence == letter.SourceSequence {
		return nil // its delivery will find the claim
	}
	letter.Reason += "; its request was gone before the dead letter was stored, so the payload is missing"
	letter.History = r.Attempts
	answered, err := w.publishFenced(ctx, letter)
	if err != nil || answered {
		return err
	}
	w.log.Warn().Str("request", letter.RequestID).Str("class", string(letter.Class)).
		Msg("a dead letter was claimed and never stored, and its request is gone; it is stored without payload")
	return nil
}
