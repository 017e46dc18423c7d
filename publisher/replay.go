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

// Replays is how often the request with an id was replayed, as the id says.
func Replays(id string) int {
	_, n := replayed(id)
	return n
}

// replayed splits the id of a replay.
func replayed(id string) (original string, n int) {
	if i := strings.LastIndex(id, replayMark); i > 0 {
		number := id[i+len(replayMark):]
		if n, err := strconv.Atoi(number); err == nil && n > 0 && strconv.Itoa(n) == number {
			return id[:i], n
		}
	}
	return id, 0
}

// replayID is the id of the n-th replay.
func replayID(id string, n int) string {
	id, _ = replayed(id)
	if rest, ok := strings.CutPrefix(id, fallbackMark); ok {
		id = "noid:" + rest // clients cannot publish under a fallback id
	}
	if mark := replayMark + strconv.Itoa(n); len(id)+len(mark) <= maxHeader {
		return id + mark
	}
	return IDToken(id) + replayMark + strconv.Itoa(n)
}

// ReplayOf is the n-th replay of a request that is a dead letter. It has an id of its own: the
// old one has its outcome, and the stream would take it for a repeat.
func ReplayOf(id string, n int, creator, operation string, letter nats.Header, payload []byte) Request {
	r := Request{ID: replayID(id, n), Creator: creator, Operation: operation, Payload: payload, Header: nats.Header{}}
	for name, values := range letter {
		// A replay means that the call is wanted, late as it is: no deadline.
		if !reserved(name, r.ID) && name != HeaderDeadline {
			r.Header[name] = values
		}
	}
	if kind := letter.Get(HeaderBodyContentType); kind != "" {
		r.Header[HeaderContentType] = []string{kind}
	}
	r.Header[HeaderReplay] = []string{strconv.Itoa(n)}
	r.Header[HeaderReplayedClass] = []string{letter.Get(DlqClass)}
	return r
}
