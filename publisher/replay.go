package publisher

import (
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"
)

// Headers of a request that was a dead letter before.
const (
	HeaderReplay        = "Headgate-Replay"         // how often it was replayed, this time included
	HeaderReplayedClass = "Headgate-Replayed-Class" // what it died of the last time
)

// replayMark stands between a request's id and the number of its replay.
const replayMark = "~r"

// ReplayOf is the n-th replay of a request that is a dead letter. It has an id of its own: the
// old one has its outcome, and the stream would take it for a repeat.
func ReplayOf(id string, n int, creator, operation string, letter nats.Header, payload []byte) Request {
	if i := strings.LastIndex(id, replayMark); i > 0 {
		if _, err := strconv.Atoi(id[i+len(replayMark):]); err == nil {
			id = id[:i]
		}
	}
	h := nats.Header{}
	for name, values := range letter {
		switch {
		case strings.HasPrefix(name, "Nats-"), strings.HasPrefix(name, "Dlq-"), strings.HasPrefix(name, "Headgate-Body-"),
			name == HeaderDeadline: // who replays it wants the call, late as it is
		default:
			h[name] = values
		}
	}
	if kind := letter.Get(HeaderBodyContentType); kind != "" {
		h[HeaderContentType] = []string{kind}
	}
	h[HeaderReplay] = []string{strconv.Itoa(n)}
	h[HeaderReplayedClass] = []string{letter.Get(DlqClass)}
	return Request{ID: id + replayMark + strconv.Itoa(n), Creator: creator, Operation: operation, Payload: payload, Header: h}
}
