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
	"github.com/headgate-io/headgate/internal/control"
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
The creator is held meanwhile, and calls in flight are waited for. A hold that the API's
answers ask for until a time is kept, and named: exit code 5.`,
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
			if found, err = p.erase(cmd.Context()); err != nil {
				return err
			}
			if err := write(cmd.OutOrStdout(), output, found, header, row); err != nil {
				return err
			}
			return p.sayKept()
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
	kept           *resilience.Hold // the API's hold that is not over
}

func (p *purge) target() control.Target { return control.Target{Creator: p.creator} }

// erase holds the creator, erases all that is stored of it, and ends the hold. If it fails,
// people's hold is as it was before.
func (p *purge) erase(ctx context.Context) (found []erased, err error) {
	desk, err := p.s.desk(ctx)
	if err != nil {
		return nil, err
	}
	undo, err := desk.HoldMeanwhile(ctx, p.target(), resilience.Hold{
		Since: time.Now(), Until: time.Now().Add(5 * time.Minute), Reason: "is being erased", Who: operator(),
	})
	if err != nil {
		return nil, fmt.Errorf("hold %s: %w", p.creator, err)
	}
	if err = p.settle(ctx); err == nil {
		p.dry = false
		found, err = p.run(ctx)
	}
	if err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), actWithin)
		defer cancel()
		return nil, errors.Join(err, undo(ctx))
	}
	return found, nil
}

// sayKept names the hold that was not erased.
func (p *purge) sayKept() error {
	if p.kept == nil {
		return nil
	}
	return fmt.Errorf("%w: %s is erased except for the hold that the API asks for until %s (%s), which bears its name; purge again when it is over, or end it before by `headgate release %s --force`",
		errPartly, p.creator, p.kept.Until.Local().Format(time.DateTime), p.kept.Reason, p.creator)
}

// settle waits until none of the calls of the creator, which is held, is in flight.
func (p *purge) settle(ctx context.Context) error {
	err := p.await(ctx, func(y consumer.Why) bool {
		return y.InFlight+y.Settling+y.LookingUp == 0 && (y.Reason == resilience.ReasonHold || y.Reason == resilience.ReasonAccountHold || y.Reason == resilience.ReasonProviderHold)
	})
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
	ledger := p.ns.Stream(publisher.Ledger)
	records, err := p.subject(ctx, "KV_"+ledger, "$KV."+ledger+"."+p.token+".*")
	if err != nil {
		return nil, err
	}
	p.found = append(p.found, erased{ledger, records})
	for _, erase := range []func(context.Context) error{p.limits, p.holds} {
		if err := erase(ctx); err != nil {
			return nil, err
		}
	}
	n, err := p.subject(ctx, p.ns.Stream(publisher.Events), p.ns.Subject("events", "*", "*", p.token))
	p.found = append(p.found, erased{p.ns.Stream(publisher.Events), n})
	return p.found, err
}

// limits erases the creator's limits: first so that the workers hear of it, then without
// a trace.
func (p *purge) limits(ctx context.Context) error {
	name, key := p.ns.Stream(publisher.Limits), "creator."+p.token
	if !p.dry {
		kv, err := p.s.bucket(ctx, publisher.Limits)
		if err != nil {
			return err
		}
		if err := kv.Delete(ctx, key); err != nil {
			return fmt.Errorf("erase from %s: %w", name, err)
		}
	}
	n, err := p.subject(ctx, "KV_"+name, "$KV."+name+"."+key)
	p.found = append(p.found, erased{name, n})
	return err
}

// holds ends the creator's holds and erases them. The API's stays as long as calls would
// break a limit.
func (p *purge) holds(ctx context.Context) error {
	name := p.ns.Stream(publisher.Holds)
	if !p.dry {
		desk, err := p.s.desk(ctx)
		if err != nil {
			return err
		}
		ended, err := desk.Release(ctx, p.target(), false, operator())
		if err != nil {
			return fmt.Errorf("erase from %s: %w", name, err)
		}
		p.kept = ended.Stands
		if err := p.awaitRelease(ctx); err != nil {
			return err
		}
	}
	count := erased{Where: name}
	for _, by := range []control.Authority{control.ByPeople, control.ByAPI} {
		if by == control.ByAPI && p.kept != nil {
			continue
		}
		key, err := p.target().Key(by)
		if err != nil {
			return err
		}
		n, err := p.subject(ctx, "KV_"+name, "$KV."+name+"."+key)
		if err != nil {
			return err
		}
		count.Messages += n
	}
	p.found = append(p.found, count)
	return nil
}

// awaitRelease waits until the worker has ended people's hold: only then has it told of
// it, which is to be erased, too.
func (p *purge) awaitRelease(ctx context.Context) error {
	err := p.await(ctx, func(y consumer.Why) bool {
		return y.Reason != resilience.ReasonHold || p.kept != nil && y.Until != nil && y.Until.Equal(p.kept.Until)
	})
	if err != nil {
		return fmt.Errorf("wait for the worker to end the hold of %s: %w", p.creator, err)
	}
	return nil
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
		if parts := strings.Split(o.Name, "."); len(parts) < 4 || parts[1] != p.token {
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
