package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"

	"github.com/headgate-io/headgate/consumer"
	"github.com/headgate-io/headgate/internal/control"
	"github.com/headgate-io/headgate/publisher"
)

// serviceName is what `nats micro ls` shows.
const serviceName = "headgate"

// workerStatus is what one worker says of itself.
type workerStatus struct {
	Worker string `json:"worker"`
	consumer.Snapshot
}

// offer makes a worker's answers available.
func (s *session) offer(ctx context.Context, name string, w *consumer.Worker) error {
	desk, err := s.desk(ctx)
	if err != nil {
		return err
	}
	return offer(s.nc, s.topology().Namespace, name, w, desk)
}

// offer lets a worker answer questions over NATS: the owner of the creator for
// why, every worker for status and creators.
func offer(nc *nats.Conn, ns publisher.Namespace, name string, w *consumer.Worker, desk *control.Desk) error {
	service, err := micro.AddService(nc, micro.Config{
		Name: serviceName, Version: "1.0.0", Description: "Why creators wait, and how the workers are",
		Metadata: map[string]string{"worker": name},
	})
	if err != nil {
		return fmt.Errorf("offer the service %s: %w", serviceName, err)
	}
	add := func(endpoint, subject string, answer func(micro.Request) (any, error)) {
		if err != nil {
			return
		}
		err = service.AddEndpoint(endpoint, micro.HandlerFunc(func(r micro.Request) {
			reply, err := answer(r)
			switch {
			case err != nil:
				_ = r.Error("400", err.Error(), nil)
			case reply != nil:
				_ = r.RespondJSON(reply)
			}
		}), micro.WithEndpointSubject(serviceSubject(ns, subject)), micro.WithEndpointQueueGroupDisabled())
	}
	add("why", "why.*", func(r micro.Request) (any, error) {
		token := r.Subject()[strings.LastIndexByte(r.Subject(), '.')+1:]
		creator, err := publisher.DecodeToken(token)
		if err != nil {
			return nil, err
		}
		if y, mine := w.Why(creator); mine {
			return y, nil
		}
		return nil, nil // another worker answers
	})
	add("request", "request.*", func(r micro.Request) (any, error) {
		id, err := publisher.DecodeToken(r.Subject()[strings.LastIndexByte(r.Subject(), '.')+1:])
		if err != nil {
			return nil, err
		}
		if y, here := w.WhyRequest(id); here {
			return y, nil
		}
		return nil, nil // perhaps another worker knows it
	})
	add("status", "status", func(micro.Request) (any, error) {
		return workerStatus{name, w.Snapshot()}, nil
	})
	add("creators", "creators", func(r micro.Request) (any, error) {
		limit := defaultCreators
		if text := strings.TrimSpace(string(r.Data())); text != "" {
			var err error
			if limit, err = strconv.Atoi(text); err != nil || limit < 1 || limit > maxCreators {
				return nil, fmt.Errorf("the body is how many creators to list, 1 to %d, or nothing", maxCreators)
			}
		}
		all := w.Waiting(limit)
		if all == nil {
			all = []consumer.Why{}
		}
		return all, nil
	})
	act := func(endpoint string, do func(order) (any, error)) {
		if err != nil {
			return
		}
		err = service.AddEndpoint(endpoint, micro.HandlerFunc(func(r micro.Request) {
			var o order
			var answer any
			err := json.Unmarshal(r.Data(), &o)
			if err == nil {
				answer, err = do(o)
			}
			if err != nil {
				_ = r.Error("400", err.Error(), nil)
				return
			}
			_ = r.RespondJSON(answer)
		}), micro.WithEndpointSubject(serviceSubject(ns, endpoint)))
	}
	act("hold", func(o order) (any, error) { return done{OK: true}, o.hold(desk) })
	act("release", func(o order) (any, error) { return o.release(desk) })
	if err != nil {
		return fmt.Errorf("offer the service %s: %w", serviceName, err)
	}
	return nil
}

// order is the body of headgate.hold and headgate.release.
type order struct {
	Creator string `json:"creator"`
	Scope   string `json:"scope"` // account or provider, instead of a creator
	For     string `json:"for"`
	Reason  string `json:"reason"`
	Who     string `json:"who"`
	Force   bool   `json:"force"` // release: the API's hold as well, even if it has an end of its own
}

// done is the answer to an order.
type done struct {
	OK bool `json:"ok"` // false: released, but the API still asks to wait
	// The API's hold that a release did not end.
	Until  *time.Time `json:"until,omitempty"`
	Reason string     `json:"reason,omitempty"`
}

func (o order) target() (control.Target, error) {
	t := targetFlags{account: o.Scope == "account", provider: o.Scope == "provider"}
	var args []string
	if o.Creator != "" {
		args = []string{o.Creator}
	}
	if o.Scope != "" && !t.account && !t.provider {
		return control.Target{}, fmt.Errorf("scope: %q must be account or provider, or nothing for a creator", o.Scope)
	}
	return t.target(args)
}

func (o order) hold(desk *control.Desk) error {
	target, err := o.target()
	if err != nil {
		return err
	}
	var during time.Duration
	if o.For != "" {
		if during, err = time.ParseDuration(o.For); err != nil || during <= 0 {
			return fmt.Errorf("for: %q must be a duration such as 1h, or nothing", o.For)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), actWithin)
	defer cancel()
	return hold(ctx, desk, target, during, o.Reason, orElse(o.Who, "service"))
}

func (o order) release(desk *control.Desk) (any, error) {
	target, err := o.target()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), actWithin)
	defer cancel()
	ended, err := desk.Release(ctx, target, o.Force, orElse(o.Who, "service"))
	if err != nil || ended.Stands == nil {
		return done{OK: true}, err
	}
	return done{Until: &ended.Stands.Until, Reason: ended.Stands.Reason}, nil
}

// actWithin bounds a hold or release.
const actWithin = 5 * time.Second

const (
	defaultCreators = 50
	maxCreators     = 1000 // a thousand fit into a message
)

func serviceSubject(ns publisher.Namespace, subject string) string {
	if ns != "" {
		return string(ns) + "." + serviceName + "." + subject
	}
	return serviceName + "." + subject
}

// errNobody means that no worker answered.
var errNobody = errors.New("no worker answers; is one running? `headgate workers` shows them")

// ask puts a question to the workers and returns the answers of up to n of them,
// as many as come within the time.
func ask[T any](s *session, subject, body string, n int, within time.Duration) ([]T, error) {
	inbox := s.nc.NewInbox()
	sub, err := s.nc.SubscribeSync(inbox)
	if err != nil {
		return nil, fmt.Errorf("ask the workers: %w", err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := s.nc.PublishRequest(serviceSubject(s.topology().Namespace, subject), inbox, []byte(body)); err != nil {
		return nil, fmt.Errorf("ask the workers: %w", err)
	}
	var answers []T
	for deadline := time.Now().Add(within); len(answers) < n; {
		m, err := sub.NextMsg(time.Until(deadline))
		switch {
		case errors.Is(err, nats.ErrTimeout):
			return answers, nil
		case errors.Is(err, nats.ErrNoResponders):
			return nil, errNobody
		case err != nil:
			return nil, fmt.Errorf("ask the workers: %w", err)
		}
		if text := m.Header.Get(micro.ErrorHeader); text != "" {
			return nil, errors.New(text)
		}
		var answer T
		if err := json.Unmarshal(m.Data, &answer); err != nil {
			return nil, fmt.Errorf("read a worker's answer: %w", err)
		}
		answers = append(answers, answer)
	}
	return answers, nil
}
