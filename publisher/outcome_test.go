package publisher

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/broker"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
)

var (
	at     = time.Date(2026, 1, 2, 3, 4, 5, 678_901_234, time.UTC)
	first  = Source{Sequence: 7, Stored: at}
	second = Source{Sequence: 9, Stored: at.Add(25 * time.Minute)}
)

func result(s Source, body string) Result {
	return Result{Source: s, RequestID: "hook:1", Creator: "alice", Operation: "top", Status: 200, Attempts: 1, Body: []byte(body)}
}

func letter(s Source) DeadLetter {
	return DeadLetter{
		Class: classify.Validation, Reason: "it is wrong", Creator: "alice", Operation: "top", RequestID: "hook:1", Source: s,
		Attempts: 1, History: []Attempt{{At: at, Ms: 12, Class: classify.Validation, Status: 422}},
		Payload: []byte("payload"), Header: nats.Header{HeaderCorrelationID: {"c1"}, "Ours": {"1"}},
	}
}

// What decides a request, and over what its outcome may be published.
func TestDecides(t *testing.T) {
	remade := Source{Sequence: 7, Stored: at.Add(time.Hour)} // of a stream that was made again
	for name, c := range map[string]struct {
		stands   Outcome
		decided  bool
		expected uint64
	}{
		"nothing":                         {Outcome{}, false, 0},
		"its own result":                  {Outcome{Kind: Answered, Source: first, Sequence: 3}, true, 0},
		"a result of the id, another's":   {Outcome{Kind: Answered, Source: second, Sequence: 3}, true, 0},
		"a result of the last version":    {Outcome{Kind: Answered, Sequence: 3}, true, 0},
		"its own tombstone":               {Outcome{Kind: Dead, Source: first, Sequence: 3}, true, 3},
		"another's tombstone":             {Outcome{Kind: Dead, Source: second, Sequence: 3}, false, 3},
		"a tombstone of another stream's": {Outcome{Kind: Dead, Source: remade, Sequence: 3}, false, 3},
		"no outcome":                      {Outcome{Kind: Foreign, Sequence: 3}, false, 3},
	} {
		decided, expected := c.stands.decides(first)
		if decided != c.decided || !decided && expected != c.expected {
			t.Errorf("%s: decided %v, expected sequence %d", name, decided, expected)
		}
	}
}

func TestReadOutcome(t *testing.T) {
	tomb := func(change func(*DeadLetter)) []byte {
		d := letter(first)
		if change != nil {
			change(&d)
		}
		b, err := json.Marshal(tombstone{d, d.History})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	header := func(more ...string) nats.Header {
		h := nats.Header{HeaderRequestID: {"hook:1"}, HeaderSourceSeq: {"7"}, HeaderSourceStored: {"2026-01-02T03:04:05.678901234Z"}}
		for i := 0; i < len(more); i += 2 {
			h[more[i]] = []string{more[i+1]}
		}
		return h
	}
	for name, c := range map[string]struct {
		header nats.Header
		data   []byte
		want   OutcomeKind
	}{
		"a result":                  {header(HeaderStatus, "200"), []byte("{}"), Answered},
		"a tombstone":               {header(HeaderDeadLetter, "VALIDATION"), tomb(nil), Dead},
		"no headers":                {nil, []byte("{}"), Foreign},
		"another id":                {header(HeaderStatus, "200", HeaderRequestID, "hook:2"), nil, Foreign},
		"an answer of the server":   {nats.Header{"Status": {"503"}}, nil, Foreign},
		"no status":                 {header(), nil, Foreign},
		"a status that is none":     {header(HeaderStatus, "fine"), nil, Foreign},
		"a tombstone, no JSON":      {header(HeaderDeadLetter, "VALIDATION"), []byte("garbage"), Foreign},
		"another class in the body": {header(HeaderDeadLetter, "POISON"), tomb(nil), Foreign},
		"no class":                  {header(HeaderDeadLetter, "A.B.>"), tomb(func(d *DeadLetter) { d.Class = "A.B.>" }), Foreign},
		"another creator":           {header(HeaderDeadLetter, "VALIDATION"), tomb(func(d *DeadLetter) { d.Creator = "bob" }), Foreign},
		"another operation":         {header(HeaderDeadLetter, "VALIDATION"), tomb(func(d *DeadLetter) { d.Operation = "send" }), Foreign},
		"another id in the body":    {header(HeaderDeadLetter, "VALIDATION"), tomb(func(d *DeadLetter) { d.RequestID = "x" }), Foreign},
		"another source":            {header(HeaderDeadLetter, "VALIDATION"), tomb(func(d *DeadLetter) { d.Source = second }), Foreign},
	} {
		o := readOutcome(&broker.Message{Sequence: 3, Header: c.header, Data: c.data}, "alice", "top", "hook:1")
		if o.Kind != c.want || o.Sequence != 3 {
			t.Errorf("%s: %+v, want %v", name, o, c.want)
		}
		if o.Kind != Foreign && !o.Source.Equal(first) {
			t.Errorf("%s: source %+v", name, o.Source)
		}
		if o.Kind == Dead && (o.Letter.Reason != "it is wrong" || len(o.History) != 1 || o.History[0].Status != 422) {
			t.Errorf("%s: letter %+v, history %+v", name, o.Letter, o.History)
		}
	}
	if o := readOutcome(nil, "alice", "top", "hook:1"); o.Kind != NoOutcome {
		t.Errorf("nothing: %+v", o)
	}
}

// The first of two outcomes wins, whatever they are and from wherever they come.
func TestOneOutcome(t *testing.T) {
	_, js := onServer(t, small())
	var (
		g      sync.WaitGroup
		mu     sync.Mutex
		kinds  = map[OutcomeKind]int{}
		places = map[uint64]int{}
	)
	for n := range 16 {
		g.Go(func() {
			p := New(js, small())
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			var o Outcome
			var err error
			if n%2 == 0 {
				o, err = p.Result(ctx, result(first, fmt.Sprint(n)))
			} else {
				o, err = p.Tombstone(ctx, letter(first))
			}
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			kinds[o.Kind]++
			places[o.Sequence]++
			if !o.Source.Equal(first) {
				t.Errorf("source %+v", o.Source)
			}
		})
	}
	g.Wait()
	if n := stored(t, js, "RESULTS"); n != 1 || len(kinds) != 1 || len(places) != 1 {
		t.Errorf("%d outcomes; the callers saw %v at %v", n, kinds, places)
	}
}

// The second outcome does not get in, and its publisher is told what stands.
func TestWhatStands(t *testing.T) {
	for name, c := range map[string]struct {
		before func(ctx context.Context, p *Publisher) (Outcome, error)
		then   func(ctx context.Context, p *Publisher) (Outcome, error)
		kind   OutcomeKind
		source Source
		stored uint64
	}{
		"a late answer after a tombstone": {tombstoneOf(first), resultOf(first, "late"), Dead, first, 1},
		"a tombstone after an answer":     {resultOf(first, "1"), tombstoneOf(first), Answered, first, 1},
		"a lost PubAck of a result":       {resultOf(first, "1"), resultOf(first, "1"), Answered, first, 1},
		"a lost PubAck of a tombstone":    {tombstoneOf(first), tombstoneOf(first), Dead, first, 1},
		"the id again, answered before":   {resultOf(first, "1"), resultOf(second, "2"), Answered, first, 1},
		"the id again, dies this time":    {resultOf(first, "1"), tombstoneOf(second), Answered, first, 1},
		"the id again, died before":       {tombstoneOf(first), resultOf(second, "2"), Answered, second, 2},
		"the id again, dies again":        {tombstoneOf(first), tombstoneOf(second), Dead, second, 2},
		"nothing before":                  {nothing, resultOf(first, "1"), Answered, first, 1},
		"garbage in the place":            {garbage, resultOf(first, "1"), Answered, first, 2},
		"garbage before a tombstone":      {garbage, tombstoneOf(first), Dead, first, 2},
		"a result of the last version":    {lastVersion, resultOf(first, "1"), Answered, Source{}, 1},
		"a result of it, now dead":        {lastVersion, tombstoneOf(first), Answered, Source{}, 1},
	} {
		_, js := onServer(t, small())
		p := New(js, small())
		if _, err := c.before(t.Context(), p); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		o, err := c.then(t.Context(), p)
		if err != nil || o.Kind != c.kind || !o.Source.Equal(c.source) {
			t.Errorf("%s: %+v, %v; want %v of %+v", name, o, err, c.kind, c.source)
		}
		if n := stored(t, js, "RESULTS"); n != c.stored {
			t.Errorf("%s: %d messages, want %d", name, n, c.stored)
		}
		read, err := p.Outcome(t.Context(), "alice", "top", "hook:1")
		if err != nil || read.Kind != o.Kind || read.Sequence != o.Sequence || !read.Source.Equal(o.Source) {
			t.Errorf("%s: read %+v, %v; told %+v", name, read, err, o)
		}
	}
}

type publishing = func(context.Context, *Publisher) (Outcome, error)

func resultOf(s Source, body string) publishing {
	return func(ctx context.Context, p *Publisher) (Outcome, error) { return p.Result(ctx, result(s, body)) }
}

func tombstoneOf(s Source) publishing {
	return func(ctx context.Context, p *Publisher) (Outcome, error) { return p.Tombstone(ctx, letter(s)) }
}

func nothing(context.Context, *Publisher) (Outcome, error) { return Outcome{}, nil }

func garbage(ctx context.Context, p *Publisher) (Outcome, error) {
	_, err := p.js.Publish(ctx, "results.alice.top.hook=3A1", []byte(`{"type":"io.nats.jetstream.api.v1.stream_info_response"}`))
	return Outcome{}, err
}

func lastVersion(ctx context.Context, p *Publisher) (Outcome, error) {
	_, err := p.js.PublishMsg(ctx, &nats.Msg{Subject: "results.alice.top.hook=3A1", Header: nats.Header{
		"Nats-Msg-Id": {"result:hook:1"}, HeaderRequestID: {"hook:1"}, HeaderStatus: {"200"},
	}})
	return Outcome{}, err
}

// A message in a place that is no outcome is published over and reported: it may be an attack.
func TestDisplaced(t *testing.T) {
	_, js := onServer(t, small())
	p := New(js, small())
	if _, err := garbage(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	o, err := p.Result(t.Context(), result(first, "1"))
	if err != nil || o.Displaced != 1 || o.Sequence != 2 {
		t.Errorf("%+v, %v", o, err)
	}
}

// The ids of two creators, or of two operations, are not one. Neither are requests of which
// nothing could be read and those of a creator of that name.
func TestPlacesAreApart(t *testing.T) {
	_, js := onServer(t, small())
	p := New(js, small())
	for _, who := range [][2]string{{"alice", "top"}, {"bob", "top"}, {"alice", "send"}, {"", ""}, {"unreadable", "unreadable"}, {"alice", ""}} {
		d := letter(first)
		d.Creator, d.Operation = who[0], who[1]
		if o, err := p.Tombstone(t.Context(), d); err != nil || o.Kind != Dead {
			t.Errorf("%q: %+v, %v", who, o, err)
		}
		if err := p.DeadLetter(t.Context(), d); err != nil {
			t.Errorf("%q: %v", who, err)
		}
		if o, err := p.Outcome(t.Context(), who[0], who[1], "hook:1"); err != nil || o.Kind != Dead || o.Letter.Creator != who[0] {
			t.Errorf("%q: %+v, %v", who, o, err)
		}
	}
	if n, m := stored(t, js, "RESULTS"), stored(t, js, "DLQ"); n != 6 || m != 6 {
		t.Errorf("%d tombstones, %d letters", n, m)
	}
}

// What subscribers of results see of a dead letter.
func TestTombstoneMessage(t *testing.T) {
	_, js := onServer(t, small())
	p := New(js, small())
	if _, err := p.Tombstone(t.Context(), letter(first)); err != nil {
		t.Fatal(err)
	}
	m := last(t, js, "RESULTS", "results.alice.top.hook=3A1")
	for name, want := range map[string]string{
		HeaderDeadLetter: "VALIDATION", HeaderRequestID: "hook:1", HeaderCreator: "alice", HeaderOperation: "top", HeaderCorrelationID: "c1",
		HeaderSourceSeq: "7", HeaderSourceStored: "2026-01-02T03:04:05.678901234Z", HeaderStatus: "", "Ours": "", "Nats-Msg-Id": "",
	} {
		if got := m.Header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	var body struct {
		Class, Reason string
		Source        Source
		History       []Attempt
	}
	if err := json.Unmarshal(m.Data, &body); err != nil || body.Reason != "it is wrong" || body.Source != first || len(body.History) != 1 {
		t.Errorf("%s: %+v, %v", m.Data, body, err)
	}
}

// A letter is stored once a stored request, and the same id of another one does not hide it.
func TestLettersBySource(t *testing.T) {
	_, js := onServer(t, small())
	p := New(js, small())
	for i, s := range []Source{first, first, second, second, {Sequence: first.Sequence, Stored: at.Add(time.Hour)}} {
		if err := p.DeadLetter(t.Context(), letter(s)); err != nil {
			t.Fatal(err)
		}
		if n, want := stored(t, js, "DLQ"), []uint64{1, 1, 2, 2, 3}[i]; n != want {
			t.Errorf("after %d: %d letters, want %d", i+1, n, want)
		}
	}
}

// While the server stores another message in the place nothing is known: ask again.
func TestInFlight(t *testing.T) {
	for _, code := range []int{10158, 10164} {
		nc := natsservertest.Connect(t)
		js, err := jetstream.New(nc)
		if err != nil {
			t.Fatal(err)
		}
		var asked atomic.Int32
		_, err = nc.Subscribe("results.>", func(m *nats.Msg) {
			answer := `{"stream":"RESULTS","seq":5}`
			if asked.Add(1) <= 3 {
				answer = fmt.Sprintf(`{"error":{"code":400,"err_code":%d,"description":"in flight"}}`, code)
			}
			if err := m.Respond([]byte(answer)); err != nil {
				t.Error(err)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		o, err := New(js, small()).Result(t.Context(), result(first, "1"))
		if err != nil || o.Kind != Answered || o.Sequence != 5 || asked.Load() != 4 {
			t.Errorf("%d: %+v, %v, asked %d times", code, o, err, asked.Load())
		}
	}
}

// What a full stream refuses is told from what can never be stored.
func TestFullResults(t *testing.T) {
	_, js := onServer(t, small())
	s, err := js.Stream(t.Context(), "RESULTS")
	if err != nil {
		t.Fatal(err)
	}
	c := s.CachedInfo().Config
	c.MaxMsgs = 1
	if _, err := js.UpdateStream(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	p := New(js, small())
	other := result(first, "1")
	other.RequestID = "hook:2"
	if _, err := p.Result(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	for name, publish := range map[string]publishing{"result": resultOf(first, "1"), "tombstone": tombstoneOf(first)} {
		if _, err := publish(t.Context(), p); !errors.Is(err, ErrFull) || broker.TroubleOf(err) != broker.Full {
			t.Errorf("%s: %v", name, err)
		}
	}
	ghost := letter(first)
	ghost.Class = "A.B.>"
	if _, err := p.Tombstone(t.Context(), ghost); err == nil {
		t.Error("a tombstone of a class that there is not")
	}
}

// An outcome under an id that a header does not keep as it is would be foreign to itself.
func TestOutcomeOfAnInvalidID(t *testing.T) {
	_, js := onServer(t, small())
	p := New(js, small())
	for _, id := range []string{"", "a\nb", "tail ", "a\x7fb"} {
		r, d := result(first, "1"), letter(first)
		r.RequestID, d.RequestID = id, id
		_, err := p.Result(t.Context(), r)
		_, err2 := p.Tombstone(t.Context(), d)
		if err3 := p.DeadLetter(t.Context(), d); err == nil || err2 == nil || err3 == nil {
			t.Errorf("%q: %v, %v, %v", id, err, err2, err3)
		}
	}
}

func TestRecordKey(t *testing.T) {
	keys := map[string]string{}
	for _, c := range [][2]string{{"alice", "hook:1"}, {"bob", "hook:1"}, {"", "hook:1"}, {"=unreadable", "hook:1"}, {"a.b", "c"}, {"a", "b.c"}} {
		key := RecordKey(c[0], c[1])
		if before, ok := keys[key]; ok {
			t.Errorf("%q: %s is also %s's", c, key, before)
		}
		keys[key] = c[0]
	}
	if got := RecordKey("a.b", "hook:1"); got != "a=2Eb.hook=3A1" {
		t.Errorf("got %s", got)
	}
}
