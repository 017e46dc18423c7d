package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"

	"github.com/headgate-io/headgate/consumer"
	"github.com/headgate-io/headgate/publisher"
)

// serviceName is what `nats micro ls` shows.
const serviceName = "headgate"

// workerStatus is what one worker says of itself.
type workerStatus struct {
	Worker string `json:"worker"`
	consumer.Snapshot
}

// offer lets a worker answer questions over NATS: whoever owns the creator for
// why, every worker for status and creators.
func offer(nc *nats.Conn, ns publisher.Namespace, name string, w *consumer.Worker) error {
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
		all := w.Trouble(limit)
		if all == nil {
			all = []consumer.Why{}
		}
		return all, nil
	})
	if err != nil {
		return fmt.Errorf("offer the service %s: %w", serviceName, err)
	}
	return nil
}

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
