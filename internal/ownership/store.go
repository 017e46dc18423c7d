package ownership

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// store reads and writes OWNERS. It reads through the stream's leader: a replica that lags
// behind would answer that a key is missing that is there.
type store struct {
	nc     *nats.Conn
	js     jetstream.JetStream
	kv     jetstream.KeyValue
	stream string
	api    string // where requests to JetStream are sent
	put    string // where keys are published, without the key
}

func newStore(nc *nats.Conn, js jetstream.JetStream, kv jetstream.KeyValue) *store {
	s := &store{nc: nc, js: js, kv: kv, stream: "KV_" + kv.Bucket(), api: jetstream.DefaultAPIPrefix}
	switch opts := js.Options(); {
	case opts.Domain != "":
		s.api = "$JS." + opts.Domain + ".API."
	case opts.APIPrefix != "":
		s.api = strings.TrimSuffix(opts.APIPrefix, ".") + "."
	}
	if s.api != jetstream.DefaultAPIPrefix {
		s.put = s.api
	}
	s.put += s.subject("")
	return s
}

// subject is the one that a key is stored under.
func (s *store) subject(key string) string { return "$KV." + s.kv.Bucket() + "." + key }

// message is one that OWNERS has.
type message struct {
	key      string
	sequence uint64
	header   nats.Header
	data     []byte
	time     time.Time
}

// last reads the last message of a key, nil if there is none.
func (s *store) last(ctx context.Context, key string) (*message, error) {
	return s.get(ctx, map[string]any{"last_by_subj": s.subject(key)})
}

// each reads the messages whose keys match.
func (s *store) each(ctx context.Context, keys string, do func(*message)) error {
	for from := uint64(1); ; {
		m, err := s.get(ctx, map[string]any{"seq": from, "next_by_subj": s.subject(keys)})
		if err != nil || m == nil {
			return err
		}
		do(m)
		from = m.sequence + 1
	}
}

func (s *store) get(ctx context.Context, which map[string]any) (*message, error) {
	fail := func(err error) (*message, error) {
		return nil, fmt.Errorf("get a message of %s (%v): %w", s.stream, which, err)
	}
	request, err := json.Marshal(which)
	if err != nil {
		return fail(err)
	}
	reply, err := s.nc.RequestWithContext(ctx, s.api+"STREAM.MSG.GET."+s.stream, request)
	if err != nil {
		return fail(err)
	}
	var answer struct {
		Error   *jetstream.APIError `json:"error"`
		Message *struct {
			Subject  string    `json:"subject"`
			Sequence uint64    `json:"seq"`
			Header   []byte    `json:"hdrs"`
			Data     []byte    `json:"data"`
			Time     time.Time `json:"time"`
		} `json:"message"`
	}
	if err := json.Unmarshal(reply.Data, &answer); err != nil {
		return fail(err)
	}
	switch e := answer.Error; {
	case e != nil && e.ErrorCode == jetstream.JSErrCodeMessageNotFound:
		return nil, nil
	case e != nil:
		return fail(e)
	case answer.Message == nil:
		return fail(errors.New("the answer has no message"))
	}
	stored := answer.Message
	m := &message{
		key: strings.TrimPrefix(stored.Subject, s.subject("")), sequence: stored.Sequence, data: stored.Data, time: stored.Time,
	}
	if len(stored.Header) > 0 {
		// Headers that cannot be decoded are foreign, as is the value with them.
		m.header, _ = nats.DecodeHeadersMsg(stored.Header)
	}
	return m, nil
}

// write stores a value if the key's last message is the expected one, 0: if it has none.
func (s *store) write(ctx context.Context, key string, value []byte, expected uint64) (uint64, error) {
	revision, err := s.kv.Update(ctx, key, value, expected)
	if err != nil {
		return 0, fmt.Errorf("write %s: %w", key, err)
	}
	return revision, nil
}

// release leaves a mark in the place of a value that is still the expected one. The mark
// does not expire.
func (s *store) release(ctx context.Context, key string, expected uint64, header nats.Header) error {
	m := nats.NewMsg(s.put + key)
	for name, values := range header {
		m.Header[name] = values
	}
	m.Header.Set(headerOperation, purged)
	m.Header.Set(jetstream.MsgRollup, jetstream.MsgRollupSubject)
	m.Header.Set(jetstream.MsgTTLHeader, "never")
	m.Header.Set(jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(expected, 10))
	if _, err := s.js.PublishMsg(ctx, m); err != nil {
		return fmt.Errorf("release %s: %w", key, err)
	}
	return nil
}

// bucketState tells one bucket from another of the same name.
type bucketState struct {
	created time.Time // of the stream, by the server's clock
	last    uint64    // sequence
	born    time.Time // as created, by this worker's clock
}

// state looks at the bucket's stream.
func (s *store) state(ctx context.Context) (bucketState, error) {
	stream, err := s.js.Stream(ctx, s.stream)
	if err != nil {
		return bucketState{}, fmt.Errorf("look up stream %s: %w", s.stream, err)
	}
	info := stream.CachedInfo()
	b := bucketState{created: info.Created, last: info.State.LastSeq, born: time.Now()}
	if age := info.TimeStamp.Sub(info.Created); age > 0 {
		b.born = b.born.Add(-age)
	}
	return b, nil
}

// Headers of OWNERS' messages.
const (
	headerOperation = "KV-Operation"
	purged          = "PURGE"
	deleted         = "DEL"

	headerWorker  = "Headgate-Worker"  // which worker released
	headerCrashed = "Headgate-Crashed" // the owner before it crashed, and it never entered
)

// marks reports whether m says that the key has no value.
func (m *message) marks() bool {
	return m.header.Get(headerOperation) != "" || m.header.Get(jetstream.MarkerReasonHeader) != ""
}

// released reports whether a worker left m when it gave the partition up.
func (m *message) released() bool {
	switch m.header.Get(headerOperation) {
	case purged:
		return m.header.Get(headerWorker) != ""
	case deleted: // workers did so before there was a mark of their own
		return m.header.Get(jetstream.MarkerReasonHeader) == ""
	}
	return false
}

// writtenBetween reports whether a compare-and-set failed because the key was, or is just being,
// written by another client, or because an earlier attempt got through.
func writtenBetween(err error) bool {
	var api *jetstream.APIError
	if !errors.As(err, &api) {
		return false
	}
	switch api.ErrorCode {
	case jetstream.JSErrCodeStreamWrongLastSequence, codeInFlight, codeDuplicateInFlight:
		return true
	}
	return false
}

const (
	// codeInFlight: a clustered stream has another write to the same subject in flight.
	codeInFlight = 10164
	// codeDuplicateInFlight: it has one with the same message id in flight.
	codeDuplicateInFlight = 10158
)
