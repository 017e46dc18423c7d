package main

import (
	"fmt"
	"hash/fnv"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// mindAPI changes its mind: what it refuses at first it does later. It remembers every call of a request.
type mindAPI struct {
	latency time.Duration

	mu     sync.Mutex
	calls  map[string][]mindCall // by creator, operation and id
	flying int
	total  int
}

type mindCall struct {
	start  time.Time
	status int // what it answered, whether that was heard or not; 0: it has not yet
}

// certain reports whether the API said that nothing was done.
func (c mindCall) certain() bool { return c.status >= 400 && c.status < 500 || c.status == 503 }

func (a *mindAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	key := r.Header.Get("x-creator") + strings.ReplaceAll(r.URL.Path, "/", ".") + "." + r.Header.Get("Idempotency-Key")
	a.mu.Lock()
	if a.calls == nil {
		a.calls = map[string][]mindCall{}
	}
	n := len(a.calls[key])
	a.calls[key] = append(a.calls[key], mindCall{start: time.Now()})
	a.flying++
	a.total++
	a.mu.Unlock()
	time.Sleep(a.latency)
	status := http.StatusOK
	if n == 0 {
		status = firstAnswer(key)
	}
	a.mu.Lock()
	a.calls[key][n].status = status
	a.flying--
	a.mu.Unlock()
	w.WriteHeader(status)
	_, _ = io.WriteString(w, "{}")
}

// firstAnswer is what a request hears first, always the same.
func firstAnswer(key string) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(key))
	switch n := h.Sum32() % 100; {
	case n < 25:
		return http.StatusUnprocessableEntity
	case n < 40:
		return http.StatusNotFound
	case n < 50:
		return http.StatusServiceUnavailable
	case n < 53:
		return http.StatusBadGateway
	}
	return http.StatusOK
}

func (a *mindAPI) inFlight() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.flying
}

// judge says which calls must not have been made: the second one of what must not be called twice, unless
// the API had said that nothing was done, or a dead letter had told people that this is not known.
func (a *mindAPI) judge(t *testing.T, all []storedOutcome) {
	t.Helper()
	uncertain := map[string][]time.Time{}
	for _, o := range all {
		if o.class == "UNCERTAIN" {
			uncertain[o.place] = append(uncertain[o.place], o.at)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	again, silent := 0, []string{}
	for key, calls := range a.calls {
		again += len(calls) - 1
		if !strings.Contains(key, ".pay.") {
			continue
		}
		for i := 1; i < len(calls); i++ {
			told := false
			for _, at := range uncertain[key] {
				told = told || at.After(calls[i-1].start) && at.Before(calls[i].start)
			}
			if !calls[i-1].certain() && !told {
				silent = append(silent, fmt.Sprintf("%s at %v (%d) and %v", key, calls[i-1].start.Format(time.StampMilli), calls[i-1].status, calls[i].start.Format(time.StampMilli)))
			}
		}
	}
	t.Logf("%d calls, %d of them not the first of their request; %d outcomes UNCERTAIN", a.total, again, len(uncertain))
	if len(silent) > 0 {
		t.Errorf("%d silent second calls of what must not be called twice: %s", len(silent), strings.Join(silent[:min(5, len(silent))], "; "))
	}
}
