package publisher

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Change is a difference between what Topology declares and what the server has.
type Change struct {
	Kind   string   `json:"kind"`   // stream, consumer or bucket
	Name   string   `json:"name"`   //
	Action string   `json:"action"` // create, update or delete
	Diff   []string `json:"diff,omitempty"`
}

// ErrPartitionsFixed means that the number of partitions cannot change now.
var ErrPartitionsFixed = errors.New("the number of partitions cannot change while requests are stored")

// Plan returns what Ensure would change.
func (t Topology) Plan(ctx context.Context, js jetstream.JetStream) ([]Change, error) {
	return t.reconcile(ctx, js, false)
}

// Ensure makes the server have what t declares and returns what it changed. It
// may run any number of times, in any number of places.
func (t Topology) Ensure(ctx context.Context, js jetstream.JetStream) ([]Change, error) {
	return t.reconcile(ctx, js, true)
}

func (t Topology) reconcile(ctx context.Context, js jetstream.JetStream, apply bool) ([]Change, error) {
	t = t.WithDefaults()
	if err := t.Check(); err != nil {
		return nil, fmt.Errorf("topology: %w", err)
	}
	var changes []Change
	note := func(c Change, do func() error) error {
		if apply {
			if err := do(); err != nil {
				return fmt.Errorf("%s %s %s: %w", c.Action, c.Kind, c.Name, explain(err))
			}
		}
		changes = append(changes, c)
		return nil
	}
	for _, part := range []func(context.Context, jetstream.JetStream, noter) error{
		t.reconcileStreams, t.reconcileConsumers, t.reconcileBuckets, t.reconcileObjects,
	} {
		if err := part(ctx, js, note); err != nil {
			return changes, err
		}
	}
	return changes, nil
}

// noter notes a change and, if it is to be applied, makes it.
type noter func(c Change, do func() error) error

func (t Topology) reconcileStreams(ctx context.Context, js jetstream.JetStream, note noter) error {
	for _, want := range t.streams() {
		have, err := js.Stream(ctx, want.Name)
		switch {
		case errors.Is(err, jetstream.ErrStreamNotFound):
			err = note(Change{Kind: "stream", Name: want.Name, Action: "create"}, func() error {
				_, err := js.CreateStream(ctx, want)
				return err
			})
			if err != nil {
				return err
			}
			continue
		case err != nil:
			return fmt.Errorf("look up stream %s: %w", want.Name, explain(err))
		}
		info := have.CachedInfo()
		if want.Name == t.Namespace.Stream(Requests) {
			if err := t.checkPartitions(info); err != nil {
				return err
			}
		}
		d := diff(want, info.Config)
		if len(d) == 0 {
			continue
		}
		merged := merge(info.Config, want)
		err = note(Change{Kind: "stream", Name: want.Name, Action: "update", Diff: d}, func() error {
			if err := t.dropFences(ctx, have, info.Config.Subjects); err != nil {
				return err
			}
			_, err := js.UpdateStream(ctx, merged)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// dropFences deletes what an earlier version stored beside the results, in a place of its own,
// to refuse late ones.
func (t Topology) dropFences(ctx context.Context, s jetstream.Stream, subjects []string) error {
	fences := t.Namespace.Subject("fence", "*")
	if !slices.Contains(subjects, fences) {
		return nil
	}
	return s.Purge(ctx, jetstream.WithPurgeSubject(fences))
}

func (t Topology) reconcileBuckets(ctx context.Context, js jetstream.JetStream, note noter) error {
	for _, want := range t.buckets() {
		have, err := js.KeyValue(ctx, want.Bucket)
		switch {
		case errors.Is(err, jetstream.ErrBucketNotFound):
			err = note(Change{Kind: "bucket", Name: want.Bucket, Action: "create"}, func() error {
				_, err := js.CreateKeyValue(ctx, want)
				return err
			})
			if err != nil {
				return err
			}
			continue
		case err != nil:
			return fmt.Errorf("look up bucket %s: %w", want.Bucket, explain(err))
		}
		status, err := have.Status(ctx)
		if err != nil {
			return fmt.Errorf("look up bucket %s: %w", want.Bucket, explain(err))
		}
		if d := diff(want, status.Config()); len(d) > 0 {
			err := note(Change{Kind: "bucket", Name: want.Bucket, Action: "update", Diff: d}, func() error {
				_, err := js.UpdateKeyValue(ctx, want)
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func (t Topology) reconcileObjects(ctx context.Context, js jetstream.JetStream, note noter) error {
	want := t.objects()
	have, err := js.ObjectStore(ctx, want.Bucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return note(Change{Kind: "object store", Name: want.Bucket, Action: "create"}, func() error {
			_, err := js.CreateObjectStore(ctx, want)
			return err
		})
	}
	var status jetstream.ObjectStoreStatus
	if err == nil {
		status, err = have.Status(ctx)
	}
	if err != nil {
		return fmt.Errorf("look up object store %s: %w", want.Bucket, explain(err))
	}
	is := jetstream.ObjectStoreConfig{
		Bucket: status.Bucket(), Description: status.Description(), TTL: status.TTL(), Storage: status.Storage(), Replicas: status.Replicas(),
	}
	d := diff(want, is)
	if len(d) == 0 {
		return nil
	}
	return note(Change{Kind: "object store", Name: want.Bucket, Action: "update", Diff: d}, func() error {
		_, err := js.UpdateObjectStore(ctx, want)
		return err
	})
}

func (t Topology) reconcileConsumers(ctx context.Context, js jetstream.JetStream, note noter) error {
	stream := t.Namespace.Stream(Requests)
	have := map[string]jetstream.ConsumerConfig{}
	if s, err := js.Stream(ctx, stream); err == nil {
		list := s.ListConsumers(ctx)
		for info := range list.Info() {
			have[info.Name] = info.Config
		}
		if err := list.Err(); err != nil {
			return fmt.Errorf("list consumers of %s: %w", stream, explain(err))
		}
	}
	want := t.consumers()
	// First those that are too many: consumers of a work queue must not overlap.
	for _, name := range slices.Sorted(maps.Keys(have)) {
		n, ours := strings.CutPrefix(name, "partition-")
		if i, err := strconv.Atoi(n); !ours || err != nil || i < t.Partitions {
			continue
		}
		err := note(Change{Kind: "consumer", Name: name, Action: "delete"}, func() error {
			return js.DeleteConsumer(ctx, stream, name)
		})
		if err != nil {
			return err
		}
	}
	for _, c := range want {
		old, exists := have[c.Durable]
		if !exists {
			err := note(Change{Kind: "consumer", Name: c.Durable, Action: "create"}, func() error {
				_, err := js.CreateConsumer(ctx, stream, c)
				return err
			})
			if err != nil {
				return err
			}
		} else if d := diff(c, old); len(d) > 0 {
			err := note(Change{Kind: "consumer", Name: c.Durable, Action: "update", Diff: d}, func() error {
				_, err := js.UpdateConsumer(ctx, stream, c)
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// checkPartitions refuses to put a creator's messages into two partitions.
func (t Topology) checkPartitions(info *jetstream.StreamInfo) error {
	have := info.Config.Metadata[metaPartitions]
	if have == "" || have == strconv.Itoa(t.Partitions) || info.State.Msgs == 0 {
		return nil
	}
	return fmt.Errorf("%w: %s has %s, %d are configured, and %d requests are stored; "+
		"let the workers finish with partitions: %s while nothing is published, until `nats stream info %s` shows no messages, and run setup again",
		ErrPartitionsFixed, info.Config.Name, have, t.Partitions, info.State.Msgs, have, info.Config.Name)
}

// diff compares what want says, field by field as JSON, with what the server
// has. What want leaves out is the server's business or an operator's.
func diff(want, have any) []string {
	w, h := fields(want), fields(have)
	var d []string
	for _, name := range slices.Sorted(maps.Keys(w)) {
		if name == "metadata" {
			var wm, hm map[string]string
			_ = json.Unmarshal(w[name], &wm)
			_ = json.Unmarshal(h[name], &hm)
			for _, key := range slices.Sorted(maps.Keys(wm)) {
				if wm[key] != hm[key] {
					d = append(d, fmt.Sprintf("metadata %s: %q → %q", key, hm[key], wm[key]))
				}
			}
			continue
		}
		if string(h[name]) != string(w[name]) {
			d = append(d, fmt.Sprintf("%s: %s → %s", name, readable(name, h[name]), readable(name, w[name])))
		}
	}
	return d
}

// readable is a value of a configuration for people: durations are nanoseconds
// in the API.
func readable(name string, value json.RawMessage) string {
	if value == nil {
		return "unset"
	}
	switch name {
	case "max_age", "duplicate_window", "ack_wait", "ttl", "limit_marker_ttl":
		if n, err := strconv.ParseInt(string(value), 10, 64); err == nil {
			return time.Duration(n).String()
		}
	}
	return string(value)
}

// fields are those of v's JSON that say something.
func fields(v any) map[string]json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		return nil
	}
	var m map[string]json.RawMessage
	_ = json.Unmarshal(b, &m)
	maps.DeleteFunc(m, func(_ string, value json.RawMessage) bool {
		s := string(value)
		return s == "0" || s == `""` || s == "null" || s == "false"
	})
	return m
}

// merge keeps what an operator added to a stream, placement or a size limit, and
// takes the rest from want.
func merge(have, want jetstream.StreamConfig) jetstream.StreamConfig {
	want.MaxBytes, want.Placement, want.Compression = have.MaxBytes, have.Placement, have.Compression
	want.Sources, want.Mirror, want.RePublish = have.Sources, have.Mirror, have.RePublish
	want.FirstSeq, want.MaxConsumers, want.MaxMsgSize = have.FirstSeq, have.MaxConsumers, have.MaxMsgSize
	metadata := maps.Clone(have.Metadata)
	if metadata == nil {
		metadata = map[string]string{}
	}
	maps.Copy(metadata, want.Metadata)
	want.Metadata = metadata
	return want
}

// explain says what to do about errors that a server's set-up causes.
func explain(err error) error {
	var api *jetstream.APIError
	switch {
	case errors.Is(err, nats.ErrNoResponders), errors.Is(err, jetstream.ErrJetStreamNotEnabled):
		return fmt.Errorf("%w: start the server with JetStream (nats-server -js, or jetstream {} in its configuration)", err)
	case errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount):
		return fmt.Errorf("%w: enable JetStream for this account", err)
	case errors.As(err, &api) && (api.ErrorCode == 10074 || api.ErrorCode == 10052 && strings.Contains(api.Description, "replicas")):
		return fmt.Errorf("%w: replicas above 1 need a cluster with as many servers; set nats.replicas to 1 for a single server", err)
	case errors.As(err, &api) && api.ErrorCode == 10047:
		return fmt.Errorf("%w: give the server more storage (max_file_store) or free some", err)
	}
	return err
}
