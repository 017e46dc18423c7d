package main

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
)

// TestTour makes the same NATS requests as the commands in docs/nats-cli.md, and knows all
// of them, so that what it says stays true.
func TestTour(t *testing.T) {
	text, err := os.ReadFile("../../docs/nats-cli.md")
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, natsservertest.URL(t))
	w.api.answer("bad", status(422, "{}"))
	w.api.answer("down", status(503, "{}"))
	w.api.answer("gone", status(404, "{}"))
	defer w.worker()()
	for range 8 {
		w.publish("requests.down.send", "{}")
	}
	w.publish("requests.bad.send", "{}")
	w.outcome("DLQ", "dlq.VALIDATION.bad.>")
	w.outcomes("EVENTS", "events.breaker.opened.down", 1)

	var tour []string
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		for line := range strings.Lines(block[1]) {
			if line, _, _ = strings.Cut(line, " #"); strings.HasPrefix(line, "nats ") {
				tour = append(tour, strings.TrimSpace(line))
			}
		}
	}
	if len(tour) < 30 {
		t.Fatalf("%d commands in the tour", len(tour))
	}
	for _, line := range tour {
		if err := w.asCLI(words(line)[1:]); err != nil {
			t.Errorf("%s: %v", line, err)
		}
	}
}

// words splits a command as a shell does, as far as the tour needs it.
func words(line string) []string {
	var all []string
	for _, m := range regexp.MustCompile(`'([^']*)'|(\S+)`).FindAllStringSubmatch(line, -1) {
		if m[2] != "" {
			all = append(all, m[2])
		} else {
			all = append(all, m[1])
		}
	}
	return all
}

// asCLI does what a command of the nats CLI asks the server for. A command that it does
// not know is an error: the tour must not have any that nobody tried.
func (w *world) asCLI(args []string) error {
	ctx := w.t.Context()
	flags := map[string]string{}
	var plain []string
	for i := 0; i < len(args); i++ {
		switch args[i] {
		case "-H", "--last-for", "--subject", "--count", "--wait":
			flags[args[i]] = args[i+1]
			i++
		case "--verbose", "--display-value", "--force":
		default:
			plain = append(plain, args[i])
		}
	}
	arg := func(n int) string {
		if n < len(plain) {
			return plain[n]
		}
		return ""
	}
	command := arg(0) + " " + arg(1)
	if arg(0) == "request" || arg(0) == "sub" {
		command = arg(0)
	}
	switch command {
	case "stream ls", "kv ls", "object ls":
		if arg(2) == "" {
			names := w.js.StreamNames(ctx)
			n := 0
			for range names.Name() {
				n++
			}
			if n < 10 {
				return fmt.Errorf("%d streams: %w", n, errors.Join(names.Err()))
			}
			return nil
		}
		kv, err := w.js.KeyValue(ctx, arg(2))
		if err != nil {
			return err
		}
		if _, err := kv.Keys(ctx); err != nil && !errors.Is(err, jetstream.ErrNoKeysFound) {
			return err
		}
		return nil
	case "consumer report":
		s, err := w.js.Stream(ctx, arg(2))
		if err != nil {
			return err
		}
		list := s.ListConsumers(ctx)
		n := 0
		for range list.Info() {
			n++
		}
		if n == 0 {
			return errors.New("no consumers")
		}
		return list.Err()
	case "request":
		m := nats.NewMsg(arg(1))
		m.Data = []byte(arg(2))
		if name, value, ok := strings.Cut(flags["-H"], ":"); ok {
			m.Header[name] = []string{value}
		}
		answer, err := w.nc.RequestMsg(m, patience)
		if err != nil {
			return err
		}
		if text := answer.Header.Get("Nats-Service-Error"); text != "" {
			return errors.New(text)
		}
		if strings.HasPrefix(arg(1), "requests.") {
			w.outcome("RESULTS", "results."+strings.TrimPrefix(arg(1), "requests.")+".>")
		}
		return nil
	case "stream get", "stream view", "stream subjects":
		s, err := w.js.Stream(ctx, arg(2))
		if err != nil {
			return err
		}
		if subject := flags["--last-for"]; subject != "" {
			_, err = s.GetLastMsgForSubject(ctx, subject)
			return err
		}
		filter := arg(3)
		if filter == "" {
			filter = ">"
		}
		info, err := s.Info(ctx, jetstream.WithSubjectFilter(filter))
		if err == nil && command == "stream subjects" && len(info.State.Subjects) == 0 && arg(2) != "REQUESTS" {
			err = errors.New("no subjects")
		}
		return err
	case "micro info", "micro stats":
		_, err := w.nc.Request("$SRV."+strings.ToUpper(arg(1))+"."+arg(2), nil, patience)
		return err
	case "kv put", "kv get", "kv del":
		kv, err := w.js.KeyValue(ctx, arg(2))
		if err != nil {
			return err
		}
		switch arg(1) {
		case "put":
			_, err = kv.PutString(ctx, arg(3), arg(4))
		case "get":
			_, err = kv.Get(ctx, arg(3))
		case "del":
			err = kv.Delete(ctx, arg(3))
		}
		return err
	case "sub":
		sub, err := w.nc.SubscribeSync(arg(1))
		if err != nil {
			return err
		}
		return sub.Unsubscribe()
	}
	return errors.New("the test does not know this command")
}
