package publisher

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/mutant"
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

// unreadable is the token of a creator or an operation that cannot be read. No name has it: as
// an encoded one it would be wrong.
const unreadable = "=unreadable"

// outcomeTokens encodes the creator, the operation and the id of an outcome. Creator and
// operation are empty if they could not be read from the request.
func outcomeTokens(creator, operation, id string) (c, o, i string, err error) {
	if id == "" || id != oneLine(id, maxHeader) {
		return "", "", "", fmt.Errorf("id %q must be one line of at most %d bytes, see ParseRequest", clip(id, 80), maxHeader)
	}
	if c, err = outcomeToken(creator); err != nil {
		return "", "", "", fmt.Errorf("creator: %w", err)
	}
	if o, err = outcomeToken(operation); err != nil {
		return "", "", "", fmt.Errorf("operation: %w", err)
	}
	return c, o, IDToken(id), nil
}

func outcomeToken(name string) (string, error) {
	if name == "" {
		return unreadable, nil
	}
	return EncodeToken(name)
}

// ResultSubject is a request's place in RESULTS. Creator and operation are empty where the
// request's could not be read.
func (n Namespace) ResultSubject(creator, operation, id string) (string, error) {
	c, o, i, err := outcomeTokens(creator, operation, id)
	if err != nil {
		return "", err
	}
	return n.Subject("results", c, o, i), nil
}

// DeadLetterSubject is where the dead letter of a request is stored. Creator and operation are
// empty where the request's could not be read.
func (n Namespace) DeadLetterSubject(class classify.Class, creator, operation, id string) (string, error) {
	if !slices.Contains(classify.Classes(), class) {
		return "", fmt.Errorf("there is no class %q", clip(string(class), 40))
	}
	c, o, i, err := outcomeTokens(creator, operation, id)
	if err != nil {
		return "", err
	}
	return n.Subject("dlq", string(class), c, o, i), nil
}

// RecordKey is the key of a request's record in LEDGER, <creator>.<id> as tokens.
func RecordKey(creator, id string) string {
	if mutant.On(mutant.LedgerByID) {
		return IDToken(id)
	}
	c, err := outcomeToken(creator)
	if err != nil {
		c = unreadable
	}
	return c + "." + IDToken(id)
}

// StoredSubjects matches all requests of a partition, as they are stored.
func (n Namespace) StoredSubjects(partition int) string {
	return n.Subject("requests", strconv.Itoa(partition), ">")
}

// ParseStored reads a stored request's subject, requests.<partition>.<creator>.<operation>.
// It trusts nothing: servers store any bytes in a token, and store a subject with a wildcard in
// it without a partition. With an error it returns what can be read; the rest is empty.
func (n Namespace) ParseStored(subject string) (creator, operation string, err error) {
	rest := subject
	if n != "" {
		rest = strings.TrimPrefix(subject, string(n)+".")
	}
	tokens := strings.Split(rest, ".")
	if len(tokens) < 3 || len(tokens) > 4 || tokens[0] != "requests" {
		return "", "", fmt.Errorf("subject %q must be requests.<creator>.<operation>", clip(subject, 80))
	}
	if len(tokens) == 3 {
		err = fmt.Errorf("subject %q must be requests.<creator>.<operation>, without wildcards", clip(subject, 80))
	}
	var creatorErr, operationErr error
	tokens = tokens[len(tokens)-2:]
	if creator, creatorErr = DecodeToken(tokens[0]); creatorErr != nil {
		creatorErr = fmt.Errorf("creator: %w", creatorErr)
	}
	if operation, operationErr = DecodeToken(tokens[1]); operationErr != nil {
		operationErr = fmt.Errorf("operation: %w", operationErr)
	}
	return creator, operation, cmp.Or(err, creatorErr, operationErr)
}

// ParseDeadLetter reads a dead letter's subject, dlq.<CLASS>.<creator>.<operation>.<id>. Creator
// and operation are empty if the request's could not be read. The id stays a token, see IDToken.
func (n Namespace) ParseDeadLetter(subject string) (class classify.Class, creator, operation, id string, err error) {
	rest := subject
	if n != "" {
		rest = strings.TrimPrefix(subject, string(n)+".")
	}
	tokens := strings.Split(rest, ".")
	if len(tokens) != 5 || tokens[0] != "dlq" {
		return "", "", "", "", fmt.Errorf("subject %q must be dlq.<CLASS>.<creator>.<operation>.<id>", clip(subject, 80))
	}
	for i, name := range map[int]*string{2: &creator, 3: &operation} {
		if tokens[i] == unreadable {
			continue
		}
		if *name, err = DecodeToken(tokens[i]); err != nil {
			return "", "", "", "", fmt.Errorf("subject %q: %w", clip(subject, 80), err)
		}
	}
	return classify.Class(tokens[1]), creator, operation, tokens[4], nil
}

// ConsumerName is the durable consumer of a partition.
func ConsumerName(partition int) string { return fmt.Sprintf("partition-%d", partition) }
