// Package ownership decides which worker calls the creators of which partition.
//
// A worker says in the bucket OWNERS that it is alive, and owns a partition as long
// as it has the partition's lease. The lease ends by the worker's own clock, counted
// from before its last confirmed renewal was sent, so a worker that cannot renew
// stops calling before another one can claim. Two workers never call the creators of
// one partition at once, with one exception that both know of: a partition is handed over
// without waiting for a call that hangs, and the former owner names the creators that it
// is still calling. The next owner leaves these creators alone until their calls are over.
//
// The keys of OWNERS, which forgets each of them unless it is written again:
//
//	worker.<worker>          a Member: the worker is alive
//	partition.<n>            the lease: which worker owns the partition
//	calling.<n>.<worker>     creators that a former owner is still calling
//
// What the last message of partition.<n> looks like tells how its owner went. All of
// this was measured on a server 2.15.2:
//
//	a value                            the lease is valid as long as it stands
//	KV-Operation: PURGE, Nats-TTL: never
//	                                   released in good order. It stays until the next
//	                                   claim. Without the TTL it would go with the bucket's
//	                                   own after 10 s, marked or not
//	Nats-Marker-Reason: MaxAge         expired. The server removes this mark, too, after
//	                                   the bucket's TTL, whatever its marker TTL is
//	nothing                            never owned, or expired some time ago
//
// The rights to write OWNERS are the trust boundary: a worker with them can take any
// partition. What other programs write there by accident is reported and not believed.
package ownership

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/publisher"
)

// Partition takes the messages of one partition while this worker owns it. The Keeper
// calls Enter and Leave one after the other, never at once.
type Partition interface {
	// Number is the partition's, from 0.
	Number() int
	// Enter starts to take messages. After an error Leave is called.
	Enter(ctx context.Context, before Before) error
	// Leave takes no more messages and starts no more calls. It reports whether there
	// was something to leave.
	Leave() bool
	// Idle reports that no call of an earlier time is in flight.
	Idle() bool
	// Wait returns when the last call has ended and its request is settled.
	Wait()
	// Calling returns the creators with calls in flight. A creator has to be among them
	// from before the lease is asked for permission until the call has ended.
	Calling() []string
	// StillCalled names the creators that former owners are still calling, all of them each
	// time. They must not be called.
	StillCalled(creators []string)
}

// Before tells about a partition's time before this worker owned it.
type Before struct {
	Owned   bool     // it had an owner lately, whose limiters may have used up their bursts
	Crashed bool     // this owner did not give it up in good order
	Calling []string // creators that former owners are still calling
}

// Config is a Keeper's. What has no default must be given.
type Config struct {
	Name       string // of this worker; no other process may have it
	Partitions int
	NC         *nats.Conn
	JS         jetstream.JetStream
	KV         jetstream.KeyValue // OWNERS
	Log        zerolog.Logger

	// InFlight is the number of calls that the worker's heartbeat tells; nil: none.
	InFlight func() int
	// Delivered reports whether the partition's messages have been delivered lately, or may have
	// been: it is asked if OWNERS knows nothing about the partition. nil: they may have been.
	Delivered func(ctx context.Context, partition int) bool
	// BeforeEnter is called once for all partitions that are entered together, after they are
	// claimed. If it fails, they are tried again later. nil: there is nothing to do.
	BeforeEnter func(ctx context.Context) error
	// StoreTimeout bounds one attempt to give something up; default 5 s.
	StoreTimeout time.Duration
	// TTL is the age at which OWNERS forgets a key; default publisher.OwnerTTL.
	TTL time.Duration
}

const (
	// quiet is how long the workers have to stay the same before partitions move:
	// several workers that start together are one change.
	quiet = 500 * time.Millisecond

	// patience is how long a partition may be free because the workers keep changing,
	// or because the one that should have it does not claim it.
	patience = 5 * time.Second

	// keepFor is how long a partition is kept that was claimed out of turn.
	keepFor = time.Minute

	// handOverWait is how long a hand-over waits for calls in flight.
	handOverWait = 2 * time.Second

	// retryLeast and retryMost bound the time between attempts to enter a partition.
	retryLeast, retryMost = time.Second, 15 * time.Second
)

// Keeper keeps this worker's share of the partitions. It is made by New and runs once.
type Keeper struct {
	cfg     Config
	log     zerolog.Logger
	store   *store
	members *members
	foreign *foreign
	slots   []*slot

	handing   sync.WaitGroup // hand-overs under way
	stopping  atomic.Bool
	rewatch   chan struct{} // watch the bucket from the start
	restarted atomic.Bool   // the members have to be told that the bucket was made again

	beating turn // held while a heartbeat is under way

	mu       sync.Mutex
	over     bool // all has been given up
	bucket   bucketState
	claiming error     // why claims fail
	since    time.Time // since when
}

// New returns a Keeper that has claimed nothing yet.
func New(cfg Config) (*Keeper, error) {
	if cfg.Partitions < 1 {
		return nil, errors.New("a worker needs at least one partition")
	}
	if _, err := publisher.EncodeToken(cfg.Name); err != nil {
		return nil, fmt.Errorf("the worker's name: %w", err)
	}
	if cfg.StoreTimeout == 0 {
		cfg.StoreTimeout = 5 * time.Second
	}
	if cfg.TTL == 0 {
		cfg.TTL = publisher.OwnerTTL
	}
	if cfg.InFlight == nil {
		cfg.InFlight = func() int { return 0 }
	}
	if cfg.Delivered == nil {
		cfg.Delivered = func(context.Context, int) bool { return true }
	}
	if cfg.BeforeEnter == nil {
		cfg.BeforeEnter = func(context.Context) error { return nil }
	}
	k := &Keeper{cfg: cfg, log: cfg.Log, beating: newTurn(), rewatch: make(chan struct{}, 1)}
	k.store = newStore(cfg.NC, cfg.JS, cfg.KV)
	k.foreign = &foreign{log: cfg.Log, told: map[string]time.Time{}}
	k.members = newMembers(cfg.Name, cfg.Partitions, cfg.TTL, k.foreign)
	for n := range cfg.Partitions {
		k.slots = append(k.slots, &slot{number: n, mu: newTurn(), lease: newLease(k.store, cfg.Name, n, cfg.TTL)})
	}
	return k, nil
}

// Lease returns the lease of a partition, also before it is claimed.
func (k *Keeper) Lease(n int) *Lease { return k.slots[n].lease }

// Alive reports whether a worker has been heard of lately.
func (k *Keeper) Alive(worker string) bool { return k.members.alive(worker) }

// Members is the number of live workers, this one included.
func (k *Keeper) Members() int { return k.members.count() }

// beatEvery is how often a worker says that it is alive, and renews its leases.
func (k *Keeper) beatEvery() time.Duration { return k.cfg.TTL / 3 }

// Ready returns an error that says why the worker does not own what it should, nil if it does.
func (k *Keeper) Ready() error {
	if k.stopping.Load() {
		return errors.New("stopping")
	}
	if !k.cfg.NC.IsConnected() {
		return errors.New("not connected to NATS")
	}
	now := time.Now()
	if now.Sub(k.members.lastConfirmed()) > k.cfg.TTL {
		return errors.New("its leases have not been renewed lately")
	}
	for _, s := range k.slots {
		if s.lease.Claimed() && !s.lease.Valid(now) && !s.leaving.Load() {
			return fmt.Errorf("its leases have not been renewed lately: that of partition %d is over", s.number)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.claiming != nil && now.Sub(k.since) > k.cfg.TTL {
		return fmt.Errorf("it cannot claim partitions: %w", k.claiming)
	}
	return nil
}

// Troubles says why partitions that this worker owns cannot be entered, by number.
func (k *Keeper) Troubles() map[int]string {
	all := map[int]string{}
	for _, s := range k.slots {
		if why := s.trouble(); why != "" {
			all[s.number] = why
		}
	}
	return all
}

// turn is a lock that is held while the server is asked. A goroutine that waits for it does not
// stop simulated time, as one that waits for a mutex does.
type turn chan struct{}

func newTurn() turn { return make(turn, 1) }

// Lock waits for the turn.
func (t turn) Lock() { t <- struct{}{} }

// Unlock ends it.
func (t turn) Unlock() { <-t }
