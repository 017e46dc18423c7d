package publisher

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
)

// large is a body that no message takes.
func large(t *testing.T) []byte {
	t.Helper()
	b := make([]byte, 3<<20)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}

func objects(t *testing.T, js jetstream.JetStream) []string {
	t.Helper()
	store, err := js.ObjectStore(t.Context(), "BODIES")
	if err != nil {
		t.Fatal(err)
	}
	list, err := store.List(t.Context())
	if err != nil && !errors.Is(err, jetstream.ErrNoObjectsFound) {
		t.Fatal(err)
	}
	var names []string
	for _, o := range list {
		names = append(names, o.Name)
	}
	return names
}

func resultBody(t *testing.T, js jetstream.JetStream) []byte {
	t.Helper()
	m := last(t, js, "RESULTS", "results.alice.top.hook=3A1")
	body, err := Body(t.Context(), js, "", m.Header, m.Data)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// A second large answer, which is refused, leaves the first one as it is and nothing of itself.
func TestSecondLargeAnswer(t *testing.T) {
	_, js := onServer(t, small())
	p := New(js, small())
	one, two := large(t), large(t)
	for _, c := range []struct {
		source Source
		body   []byte
	}{{first, one}, {first, two}, {second, two}, {first, one}} {
		r := result(c.source, "")
		r.Body = c.body
		if o, err := p.Result(t.Context(), r); err != nil || o.Kind != Answered || o.Source != first {
			t.Fatalf("%+v, %v", o, err)
		}
		if !bytes.Equal(resultBody(t, js), one) {
			t.Fatal("the stored answer has another body now")
		}
		if names := objects(t, js); len(names) != 1 || !strings.HasPrefix(names[0], "results.alice.top.hook=3A1.7-") {
			t.Fatalf("objects %v", names)
		}
	}
}

// An answer that comes after its request's tombstone leaves no body.
func TestLargeAnswerAfterTombstone(t *testing.T) {
	_, js := onServer(t, small())
	p := New(js, small())
	if _, err := p.Tombstone(t.Context(), letter(first)); err != nil {
		t.Fatal(err)
	}
	r := result(first, "")
	r.Body = large(t)
	if o, err := p.Result(t.Context(), r); err != nil || o.Kind != Dead {
		t.Fatalf("%+v, %v", o, err)
	}
	if names := objects(t, js); len(names) != 0 {
		t.Errorf("objects %v", names)
	}
}

// A body is where it was although its name is taken by something else.
func TestBodyNameTaken(t *testing.T) {
	for name, take := range map[string]func(js jetstream.JetStream, store jetstream.ObjectStore, object string) error{
		"garbage": func(js jetstream.JetStream, _ jetstream.ObjectStore, object string) error {
			_, err := js.Publish(context.Background(), ObjectSubjects("BODIES", object, "")[0], []byte("garbage"))
			return err
		},
		"another object": func(_ jetstream.JetStream, store jetstream.ObjectStore, object string) error {
			_, err := store.PutString(context.Background(), object, "another")
			return err
		},
	} {
		_, js := onServer(t, small())
		p := New(js, small())
		r := result(first, "")
		r.Body = large(t)
		if _, err := p.Result(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		object := objects(t, js)[0]
		for _, stream := range []string{"RESULTS", "OBJ_BODIES"} {
			s, err := js.Stream(t.Context(), stream)
			if err != nil || s.Purge(t.Context()) != nil {
				t.Fatal(stream, err)
			}
		}
		store, err := js.ObjectStore(t.Context(), "BODIES")
		if err != nil {
			t.Fatal(err)
		}
		if err := take(js, store, object); err != nil {
			t.Fatal(err)
		}
		if _, err := p.Result(t.Context(), r); err != nil {
			t.Errorf("%s: %v", name, err)
		} else if !bytes.Equal(resultBody(t, js), r.Body) {
			t.Errorf("%s: another body", name)
		}
	}
}

// A stream may have a limit of its own, which only its refusal tells.
func TestBodyOverTheStreamsLimit(t *testing.T) {
	_, js := onServer(t, small())
	for _, name := range []string{"RESULTS", "DLQ"} {
		s, err := js.Stream(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		c := s.CachedInfo().Config
		c.MaxMsgSize = 50_000
		if _, err := js.UpdateStream(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	p := New(js, small())
	r, d := result(first, strings.Repeat("a", 100_000)), letter(first)
	d.Payload = []byte(r.Body)
	if _, err := p.Result(t.Context(), r); err != nil {
		t.Error(err)
	}
	if err := p.DeadLetter(t.Context(), d); err != nil {
		t.Error(err)
	}
	if names := objects(t, js); len(names) != 2 {
		t.Errorf("objects %v", names)
	}
}

// slowConn sends a MiB in half a second.
type slowConn struct{ net.Conn }

func (c slowConn) Write(b []byte) (int, error) {
	time.Sleep(time.Duration(len(b)) * 500 * time.Millisecond >> 20)
	return c.Conn.Write(b)
}

type slowBroker struct{ *natsservertest.Broker }

func (b slowBroker) InProcessConn() (net.Conn, error) {
	c, err := b.Broker.InProcessConn()
	return slowConn{c}, err
}

// An upload that takes longer than an attempt to store is not begun again with each attempt.
func TestSlowUpload(t *testing.T) {
	nc, err := nats.Connect("", nats.InProcessServer(slowBroker{natsservertest.NewBroker(t)}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := small().Ensure(t.Context(), js); err != nil {
		t.Fatal(err)
	}
	p := New(js, small())
	r := result(first, "")
	r.Body = large(t)
	for deadline := time.Now().Add(15 * time.Second); ; {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		_, err := p.Result(ctx, r)
		cancel()
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it is never stored: %v", err)
		}
	}
	s, err := js.Stream(t.Context(), "OBJ_BODIES")
	if err != nil {
		t.Fatal(err)
	}
	if n, want := s.CachedInfo().State.Msgs, uint64(len(r.Body)/(128<<10)+1); n != want {
		t.Errorf("%d messages in the object store, want %d: it was uploaded more than once", n, want)
	}
}

// Cancelling ends an upload at once; it is not waited for until its own deadline.
func TestCancelledUpload(t *testing.T) {
	end, cancel := context.WithCancel(t.Context())
	ctx, stop := context.WithTimeout(end, time.Hour)
	defer stop()
	upload, done := uploading(ctx, time.Hour)
	defer done()
	cancel()
	select {
	case <-upload.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("it goes on")
	}
	late, stop := context.WithTimeout(t.Context(), 0)
	defer stop()
	upload, done = uploading(late, time.Hour)
	defer done()
	if upload.Err() != nil {
		t.Error("a short deadline ends it")
	}
}

func TestUploadsAtOnce(t *testing.T) {
	_, js := onServer(t, small())
	p := New(js, small())
	for range maxUploads {
		p.uploads <- struct{}{}
	}
	r := result(first, "")
	r.Body = large(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := p.Result(ctx, r); !errors.Is(err, context.DeadlineExceeded) || len(objects(t, js)) != 0 {
		t.Errorf("a fifth one: %v", err)
	}
	<-p.uploads
	var g sync.WaitGroup
	for range 3 {
		g.Go(func() {
			if _, err := p.Result(t.Context(), r); err != nil {
				t.Error(err)
			}
		})
	}
	g.Wait()
	if len(p.uploads) != maxUploads-1 {
		t.Errorf("%d uploads are counted", len(p.uploads))
	}
}

func TestStoreFor(t *testing.T) {
	_, js := onServer(t, small())
	p := New(js, small())
	for size, want := range map[int]time.Duration{0: 5 * time.Second, 1 << 20: 5 * time.Second, 16 << 20: 21 * time.Second} {
		if got := p.StoreFor(size); got != want {
			t.Errorf("%d bytes: %v, want %v", size, got, want)
		}
	}
}

// A message's headers do not choose what is read as its body.
func TestBodyReadsItsOwnStoreOnly(t *testing.T) {
	_, js := onServer(t, small())
	payroll, err := js.CreateObjectStore(t.Context(), jetstream.ObjectStoreConfig{Bucket: "PAYROLL"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := payroll.PutString(t.Context(), "salaries", "secret"); err != nil {
		t.Fatal(err)
	}
	for name, h := range map[string]nats.Header{
		"another application's": {HeaderBodyBucket: {"PAYROLL"}, HeaderBodyObject: {"salaries"}},
		"none":                  {HeaderBodyBucket: {"NOPE"}, HeaderBodyObject: {"x"}},
		"no object":             {HeaderBodyBucket: {"BODIES"}},
		"no bucket":             {HeaderBodyObject: {"salaries"}},
		"not there":             {HeaderBodyBucket: {"BODIES"}, HeaderBodyObject: {"x"}},
	} {
		if body, err := Body(t.Context(), js, "", h, nil); err == nil {
			t.Errorf("%s: read %q", name, body)
		}
	}
	if body, err := Body(t.Context(), js, "", nats.Header{"Ours": {"1"}}, []byte("x")); err != nil || string(body) != "x" {
		t.Errorf("without any: %q, %v", body, err)
	}
}

// A body that a dead letter's payload says is elsewhere is not.
func TestLetterOfForgedBody(t *testing.T) {
	_, js := onServer(t, small())
	d := letter(first)
	d.Header = nats.Header{HeaderBodyBucket: {"PAYROLL"}, HeaderBodyObject: {"salaries"}, HeaderReplay: {"99"}}
	if err := New(js, small()).DeadLetter(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	m := last(t, js, "DLQ", "dlq.>")
	if body, err := Body(t.Context(), js, "", m.Header, m.Data); err != nil || string(body) != "payload" || m.Header.Get(HeaderReplay) != "" {
		t.Errorf("%q, %v, %v", body, err, m.Header)
	}
}
