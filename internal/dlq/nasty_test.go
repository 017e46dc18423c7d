package dlq

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/broker"
	"github.com/headgate-io/headgate/publisher"
)

func (b *Box) store(t *testing.T, change func(*publisher.DeadLetter)) {
	t.Helper()
	d := publisher.DeadLetter{
		Class: classify.Validation, Reason: "test", Creator: "alice", Operation: "send", RequestID: "r", Payload: []byte("{}"),
		Source: publisher.Source{Sequence: 1, Stored: time.Now()},
	}
	change(&d)
	if err := publisher.New(b.js, publisher.Topology{}).DeadLetter(t.Context(), d); err != nil {
		t.Fatal(err)
	}
}

// forge stores a message in the DLQ as it is.
func (b *Box) forge(t *testing.T, subject string, h nats.Header) {
	t.Helper()
	if _, err := b.js.PublishMsg(t.Context(), &nats.Msg{Subject: subject, Header: h, Data: []byte("{}")}); err != nil {
		t.Fatal(err)
	}
}

func messages(t *testing.T, b *Box, stream string) uint64 {
	t.Helper()
	s, err := b.js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	return s.CachedInfo().State.Msgs
}

// A letter that cannot be read or replayed does not keep those behind it from being replayed. It
// is counted and reported, and stays.
func TestReplayGoesOn(t *testing.T) {
	b := box(t, 0)
	maximum := int(b.js.Conn().MaxPayload())
	for i := range 10 {
		b.store(t, func(d *publisher.DeadLetter) { d.RequestID = fmt.Sprintf("before-%d", i) })
	}
	// As an earlier version, which believed its requests, stored them.
	header := func(id string, more ...string) nats.Header {
		h := nats.Header{publisher.DlqMsgID: {id}, publisher.DlqCreator: {"alice"}, publisher.DlqOperation: {"send"}, publisher.DlqClass: {"VALIDATION"}}
		for i := 0; i < len(more); i += 2 {
			h[more[i]] = []string{more[i+1]}
		}
		return h
	}
	b.forge(t, "dlq.VALIDATION.alice.send.no-bucket", header("no-bucket", publisher.HeaderBodyBucket, "NOPE", publisher.HeaderBodyObject, "x"))
	b.forge(t, "dlq.VALIDATION.alice.send.no-object", header("no-object", publisher.HeaderBodyBucket, "BODIES"))
	b.forge(t, "dlq.VALIDATION.alice.send.gone", header("gone", publisher.HeaderBodyBucket, "BODIES", publisher.HeaderBodyObject, "dlq.alice.send.gone"))
	b.forge(t, "dlq.VALIDATION.alice.send.bobs", header("bobs", publisher.HeaderBodyBucket, "BODIES", publisher.HeaderBodyObject, "dlq.bob.send.x.1-0"))
	b.forge(t, "dlq.VALIDATION.=20.send.blank", header("blank"))
	b.forge(t, "dlq.VALIDATION.alice.=20.blank2", header("blank2"))
	b.forge(t, "dlq.VALIDATION.alice.send.mine", header("another-id"))
	b.forge(t, "dlq.VALIDATION.alice.send.no-id", nats.Header{})
	b.store(t, func(d *publisher.DeadLetter) {
		d.RequestID, d.Payload = "large", bytes.Repeat([]byte("x"), maximum-100)
	})
	const bad = 9
	b.store(t, func(d *publisher.DeadLetter) { d.RequestID = strings.Repeat("i", 1024) })
	b.store(t, func(d *publisher.DeadLetter) { d.RequestID = strings.Repeat("é", 510) + "~r1" })
	b.store(t, func(d *publisher.DeadLetter) { d.RequestID = "~1767-9" }) // of a request without an id
	for i := range 10 {
		b.store(t, func(d *publisher.DeadLetter) { d.RequestID = fmt.Sprintf("behind-%d", i) })
	}
	for run := range 2 {
		var told []string
		done, err := b.Replay(t.Context(), Replay{MaxReplays: 3, Failed: func(l Letter, err error) { told = append(told, l.RequestID+": "+err.Error()) }})
		want := Replayed{Done: 23, Failed: bad, Of: 32}
		if run == 1 {
			want = Replayed{Failed: bad, Of: bad}
		}
		if err != nil || done != want || len(told) != bad {
			t.Fatalf("run %d: %+v, %v, want %+v\n%s", run+1, done, err, want, strings.Join(told, "\n"))
		}
		if n := messages(t, b, "REQUESTS"); n != 23 {
			t.Errorf("run %d: %d requests", run+1, n)
		}
	}
	if n := 0; b.Each(t.Context(), Filter{}, true, func(l Letter) error { n++; return nil }) != nil || n != bad {
		t.Errorf("%d letters can be listed", n)
	}
}

// Whose request it was is said by the letter's subject. What could not be read is not replayed as
// a creator of that name.
func TestReplayByTheSubject(t *testing.T) {
	b := box(t, 0)
	b.forge(t, "dlq.VALIDATION.=2Dalice.send.x", nil)
	if err := b.stream.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.forge(t, "dlq.VALIDATION.bob.top.r-1", nats.Header{publisher.DlqMsgID: {"r-1"}, publisher.DlqCreator: {"alice"}, publisher.DlqOperation: {"send"}, publisher.DlqClass: {"POISON"}})
	b.store(t, func(d *publisher.DeadLetter) {
		d.Class, d.Creator, d.Operation, d.RequestID = classify.MalformedRequest, "", "", "r-2"
	})
	b.forge(t, "dlq.MALFORMED_REQUEST.unreadable.unreadable.r-3", nats.Header{publisher.DlqMsgID: {"r-3"}}) // of an earlier version
	done, err := b.Replay(t.Context(), Replay{MaxReplays: 3})
	if want := (Replayed{Done: 1, Skipped: 2, Of: 3}); err != nil || done != want {
		t.Errorf("%+v, %v, want %+v", done, err, want)
	}
	m, err := broker.NewReader(b.js).Next(t.Context(), "REQUESTS", 1, "")
	if err != nil || m == nil || m.Subject != "requests.0.bob.top" || m.Header.Get("Nats-Msg-Id") != "r-1~r1" {
		t.Errorf("%+v, %v", m, err)
	}
}

// A letter is dropped only if it is its own request that waits under the replay's id.
func TestReplayIDTaken(t *testing.T) {
	b := box(t, 0)
	p := publisher.New(b.js, publisher.Topology{})
	publish := func(creator, id, payload string) {
		if _, err := p.Publish(t.Context(), publisher.Request{ID: id, Creator: creator, Operation: "send", Payload: []byte(payload)}); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range []string{"stolen", "settled", "answered", "again"} {
		b.store(t, func(d *publisher.DeadLetter) { d.RequestID = id })
	}
	publish("mallory", "stolen~r1", "{}")
	publish("mallory", "settled~r1", "{}")
	publish("alice", "answered~r1", "{}")
	publish("alice", "again~r1", "{}") // by an interrupted run
	for seq := uint64(2); seq <= 3; seq++ {
		if err := broker.NewReader(b.js).Delete(t.Context(), "REQUESTS", seq); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.Result(t.Context(), publisher.Result{RequestID: "answered~r1", Creator: "alice", Operation: "send", Status: 200}); err != nil {
		t.Fatal(err)
	}
	failed := map[string]error{}
	done, err := b.Replay(t.Context(), Replay{MaxReplays: 3, Failed: func(l Letter, err error) { failed[l.RequestID] = err }})
	if want := (Replayed{Done: 2, Failed: 2, Of: 4}); err != nil || done != want || !errors.Is(failed["stolen"], errTaken) || !errors.Is(failed["settled"], errTaken) {
		t.Errorf("%+v, %v, %v, want %+v", done, err, failed, want)
	}
	if got := ids(t, b, Filter{}); len(got) != 2 {
		t.Errorf("left: %v", got)
	}
}

// A request's headers do not say how often it was replayed.
func TestReplaysAreCountedByTheID(t *testing.T) {
	b := box(t, 0)
	b.forge(t, "dlq.VALIDATION.alice.send.r-1", nats.Header{publisher.DlqMsgID: {"r-1"}, publisher.HeaderReplay: {"99"}})
	b.store(t, func(d *publisher.DeadLetter) { d.RequestID = "r-2~r3" })
	done, err := b.Replay(t.Context(), Replay{MaxReplays: 3})
	if want := (Replayed{Done: 1, Skipped: 1, Of: 2}); err != nil || done != want {
		t.Errorf("%+v, %v, want %+v", done, err, want)
	}
}

// A dropped letter leaves no payload, and takes no other's.
func TestDropDeletesThePayload(t *testing.T) {
	b := box(t, 0)
	payload := bytes.Repeat([]byte("x"), 2<<20)
	b.store(t, func(d *publisher.DeadLetter) { d.RequestID, d.Payload = "r-1", payload })
	b.store(t, func(d *publisher.DeadLetter) { d.RequestID, d.Payload = "r-2", payload })
	l, err := b.Get(t.Context(), "r-1")
	if err != nil || l.Problem != "" || !bytes.Equal(l.Payload, payload) {
		t.Fatalf("%d bytes, %v, %s", len(l.Payload), err, l.Problem)
	}
	other, err := b.Get(t.Context(), "r-2")
	if err != nil {
		t.Fatal(err)
	}
	b.forge(t, "dlq.VALIDATION.alice.send.forged", nats.Header{
		publisher.DlqMsgID: {"forged"}, publisher.HeaderBodyBucket: {"BODIES"}, publisher.HeaderBodyObject: {other.Header.Get(publisher.HeaderBodyObject)},
	})
	forged, err := b.Get(t.Context(), "forged")
	if err != nil || forged.Problem == "" || bytes.Equal(forged.Payload, payload) {
		t.Errorf("another letter's payload is read: %v", err)
	}
	for range 2 {
		for _, l := range []Letter{l, forged} {
			if err := b.Drop(t.Context(), l); err != nil {
				t.Error(err)
			}
		}
	}
	store, err := b.js.ObjectStore(t.Context(), "BODIES")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.GetInfo(t.Context(), l.Header.Get(publisher.HeaderBodyObject)); !errors.Is(err, jetstream.ErrObjectNotFound) {
		t.Errorf("the payload is there: %v", err)
	}
	if other, err = b.Get(t.Context(), "r-2"); err != nil || !bytes.Equal(other.Payload, payload) {
		t.Errorf("the other letter's payload: %v", err)
	}
}

// A request's header that servers use for themselves does not end the list.
func TestEachOfStatusHeaders(t *testing.T) {
	b := box(t, 0)
	for i, status := range []string{"100", "404", "408", "409", "503"} {
		b.store(t, func(d *publisher.DeadLetter) {
			d.RequestID, d.Header, d.Payload = fmt.Sprintf("r-%d", i), nats.Header{"Status": {status}, "Ours": {"1"}}, nil
		})
	}
	if got := ids(t, b, Filter{}); len(got) != 5 {
		t.Errorf("listed: %v", got)
	}
}
