package dlq

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
)

// box is a DLQ with n letters of the classes in turn.
func box(t *testing.T, n int, classes ...classify.Class) *Box {
	t.Helper()
	nc := natsservertest.Connect(t)
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(n+1))
	if err != nil {
		t.Fatal(err)
	}
	topology := publisher.Topology{Partitions: 1}.WithDefaults()
	if _, err := topology.Ensure(t.Context(), js); err != nil {
		t.Fatal(err)
	}
	p := publisher.New(js, topology)
	for i := range n {
		d := publisher.DeadLetter{
			Class: classes[i%len(classes)], Code: "code-" + strconv.Itoa(i%3), Reason: "test",
			Creator: "c" + strconv.Itoa(i%5), Operation: "send", RequestID: fmt.Sprintf("r-%d", i), Payload: []byte("{}"),
		}
		if err := p.DeadLetter(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	b, err := Open(t.Context(), js, topology.Namespace)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func ids(t *testing.T, b *Box, f Filter) []string {
	t.Helper()
	var got []string
	if err := b.Each(t.Context(), f, false, func(l Letter) error { got = append(got, l.RequestID); return nil }); err != nil {
		t.Fatal(err)
	}
	return got
}

func TestEach(t *testing.T) {
	b := box(t, 30, classify.Validation, classify.ServerError)
	for name, c := range map[string]struct {
		filter Filter
		want   int
	}{
		"all":                 {Filter{}, 30},
		"a class":             {Filter{Class: classify.Validation}, 15},
		"a class without any": {Filter{Class: classify.Poison}, 0},
		"a creator":           {Filter{Creator: "c1"}, 6},
		"a code":              {Filter{Code: "code-0"}, 10},
		"class and creator":   {Filter{Class: classify.ServerError, Creator: "c1"}, 3},
		"another operation":   {Filter{Operation: "read"}, 0},
		"not yet":             {Filter{Since: time.Now().Add(time.Hour)}, 0},
		"long ago":            {Filter{Until: time.Now().Add(-time.Hour)}, 0},
	} {
		if got := ids(t, b, c.filter); len(got) != c.want {
			t.Errorf("%s: %d letters, want %d: %v", name, len(got), c.want, got)
		}
	}
	if err := b.Each(t.Context(), Filter{Class: "NONE"}, false, nil); err == nil {
		t.Error("there is no class NONE")
	}
}

// Reading the DLQ while it is being emptied comes to an end.
func TestEachWhileOthersDelete(t *testing.T) {
	const n = 2_000 // more than a client is sent ahead
	b := box(t, n, classify.Validation)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	read := 0
	err := b.Each(ctx, Filter{}, false, func(l Letter) error {
		if read++; read == 1 {
			return b.stream.Purge(ctx)
		}
		return nil
	})
	if err != nil || read == 0 || read == n {
		t.Errorf("%d of %d letters read, %v", read, n, err)
	}
}

func TestEachStops(t *testing.T) {
	b := box(t, 3, classify.Validation)
	enough := errors.New("enough")
	n := 0
	if err := b.Each(t.Context(), Filter{}, false, func(Letter) error { n++; return enough }); !errors.Is(err, enough) || n != 1 {
		t.Errorf("%d letters, %v", n, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.Each(ctx, Filter{}, false, func(Letter) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestDropTwice(t *testing.T) {
	b := box(t, 2, classify.Validation)
	l, err := b.Get(t.Context(), "r-0")
	if err != nil || string(l.Payload) != "{}" || l.Class != classify.Validation {
		t.Fatalf("%+v, %v", l, err)
	}
	for range 2 { // another command may have been faster
		if err := b.Drop(t.Context(), l); err != nil {
			t.Fatal(err)
		}
	}
	if got := ids(t, b, Filter{}); len(got) != 1 || got[0] != "r-1" {
		t.Errorf("%v are left", got)
	}
	if _, err := b.Get(t.Context(), "r-0"); err == nil {
		t.Error("it is gone")
	}
}

// Replay takes what may be replayed and leaves the rest where it is.
func TestReplaySelects(t *testing.T) {
	r := Replay{MaxReplays: 3}
	named := Replay{MaxReplays: 3, Filter: Filter{Class: classify.Poison}}
	letter := func(class classify.Class, replays int) Letter {
		return Letter{Class: class, Replays: replays, Creator: "alice", Operation: "send"}
	}
	for name, c := range map[string]struct {
		r    Replay
		l    Letter
		want bool
	}{
		"fresh":              {r, letter(classify.Validation, 0), true},
		"last time":          {r, letter(classify.Validation, 2), true},
		"too often":          {r, letter(classify.Validation, 3), false},
		"poison":             {r, letter(classify.Poison, 0), false},
		"uncertain":          {r, letter(classify.Uncertain, 0), false},
		"poison, named":      {named, letter(classify.Poison, 0), true},
		"poison, too often":  {named, letter(classify.Poison, 3), false},
		"an unknown old one": {r, letter("", 0), true},
		"without a creator":  {r, Letter{Class: classify.Validation, Operation: "send"}, false},
		"and an operation":   {r, Letter{Class: classify.Validation, Creator: "alice"}, false},
	} {
		if got := c.r.Selects(c.l); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestReplayTwice(t *testing.T) {
	b := box(t, 40, classify.Validation, classify.Uncertain)
	done, err := b.Replay(t.Context(), Replay{MaxReplays: 3})
	if want := (Replayed{Done: 20, Skipped: 20, Of: 40}); err != nil || done != want {
		t.Errorf("%+v, %v, want %+v", done, err, want)
	}
	if got := ids(t, b, Filter{Class: classify.Validation}); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
	if done, err = b.Replay(t.Context(), Replay{MaxReplays: 3}); err != nil || done.Done != 0 || done.Skipped != 20 {
		t.Errorf("a second time: %+v, %v", done, err)
	}
	requests, err := b.js.Stream(t.Context(), "REQUESTS")
	if err != nil || requests.CachedInfo().State.Msgs != 20 {
		t.Errorf("%v, %v", requests.CachedInfo().State, err)
	}
}
