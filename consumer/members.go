package consumer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"github.com/headgate-io/headgate/internal/failpoint"
	"github.com/headgate-io/headgate/publisher"
)

// Keys of OWNERS.
const (
	memberWorker    = "worker."    // + the worker's name
	memberPartition = "partition." // + its number
)

const (
	// beatEvery is how often a worker says that it is alive, and renews its
	// leases.
	beatEvery = leaseTTL / 3

	// quiet is how long the workers have to stay the same before partitions are
	// handed over: several that start together are one change.
	quiet = 500 * time.Millisecond
)

// Member is a worker as it describes itself in OWNERS.
type Member struct {
	Worker   string    `json:"worker"`
	Host     string    `json:"host,omitempty"`
	PID      int       `json:"pid"`
	Since    time.Time `json:"since"`
	InFlight int       `json:"in_flight"`
}

// members mirrors OWNERS: who is alive, and who owns what.
type members struct {
	kv   jetstream.KeyValue
	log  zerolog.Logger
	self Member

	mu        sync.Mutex
	live      map[string]time.Time // by name: when they were heard of last
	owners    map[int]owner
	changed   time.Time // when live last did
	joined    time.Time // when this worker was last missing
	confirmed time.Time // when the heartbeat was sent that was last confirmed
	left      bool
	wake      chan struct{}
}

// owner is who has a partition, and when that was heard of last.
type owner struct {
	worker string
	heard  time.Time
}

// forgotten is the age at which what was heard counts no more, even if nobody
// said that it has expired: notices can get lost when servers fail. Whether
// a lease is free is the server's to say in any case.
const forgotten = leaseTTL + beatEvery

func newMembers(kv jetstream.KeyValue, name string, log zerolog.Logger) *members {
	host, _ := os.Hostname()
	return &members{
		kv: kv, log: log, self: Member{Worker: name, Host: host, PID: os.Getpid(), Since: time.Now().UTC().Truncate(time.Second)},
		live: map[string]time.Time{}, owners: map[int]owner{}, wake: make(chan struct{}, 1),
	}
}

// apply takes an entry of OWNERS, as it is or as it has become. An expired one
// comes as a purge.
func (m *members) apply(e jetstream.KeyValueEntry) {
	put := e.Operation() == jetstream.KeyValuePut
	m.mu.Lock()
	defer m.mu.Unlock()
	if name, ok := strings.CutPrefix(e.Key(), memberWorker); ok {
		name, err := publisher.DecodeToken(name)
		if err != nil || name == m.self.Worker {
			return
		}
		m.seen(name, put)
	} else if number, ok := strings.CutPrefix(e.Key(), memberPartition); ok {
		n, err := strconv.Atoi(number)
		if err != nil {
			return
		}
		delete(m.owners, n)
		var s storedLease
		if put && json.Unmarshal(e.Value(), &s) == nil {
			m.owners[n] = owner{s.Worker, time.Now()}
		} else {
			m.stir() // it is free
		}
	}
}

func (m *members) seen(name string, alive bool) {
	_, was := m.live[name]
	if alive {
		m.live[name] = time.Now()
	} else {
		delete(m.live, name)
	}
	if was != alive {
		m.changed = time.Now()
		m.stir()
	}
}

func (m *members) stir() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// count is the number of live workers, this one included.
func (m *members) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, there := m.live[m.self.Worker]; there {
		return len(m.live)
	}
	return len(m.live) + 1
}

// beat tells the others that this worker is alive.
func (m *members) beat(ctx context.Context, inFlight int) error {
	token, err := publisher.EncodeToken(m.self.Worker)
	if err != nil {
		return err
	}
	self := m.self
	self.InFlight = inFlight
	value, err := json.Marshal(self)
	if err != nil {
		return err
	}
	sent := time.Now()
	if _, err := m.kv.Put(ctx, memberWorker+token, value); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.left {
		return nil
	}
	if sent.Sub(m.confirmed) > leaseTTL {
		// New, or back after an outage in which everybody may have been missed.
		m.joined = time.Now()
	}
	m.confirmed = sent
	m.seen(self.Worker, true)
	return nil
}

// leave tells the others that this worker's partitions come free.
func (m *members) leave(ctx context.Context, limit time.Duration) {
	m.mu.Lock()
	m.left = true
	delete(m.live, m.self.Worker)
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if token, err := publisher.EncodeToken(m.self.Worker); err == nil {
		_ = m.kv.Delete(ctx, memberWorker+token)
	}
}

// plan says which partitions this worker ought to have, which of them are free to claim,
// and whether the workers have been the same for long enough to hand others over. When that
// is yet to come, it says when to ask again.
func (m *members) plan(now time.Time, partitions int) (mine map[int]bool, free map[int]bool, settled bool, again time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	mine, free = map[int]bool{}, map[int]bool{}
	if _, there := m.live[m.self.Worker]; m.left || !there {
		return mine, free, false, 0
	}
	names := make([]string, 0, len(m.live))
	for name, heard := range m.live {
		if now.Sub(heard) > forgotten && name != m.self.Worker {
			m.seen(name, false)
			continue
		}
		names = append(names, name)
	}
	for n, name := range assign(partitions, names) {
		if name == m.self.Worker {
			mine[n] = true
		}
	}
	if wait := m.changed.Add(quiet).Sub(now); wait > 0 && len(names) > 1 {
		return mine, free, false, wait
	}
	// After an outage the leases of all have lapsed. Whoever is back first
	// must not take everything: the others come within a heartbeat.
	if wait := m.joined.Add(beatEvery + quiet).Sub(now); wait > 0 && m.rejoined() {
		return mine, free, false, wait
	}
	for n := range mine {
		if o, owned := m.owners[n]; !owned || now.Sub(o.heard) > forgotten {
			free[n] = true
		}
	}
	return mine, free, true, 0
}

// rejoined reports whether this worker was missing after it had been there.
func (m *members) rejoined() bool { return m.joined.Sub(m.self.Since) > leaseTTL }

// Ownership is a live worker and the partitions that it has.
type Ownership struct {
	Member
	Partitions []int `json:"partitions"`
}

// Owners reads OWNERS: the live workers, by name, and who has what. Partitions of a worker
// that is not alive any more, until their leases expire, are listed under
// its name.
func Owners(ctx context.Context, kv jetstream.KeyValue) ([]Ownership, error) {
	watcher, err := kv.WatchAll(ctx, jetstream.IgnoreDeletes())
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", kv.Bucket(), err)
	}
	defer func() { _ = watcher.Stop() }()
	all := map[string]*Ownership{}
	of := func(name string) *Ownership {
		if all[name] == nil {
			all[name] = &Ownership{Member: Member{Worker: name}}
		}
		return all[name]
	}
	for {
		var e jetstream.KeyValueEntry
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("read %s: %w", kv.Bucket(), ctx.Err())
		case e = <-watcher.Updates():
		}
		if e == nil {
			break
		}
		if number, ok := strings.CutPrefix(e.Key(), memberPartition); ok {
			var s storedLease
			if n, err := strconv.Atoi(number); err == nil && json.Unmarshal(e.Value(), &s) == nil {
				o := of(s.Worker)
				o.Partitions = append(o.Partitions, n)
			}
		} else if strings.HasPrefix(e.Key(), memberWorker) {
			var m Member
			if json.Unmarshal(e.Value(), &m) == nil {
				of(m.Worker).Member = m
			}
		}
	}
	owners := make([]Ownership, 0, len(all))
	for _, name := range slices.Sorted(maps.Keys(all)) {
		slices.Sort(all[name].Partitions)
		owners = append(owners, *all[name])
	}
	return owners, nil
}

// assign says who ought to own which partition: by rendezvous hashing, so that few
// move when workers come or go, and balanced, so that no two workers differ by
// more than one.
func assign(partitions int, workers []string) []string {
	owners := make([]string, partitions)
	if len(workers) == 0 {
		return owners
	}
	workers = slices.Sorted(slices.Values(workers))
	least, more := partitions/len(workers), partitions%len(workers)
	load := make(map[string]int, len(workers))
	for n := range partitions {
		var best string
		var most uint64
		for _, name := range workers {
			// more of them may have one above the least.
			if load[name] > least || load[name] == least && more == 0 {
				continue
			}
			if score := rendezvous(n, name); best == "" || score > most {
				best, most = name, score
			}
		}
		owners[n] = best
		if load[best]++; load[best] > least {
			more--
		}
	}
	return owners
}

func rendezvous(partition int, worker string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(worker))
	x := h.Sum64() ^ uint64(partition)*0x9e3779b97f4a7c15
	// FNV alone leaves similar names similar.
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}

// own keeps this worker's share of the partitions until ctx ends: it says that it is
// alive, renews what it has, claims what is free and its due, and hands over
// what is another's. After stop it only renews.
func (w *Worker) own(ctx context.Context, stop <-chan struct{}) {
	beat := time.NewTicker(beatEvery)
	defer beat.Stop()
	again := time.NewTimer(0)
	defer again.Stop()
	w.beat(ctx)
	for {
		select {
		case <-stop:
			stop = nil
		case <-ctx.Done():
			return
		case <-beat.C:
			w.beat(ctx)
			w.renew(ctx)
			w.balance(ctx, again)
			w.saveHolds(ctx)
		case <-w.members.wake:
			w.balance(ctx, again)
		case <-again.C:
			w.balance(ctx, again)
		}
	}
}

func (w *Worker) beat(ctx context.Context) {
	w.members.mu.Lock()
	left := w.members.left
	w.members.mu.Unlock()
	if left {
		return
	}
	short, cancel := context.WithTimeout(ctx, beatEvery)
	defer cancel()
	if err := w.members.beat(short, w.gates.InFlight()); err != nil && ctx.Err() == nil {
		w.log.Warn().Err(err).Msg("the other workers are not told that this one is alive; trying again")
	}
}

func (w *Worker) saveHolds(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, beatEvery/3)
	defer cancel()
	w.holds.save(ctx, time.Now())
}

// each runs f for partitions, some at once. It returns those of which f failed, and why
// one of them did.
func (w *Worker) each(f func(*partition) error) (failed []int, why error) {
	var (
		g  errgroup.Group
		mu sync.Mutex
	)
	g.SetLimit(16)
	for _, p := range w.partitions {
		g.Go(func() error {
			err := f(p)
			if err != nil {
				mu.Lock()
				failed = append(failed, p.number)
				mu.Unlock()
			}
			return err
		})
	}
	why = g.Wait()
	slices.Sort(failed)
	return failed, why
}

func (w *Worker) renew(ctx context.Context) {
	short, cancel := context.WithTimeout(ctx, beatEvery)
	defer cancel()
	failed, err := w.each(func(p *partition) error {
		err := failpoint.Hit(failpoint.Renew, "")
		if err == nil {
			err = p.lease.renew(short)
		}
		if errors.Is(err, errTaken) {
			w.log.Error().Int("partition", p.number).Msg("lost to another worker; its messages are left to it")
			p.leave()
			return nil
		}
		return err
	})
	if err != nil && ctx.Err() == nil {
		w.log.Warn().Err(err).Ints("partitions", failed).Msg("not renewed; no call is started once a lease is over; trying again")
	}
}

// balance claims what is free and this worker's due, and begins to hand over
// what is not.
func (w *Worker) balance(ctx context.Context, again *time.Timer) {
	mine, free, settled, wait := w.members.plan(time.Now(), len(w.partitions))
	if wait > 0 {
		again.Reset(wait)
	}
	if !settled {
		return
	}
	// A claim that is under way when the worker stops is waited for: it has to be released.
	short, cancel := context.WithTimeout(context.WithoutCancel(ctx), beatEvery)
	defer cancel()
	failed, err := w.each(func(p *partition) error {
		switch held := p.lease.held(); {
		case held && !mine[p.number]:
			w.handOver(p)
		case !held && free[p.number] && p.flying.Load() == 0: // none of an earlier time
			return w.claim(short, p)
		}
		return nil
	})
	if err != nil && ctx.Err() == nil {
		w.log.Warn().Err(err).Ints("partitions", failed).Msg("cannot claim; trying again")
	}
}

func (w *Worker) claim(ctx context.Context, p *partition) error {
	owners := w.cfg.Topology.Namespace.Stream(publisher.Owners)
	before, err := w.ledger.last(ctx, "KV_"+owners, "$KV."+owners+"."+p.lease.key)
	if err == nil {
		err = p.lease.claim(ctx, w.cfg.Name)
	}
	switch {
	case errors.Is(err, errTaken):
		return nil
	case err != nil:
		return err
	}
	// Who gives a partition up deletes its lease; a lease that expires is purged.
	crashed := before != nil && before.Header.Get("KV-Operation") != "DEL"
	hadOwner := before != nil
	if !hadOwner && w.delivered(ctx, p) {
		// A server that was restarted forgets what expired meanwhile, mark and all.
		hadOwner, crashed = true, true
	}
	if err := p.enter(ctx, hadOwner, crashed); err != nil {
		if errors.Is(err, errStopping) {
			return nil // who leaves it releases it
		}
		p.leave()
		_ = p.lease.release(ctx)
		return fmt.Errorf("take messages: %w", err)
	}
	w.log.Info().Int("partition", p.number).Bool("had_owner", hadOwner).Bool("crashed", crashed).Msg("owned")
	return nil
}

// delivered reports whether somebody has had messages of the partition lately, or may
// have had.
func (w *Worker) delivered(ctx context.Context, p *partition) bool {
	c, err := w.stream.Consumer(ctx, publisher.ConsumerName(p.number))
	if err != nil {
		return true
	}
	d := c.CachedInfo().Delivered
	return d.Consumer > 0 && (d.Last == nil || time.Since(*d.Last) < publisher.OwnerMarker)
}

// handOver gives a partition up: no more messages, the calls in flight end, and
// only then may another worker begin.
func (w *Worker) handOver(p *partition) {
	if !p.leave() {
		return // on its way already
	}
	w.log.Info().Int("partition", p.number).Msg("handing over")
	w.calls.Add(1)
	go func() {
		defer w.calls.Done()
		p.calls.Wait()
		for p.lease.held() && w.settleCtx.Err() == nil {
			ctx, cancel := context.WithTimeout(w.settleCtx, w.cfg.StoreTimeout)
			// What was given back must be the server's before the next one asks.
			err := errors.Join(w.nc.FlushWithContext(ctx), p.lease.release(ctx))
			cancel()
			if err != nil {
				w.log.Warn().Err(err).Int("partition", p.number).Msg("not released; the lease expires by itself")
			}
		}
	}()
}
