package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/nats-io/nuid"
	"github.com/spf13/cobra"

	"github.com/headgate-io/headgate/consumer"
)

func runCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "run",
		Short: "Run a worker until it is told to stop (SIGTERM, Ctrl-C)",
		Long: `Run a worker. It connects to the server named by --server, --context, $NATS_URL
or the configuration; when none is named it starts one of its own, with its
files in data_dir, so that the nats CLI can look inside.

On SIGTERM it stops taking messages, lets calls in flight finish within
shutdown_grace, gives back what has not been called, and exits 0.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := openSession(cmd)
			if err != nil {
				return err
			}
			defer s.Close()
			if s.cfg.Provider.BaseURL == "" {
				return exitError{exitConfig, errors.New("provider.base_url is not set: a worker needs an API to call; name a configuration with -c")}
			}
			return runWorker(cmd.Context(), s)
		},
	}
}

// runWorker ensures the topology and works until ctx ends.
func runWorker(ctx context.Context, s *session) error {
	if _, err := s.topology().Ensure(ctx, s.js); err != nil {
		return err
	}
	w, closeAPI, err := newWorker(ctx, s)
	if err != nil {
		return err
	}
	defer closeAPI()
	s.log.Info().Str("server", s.nc.ConnectedUrlRedacted()).Str("provider", s.cfg.Provider.Name).
		Int("partitions", s.cfg.Partitions).Msg("working")
	return w.Run(ctx)
}

func newWorker(ctx context.Context, s *session) (*consumer.Worker, func(), error) {
	cfg, closeAPI, err := workerConfig(s)
	if err != nil {
		return nil, nil, err
	}
	w, err := consumer.New(ctx, s.nc, cfg)
	if err != nil {
		closeAPI()
		return nil, nil, err
	}
	return w, closeAPI, nil
}

// workerName is unique to a process, and tells people where it runs.
func workerName() string {
	host, err := os.Hostname()
	if err != nil {
		host = "worker"
	}
	return fmt.Sprintf("%s-%d-%s", host, os.Getpid(), nuid.Next()[16:])
}
