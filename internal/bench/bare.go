package bench

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/publisher"
)

// bare is the yardstick: a loop that speaks the same protocol as the worker,
// pull → HTTP → result with its headers and the id in its subject, PubAck →
// confirmed ack, and does nothing else. It has no holds and no limits, and
// forgets everything.
type bare struct {
	nc       *nats.Conn
	js       jetstream.JetStream
	client   *http.Client
	ns       publisher.Namespace
	url      string
	inFlight chan struct{}
	failed   atomic.Int64
	calls    sync.WaitGroup
}

func newBare(nc *nats.Conn, j Job) (*bare, error) {
	inFlight := j.InFlight
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(2*inFlight))
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	return &bare{
		nc: nc, js: js, ns: j.Namespace, url: j.API + "/call", inFlight: make(chan struct{}, inFlight),
		client: &http.Client{
			Transport: &http.Transport{DialContext: dialer.DialContext, MaxIdleConns: inFlight, MaxIdleConnsPerHost: inFlight},
			Timeout:   10 * time.Second,
		},
	}, nil
}

// run works until ctx ends.
func (b *bare) run(ctx context.Context, partitions int) error {
	window := min(max(cap(b.inFlight)/partitions, 8), 256)
	for p := range partitions {
		next := fmt.Sprintf("$JS.API.CONSUMER.MSG.NEXT.%s.%s", b.ns.Stream(publisher.Requests), publisher.ConsumerName(p))
		inbox := b.nc.NewInbox()
		asked := 0
		ask := func() error {
			if window-asked < (window+1)/2 {
				return nil
			}
			batch := window - asked
			asked = window
			return b.nc.PublishRequest(next, inbox, fmt.Appendf(nil, `{"batch":%d,"expires":%d,"idle_heartbeat":%d}`, batch, 30*time.Second, 5*time.Second))
		}
		sub, err := b.nc.Subscribe(inbox, func(m *nats.Msg) {
			if !strings.HasPrefix(m.Reply, "$JS.ACK.") { // a heartbeat, or the end of a pull
				if left, err := strconv.Atoi(m.Header.Get("Nats-Pending-Messages")); err == nil {
					asked -= left
					_ = ask()
				}
				return
			}
			asked--
			b.inFlight <- struct{}{}
			b.calls.Add(1)
			go func() {
				defer b.calls.Done()
				if err := b.work(context.WithoutCancel(ctx), m); err != nil {
					b.failed.Add(1)
				}
				<-b.inFlight
			}()
			_ = ask()
		})
		if err != nil {
			return err
		}
		defer func() { _ = sub.Unsubscribe() }()
		if err := ask(); err != nil {
			return err
		}
	}
	<-ctx.Done()
	b.calls.Wait()
	if failed := b.failed.Load(); failed > 0 {
		return fmt.Errorf("the bare loop failed %d times", failed)
	}
	return nil
}

func (b *bare) work(ctx context.Context, m *nats.Msg) error {
	tokens := strings.Split(m.Subject, ".") // requests.<partition>.<creator>.<operation>
	n := len(tokens)
	creator, operation, id := tokens[n-2], tokens[n-1], m.Header.Get(jetstream.MsgIDHeader)
	began := time.Now()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, b.url, bytes.NewReader(m.Data))
	if err != nil {
		return err
	}
	req.Header[http.CanonicalHeaderKey(creatorHeader)] = []string{creator}
	req.Header["Idempotency-Key"] = []string{id}
	resp, err := b.client.Do(req)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if err != nil {
		return err
	}
	future, err := b.js.PublishMsgAsync(&nats.Msg{
		Subject: b.ns.Subject("results", creator, operation, id),
		Header: nats.Header{
			jetstream.MsgIDHeader:               {"result:" + id},
			jetstream.ExpectedLastSubjSeqHeader: {"0"},
			publisher.HeaderContentType:         {resp.Header.Get("Content-Type")},
			publisher.HeaderRequestID:           {id},
			publisher.HeaderCreator:             {creator},
			publisher.HeaderOperation:           {operation},
			publisher.HeaderStatus:              {strconv.Itoa(resp.StatusCode)},
			publisher.HeaderAttempts:            {"1"},
			publisher.HeaderDurationMs:          {strconv.FormatInt(time.Since(began).Milliseconds(), 10)},
		},
		Data: body,
	})
	if err != nil {
		return err
	}
	select {
	case <-future.Ok():
	case err := <-future.Err():
		return err
	}
	_, err = b.nc.RequestWithContext(ctx, m.Reply, []byte("+ACK"))
	return err
}
