package ownership

import (
	"context"
	"strconv"
	"time"

	"github.com/headgate-io/headgate/publisher"
)

// handOver gives a partition up: it takes no more messages, and its lease is released when its
// calls are over, or hang.
func (k *Keeper) handOver(ctx context.Context, s *slot) { k.giveUp(ctx, s, true) }

// lose leaves a partition whose lease is gone. The next owner has to know of calls in flight as well.
func (k *Keeper) lose(ctx context.Context, s *slot) { k.giveUp(ctx, s, false) }

// giveUp does it in a goroutine that Run waits for.
func (k *Keeper) giveUp(ctx context.Context, s *slot, release bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.over || !s.leaving.CompareAndSwap(false, true) {
		return // on its way already
	}
	k.handing.Go(func() {
		defer k.members.stir()
		defer s.leaving.Store(false)
		k.leavePartition(ctx, s, release)
	})
}

func (k *Keeper) leavePartition(ctx context.Context, s *slot, release bool) {
	s.mu.Lock()
	s.partition.Leave()
	crashed := s.before.Crashed && !s.entered.Swap(false)
	s.entered.Store(false)
	s.why.Store(nil)
	s.mu.Unlock()

	over := make(chan struct{})
	go func() {
		defer close(over)
		s.partition.Wait()
	}()
	defer func() { <-over }()
	if release {
		await(ctx, over, handOverWait)
	}
	a := &announcer{k: k, s: s}
	// First no call starts any more, then those in flight are told, then another worker may begin.
	s.lease.close()
	a.untilStored(ctx, over)
	if release {
		k.release(ctx, s, crashed)
	}
	a.untilOver(ctx, over)
}

// await returns after d, or when done is closed or ctx ends.
func await(ctx context.Context, done <-chan struct{}, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
	case <-ctx.Done():
	}
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// release releases a lease, again and again for some time.
func (k *Keeper) release(ctx context.Context, s *slot, crashed bool) {
	for began := time.Now(); s.lease.Claimed() && ctx.Err() == nil; {
		short, cancel := context.WithTimeout(ctx, k.cfg.StoreTimeout)
		// What was given back must be the server's before the next owner asks.
		err := k.cfg.NC.FlushWithContext(short)
		if err == nil {
			err = s.lease.release(short, crashed)
		}
		cancel()
		if err == nil {
			return
		}
		if time.Since(began) > k.cfg.StoreTimeout {
			k.log.Warn().Err(err).Int("partition", s.number).Msg("not released; the lease expires by itself")
			break
		}
		await(ctx, nil, k.beatEvery()/4)
	}
	s.lease.abandon()
}

// announcer tells the next owners of a partition which creators this worker is still calling.
type announcer struct {
	k      *Keeper
	s      *slot
	stored bool
}

// untilStored tries until it is stored which creators are called, or none is.
func (a *announcer) untilStored(ctx context.Context, over <-chan struct{}) {
	for told := false; !closed(over) && ctx.Err() == nil; told = true {
		err := a.store(ctx)
		if err == nil {
			return
		}
		if !told {
			a.k.log.Warn().Err(err).Int("partition", a.s.number).Msg("the next owner is not told which creators are still being called; trying again")
		}
		await(ctx, over, a.k.beatEvery()/4)
	}
}

// untilOver repeats it until the calls are over.
func (a *announcer) untilOver(ctx context.Context, over <-chan struct{}) {
	for !closed(over) && ctx.Err() == nil {
		await(ctx, over, a.k.beatEvery())
		if !closed(over) {
			_ = a.store(ctx) // the next beat tries again
		}
	}
	if err := a.purge(ctx); err != nil {
		a.k.log.Warn().Err(err).Int("partition", a.s.number).Msg("the next owner is not told that no creator is being called any more; it notices by itself")
	}
}

// store writes which creators are called now. If there are none, it takes an earlier value away.
func (a *announcer) store(ctx context.Context) error {
	creators := a.s.partition.Calling()
	if len(creators) == 0 {
		return a.purge(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, a.k.beatEvery())
	defer cancel()
	a.stored = true // perhaps, even after an error
	_, err := a.k.cfg.KV.Put(ctx, a.key(), encodeCalling(a.k.cfg.Name, creators))
	return err
}

func (a *announcer) purge(ctx context.Context) error {
	if !a.stored {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, a.k.cfg.StoreTimeout)
	defer cancel()
	if err := a.k.cfg.KV.Purge(ctx, a.key()); err != nil {
		return err
	}
	a.stored = false
	return nil
}

func (a *announcer) key() string { return callingKey(a.s.number, a.k.cfg.Name) }

// callingKey is the key under which a worker says which creators of a partition it is still calling.
func callingKey(n int, worker string) string {
	token, _ := publisher.EncodeToken(worker) // New has looked at it
	return keyCalling + strconv.Itoa(n) + "." + token
}
