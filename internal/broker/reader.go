// Package broker asks a JetStream server what the jetstream client does not: it reads and
// deletes single messages through their stream's leader, and it tells the errors that pass
// from those that do not.
//
// A direct get may be answered by a replica that lags. Where "there is none" decides what
// happens next, only the leader's answer will do.
package broker

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Reader reads and deletes stored messages through the leaders of their streams. It is safe
// for concurrent use.
type Reader struct {
	nc  *nats.Conn
	api string // prefix of the JetStream API
}

// NewReader makes a Reader for the account, and the domain, that js works with.
func NewReader(js jetstream.JetStream) *Reader {
	return &Reader{nc: js.Conn(), api: apiPrefix(js.Options())}
}

func apiPrefix(o jetstream.JetStreamOptions) string {
	switch {
	case o.APIPrefix != "" && o.APIPrefix[len(o.APIPrefix)-1] == '.':
		return o.APIPrefix
	case o.APIPrefix != "":
		return o.APIPrefix + "."
	case o.Domain != "":
		return "$JS." + o.Domain + ".API."
	}
	return jetstream.DefaultAPIPrefix
}

// Message is a stored message.
type Message struct {
	Subject  string
	Sequence uint64
	// Header is nil if there are no headers, or if they cannot be decoded: servers store any
	// bytes. RawHeader has them as they are stored.
	Header    nats.Header
	RawHeader []byte
	Data      []byte
	Time      time.Time
}

// Last reads the last message of a subject. It returns nil, nil if there is none.
func (r *Reader) Last(ctx context.Context, stream, subject string) (*Message, error) {
	return r.message(ctx, stream, map[string]any{"last_by_subj": subject})
}

// Next reads the first message whose sequence is at least from and whose subject matches;
// "" matches any. It returns nil, nil if there is none.
func (r *Reader) Next(ctx context.Context, stream string, from uint64, subject string) (*Message, error) {
	if subject == "" {
		subject = ">"
	}
	return r.message(ctx, stream, map[string]any{"seq": max(from, 1), "next_by_subj": subject})
}

// At reads the message with a sequence. It returns nil, nil if there is none, or none any more.
func (r *Reader) At(ctx context.Context, stream string, seq uint64) (*Message, error) {
	if seq == 0 {
		return nil, nil // the first one has 1
	}
	return r.message(ctx, stream, map[string]any{"seq": seq})
}

func (r *Reader) message(ctx context.Context, stream string, which map[string]any) (*Message, error) {
	var answer struct {
		Message struct {
			Subject  string    `json:"subject"`
			Sequence uint64    `json:"seq"`
			Header   []byte    `json:"hdrs"`
			Data     []byte    `json:"data"`
			Time     time.Time `json:"time"`
		} `json:"message"`
	}
	found, err := r.ask(ctx, "STREAM.MSG.GET."+stream, which, &answer)
	if err != nil {
		return nil, fmt.Errorf("get a message of %s (%v): %w", stream, which, err)
	}
	if !found {
		return nil, nil
	}
	stored := answer.Message
	m := &Message{Subject: stored.Subject, Sequence: stored.Sequence, RawHeader: stored.Header, Data: stored.Data, Time: stored.Time}
	if len(stored.Header) > 0 {
		if h, err := nats.DecodeHeadersMsg(stored.Header); err == nil {
			m.Header = h
		}
	}
	return m, nil
}

// Delete deletes a stored message. It may be gone already.
func (r *Reader) Delete(ctx context.Context, stream string, seq uint64) error {
	if _, err := r.ask(ctx, "STREAM.MSG.DELETE."+stream, map[string]any{"seq": seq, "no_erase": true}, nil); err != nil {
		return fmt.Errorf("delete message %d of %s: %w", seq, stream, err)
	}
	return nil
}

// askTimeout bounds a question whose context has no deadline.
const askTimeout = 5 * time.Second

// ask sends a request to the JetStream API and reads the answer into answer, unless that is
// nil. It reports false if there is no such message.
func (r *Reader) ask(ctx context.Context, subject string, question map[string]any, answer any) (found bool, err error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, askTimeout)
		defer cancel()
	}
	request, err := json.Marshal(question)
	if err != nil {
		return false, err
	}
	m, err := r.nc.RequestWithContext(ctx, r.api+subject, request)
	if err != nil {
		return false, err
	}
	var refusal struct {
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(m.Data, &refusal); err != nil {
		return false, fmt.Errorf("the server's answer cannot be read: %w", err)
	}
	switch e := refusal.Error; {
	case e == nil && answer == nil:
		return true, nil
	case e == nil:
		return true, json.Unmarshal(m.Data, answer)
	case gone(e):
		return false, nil
	default:
		return false, e
	}
}

// gone reports whether the server says that there is no such message. For a deleted one it says
// so in words only.
func gone(e *jetstream.APIError) bool {
	switch e.ErrorCode {
	case jetstream.JSErrCodeMessageNotFound, codeSequenceNotFound:
		return true
	case codeDeleteFailed:
		return slices.Contains([]string{"no message found", "deleted message", "stream store EOF"}, e.Description)
	}
	return false
}

const (
	codeSequenceNotFound = 10043
	codeDeleteFailed     = 10057
)
