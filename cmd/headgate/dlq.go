package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/dlq"
	"github.com/headgate-io/headgate/internal/telemetry"
)

func dlqCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "dlq",
		Short: "Look at dead letters, and send them through again",
		Long: `Look at dead letters, and send their requests through again. A replayed request goes
to the end of its creator's line, and through its creator's own limits.`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(dlqListCommand(), dlqShowCommand(), dlqStatsCommand(), dlqReplayCommand(), dlqDropCommand(), dlqExportCommand())
	return cmd
}

// filterFlags are those of every dlq command that looks for letters.
func filterFlags(cmd *cobra.Command) func() (dlq.Filter, error) {
	var f dlq.Filter
	var class, since, until string
	flags := cmd.Flags()
	flags.StringVar(&class, "class", "", "such as VALIDATION")
	flags.StringVar(&f.Code, "code", "", "the provider's own code")
	flags.StringVar(&f.Creator, "creator", "", "")
	flags.StringVar(&f.Operation, "operation", "", "")
	flags.IntVar(&f.Status, "status", 0, "HTTP status of the API's answer")
	flags.StringVar(&since, "since", "", "not older than: RFC 3339, or so long ago, such as 2h")
	flags.StringVar(&until, "until", "", "older than, likewise")
	return func() (dlq.Filter, error) {
		f.Class = classify.Class(strings.ToUpper(class))
		for name, at := range map[string]struct {
			text   string
			target *time.Time
		}{"since": {since, &f.Since}, "until": {until, &f.Until}} {
			if at.text == "" {
				continue
			}
			if d, err := time.ParseDuration(at.text); err == nil {
				*at.target = time.Now().Add(-d)
			} else if *at.target, err = time.Parse(time.RFC3339, at.text); err != nil {
				return f, exitError{exitUsage, fmt.Errorf("--%s %q is neither a duration (2h) nor an RFC 3339 time", name, at.text)}
			}
		}
		return f, nil
	}
}

// openBox is what every dlq command begins with.
func openBox(cmd *cobra.Command) (*session, *dlq.Box, error) {
	s, err := openSession(cmd)
	if err != nil {
		return nil, nil, err
	}
	box, err := dlq.Open(cmd.Context(), s.js, s.topology().Namespace)
	if err != nil {
		s.Close()
		return nil, nil, err
	}
	return s, box, nil
}

func dlqListCommand() *cobra.Command {
	var output string
	limit := 100
	cmd := &cobra.Command{Use: "ls", Short: "List dead letters, the oldest first", Args: cobra.NoArgs}
	filter := filterFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		f, err := filter()
		if err != nil {
			return err
		}
		s, box, err := openBox(cmd)
		if err != nil {
			return err
		}
		defer s.Close()
		var letters []dlq.Letter
		errEnough := errors.New("enough")
		err = box.Each(cmd.Context(), f, false, func(l dlq.Letter) error {
			l.Header = nil
			letters = append(letters, l)
			if limit > 0 && len(letters) == limit {
				return errEnough
			}
			return nil
		})
		if err != nil && !errors.Is(err, errEnough) {
			return err
		}
		header := table.Row{"stored", "class", "creator", "operation", "request", "status", "calls", "reason"}
		if err := write(cmd.OutOrStdout(), output, letters, header, func(l dlq.Letter) table.Row {
			return table.Row{l.Stored.Local().Format(time.DateTime), l.Class, l.Creator, l.Operation, l.RequestID, l.Status, l.Attempts, l.Reason}
		}); err != nil {
			return err
		}
		if errors.Is(err, errEnough) {
			fmt.Fprintf(cmd.ErrOrStderr(), "only the first %d; --limit 0 shows all\n", limit)
		}
		return nil
	}
	cmd.Flags().IntVar(&limit, "limit", limit, "how many; 0: all")
	outputFlag(cmd, &output)
	return cmd
}

func dlqShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "show REQUEST",
		Short: "Show one dead letter with its headers, history and payload, as JSON",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, box, err := openBox(cmd)
			if err != nil {
				return err
			}
			defer s.Close()
			l, err := box.Get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			e := json.NewEncoder(cmd.OutOrStdout())
			e.SetIndent("", "  ")
			return e.Encode(exported(l))
		},
	}
}

// exportedLetter is a letter with a payload that people can read, if it is JSON or text.
type exportedLetter struct {
	dlq.Letter
	Payload any `json:"payload,omitempty"`
}

func exported(l dlq.Letter) exportedLetter {
	e := exportedLetter{Letter: l}
	switch {
	case len(l.Payload) == 0:
	case json.Valid(l.Payload):
		e.Payload = json.RawMessage(l.Payload)
	default:
		e.Payload = l.Payload // base64
	}
	return e
}

func dlqExportCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "export", Short: "Write dead letters with payloads, one JSON object a line", Args: cobra.NoArgs}
	filter := filterFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		f, err := filter()
		if err != nil {
			return err
		}
		s, box, err := openBox(cmd)
		if err != nil {
			return err
		}
		defer s.Close()
		e := json.NewEncoder(cmd.OutOrStdout())
		return box.Each(cmd.Context(), f, true, func(l dlq.Letter) error { return e.Encode(exported(l)) })
	}
	return cmd
}

// letterStat counts letters that are alike.
type letterStat struct {
	Class    classify.Class `json:"class"`
	Code     string         `json:"code,omitempty"`
	Letters  int            `json:"letters"`
	Creators int            `json:"creators"`
	Oldest   time.Time      `json:"oldest"`
	Latest   time.Time      `json:"latest"`
	Action   string         `json:"action,omitempty"`

	creators map[string]bool
}

func dlqStatsCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{Use: "stats", Short: "Count dead letters by class and code", Args: cobra.NoArgs}
	filter := filterFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		f, err := filter()
		if err != nil {
			return err
		}
		s, box, err := openBox(cmd)
		if err != nil {
			return err
		}
		defer s.Close()
		stats, err := statistics(cmd.Context(), box, f, nil)
		if err != nil {
			return err
		}
		return writeStats(cmd.OutOrStdout(), output, stats)
	}
	outputFlag(cmd, &output)
	return cmd
}

func statistics(ctx context.Context, box *dlq.Box, f dlq.Filter, selects func(dlq.Letter) bool) ([]letterStat, error) {
	all := map[string]*letterStat{}
	err := box.Each(ctx, f, false, func(l dlq.Letter) error {
		if selects != nil && !selects(l) {
			return nil
		}
		key := string(l.Class) + " " + l.Code
		st := all[key]
		if st == nil {
			st = &letterStat{Class: l.Class, Code: l.Code, Oldest: l.Stored, Action: l.Action, creators: map[string]bool{}}
			all[key] = st
		}
		st.Letters++
		st.Latest = l.Stored
		st.creators[l.Creator] = true
		return nil
	})
	stats := []letterStat{}
	for st := range maps.Values(all) {
		st.Creators = len(st.creators)
		stats = append(stats, *st)
	}
	slices.SortFunc(stats, func(a, b letterStat) int {
		return cmp.Or(cmp.Compare(b.Letters, a.Letters), cmp.Compare(a.Class, b.Class), cmp.Compare(a.Code, b.Code))
	})
	return stats, err
}

func writeStats(w io.Writer, output string, stats []letterStat) error {
	header := table.Row{"class", "code", "letters", "creators", "oldest", "latest", "to do"}
	return write(w, output, stats, header, func(s letterStat) table.Row {
		return table.Row{s.Class, s.Code, s.Letters, s.Creators, s.Oldest.Local().Format(time.DateTime), s.Latest.Local().Format(time.DateTime), s.Action}
	})
}

func dlqReplayCommand() *cobra.Command {
	r := dlq.Replay{MaxReplays: 3}
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "replay",
		Short: "Send dead letters' requests through again, and delete the letters",
		Long: `Send dead letters' requests through again, and delete the letters. A request is
published once under an id of its own (<id>~r1, ~r2, …), so the command may be
stopped, started again, and run in two places. It stops by itself when what it replayed
comes back with the same class.

UNCERTAIN and POISON are replayed only if --class names them: look first.`,
		Args: cobra.NoArgs,
	}
	filter := filterFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var err error
		if r.Filter, err = filter(); err != nil {
			return err
		}
		if r.Rate < 0 || r.MaxReplays < 1 {
			return exitError{exitUsage, errors.New("--rate must not be negative, and --max-replays at least 1")}
		}
		s, box, err := openBox(cmd)
		if err != nil {
			return err
		}
		defer s.Close()
		if dryRun {
			stats, err := statistics(cmd.Context(), box, r.Filter, r.Selects)
			if err != nil {
				return err
			}
			return writeStats(cmd.OutOrStdout(), "table", stats)
		}
		r.Progress = tellProgress(cmd.ErrOrStderr())
		r.Failed = func(l dlq.Letter, err error) {
			fmt.Fprintf(cmd.ErrOrStderr(), "request %q: %v\n", l.RequestID, err)
		}
		done, err := box.Replay(cmd.Context(), r)
		fmt.Fprintf(cmd.OutOrStdout(), "%d of %d dead letters replayed", done.Done, done.Of)
		if done.Skipped > 0 {
			fmt.Fprintf(cmd.OutOrStdout(), ", %d left (replayed %d times before, of a class that has to be named, or of a creator that cannot be read)", done.Skipped, r.MaxReplays)
		}
		if done.Failed > 0 {
			fmt.Fprintf(cmd.OutOrStdout(), ", %d cannot be replayed", done.Failed)
		}
		if done.CameBack > 0 {
			fmt.Fprintf(cmd.OutOrStdout(), ", %d came back with the same class", done.CameBack)
		}
		fmt.Fprintln(cmd.OutOrStdout())
		if err == nil && done.Failed > 0 {
			err = fmt.Errorf("%d dead letters cannot be replayed, and stay", done.Failed)
		}
		if err != nil {
			return exitError{exitPartly, err}
		}
		return nil
	}
	flags := cmd.Flags()
	flags.BoolVar(&dryRun, "dry-run", false, "count what would be replayed")
	flags.Float64Var(&r.Rate, "rate", 0, "requests a second; 0: as fast as the stream takes them")
	flags.IntVar(&r.MaxReplays, "max-replays", r.MaxReplays, "of one request, ever")
	flags.BoolVar(&r.KeepGoing, "keep-going", false, "although what was replayed comes back with the same class")
	return cmd
}

// tellProgress tells how far a replay is, and for how long it will go on.
func tellProgress(w io.Writer) func(dlq.Replayed) {
	began := time.Now()
	every := 5 * time.Second
	if telemetry.IsTerminal(w) {
		every = time.Second
	}
	var mu sync.Mutex
	told := began
	return func(done dlq.Replayed) {
		mu.Lock()
		defer mu.Unlock()
		now := time.Now()
		if now.Sub(told) < every {
			return
		}
		told = now
		perSecond := float64(done.Done) / now.Sub(began).Seconds()
		left := time.Duration(float64(done.Of-done.Done-done.Skipped-done.Failed) / perSecond * float64(time.Second))
		fmt.Fprintf(w, "%d of %d, %.0f/s, about %s left\n", done.Done, done.Of, perSecond, max(left, 0).Round(time.Second))
	}
}

func dlqDropCommand() *cobra.Command {
	var dryRun, yes bool
	cmd := &cobra.Command{Use: "drop", Short: "Delete dead letters for good", Args: cobra.NoArgs}
	filter := filterFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		f, err := filter()
		if err != nil {
			return err
		}
		s, box, err := openBox(cmd)
		if err != nil {
			return err
		}
		defer s.Close()
		stats, err := statistics(cmd.Context(), box, f, nil)
		if err != nil {
			return err
		}
		n := 0
		for _, st := range stats {
			n += st.Letters
		}
		if dryRun || n == 0 {
			return writeStats(cmd.OutOrStdout(), "table", stats)
		}
		if err := confirm(cmd, yes, fmt.Sprintf("Delete %d dead letters for good?", n)); err != nil {
			return err
		}
		dropped := 0
		err = box.Each(cmd.Context(), f, false, func(l dlq.Letter) error {
			dropped++
			return box.Drop(cmd.Context(), l)
		})
		fmt.Fprintf(cmd.OutOrStdout(), "%d dead letters deleted\n", dropped)
		return err
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "count what would be deleted")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return cmd
}

// confirm asks before something is destroyed. Without a terminal to ask on, --yes
// has to be given.
func confirm(cmd *cobra.Command, yes bool, question string) error {
	if yes {
		return nil
	}
	in, ok := cmd.InOrStdin().(*os.File)
	if !ok || !telemetry.IsTerminal(in) {
		return exitError{exitUsage, errors.New("there is no terminal to ask on, so nothing was deleted; give --yes to delete")}
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s [y/N] ", question)
	answer, _ := bufio.NewReader(in).ReadString('\n')
	if a := strings.ToLower(strings.TrimSpace(answer)); a != "y" && a != "yes" {
		return errors.New("nothing was deleted")
	}
	return nil
}
