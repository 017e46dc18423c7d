package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/user"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"github.com/headgate-io/headgate/consumer"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// target is who is held or released.
type target struct{ account, provider bool }

func (t *target) flags(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&t.account, "account", false, "all creators, because of the API key")
	cmd.Flags().BoolVar(&t.provider, "provider", false, "all creators, because of the provider")
	cmd.MarkFlagsMutuallyExclusive("account", "provider")
}

// key is the target's key in HOLDS, and how people call it.
func (t *target) key(args []string) (key, who string, err error) {
	switch {
	case (t.account || t.provider) == (len(args) == 1):
		return "", "", exitError{exitUsage, errors.New("name one creator, or --account, or --provider")}
	case t.account:
		return "account", "the account", nil
	case t.provider:
		return "provider", "the provider", nil
	}
	token, err := publisher.EncodeToken(args[0])
	if err != nil {
		return "", "", exitError{exitUsage, fmt.Errorf("creator: %w", err)}
	}
	return "creator." + token, args[0], nil
}

func holdCommand() *cobra.Command {
	var t target
	var during time.Duration
	var reason string
	cmd := &cobra.Command{
		Use:   "hold [CREATOR]",
		Short: "Let a creator's requests wait, until a time or until they are released",
		Long: `Let a creator's requests wait, until a time or until they are released. Every worker
knows within moments. The same by hand: nats kv put HOLDS creator.alice 1h`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			key, who, err := t.key(args)
			if err != nil {
				return err
			}
			if reason == "" {
				return exitError{exitUsage, errors.New("--reason is missing: somebody will ask why")}
			}
			if during < 0 {
				return exitError{exitUsage, errors.New("--for must not be negative")}
			}
			s, err := openSession(cmd)
			if err != nil {
				return err
			}
			defer s.Close()
			kv, err := s.bucket(cmd.Context(), publisher.Holds)
			if err != nil {
				return err
			}
			if err := hold(cmd.Context(), kv, key, during, reason, operator()); err != nil {
				return fmt.Errorf("hold %s: %w", who, err)
			}
			end := "until it is released"
			if during > 0 {
				end = "until " + time.Now().Add(during).Format(time.DateTime)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is held %s\n", who, end)
			return nil
		},
	}
	t.flags(cmd)
	cmd.Flags().DurationVar(&during, "for", 0, "how long, such as 1h; 0: until it is released")
	cmd.Flags().StringVar(&reason, "reason", "", "why, for whoever asks")
	return cmd
}

// hold writes a hold; during 0: until it is released.
func hold(ctx context.Context, kv jetstream.KeyValue, key string, during time.Duration, reason, who string) error {
	if reason == "" {
		return errors.New("a reason is missing: somebody will ask why")
	}
	h := resilience.Hold{Since: time.Now(), Reason: reason, Who: who}
	if during > 0 {
		h.Until = h.Since.Add(during)
	}
	value, err := consumer.EncodeHold(h)
	if err != nil {
		return err
	}
	_, err = kv.Put(ctx, key, value)
	return err
}

// release ends a hold, and reports whether there was one.
func release(ctx context.Context, kv jetstream.KeyValue, key string) (held bool, err error) {
	switch _, err := kv.Get(ctx, key); {
	case errors.Is(err, jetstream.ErrKeyNotFound):
		return false, nil
	case err != nil:
		return false, err
	}
	return true, kv.Delete(ctx, key)
}

func releaseCommand() *cobra.Command {
	var t target
	cmd := &cobra.Command{
		Use:   "release [CREATOR]",
		Short: "End a hold; what waits goes on at the pace that its limits allow",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			key, who, err := t.key(args)
			if err != nil {
				return err
			}
			s, err := openSession(cmd)
			if err != nil {
				return err
			}
			defer s.Close()
			kv, err := s.bucket(cmd.Context(), publisher.Holds)
			if err != nil {
				return err
			}
			held, err := release(cmd.Context(), kv, key)
			switch {
			case err != nil:
				return fmt.Errorf("release %s: %w", who, err)
			case held:
				fmt.Fprintf(cmd.OutOrStdout(), "%s is released\n", who)
			default:
				fmt.Fprintf(cmd.OutOrStdout(), "%s is not held\n", who)
			}
			return nil
		},
	}
	t.flags(cmd)
	return cmd
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
