package broker

import (
	"encoding/json"
	"errors"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Trouble says what an error of the server, or of its client, means for the message at hand.
type Trouble uint8

const (
	// NotNow: the same may succeed later. The server does not answer, has no leader, or lacks
	// a stream. All that is unknown counts as this.
	NotNow Trouble = iota
	// WrittenBetween: a compare-and-set lost. What stands there has to be read.
	WrittenBetween
	// InFlight: another message on this subject, or with this id, is being stored. Its outcome
	// is not known yet: ask again.
	InFlight
	// Full: a stream, a subject, the server or the account is at its limit. It may succeed once
	// there is room.
	Full
	// Never: the message can never be stored as it is, whenever it is sent.
	Never
)

func (t Trouble) String() string {
	switch t {
	case WrittenBetween:
		return "written in between"
	case InFlight:
		return "in flight"
	case Full:
		return "full"
	case Never:
		return "never"
	}
	return "not now"
}

// codes are the server's error codes that say more than their HTTP status does.
var codes = map[jetstream.ErrorCode]Trouble{
	10070: WrittenBetween, // wrong last msg id
	10071: WrittenBetween, // wrong last sequence
	10158: InFlight,       // duplicate message id is in process
	10164: InFlight,       // wrong last sequence, without one: the subject is being written to

	10002: Full, // resource limits exceeded for account
	10023: Full, // insufficient resources
	10028: Full, // insufficient memory
	10047: Full, // insufficient storage
	10122: Full, // stream max bytes exceeds account limit

	// States of a stream or an account that an operator can put right.
	10059: NotNow, // stream not found
	10109: NotNow, // sealed
	10120: NotNow, // no JetStream limit for this account
	10185: NotNow, // API level

	10111: Never, // rollup failed
}

// codeStoreFailed: the store refused the message. Its description says why.
const codeStoreFailed = 10077

// TroubleOf reads an error of the jetstream client, of a Reader or of a connection. The error
// must not be nil.
func TroubleOf(err error) Trouble {
	var api *jetstream.APIError
	if errors.As(err, &api) {
		return ofAPI(api)
	}
	if errors.Is(err, jetstream.ErrKeyExists) {
		return WrittenBetween
	}
	for _, refusal := range refusals {
		if errors.Is(err, refusal) {
			return Never
		}
	}
	var (
		unsupportedValue *json.UnsupportedValueError
		unsupportedType  *json.UnsupportedTypeError
		marshaler        *json.MarshalerError
	)
	if errors.As(err, &unsupportedValue) || errors.As(err, &unsupportedType) || errors.As(err, &marshaler) {
		return Never
	}
	return NotNow
}

// refusals are the client's own: it does not even send such a message.
var refusals = []error{
	nats.ErrMaxPayload, nats.ErrBadHeaderMsg, nats.ErrBadSubject, nats.ErrInvalidMsg,
	jetstream.ErrInvalidSubject, jetstream.ErrInvalidKey,
}

func ofAPI(e *jetstream.APIError) Trouble {
	if e.ErrorCode == codeStoreFailed {
		switch {
		case strings.HasPrefix(e.Description, "maximum"): // messages, bytes, messages per subject
			return Full
		case strings.Contains(e.Description, "too large"):
			return Never
		}
		return NotNow
	}
	if t, ok := codes[e.ErrorCode]; ok {
		return t
	}
	switch {
	case e.Code == 408 || e.Code == 409 || e.Code == 429:
		return NotNow
	case e.Code >= 400 && e.Code < 500:
		return Never
	}
	return NotNow
}
