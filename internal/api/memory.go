package api

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/headgate-io/headgate/classify"
)

// memory bounds the bytes of all answers that are being read or are not stored yet.
//
// Each answer has a small allowance of its own, so that small ones never wait for large ones. The
// rest is a pool. An answer whose length is known takes all of it before it is read, and
// holds nothing while it waits. One of unknown length grows while it holds what it has; so that
// such answers cannot wait for each other for ever, one at a time may go on although there
// is no room: it ends, or its deadline does, and gives everything back.
type memory struct {
	allowance int64
	pool      int64

	mu        sync.Mutex
	free      int64 // of the pool; below 0 when it is overdrawn
	overdrawn *room
	growing   []*waiter // hold something
	starting  []*waiter // hold nothing
}

type waiter struct {
	room    *room
	bytes   int64
	granted chan struct{}
}

// room is what one answer has of the memory.
type room struct {
	of   *memory
	used int64
	held int64 // of the pool; guarded by memory.mu
}

// maxAllowance of memory that an answer may use without asking.
const maxAllowance = 64 << 10

func newMemory(total int64, inFlight int) *memory {
	calls := int64(max(inFlight, 1))
	m := &memory{allowance: min(maxAllowance, total/4/calls)}
	m.pool = max(total-m.allowance*calls, 1)
	m.free = m.pool
	return m
}

func (m *memory) room() *room { return &room{of: m} }

// grow waits until there is room for more bytes, but not longer than ctx. More than there
// is at all is read alone.
func (r *room) grow(ctx context.Context, bytes int64) error {
	m := r.of
	r.used += bytes
	m.mu.Lock()
	need := min(max(r.used-m.allowance, 0), m.pool) - r.held
	if need <= 0 || m.overdrawn == r {
		m.take(r, max(need, 0))
		m.mu.Unlock()
		return nil
	}
	w := &waiter{room: r, bytes: need, granted: make(chan struct{})}
	if r.held > 0 {
		m.growing = append(m.growing, w)
	} else {
		m.starting = append(m.starting, w)
	}
	m.grant()
	m.mu.Unlock()
	select {
	case <-w.granted:
		return nil
	case <-ctx.Done():
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.growing = remove(m.growing, w)
	m.starting = remove(m.starting, w)
	m.grant() // those behind it
	return fmt.Errorf("no room in memory for the answer: %w", classify.ErrLocal)
}

func remove(all []*waiter, w *waiter) []*waiter {
	return slices.DeleteFunc(all, func(other *waiter) bool { return other == w })
}

// take gives r bytes of the pool. The caller holds the lock.
func (m *memory) take(r *room, bytes int64) {
	m.free -= bytes
	r.held += bytes
}

// grant serves those that wait, in order, those that hold something first. The caller
// holds the lock.
func (m *memory) grant() {
	for len(m.growing) > 0 && (m.growing[0].bytes <= m.free || m.overdrawn == nil) {
		w := m.growing[0]
		if w.bytes > m.free {
			m.overdrawn = w.room
		}
		m.growing = m.growing[1:]
		m.take(w.room, w.bytes)
		close(w.granted)
	}
	for len(m.growing) == 0 && len(m.starting) > 0 && m.starting[0].bytes <= m.free {
		w := m.starting[0]
		m.starting = m.starting[1:]
		m.take(w.room, w.bytes)
		close(w.granted)
	}
}

// release gives everything back. It may be called more than once.
func (r *room) release() {
	m := r.of
	m.mu.Lock()
	defer m.mu.Unlock()
	m.free += r.held
	r.held = 0
	if m.overdrawn == r {
		m.overdrawn = nil
	}
	m.grant()
}

// fallbackMemory is the default where the process has no limit.
const fallbackMemory = 256 << 20

// defaultMemory is a quarter of what the process may have: an answer is copied once or twice on
// its way into a stream.
func defaultMemory() int64 {
	limit := min(cgroupLimit("/proc/self/cgroup", "/sys/fs/cgroup"), debug.SetMemoryLimit(-1))
	if limit == math.MaxInt64 {
		return fallbackMemory
	}
	return max(limit/4, 1<<20)
}

// cgroupLimit returns the tightest memory limit of the process's control group and those above
// it, of either version; math.MaxInt64 if there is none.
func cgroupLimit(groups, root string) int64 {
	limit := int64(math.MaxInt64)
	file, err := os.ReadFile(groups)
	if err != nil {
		return limit
	}
	for line := range strings.Lines(string(file)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		dir, name := root, "memory.max"
		switch {
		case parts[0] == "0" && parts[1] == "":
		case slices.Contains(strings.Split(parts[1], ","), "memory"):
			dir, name = filepath.Join(root, "memory"), "memory.limit_in_bytes"
		default:
			continue
		}
		// In a container its own group is the root, and the path may lead nowhere.
		for path := filepath.Clean("/" + parts[2]); ; path = filepath.Dir(path) {
			limit = min(limit, readLimit(filepath.Join(dir, path, name)))
			if path == "/" {
				break
			}
		}
	}
	return limit
}

func readLimit(file string) int64 {
	const none = 1 << 60 // version 1 writes a number of about 2^63
	text, err := os.ReadFile(file)
	if err != nil {
		return math.MaxInt64
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil || n <= 0 || n >= none {
		return math.MaxInt64
	}
	return n
}
