package publisher

import (
	"cmp"
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/headgate-io/headgate/classify"
)

// A dead letter can be stored whatever its request and the API's answers contain. The server
// takes at most 65,535 bytes of headers; a letter has less than maxHeaders, of which the
// request's own headers and the history each have a share.
const maxHeaders = 60 << 10

// room is for how many bytes of headers this server has room.
func (p *Publisher) room() int {
	return min(maxHeaders, int(p.js.Conn().MaxPayload()/2))
}

func ownRoom(room int) int     { return room * 2 / 5 } // 24 KiB of 60
func historyRoom(room int) int { return room / 4 }     // 15 KiB of 60

// bounded is d with everything cut to what fits into headers. Its identity stays as it is.
func (d DeadLetter) bounded(room int) DeadLetter {
	for field, limit := range map[*string]int{
		&d.Reason: maxHeader, &d.Code: 256, &d.Action: 256, &d.Field: 256, &d.UpstreamRequestID: 256,
		&d.Provider: 128, &d.SourceStream: 128, &d.SourceSubject: 512,
	} {
		*field = oneLine(*field, limit)
	}
	d.Scope = classify.Scope(oneLine(string(d.Scope), 32))
	d.History = latest(d.History, historyRoom(room))
	return d
}

// latest are as many of the latest attempts as fit into limit bytes of JSON.
func latest(attempts []Attempt, limit int) []Attempt {
	for len(attempts) > 0 {
		if b, err := json.Marshal(attempts); err == nil && len(b) <= limit {
			return attempts
		}
		attempts = attempts[(len(attempts)+1)/2:]
	}
	return nil
}

// headers are those of the request that may and can be kept, and ours. d is bounded.
func (d *DeadLetter) headers(room int) nats.Header {
	h, dropped := kept(d.Header, d.RequestID, ownRoom(room))
	for name, value := range map[string]string{
		DlqClass: string(d.Class), DlqCode: d.Code, DlqReason: d.Reason, DlqAction: d.Action,
		DlqScope: string(d.Scope), DlqField: d.Field, DlqHTTPStatus: positive(d.HTTPStatus),
		DlqAttempts: strconv.Itoa(d.Attempts), DlqDeliveries: strconv.FormatUint(d.Deliveries, 10),
		DlqFirstFailedAt: timestamp(d.FirstFailedAt), DlqFailedAt: timestamp(d.FailedAt),
		DlqUpstreamRequestID: d.UpstreamRequestID, DlqProvider: d.Provider, DlqSourceStream: d.SourceStream,
		DlqSourceSubject: d.SourceSubject, DlqHeadersDropped: positive(dropped),
		// Fit for a header as they are, so that subject and headers agree.
		DlqCreator: d.Creator, DlqOperation: d.Operation, DlqMsgID: d.RequestID,
	} {
		if value != "" {
			h[name] = []string{value}
		}
	}
	setSource(h, d.Source, DlqSourceSeq, DlqSourceStored)
	if len(d.History) > 0 {
		if b, err := json.Marshal(d.History); err == nil {
			h[DlqHistory] = []string{oneLine(string(b), len(b))}
		}
	}
	return h
}

type headerLine struct{ name, value string }

func (l headerLine) size() int { return len(l.name) + len(l.value) + 4 }

// kept are the request's headers, except those that have a meaning of their own and those that
// may carry credentials. Lines that no client can publish are dropped; so are the largest ones
// if all together are larger than limit.
func kept(request nats.Header, id string, limit int) (h nats.Header, dropped int) {
	var lines []headerLine
	size := 0
	for name, values := range request {
		if reserved(name, id) || secret(name) {
			continue
		}
		for _, value := range values {
			l := headerLine{name, value}
			if !storable(name, value) {
				dropped++
				continue
			}
			lines = append(lines, l)
			size += l.size()
		}
	}
	if size > limit {
		slices.SortStableFunc(lines, func(a, b headerLine) int {
			return cmp.Or(cmp.Compare(b.size(), a.size()), strings.Compare(a.name, b.name))
		})
		n := 0
		for ; size > limit; n++ {
			size -= lines[n].size()
		}
		lines, dropped = lines[n:], dropped+n
	}
	h = make(nats.Header, len(lines)+24)
	for _, l := range lines {
		h[l.name] = append(h[l.name], l.value)
	}
	return h, dropped
}

// reserved reports whether a header of a request means something to the server or to Headgate,
// so that it must not be the request's to set.
func reserved(name, id string) bool {
	return strings.HasPrefix(name, "Nats-") || strings.HasPrefix(name, "Dlq-") || forged(name, id)
}

// forged reports whether a header of a request says where an outcome's body is, or that the
// request is a replay, which it is not.
func forged(name, id string) bool {
	return strings.HasPrefix(name, "Headgate-Body-") ||
		(name == HeaderReplay || name == HeaderReplayedClass) && Replays(id) == 0
}

// storable reports whether a client can publish a header. The server stores any bytes. A message
// without a body and with a header Status looks like the server's own to clients.
func storable(name, value string) bool {
	return token(name) && !strings.ContainsAny(value, "\r\n\x00") && name != "Status" && name != "Description"
}

// token reports whether a header's name is a token (RFC 9110, 5.6.2).
func token(name string) bool {
	for i := range len(name) {
		if c := name[i]; !plainByte(c) && strings.IndexByte("!#$%&'*+.^`|~", c) < 0 {
			return false
		}
	}
	return name != ""
}

// secret reports whether a header of a request may carry credentials. Those do
// not go into dead letters, which people look at.
func secret(name string) bool {
	name = strings.ToLower(name)
	for _, part := range []string{"authorization", "cookie", "token", "secret", "password", "api-key", "apikey", "x-key"} {
		if strings.Contains(name, part) {
			return true
		}
	}
	return false
}

func positive(n int) string {
	if n <= 0 {
		return ""
	}
	return strconv.Itoa(n)
}

func timestamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}
