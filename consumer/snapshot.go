package consumer

import (
	"context"
	"fmt"
	"time"

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
		InFlight: w.gates.InFlight(), Near: int(w.near.Load()),
		Breakers: map[string]int{}, Held: map[string]int{},
		Backlog: int(w.backlog.Load()),
		Credits: w.credits.of(now).Spent, CreditsPerDay: w.cfg.Credits.PerDay,
	}
	if at := w.oldest.Load(); at != 0 {
		s.Oldest = now.Sub(time.Unix(0, at))
	}
	if no, blocked := w.gates.Blocked(now); blocked {
		s.Account = no.Reason == resilience.ReasonAccountHold
		s.Provider = !s.Account
	}
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
	if !w.nc.IsConnected() {
		return fmt.Errorf("not connected to NATS")
	}
	w.members.mu.Lock()
	defer w.members.mu.Unlock()
	if w.members.left {
		return fmt.Errorf("stopping")
	}
	if age := time.Since(w.members.confirmed); age > leaseTTL {
		return fmt.Errorf("its leases have not been renewed lately")
	}
	return nil
}

// watchBacklog looks at the request stream now and then.
func (w *Worker) watchBacklog(ctx context.Context) {
	t := time.NewTicker(backlogEvery)
	defer t.Stop()
	for {
		short, cancel := context.WithTimeout(ctx, backlogEvery)
		if info, err := w.stream.Info(short); err == nil {
			w.backlog.Store(int64(info.State.Msgs))
			w.oldest.Store(0)
			if info.State.Msgs > 0 {
				w.oldest.Store(info.State.FirstTime.UnixNano())
			}
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
