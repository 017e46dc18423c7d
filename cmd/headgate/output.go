package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"
)

// outputFlag adds -o to a command.
func outputFlag(cmd *cobra.Command, output *string) {
	cmd.Flags().StringVarP(output, "output", "o", "table", "table, json or jsonl")
}

// write prints rows as a table, as one JSON array, or as one JSON object a line.
func write[T any](w io.Writer, output string, rows []T, header table.Row, row func(T) table.Row) error {
	switch output {
	case "json":
		if rows == nil {
			rows = []T{}
		}
		return json.NewEncoder(w).Encode(rows)
	case "jsonl":
		e := json.NewEncoder(w)
		for _, r := range rows {
			if err := e.Encode(r); err != nil {
				return err
			}
		}
		return nil
	case "table":
	default:
		return exitError{exitUsage, fmt.Errorf("unknown output %q; there are table, json and jsonl", output)}
	}
	t := table.NewWriter()
	t.SetStyle(table.StyleLight)
	t.AppendHeader(header)
	for _, r := range rows {
		t.AppendRow(row(r))
	}
	_, err := fmt.Fprintln(w, t.Render())
	return err
}

// ranges writes sorted numbers shortly: 0-3, 7.
func ranges(numbers []int) string {
	var b strings.Builder
	for i := 0; i < len(numbers); {
		j := i
		for j+1 < len(numbers) && numbers[j+1] == numbers[j]+1 {
			j++
		}
		if b.Len() > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%d", numbers[i])
		if j > i {
			fmt.Fprintf(&b, "-%d", numbers[j])
		}
		i = j + 1
	}
	return b.String()
}
