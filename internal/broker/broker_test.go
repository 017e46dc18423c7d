package broker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
)

func stream(t *testing.T, nc *nats.Conn, cfg jetstream.StreamConfig) jetstream.JetStream {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	return js
}

func TestReader(t *testing.T) {
	nc := natsservertest.Connect(t)
	js := stream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
	for n := range 4 {
		m := &nats.Msg{Subject: fmt.Sprintf("s.%d", n%2), Data: []byte{byte(n)}, Header: nats.Header{"N": {fmt.Sprint(n)}}}
		if _, err := js.PublishMsg(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	r := NewReader(js)
	ctx := t.Context()
	if err := r.Delete(ctx, "S", 2); err != nil {
		t.Fatal(err)
	}
	for _, absent := range []uint64{2, 99} {
		if err := r.Delete(ctx, "S", absent); err != nil {
			t.Errorf("%d is not there: %v", absent, err)
		}
	}
	for name, c := range map[string]struct {
		read func() (*Message, error)
		want uint64
	}{
		"last":             {func() (*Message, error) { return r.Last(ctx, "S", "s.1") }, 4},
		"last of none":     {func() (*Message, error) { return r.Last(ctx, "S", "s.7") }, 0},
		"at":               {func() (*Message, error) { return r.At(ctx, "S", 3) }, 3},
		"at a deleted one": {func() (*Message, error) { return r.At(ctx, "S", 2) }, 0},
		"at zero":          {func() (*Message, error) { return r.At(ctx, "S", 0) }, 0},
		"next":             {func() (*Message, error) { return r.Next(ctx, "S", 1, "s.1") }, 4},
		"next of any":      {func() (*Message, error) { return r.Next(ctx, "S", 2, "") }, 3},
		"next from zero":   {func() (*Message, error) { return r.Next(ctx, "S", 0, "") }, 1},
		"next of none":     {func() (*Message, error) { return r.Next(ctx, "S", 5, "") }, 0},
	} {
		m, err := c.read()
		switch {
		case err != nil:
			t.Errorf("%s: %v", name, err)
		case m == nil && c.want == 0:
		case m == nil || m.Sequence != c.want:
			t.Errorf("%s: got %+v, want sequence %d", name, m, c.want)
		case m.Header.Get("N") != fmt.Sprint(c.want-1) || len(m.Data) != 1 || time.Since(m.Time) > time.Minute:
			t.Errorf("%s: got %+v", name, m)
		}
	}
	if _, err := r.Last(ctx, "NONE", "s.1"); err == nil || TroubleOf(err) != NotNow {
		t.Errorf("a stream that does not exist: %v", err)
	}
	late, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := r.Last(late, "S", "s.1"); !errors.Is(err, context.Canceled) {
		t.Errorf("an ended context: %v", err)
	}
}

// A message may be gone because it was the last one.
func TestDeleteFromAnEmptyStream(t *testing.T) {
	js := stream(t, natsservertest.Connect(t), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}, Retention: jetstream.WorkQueuePolicy})
	if _, err := js.Publish(t.Context(), "s", nil); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := NewReader(js).Delete(t.Context(), "S", 1); err != nil {
			t.Error(err)
		}
	}
}

// Servers store headers that no client can decode.
func TestReaderReadsHeadersThatCannotBeDecoded(t *testing.T) {
	b := natsservertest.NewBroker(t)
	nc, err := nats.Connect("", nats.InProcessServer(b))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js := stream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}})
	conn, err := b.InProcessConn()
	if err != nil {
		t.Fatal(err)
	}
	go io.Copy(io.Discard, conn)
	stored, err := nc.SubscribeSync("stored")
	if err != nil {
		t.Fatal(err)
	}
	header := "NATS/1.0\r\nno colon\r\n\r\n"
	fmt.Fprintf(conn, "CONNECT {\"verbose\":false,\"headers\":true}\r\nHPUB s stored %d %d\r\n%sx\r\n", len(header), len(header)+1, header)
	if _, err := stored.NextMsg(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	m, err := NewReader(js).Last(t.Context(), "S", "s")
	if err != nil || m == nil || m.Header != nil || !bytes.Equal(m.RawHeader, []byte(header)) || string(m.Data) != "x" {
		t.Errorf("got %+v, %v", m, err)
	}
}

func TestAPIPrefix(t *testing.T) {
	for want, o := range map[string]jetstream.JetStreamOptions{
		"$JS.API.":     {},
		"$JS.hub.API.": {Domain: "hub"},
		"imported.":    {APIPrefix: "imported"},
		"other.":       {APIPrefix: "other."},
	} {
		if got := apiPrefix(o); got != want {
			t.Errorf("%+v: %q, want %q", o, got, want)
		}
	}
}

func TestTroubleOf(t *testing.T) {
	api := func(status int, code jetstream.ErrorCode, text string) error {
		return fmt.Errorf("publish: %w", &jetstream.APIError{Code: status, ErrorCode: code, Description: text})
	}
	_, nan := json.Marshal(math.NaN())
	for name, c := range map[string]struct {
		err  error
		want Trouble
	}{
		"timeout":                 {context.DeadlineExceeded, NotNow},
		"no responders":           {nats.ErrNoResponders, NotNow},
		"no stream":               {jetstream.ErrNoStreamResponse, NotNow},
		"not connected":           {nats.ErrReconnectBufExceeded, NotNow},
		"closed":                  {nats.ErrConnectionClosed, NotNow},
		"unknown":                 {errors.New("something"), NotNow},
		"no leader":               {api(503, 10008, "JetStream system temporarily unavailable"), NotNow},
		"not ready":               {api(503, 10163, "expected last sequence per subject temporarily unavailable"), NotNow},
		"too many requests":       {api(429, 10167, "too many requests"), NotNow},
		"stream not found":        {api(404, 10059, "stream not found"), NotNow},
		"store closed":            {api(503, 10077, "store is closed"), NotNow},
		"sealed":                  {api(400, 10109, "invalid operation on sealed stream"), NotNow},
		"key exists":              {fmt.Errorf("create: %w", jetstream.ErrKeyExists), WrittenBetween},
		"wrong sequence":          {api(400, 10071, "wrong last sequence: 7"), WrittenBetween},
		"id in process":           {api(409, 10158, "duplicate message id is in process"), InFlight},
		"subject in process":      {api(400, 10164, "wrong last sequence"), InFlight},
		"max bytes":               {api(503, 10077, "maximum bytes exceeded"), Full},
		"max per subject":         {api(503, 10077, "maximum messages per subject exceeded"), Full},
		"storage":                 {api(500, 10047, "insufficient storage resources available"), Full},
		"resources":               {api(503, 10023, "insufficient resources"), Full},
		"account":                 {api(400, 10002, "resource limits exceeded for account"), Full},
		"store: too large":        {api(503, 10077, "message to be stored is too large"), Never},
		"header size":             {api(400, 10097, "header size exceeds maximum allowed of 64k"), Never},
		"message size":            {api(400, 10054, "message size exceeds maximum allowed"), Never},
		"bad request":             {api(400, 10003, "bad request"), Never},
		"per-message TTL":         {api(400, 10166, "per-message TTL is disabled"), Never},
		"max payload":             {fmt.Errorf("publish: %w", nats.ErrMaxPayload), Never},
		"bad header":              {nats.ErrBadHeaderMsg, Never},
		"bad subject":             {nats.ErrBadSubject, Never},
		"bad key":                 {jetstream.ErrInvalidKey, Never},
		"not JSON":                {fmt.Errorf("encode: %w", nan), Never},
		"an unknown 4xx":          {api(422, 19999, "no"), Never},
		"an unknown 5xx":          {api(500, 19998, "no"), NotNow},
		"rollup of an attacker's": {api(500, 10111, "rollup not permitted"), Never},
	} {
		if got := TroubleOf(c.err); got != c.want {
			t.Errorf("%s (%v): %v, want %v", name, c.err, got, c.want)
		}
	}
}

// What the server and the client really say.
func TestTroubleOfRealErrors(t *testing.T) {
	nc := natsservertest.Connect(t)
	js := stream(t, nc, jetstream.StreamConfig{
		Name: "S", Subjects: []string{"s.>"}, MaxMsgsPerSubject: 1, DiscardNewPerSubject: true, Discard: jetstream.DiscardNew, MaxMsgSize: 100_000,
	})
	publish := func(m *nats.Msg, opts ...jetstream.PublishOpt) error {
		_, err := js.PublishMsg(t.Context(), m, opts...)
		return err
	}
	if err := publish(&nats.Msg{Subject: "s.full"}); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		err  error
		want Trouble
	}{
		"full subject":   {publish(&nats.Msg{Subject: "s.full"}), Full},
		"wrong sequence": {publish(&nats.Msg{Subject: "s.full"}, jetstream.WithExpectLastSequencePerSubject(0)), WrittenBetween},
		"large headers":  {publish(&nats.Msg{Subject: "s.a", Header: nats.Header{"A": {strings.Repeat("a", 66_000)}}}), Never},
		"large body":     {publish(&nats.Msg{Subject: "s.a", Data: make([]byte, 100_001)}), Never},
		"max payload":    {publish(&nats.Msg{Subject: "s.a", Data: make([]byte, 2<<20)}), Never},
		"header name":    {publish(&nats.Msg{Subject: "s.a", Header: nats.Header{"a b": {"c"}}}), Never},
		"subject":        {publish(&nats.Msg{Subject: "s.a b"}), Never},
		"TTL":            {publish(&nats.Msg{Subject: "s.a", Header: nats.Header{"Nats-TTL": {"1s"}}}), Never},
		"rollup":         {publish(&nats.Msg{Subject: "s.a", Header: nats.Header{"Nats-Rollup": {"all"}}}), Never},
	} {
		if c.err == nil || TroubleOf(c.err) != c.want {
			t.Errorf("%s: %v, want %v", name, c.err, c.want)
		}
	}
}
