// Package fakeapi is a creator API that misbehaves as real ones do, and that
// remembers what it saw. The demo, benchmarks and tests call it.
package fakeapi

import (
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// Behaviour answers the n-th call of a creator, counted from 1. random belongs to
// the creator and is deterministic.
type Behaviour func(n int, random *rand.Rand) Response

// Response is one answer.
type Response struct {
	After      time.Duration // how long it takes; beyond the caller's patience it hangs
	Status     int           // 0: the connection breaks
	RetryAfter time.Duration // header, in whole seconds
	Body       string        // "": one that fits the status
}

// API is an http.Handler. It tells creators apart by a header.
type API struct {
	header    string
	behaviour func(creator string) Behaviour
	seed      uint64
	requests  atomic.Int64
	creators  sync.Map // name → *creator
}

type creator struct {
	behaviour Behaviour

	mu       sync.Mutex
	random   *rand.Rand
	calls    int
	inFlight int
	most     int
	statuses map[int]int
	from     time.Time // the window in which no call may come
	until    time.Time
	early    int // calls that began inside a window
	starts   []time.Time
}

// New makes an API. behaviour is asked once for each creator.
func New(header string, seed uint64, behaviour func(creator string) Behaviour) *API {
	return &API{header: header, seed: seed, behaviour: behaviour}
}

func (a *API) creator(name string) *creator {
	if c, ok := a.creators.Load(name); ok {
		return c.(*creator)
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(name))
	c, _ := a.creators.LoadOrStore(name, &creator{
		behaviour: a.behaviour(name), statuses: map[int]int{},
		random: rand.New(rand.NewPCG(a.seed, h.Sum64())),
	})
	return c.(*creator)
}

// ServeHTTP answers as the creator's behaviour says.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	_, _ = io.Copy(io.Discard, r.Body)
	c := a.creator(r.Header.Get(a.header))

	c.mu.Lock()
	c.calls++
	c.inFlight++
	c.most = max(c.most, c.inFlight)
	c.starts = append(c.starts, began)
	if began.After(c.from) && began.Before(c.until) {
		c.early++
	}
	answer := c.behaviour(c.calls, c.random)
	c.mu.Unlock()

	hung := !wait(r, answer.After)
	c.mu.Lock()
	c.inFlight-- // before the answer leaves: the caller may call again at once
	c.statuses[answer.Status]++
	if now := time.Now(); !hung && answer.RetryAfter > 0 {
		// Calls that are under way when the answer leaves are not early.
		if !now.Before(c.until) {
			c.from = now.Add(clockSlack)
		}
		if until := now.Add(answer.RetryAfter); until.After(c.until) {
			c.until = until
		}
	}
	c.mu.Unlock()
	if !hung && answer.Status != 0 {
		a.write(w, answer)
	}
	if hung || answer.Status == 0 {
		panic(http.ErrAbortHandler) // closes the connection without an answer
	}
}

// clockSlack is for how long after an answer calls arrive that left before it
// was read.
const clockSlack = 20 * time.Millisecond

func wait(r *http.Request, d time.Duration) bool {
	if d <= 0 {
		return true
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-r.Context().Done():
		return false
	}
}

func (a *API) write(w http.ResponseWriter, r Response) {
	id := "req_" + strconv.FormatInt(a.requests.Add(1), 36)
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("X-Request-Id", id)
	if r.RetryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(int((r.RetryAfter+time.Second-1)/time.Second)))
	}
	body := r.Body
	if body == "" {
		body = bodyFor(r.Status, id)
	}
	w.WriteHeader(r.Status)
	_, _ = io.WriteString(w, body)
	if f, ok := w.(http.Flusher); ok {
		f.Flush()
	}
}

// bodyFor is what OFAuth says with a status.
func bodyFor(status int, id string) string {
	kind, action := "UNKNOWN_ERROR", ""
	switch status {
	case 200:
		return `{"list":[{"id":1,"name":"fan","spent":12.5}],"hasMore":false}`
	case 400, 422:
		kind = "BAD_REQUEST"
	case 401:
		kind, action = "SESSION_EXPIRED", `,"actionRequired":"relink_connection"`
	case 404:
		kind = "RESOURCE_NOT_FOUND"
	case 429:
		kind = "RATE_LIMIT_EXCEEDED"
	}
	return fmt.Sprintf(`{"error":"%s","type":%q,"requestId":%q%s}`, http.StatusText(status), kind, id, action)
}

// Report is what the API saw of one creator.
type Report struct {
	Creator    string
	Calls      int
	InFlight   int         // the most at once
	Statuses   map[int]int // 0: the connection was broken off
	Early      int         // calls that began inside a Retry-After window
	CallStarts []time.Time
}

// Reports are of all creators that were called, by name.
func (a *API) Reports() []Report {
	var all []Report
	a.creators.Range(func(name, value any) bool {
		c := value.(*creator)
		c.mu.Lock()
		defer c.mu.Unlock()
		r := Report{Creator: name.(string), Calls: c.calls, InFlight: c.most, Early: c.early, Statuses: map[int]int{}}
		for status, n := range c.statuses {
			r.Statuses[status] = n
		}
		r.CallStarts = slices.Clone(c.starts)
		all = append(all, r)
		return true
	})
	slices.SortFunc(all, func(a, b Report) int {
		if a.Creator < b.Creator {
			return -1
		}
		return 1
	})
	return all
}
