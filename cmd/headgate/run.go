package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"
	"github.com/spf13/cobra"

	"github.com/headgate-io/headgate/consumer"
	"github.com/headgate-io/headgate/internal/telemetry"
)

func runCommand() *cobra.Command {
	var ensure bool
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run a worker until it is told to stop (SIGTERM, Ctrl-C)",
		Long: `Run a worker. It connects to the server named by --server, --context, $NATS_URL
or the configuration; when none is named it starts one of its own, with its
files in data_dir, so that the nats CLI can look inside.

It works on the streams, consumers and buckets that 'headgate setup' has made; with
--ensure, or with a server of its own, it makes them itself.

On SIGTERM it stops taking messages, lets calls in flight finish within
shutdown_grace, gives back what has not been called, and exits 0.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var s *session
			err := patiently(cmd.Context(), cmd.ErrOrStderr(), func() (err error) {
				s, err = openSession(cmd)
				return err
			})
			if err != nil {
				return err
			}
			defer s.Close()
			if s.cfg.Provider.BaseURL == "" {
				return exitError{exitConfig, errors.New("provider.base_url is not set: a worker needs an API to call; name a configuration with -c")}
			}
			return runWorker(cmd.Context(), s, ensure || s.server != nil)
		},
	}
	cmd.Flags().BoolVar(&ensure, "ensure", false, "create or update streams, consumers and buckets first (default with an embedded server)")
	return cmd
}

// runWorker works until ctx ends. Only one that is told to changes the
// topology, so that two versions never change it to and fro.
func runWorker(ctx context.Context, s *session, ensure bool) error {
	cfg, closeAPI, err := workerConfig(s)
	if err != nil {
		return err
	}
	defer closeAPI()
	metrics := telemetry.NewMetrics()
	cfg.Observer = metrics
	var w *consumer.Worker
	err = patiently(ctx, s.log, func() (err error) {
		if ensure {
			_, err = s.topology().Ensure(ctx, s.js)
		} else {
			err = verify(ctx, s)
		}
		if err == nil {
			w, err = consumer.New(ctx, s.nc, cfg)
		}
		return err
	})
	if err != nil {
		return err
	}
	metrics.Watch(w.Snapshot)
	if err := s.offer(ctx, cfg.Name, w); err != nil {
		s.log.Warn().Err(err).Msg("`headgate why`, `status` and `creators` get no answer from this worker")
	}
	admin, err := serveAdmin(ctx, s.cfg.Admin, w, metrics)
	if err != nil {
		return err
	}
	s.log.Info().Str("server", s.nc.ConnectedUrlRedacted()).Str("provider", s.cfg.Provider.Name).
		Str("admin", admin).Int("partitions", s.cfg.Partitions).Msg("working")
	return w.Run(ctx)
}

const (
	// startPatience is for how long a worker that starts waits for servers that do not answer: they
	// may be starting, too.
	startPatience = time.Minute
	startAgain    = 2 * time.Second
)

// patiently runs f again as long as the servers do not answer.
func patiently(ctx context.Context, w io.Writer, f func() error) error {
	for began := time.Now(); ; {
		err := f()
		away := slices.ContainsFunc([]error{
			nats.ErrNoServers, nats.ErrTimeout, nats.ErrDisconnected, nats.ErrReconnectBufExceeded, context.DeadlineExceeded, syscall.ECONNRESET,
		}, func(e error) bool { return errors.Is(err, e) })
		if err == nil || !away || ctx.Err() != nil || time.Since(began) > startPatience {
			return err
		}
		fmt.Fprintf(w, "headgate: %v; trying again for %v\n", err, (startPatience - time.Since(began)).Round(time.Second))
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(startAgain):
		}
	}
}

// verify refuses to work on what is not there, or on other partitions.
func verify(ctx context.Context, s *session) error {
	changes, err := s.topology().Plan(ctx, s.js)
	if err != nil {
		return err
	}
	for _, c := range changes {
		if c.Kind == "consumer" && c.Action == "create" {
			// It concerns one partition: the worker owns the others meanwhile, and this one when it is there.
			s.log.Error().Str(c.Kind, c.Name).Msg("missing, so the requests of its partition wait; run `headgate setup` to make it again")
			continue
		}
		if c.Action != "update" {
			return fmt.Errorf("%s %s is not as configured (%s); run `headgate setup` with this configuration, or start with --ensure", c.Kind, c.Name, c.Action)
		}
		s.log.Warn().Str(c.Kind, c.Name).Strs("differs", c.Diff).Msg("not as declared; `headgate setup` repairs it")
	}
	return nil
}

// workerName is unique to a process, and tells people where it runs.
func workerName() string {
	host, err := os.Hostname()
	if err != nil {
		host = "worker"
	}
	return fmt.Sprintf("%s-%d-%s", host, os.Getpid(), nuid.Next()[16:])
}
