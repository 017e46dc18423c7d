package publisher

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
)

// small is quick to make.
func small() Topology { return Topology{Partitions: 4} }

func onServer(t *testing.T, topology Topology) (*nats.Conn, jetstream.JetStream) {
	t.Helper()
	nc := natsservertest.Connect(t)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := topology.Ensure(t.Context(), js); err != nil {
		t.Fatal(err)
	}
	return nc, js
}

func last(t *testing.T, js jetstream.JetStream, stream, subject string) *jetstream.RawStreamMsg {
	t.Helper()
	s, err := js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.GetLastMsgForSubject(t.Context(), subject)
	if err != nil {
		t.Fatalf("%s %s: %v", stream, subject, err)
	}
	return m
}

func stored(t *testing.T, js jetstream.JetStream, stream string) uint64 {
	t.Helper()
	s, err := js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	return s.CachedInfo().State.Msgs
}

func TestPublishOnce(t *testing.T) {
	_, js := onServer(t, small())
	p := New(js, small())
	r := Request{ID: RequestID("hook", "42"), Creator: "a.b", Operation: "top", Payload: []byte("{}"), CorrelationID: "c1", Header: nats.Header{"Ours": {"1"}}}
	first, err := p.Publish(t.Context(), r)
	if err != nil || first.Duplicate || first.ID != "hook:42" {
		t.Fatalf("got %+v, %v", first, err)
	}
	second, err := p.Publish(t.Context(), r)
	if err != nil || !second.Duplicate || second.Sequence != first.Sequence {
		t.Errorf("the same again: got %+v, %v", second, err)
	}
	m := last(t, js, "REQUESTS", "requests.*.a=2Eb.top")
	if string(m.Data) != "{}" || m.Header.Get("Nats-Msg-Id") != "hook:42" || m.Header.Get("Ours") != "1" || m.Header.Get(HeaderCorrelationID) != "c1" {
		t.Errorf("got %q %v", m.Data, m.Header)
	}
	if ack, err := p.Publish(t.Context(), Request{Creator: "a", Operation: "b"}); err != nil || ack.ID == "" {
		t.Errorf("without an id one is made: got %+v, %v", ack, err)
	}
}

func TestPublishRefuses(t *testing.T) {
	_, js := onServer(t, small())
	p := New(js, small())
	for name, r := range map[string]Request{
		"creator":   {Operation: "top"},
		"operation": {Creator: "alice"},
		"too long":  {Creator: strings.Repeat("a", 129), Operation: "top"},
		"one line":  {ID: "a\nb", Creator: "alice", Operation: "top"},
		"Nats-":     {Creator: "alice", Operation: "top", Header: nats.Header{"Nats-Rollup": {"all"}}},
	} {
		if _, err := p.Publish(t.Context(), r); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if n := stored(t, js, "REQUESTS"); n != 0 {
		t.Errorf("%d requests were stored", n)
	}
}

// A full stream says so, drops nothing, and takes more once there is room.
func TestBacklogIsFull(t *testing.T) {
	topology := small()
	topology.BacklogPerSubject = 2
	_, js := onServer(t, topology)
	p := New(js, topology)
	publish := func(creator string, n int) error {
		_, err := p.Publish(t.Context(), Request{ID: fmt.Sprintf("%s-%d", creator, n), Creator: creator, Operation: "top"})
		return err
	}
	for n := range 2 {
		if err := publish("alice", n); err != nil {
			t.Fatal(err)
		}
	}
	if err := publish("alice", 2); !errors.Is(err, ErrFull) {
		t.Fatalf("the third: got %v, want ErrFull", err)
	}
	if err := publish("bob", 0); err != nil {
		t.Errorf("another creator has room: %v", err)
	}
	if n := stored(t, js, "REQUESTS"); n != 3 {
		t.Errorf("%d are stored, want 3", n)
	}
	s, _ := js.Stream(t.Context(), "REQUESTS")
	if err := s.DeleteMsg(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	if err := publish("alice", 2); err != nil {
		t.Errorf("with room: %v", err)
	}
}

func TestNoStream(t *testing.T) {
	js, err := jetstream.New(natsservertest.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	_, err = New(js, small()).Publish(t.Context(), Request{Creator: "alice", Operation: "top"})
	if err == nil || !strings.Contains(err.Error(), "headgate setup") {
		t.Errorf("got %v, want what to do", err)
	}
}

// What no request looks like is refused by the stream itself: no PubAck.
func TestOtherSubjectsGetNoAck(t *testing.T) {
	nc, _ := onServer(t, small())
	for _, subject := range []string{"requests.a.b.c", "requests.a", "requests"} {
		if m, err := nc.Request(subject, nil, time.Second); !errors.Is(err, nats.ErrNoResponders) {
			t.Errorf("%s: got %v, %v", subject, m, err)
		}
	}
}

func TestDeadLetter(t *testing.T) {
	_, js := onServer(t, small())
	p := New(js, small())
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	letter := DeadLetter{
		Class: classify.Validation, Code: "BAD\r\nX-Evil: 1", Reason: strings.Repeat("é", 2000), Attempts: 2, Deliveries: 3,
		FirstFailedAt: at, FailedAt: at.Add(time.Second), Provider: "test", Creator: "alice", Operation: "top",
		SourceStream: "REQUESTS", SourceSubject: "requests.1.alice.top", Source: Source{7, at}, RequestID: "hook:1",
		History: []Attempt{{At: at, Ms: 12, Class: classify.ServerError, Status: 500}, {At: at, Ms: 5, Class: classify.Validation, Status: 422}},
		Payload: []byte("\x00payload\xff"),
		Header: nats.Header{
			"Ours": {"1", "2"}, "Nats-Msg-Id": {"hook:1"}, "Nats-Expected-Stream": {"REQUESTS"}, "Nats-TTL": {"1s"}, "Dlq-Class": {"FORGED"},
			"Authorization": {"Bearer s3cret"}, "X-Api-Key": {"s3cret"}, "apiKey": {"s3cret"}, "Cookie": {"s3cret"}, "X-Session-Token": {"s3cret"},
		},
	}
	for range 2 {
		if err := p.DeadLetter(t.Context(), letter); err != nil {
			t.Fatal(err)
		}
	}
	if n := stored(t, js, "DLQ"); n != 1 {
		t.Errorf("%d dead letters, want 1", n)
	}
	m := last(t, js, "DLQ", "dlq.VALIDATION.alice.top.hook=3A1")
	if string(m.Data) != "\x00payload\xff" {
		t.Errorf("payload %q", m.Data)
	}
	for name, want := range map[string]string{
		DlqClass: "VALIDATION", DlqCode: "BAD  X-Evil: 1", DlqAttempts: "2", DlqDeliveries: "3", DlqSourceSeq: "7",
		DlqFirstFailedAt: "2026-01-02T03:04:05Z", DlqMsgID: "hook:1", "Ours": "1", DlqSourceStored: "2026-01-02T03:04:05Z",
	} {
		if got := m.Header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	for name, values := range m.Header {
		if strings.Contains(strings.Join(values, ""), "s3cret") {
			t.Errorf("%s is in the dead letter", name)
		}
		if len(values[0]) > historyRoom(maxHeaders) {
			t.Errorf("%s has %d bytes", name, len(values[0]))
		}
	}
	for _, name := range []string{"Nats-Msg-Id", "Nats-Expected-Stream", "Nats-TTL", DlqAction, DlqField, DlqHTTPStatus} {
		if _, there := m.Header[name]; there {
			t.Errorf("%s: %q", name, m.Header[name])
		}
	}
	var attempts []Attempt
	if err := json.Unmarshal([]byte(m.Header.Get(DlqHistory)), &attempts); err != nil || !slices.Equal(attempts, letter.History) {
		t.Errorf("history %v, %v", attempts, err)
	}
}

func TestLongHistoryKeepsTheLatest(t *testing.T) {
	var attempts []Attempt
	for n := range 1000 {
		attempts = append(attempts, Attempt{Class: classify.RateLimit, Status: 429, Ms: int64(n)})
	}
	kept := DeadLetter{History: attempts}.bounded(maxHeaders).History
	if len(kept) < 50 || kept[len(kept)-1].Ms != 999 {
		t.Errorf("%d kept", len(kept))
	}
}

// Namespaces live side by side on one server.
func TestNamespaces(t *testing.T) {
	nc, js := onServer(t, small())
	other := small()
	other.Namespace = "ofauth"
	if _, err := other.Ensure(t.Context(), js); err != nil {
		t.Fatal(err)
	}
	if m, err := nc.Request("ofauth.requests.alice.top", nil, time.Second); err != nil || !strings.Contains(string(m.Data), "OFAUTH_REQUESTS") {
		t.Fatalf("got %s, %v", m.Data, err)
	}
	if n := stored(t, js, "REQUESTS"); n != 0 {
		t.Errorf("%d requests in the other namespace", n)
	}
	m := last(t, js, "OFAUTH_REQUESTS", "ofauth.requests.*.alice.top")
	if r, err := ParseRequest("ofauth", m.Subject, m.Header, m.Data, "1"); err != nil || r.Creator != "alice" {
		t.Errorf("got %+v, %v", r, err)
	}
	for _, bad := range []Namespace{"a.b", "ä", "*", Namespace(strings.Repeat("n", 33))} {
		if err := (Topology{Namespace: bad, Partitions: 1}).WithDefaults().Check(); err == nil {
			t.Errorf("namespace %q is taken", bad)
		}
	}
}

// Creators spread over partitions, each to one of them.
func TestPartitions(t *testing.T) {
	topology := Topology{Partitions: 8}
	_, js := onServer(t, topology)
	p := New(js, topology)
	for n := range 1000 {
		for _, operation := range []string{"a", "b"} {
			if _, err := p.Publish(t.Context(), Request{Creator: fmt.Sprintf("creator-%d", n), Operation: operation}); err != nil {
				t.Fatal(err)
			}
		}
	}
	s, _ := js.Stream(t.Context(), "REQUESTS")
	info, err := s.Info(t.Context(), jetstream.WithSubjectFilter("requests.>"))
	if err != nil {
		t.Fatal(err)
	}
	creators, sizes := map[string]string{}, map[string]int{}
	for subject := range info.State.Subjects {
		tokens := strings.Split(subject, ".")
		if before, ok := creators[tokens[2]]; ok && before != tokens[1] {
			t.Errorf("%s is in partitions %s and %s", tokens[2], before, tokens[1])
		} else if !ok {
			creators[tokens[2]] = tokens[1]
			sizes[tokens[1]]++
		}
	}
	if len(creators) != 1000 || len(sizes) != 8 {
		t.Fatalf("%d creators in %d partitions", len(creators), len(sizes))
	}
	for partition, n := range sizes {
		if n < 75 || n > 175 { // 125 ± 4.8 σ
			t.Errorf("partition %s has %d creators", partition, n)
		}
	}
}
