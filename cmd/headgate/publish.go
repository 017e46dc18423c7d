package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/headgate-io/headgate/internal/telemetry"
	"github.com/headgate-io/headgate/publisher"
)

// errPartly means that some of the work was done and some was not.
var errPartly = errors.New("partly done")

func publishCommand() *cobra.Command {
	var (
		file, id, correlation string
		header                []string
		deadline              time.Duration
	)
	cmd := &cobra.Command{
		Use:   "publish <creator> <operation> [payload] | publish --file requests.jsonl",
		Short: "Publish requests, and wait until they are stored",
		Long: `Publish one request, or each line of a file. Without a payload on the command line
it is read from standard input if that is a pipe, and is empty else.

A line of a file is a JSON object:
  {"creator": "alice", "operation": "fans_top", "payload": {"limit": 5}, "id": "hook:42"}
payload may be any JSON and is sent as it stands; payload_base64 is for bytes.
id, correlation_id and deadline (RFC 3339) are optional.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if file != "" {
				return cobra.NoArgs(cmd, args)
			}
			return cobra.RangeArgs(2, 3)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := openSession(cmd)
			if err != nil {
				return err
			}
			defer s.Close()
			if s.server != nil { // our own server may be new
				if _, err := s.topology().Ensure(cmd.Context(), s.js); err != nil {
					return err
				}
			}
			p := publisher.New(s.js, s.topology())
			if file != "" {
				in := cmd.InOrStdin()
				if file != "-" {
					f, err := os.Open(file)
					if err != nil {
						return err
					}
					defer f.Close()
					in = f
				}
				return publishFile(cmd.Context(), p, in, cmd.OutOrStdout(), cmd.ErrOrStderr())
			}
			r := publisher.Request{ID: id, Creator: args[0], Operation: args[1], CorrelationID: correlation, Header: nats.Header{}}
			for _, h := range header {
				name, value, ok := strings.Cut(h, "=")
				if !ok {
					return exitError{exitUsage, fmt.Errorf("header %q must be name=value", h)}
				}
				r.Header.Add(name, value)
			}
			if deadline > 0 {
				r.Deadline = time.Now().Add(deadline)
			}
			if r.Payload, err = payload(args[2:], cmd.InOrStdin()); err != nil {
				return err
			}
			ack, err := p.Publish(cmd.Context(), r)
			if err != nil {
				return err
			}
			what := "published"
			if ack.Duplicate {
				what = "duplicate, not published again"
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s (sequence %d)\n", what, ack.ID, ack.Sequence)
			return err
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&file, "file", "f", "", "publish each line of a `file`; - is standard input")
	flags.StringVar(&id, "id", "", "request id, by which a repeat is known; default: a new one")
	flags.StringVar(&correlation, "correlation-id", "", "travels to the API and to the outcome")
	flags.StringArrayVar(&header, "header", nil, "further header, name=value; may be repeated")
	flags.DurationVar(&deadline, "deadline", 0, "time after which the call is of no use, e.g. 1h")
	return cmd
}

// payload is the argument, or what is piped in.
func payload(args []string, stdin io.Reader) ([]byte, error) {
	if len(args) > 0 && args[0] != "-" {
		return []byte(args[0]), nil
	}
	if f, ok := stdin.(*os.File); ok && len(args) == 0 {
		if info, err := f.Stat(); err != nil || info.Mode()&os.ModeNamedPipe == 0 && !info.Mode().IsRegular() {
			return nil, nil
		}
	}
	return io.ReadAll(stdin)
}

// fileLine is a request as a line of JSON.
type fileLine struct {
	Creator       string          `json:"creator"`
	Operation     string          `json:"operation"`
	Payload       json.RawMessage `json:"payload"`
	PayloadBase64 string          `json:"payload_base64"`
	ID            string          `json:"id"`
	CorrelationID string          `json:"correlation_id"`
	Deadline      time.Time       `json:"deadline"`
}

func parseLine(line []byte) (publisher.Request, error) {
	var l fileLine
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(&l); err != nil {
		return publisher.Request{}, fmt.Errorf("not a request: %w", err)
	}
	if d.More() {
		return publisher.Request{}, errors.New("not a request: more than one JSON value")
	}
	r := publisher.Request{
		ID: l.ID, Creator: l.Creator, Operation: l.Operation, Payload: l.Payload,
		CorrelationID: l.CorrelationID, Deadline: l.Deadline,
	}
	if l.PayloadBase64 != "" {
		if l.Payload != nil {
			return r, errors.New("payload and payload_base64 are both there")
		}
		var err error
		if r.Payload, err = base64.StdEncoding.DecodeString(l.PayloadBase64); err != nil {
			return r, fmt.Errorf("payload_base64: %w", err)
		}
	}
	return r, nil
}

// publishing is how many requests of a file are on their way at once.
const publishing = 256

// publishFile publishes each line. A bad one gets an error with its number,
// and the others go all the same.
func publishFile(ctx context.Context, p *publisher.Publisher, in io.Reader, out, errOut io.Writer) error {
	var published, duplicates, failed atomic.Int64
	var mu sync.Mutex // of errOut
	complain := func(number int, err error) {
		failed.Add(1)
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintf(errOut, "line %d: %v\n", number, err)
	}
	stop := showProgress(errOut, &mu, func() string {
		return fmt.Sprintf("%d published, %d duplicates, %d failed", published.Load(), duplicates.Load(), failed.Load())
	})
	defer stop()

	var g errgroup.Group
	g.SetLimit(publishing)
	r := bufio.NewReaderSize(in, 64<<10)
	var readErr error
	for number := 1; readErr == nil && ctx.Err() == nil; number++ {
		var line []byte
		line, readErr = r.ReadBytes('\n')
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		request, err := parseLine(line)
		if err != nil {
			complain(number, err)
			continue
		}
		g.Go(func() error {
			ack, err := p.Publish(ctx, request)
			switch {
			case err != nil:
				complain(number, err)
			case ack.Duplicate:
				duplicates.Add(1)
			default:
				published.Add(1)
			}
			return nil
		})
	}
	_ = g.Wait()
	stop()
	fmt.Fprintf(out, "published %d, duplicates %d, failed %d\n", published.Load(), duplicates.Load(), failed.Load())
	switch {
	case readErr != nil && readErr != io.EOF:
		return fmt.Errorf("read requests: %w", readErr)
	case ctx.Err() != nil:
		return fmt.Errorf("%w: interrupted; publish the same file again, requests with an id are not stored twice within 10 minutes", errPartly)
	case failed.Load() > 0:
		return fmt.Errorf("%w: %d requests were not published", errPartly, failed.Load())
	}
	return nil
}

// showProgress shows text now and then until it is stopped: in place on a
// terminal, otherwise as lines. What takes under two seconds shows nothing.
func showProgress(w io.Writer, mu *sync.Mutex, text func() string) (stop func()) {
	every, format := 3*time.Second, "%s\n"
	terminal := telemetry.IsTerminal(w)
	if terminal {
		every, format = 200*time.Millisecond, "\r\x1b[K%s"
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		t := time.NewTicker(every)
		defer t.Stop()
		for {
			select {
			case <-done:
				if terminal {
					fmt.Fprint(w, "\r\x1b[K")
				}
				return
			case <-t.C:
				mu.Lock()
				fmt.Fprintf(w, format, text())
				mu.Unlock()
			}
		}
	})
	return sync.OnceFunc(func() {
		close(done)
		wg.Wait()
	})
}
