package consumer

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/publisher"
)

// reset makes the server forget which of a partition's messages were delivered and are not settled
// (ADR-60, server 2.14 and later): all of them come again at once, those that were set aside for a
// time included.
func (s *server) reset(ctx context.Context, partition int) error {
	ctx, cancel := context.WithTimeout(ctx, consumerTimeout)
	defer cancel()
	name := publisher.ConsumerName(partition)
	m, err := s.nc.RequestWithContext(ctx, s.api+"CONSUMER.RESET."+s.name+"."+name, nil)
	if err != nil {
		return fmt.Errorf("reset consumer %s: %w", name, err)
	}
	var answer struct {
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		return fmt.Errorf("reset consumer %s: %w", name, err)
	}
	if answer.Error != nil {
		return fmt.Errorf("reset consumer %s: %w", name, answer.Error)
	}
	return nil
}
