package api

import (
	"context"
	"errors"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
)

// TestMemoryHoldsAndNeverLocks: whatever lengths come in whatever order and steps, every answer gets its room in the
// end, and the pool is overdrawn by one at most.
func TestMemoryHoldsAndNeverLocks(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		total := rapid.Int64Range(1, 1000).Draw(rt, "total")
		calls := rapid.IntRange(1, 30).Draw(rt, "calls")
		steps := rapid.SliceOfN(rapid.SliceOfN(rapid.Int64Range(0, 400), 1, 6), calls, calls).Draw(rt, "steps")
		given := rapid.SliceOfN(rapid.Bool(), calls, calls).Draw(rt, "gives up")
		synctest.Test(t, func(*testing.T) {
			m := newMemory(total, 10)
			var done sync.WaitGroup
			for i := range calls {
				done.Go(func() {
					r := m.room()
					defer r.release()
					patience := time.Hour
					if given[i] {
						patience = time.Duration(i) * time.Millisecond
					}
					ctx, cancel := context.WithTimeout(context.Background(), patience)
					defer cancel()
					for _, n := range steps[i] {
						if err := r.grow(ctx, n); err != nil {
							if !given[i] || !errors.Is(err, classify.ErrLocal) {
								rt.Errorf("no room within an hour: %v", err)
							}
							return
						}
						m.mu.Lock()
						if m.overdrawn == nil && m.free < 0 || m.overdrawn != nil && m.free < -m.overdrawn.held {
							rt.Errorf("%d of %d bytes are free, overdrawn %v", m.free, m.pool, m.overdrawn != nil)
						}
						m.mu.Unlock()
						time.Sleep(time.Millisecond) // of the bubble
					}
				})
			}
			done.Wait()
			if m.free != m.pool || m.overdrawn != nil || len(m.growing)+len(m.starting) != 0 {
				rt.Errorf("%d of %d bytes are free at the end, overdrawn %v, %d wait", m.free, m.pool, m.overdrawn != nil, len(m.growing)+len(m.starting))
			}
		})
	})
}

// TestSmallAnswersDoNotWait for large ones, and large ones not for ever.
func TestSmallAnswersDoNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(8<<20, 16)
		all := m.room()
		if err := all.grow(t.Context(), 16<<20); err != nil {
			t.Fatal(err)
		}
		for range 16 {
			small := m.room()
			if err := small.grow(t.Context(), 64<<10); err != nil {
				t.Fatal(err)
			}
			defer small.release()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if err := m.room().grow(ctx, 1<<20); !errors.Is(err, classify.ErrLocal) || time.Since(began) != time.Second {
			t.Errorf("a large one beside one that has everything: %v after %v", err, time.Since(began))
		}
		time.AfterFunc(time.Minute, all.release)
		began = time.Now()
		if err := m.room().grow(t.Context(), 1<<20); err != nil || time.Since(began) != time.Minute {
			t.Errorf("a large one after it: %v after %v", err, time.Since(began))
		}
		all.release() // once more does nothing
		if m.free != m.pool-(1<<20)+m.allowance {
			t.Errorf("%d of %d bytes are free", m.free, m.pool)
		}
	})
}

// TestGrowingGoesFirst: what is half read is read to its end before another answer is begun, since that gives memory back.
func TestGrowingGoesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(200, 1) // 50 are an answer's own, 150 are the pool
		half, over, other, begun := m.room(), m.room(), m.room(), m.room()
		var mu sync.Mutex
		var order []string
		grow := func(name string, r *room, bytes int64) {
			go func() {
				if err := r.grow(t.Context(), bytes); err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				order = append(order, name)
			}()
			synctest.Wait()
		}
		grow("other", other, 75)
		grow("half", half, 90)
		grow("over", over, 130)
		grow("overdrawn", over, 10)
		grow("half, the rest", half, 40)
		grow("begun", begun, 60)
		other.release() // room for the one that is to begin, but not for the rest
		synctest.Wait()
		if got := strings.Join(order, "; "); got != "other; half; over; overdrawn" {
			t.Errorf("have their room: %s", got)
		}
		over.release()
		synctest.Wait()
		if len(order) != 6 {
			t.Errorf("have their room at the end: %s", order)
		}
		half.release()
		begun.release()
	})
}

// TestAnswersFitIntoMemory: of many large answers at once only as many are in memory as may be, and all are read.
func TestAnswersFitIntoMemory(t *testing.T) {
	const size, calls, memory = 1 << 20, 24, 4 << 20
	for _, length := range []bool{true, false} {
		c := newClient(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if length {
				w.Header().Set("Content-Length", strconv.Itoa(size))
			}
			_, _ = w.Write([]byte(strings.Repeat("x", size)))
		}), func(cfg *Config) { cfg.Memory, cfg.MaxBody, cfg.Timeout = memory, 2<<20, time.Minute })
		call, err := c.Prepare(&publisher.Request{ID: "1", Creator: "c", Operation: "send"})
		if err != nil {
			t.Fatal(err)
		}
		var inMemory, most atomic.Int64
		var all sync.WaitGroup
		for range calls {
			all.Go(func() {
				a := call(t.Context())
				n := inMemory.Add(1)
				for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
				}
				if len(a.Body) != size || a.Err != nil {
					t.Errorf("%d bytes, %v", len(a.Body), a.Err)
				}
				inMemory.Add(-1)
				a.Done()
				a.Done()
			})
		}
		all.Wait()
		if n := most.Load(); n > memory/size {
			t.Errorf("length known %v: %d answers of %d bytes at once in %d bytes", length, n, size, memory)
		}
		if c.memory.free != c.memory.pool {
			t.Errorf("length known %v: %d of %d bytes are free at the end", length, c.memory.free, c.memory.pool)
		}
	}
}

// TestNoRoom: an answer for which there is no room in time is the worker's own trouble, and may have been given.
func TestNoRoom(t *testing.T) {
	c := newClient(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodDelete {
			w.WriteHeader(http.StatusConflict)
		}
		_, _ = w.Write([]byte(strings.Repeat("x", 1<<20)))
	}), func(cfg *Config) { cfg.Memory, cfg.Timeout = 1<<20, time.Second })
	for operation, want := range map[string]classify.Class{"send": classify.NetworkError, "drop": classify.Conflict} {
		call, err := c.Prepare(&publisher.Request{ID: "1", Creator: "c", Operation: operation, Payload: []byte(`{"post":1}`)})
		if err != nil {
			t.Fatal(err)
		}
		first := c.memory.room()
		if err := first.grow(t.Context(), 1<<20); err != nil {
			t.Fatal(err)
		}
		a := call(t.Context())
		f := failure(t, a)
		if f.Class != want || want == classify.NetworkError && (!f.Local || f.Done != classify.DoneMaybe) {
			t.Errorf("%s: %s, local %v, done %q", operation, f.Describe(), f.Local, f.Done)
		}
		a.Done()
		first.release()
	}
	if c.memory.free != c.memory.pool {
		t.Errorf("%d of %d bytes are free at the end", c.memory.free, c.memory.pool)
	}
}

func TestCgroupLimit(t *testing.T) {
	for name, tc := range map[string]struct {
		groups string
		files  map[string]string
		want   int64
	}{
		"none":          {"", nil, math.MaxInt64},
		"version 2":     {"0::/\n", map[string]string{"memory.max": "1000\n"}, 1000},
		"not limited":   {"0::/\n", map[string]string{"memory.max": "max\n"}, math.MaxInt64},
		"above":         {"0::/a.slice/b.scope\n", map[string]string{"a.slice/memory.max": "500\n", "a.slice/b.scope/memory.max": "max\n", "memory.max": "9000"}, 500},
		"not its own":   {"0::/../../elsewhere\n", map[string]string{"memory.max": "700\n"}, 700},
		"version 1":     {"5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n", map[string]string{"memory/x/memory.limit_in_bytes": "800\n", "cpu/x/memory.limit_in_bytes": "1"}, 800},
		"1, no limit":   {"4:memory:/\n", map[string]string{"memory/memory.limit_in_bytes": "9223372036854771712\n"}, math.MaxInt64},
		"garbage":       {"x\n::\n0::/\n", map[string]string{"memory.max": "lots\n"}, math.MaxInt64},
		"nothing at it": {"0::/\n", nil, math.MaxInt64},
	} {
		root := t.TempDir()
		groups := filepath.Join(root, "self")
		if name != "none" {
			write(t, groups, tc.groups)
		}
		for file, text := range tc.files {
			write(t, filepath.Join(root, file), text)
		}
		if got := cgroupLimit(groups, root); got != tc.want {
			t.Errorf("%s: %d, want %d", name, got, tc.want)
		}
	}
	if d := defaultMemory(); d < 1<<20 {
		t.Errorf("the default is %d bytes", d)
	}
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
