package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/user"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/headgate-io/headgate/internal/control"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// targetFlags name what is held or released, beside the creator as an argument.
type targetFlags struct{ account, provider bool }

func (t *targetFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&t.account, "account", false, "all creators, because of the API key")
	cmd.Flags().BoolVar(&t.provider, "provider", false, "all creators, because of the provider")
	cmd.MarkFlagsMutuallyExclusive("account", "provider")
}

func (t *targetFlags) target(args []string) (control.Target, error) {
	switch {
	case (t.account || t.provider) == (len(args) == 1):
		return control.Target{}, exitError{exitUsage, errors.New("name one creator, or --account, or --provider")}
	case t.account:
		return control.Target{Kind: control.Account}, nil
	case t.provider:
		return control.Target{Kind: control.Provider}, nil
	}
	target := control.Target{Creator: args[0]}
	if _, err := target.Key(control.ByPeople); err != nil {
		return control.Target{}, exitError{exitUsage, err}
	}
	return target, nil
}

// argument is how a target is named on the command line.
func argument(t control.Target) string {
	switch t.Kind {
	case control.Account:
		return "--account"
	case control.Provider:
		return "--provider"
	}
	return t.Creator
}

// desk is where people hold and release.
func (s *session) desk(ctx context.Context) (*control.Desk, error) {
	return control.OpenDesk(ctx, s.js, s.topology().Namespace.Stream(publisher.Holds))
}

func holdCommand() *cobra.Command {
	var t targetFlags
	var during time.Duration
	var reason string
	cmd := &cobra.Command{
		Use:   "hold [CREATOR]",
		Short: "Let a creator's requests wait, until a time or until they are released",
		Long: `Let a creator's requests wait, until a time or until they are released. Every worker
knows within moments. The same by hand: nats kv put HOLDS creator.alice 1h

A new hold replaces the one by people that was there. A hold that the API's answers
ask for is another one: it stays, and the one that ends later counts.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			target, err := t.target(args)
			if err != nil {
				return err
			}
			if reason == "" {
				return exitError{exitUsage, errors.New("--reason is missing: other operators will ask why")}
			}
			if during < 0 {
				return exitError{exitUsage, errors.New("--for must not be negative")}
			}
			s, err := openSession(cmd)
			if err != nil {
				return err
			}
			defer s.Close()
			desk, err := s.desk(cmd.Context())
			if err != nil {
				return err
			}
			if err := hold(cmd.Context(), desk, target, during, reason, operator()); err != nil {
				return fmt.Errorf("hold %s: %w", target, err)
			}
			end := "until it is released"
			if during > 0 {
				end = "until " + time.Now().Add(during).Format(time.DateTime)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is held %s\n", target, end)
			return nil
		},
	}
	t.add(cmd)
	cmd.Flags().DurationVar(&during, "for", 0, "how long, such as 1h; 0: until it is released")
	cmd.Flags().StringVar(&reason, "reason", "", "why, for other operators")
	return cmd
}

// hold puts people's hold; during 0: until it is released.
func hold(ctx context.Context, desk *control.Desk, target control.Target, during time.Duration, reason, who string) error {
	if reason == "" {
		return errors.New("a reason is missing: other operators will ask why")
	}
	h := resilience.Hold{Since: time.Now(), Reason: reason, Who: who}
	if during > 0 {
		h.Until = h.Since.Add(during)
	}
	return desk.Hold(ctx, target, h)
}

func releaseCommand() *cobra.Command {
	var t targetFlags
	var force bool
	cmd := &cobra.Command{
		Use:   "release [CREATOR]",
		Short: "End a hold; what waits goes on at the pace that its limits allow",
		Long: `End a hold; what waits goes on at the pace that its limits allow.

It ends the hold by people, and the API's if that waits for people: a session that has
expired, an account that cannot pay or has a wrong key. While the API still asks to wait
for a time, such as a Retry-After, calls would break its limit: only --force ends that,
and without it the exit code is 5.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			target, err := t.target(args)
			if err != nil {
				return err
			}
			s, err := openSession(cmd)
			if err != nil {
				return err
			}
			defer s.Close()
			desk, err := s.desk(cmd.Context())
			if err != nil {
				return err
			}
			ended, err := desk.Release(cmd.Context(), target, force, operator())
			if err != nil {
				return fmt.Errorf("release %s: %w", target, err)
			}
			return sayReleased(cmd.OutOrStdout(), target, ended)
		},
	}
	t.add(cmd)
	cmd.Flags().BoolVar(&force, "force", false, "end the API's hold as well, even if it has an end of its own")
	return cmd
}

// sayReleased says what a release has ended. What still stands is an error.
func sayReleased(w io.Writer, target control.Target, ended control.Ended) error {
	released := ended.People != nil || ended.API != nil
	switch {
	case ended.Stands != nil && released:
		fmt.Fprintf(w, "%s: the hold by people is ended\n", target)
	case ended.Stands != nil:
		fmt.Fprintf(w, "%s is not held by people\n", target)
	case released:
		fmt.Fprintf(w, "%s is released\n", target)
	default:
		fmt.Fprintf(w, "%s is not held\n", target)
	}
	if ended.Stands != nil {
		return fmt.Errorf("%w: the API still asks for %s, until %s (%s); `headgate release %s --force` ends that, too",
			errPartly, duration(time.Until(ended.Stands.Until)), ended.Stands.Until.Local().Format(time.DateTime), ended.Stands.Reason, argument(target))
	}
	return nil
}

// duration is one without fractions that say nothing.
func duration(d time.Duration) string {
	switch {
	case d > time.Hour:
		return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
	case d > time.Minute:
		return d.Round(time.Second).String()
	}
	return d.Round(100 * time.Millisecond).String()
}

func limitsCommand() *cobra.Command {
	var rate string
	var burst, concurrency int
	var reset bool
	cmd := &cobra.Command{
		Use:   "limits CREATOR",
		Short: "Change one creator's limits while everything runs",
		Long: `Change one creator's limits while everything runs; what is not named stays as configured.
The same by hand: nats kv put LIMITS creator.alice '{"rate":"30/m","concurrency":1}'`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			token, err := publisher.EncodeToken(args[0])
			if err != nil {
				return exitError{exitUsage, fmt.Errorf("creator: %w", err)}
			}
			changes := map[string]any{}
			if rate != "" {
				if _, _, err := resilience.ParseRate(rate); err != nil {
					return exitError{exitUsage, fmt.Errorf("--rate: %w", err)}
				}
				changes["rate"] = rate
			}
			for name, value := range map[string]int{"burst": burst, "concurrency": concurrency} {
				if cmd.Flags().Changed(name) {
					if value < 1 {
						return exitError{exitUsage, fmt.Errorf("--%s must be at least 1, not %d", name, value)}
					}
					changes[name] = value
				}
			}
			if reset == (len(changes) > 0) {
				return exitError{exitUsage, errors.New("name --rate, --burst or --concurrency, or --reset alone")}
			}
			s, err := openSession(cmd)
			if err != nil {
				return err
			}
			defer s.Close()
			kv, err := s.bucket(cmd.Context(), publisher.Limits)
			if err != nil {
				return err
			}
			if reset {
				if err := kv.Delete(cmd.Context(), "creator."+token); err != nil {
					return fmt.Errorf("reset the limits of %s: %w", args[0], err)
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s has the usual limits\n", args[0])
				return nil
			}
			value, err := json.Marshal(changes)
			if err != nil {
				return err
			}
			if _, err := kv.Put(cmd.Context(), "creator."+token, value); err != nil {
				return fmt.Errorf("set the limits of %s: %w", args[0], err)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s has the limits %s\n", args[0], value)
			return nil
		},
	}
	cmd.Flags().StringVar(&rate, "rate", "", "calls per s, m, h or d, such as 30/m, or inf")
	cmd.Flags().IntVar(&burst, "burst", 0, "calls at once")
	cmd.Flags().IntVar(&concurrency, "concurrency", 0, "calls in flight")
	cmd.Flags().BoolVar(&reset, "reset", false, "as configured")
	return cmd
}

// operator is who holds by hand.
func operator() string {
	if u, err := user.Current(); err == nil && u.Username != "" {
		return u.Username
	}
	return "operator"
}
