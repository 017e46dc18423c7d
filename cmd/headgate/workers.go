package main

import (
	"fmt"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"github.com/headgate-io/headgate/internal/ownership"
	"github.com/headgate-io/headgate/publisher"
)

func workersCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "workers",
		Short: "Show the workers: since when, what they own, how many calls they have in flight",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := openSession(cmd)
			if err != nil {
				return err
			}
			defer s.Close()
			kv, err := s.bucket(cmd.Context(), publisher.Owners)
			if err != nil {
				return err
			}
			owners, err := ownership.Owners(cmd.Context(), kv)
			if err != nil {
				return err
			}
			header := table.Row{"worker", "host", "process", "since", "in flight", "partitions"}
			return write(cmd.OutOrStdout(), output, owners, header, func(o ownership.Ownership) table.Row {
				since := "gone; its leases expire"
				if !o.Since.IsZero() {
					since = fmt.Sprintf("%s (%s)", o.Since.Local().Format(time.DateTime), time.Since(o.Since).Round(time.Second))
				}
				return table.Row{o.Worker, o.Host, o.PID, since, o.InFlight, fmt.Sprintf("%d: %s", len(o.Partitions), ranges(o.Partitions))}
			})
		},
	}
	outputFlag(cmd, &output)
	return cmd
}
