package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"github.com/headgate-io/headgate/consumer"
	"github.com/headgate-io/headgate/internal/ownership"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// answerWithin is for how long workers are waited for.
const answerWithin = 800 * time.Millisecond

// creatorWhy is why a creator waits, and what is stored of it.
type creatorWhy struct {
	consumer.Why
	Stored      uint64            `json:"stored"` // requests, by operation below
	Operations  map[string]uint64 `json:"operations,omitempty"`
	DeadLetters map[string]uint64 `json:"dead_letters,omitempty"` // by class
}

func whyCommand() *cobra.Command {
	var output, request string
	cmd := &cobra.Command{
		Use:   "why [CREATOR]",
		Short: "Say why a creator's requests, or one of them, wait, until when, and what a person must do",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (request == "") != (len(args) == 1) {
				return exitError{exitUsage, errors.New("name a creator, or --request and the request's id")}
			}
			s, err := openSession(cmd)
			if err != nil {
				return err
			}
			defer s.Close()
			var y creatorWhy
			if request != "" {
				y, err = whyRequest(cmd.Context(), s, request)
			} else {
				y, err = why(cmd.Context(), s, args[0])
			}
			if err != nil {
				return err
			}
			switch output {
			case "json", "jsonl":
				return json.NewEncoder(cmd.OutOrStdout()).Encode(y)
			case "table":
				printWhy(cmd.OutOrStdout(), y)
				return nil
			}
			return exitError{exitUsage, fmt.Errorf("unknown output %q; there are table, json and jsonl", output)}
		},
	}
	cmd.Flags().StringVar(&request, "request", "", "a request's `id`, instead of a creator")
	outputFlag(cmd, &output)
	return cmd
}

// whyRequest is why one request waits, or what became of it.
func whyRequest(ctx context.Context, s *session, id string) (creatorWhy, error) {
	ns := s.topology().Namespace
	n, err := liveWorkers(ctx, s)
	if err != nil {
		return creatorWhy{}, err
	}
	answers, err := ask[consumer.Why](s, "request."+publisher.IDToken(id), "", 1, answerWithin)
	if err != nil && !errors.Is(err, errNobody) {
		return creatorWhy{}, err
	}
	if len(answers) == 1 {
		return creatorWhy{Why: answers[0]}, nil
	}
	y := creatorWhy{Why: consumer.Why{Request: id}}
	found, err := s.outcomeOf(ctx, id, &y)
	if err != nil || found {
		return y, err
	}
	ledger := ns.Stream(publisher.Ledger)
	records, err := subjectsOf(ctx, s.js, "KV_"+ledger, "$KV."+ledger+".*."+publisher.IDToken(id))
	switch {
	case err != nil:
		return y, err
	case len(records) > 0:
		y.Text = "it was called and is waiting; no worker has it at the moment"
	default:
		y.Text = fmt.Sprintf("no outcome is stored, and none of %d workers has it: it waits to be delivered, its outcome is too old to be kept, or it was never published", n)
	}
	return y, nil
}

// outcomeOf looks for the outcome of a request that no worker knows.
func (s *session) outcomeOf(ctx context.Context, id string, y *creatorWhy) (found bool, err error) {
	ns := s.topology().Namespace
	letters, err := subjectsOf(ctx, s.js, ns.Stream(publisher.DLQ), ns.Subject("dlq", "*", "*", "*", publisher.IDToken(id)))
	if err != nil {
		return false, err
	}
	for subject := range letters {
		y.Creator = creatorIn(subject)
		y.Text = "it is a dead letter: headgate dlq show " + id
		return true, nil
	}
	results, err := subjectsOf(ctx, s.js, ns.Stream(publisher.Results), ns.Subject("results", "*", "*", publisher.IDToken(id)))
	if err != nil {
		return false, err
	}
	for subject := range results {
		y.Creator = creatorIn(subject)
		stream, err := s.js.Stream(ctx, ns.Stream(publisher.Results))
		if err != nil {
			return false, fmt.Errorf("look at stream %s: %w", ns.Stream(publisher.Results), err)
		}
		m, err := stream.GetLastMsgForSubject(ctx, subject)
		if err != nil {
			return false, fmt.Errorf("look at its outcome: %w", err)
		}
		if class := m.Header.Get(publisher.HeaderDeadLetter); class != "" {
			y.Text = fmt.Sprintf("it was a dead letter (%s, %s), which has been deleted or replayed since", class, m.Time.UTC().Format(time.RFC3339))
		} else {
			y.Text = fmt.Sprintf("it has its result: nats stream get %s --last-for %s", ns.Stream(publisher.Results), subject)
		}
		return true, nil
	}
	return false, nil
}

// creatorIn is the creator that the subject of an outcome names.
func creatorIn(subject string) string {
	tokens := strings.Split(subject, ".")
	name, _ := publisher.DecodeToken(tokens[len(tokens)-3])
	return name
}

// reasonNobody: there is no worker that calls for the creator.
const reasonNobody resilience.Reason = "no_worker"

func why(ctx context.Context, s *session, creator string) (creatorWhy, error) {
	token, err := publisher.EncodeToken(creator)
	if err != nil {
		return creatorWhy{}, exitError{exitUsage, fmt.Errorf("creator: %w", err)}
	}
	y := creatorWhy{Operations: map[string]uint64{}, DeadLetters: map[string]uint64{}}
	answers, err := ask[consumer.Why](s, "why."+token, "", 1, answerWithin)
	switch {
	case errors.Is(err, errNobody):
		y.Why = consumer.Why{Creator: creator, Reason: reasonNobody, Text: "no worker answers", Action: "start one: headgate run"}
	case err != nil:
		return y, err
	case len(answers) == 0:
		y.Why = consumer.Why{Creator: creator, Reason: reasonNobody, Text: "no worker owns its partition at the moment, or the one that does has not answered", Action: "headgate workers shows who owns what; look at their logs"}
	default:
		y.Why = answers[0]
	}
	ns := s.topology().Namespace
	requests, err := subjectsOf(ctx, s.js, ns.Stream(publisher.Requests), ns.Subject("requests", "*", token, "*"))
	if err != nil {
		return y, err
	}
	for subject, n := range requests {
		y.Stored += n
		operation := subject[strings.LastIndexByte(subject, '.')+1:]
		if name, err := publisher.DecodeToken(operation); err == nil {
			operation = name
		}
		y.Operations[operation] += n
	}
	letters, err := subjectsOf(ctx, s.js, ns.Stream(publisher.DLQ), ns.Subject("dlq", "*", token, ">"))
	if err != nil {
		return y, err
	}
	for subject, n := range letters {
		y.DeadLetters[strings.Split(strings.TrimPrefix(subject, ns.Subject("dlq")+"."), ".")[0]] += n
	}
	return y, nil
}

// subjectsOf counts a stream's messages by subject.
func subjectsOf(ctx context.Context, js jetstream.JetStream, stream, filter string) (map[string]uint64, error) {
	st, err := js.Stream(ctx, stream)
	if err != nil {
		return nil, fmt.Errorf("look at stream %s (has `headgate setup` been run?): %w", stream, err)
	}
	info, err := st.Info(ctx, jetstream.WithSubjectFilter(filter))
	if err != nil {
		return nil, fmt.Errorf("look at stream %s: %w", stream, err)
	}
	return info.State.Subjects, nil
}

// printWhy writes it for people.
func printWhy(w io.Writer, y creatorWhy) {
	name := y.Creator
	if y.Request != "" {
		name = strings.TrimSpace(y.Creator + " " + y.Request)
	}
	fmt.Fprintf(w, "%s: %s\n", name, y.Text)
	if y.Until != nil {
		fmt.Fprintf(w, "until:    %s (%s)\n", y.Until.Local().Format(time.DateTime), about(time.Until(*y.Until)))
	}
	if y.Action != "" {
		fmt.Fprintf(w, "to do:    %s\n", y.Action)
	}
	if y.Request != "" {
		if y.Attempts > 0 {
			fmt.Fprintf(w, "attempts: %d so far\n", y.Attempts)
		}
		return
	}
	fmt.Fprintf(w, "requests: %d stored; %d in flight, %d waiting in the worker, %d for their turn", y.Stored, y.InFlight, y.Waiting, y.Parked)
	if y.Retrying > 0 {
		fmt.Fprintf(w, ", %d of them after a failed call (up to %d so far)", y.Retrying, y.Attempts)
	}
	if fmt.Fprintln(w); y.Worker != "" {
		fmt.Fprintf(w, "worker:   %s\n", y.Worker)
	}
	if len(y.Operations) > 1 {
		fmt.Fprintf(w, "          %s\n", counts(y.Operations))
	}
	if len(y.DeadLetters) > 0 {
		fmt.Fprintf(w, "dead:     %s\n", counts(y.DeadLetters))
	}
	for _, a := range y.Failures {
		fmt.Fprintf(w, "failed:   %s %s", a.At.Local().Format(time.DateTime), a.Class)
		if a.Status != 0 {
			fmt.Fprintf(w, " (status %d", a.Status)
			if a.Code != "" {
				fmt.Fprintf(w, ", %s", a.Code)
			}
			fmt.Fprint(w, ")")
		}
		fmt.Fprintln(w)
	}
}

func counts(m map[string]uint64) string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int {
		if m[a] != m[b] {
			return int(min(m[b], 1<<30)) - int(min(m[a], 1<<30))
		}
		return strings.Compare(a, b)
	})
	var parts []string
	for _, name := range names {
		parts = append(parts, fmt.Sprintf("%d %s", m[name], name))
	}
	return strings.Join(parts, ", ")
}

func about(d time.Duration) string {
	switch {
	case d < 0:
		return "now"
	case d < time.Minute:
		return "in " + d.Round(time.Second).String()
	}
	return "in " + strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
}

func creatorsCommand() *cobra.Command {
	var output string
	limit := defaultCreators
	cmd := &cobra.Command{
		Use:       "creators [ls]",
		Short:     "List the creators that wait for something, the worst first",
		Args:      cobra.MatchAll(cobra.MaximumNArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []string{"ls"},
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := openSession(cmd)
			if err != nil {
				return err
			}
			defer s.Close()
			if limit < 1 || limit > maxCreators {
				return exitError{exitUsage, fmt.Errorf("--limit must be 1 to %d, not %d", maxCreators, limit)}
			}
			n, err := liveWorkers(cmd.Context(), s)
			if err != nil {
				return err
			}
			answers, err := ask[[]consumer.Why](s, "creators", fmt.Sprint(limit), n, answerWithin)
			if err != nil {
				return err
			}
			header := table.Row{"creator", "why", "until", "in flight", "waiting", "retrying", "to do"}
			return write(cmd.OutOrStdout(), output, consumer.MostUrgent(slices.Concat(answers...), limit), header, func(y consumer.Why) table.Row {
				until := ""
				if y.Until != nil {
					until = about(time.Until(*y.Until))
				}
				return table.Row{y.Creator, y.Text, until, y.InFlight, y.Waiting + y.Parked, y.Retrying, y.Action}
			})
		},
	}
	cmd.Flags().IntVar(&limit, "limit", limit, "how many")
	outputFlag(cmd, &output)
	return cmd
}

func liveWorkers(ctx context.Context, s *session) (int, error) {
	kv, err := s.bucket(ctx, publisher.Owners)
	if err != nil {
		return 0, err
	}
	owners, err := ownership.Owners(ctx, kv)
	return max(1, len(owners)), err
}
