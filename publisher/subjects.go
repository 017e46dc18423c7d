package publisher

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/headgate-io/headgate/classify"
)

// Streams and buckets, without a namespace.
const (
	Requests = "REQUESTS"
	Results  = "RESULTS"
	DLQ      = "DLQ"
	Events   = "EVENTS"

	Holds   = "HOLDS"
	Limits  = "LIMITS"
	Ledger  = "LEDGER"
	Budgets = "BUDGETS"
	Owners  = "OWNERS"

	Bodies = "BODIES" // object store
)

// Namespace keeps several upstream APIs apart on one server: it is put in front of
// all subjects ("ofauth.requests.…") and, in upper case, of all streams
// and buckets ("OFAUTH_REQUESTS"). The empty one adds nothing.
type Namespace string

// Check refuses what cannot be part of a subject and of a stream's name.
func (n Namespace) Check() error {
	if len(n) > 32 {
		return fmt.Errorf("namespace %q is too long: it may have 32 bytes", n)
	}
	for i := range len(n) {
		if !plainByte(n[i]) {
			return fmt.Errorf("namespace %q: it may have letters, digits, _ and -", n)
		}
	}
	return nil
}

// Stream is the name of a stream or bucket in this namespace.
func (n Namespace) Stream(name string) string {
	if n == "" {
		return name
	}
	return strings.ToUpper(string(n)) + "_" + name
}

// Subject is a subject in this namespace.
func (n Namespace) Subject(tokens ...string) string {
	s := strings.Join(tokens, ".")
	if n != "" {
		s = string(n) + "." + s
	}
	return s
}

// named encodes a creator and an operation.
func named(creator, operation string) (c, o string, err error) {
	if c, err = EncodeToken(creator); err != nil {
		return "", "", fmt.Errorf("creator: %w", err)
	}
	if o, err = EncodeToken(operation); err != nil {
		return "", "", fmt.Errorf("operation: %w", err)
	}
	return c, o, nil
}

// RequestSubject is where an ingester publishes.
func (n Namespace) RequestSubject(creator, operation string) (string, error) {
	c, o, err := named(creator, operation)
	if err != nil {
		return "", err
	}
	return n.Subject("requests", c, o), nil
}

// ResultSubject is where the result of a request is stored; with an empty id,
// where it is if ids are not part of the subject.
func (n Namespace) ResultSubject(creator, operation, id string) (string, error) {
	c, o, err := named(creator, operation)
	if err != nil {
		return "", err
	}
	if id == "" {
		return n.Subject("results", c, o), nil
	}
	return n.Subject("results", c, o, IDToken(id)), nil
}

// DeadLetterSubject is where the dead letter of a request is stored.
func (n Namespace) DeadLetterSubject(class classify.Class, creator, operation, id string) (string, error) {
	c, o, err := named(creator, operation)
	if err != nil {
		return "", err
	}
	return n.Subject("dlq", string(class), c, o, IDToken(id)), nil
}

// StoredSubjects matches all requests of a partition, as they are stored.
func (n Namespace) StoredSubjects(partition int) string {
	return n.Subject("requests", strconv.Itoa(partition), ">")
}

// ParseStored reads a stored request's subject, requests.<partition>.<creator>.<operation>.
// It trusts nothing: servers store any bytes in a token.
func (n Namespace) ParseStored(subject string) (creator, operation string, err error) {
	rest := subject
	if n != "" {
		rest = strings.TrimPrefix(subject, string(n)+".")
	}
	tokens := strings.Split(rest, ".")
	if len(tokens) != 4 || tokens[0] != "requests" {
		return "", "", fmt.Errorf("subject %q must be requests.<creator>.<operation>", clip(subject, 80))
	}
	if creator, err = DecodeToken(tokens[2]); err != nil {
		return "", "", fmt.Errorf("creator: %w", err)
	}
	if operation, err = DecodeToken(tokens[3]); err != nil {
		return "", "", fmt.Errorf("operation: %w", err)
	}
	return creator, operation, nil
}

// ConsumerName is the durable consumer of a partition.
func ConsumerName(partition int) string { return fmt.Sprintf("partition-%d", partition) }
