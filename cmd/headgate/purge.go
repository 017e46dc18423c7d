package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"github.com/headgate-io/headgate/consumer"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// erased is what a purge finds in one place.
type erased struct {
	Where    string `json:"where"`
	Messages uint64 `json:"messages"`
}

func purgeCommand() *cobra.Command {
	var creator, output string
	var dryRun, yes bool
	cmd := &cobra.Command{
		Use:   "purge --creator CREATOR",
		Short: "Erase all that is stored of a creator: requests, results, dead letters, events, holds, limits",
		Long: `Erase all that is stored of a creator, for a request under a data protection law:
requests, results, dead letters, events, holds, limits, ledger records and large bodies.
The creator is held meanwhile, and calls in flight are waited for.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			token, err := publisher.EncodeToken(creator)
			if err != nil {
				return exitError{exitUsage, fmt.Errorf("--creator: %w", err)}
			}
			s, err := openSession(cmd)
			if err != nil {
				return err
			}
			defer s.Close()
			p := purge{s: s, js: s.js, ns: s.topology().Namespace, creator: creator, token: token, dry: true}
			found, err := p.run(cmd.Context())
			if err != nil {
				return err
			}
			header := table.Row{"where", "messages"}
			row := func(e erased) table.Row { return table.Row{e.Where, e.Messages} }
			if dryRun {
				return write(cmd.OutOrStdout(), output, found, header, row)
			}
			if err := confirm(cmd, yes, fmt.Sprintf("Erase all that is stored of %s, for good?", creator)); err != nil {
				return err
			}
			if err := p.settle(cmd.Context()); err != nil {
				return err
			}
			p.dry = false
			if found, err = p.run(cmd.Context()); err != nil {
				return err
			}
			return write(cmd.OutOrStdout(), output, found, header, row)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&creator, "creator", "", "whose")
	_ = cmd.MarkFlagRequired("creator")
	flags.BoolVar(&dryRun, "dry-run", false, "count what would be erased")
	flags.BoolVar(&yes, "yes", false, "do not ask")
	outputFlag(cmd, &output)
	return cmd
}

// purge erases one creator.
type purge struct {
	s              *session
	js             jetstream.JetStream
	ns             publisher.Namespace
	creator, token string
	dry            bool
	found          []erased
}

// settle holds the creator and waits until none of its calls is in flight.
func (p *purge) settle(ctx context.Context) error {
	holds, err := p.s.bucket(ctx, publisher.Holds)
	if err != nil {
		return err
	}
	value, err := consumer.EncodeHold(resilience.Hold{Since: time.Now(), Until: time.Now().Add(5 * time.Minute), Reason: "is being erased", Who: operator()})
	if err != nil {
		return err
	}
	if _, err := holds.Put(ctx, "creator."+p.token, value); err != nil {
		return fmt.Errorf("hold %s: %w", p.creator, err)
	}
	err = p.await(ctx, func(y consumer.Why) bool { return y.InFlight == 0 && y.Reason == resilience.ReasonHold })
	if err != nil {
		return fmt.Errorf("wait for the calls of %s that are in flight; nothing was erased, try again: %w", p.creator, err)
	}
	return nil
}

// await asks the creator's worker until it is so, for a minute; without workers it is.
func (p *purge) await(ctx context.Context, so func(consumer.Why) bool) error {
	for began := time.Now(); time.Since(began) < time.Minute; {
		answers, err := ask[consumer.Why](p.s, "why."+p.token, "", 1, answerWithin)
		switch {
		case errors.Is(err, errNobody):
			return nil
		case err != nil:
			return err
		case len(answers) == 1 && so(answers[0]):
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	return errors.New("not within a minute")
}

func (p *purge) run(ctx context.Context) ([]erased, error) {
	p.found = nil
	// The ids of its requests are in what is erased, so their records go first.
	ids, err := p.requestIDs(ctx)
	if err != nil {
		return nil, err
	}
	ledger := "KV_" + p.ns.Stream(publisher.Ledger)
	records := erased{Where: p.ns.Stream(publisher.Ledger)}
	for id := range ids {
		n, err := p.subject(ctx, ledger, "$KV."+p.ns.Stream(publisher.Ledger)+"."+id)
		if err != nil {
			return nil, err
		}
		records.Messages += n
	}
	p.found = append(p.found, records)
	if err := p.bodies(ctx); err != nil {
		return nil, err
	}
	places := []struct{ stream, subject string }{
		{publisher.Requests, p.ns.Subject("requests", "*", p.token, ">")},
		{publisher.Results, p.ns.Subject("results", p.token, ">")},
		{publisher.DLQ, p.ns.Subject("dlq", "*", p.token, ">")},
	}
	for _, place := range places {
		n, err := p.subject(ctx, p.ns.Stream(place.stream), place.subject)
		if err != nil {
			return nil, err
		}
		p.found = append(p.found, erased{p.ns.Stream(place.stream), n})
	}
	for _, bucket := range []string{publisher.Limits, publisher.Holds} {
		name := p.ns.Stream(bucket)
		if !p.dry {
			// First so that the workers hear of it, then without a trace.
			if kv, err := p.s.bucket(ctx, bucket); err != nil {
				return nil, err
			} else if err := kv.Delete(ctx, "creator."+p.token); err != nil {
				return nil, fmt.Errorf("erase from %s: %w", name, err)
			}
		}
		n, err := p.subject(ctx, "KV_"+name, "$KV."+name+".creator."+p.token)
		if err != nil {
			return nil, err
		}
		p.found = append(p.found, erased{name, n})
	}
	if !p.dry {
		// The workers tell of the release as well, before they say that there is no hold.
		if err := p.await(ctx, func(y consumer.Why) bool { return y.Reason != resilience.ReasonHold }); err != nil {
			return nil, err
		}
	}
	n, err := p.subject(ctx, p.ns.Stream(publisher.Events), p.ns.Subject("events", "*", "*", p.token))
	p.found = append(p.found, erased{p.ns.Stream(publisher.Events), n})
	return p.found, err
}

// subject counts and erases a stream's messages.
func (p *purge) subject(ctx context.Context, stream, subject string) (uint64, error) {
	st, err := p.js.Stream(ctx, stream)
	if err != nil {
		return 0, fmt.Errorf("look at stream %s (has `headgate setup` been run?): %w", stream, err)
	}
	info, err := st.Info(ctx, jetstream.WithSubjectFilter(subject))
	if err != nil {
		return 0, fmt.Errorf("look at stream %s: %w", stream, err)
	}
	var n uint64
	for _, messages := range info.State.Subjects {
		n += messages
	}
	if n > 0 && !p.dry {
		if err := st.Purge(ctx, jetstream.WithPurgeSubject(subject)); err != nil {
			return n, fmt.Errorf("erase %s from stream %s: %w", subject, stream, err)
		}
	}
	return n, nil
}

// requestIDs are the encoded ids of all requests of the creator that are known.
func (p *purge) requestIDs(ctx context.Context) (map[string]bool, error) {
	ids := map[string]bool{}
	for stream, subject := range map[string]string{
		publisher.Results: p.ns.Subject("results", p.token, ">"), publisher.DLQ: p.ns.Subject("dlq", "*", p.token, ">"),
	} {
		subjects, err := subjectsOf(ctx, p.js, p.ns.Stream(stream), subject)
		if err != nil {
			return nil, err
		}
		for s := range subjects {
			ids[s[strings.LastIndexByte(s, '.')+1:]] = true
		}
	}
	// The letters of some were dropped or replayed, and are still in the ledger.
	if err := p.claimed(ctx, ids); err != nil {
		return nil, err
	}
	// Those that are waiting have their ids in a header.
	st, err := p.js.Stream(ctx, p.ns.Stream(publisher.Requests))
	if err != nil {
		return nil, fmt.Errorf("look at the requests: %w", err)
	}
	for seq := uint64(1); ; {
		m, err := st.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(p.ns.Subject("requests", "*", p.token, ">")))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return ids, nil
		}
		if err != nil {
			return nil, fmt.Errorf("look at the requests: %w", err)
		}
		if id := m.Header.Get(jetstream.MsgIDHeader); id != "" {
			ids[publisher.IDToken(id)] = true
		}
		seq = m.Sequence + 1
	}
}

// claimed adds the ids of requests that the ledger knows as dead letters of the creator.
func (p *purge) claimed(ctx context.Context, ids map[string]bool) error {
	fail := func(err error) error { return fmt.Errorf("look at the ledger: %w", err) }
	kv, err := p.s.bucket(ctx, publisher.Ledger)
	if err != nil {
		return err
	}
	watcher, err := kv.WatchAll(ctx, jetstream.IgnoreDeletes())
	if err != nil {
		return fail(err)
	}
	defer func() { _ = watcher.Stop() }()
	for {
		select {
		case <-ctx.Done():
			return fail(ctx.Err())
		case e := <-watcher.Updates():
			if e == nil {
				return nil
			}
			if consumer.ClaimedFor(e.Value()) == p.creator {
				ids[e.Key()] = true
			}
		}
	}
}

// bodies erases what is in the object store, names and all.
func (p *purge) bodies(ctx context.Context) error {
	bucket := p.ns.Stream(publisher.Bodies)
	count := erased{Where: bucket}
	store, err := p.js.ObjectStore(ctx, bucket)
	if err != nil {
		return fmt.Errorf("look at object store %s (has `headgate setup` been run?): %w", bucket, err)
	}
	objects, err := store.List(ctx)
	if err != nil && !errors.Is(err, jetstream.ErrNoObjectsFound) {
		return fmt.Errorf("look at object store %s: %w", bucket, err)
	}
	for _, o := range objects {
		if parts := strings.Split(o.Name, "."); len(parts) != 4 || parts[1] != p.token {
			continue
		}
		count.Messages++
		if p.dry {
			continue
		}
		for _, subject := range publisher.ObjectSubjects(bucket, o.Name, o.NUID) {
			if _, err := p.subject(ctx, "OBJ_"+bucket, subject); err != nil {
				return err
			}
		}
	}
	p.found = append(p.found, count)
	return nil
}
