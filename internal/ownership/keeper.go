package ownership

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/headgate-io/headgate/publisher"
)

// slot is a partition and this worker's relation to it.
type slot struct {
	number  int
	lease   *Lease
	entered atomic.Bool            // the partition takes messages
	leaving atomic.Bool            // it is being given up, or calls of its last time here are in flight
	why     atomic.Pointer[string] // why it cannot be entered; nil: it can

	mu        turn // one at a time enters, leaves or is told
	partition Partition
	before    Before
	told      []string // the creators that former owners are calling

	// Of the goroutine that balances.
	delivered bool
	kept      time.Time // until when it is kept although another worker ought to have it
	retry     time.Time // when it is entered again
	backoff   time.Duration
}

func (s *slot) trouble() string {
	if why := s.why.Load(); why != nil && s.lease.Claimed() {
		return *why
	}
	return ""
}

// Run keeps this worker's share of the partitions until stop: it says that it is alive, renews what
// it has, claims free partitions that are its due, and hands over those of other workers. Then each
// partition is left, and released when its own calls are over, and Run returns.
//
// When ctx ends, nothing is renewed or released any more. The caller has to end the
// calls in flight then, because Run waits for every Partition.Wait.
func (k *Keeper) Run(ctx context.Context, stop <-chan struct{}, all []Partition) error {
	if len(all) != len(k.slots) {
		return fmt.Errorf("there are %d partitions, not %d", len(k.slots), len(all))
	}
	for _, p := range all {
		n := p.Number()
		if n < 0 || n >= len(k.slots) || k.slots[n].partition != nil {
			return fmt.Errorf("a partition has the number %d, which is not free among %d", n, len(k.slots))
		}
		k.slots[n].partition = p
	}
	ctx, end := context.WithCancel(ctx)
	defer end()
	// Entering is given up at once when the worker stops.
	entering, stopEntering := context.WithCancel(ctx)
	defer stopEntering()
	var keepers errgroup.Group
	keepers.Go(func() error {
		select {
		case <-stop:
			k.stopping.Store(true)
			stopEntering()
		case <-ctx.Done():
		}
		return nil
	})
	ready := make(chan struct{})
	keepers.Go(func() error { k.follow(ctx, sync.OnceFunc(func() { close(ready) })); return nil })
	select {
	case <-ready: // before its first claim a worker knows all others
		k.lookAtBucket(ctx)
		keepers.Go(func() error { k.beats(ctx); return nil })
		k.balances(ctx, entering)
	case <-entering.Done():
	}
	k.leave(ctx)
	for _, s := range k.slots {
		if s.lease.Claimed() || s.entered.Load() {
			k.handOver(ctx, s)
		}
	}
	k.mu.Lock()
	k.over = true
	k.mu.Unlock()
	k.handing.Wait()
	end()
	_ = keepers.Wait()
	return nil
}

// leave tells the others that this worker's partitions come free.
func (k *Keeper) leave(ctx context.Context) {
	if !k.members.leave() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, k.cfg.StoreTimeout)
	defer cancel()
	k.beating.Lock() // a heartbeat under way must not come after this
	defer k.beating.Unlock()
	if token, err := publisher.EncodeToken(k.cfg.Name); err == nil && !k.members.lastConfirmed().IsZero() {
		if err := k.cfg.KV.Purge(ctx, keyWorker+token); err != nil {
			k.log.Warn().Err(err).Msg("the other workers are not told that this one stops; they notice it by themselves")
		}
	}
}

// follow applies all keys of OWNERS and then each change, again and again
// should the watch end. It calls ready when all that is there has been applied.
func (k *Keeper) follow(ctx context.Context, ready func()) {
	for ctx.Err() == nil {
		err := k.watch(ctx, ready)
		switch {
		case ctx.Err() != nil:
		case errors.Is(err, errRewatch):
			if k.restarted.Swap(false) {
				k.members.restarted()
			}
		case err != nil:
			k.log.Error().Err(err).Msg("the other workers are not followed; trying again")
			wait(ctx, time.Second)
		}
	}
}

// errRewatch means that the watch is not to be relied on: its bucket was made again, or the server
// that had it may be gone, which a watch notices late.
var errRewatch = errors.New("watch from the start")

func (k *Keeper) watchAgain() {
	select {
	case k.rewatch <- struct{}{}:
	default:
	}
}

func (k *Keeper) watch(ctx context.Context, ready func()) error {
	k.members.follows(false)
	watcher, err := k.cfg.KV.WatchAll(ctx)
	if err != nil {
		return fmt.Errorf("watch %s: %w", k.cfg.KV.Bucket(), err)
	}
	defer func() { _ = watcher.Stop() }()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-k.rewatch:
			return errRewatch
		case entry, open := <-watcher.Updates():
			switch {
			case !open:
				return fmt.Errorf("watch %s: the watcher ended", k.cfg.KV.Bucket())
			case entry == nil:
				k.members.follows(true)
				ready()
			default:
				k.members.apply(entry)
			}
		}
	}
}

// beats says again and again that the worker is alive, renews what it has, and looks whether
// the bucket is still the same.
func (k *Keeper) beats(ctx context.Context) {
	beat := time.NewTicker(k.beatEvery())
	defer beat.Stop()
	reconnected := k.cfg.NC.StatusChanged(nats.CONNECTED)
	defer k.cfg.NC.RemoveStatusListener(reconnected)
	k.beat(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case <-beat.C:
			k.beat(ctx)
		case <-reconnected: // the leases may be about to end
			k.watchAgain()
			k.beat(ctx)
		case <-k.members.check:
			look := k.members.doubted()
			k.renew(ctx, func(s *slot) bool { return look[s.number] })
		}
	}
}

// beat does all of it at once: what takes long must not delay a renewal.
func (k *Keeper) beat(ctx context.Context) {
	short, cancel := context.WithTimeout(ctx, k.beatEvery())
	defer cancel()
	var g errgroup.Group
	g.Go(func() error { k.heartbeat(short); return nil })
	g.Go(func() error { k.renew(ctx, func(*slot) bool { return true }); return nil })
	g.Go(func() error { k.lookAtBucket(ctx); return nil })
	_ = g.Wait()
	for _, n := range k.members.stale() {
		_ = k.readCalling(short, n) // what cannot be read counts on
	}
	k.members.stir()
}

func (k *Keeper) heartbeat(ctx context.Context) {
	k.beating.Lock()
	defer k.beating.Unlock()
	if k.stopping.Load() {
		return
	}
	self := k.members.self
	self.InFlight = k.cfg.InFlight()
	token, err := publisher.EncodeToken(self.Worker)
	if err != nil {
		return // New has looked at it
	}
	value, _ := json.Marshal(self)
	sent := time.Now()
	if _, err := k.cfg.KV.Put(ctx, keyWorker+token, value); err != nil {
		if !ended(ctx) {
			k.log.Warn().Err(err).Msg("the other workers are not told that this one is alive; trying again")
		}
		return
	}
	k.members.beaten(sent)
}

// ended reports that ctx was cancelled, and has not just run out of time.
func ended(ctx context.Context) bool { return errors.Is(ctx.Err(), context.Canceled) }

// lookAtBucket notices a bucket that was deleted and made again. A watch does not: it goes on
// from its last sequence, which the new bucket may reach in minutes.
func (k *Keeper) lookAtBucket(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, k.beatEvery())
	defer cancel()
	now, err := k.store.state(ctx)
	if err != nil {
		if !ended(ctx) {
			k.log.Warn().Err(err).Msg("cannot look at the bucket of owners; trying again")
		}
		return
	}
	k.mu.Lock()
	known := k.bucket
	k.bucket = now
	k.mu.Unlock()
	if known.created.IsZero() || known.created.Equal(now.created) && now.last >= known.last {
		return
	}
	k.restarted.Store(true)
	k.log.Warn().Time("created", now.created).Msg("the bucket of owners was made again or restored; its owners are read from the start")
	k.watchAgain()
}

// concurrency is how many slots are worked on at once: as many leases as a worker may have
// must be renewed in much less than a beat.
func (k *Keeper) concurrency() int { return min(max(16, len(k.slots)/16), 64) }

// each runs f for slots, some at once. It returns the partitions of which f failed, and why
// one of them did.
func (k *Keeper) each(slots []*slot, f func(*slot) error) (failed []int, why error) {
	var (
		g  errgroup.Group
		mu sync.Mutex
	)
	g.SetLimit(k.concurrency())
	for _, s := range slots {
		g.Go(func() error {
			err := f(s)
			if err != nil {
				mu.Lock()
				failed = append(failed, s.number)
				mu.Unlock()
			}
			return err
		})
	}
	why = g.Wait()
	slices.Sort(failed)
	return failed, why
}

// renew renews the claimed leases among those that are asked for.
func (k *Keeper) renew(ctx context.Context, asked func(*slot) bool) {
	var claimed []*slot
	for _, s := range k.slots {
		if asked(s) && s.lease.Claimed() {
			claimed = append(claimed, s)
		}
	}
	short, cancel := context.WithTimeout(ctx, k.beatEvery())
	defer cancel()
	failed, err := k.each(claimed, func(s *slot) error {
		resumed, err := s.lease.renew(short)
		return k.renewed(ctx, s, resumed, err)
	})
	if err != nil && !ended(ctx) {
		k.log.Warn().Err(err).Ints("partitions", failed).Msg("not renewed; no call is started once a lease is over; trying again")
	}
}

// renewed says how a renewal went, and leaves a partition whose lease is gone.
func (k *Keeper) renewed(ctx context.Context, s *slot, resumed bool, err error) error {
	var taken *takenError
	switch {
	case errors.As(err, &taken):
		says := "lost to another worker; its messages are left to it"
		if !k.members.isLive(taken.worker) {
			says = "its lease is in the name of a worker that has not been heard of; its messages are left to that one until the lease expires"
		}
		k.log.Error().Int("partition", s.number).Str("owner", taken.worker).Msg(says)
		k.members.owned(s.number, taken.worker)
		k.lose(ctx, s)
		return nil
	case errors.Is(err, errLapsed):
		k.log.Warn().Int("partition", s.number).Msg("its lease has lapsed, and another worker may have had it since; it is left, and claimed again if it is free")
		k.lose(ctx, s)
		return nil
	case err == nil && resumed:
		k.log.Warn().Int("partition", s.number).Msg("its lease had lapsed; no other worker has had it, and it is this worker's again")
	}
	return err
}

func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
