package publisher

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"pgregory.net/rapid"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/broker"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
)

// raw publishes bytes that client libraries refuse to send.
type raw struct {
	t    testing.TB
	conn net.Conn
	acks *nats.Subscription
}

// onRawServer is onServer with a connection that sends anything.
func onRawServer(t *testing.T, topology Topology) (jetstream.JetStream, *raw) {
	t.Helper()
	b := natsservertest.NewBroker(t)
	nc, err := nats.Connect("", nats.InProcessServer(b))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := topology.Ensure(t.Context(), js); err != nil {
		t.Fatal(err)
	}
	acks, err := nc.SubscribeSync("acks")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := b.InProcessConn()
	if err != nil {
		t.Fatal(err)
	}
	go io.Copy(io.Discard, conn)
	fmt.Fprint(conn, "CONNECT {\"verbose\":false,\"headers\":true,\"no_responders\":true}\r\n")
	return js, &raw{t, conn, acks}
}

// publish returns the sequence under which the server stored it; 0: it refused.
func (r *raw) publish(subject, header string, payload []byte) uint64 {
	var b bytes.Buffer
	fmt.Fprintf(&b, "HPUB %s acks %d %d\r\n%s", subject, len(header), len(header)+len(payload), header)
	b.Write(payload)
	b.WriteString("\r\n")
	if _, err := r.conn.Write(b.Bytes()); err != nil {
		r.t.Fatal(err)
	}
	m, err := r.acks.NextMsg(10 * time.Second)
	if errors.Is(err, nats.ErrNoResponders) {
		return 0
	}
	if err != nil {
		r.t.Fatalf("%q: %v", clip(b.String(), 300), err)
	}
	var ack struct {
		Seq       uint64
		Duplicate bool
		Error     *jetstream.APIError
	}
	if err := json.Unmarshal(m.Data, &ack); err != nil || ack.Error != nil || ack.Duplicate {
		return 0
	}
	return ack.Seq
}

// Every request that the server stores can have a dead letter: nothing that a client sends, and
// nothing that the API answers, keeps it from being stored.
func TestEveryRequestCanHaveALetter(t *testing.T) {
	topology := Topology{Partitions: 1}
	js, raw := onRawServer(t, topology)
	p, reader := New(js, topology), broker.NewReader(js)
	maximum := int(js.Conn().MaxPayload())
	n, letters := 0, 0
	rapid.Check(t, func(rt *rapid.T) {
		raw.t = t
		subject := "requests." + drawToken(rt, "creator") + "." + drawToken(rt, "operation")
		header := drawHeader(rt)
		payload := make([]byte, rapid.OneOf(rapid.IntRange(0, 100), rapid.IntRange(0, 100), rapid.IntRange(max(maximum-len(header)-2000, 0), maximum-len(header)), rapid.Just(0)).Draw(rt, "payload"))
		seq := raw.publish(subject, header, payload)
		if seq == 0 {
			return
		}
		n++
		m, err := reader.At(t.Context(), "REQUESTS", seq)
		if err != nil {
			rt.Fatal(err)
		}
		if err := reader.Delete(t.Context(), "REQUESTS", seq); err != nil {
			rt.Fatal(err)
		}
		r, _ := ParseRequest("", m.Subject, m.Header, m.Data, fmt.Sprintf("1-%d", seq))
		d := drawLetter(rt, r, m)
		stands, err := p.Tombstone(t.Context(), d)
		if err != nil || stands.Kind != Dead || !stands.Source.Equal(d.Source) {
			rt.Fatalf("tombstone: %+v, %v", stands, err)
		}
		if o, err := p.Outcome(t.Context(), r.Creator, r.Operation, r.ID); err != nil || o.Kind != Dead || !o.Source.Equal(d.Source) {
			rt.Fatalf("the tombstone reads as %+v, %v", o, err)
		}
		if err := p.DeadLetter(t.Context(), d); err != nil {
			rt.Fatalf("letter of %q, %d bytes of headers: %v", m.Subject, len(m.RawHeader), err)
		}
		letters++
		where, err := Namespace("").DeadLetterSubject(d.Class, d.Creator, d.Operation, d.RequestID)
		if err != nil {
			rt.Fatal(err)
		}
		l, err := reader.Last(t.Context(), "DLQ", where)
		if err != nil || l == nil || l.Header == nil || len(l.RawHeader) >= maxHeaders {
			rt.Fatalf("the letter cannot be read: %v, %d bytes of headers", err, len(l.RawHeader))
		}
		if l.Header.Get(DlqMsgID) != r.ID || l.Header.Get(DlqCreator) != r.Creator || l.Header.Get(DlqOperation) != r.Operation || !d.isLetter(l) {
			rt.Fatalf("%+v has a letter of another: %v", r, l.Header)
		}
		if l.Header.Get("Status") != "" || l.Header.Get("Nats-Msg-Id") != "" {
			rt.Fatalf("%v", l.Header)
		}
		if body, err := Body(t.Context(), js, "", l.Header, l.Data); err != nil || !bytes.Equal(body, m.Data) {
			rt.Fatalf("the payload is lost: %d bytes of %d, %v", len(body), len(m.Data), err)
		}
	})
	if n < 20 || n != letters {
		t.Errorf("only %d requests were stored, %d letters", n, letters)
	}
}

// drawLetter makes a dead letter of a request, of which the API said too much.
func drawLetter(rt *rapid.T, r Request, m *broker.Message) DeadLetter {
	huge := rapid.SampledFrom([]string{"", "short", strings.Repeat("\r\n<é", 5_000), strings.Repeat("\xff", 70_000)}).Draw(rt, "huge")
	d := DeadLetter{
		Class: classify.MalformedRequest, Code: huge, Reason: huge, Action: huge, Scope: classify.Scope(huge), Field: huge, UpstreamRequestID: huge,
		Provider: huge, Creator: r.Creator, Operation: r.Operation, SourceStream: huge, SourceSubject: m.Subject, RequestID: r.ID,
		Source: Source{Sequence: m.Sequence, Stored: m.Time}, Payload: m.Data, Header: m.Header,
		Attempts: math.MaxInt, Deliveries: math.MaxUint64, HTTPStatus: math.MaxInt, FirstFailedAt: at, FailedAt: at,
	}
	for range rapid.IntRange(0, 2).Draw(rt, "attempts") * 500 {
		d.History = append(d.History, Attempt{At: at, Ms: math.MaxInt64, Class: classify.ConcurrencyLimit, Status: 429, Code: huge[:min(len(huge), 20)]})
	}
	return d
}

func drawToken(t *rapid.T, label string) string {
	return rapid.OneOf(
		rapid.SampledFrom([]string{"alice", "*", ">", "=20", "alice=20", "a\x7fb", "=FF", "\x1b[31m", "\xff", "a*b", "unreadable", strings.Repeat("x", 200)}),
		rapid.Map(rapid.SliceOfN(rapid.Byte(), 1, 40), func(b []byte) string {
			return "t" + strings.Map(func(r rune) rune {
				if r <= ' ' || r == '.' {
					return '_'
				}
				return r
			}, string(b))
		}),
	).Draw(t, label)
}

func drawHeader(t *rapid.T) string {
	line := func(r rune) rune {
		if r == '\r' || r == '\n' {
			return ' '
		}
		return r
	}
	name := rapid.OneOf(
		rapid.SampledFrom([]string{
			"Nats-Msg-Id", "a b", "X ", " X", "\x01", "é", "\xff", "", "Headgate-Body-Bucket", "Headgate-Body-Object", "Headgate-Body-Size", "Headgate-Replay",
			"Headgate-Deadline", "Status", "Description", "Content-Type", "Authorization", "Dlq-Class", "Headgate-Request-Id", "Headgate-Dead-Letter", "nats-rollup",
		}),
		rapid.Map(rapid.SliceOfN(rapid.Byte(), 0, 20), func(b []byte) string { return strings.Map(line, string(b)) }),
		rapid.StringMatching(`[A-Za-z-]{1,12}`),
	)
	value := rapid.OneOf(
		rapid.SampledFrom([]string{"", "1", "404", "100", "x~r1", "~1-1", "dup\x01", "a\x00b", "a\rb", "PAYROLL", "tail ", "2001-01-01T00:00:00Z", strings.Repeat("é", 700)}),
		rapid.Map(rapid.SliceOfN(rapid.Byte(), 0, 60), func(b []byte) string { return strings.Map(line, string(b)) }),
		rapid.Map(rapid.IntRange(0, 60_000), func(n int) string { return strings.Repeat("v", n) }),
	)
	h := "NATS/1.0" + rapid.SampledFrom([]string{"", "", "", " 100 idle", " 503", " 404 x"}).Draw(t, "status") + "\r\n"
	for range rapid.IntRange(0, 40).Draw(t, "lines") {
		h += name.Draw(t, "name") + rapid.SampledFrom([]string{": ", ":", ": ", ""}).Draw(t, "colon") + value.Draw(t, "value") + "\r\n"
		if len(h) > 65_000 {
			break
		}
	}
	return h[:min(len(h), 65_000)] + "\r\n\r\n"
}

// What a letter keeps of its request's headers.
func TestKept(t *testing.T) {
	many := func(n, size int) nats.Header {
		h := nats.Header{}
		for i := range n {
			h[fmt.Sprintf("H-%03d", i)] = []string{strings.Repeat("v", size)}
		}
		return h
	}
	large := nats.Header{"Large": {strings.Repeat("v", 20<<10)}, "Larger": {"small", strings.Repeat("v", 21<<10)}, "Ours": {"1"}}
	for name, c := range map[string]struct {
		request nats.Header
		id      string
		keeps   []string
		lines   int
		dropped int
	}{
		"plain":            {nats.Header{"Ours": {"1", "2"}, "x.y!": {"é"}}, "id", []string{"Ours", "x.y!"}, 3, 0},
		"names":            {nats.Header{"a b": {"1"}, "X ": {"1"}, " X": {"1"}, "\x01": {"1"}, "é": {"1"}, "a:b": {"1"}, "": {"1"}, "Ours": {"1"}}, "id", []string{"Ours"}, 1, 7},
		"values":           {nats.Header{"A": {"a\x00b", "2"}, "B": {"a\rb"}, "C": {"a\nb"}, "D": {"a\x01b"}}, "id", []string{"A", "D"}, 2, 3},
		"ours, and secret": {nats.Header{"Nats-Rollup": {"all"}, "Dlq-Class": {"X"}, HeaderBodyObject: {"o"}, HeaderReplay: {"9"}, HeaderReplayedClass: {"X"}, "Cookie": {"c"}}, "id", nil, 0, 0},
		"of a replay":      {nats.Header{HeaderReplay: {"1"}, HeaderReplayedClass: {"X"}}, "id~r1", []string{HeaderReplay, HeaderReplayedClass}, 2, 0},
		"a server's":       {nats.Header{"Status": {"404"}, "Description": {"none"}}, "id", nil, 0, 2},
		"the largest go":   {large, "id", []string{"Large", "Larger", "Ours"}, 3, 1},
		"many":             {many(100, 1000), "id", nil, 24, 76},
	} {
		h, dropped := kept(c.request, c.id, ownRoom(maxHeaders))
		lines, size := 0, 0
		for name, values := range h {
			for _, value := range values {
				lines++
				size += headerLine{name, value}.size()
			}
		}
		if lines != c.lines || dropped != c.dropped || size > 24<<10 {
			t.Errorf("%s: %d lines of %d bytes, %d dropped", name, lines, size, dropped)
		}
		for _, want := range c.keeps {
			if _, ok := h[want]; !ok {
				t.Errorf("%s: %q is gone", name, want)
			}
		}
	}
}

// 65,000 bytes of headers: more than the server takes with those that say why it died.
func TestLetterOfLargeHeaders(t *testing.T) {
	js, raw := onRawServer(t, small())
	seq := raw.publish("requests.mallory.send", "NATS/1.0\r\nNats-Msg-Id: x1\r\nA: "+strings.Repeat("a", 65_300)+"\r\nOurs: 1\r\n\r\n", []byte("{}"))
	if seq == 0 {
		t.Fatal("the server refuses it")
	}
	m, err := broker.NewReader(js).At(t.Context(), "REQUESTS", seq)
	if err != nil {
		t.Fatal(err)
	}
	d := letter(Source{Sequence: seq, Stored: m.Time})
	d.Header = m.Header
	for range 5_000 {
		d.History = append(d.History, Attempt{At: at, Class: classify.RateLimit, Status: 429})
	}
	if err := New(js, small()).DeadLetter(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	l := last(t, js, "DLQ", "dlq.>")
	if l.Header.Get(DlqHeadersDropped) != "1" || l.Header.Get("Ours") != "1" || l.Header.Get("A") != "" || l.Header.Get(DlqHistory) == "" {
		t.Errorf("dropped %q", l.Header.Get(DlqHeadersDropped))
	}
}
