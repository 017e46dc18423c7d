package consumer

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/headgate-io/headgate/internal/broker"
)

const (
	// reconcileEvery is how often the requests that are stored are compared with those that the
	// worker knows.
	reconcileEvery = time.Minute

	// reconciledAtOnce bounds the stored requests that one comparison of a partition reads.
	reconciledAtOnce = 200
)

// reconciliation is how far the comparison of a partition has come. It is guarded by the
// partition's lock.
type reconciliation struct {
	from   uint64          // the next sequence to be read
	missed map[uint64]bool // that were not known when they were read
}

// reconcile runs until ctx ends. It takes up requests that are stored but that the server does not
// deliver, and forgets requests that are parked here but not stored any more. partitions are
// the worker's; the owner of the first one also looks for requests that no consumer is given.
func (w *Worker) reconcile(ctx context.Context) {
	t := time.NewTicker(reconcileEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		for _, p := range w.partitions {
			if err := p.reconcile(ctx, w.reader); err != nil && ctx.Err() == nil {
				w.log.Warn().Err(err).Int("partition", p.number).Msg("stored requests could not be compared with those that are known; trying again")
			}
		}
		if err := w.partitions[0].takeStrays(ctx, w.reader); err != nil && ctx.Err() == nil {
			w.log.Warn().Err(err).Msg("requests that no consumer is given could not be looked for; trying again")
		}
	}
}

// reconcile compares some of the partition's stored requests with those that are known here. One
// that was delivered once, is not known, and was not known the last time either, is taken.
func (p *partition) reconcile(ctx context.Context, reader *broker.Reader) error {
	now := time.Now()
	if !p.settledIn(now) {
		return nil
	}
	info, err := p.server.consumer(ctx, p.number)
	if err != nil {
		return err
	}
	p.mu.Lock()
	from, before := p.recon.from, p.recon.missed
	p.mu.Unlock()
	if len(before) > 0 { // first those that were missed the last time
		from = slices.Min(slices.Collect(maps.Keys(before)))
	}
	subject := p.caller.namespace.StoredSubjects(p.number)
	missed := map[uint64]bool{}
	for range reconciledAtOnce {
		m, err := reader.Next(ctx, p.server.name, from, subject)
		if err != nil {
			return err
		}
		if m == nil || m.Sequence > info.Delivered.Stream {
			from = 0 // from the start again
			break
		}
		from = m.Sequence + 1
		switch {
		case p.knows(m):
		case before[m.Sequence]:
			p.log.Warn().Uint64("seq", m.Sequence).Int("partition", p.number).Time("stored", m.Time).
				Msg("a request is stored that the server does not deliver; it is taken from the stream")
			p.takeStored(m)
		default:
			missed[m.Sequence] = true
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.recon = reconciliation{from: from, missed: missed}
	return nil
}

// settledIn reports whether every message that an earlier owner had was due since, and the server has
// a request for messages that it cannot answer.
func (p *partition) settledIn(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.active && p.lease.Valid(now) && now.Sub(p.entered) > p.ackWait+reconcileEvery && p.puller.waits()
}

func (p *partition) knows(m *broker.Message) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.here[m.Sequence] != nil {
		return true
	}
	creator, _, _ := p.caller.namespace.ParseStored(m.Subject)
	c := p.creators[creator]
	return c != nil && c.parked[m.Sequence] != nil
}

// takeStored handles a stored request as if it had been delivered. It is settled
// by deleting it.
func (p *partition) takeStored(m *broker.Message) {
	now := time.Now()
	d := &delivery{
		msg: &nats.Msg{Subject: m.Subject, Header: m.Header, Data: m.Data},
		seq: m.Sequence, count: 2, stored: m.Time, extended: now, lease: p.lease, // 2: it may have an outcome
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.active && p.lease.Valid(now) && p.here[d.seq] == nil {
		p.take(d, now)
	}
}

// takeStrays takes the requests that no consumer is given. The server's subject transform leaves a
// subject as it is that has a wildcard for a token, and its subject index does not find one with byte
// 0x7f. They are recognised by their subject, one after another in the whole stream.
func (p *partition) takeStrays(ctx context.Context, reader *broker.Reader) error {
	if now := time.Now(); !p.settledIn(now) {
		return nil
	}
	p.mu.Lock()
	from := p.strays
	p.mu.Unlock()
	for range reconciledAtOnce {
		m, err := reader.Next(ctx, p.server.name, from, ">")
		if err != nil {
			return err
		}
		if m == nil {
			from = 0
			break
		}
		from = m.Sequence + 1
		if p.stray(m) {
			p.log.Warn().Uint64("seq", m.Sequence).Str("subject", strings.ToValidUTF8(m.Subject, "\ufffd")).Msg("a request is stored that no consumer is given; it is taken from the stream")
			p.takeStored(m)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.strays = from
	return nil
}

// stray reports whether a stored request is one that no consumer is given, as far as its subject tells. A
// request that a consumer is given is settled by its owner soon.
func (p *partition) stray(m *broker.Message) bool {
	_, _, err := p.caller.namespace.ParseStored(m.Subject)
	return err != nil && time.Since(m.Time) > strayAfter && !p.knows(m)
}

const strayAfter = time.Minute

// lookForOverdue runs until ctx ends.
func (w *Worker) lookForOverdue(ctx context.Context) {
	t := time.NewTicker(fetchTimeout)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			for _, p := range w.partitions {
				p.overdue(ctx, w.reader, now)
			}
		}
	}
}

// overdue looks for messages that should have come back and did not: a NAK was lost, or they are
// stored no more. Those are forgotten.
func (p *partition) overdue(ctx context.Context, reader *broker.Reader, now time.Time) {
	var late []*parked
	p.mu.Lock()
	for _, c := range p.creators {
		for _, k := range c.parked {
			fetched := !k.fetched.IsZero() && now.Sub(k.fetched) > fetchTimeout
			if fetched || now.Sub(k.back) > p.ackWait {
				late = append(late, k)
				if len(late) == overdueAtOnce {
					break
				}
			}
		}
	}
	p.mu.Unlock()
	for _, k := range late {
		m, err := reader.At(ctx, p.server.name, k.seq)
		if err != nil {
			return // the next ones would not fare better
		}
		p.mu.Lock()
		if c := p.parkedBy(k); c != nil {
			if m == nil {
				p.drop(c, k)
			} else {
				k.fetched, k.back = time.Now(), time.Now()
				if !k.own() || now.After(k.due) {
					p.server.reply(k.reply, nakPayload)
				}
			}
		}
		p.mu.Unlock()
	}
}

// overdueAtOnce bounds the messages of a partition that overdue looks for at once.
const overdueAtOnce = 64

// parkedBy is the creator that k is parked for, nil if it is so no more.
func (p *partition) parkedBy(k *parked) *creator {
	c := p.creators[k.creator]
	if c == nil || c.parked[k.seq] != k {
		return nil
	}
	return c
}

// drop forgets a parked request that is not stored any more.
func (p *partition) drop(c *creator, k *parked) {
	delete(c.parked, k.seq)
	if !k.fetched.IsZero() {
		c.fetched--
	}
	p.log.Error().Uint64("seq", k.seq).
		Msg("a request that waited for its call is gone from the stream without an outcome: it was deleted there, or the stream has a limit that deletes it")
	p.events.vanished()
	p.pump(c)
}
