package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// books hold what was asked, by where it is stored, against the outcomes.
type books struct {
	mu      sync.Mutex
	asked   map[uint64]entry
	removed map[uint64]bool // by people
}

type entry struct{ creator, operation, id string }

func (e entry) place() string { return e.creator + "." + e.operation + "." + e.id }

// publish stores a request, and goes on until there is a PubAck, as an ingester does.
func (b *books) publish(ctx context.Context, js jetstream.JetStream, e entry) (duplicate bool) {
	m := nats.NewMsg("requests." + e.creator + "." + e.operation)
	m.Header.Set(nats.MsgIdHdr, e.id)
	m.Data = []byte("{}")
	for ctx.Err() == nil {
		short, cancel := context.WithTimeout(ctx, 2*time.Second)
		ack, err := js.PublishMsg(short, m)
		cancel()
		if err != nil {
			continue
		}
		b.mu.Lock()
		if b.asked == nil {
			b.asked, b.removed = map[uint64]entry{}, map[uint64]bool{}
		}
		if !ack.Duplicate {
			b.asked[ack.Sequence] = e
		}
		b.mu.Unlock()
		return ack.Duplicate
	}
	return false
}

func (b *books) count() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.asked)
}

// storedOutcome is a result, a tombstone among the results or a dead letter.
type storedOutcome struct {
	place  string
	class  string // "": a result
	letter bool
	source uint64 // 0: it does not say
	at     time.Time
}

// readOutcomes reads all of a stream's.
func readOutcomes(ctx context.Context, js jetstream.JetStream, stream string) (all []storedOutcome, err error) {
	s, err := js.Stream(ctx, stream)
	if err != nil || s.CachedInfo().State.Msgs == 0 {
		return nil, err
	}
	c, err := s.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{HeadersOnly: true})
	if err != nil {
		return nil, err
	}
	messages, err := c.Messages()
	if err != nil {
		return nil, err
	}
	defer messages.Stop()
	stop := context.AfterFunc(ctx, messages.Stop)
	defer stop()
	for {
		m, err := messages.Next()
		if err != nil {
			return nil, err
		}
		meta, err := m.Metadata()
		if err != nil {
			return nil, err
		}
		tokens := strings.Split(m.Subject(), ".")
		o := storedOutcome{at: meta.Timestamp}
		source := "Headgate-Source-Seq"
		switch tokens[0] {
		case "dlq":
			o.letter, o.class, source = true, tokens[1], "Dlq-Source-Seq"
			tokens = tokens[1:]
		case "results":
			o.class = m.Headers().Get("Headgate-Dead-Letter")
		}
		if len(tokens) == 4 { // else a fence
			o.place = strings.Join(tokens[1:], ".")
			o.source, _ = strconv.ParseUint(m.Headers().Get(source), 10, 64)
			all = append(all, o)
		}
		if meta.NumPending == 0 {
			return all, nil
		}
	}
}

// compare says which requests have no outcome and which have two. A request whose id has a result
// needs none of its own: the first answer is kept.
func (b *books) compare(ctx context.Context, js jetstream.JetStream) (missing, double []string, all []storedOutcome, err error) {
	results, err := readOutcomes(ctx, js, "RESULTS")
	letters, err2 := readOutcomes(ctx, js, "DLQ")
	if err = errors.Join(err, err2); err != nil {
		return nil, nil, nil, err
	}
	all = append(results, letters...)
	b.mu.Lock()
	defer b.mu.Unlock()
	places := map[string]int{}
	for _, e := range b.asked {
		places[e.place()]++
	}
	answered, dead, buried, answers := map[uint64]int{}, map[uint64]int{}, map[uint64]bool{}, map[string]int{}
	for _, o := range all {
		switch {
		case o.class == "":
			answered[o.source]++
			answers[o.place]++
		case o.letter:
			dead[o.source]++
		default:
			buried[o.source] = true
		}
	}
	for source := range buried { // a tombstone and its letter are one outcome
		dead[source] = max(dead[source], 1)
	}
	for seq, e := range b.asked {
		own, unsigned := answered[seq], answers[e.place()] > 0 && answered[seq] == 0
		switch {
		case own > 1 || dead[seq] > 1 || own > 0 && dead[seq] > 0 || answers[e.place()] > 1,
			unsigned && dead[seq] > 0 && places[e.place()] == 1:
			double = append(double, fmt.Sprintf("%s (request %d)", e.place(), seq))
		case own+dead[seq]+answers[e.place()] == 0 && !b.removed[seq]:
			missing = append(missing, fmt.Sprintf("%s (request %d)", e.place(), seq))
		}
	}
	return missing, double, all, nil
}
