package natsservertest

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// The client keeps timers in a pool of the process. One that was made in a bubble and is used
// outside of it, or the other way round, ends the process.
func TestNothingTravelsBetweenBubbles(t *testing.T) {
	flush := func(t *testing.T) {
		nc := Connect(t)
		subs := make([]*nats.Subscription, 20)
		for i := range subs {
			var err error
			if subs[i], err = nc.SubscribeSync("a"); err != nil {
				t.Fatal(err)
			}
		}
		if err := nc.Publish("a", nil); err != nil {
			t.Fatal(err)
		}
		for _, s := range subs {
			if _, err := s.NextMsg(time.Minute); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 3 {
		flush(t)
		Simulate(t, flush)
		flush(t)
	}
}

// What consumers were given since SaveConsumers is given again after Kill, as if for the first time.
func TestKill(t *testing.T) {
	for _, save := range []bool{true, false} {
		Simulate(t, func(t *testing.T) {
			b := NewBroker(t)
			js := client(t, b)
			stream, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "A", Subjects: []string{"a"}, Retention: jetstream.WorkQueuePolicy})
			if err != nil {
				t.Fatal(err)
			}
			consumer, err := stream.CreateConsumer(t.Context(), jetstream.ConsumerConfig{Durable: "c", AckPolicy: jetstream.AckExplicitPolicy})
			if err != nil {
				t.Fatal(err)
			}
			next := func() (delivered uint64) {
				t.Helper()
				m, err := consumer.Next()
				if err != nil {
					t.Fatal(err)
				}
				meta, err := m.Metadata()
				if err != nil {
					t.Fatal(err)
				}
				return meta.NumDelivered
			}
			if save {
				b.SaveConsumers("A")
			}
			if _, err := js.Publish(t.Context(), "a", nil); err != nil {
				t.Fatal(err)
			}
			if n := next(); n != 1 {
				t.Errorf("delivery %d", n)
			}
			time.Sleep(time.Second)
			b.Kill("A")
			b.Start()
			time.Sleep(time.Second) // until the client is back
			if n := next(); n != 1 {
				t.Errorf("it remembers: delivery %d", n)
			}
		})
	}
}

func client(t *testing.T, b *Broker) jetstream.JetStream {
	t.Helper()
	nc, err := nats.Connect("", nats.InProcessServer(b), nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return js
}

// The server stores what no client library sends.
func TestPublishRaw(t *testing.T) {
	Simulate(t, func(t *testing.T) {
		b := NewSmallBroker(t, 32<<10)
		js := client(t, b)
		if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "A", Subjects: []string{"a.*"}}); err != nil {
			t.Fatal(err)
		}
		for n, header := range []string{"X : y", "\x01: c", "no colon", "Nats-Msg-Id: a\x00b"} {
			answer, err := b.PublishRaw("a.*", []string{header}, []byte("payload"))
			if want := fmt.Sprintf(`{"stream":"A","seq":%d}`, n+1); err != nil || strings.ReplaceAll(string(answer), " ", "") != want {
				t.Errorf("%q: %s, %v", header, answer, err)
			}
		}
		if _, err := b.PublishRaw("a.b", nil, make([]byte, 33<<10)); err == nil {
			t.Error("larger than the largest message")
		}
		if _, err := b.PublishRaw("b", nil, nil); !errors.Is(err, nats.ErrNoResponders) {
			t.Errorf("nobody takes it: %v", err)
		}
	})
}
