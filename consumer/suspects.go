package consumer

import (
	"context"
	"sync"
	"time"

	"github.com/headgate-io/headgate/internal/failpoint"
)

// poisonous is how many calls of a request may begin that never end, because their
// worker vanishes, until the request itself is to blame.
const poisonous = 3

// suspects are requests that were being called when a worker vanished, twice.
// They are called one at a time, so that the next crash tells which one is
// the culprit.
type suspects struct {
	mu   sync.Mutex
	busy bool
	line []suspect
}

type suspect struct {
	p *partition
	d *delivery
}

// enter reports whether s may be called now; else it waits in the line.
func (q *suspects) enter(s suspect) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.busy {
		q.line = append(q.line, s)
		return false
	}
	q.busy = true
	return true
}

func (q *suspects) next() (suspect, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.line) == 0 {
		q.busy, q.line = false, nil
		return suspect{}, false
	}
	s := q.line[0]
	q.line = q.line[1:]
	return s, true
}

// leave takes the suspects of a partition out of the line.
func (q *suspects) leave(p *partition) (left []*delivery) {
	q.mu.Lock()
	defer q.mu.Unlock()
	var rest []suspect
	for _, s := range q.line {
		if s.p == p {
			left = append(left, s.d)
		} else {
			rest = append(rest, s)
		}
	}
	q.line = rest
	return left
}

// admitAlone is admit for a suspect.
func (p *partition) admitAlone(c *creator, d *delivery, now time.Time) {
	if p.w.suspects.enter(suspect{p, d}) {
		d.alone = true
		p.admit(c, d, now)
	}
}

// notAlone lets the next suspect go, because d is called no more.
func (p *partition) notAlone(d *delivery) {
	if !d.alone {
		return
	}
	d.alone = false
	p.goes(func() {
		for {
			s, ok := p.w.suspects.next()
			if !ok {
				return
			}
			if s.p.admitNext(s.d) {
				return
			}
		}
	})
}

// admitNext lets a suspect go whose turn it is, unless its partition was left meanwhile.
func (p *partition) admitNext(d *delivery) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.here[d.seq] != d {
		return false
	}
	if !p.active {
		p.w.reply(d.msg.Reply, nakPayload)
		delete(p.here, d.seq)
		return false
	}
	d.alone = true
	p.admit(p.creator(d.req.Creator), d, time.Now())
	return true
}

// mark writes down that d is about to be called, if it has to be known
// should the worker vanish: because calling it twice does harm, or because it
// may be what makes workers vanish.
func (w *Worker) mark(p *partition, d *delivery) error {
	if !d.op.NotIdempotent && !d.unexplained && d.record.Mark == nil {
		return nil
	}
	m := mark{Worker: w.cfg.Name, At: time.Now().UTC().Round(0), Calls: 1}
	switch {
	case d.record.Mark != nil:
		m.Calls += d.record.Mark.Calls
	case d.unexplained:
		m.Calls++ // the one that nobody had marked
	}
	before := d.record.Mark
	d.record.Mark = &m
	err := w.store(p, d, func(ctx context.Context) error {
		if err := failpoint.Hit(failpoint.Mark, d.req.ID); err != nil {
			return err
		}
		return w.ledger.put(ctx, d.req.ID, &d.record)
	})
	if err != nil {
		d.record.Mark = before
		return err
	}
	return failpoint.Hit(failpoint.Marked, d.req.ID)
}

// unmark takes the mark of a call away that has ended, or that never began. One that cannot be
// taken away does little harm.
func (w *Worker) unmark(d *delivery) {
	if d.record.Mark == nil {
		return
	}
	d.record.Mark = nil
	ctx, cancel := context.WithTimeout(w.settleCtx, w.cfg.StoreTimeout)
	defer cancel()
	var err error
	if len(d.record.Attempts) == 0 && d.record.Claim == nil {
		err = w.ledger.forget(ctx, d.req.ID, &d.record)
	} else {
		err = w.ledger.put(ctx, d.req.ID, &d.record)
	}
	if err != nil {
		w.line(w.log.Debug(), d).Err(err).Msg("its mark stays")
	}
}
