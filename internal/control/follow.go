package control

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
)

const (
	// lookEvery is how often a bucket that is followed is compared with its stream.
	lookEvery = 2500 * time.Millisecond

	// lookWithin bounds one such look.
	lookWithin = 5 * time.Second

	// rewatchAfter is the pause before a watch that failed is begun again.
	rewatchAfter = time.Second

	// renewedAfter is the pause before a bucket that was made again is read: servers that
	// contradict each other must not be asked without end.
	renewedAfter = 50 * time.Millisecond

	// complainEvery bounds how often the log says the same of a bucket.
	complainEvery = 10 * time.Second
)

// Entry is an entry of a bucket, as it is or as it has become.
type Entry struct {
	Key       string
	Value     []byte
	Revision  uint64
	Created   time.Time
	Operation jetstream.KeyValueOp // a delete or a purge: the key is gone

	who string // who released it, if it was read from the leader
}

func entryOf(e jetstream.KeyValueEntry) Entry {
	return Entry{Key: e.Key(), Value: e.Value(), Revision: e.Revision(), Created: e.Created(), Operation: e.Operation()}
}

// Feed takes the entries of a bucket. Its functions are called one at a time: for
// each listing Begin, then Apply for all that is there, then Listed, and from
// then on Apply for each change.
type Feed struct {
	// Begin says that all entries will come again. renewed: the bucket is not the
	// one that was followed before; it was deleted and made again, or
	// restored from a backup, and its revisions are other ones. May be nil.
	Begin func(renewed bool)
	Apply func(Entry)
	// Listed says that all that the bucket has was applied. May be nil.
	Listed func()
	Log    zerolog.Logger
}

// Follow applies what is in a bucket and then each change until ctx ends. It
// notices a bucket that was deleted and made again, which the watch of nats.go
// would follow from the old sequence on. Feed.Begin says so.
func Follow(ctx context.Context, js jetstream.JetStream, bucket string, feed Feed) {
	newFollower(js, bucket, feed).run(ctx)
}

type follower struct {
	js     jetstream.JetStream
	bucket string
	feed   Feed
	poke   chan struct{} // look now

	complained map[string]time.Time // run's own: when the log said what

	turn    sync.Mutex // held while an entry is applied
	kv      jetstream.KeyValue
	known   bool          // there was a bucket before
	created time.Time     // of the bucket's stream
	high    uint64        // highest sequence applied of this bucket
	applied uint64        // all up to this sequence was applied since the last Begin
	epoch   int           // number of Begins
	listing bool          // between Begin and Listed
	news    chan struct{} // closed and replaced when any of this changes by Begin or Listed
}

func newFollower(js jetstream.JetStream, bucket string, feed Feed) *follower {
	if feed.Begin == nil {
		feed.Begin = func(bool) {}
	}
	if feed.Listed == nil {
		feed.Listed = func() {}
	}
	return &follower{
		js: js, bucket: bucket, feed: feed, poke: make(chan struct{}, 1),
		complained: map[string]time.Time{}, listing: true, news: make(chan struct{}),
	}
}

// errRenewed ends the watch of a bucket that is not the one it was.
var errRenewed = errors.New("the bucket was made again")

func missing(err error) bool {
	return errors.Is(err, jetstream.ErrBucketNotFound) || errors.Is(err, jetstream.ErrStreamNotFound)
}

func (f *follower) run(ctx context.Context) {
	for ctx.Err() == nil {
		err := f.watch(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, errRenewed):
			pause(ctx, renewedAfter)
			continue
		case missing(err):
			f.complain(fmt.Sprintf("bucket %s is missing: run `headgate setup`; what is known of it stays in force", f.bucket), nil)
		default:
			f.complain(fmt.Sprintf("changes of bucket %s are not followed; trying again", f.bucket), err)
		}
		pause(ctx, rewatchAfter)
	}
}

func (f *follower) complain(text string, err error) {
	now := time.Now()
	if last, told := f.complained[text]; told && now.Sub(last) < complainEvery {
		return
	}
	f.complained[text] = now
	f.feed.Log.Error().Err(err).Msg(text)
}

// state is what the leader says of a bucket's stream.
type state struct {
	created time.Time
	last    uint64
}

func (f *follower) look(ctx context.Context, kv jetstream.KeyValue) (state, error) {
	ctx, cancel := context.WithTimeout(ctx, lookWithin)
	defer cancel()
	status, err := kv.Status(ctx)
	if err != nil {
		return state{}, fmt.Errorf("look at bucket %s: %w", f.bucket, err)
	}
	s, ok := status.(*jetstream.KeyValueBucketStatus)
	if !ok {
		return state{}, fmt.Errorf("look at bucket %s: no stream of it is known", f.bucket)
	}
	info := s.StreamInfo()
	return state{info.Created, info.State.LastSeq}, nil
}

// watch follows the bucket until the watch ends or the bucket is another one.
func (f *follower) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	kv, err := f.bind(ctx)
	if err != nil {
		return err
	}
	st, err := f.look(ctx, kv)
	if err != nil {
		return err
	}
	epoch := f.begin(kv, st)
	watcher, err := kv.WatchAll(ctx)
	if err != nil {
		return fmt.Errorf("watch %s: %w", f.bucket, err)
	}
	defer stop(watcher)
	wrong := make(chan error, 1)
	go func() { wrong <- f.guard(ctx, kv) }()
	var seen uint64
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-wrong:
			return err
		case entry, open := <-watcher.Updates():
			switch {
			case !open:
				return fmt.Errorf("watch %s: the watcher ended", f.bucket)
			case entry == nil:
				if err := f.listed(ctx, kv, epoch); err != nil {
					return err
				}
			case entry.Revision() <= seen:
				f.forget()
				return errRenewed
			default:
				seen = entry.Revision()
				f.take(epoch, entryOf(entry))
			}
		}
	}
}

// stop ends a watch. Its callback may be waiting for a reader.
func stop(w jetstream.KeyWatcher) {
	if w.Stop() != nil {
		return // the connection is closed
	}
	go func() {
		for range w.Updates() { //nolint:revive // until the subscription is gone
		}
	}()
}

func (f *follower) bind(ctx context.Context) (jetstream.KeyValue, error) {
	ctx, cancel := context.WithTimeout(ctx, lookWithin)
	defer cancel()
	kv, err := f.js.KeyValue(ctx, f.bucket)
	if err != nil {
		return nil, fmt.Errorf("bind to bucket %s: %w", f.bucket, err)
	}
	return kv, nil
}

// handle is the bucket, for reads and writes.
func (f *follower) handle(ctx context.Context) (jetstream.KeyValue, error) {
	f.turn.Lock()
	kv := f.kv
	f.turn.Unlock()
	if kv != nil {
		return kv, nil
	}
	return f.bind(ctx)
}

func (f *follower) begin(kv jetstream.KeyValue, st state) (epoch int) {
	f.turn.Lock()
	defer f.turn.Unlock()
	renewed := f.known && (!st.created.Equal(f.created) || st.last < f.high)
	if renewed || !f.known {
		f.high = 0
	}
	f.kv, f.known, f.created = kv, true, st.created
	f.applied, f.listing = 0, true
	f.epoch++
	f.feed.Begin(renewed)
	f.tell()
	return f.epoch
}

// forget makes the next Begin one of another bucket.
func (f *follower) forget() {
	f.turn.Lock()
	defer f.turn.Unlock()
	f.created = time.Time{}
}

// listed ends a listing, if the bucket is still the one that was listed.
func (f *follower) listed(ctx context.Context, kv jetstream.KeyValue, epoch int) error {
	st, err := f.look(ctx, kv)
	switch {
	case missing(err):
		return err
	case err == nil && f.differs(st):
		return errRenewed
	} // any other error: guard looks again soon
	f.turn.Lock()
	defer f.turn.Unlock()
	if f.epoch == epoch && f.listing {
		f.listing = false
		f.feed.Listed()
		f.tell()
	}
	return nil
}

// tell wakes those that wait for a listing. turn is held.
func (f *follower) tell() {
	close(f.news)
	f.news = make(chan struct{})
}

func (f *follower) differs(st state) bool {
	f.turn.Lock()
	defer f.turn.Unlock()
	return !st.created.Equal(f.created) || st.last < f.high
}

// take applies an entry of the listing with a number, once.
func (f *follower) take(epoch int, e Entry) {
	f.turn.Lock()
	defer f.turn.Unlock()
	if epoch != f.epoch || e.Revision <= f.applied {
		return
	}
	f.feed.Apply(e)
	f.applied = e.Revision
	f.high = max(f.high, e.Revision)
}

// guard looks now and then, and after each reconnection, whether the bucket is still
// the one that is followed. It returns when it is not. What the watch has not
// brought since the look before is read from the leader.
func (f *follower) guard(ctx context.Context, kv jetstream.KeyValue) error {
	nc := f.js.Conn()
	reconnected := nc.StatusChanged(nats.CONNECTED)
	defer nc.RemoveStatusListener(reconnected)
	every := time.NewTicker(lookEvery)
	defer every.Stop()
	var before uint64
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-reconnected:
		case <-f.poke:
		case <-every.C:
		}
		epoch, applied, listing := f.position()
		st, err := f.lookBehind(ctx, kv)
		switch {
		case missing(err), errors.Is(err, errRenewed):
			return err
		case err != nil:
			continue // the next look tells
		case !listing && applied < before:
			if err := f.catchUp(ctx, epoch, before); err != nil && ctx.Err() == nil {
				f.feed.Log.Warn().Err(err).Msgf("the watch of bucket %s lags, and its stream's leader does not help", f.bucket)
			}
		}
		before = st.last
	}
}

// lookBehind is look, and errRenewed if the bucket is another one. What has been applied
// before the question must be in the answer.
func (f *follower) lookBehind(ctx context.Context, kv jetstream.KeyValue) (state, error) {
	f.turn.Lock()
	created, high := f.created, f.high
	f.turn.Unlock()
	st, err := f.look(ctx, kv)
	if err == nil && (!st.created.Equal(created) || st.last < high) {
		return st, errRenewed
	}
	return st, err
}

func (f *follower) position() (epoch int, applied uint64, listing bool) {
	f.turn.Lock()
	defer f.turn.Unlock()
	return f.epoch, f.applied, f.listing
}

// catchUp applies what the stream's leader has up to a sequence.
func (f *follower) catchUp(ctx context.Context, epoch int, through uint64) error {
	for {
		now, applied, _ := f.position()
		if now != epoch || applied >= through {
			return nil
		}
		e, err := f.next(ctx, applied+1)
		if err != nil {
			return err
		}
		if e == nil {
			f.pass(epoch, through) // what had these sequences is gone
			return nil
		}
		f.take(epoch, *e)
	}
}

// pass counts sequences as applied that have no entry any more.
func (f *follower) pass(epoch int, through uint64) {
	f.turn.Lock()
	defer f.turn.Unlock()
	if epoch == f.epoch {
		f.applied = max(f.applied, through)
	}
}

// waitCurrent waits until all that the bucket has at this moment, by its stream's
// leader, has been applied.
func (f *follower) waitCurrent(ctx context.Context) error {
	for {
		if err := f.waitListed(ctx); err != nil {
			return err
		}
		kv, err := f.handle(ctx)
		if err != nil {
			return err
		}
		epoch, _, _ := f.position()
		st, err := f.lookBehind(ctx, kv)
		switch {
		case errors.Is(err, errRenewed):
			select {
			case f.poke <- struct{}{}:
			default:
			}
			pause(ctx, 20*time.Millisecond)
			continue
		case err != nil:
			return err
		}
		if err := f.catchUp(ctx, epoch, st.last); err != nil {
			return err
		}
		if now, _, _ := f.position(); now == epoch {
			return nil
		}
	}
}

func (f *follower) waitListed(ctx context.Context) error {
	for {
		f.turn.Lock()
		listing, news := f.listing, f.news
		f.turn.Unlock()
		if !listing {
			return nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return fmt.Errorf("read bucket %s: %w", f.bucket, ctx.Err())
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
