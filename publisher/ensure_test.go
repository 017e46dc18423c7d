package publisher

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
)

func TestEnsureTwice(t *testing.T) {
	js, err := jetstream.New(natsservertest.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	planned, err := small().Plan(t.Context(), js)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.Stream(t.Context(), "REQUESTS"); !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Errorf("a plan made the stream: %v", err)
	}
	made, err := small().Ensure(t.Context(), js)
	if err != nil {
		t.Fatal(err)
	}
	if len(planned) != len(made) || len(made) != 4+4+5+1 {
		t.Errorf("planned %d, made %d: %v", len(planned), len(made), made)
	}
	if again, err := small().Ensure(t.Context(), js); err != nil || len(again) != 0 {
		t.Errorf("a second time: %v, %v", again, err)
	}
}

// Settings that were changed by hand are put right, settings that were added stay.
func TestEnsureRepairs(t *testing.T) {
	_, js := onServer(t, small())
	s, err := js.Stream(t.Context(), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	c := s.CachedInfo().Config
	c.MaxAge, c.MaxBytes = time.Hour, 1<<30
	c.Metadata["owner"] = "team-a"
	if _, err := js.UpdateStream(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	consumer, err := js.Consumer(t.Context(), "REQUESTS", "partition-1")
	if err != nil {
		t.Fatal(err)
	}
	cc := consumer.CachedInfo().Config
	cc.MaxAckPending = 1000
	if _, err := js.UpdateConsumer(t.Context(), "REQUESTS", cc); err != nil {
		t.Fatal(err)
	}
	if err := js.DeleteConsumer(t.Context(), "REQUESTS", "partition-2"); err != nil {
		t.Fatal(err)
	}

	changes, err := small().Ensure(t.Context(), js)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, c := range changes {
		lines = append(lines, c.Action+" "+c.Name+" "+strings.Join(c.Diff, ", "))
	}
	got := strings.Join(lines, "\n")
	want := "update DLQ max_age: 1h0m0s → 720h0m0s\nupdate partition-1 max_ack_pending: 1000 → 1000000\ncreate partition-2 "
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	s, _ = js.Stream(t.Context(), "DLQ")
	if c := s.CachedInfo().Config; c.MaxBytes != 1<<30 || c.Metadata["owner"] != "team-a" || c.MaxAge != 720*time.Hour {
		t.Errorf("got %+v", c)
	}
}

// A creator is in one partition: their number stays while requests are stored.
func TestPartitionsAreFixed(t *testing.T) {
	_, js := onServer(t, small())
	p := New(js, small())
	if _, err := p.Publish(t.Context(), Request{Creator: "alice", Operation: "top"}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{2, 8} {
		_, err := Topology{Partitions: n}.Ensure(t.Context(), js)
		if !errors.Is(err, ErrPartitionsFixed) || !strings.Contains(err.Error(), "partitions: 4") {
			t.Errorf("%d partitions: got %v", n, err)
		}
	}
	s, _ := js.Stream(t.Context(), "REQUESTS")
	if err := s.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{2, 8} {
		if _, err := (Topology{Partitions: n}).Ensure(t.Context(), js); err != nil {
			t.Fatalf("%d partitions, nothing stored: %v", n, err)
		}
		s, _ = js.Stream(t.Context(), "REQUESTS")
		if got := s.CachedInfo().State.Consumers; got != n {
			t.Errorf("%d consumers, want %d", got, n)
		}
	}
}

func TestCheckTopology(t *testing.T) {
	for what, topology := range map[string]Topology{
		"partitions must be 1 to 1024": {Partitions: 2000},
		"replicas must be 1 to 5":      {Replicas: 7},
		"results must be kept":         {ResultsMaxAge: time.Minute},
	} {
		if err := topology.WithDefaults().Check(); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: got %v", what, err)
		}
	}
}

func TestReplicasNeedACluster(t *testing.T) {
	js, err := jetstream.New(natsservertest.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	_, err = Topology{Partitions: 1, Replicas: 3}.Ensure(t.Context(), js)
	if err == nil || !strings.Contains(err.Error(), "nats.replicas") {
		t.Errorf("got %v, want what to do", err)
	}
}

// The last version stored fences beside the results.
func TestEnsureDropsFences(t *testing.T) {
	_, js := onServer(t, small())
	s, err := js.Stream(t.Context(), "RESULTS")
	if err != nil {
		t.Fatal(err)
	}
	old := s.CachedInfo().Config
	old.Subjects = []string{"results.>", "fence.*"}
	if _, err := js.UpdateStream(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	for _, subject := range []string{"fence.hook=3A1", "results.alice.top.hook=3A2"} {
		if _, err := js.Publish(t.Context(), subject, nil); err != nil {
			t.Fatal(err)
		}
	}
	changes, err := small().Ensure(t.Context(), js)
	if err != nil || len(changes) != 1 || changes[0].Name != "RESULTS" {
		t.Fatalf("%+v, %v", changes, err)
	}
	s, err = js.Stream(t.Context(), "RESULTS")
	if err != nil {
		t.Fatal(err)
	}
	if info := s.CachedInfo(); info.State.Msgs != 1 || !slices.Equal(info.Config.Subjects, []string{"results.>"}) {
		t.Errorf("%d messages, subjects %v", info.State.Msgs, info.Config.Subjects)
	}
}

// The longest duration of a request's age has no room for a day more.
func TestEnsureWithTheLongestAge(t *testing.T) {
	js, err := jetstream.New(natsservertest.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		changes, err := Topology{Partitions: 1, MaxAge: 2562047 * time.Hour}.Ensure(t.Context(), js)
		if err != nil || i == 1 && len(changes) != 0 {
			t.Fatalf("%+v, %v", changes, err)
		}
	}
}
