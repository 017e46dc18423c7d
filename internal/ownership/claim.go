package ownership

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/headgate-io/headgate/publisher"
)

// balances claims and hands over until entering ends.
func (k *Keeper) balances(ctx, entering context.Context) {
	again := time.NewTimer(0)
	defer again.Stop()
	for {
		select {
		case <-entering.Done():
			return
		case <-k.members.wake:
		case <-again.C:
		}
		if entering.Err() != nil {
			return
		}
		if next := k.balance(ctx, entering); next > 0 {
			again.Reset(next)
		}
	}
}

// balance claims free partitions that are this worker's due, begins to hand over those that are not,
// and enters the claimed ones. It returns when it has to be called again at the latest, 0: with the next beat.
func (k *Keeper) balance(ctx, entering context.Context) time.Duration {
	now := time.Now()
	plan := k.members.plan(now)
	var claim []*slot
	for _, s := range k.slots {
		claimed := s.lease.Claimed()
		switch {
		case s.leaving.Load():
		case claimed && !plan.mine[s.number] && plan.move && now.After(s.kept):
			k.log.Info().Int("partition", s.number).Msg("handing over")
			k.handOver(ctx, s)
		case claimed:
			k.tell(s)
		case plan.claim[s.number] && s.partition.Idle():
			s.kept = time.Time{}
			if !plan.mine[s.number] {
				s.kept = now.Add(keepFor)
			}
			claim = append(claim, s)
		}
	}
	k.claimAll(ctx, claim)
	next := plan.again
	if retry := k.enterAll(ctx, entering); retry > 0 && (next == 0 || retry < next) {
		next = retry
	}
	return next
}

func (k *Keeper) claimAll(ctx context.Context, claim []*slot) {
	// A claim that is under way when the worker stops is waited for: it has to be released.
	short, cancel := context.WithTimeout(ctx, k.beatEvery())
	defer cancel()
	failed, err := k.each(claim, func(s *slot) error { return k.claim(short, s) })
	k.mu.Lock()
	if k.claiming == nil && err != nil {
		k.since = time.Now()
	}
	k.claiming = err
	k.mu.Unlock()
	if err != nil && !ended(ctx) {
		k.log.Warn().Err(err).Ints("partitions", failed).Msg("cannot claim; trying again")
	}
}

func (k *Keeper) claim(ctx context.Context, s *slot) error {
	found, err := s.lease.claim(ctx, func(last *message) error { return k.may(ctx, s, last) })
	var taken *takenError
	switch {
	case errors.As(err, &taken):
		k.members.owned(s.number, taken.worker)
		return nil
	case errors.Is(err, errNotYet):
		return nil
	case err != nil:
		return err
	}
	s.mu.Lock()
	s.before = before(found, s.delivered, time.Now())
	s.mu.Unlock()
	s.retry, s.backoff = time.Time{}, 0
	return nil
}

// may decides whether a partition whose key has no lease may be claimed: the worker that wrote a
// lease that is not there any more may still believe in it.
func (k *Keeper) may(ctx context.Context, s *slot, last *message) error {
	if last != nil && last.marks() {
		return nil
	}
	s.delivered = k.cfg.Delivered(ctx, s.number)
	k.mu.Lock()
	bucket := k.bucket
	k.mu.Unlock()
	young := bucket.created.IsZero() || time.Since(bucket.born) < k.cfg.TTL
	switch {
	case last == nil && young && s.delivered:
		k.members.opens(bucket.born.Add(k.cfg.TTL))
		return errNotYet
	case last != nil && k.members.hidden(s.number) && s.delivered:
		return errNotYet
	}
	return nil
}

// before tells from the last message of a partition's key how its owner went.
func before(last *message, delivered bool, now time.Time) Before {
	switch {
	case last == nil:
		// What expired some time ago has left no trace, and such a server may have been restarted.
		return Before{Owned: delivered, Crashed: delivered}
	case last.released():
		return Before{
			Owned:   now.Sub(last.time) < publisher.OwnerMarker,
			Crashed: last.header.Get(headerCrashed) != "",
		}
	}
	return Before{Owned: true, Crashed: true}
}

// enterAll enters the claimed partitions that are not entered yet. It returns when to try again.
func (k *Keeper) enterAll(ctx, entering context.Context) (again time.Duration) {
	now := time.Now()
	var enter []*slot
	for _, s := range k.slots {
		if !s.lease.Claimed() || s.entered.Load() || s.leaving.Load() {
			continue
		}
		if left := s.retry.Sub(now); left > 0 {
			again = soonest(again, left)
			continue
		}
		enter = append(enter, s)
	}
	if len(enter) == 0 {
		return again
	}
	short, cancel := context.WithTimeout(entering, k.cfg.StoreTimeout)
	defer cancel()
	err := k.cfg.BeforeEnter(short)
	_, _ = k.each(enter, func(s *slot) error {
		if err != nil {
			k.refused(entering, s, err)
			return nil
		}
		if err := k.enter(short, s); err != nil {
			k.refused(entering, s, err)
		}
		return nil
	})
	for _, s := range enter {
		if left := s.retry.Sub(now); left > 0 {
			again = soonest(again, left)
		}
	}
	return again
}

func soonest(a, b time.Duration) time.Duration {
	if a == 0 {
		return b
	}
	return min(a, b)
}

func (k *Keeper) enter(ctx context.Context, s *slot) error {
	if err := k.readCalling(ctx, s.number); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.lease.Claimed() || s.leaving.Load() {
		return nil
	}
	before := s.before
	before.Calling = k.members.stillCalled(s.number)
	s.told = before.Calling
	if err := s.partition.Enter(ctx, before); err != nil {
		s.partition.Leave()
		return err
	}
	s.entered.Store(true)
	s.why.Store(nil)
	s.retry, s.backoff = time.Time{}, 0
	e := k.log.Info().Int("partition", s.number).Bool("had_owner", before.Owned).Bool("crashed", before.Crashed)
	if len(before.Calling) > 0 {
		e = e.Int("still_called", len(before.Calling))
	}
	e.Msg("owned")
	return nil
}

// refused notes that a partition cannot be entered. It stays this worker's, which tries again: no
// other worker could do it better, and how its owner before went must not be forgotten.
func (k *Keeper) refused(entering context.Context, s *slot, err error) {
	s.backoff = min(max(2*s.backoff, retryLeast), retryMost)
	s.retry = time.Now().Add(s.backoff)
	if entering.Err() != nil {
		return
	}
	why := err.Error()
	if old := s.why.Swap(&why); old == nil || *old != why {
		k.log.Error().Err(err).Int("partition", s.number).Msg("owned, but its messages cannot be taken; trying again")
	}
}

// tell passes on which creators former owners are still calling, if this has changed.
func (k *Keeper) tell(s *slot) {
	if !s.entered.Load() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := k.members.stillCalled(s.number); s.entered.Load() && !slices.Equal(now, s.told) {
		s.told = now
		s.partition.StillCalled(now)
	}
}

// readCalling reads which creators former owners of a partition are still calling.
func (k *Keeper) readCalling(ctx context.Context, n int) error {
	var all []*message
	err := k.store.each(ctx, fmt.Sprintf("%s%d.*", keyCalling, n), func(m *message) { all = append(all, m) })
	if err == nil {
		k.members.read(n, all)
	}
	return err
}
