package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"github.com/headgate-io/headgate/internal/fakeapi"
)

// fakeapiCommand is for trying Headgate without a provider, as the compose file does.
func fakeapiCommand() *cobra.Command {
	var listen string
	var seed uint64
	cmd := &cobra.Command{
		Use:    "fakeapi",
		Short:  "Serve a creator API that misbehaves as real ones do",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			started := time.Now()
			cast := fakeapi.Cast{Relinked: func() bool { return time.Since(started) > time.Minute }}
			l, err := net.Listen("tcp", listen)
			if err != nil {
				return fmt.Errorf("serve the fake API: %w", err)
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "fake API on http://%s\n", l.Addr())
			return serve(cmd.Context(), l, fakeapi.New(creatorHeader, seed, cast.Behaviour))
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:8080", "`address` to serve on")
	cmd.Flags().Uint64Var(&seed, "seed", 1, "seed of what goes wrong")
	return cmd
}

// creatorHeader is where the fake API finds the creator, as OFAuth does.
const creatorHeader = "x-connection-id"

// serve serves until ctx ends.
func serve(ctx context.Context, l net.Listener, h http.Handler) error {
	server := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve the fake API: %w", err)
	}
	return nil
}
