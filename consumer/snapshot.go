package consumer

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/control"
	"github.com/headgate-io/headgate/resilience"
)

// Snapshot is a worker at a moment, counted.
type Snapshot struct {
	Partitions int            `json:"partitions"`
	InFlight   int            `json:"in_flight"`
	Near       int            `json:"waiting"`  // messages in the worker
	Parked     int            `json:"parked"`   // and at the server, for a turn
	Creators   int            `json:"creators"` // that are remembered
	Breakers   map[string]int `json:"breakers"` // creators by state of their breaker
	Held       map[string]int `json:"held"`     // creators by the class of the answer, or "operator"
	Account    bool           `json:"account"`  // is held
	Provider   bool           `json:"provider"` // is held, or its breaker is open

	Credits       float64 `json:"credits"`         // that the fleet has used today (UTC)
	CreditsPerDay float64 `json:"credits_per_day"` // 0: no limit

	Backlog int           `json:"backlog"`   // requests stored, over all workers
	Oldest  time.Duration `json:"oldest_ns"` // since the oldest of them was stored
}

// heldByOperator stands in Snapshot.Held for holds that no answer caused.
const heldByOperator = "operator"

// Snapshot counts. The backlog is as of a few seconds ago.
func (w *Worker) Snapshot() Snapshot {
	now := time.Now()
	s := Snapshot{
		InFlight: w.shared.gates.InFlight(), Near: int(w.shared.memory.count.Load()),
		Breakers: map[string]int{}, Held: map[string]int{},
		Backlog: int(w.backlog.stored.Load()),
		Credits: w.credits.of(now).Spent, CreditsPerDay: w.cfg.Credits.PerDay,
	}
	if at := w.backlog.oldest.Load(); at != 0 {
		s.Oldest = now.Sub(time.Unix(0, at))
	}
	gates := w.shared.gates
	s.Account = gates.AccountHeld(now) != nil
	s.Provider = gates.ProviderHeld(now) != nil || gates.ProviderOpen()
	for _, p := range w.partitions {
		p.mu.Lock()
		if p.active {
			s.Partitions++
		}
		for _, c := range p.creators {
			s.Creators++
			s.Parked += len(c.parked)
			status := c.gate.Status(now, resilience.Read)
			s.Breakers[string(status.Breaker)]++
			if h := status.Hold; h != nil {
				class := string(h.Class)
				if class == "" {
					class = heldByOperator
				}
				s.Held[class]++
			}
		}
		p.mu.Unlock()
	}
	return s
}

// Ready says what keeps the worker from working, nil if nothing does.
func (w *Worker) Ready() error {
	if err := w.keeper.Ready(); err != nil {
		return err
	}
	if w.shared.stuck() {
		return errors.New("outcomes cannot be stored; see the log, and run `headgate doctor`")
	}
	return nil
}

// backlog is the state of the request stream, as of a few seconds ago.
type backlog struct {
	stored, oldest atomic.Int64 // messages, and when the first was stored in Unix nanoseconds
	created        time.Time    // of the stream
	last           uint64       // its last sequence
}

// watchBacklog looks at the request stream now and then.
func (w *Worker) watchBacklog(ctx context.Context) {
	t := time.NewTicker(backlogEvery)
	defer t.Stop()
	for {
		short, cancel := context.WithTimeout(ctx, backlogEvery)
		if info, err := w.server.stream.Info(short); err == nil {
			w.backlog.stored.Store(int64(info.State.Msgs))
			w.backlog.oldest.Store(0)
			if info.State.Msgs > 0 {
				w.backlog.oldest.Store(info.State.FirstTime.UnixNano())
			}
			w.restored(short, info)
		}
		cancel()
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

const backlogEvery = 10 * time.Second

// restored notices that the request stream was put back to an older state, from a backup: requests that
// were settled since are stored again, and would be called again.
func (w *Worker) restored(ctx context.Context, info *jetstream.StreamInfo) {
	b, last := &w.backlog, info.State.LastSeq
	// A stream that was restored by the server's API is as old as its restoration, and its messages
	// are older. One that was made again is empty at first.
	copied := info.State.Msgs > 0 && info.State.FirstTime.Before(info.Created)
	older := last < b.last && (copied || b.created.Equal(info.Created))
	b.created, b.last = info.Created, last
	if !older {
		return
	}
	h := resilience.Hold{
		Since: time.Now(), Who: w.cfg.Name, Class: classify.Internal,
		Reason: "the stream " + w.server.name + " was restored from an older copy: requests that had an outcome may be stored again, and would be called again",
	}
	w.log.Error().Uint64("last_seq", last).Msg(h.Reason + "; the account is held until it is released")
	if w.shared.gates.HoldAccount(resilience.ByAPI, h) {
		if err := w.holds.Put(ctx, control.Target{Kind: control.Account}, h); err != nil {
			w.log.Error().Err(err).Msg("the account's hold is known to this worker only, until it can be stored; trying again")
		}
	}
}
