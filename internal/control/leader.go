package control

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// next reads the first entry from a sequence on, through the stream's leader: a watch
// may sit on a replica that lags. nil: there is none.
func (f *follower) next(ctx context.Context, from uint64) (*Entry, error) {
	prefix := "$KV." + f.bucket + "."
	question, err := json.Marshal(map[string]any{"seq": from, "next_by_subj": prefix + ">"})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, lookWithin)
	defer cancel()
	m, err := f.js.Conn().RequestWithContext(ctx, apiPrefix(f.js)+"STREAM.MSG.GET.KV_"+f.bucket, question)
	if err != nil {
		return nil, fmt.Errorf("read bucket %s from its leader: %w", f.bucket, err)
	}
	var answer struct {
		Error   *jetstream.APIError `json:"error"`
		Message *struct {
			Subject string    `json:"subject"`
			Seq     uint64    `json:"seq"`
			Headers []byte    `json:"hdrs"`
			Data    []byte    `json:"data"`
			Time    time.Time `json:"time"`
		} `json:"message"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		return nil, fmt.Errorf("read bucket %s from its leader: %w", f.bucket, err)
	}
	switch {
	case answer.Error != nil && answer.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound:
		return nil, nil
	case answer.Error != nil:
		return nil, fmt.Errorf("read bucket %s from its leader: %w", f.bucket, answer.Error)
	case answer.Message == nil:
		return nil, fmt.Errorf("read bucket %s from its leader: the answer has no message", f.bucket)
	}
	e := &Entry{Key: strings.TrimPrefix(answer.Message.Subject, prefix), Value: answer.Message.Data, Revision: answer.Message.Seq, Created: answer.Message.Time}
	if h, err := nats.DecodeHeadersMsg(answer.Message.Headers); err == nil {
		e.Operation, e.who = operationOf(h), h.Get(headerWho)
	}
	return e, nil
}

// The headers by which a bucket's stream says that a key is gone.
const (
	headerOperation = "KV-Operation"
	headerWho       = "Headgate-Who" // of a release
)

func operationOf(h nats.Header) jetstream.KeyValueOp {
	switch {
	case h.Get(headerOperation) == "DEL", h.Get(jetstream.MarkerReasonHeader) == "Remove":
		return jetstream.KeyValueDelete
	case h.Get(headerOperation) == "PURGE", h.Get(jetstream.MarkerReasonHeader) != "":
		return jetstream.KeyValuePurge
	}
	return jetstream.KeyValuePut
}

// apiPrefix is the prefix of JetStream's API, which has its domain.
func apiPrefix(js jetstream.JetStream) string {
	if domain := js.Options().Domain; domain != "" {
		return "$JS." + domain + ".API."
	}
	if p := js.Options().APIPrefix; p != "" {
		return strings.TrimSuffix(p, ".") + "."
	}
	return jetstream.DefaultAPIPrefix
}
