package publisher

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Topology is every stream, consumer and bucket that Headgate needs. This file
// is the only place where they are declared. Zero fields take their defaults.
type Topology struct {
	Namespace  Namespace
	Partitions int // default 32
	Replicas   int // default 1

	MaxAge            time.Duration // of a request; default 24 h
	ResultsMaxAge     time.Duration // default 72 h
	DLQMaxAge         time.Duration // default 30 days
	BacklogPerSubject int64         // requests of one creator and operation; default 100,000
	AckWait           time.Duration // default 30 s
}

// WithDefaults fills in what is zero.
func (t Topology) WithDefaults() Topology {
	set := func(d *time.Duration, value time.Duration) {
		if *d == 0 {
			*d = value
		}
	}
	set(&t.MaxAge, 24*time.Hour)
	set(&t.ResultsMaxAge, 72*time.Hour)
	set(&t.DLQMaxAge, 30*24*time.Hour)
	set(&t.AckWait, 30*time.Second)
	if t.Partitions == 0 {
		t.Partitions = 32
	}
	if t.Replicas == 0 {
		t.Replicas = 1
	}
	if t.BacklogPerSubject == 0 {
		t.BacklogPerSubject = 100_000
	}
	return t
}

// Check says what is wrong with t.
func (t Topology) Check() error {
	errs := []error{t.Namespace.Check()}
	if t.Partitions < 1 || t.Partitions > 1024 {
		errs = append(errs, fmt.Errorf("partitions must be 1 to 1024, not %d", t.Partitions))
	}
	if t.Replicas < 1 || t.Replicas > 5 {
		errs = append(errs, fmt.Errorf("replicas must be 1 to 5, not %d", t.Replicas))
	}
	if t.ResultsMaxAge < duplicateWindow {
		errs = append(errs, fmt.Errorf("results must be kept for at least %v, the window in which duplicates are known, not %v", duplicateWindow, t.ResultsMaxAge))
	}
	return errors.Join(errs...)
}

const (
	duplicateWindow = 10 * time.Minute

	// OwnerTTL is the age at which OWNERS forgets a lease that is not renewed.
	OwnerTTL = 10 * time.Second
	// OwnerMarker is for how long it is known that there was an owner.
	OwnerMarker = 15 * time.Minute

	// maxAckPending is out of reach: delayed NAKs count against it, and at its
	// limit one creator in trouble would stop all others of the partition.
	maxAckPending = 1_000_000
)

func (t Topology) requestStream() jetstream.StreamConfig {
	name, subject := t.Namespace.Stream, t.Namespace.Subject
	return jetstream.StreamConfig{
		Name:        name(Requests),
		Description: "Headgate: requests that wait for their call. A full stream refuses the publisher; nothing is dropped.",
		Subjects:    []string{subject("requests", "*", "*")},
		Retention:   jetstream.WorkQueuePolicy,
		Discard:     jetstream.DiscardNew,
		// The partition comes first: the server's subject index is a prefix
		// tree, and with the token last consuming takes twice as long.
		SubjectTransform: &jetstream.SubjectTransformConfig{
			Source:      subject("requests", "*", "*"),
			Destination: subject("requests", fmt.Sprintf("{{partition(%d,1)}}", t.Partitions), "{{wildcard(1)}}", "{{wildcard(2)}}"),
		},
		MaxMsgsPerSubject:    t.BacklogPerSubject,
		DiscardNewPerSubject: true,
		Duplicates:           duplicateWindow,
		Storage:              jetstream.FileStorage,
		Replicas:             t.Replicas,
		Metadata: map[string]string{
			metaPartitions:              strconv.Itoa(t.Partitions),
			"io.nats.monitor.enabled":   "true",
			"io.nats.monitor.msgs-warn": "200000", "io.nats.monitor.msgs-critical": "1000000",
		},
	}
}

func (t Topology) streams() []jetstream.StreamConfig {
	name, subject := t.Namespace.Stream, t.Namespace.Subject
	return []jetstream.StreamConfig{
		t.requestStream(),
		{
			Name:        name(Results),
			Description: "Headgate: outcomes, one a request: an answer of the API or the tombstone of a dead letter.",
			Subjects:    []string{subject("results", ">")},
			MaxAge:      t.ResultsMaxAge,
			Discard:     jetstream.DiscardNew,
			Duplicates:  duplicateWindow,
			Storage:     jetstream.FileStorage,
			Replicas:    t.Replicas,
			AllowDirect: true,
			Metadata:    map[string]string{"io.nats.monitor.enabled": "true"},
		},
		{
			Name:        name(DLQ),
			Description: "Headgate: requests that will not be called any more, and why. If it is full, requests stay where they are.",
			Subjects:    []string{subject("dlq", ">")},
			MaxAge:      t.DLQMaxAge,
			Discard:     jetstream.DiscardNew,
			Duplicates:  duplicateWindow,
			Storage:     jetstream.FileStorage,
			Replicas:    t.Replicas,
			AllowDirect: true,
			Metadata: map[string]string{
				"io.nats.monitor.enabled":   "true",
				"io.nats.monitor.msgs-warn": "1000", "io.nats.monitor.msgs-critical": "100000",
			},
		},
		{
			Name:        name(Events),
			Description: "Headgate: what people have to know.",
			Subjects:    []string{subject("events", ">")},
			MaxAge:      7 * 24 * time.Hour,
			Duplicates:  duplicateWindow,
			Storage:     jetstream.FileStorage,
			Replicas:    t.Replicas,
			AllowDirect: true,
			Metadata:    map[string]string{"io.nats.monitor.enabled": "true"},
		},
	}
}

// metaPartitions is where the request stream says how many partitions it has.
const metaPartitions = "headgate.partitions"

func (t Topology) consumers() []jetstream.ConsumerConfig {
	consumers := make([]jetstream.ConsumerConfig, t.Partitions)
	for n := range consumers {
		consumers[n] = jetstream.ConsumerConfig{
			Durable:       ConsumerName(n),
			Description:   fmt.Sprintf("Headgate: partition %d of %d", n, t.Partitions),
			FilterSubject: t.Namespace.StoredSubjects(n),
			AckPolicy:     jetstream.AckExplicitPolicy,
			AckWait:       t.AckWait,
			MaxAckPending: maxAckPending,
			// Past MaxDeliver a message of a work queue is a zombie, which
			// no consumer and no lag metric sees.
			MaxDeliver: -1,
			Replicas:   t.Replicas,
			Metadata: map[string]string{
				"io.nats.monitor.enabled":                  "true",
				"io.nats.monitor.outstanding-ack-critical": "200000",
			},
		}
	}
	return consumers
}

// longer is d and some more, or as long as a duration can be.
func longer(d, more time.Duration) time.Duration {
	if d > math.MaxInt64-more {
		return math.MaxInt64
	}
	return d + more
}

func (t Topology) buckets() []jetstream.KeyValueConfig {
	name := t.Namespace.Stream
	buckets := []jetstream.KeyValueConfig{
		{Bucket: name(Holds), Description: "Headgate: who must not be called, until when and why. By hand: nats kv put " + name(Holds) + " creator.<creator> 1h"},
		{Bucket: name(Limits), Description: "Headgate: limits of single creators"},
		{Bucket: name(Ledger), Description: "Headgate: attempts and outcomes of requests that failed", TTL: longer(t.MaxAge, 24*time.Hour)},
		{Bucket: name(Budgets), Description: "Headgate: what is left of fleet-wide limits"},
		{Bucket: name(Owners), Description: "Headgate: which worker owns what", TTL: OwnerTTL, LimitMarkerTTL: OwnerMarker},
	}
	for i := range buckets {
		buckets[i].Storage = jetstream.FileStorage
		buckets[i].Replicas = t.Replicas
		buckets[i].History = 1
	}
	return buckets
}

// objects is the store of bodies that are too large for a message.
func (t Topology) objects() jetstream.ObjectStoreConfig {
	return jetstream.ObjectStoreConfig{
		Bucket:      t.Namespace.Stream(Bodies),
		Description: "Headgate: bodies that are too large for a message",
		TTL:         max(t.ResultsMaxAge, t.DLQMaxAge),
		Storage:     jetstream.FileStorage,
		Replicas:    t.Replicas,
	}
}
