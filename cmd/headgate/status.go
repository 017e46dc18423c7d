package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
)

// fleetStatus is all of it on one screen.
type fleetStatus struct {
	Requests    float64           `json:"requests_per_s"`
	Results     float64           `json:"results_per_s"`
	Letters     float64           `json:"dead_letters_per_s"`
	Backlog     uint64            `json:"backlog"`
	Oldest      float64           `json:"oldest_s"`
	InFlight    int               `json:"in_flight"`
	Waiting     int               `json:"waiting"`
	Parked      int               `json:"parked"`
	Creators    int               `json:"creators"`
	Held        map[string]uint64 `json:"held"`
	Breakers    map[string]uint64 `json:"breakers"`
	Account     bool              `json:"account_held"`
	Provider    bool              `json:"provider_held"`
	Credits     float64           `json:"credits_used_today"`
	PerDay      float64           `json:"credits_per_day,omitempty"`
	DeadLetters map[string]uint64 `json:"dead_letters"`
	Workers     []workerStatus    `json:"workers"`
	Missing     int               `json:"workers_without_answer,omitempty"`
}

func statusCommand() *cobra.Command {
	var output string
	var watch time.Duration
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show throughput, backlog, holds, breakers, dead letters and workers on one screen",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains([]string{"table", "json", "jsonl"}, output) {
				return exitError{exitUsage, fmt.Errorf("unknown output %q; there are table, json and jsonl", output)}
			}
			s, err := openSession(cmd)
			if err != nil {
				return err
			}
			defer s.Close()
			for {
				status, err := lookAround(cmd.Context(), s)
				if err != nil {
					return err
				}
				if output == "table" {
					if watch > 0 {
						fmt.Fprint(cmd.OutOrStdout(), "\x1b[H\x1b[2J")
					}
					status.print(cmd.OutOrStdout())
				} else if err := json.NewEncoder(cmd.OutOrStdout()).Encode(status); err != nil {
					return err
				}
				if watch <= 0 {
					return nil
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(watch):
				}
			}
		},
	}
	cmd.Flags().DurationVar(&watch, "watch", 0, "look again after so long, until Ctrl-C")
	cmd.Flags().Lookup("watch").NoOptDefVal = "2s"
	outputFlag(cmd, &output)
	return cmd
}

// sampled is for how long throughput is looked at.
const sampled = 500 * time.Millisecond

func lookAround(ctx context.Context, s *session) (fleetStatus, error) {
	f := fleetStatus{Held: map[string]uint64{}, Breakers: map[string]uint64{}, DeadLetters: map[string]uint64{}}
	ns := s.topology().Namespace
	streams := []struct {
		name string
		rate *float64
		last uint64
	}{{publisher.Requests, &f.Requests, 0}, {publisher.Results, &f.Results, 0}, {publisher.DLQ, &f.Letters, 0}}
	state := func(name string) (jetstream.StreamState, error) {
		st, err := s.js.Stream(ctx, ns.Stream(name))
		if err != nil {
			return jetstream.StreamState{}, fmt.Errorf("look at stream %s (has `headgate setup` been run?): %w", ns.Stream(name), err)
		}
		return st.CachedInfo().State, nil
	}
	began := time.Now()
	for i := range streams {
		st, err := state(streams[i].name)
		if err != nil {
			return f, err
		}
		streams[i].last = st.LastSeq
		if streams[i].name == publisher.Requests {
			f.Backlog = st.Msgs
			if st.Msgs > 0 {
				f.Oldest = time.Since(st.FirstTime).Seconds()
			}
		}
	}
	n, err := liveWorkers(ctx, s)
	if err != nil {
		return f, err
	}
	f.Workers, err = ask[workerStatus](s, "status", "", n, answerWithin)
	if err != nil && !errors.Is(err, errNobody) {
		return f, err
	}
	f.Missing = n - len(f.Workers)
	for _, w := range f.Workers {
		f.InFlight += w.InFlight
		f.Waiting += w.Near
		f.Parked += w.Parked
		f.Creators += w.Creators
		f.Account = f.Account || w.Account
		f.Credits, f.PerDay = max(f.Credits, w.Credits), max(f.PerDay, w.CreditsPerDay)
		f.Provider = f.Provider || w.Provider
		for class, n := range w.Held {
			f.Held[class] += uint64(n)
		}
		for state, n := range w.Breakers {
			f.Breakers[state] += uint64(n)
		}
	}
	if f.DeadLetters, err = byClass(ctx, s); err != nil {
		return f, err
	}
	if rest := sampled - time.Since(began); rest > 0 {
		select {
		case <-ctx.Done():
			return f, ctx.Err()
		case <-time.After(rest):
		}
	}
	for _, stream := range streams {
		st, err := state(stream.name)
		if err != nil {
			return f, err
		}
		*stream.rate = float64(st.LastSeq-stream.last) / time.Since(began).Seconds()
	}
	f.Results = max(f.Results-f.Letters, 0) // a dead letter's tombstone takes a sequence of RESULTS
	return f, nil
}

// byClass counts dead letters. The server counts what a consumer would get, however
// many there are, without a list of their subjects.
func byClass(ctx context.Context, s *session) (map[string]uint64, error) {
	ns := s.topology().Namespace
	counts := map[string]uint64{}
	for _, class := range classify.Classes() {
		c, err := s.js.CreateConsumer(ctx, ns.Stream(publisher.DLQ), jetstream.ConsumerConfig{
			AckPolicy: jetstream.AckNonePolicy, FilterSubject: ns.Subject("dlq", string(class), ">"), MemoryStorage: true, Replicas: 1,
			InactiveThreshold: 5 * time.Second,
		})
		if err != nil {
			return nil, fmt.Errorf("count dead letters: %w", err)
		}
		info := c.CachedInfo()
		if info.NumPending > 0 {
			counts[string(class)] = info.NumPending
		}
		_ = s.js.DeleteConsumer(ctx, ns.Stream(publisher.DLQ), info.Name)
	}
	return counts, nil
}

func (f *fleetStatus) print(w io.Writer) {
	or := func(text, otherwise string) string {
		if text == "" {
			return otherwise
		}
		return text
	}
	fmt.Fprintf(w, "in          %.0f requests/s\n", f.Requests)
	fmt.Fprintf(w, "out         %.0f results/s, %.0f dead letters/s\n", f.Results, f.Letters)
	fmt.Fprintf(w, "backlog     %d requests", f.Backlog)
	if f.Backlog > 0 {
		fmt.Fprintf(w, ", the oldest %s old", time.Duration(f.Oldest*float64(time.Second)).Round(time.Second))
	}
	fmt.Fprintf(w, "\n            %d in flight, %d waiting in workers, %d for their turn\n", f.InFlight, f.Waiting, f.Parked)
	if f.Account {
		fmt.Fprintln(w, "ACCOUNT     held: no creator is called; `headgate why` of any creator says why")
	}
	if f.Provider {
		fmt.Fprintln(w, "PROVIDER    held, or its circuit breaker is open: creators are called now and then only, to find out whether it is back")
	}
	fmt.Fprintf(w, "held        %s\n", or(counts(f.Held), "none"))
	maps.DeleteFunc(f.Breakers, func(state string, _ uint64) bool { return state == "closed" })
	fmt.Fprintf(w, "breakers    %s\n", or(counts(f.Breakers), "all closed"))
	fmt.Fprintf(w, "dead        %s\n", or(counts(f.DeadLetters), "none"))
	if f.Credits > 0 {
		fmt.Fprintf(w, "credits     %.0f used today (UTC)", f.Credits)
		if f.PerDay > 0 {
			fmt.Fprintf(w, " of %.0f", f.PerDay)
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "workers     %d", len(f.Workers))
	if f.Missing > 0 {
		fmt.Fprintf(w, ", and %d that do not answer", f.Missing)
	}
	fmt.Fprintln(w)
	for _, worker := range f.Workers {
		fmt.Fprintf(w, "            %s: %d partitions, %d in flight, %d creators\n", worker.Worker, worker.Partitions, worker.InFlight, worker.Creators)
	}
}
