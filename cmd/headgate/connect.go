package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"
	"github.com/synadia-io/orbit.go/natscontext"

	"github.com/headgate-io/headgate/internal/config"
	"github.com/headgate-io/headgate/internal/natsserver"
	"github.com/headgate-io/headgate/internal/telemetry"
	"github.com/headgate-io/headgate/publisher"
)

// session is a configuration and a connection to the server it leads to.
type session struct {
	cfg    *config.Config
	log    zerolog.Logger
	nc     *nats.Conn
	js     jetstream.JetStream
	server *natsserver.Server // nil unless no server was named
}

// openSession connects to the server that is named by --server, --context,
// $NATS_URL or the configuration, in this order. When none is named it starts an
// embedded one, or joins the one that runs on the same folder.
func openSession(cmd *cobra.Command) (*session, error) {
	s := &session{}
	var err error
	if s.cfg, err = loadConfig(cmd); err != nil {
		return nil, err
	}
	if s.log, err = telemetry.NewLogger(cmd.ErrOrStderr(), s.cfg.Log.Level, s.cfg.Log.Format); err != nil {
		return nil, exitError{exitUsage, err}
	}
	if err := s.connect(cmd.Context(), cmd); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// loadConfig reads the file that --config, or $HEADGATE_CONFIG, names. Flags
// come before it and before the environment.
func loadConfig(cmd *cobra.Command) (*config.Config, error) {
	flags := cmd.Flags()
	path, err := flags.GetString("config")
	if err != nil {
		return nil, err
	}
	cfg, err := config.Load(orElse(path, os.Getenv(config.FileVariable)), os.Environ())
	if err != nil {
		return nil, exitError{exitConfig, err}
	}
	for name, target := range map[string]*string{"log-level": &cfg.Log.Level, "log-format": &cfg.Log.Format} {
		if value, err := flags.GetString(name); err == nil && value != "" {
			*target = value
		}
	}
	return cfg, nil
}

func (s *session) connect(ctx context.Context, cmd *cobra.Command) error {
	server, _ := cmd.Flags().GetString("server")
	contextName, _ := cmd.Flags().GetString("context")
	env := os.Getenv("NATS_URL")
	opts := s.options()
	var err error
	switch {
	case server != "":
		s.nc, err = nats.Connect(server, opts...)
	case contextName != "":
		s.nc, _, err = natscontext.Connect(contextName, opts...)
	case env != "":
		s.nc, err = nats.Connect(env, opts...)
	case s.cfg.NATS.URL != "":
		s.nc, err = nats.Connect(s.cfg.NATS.URL, opts...)
	case s.cfg.NATS.Context != "":
		s.nc, _, err = natscontext.Connect(s.cfg.NATS.Context, opts...)
	default:
		return s.embed(ctx, s.cfg.DataDir, s.cfg.Listen)
	}
	if err != nil {
		return exitError{exitUnreachable, fmt.Errorf("connect to NATS: %w", err)}
	}
	return s.useJetStream(ctx)
}

// embed starts a server of our own.
func (s *session) embed(ctx context.Context, dir, listen string) error {
	var err error
	if s.server, err = natsserver.Start(natsserver.Config{Dir: dir, Listen: listen}); err != nil {
		return exitError{exitUnreachable, err}
	}
	if s.server.Ours() {
		s.log.Info().Str("url", s.server.URL()).Str("folder", dir).Msg("embedded NATS server started")
	} else {
		s.log.Info().Str("url", s.server.URL()).Str("folder", dir).Msg("joined the NATS server of another headgate")
	}
	if s.nc, err = nats.Connect(s.server.URL(), append(s.options(), s.server.Options()...)...); err != nil {
		return exitError{exitUnreachable, fmt.Errorf("connect to the embedded NATS server: %w", err)}
	}
	return s.useJetStream(ctx)
}

func (s *session) options() []nats.Option {
	opts := []nats.Option{
		nats.Name("headgate"),
		nats.MaxReconnects(-1),
		nats.ReconnectBufSize(-1), // a worker's answers must not arrive when it has lost its partitions
		nats.ReconnectWait(500 * time.Millisecond),
		nats.ReconnectJitter(250*time.Millisecond, time.Second),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				s.log.Warn().Err(err).Msg("disconnected from NATS; trying to come back")
			}
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) {
			s.log.Info().Str("server", nc.ConnectedUrlRedacted()).Msg("connected to NATS again")
		}),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) {
			e := s.log.Error().Err(err)
			if sub != nil {
				e = e.Str("subject", sub.Subject)
			}
			e.Msg("NATS")
		}),
	}
	if s.cfg.NATS.Creds != "" {
		opts = append(opts, nats.UserCredentials(s.cfg.NATS.Creds))
	}
	return opts
}

func (s *session) useJetStream(ctx context.Context) error {
	var err error
	if s.js, err = jetstream.New(s.nc); err != nil {
		return fmt.Errorf("use JetStream: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	switch _, err := s.js.AccountInfo(ctx); {
	case err == nil:
		return nil
	case errors.Is(err, jetstream.ErrJetStreamNotEnabled), errors.Is(err, nats.ErrNoResponders):
		return exitError{exitUnreachable, fmt.Errorf("%s runs without JetStream: start it with -js, or with jetstream {} in its configuration", s.nc.ConnectedUrlRedacted())}
	default:
		return exitError{exitUnreachable, fmt.Errorf("use JetStream on %s: %w", s.nc.ConnectedUrlRedacted(), err)}
	}
}

// bucket binds to one of Headgate's buckets.
func (s *session) bucket(ctx context.Context, name string) (jetstream.KeyValue, error) {
	name = s.topology().Namespace.Stream(name)
	kv, err := s.js.KeyValue(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("bind to bucket %s (has `headgate setup` been run?): %w", name, err)
	}
	return kv, nil
}

// Close ends the connection and the embedded server, if there is one.
func (s *session) Close() {
	if s.nc != nil {
		s.nc.Close()
	}
	if s.server != nil {
		s.server.Shutdown()
	}
}

func (s *session) topology() publisher.Topology {
	c := s.cfg
	longest := c.Provider.Timeout
	for _, op := range c.Operations {
		longest = max(longest, op.Timeout)
	}
	return publisher.Topology{
		Namespace: publisher.Namespace(c.Namespace), Partitions: c.Partitions, Replicas: c.NATS.Replicas,
		MaxAge: c.Retry.MaxAge, ResultsMaxAge: c.Results.MaxAge, DLQMaxAge: c.DLQ.MaxAge,
		BacklogPerSubject: c.BacklogPerSubject,
		// A message may lie behind as long a call in a full worker's buffer,
		// and then be called itself, before its next sign of life is due.
		AckWait: max(30*time.Second, 3*longest),
	}.WithDefaults()
}
