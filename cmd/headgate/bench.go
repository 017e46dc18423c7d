package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/headgate-io/headgate/internal/bench"
)

func benchCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure on this machine what Headgate promises",
		Long: `Measure on this machine what Headgate promises. Each benchmark brings its own NATS
server (in a process of its own; throughput takes --server) and its own API, and
prints a table and one line of JSON.`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(benchIsolationCommand(), benchLimitsCommand(), benchMemoryCommand(), benchThroughputCommand(), benchServerCommand(), benchJobCommand())
	return cmd
}

// runBench makes a benchmark a command's work.
func runBench(run func(context.Context, *bench.Bench) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		b, err := newBench(cmd)
		if err != nil {
			return err
		}
		if cmd.Flags().Changed("server") {
			return exitError{exitUsage, fmt.Errorf("%s measures its own server, too, so it takes no --server", cmd.CommandPath())}
		}
		return run(cmd.Context(), b)
	}
}

// newBench writes to a command's streams.
func newBench(cmd *cobra.Command) (*bench.Bench, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return &bench.Bench{
		ServerCommand: []string{self, "bench", "server"}, JobCommand: []string{self, "bench", "job"},
		Out: cmd.OutOrStdout(), Progress: cmd.ErrOrStderr(),
	}, nil
}

func benchServerCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "server folder",
		Short:  "Run a benchmark's NATS server until standard input ends",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return bench.ServeNATS(args[0], cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}

func benchIsolationCommand() *cobra.Command {
	o := bench.DefaultIsolation()
	cmd := &cobra.Command{
		Use:   "isolation",
		Short: "What creators in trouble cost the others",
		Args:  cobra.NoArgs,
		RunE:  runBench(func(ctx context.Context, b *bench.Bench) error { return b.Isolation(ctx, o) }),
	}
	flags := cmd.Flags()
	flags.IntVar(&o.Runs, "runs", o.Runs, "pairs of runs, with and without trouble; the median counts")
	flags.IntVar(&o.Creators, "creators", o.Creators, "healthy creators")
	flags.IntVar(&o.Requests, "requests", o.Requests, "requests of the healthy creators, together")
	flags.IntVar(&o.Trouble, "trouble", o.Trouble, "requests of the creators in trouble, together")
	flags.DurationVar(&o.Latency, "latency", o.Latency, "of the API")
	flags.DurationVar(&o.Timeout, "timeout", o.Timeout, "of a call")
	flags.IntVar(&o.Hanging, "hanging", o.Hanging, "creators that hang in the last scenario, beside the healthy ones")
	return cmd
}

func benchLimitsCommand() *cobra.Command {
	o := bench.DefaultLimits()
	cmd := &cobra.Command{
		Use:   "limits",
		Short: "How exactly limits are kept, and how much of them is used",
		Args:  cobra.NoArgs,
		RunE:  runBench(func(ctx context.Context, b *bench.Bench) error { return b.Limits(ctx, o) }),
	}
	flags := cmd.Flags()
	flags.IntVar(&o.Requests, "requests", o.Requests, "requests of the one creator")
	flags.Float64Var(&o.Creator, "rate", o.Creator, "its calls a second")
	flags.IntVar(&o.Burst, "burst", o.Burst, "its calls at once")
	flags.IntVar(&o.Creators, "creators", o.Creators, "creators that share the account's limit")
	flags.Float64Var(&o.Account, "account-rate", o.Account, "their calls a second, together")
	flags.IntVar(&o.AccBurst, "account-burst", o.AccBurst, "their calls at once")
	flags.Float64Var(&o.Seconds, "account-seconds", o.Seconds, "seconds of work for the account")
	flags.IntVar(&o.Workers, "workers", o.Workers, "workers that share the account's limit")
	flags.DurationVar(&o.Latency, "latency", o.Latency, "of the API")
	return cmd
}

func benchMemoryCommand() *cobra.Command {
	o := bench.DefaultMemory()
	cmd := &cobra.Command{
		Use:   "memory",
		Short: "What active creators and waiting requests cost",
		Args:  cobra.NoArgs,
		RunE:  runBench(func(ctx context.Context, b *bench.Bench) error { return b.Memory(ctx, o) }),
	}
	flags := cmd.Flags()
	flags.IntVar(&o.Creators, "creators", o.Creators, "active creators")
	flags.IntVar(&o.Backlog, "backlog", o.Backlog, "requests of a held creator")
	flags.IntVar(&o.Others, "others", o.Others, "requests of others, behind them in the same partition")
	flags.IntVar(&o.Idle, "idle", o.Idle, "`seconds` for which the server is watched while they wait")
	return cmd
}

func benchThroughputCommand() *cobra.Command {
	o := bench.DefaultThroughput()
	cmd := &cobra.Command{
		Use:   "throughput",
		Short: "What protection costs: the worker beside a bare loop that does nothing else",
		Args:  cobra.NoArgs,
		RunE:  runBench(func(ctx context.Context, b *bench.Bench) error { return b.Throughput(ctx, o) }),
	}
	flags := cmd.Flags()
	flags.IntVar(&o.Runs, "runs", o.Runs, "pairs of runs, each process its own; the median counts")
	flags.IntVar(&o.Messages, "messages", o.Messages, "requests in a run")
	flags.IntVar(&o.Creators, "creators", o.Creators, "creators")
	flags.IntVar(&o.Partitions, "partitions", o.Partitions, "partitions")
	flags.IntVar(&o.Workers, "workers", o.Workers, "processes that share the work")
	flags.IntVar(&o.InFlight, "in-flight", o.InFlight, "calls at once, of each worker")
	flags.IntVar(&o.Body, "body", o.Body, "bytes of an answer")
	flags.DurationVar(&o.Latency, "latency", o.Latency, "of the API")
	flags.StringVar(&o.Profile, "profile", o.Profile, "`folder` for CPU profiles of the worker and of the bare loop")
	flags.BoolVar(&o.Added, "added", o.Added, "measure the time from publishing to the call, too")
	return cmd
}

func benchJobCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "job JSON",
		Short:  "Do one run of a benchmark",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var j bench.Job
			if err := json.Unmarshal([]byte(args[0]), &j); err != nil {
				return exitError{exitUsage, err}
			}
			return bench.RunJob(cmd.Context(), j, cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}
