package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"github.com/headgate-io/headgate/publisher"
)

func setupCommand() *cobra.Command {
	var dryRun bool
	var output string
	cmd := &cobra.Command{
		Use:   "setup",
		Short: "Create or update the streams, consumers and buckets",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := openSession(cmd)
			if err != nil {
				return err
			}
			defer s.Close()
			act := s.topology().Ensure
			if dryRun {
				act = s.topology().Plan
			}
			changes, err := act(cmd.Context(), s.js)
			if err != nil && len(changes) == 0 {
				return err
			}
			return errors.Join(err, printChanges(cmd.OutOrStdout(), changes, output, dryRun))
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "print what would change, and change nothing")
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	return cmd
}

func printChanges(w io.Writer, changes []publisher.Change, output string, dryRun bool) error {
	if output == "json" {
		if changes == nil {
			changes = []publisher.Change{}
		}
		return json.NewEncoder(w).Encode(changes)
	}
	if len(changes) == 0 {
		_, err := fmt.Fprintln(w, "Nothing to change.")
		return err
	}
	t := table.NewWriter()
	t.SetStyle(table.StyleLight)
	t.AppendHeader(table.Row{"what", "name", "change"})
	for _, c := range changes {
		t.AppendRow(table.Row{c.Kind, c.Name, c.Action})
		for _, d := range c.Diff {
			t.AppendRow(table.Row{"", "", "  " + d})
		}
	}
	text := t.Render() + "\n"
	if dryRun {
		text += "Nothing was changed.\n"
	}
	_, err := io.WriteString(w, text)
	return err
}
