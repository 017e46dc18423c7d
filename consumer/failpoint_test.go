//go:build failpoints

package consumer

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/failpoint"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
)

// TestFailpoints breaks a worker at every step of a request's way, by an error, by a
// panic and by the end of its process, five times each: nothing is lost and
// nothing has two outcomes.
func TestFailpoints(t *testing.T) {
	hits := map[failpoint.Point]int64{}
	for _, point := range failpoint.Points {
		for _, action := range []string{"error", "panic", "kill"} {
			for n := range 5 {
				natsservertest.Simulate(t, func(t *testing.T) {
					hit, found := breakAt(t, point, action, uint64(n))
					hits[point] += hit
					for _, f := range found {
						t.Errorf("%s at %s, run %d: %s", action, point, n, f)
					}
				})
			}
		}
	}
	for _, point := range failpoint.Points {
		if hits[point] == 0 {
			t.Errorf("nothing passes the failpoint %s", point)
		}
	}
}

// breakAt runs one worker at a time, and breaks it the second and third time that it passes a point.
func breakAt(t *testing.T, point failpoint.Point, action string, seed uint64) (hit int64, found []string) {
	w := newWorld(t, seed)
	defer failpoint.Set(nil)
	ctx, cancel := context.WithCancel(t.Context())
	var helpers sync.WaitGroup
	defer helpers.Wait()
	defer cancel()
	helpers.Go(func() { w.expireLeases(ctx) })

	var mu sync.Mutex
	calls := map[string]int{}
	w.answer = func(ctx context.Context, _ *simWorker, req *publisher.Request) classify.Answer {
		sleep(ctx, 100*time.Millisecond)
		mu.Lock()
		calls[req.ID]++
		again := calls[req.ID] > 1
		mu.Unlock()
		// Every kind of fate, by the request's number.
		switch last := req.ID[len(req.ID)-1]; {
		case last == '1':
			return answer(422)
		case again:
			return ok()
		case last == '2':
			return answer(429, "Retry-After", "3")
		case last == '3':
			return answer(503)
		}
		return ok()
	}

	var current atomic.Pointer[simWorker]
	crashes := make(chan struct{}, 16)
	kill := func() error {
		if s := current.Swap(nil); s != nil {
			s.crash()
			crashes <- struct{}{}
		}
		return failpoint.ErrInjected // what still runs of it cannot reach anybody
	}
	helpers.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-crashes:
				w.fault()
				current.Store(w.start())
			}
		}
	})
	do := failpoint.Actions[action]
	switch {
	case action == "kill", action == "panic" && (point == failpoint.Renew || point == failpoint.Release):
		do = kill // a panic outside of a request's handling ends the process
	}
	var passed atomic.Int64
	failpoint.Set(func(at failpoint.Point, id string) error {
		if at != point {
			return nil
		}
		if n := passed.Add(1); n != 2 && n != 3 {
			return nil
		}
		w.fault()
		if at == failpoint.Called {
			w.unheard(id)
		}
		return do()
	})

	current.Store(w.start())
	for n := range 20 {
		operation := "send"
		if n%4 == 0 {
			operation = "pay"
		}
		w.publishAs(fmt.Sprintf("r-%d", n), fmt.Sprintf("c%d", n%4), operation)
	}
	sleep(ctx, 500*time.Millisecond)
	_ = kill() // there are redeliveries in any case
	sleep(ctx, 45*time.Second)
	if s := current.Swap(nil); s != nil { // and a hand-over in good order
		s.stop()
	}
	current.Store(w.start())
	w.drained(nil, time.Hour)
	sleep(ctx, time.Minute)
	if missing, err := w.check(); err != nil || missing != "" {
		w.violation("at the end: %s (%v)", missing, err)
	}
	failpoint.Set(nil)
	cancel()
	if s := current.Swap(nil); s != nil {
		s.stop()
	}
	w.judge()
	return passed.Load(), w.found
}

// unheard says that the answer that a call of id gets now is lost on its way: nobody
// knows of the window that it opened.
func (w *world) unheard(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for creator, all := range w.windows {
		w.windows[creator] = slices.DeleteFunc(all, func(win window) bool { return win.request == id && win.from.Equal(time.Now()) })
	}
}

// A dead letter whose ack got lost and that somebody has deleted since, or replayed, does
// not come back with its request's redelivery.
func TestDeletedLetterAfterALostAck(t *testing.T) {
	natsservertest.Simulate(t, func(t *testing.T) {
		r := newRig(t, nil)
		r.api = func(context.Context, *publisher.Request) classify.Answer { return answer(422) }
		var lost atomic.Bool
		failpoint.Set(func(at failpoint.Point, _ string) error {
			if at == failpoint.Ack && !lost.Load() {
				return failpoint.ErrInjected
			}
			return nil
		})
		defer failpoint.Set(nil)
		_, stop := r.work()
		defer stop()
		r.publish("alice", 1)
		r.await(time.Minute, "DLQ", "dlq.VALIDATION.alice.>", 1)
		dlq, err := r.js.Stream(t.Context(), "DLQ")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(22 * time.Minute) // the server does not know its id any more
		if err := dlq.Purge(t.Context()); err != nil {
			t.Fatal(err)
		}
		if r.count("REQUESTS", ">") != 1 {
			t.Fatal("it was acked")
		}
		lost.Store(true)
		for began := time.Now(); r.count("REQUESTS", ">") > 0; time.Sleep(time.Second) {
			if time.Since(began) > 10*time.Minute {
				t.Fatal("it is still stored")
			}
		}
		if n := r.count("DLQ", "dlq.>"); n != 0 {
			t.Errorf("%d dead letters came back", n)
		}
		if n := len(r.called("alice")); n != 1 {
			t.Errorf("%d calls", n)
		}
	})
}
