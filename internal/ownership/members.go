package ownership

import (
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// members mirrors OWNERS: which workers are alive, what they own, and which
// creators they are still calling.
type members struct {
	self       Member
	partitions int
	ttl        time.Duration
	foreign    *foreign

	wake  chan struct{} // there may be something to claim, to hand over or to tell
	check chan struct{} // look has partitions

	mu        sync.Mutex
	live      map[string]time.Time // by name: when they were heard of last
	owners    map[int]owner
	free      map[int]time.Time // since when a partition is free
	look      map[int]bool      // partitions whose lease may not be this worker's any more
	calling   map[int]map[string]stillCalling
	applied   uint64 // the last sequence that the watch has delivered
	changed   time.Time
	joined    time.Time // when this worker was last missing
	open      time.Time // before this no worker claims
	confirmed time.Time // when the heartbeat was sent that was last confirmed
	left      bool
	following bool // what was there when the watch began has been applied

	assigned map[string][]string // the last two assignments, by names
}

// owner is the worker that has a partition, "" if a foreign value hides its name, and when
// that was heard of last.
type owner struct {
	worker string
	heard  time.Time
}

// stillCalling are creators that a former owner is calling.
type stillCalling struct {
	creators []string
	sequence uint64
	heard    time.Time
}

func newMembers(name string, partitions int, ttl time.Duration, f *foreign) *members {
	host, _ := os.Hostname()
	return &members{
		self:       Member{Worker: name, Host: host, PID: os.Getpid(), Since: time.Now().UTC().Truncate(time.Second)},
		partitions: partitions, ttl: ttl, foreign: f,
		wake: make(chan struct{}, 1), check: make(chan struct{}, 1),
		live: map[string]time.Time{}, owners: map[int]owner{}, free: map[int]time.Time{}, look: map[int]bool{},
		calling: map[int]map[string]stillCalling{},
	}
}

// forgotten is the age at which a key counts no more, even if its expiry was not
// heard of: notices can get lost when servers fail. Whether
// a lease is free is the server's to say in any case.
func (m *members) forgotten() time.Duration { return m.ttl + m.ttl/3 }

// apply takes an entry of OWNERS, as it is or as it has become. An expired one
// comes as a purge.
func (m *members) apply(e jetstream.KeyValueEntry) {
	put := e.Operation() == jetstream.KeyValuePut
	m.mu.Lock()
	defer m.mu.Unlock()
	m.applied = max(m.applied, e.Revision())
	if name, ok := parseWorkerKey(e.Key()); ok {
		m.applyWorker(name, e, put)
		return
	}
	if n, ok := parsePartitionKey(e.Key()); ok && n < m.partitions {
		m.applyPartition(n, e, put)
		return
	}
	if n, name, ok := parseCallingKey(e.Key()); ok && n < m.partitions {
		m.applyCalling(n, name, e, put)
		return
	}
	if put {
		m.foreign.report(e.Key(), len(e.Value()))
	}
}

func (m *members) applyWorker(name string, e jetstream.KeyValueEntry, put bool) {
	switch {
	case name == m.self.Worker:
	case put && parseMember(name, e.Value()) == nil:
		// If it hides a worker's heartbeat, the next one comes soon.
		m.foreign.report(e.Key(), len(e.Value()))
	default:
		m.seen(name, put)
	}
}

func (m *members) applyPartition(n int, e jetstream.KeyValueEntry, put bool) {
	if !put {
		delete(m.owners, n)
		m.doubt(n)
		m.stir()
		return
	}
	s := parseLeaseValue(e.Value())
	if s == nil {
		m.foreign.report(e.Key(), len(e.Value()))
		if _, known := m.owners[n]; !known {
			m.owners[n] = owner{"", time.Now()} // and not later the next time
		}
		m.doubt(n)
		return
	}
	if s.Worker != m.self.Worker {
		m.doubt(n)
	}
	m.owners[n] = owner{s.Worker, time.Now()}
}

// doubt makes the Keeper look at the lease of a partition, if it has it.
func (m *members) doubt(n int) {
	m.look[n] = true
	select {
	case m.check <- struct{}{}:
	default:
	}
}

// doubted returns the partitions to look at, once.
func (m *members) doubted() map[int]bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	look := m.look
	m.look = map[int]bool{}
	return look
}

func (m *members) applyCalling(n int, name string, e jetstream.KeyValueEntry, put bool) {
	if m.calling[n][name].sequence > e.Revision() {
		return // a newer one was read already
	}
	if !put {
		delete(m.calling[n], name)
		m.stir()
		return
	}
	creators, ok := parseCalling(name, e.Value())
	if !ok {
		m.foreign.report(e.Key(), len(e.Value()))
		return
	}
	m.calls(n, name, creators, e.Revision())
}

func (m *members) calls(n int, name string, creators []string, sequence uint64) {
	if m.calling[n] == nil {
		m.calling[n] = map[string]stillCalling{}
	}
	m.calling[n][name] = stillCalling{creators, sequence, time.Now()}
	m.stir()
}

// read takes what the server has at calling.<n>.*: it knows more than a watch that lags behind.
func (m *members) read(n int, stored []*message) {
	m.mu.Lock()
	defer m.mu.Unlock()
	there := map[string]bool{}
	for _, s := range stored {
		_, name, ok := parseCallingKey(s.key)
		creators, parsed := parseCalling(name, s.data)
		switch {
		case !ok || s.marks():
			continue
		case !parsed:
			m.foreign.report(s.key, len(s.data))
			continue
		}
		there[name] = true
		// What the watch has delivered and found gone since is gone.
		if s.sequence > m.applied || m.calling[n][name].sequence != 0 {
			m.calls(n, name, creators, max(s.sequence, m.calling[n][name].sequence))
		}
	}
	for name, c := range m.calling[n] {
		if !there[name] && time.Since(c.heard) > m.forgotten() {
			delete(m.calling[n], name)
			m.stir()
		}
	}
}

// stale returns the partitions with former owners that have not been heard of for so long that
// their keys ought to have expired.
func (m *members) stale() []int {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []int
	for n, workers := range m.calling {
		for _, c := range workers {
			if time.Since(c.heard) > m.forgotten() {
				all = append(all, n)
				break
			}
		}
	}
	return all
}

// stillCalled returns the creators of a partition that former owners are still calling, by
// name, nil if there are none.
func (m *members) stillCalled(n int) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []string
	for _, c := range m.calling[n] {
		all = append(all, c.creators...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// follows says whether the mirror shows what the server has.
func (m *members) follows(yes bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.following = yes
	m.stir()
}

// restarted says that the bucket was made again: sequences begin from 1. Workers and leases are
// known until they have not been heard of for long enough.
func (m *members) restarted() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.applied = 0
	for _, workers := range m.calling {
		for name, c := range workers {
			c.sequence = 0
			workers[name] = c
		}
	}
	m.rejoin()
}

// rejoin makes this worker wait for the others before it claims free partitions.
func (m *members) rejoin() {
	m.joined = time.Now()
	m.open = later(m.open, m.joined.Add(m.ttl/3+quiet))
	clear(m.free)
}

// opens says that no worker may claim before then. No worker is late until then.
func (m *members) opens(at time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.open = later(m.open, at)
	for n, since := range m.free {
		m.free[n] = later(since, at)
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
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

func (m *members) isLive(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	heard, there := m.live[name]
	return there && time.Since(heard) <= m.forgotten()
}

func (m *members) lastConfirmed() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.confirmed
}

// beaten says that a heartbeat was confirmed that was sent then.
func (m *members) beaten(sent time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.left {
		return
	}
	if sent.Sub(m.confirmed) > m.ttl && !m.confirmed.IsZero() {
		m.rejoin() // back after an outage in which all workers may have been missed
	}
	m.confirmed = sent
	m.seen(m.self.Worker, true)
}

// leave takes this worker out. It reports whether it was in.
func (m *members) leave() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	was := !m.left
	m.left = true
	delete(m.live, m.self.Worker)
	return was
}

// owned says that another worker was found to have a partition.
func (m *members) owned(n int, worker string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.owners[n] = owner{worker, time.Now()}
}

// hidden reports whether the owner of a partition that has a foreign value may still have it.
func (m *members) hidden(n int) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	o, known := m.owners[n]
	if !known {
		m.owners[n] = owner{"", time.Now()}
	}
	return !known || time.Since(o.heard) <= m.forgotten()
}

// plan is what a worker ought to do.
type plan struct {
	mine  map[int]bool // it ought to have these partitions
	claim map[int]bool // it may claim these; some because their due owner does not
	move  bool         // it may hand over other workers' partitions
	again time.Duration
}

// plan decides from the present knowledge. If the workers have not been the same for long enough
// nothing moves, and only partitions are claimed that have been free for too long.
func (m *members) plan(now time.Time) plan {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := plan{mine: map[int]bool{}, claim: map[int]bool{}}
	if _, there := m.live[m.self.Worker]; m.left || !there || now.Sub(m.confirmed) > m.ttl {
		return p // cut off from the others: they may all have been missed
	}
	names := m.names(now)
	due := m.assign(names)
	for n, name := range due {
		if name == m.self.Worker {
			p.mine[n] = true
		}
	}
	var wait time.Duration
	if len(names) > 1 {
		wait = max(wait, m.changed.Add(quiet).Sub(now))
	}
	// After an outage the leases of all have lapsed. The first worker that is back
	// must not take everything: the others come within a heartbeat.
	if !m.joined.IsZero() {
		wait = max(wait, m.joined.Add(m.ttl/3+quiet).Sub(now))
	}
	p.move = wait <= 0 && m.following
	p.again = max(wait, 0)
	overdue := m.overdue(now)
	for n := range m.partitions {
		_, free := m.free[n]
		free = free || m.owners[n].worker == m.self.Worker // a claim that was not confirmed, if it is not claimed
		if free && p.mine[n] && p.move || overdue[n] {
			p.claim[n] = true
		}
	}
	return p
}

// names returns the live workers, by name.
func (m *members) names(now time.Time) []string {
	names := make([]string, 0, len(m.live))
	for name, heard := range m.live {
		if now.Sub(heard) > m.forgotten() && name != m.self.Worker {
			m.seen(name, false)
			continue
		}
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// overdue notes since when partitions are free, and returns those of them that have been for so
// long that the workers that own something share them out: a name that is alive but claims nothing
// must not keep a partition from being served.
func (m *members) overdue(now time.Time) map[int]bool {
	late := false
	working := map[string]bool{m.self.Worker: true}
	for n := range m.partitions {
		o, owned := m.owners[n]
		if owned && o.worker != "" && now.Sub(o.heard) <= m.forgotten() {
			working[o.worker] = true // perhaps this one
			delete(m.free, n)
			continue
		}
		if m.free[n].IsZero() {
			m.free[n] = later(now, m.open)
		}
		late = late || now.Sub(m.free[n]) >= patience
	}
	if !late {
		return nil
	}
	all := map[int]bool{}
	for n, name := range m.assign(slices.Sorted(maps.Keys(working))) {
		if since, free := m.free[n]; free && name == m.self.Worker && now.Sub(since) >= patience {
			all[n] = true
		}
	}
	return all
}

// assign remembers the last assignments: they are asked for far more often than they change.
func (m *members) assign(names []string) []string {
	key := ""
	for _, name := range names {
		key += name + "\x00"
	}
	if due, known := m.assigned[key]; known {
		return due
	}
	if len(m.assigned) > 2 || m.assigned == nil {
		m.assigned = map[string][]string{}
	}
	due := assign(m.partitions, names)
	m.assigned[key] = due
	return due
}

// alive reports whether a worker has been heard of lately.
func (m *members) alive(worker string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	heard, there := m.live[worker]
	return there && time.Since(heard) <= m.forgotten()
}
