package consumer

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// nasty is what the world of a run does beside the faults of every run: requests that nobody
// ought to send, an API that changes its mind, operators at work, servers that answer late or not
// at all. The zero value is a kind world.
type nasty struct {
	on         bool
	maxPayload int32           // of the server
	account    resilience.Rate // limit of the API key
	roundTrip  time.Duration   // to the server
	lossy      bool            // one answer of the server in 50 gets lost
	operators  bool            // people hold, release, limit, purge, drop and replay
	buckets    bool            // buckets are made anew, and have garbage in them
	consumers  bool            // consumers are made anew
	full       bool            // streams are full for a minute
	kills      bool            // workers and server are killed together
	tokens     bool            // the API's token runs out, and its endpoint fails
	stray      bool            // requests that no consumer is given
	repeats    bool            // ids are used again
	broken     int             // creators whose calls always fail
	pauses     bool            // longer than the window in which the server knows ids
	twins      bool            // creators have requests of the same id at the same time
}

// nastyOf is a seed's world.
func nastyOf(seed uint64) nasty {
	rng := rand.New(rand.NewPCG(seed, 3))
	chance := func(percent int) bool { return rng.IntN(100) < percent }
	n := nasty{
		on: true, maxPayload: 100 << 10,
		lossy: chance(30), operators: chance(60), buckets: chance(35), consumers: chance(35), full: chance(30), kills: chance(40),
		tokens: chance(25), stray: chance(25), repeats: chance(60), pauses: chance(40),
	}
	if chance(50) {
		n.roundTrip = []time.Duration{time.Millisecond, 30 * time.Millisecond, 110 * time.Millisecond, 300 * time.Millisecond}[rng.IntN(4)]
	}
	if chance(35) {
		n.account = resilience.Rate{PerSecond: float64(2 + rng.IntN(19)), Burst: []int{1, 2, 5, 20}[rng.IntN(4)]}
	}
	if chance(25) {
		n.broken = 1 + rng.IntN(5)
	}
	n.twins = chance(40)
	return n
}

// line is the network of a new worker.
func (n nasty) line(w *world) *line0 {
	l := &line0{server: w.broker}
	if n.roundTrip > 0 {
		l.delay = func() time.Duration { // one way, and a little more or less
			return n.roundTrip * time.Duration(40+w.chance(20)) / 100
		}
	}
	if n.lossy {
		l.loses = func() bool { return w.chance(50) == 0 }
	}
	return l
}

// nastyFate is what an API makes of a call that changes its mind: terminal first, fine later.
func (w *world) nastyFate(ctx context.Context, _ *simWorker, req *publisher.Request) classify.Answer {
	fate, latency := w.chance(1000), time.Duration(w.chance(3000))*time.Millisecond
	if strings.HasPrefix(req.Creator, "probe") {
		fate, latency = 999, latency/3
	}
	select {
	case <-time.After(latency):
	case <-ctx.Done():
		return classify.Answer{Err: ctx.Err()}
	}
	w.mu.Lock()
	expired, healed, before := w.expired, w.healed, 0
	for _, c := range w.calls {
		if c.id == req.ID && c.creator == req.Creator && c.ended {
			before++
		}
	}
	w.mu.Unlock()
	if expired {
		return answer(401)
	}
	if n, err := numberIn(req.Payload); err == nil && n == -2 {
		return answer(422)
	}
	if n, err := strconv.Atoi(strings.TrimPrefix(req.Creator, "c")); err == nil && n < w.nasty.broken && !healed {
		return answer([]int{500, 500, 503, 502}[fate%4])
	}
	if before > 0 && fate >= 500 {
		return simDone(req)
	}
	return w.refuses(fate, req)
}

// refuses is one answer of an API that is in a bad mood.
func (w *world) refuses(fate int, req *publisher.Request) classify.Answer {
	seconds := strconv.Itoa(1 + w.chance(90))
	switch {
	case fate < 60:
		return answer(429, "Retry-After", seconds)
	case fate < 70:
		return answer(429, "Retry-After", time.Now().Add(time.Duration(1+w.chance(90))*time.Second).UTC().Format(http.TimeFormat))
	case fate < 80:
		return answer(429, "Retry-After", "0")
	case fate < 120:
		return answer(503)
	case fate < 135:
		return answer(503, "Retry-After", seconds)
	case fate < 170:
		return answer(404)
	case fate < 205:
		return answer(422)
	case fate < 245:
		return answer([]int{500, 502, 504, 520, 524, 408}[w.chance(6)])
	case fate < 275:
		return classify.Answer{Err: syscall.ECONNRESET}
	case fate < 283:
		panic("the API's client panics")
	case fate < 286:
		return answer(402)
	case fate < 310:
		a := simDone(req)
		n, _ := numberIn(req.Payload)
		a.Body, _ = json.Marshal(simPayload{N: &n, Pad: strings.Repeat("x", w.chance(300<<10))})
		return a
	}
	return simDone(req)
}

// tokenAPI is the API with credentials that can be renewed.
type tokenAPI struct{ simAPI }

func (a tokenAPI) Refresh(ctx context.Context, _ classify.Answer) (bool, error) {
	sleep(ctx, 200*time.Millisecond)
	a.w.mu.Lock()
	defer a.w.mu.Unlock()
	if a.w.endpointFails {
		return false, fmt.Errorf("the token endpoint answers 500")
	}
	a.w.expired = false
	return true, nil
}

// publish publishes the next request of some creator.
func (w *world) publish(creators int) {
	operation := "send"
	if w.rng.IntN(4) == 0 {
		operation = "pay"
	}
	creator := fmt.Sprintf("c%d", w.rng.IntN(creators))
	id := fmt.Sprintf("r-%d", w.count)
	switch {
	case !w.nasty.on:
	case w.rng.IntN(20) == 0:
		w.publishMalformed(creator, operation)
		return
	case w.nasty.repeats && w.count > 0 && w.rng.IntN(6) == 0:
		old := w.pick()
		if old == nil {
			break
		}
		id = old.id
		if w.rng.IntN(3) > 0 {
			creator, operation = old.creator, old.operation
		}
	}
	w.publishAs(id, creator, operation)
	if w.nasty.twins && w.rng.IntN(2) == 0 {
		w.publishAs(id, fmt.Sprintf("c%d", w.rng.IntN(creators)), operation)
	}
}

// pick is some request that is known to be stored, or to have been.
func (w *world) pick() *simRequest {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []*simRequest
	for _, r := range w.requests {
		if r.malformed == "" && r.replay == "" {
			all = append(all, r)
		}
	}
	if len(all) == 0 {
		return nil
	}
	return all[w.rng.IntN(len(all))]
}

func (w *world) publishAs(id, creator, operation string) {
	r := &simRequest{id: id, creator: creator, operation: operation, subject: "requests." + creator + "." + operation}
	body := w.body(r)
	m := nats.NewMsg(r.subject)
	m.Header.Set(nats.MsgIdHdr, id)
	if w.nasty.on && w.rng.IntN(15) == 0 {
		m.Header.Set("X-Long", strings.Repeat("h", w.rng.IntN(60<<10)))
	}
	m.Data = body
	w.mu.Lock()
	w.asked[publisher.IDToken(id)] = true
	w.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if ack, err := w.js.PublishMsg(ctx, m); err == nil && !ack.Duplicate {
		w.stored(r, ack.Sequence, time.Now())
	}
}

// body is the payload of the next request, which it numbers.
func (w *world) body(r *simRequest) []byte {
	w.mu.Lock()
	r.number = w.count
	w.count++
	w.mu.Unlock()
	p := simPayload{N: &r.number}
	if w.nasty.on && w.rng.IntN(25) == 0 {
		p.Pad = strings.Repeat("p", int(w.nasty.maxPayload)-(70<<10)+w.rng.IntN(8<<10))
		if w.rng.IntN(2) == 0 {
			p.Pad = strings.Repeat("p", 30<<10)
		}
	}
	body, _ := json.Marshal(p)
	return body
}

// stored says where a request is stored.
func (w *world) stored(r *simRequest, seq uint64, at time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, other := range w.requests {
		if other.seq != seq {
			continue
		}
		if r.malformed != "" { // the publisher knows more than the stream
			other.malformed, other.id, other.creator, other.operation, other.subject = r.malformed, r.id, r.creator, r.operation, r.subject
		}
		return
	}
	r.seq, r.stored = seq, at
	w.requests = append(w.requests, r)
}

// malformed are requests that a publisher with a bug, or a hostile one, sends: header lines, id (as
// a header, if it is not among the lines), subject ("": as usual) and payload (nil: as usual).
type simMalformed struct {
	name    string
	lines   []string
	id      string
	subject func(creator, operation string) string
	payload []byte
	stray   bool // no consumer is given it
}

var malformedRequests = []simMalformed{
	{name: "a blank in a header's name", lines: []string{"a b: c"}},
	{name: "a blank behind a header's name", lines: []string{"X : c"}},
	{name: "a blank before a header's name", lines: []string{" X: c"}},
	{name: "a control byte as a header's name", lines: []string{"\x01: c"}},
	{name: "a header line without a colon", lines: []string{"no colon"}},
	{name: "64 KB of headers", lines: []string{"X-Long: " + strings.Repeat("h", 65_200)}},
	{name: "a thousand headers", lines: slicesRepeat("X-Many: v", 1000)},
	{name: "64 KB of headers and an API that refuses", lines: []string{"X-Long: " + strings.Repeat("h", 65_200)}, payload: []byte(`{"n":-2}`)},
	{name: "a control byte in the id", id: "dup\x01"},
	{name: "another control byte in the id", id: "dup\x02"},
	{name: "a tab in the id", id: "du\tp"},
	{name: "0x7f in the id", id: "du\x7fp"},
	{name: "a blank behind the id", id: "dup "},
	{name: "no UTF-8 in the id", id: "dup\xff\xfe"},
	{name: "no id", id: ""},
	{name: "an id of 2 KB", id: strings.Repeat("i", 2000)},
	{name: "an id of 1,022 bytes", id: strings.Repeat("j", 1022)},
	{name: "a deadline that is none", lines: []string{"Headgate-Deadline: tomorrow"}},
	{name: "a deadline that is over", lines: []string{"Headgate-Deadline: 2001-01-01T00:00:00Z"}},
	{name: "the deadline 0001", lines: []string{"Headgate-Deadline: 0001-01-01T00:00:00Z"}},
	{name: "a body elsewhere", lines: []string{"Headgate-Body-Bucket: NOPE", "Headgate-Body-Object: salaries", "Headgate-Deadline: 2001-01-01T00:00:00Z"}},
	{name: "a forged replay", lines: []string{"Headgate-Replay: 99", "Headgate-Replayed-Class: VALIDATION"}},
	{name: "a header that is the API's", lines: []string{"Idempotency-Key: x", "Authorization: Bearer x"}},
	{name: "no JSON", payload: []byte("n=1")},
	{name: "no payload", payload: []byte{}},
	{name: "an unknown operation", subject: func(c, _ string) string { return "requests." + c + ".nope" }},
	{name: "an escape that is none", subject: func(c, o string) string { return "requests." + c + "=6c." + o }},
	{name: "an escaped blank", subject: func(c, o string) string { return "requests." + c + "=20." + o }},
	{name: "a star in a creator", subject: func(_, o string) string { return "requests.a*b." + o }},
	{name: "a control byte in a creator", subject: func(_, o string) string { return "requests.\x1b[31m." + o }},
	{name: "a long creator", subject: func(_, o string) string { return "requests." + strings.Repeat("x", 200) + "." + o }},
	{name: "a wildcard as creator", stray: true, subject: func(_, o string) string { return "requests.*." + o }},
	{name: "a wildcard as operation", stray: true, subject: func(c, _ string) string { return "requests." + c + ".*" }},
	{name: "all as creator", stray: true, subject: func(_, o string) string { return "requests.>." + o }},
	{name: "all as operation", stray: true, subject: func(c, _ string) string { return "requests." + c + ".>" }},
	{name: "0x7f in a creator", stray: true, subject: func(_, o string) string { return "requests.a\x7fb." + o }},
}

func slicesRepeat(line string, n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = line
	}
	return all
}

func (w *world) publishMalformed(creator, operation string) {
	kind := malformedRequests[w.rng.IntN(len(malformedRequests))]
	for kind.stray && !w.nasty.stray {
		kind = malformedRequests[w.rng.IntN(len(malformedRequests))]
	}
	if w.nasty.stray && w.rng.IntN(2) == 0 {
		kind = malformedRequests[len(malformedRequests)-1-w.rng.IntN(5)]
	}
	w.publishRaw(kind, creator, operation)
}

func (w *world) publishRaw(kind simMalformed, creator, operation string) {
	r := &simRequest{id: kind.id, creator: creator, operation: operation, malformed: kind.name, subject: "requests." + creator + "." + operation}
	if kind.subject != nil {
		r.subject = kind.subject(creator, operation)
		r.creator, r.operation = "", "" // not what they seem
	}
	body := w.body(r)
	lines := kind.lines
	if kind.id != "" || kind.name != "no id" {
		if r.id == "" {
			r.id = fmt.Sprintf("m-%d", r.number)
		}
		lines = append([]string{"Nats-Msg-Id: " + r.id}, lines...)
	}
	if kind.payload != nil {
		body, r.number = kind.payload, -1
	}
	if r.id != "" {
		w.mu.Lock()
		w.asked[publisher.IDToken(r.id)] = true
		w.mu.Unlock()
	}
	answer, err := w.broker.PublishRaw(r.subject, lines, body)
	if err != nil {
		return
	}
	var ack struct {
		Seq       uint64 `json:"seq"`
		Duplicate bool   `json:"duplicate"`
	}
	if json.Unmarshal(answer, &ack) == nil && ack.Seq > 0 && !ack.Duplicate {
		w.stored(r, ack.Seq, time.Now())
	}
}

// capture learns of all requests that the stream stores: it publishes them again.
func (w *world) capture() error {
	_, err := w.nc.Subscribe("stored.>", func(m *nats.Msg) {
		seq, err := strconv.ParseUint(m.Header.Get("Nats-Sequence"), 10, 64)
		if err != nil {
			return
		}
		at, err := time.Parse(time.RFC3339Nano, m.Header.Get("Nats-Time-Stamp"))
		if err != nil {
			at = time.Now()
		}
		r := &simRequest{id: m.Header.Get(nats.MsgIdHdr), number: -1}
		r.replay = simReplayOf(r.id)
		if n, err := numberIn(m.Data); err == nil {
			r.number = n
		}
		if tokens := strings.Split(m.Subject, "."); len(tokens) == 5 { // stored.requests.<partition>.<creator>.<operation>
			r.creator, r.operation = tokens[3], tokens[4]
			r.subject = "requests." + tokens[3] + "." + tokens[4]
		}
		w.mu.Lock()
		if r.id != "" {
			w.asked[publisher.IDToken(r.id)] = true
		}
		w.mu.Unlock()
		w.stored(r, seq, at)
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, err := w.js.Stream(ctx, "REQUESTS")
	if err != nil {
		return err
	}
	cfg := s.CachedInfo().Config
	cfg.RePublish = republish
	_, err = w.js.UpdateStream(ctx, cfg)
	return err
}

// replayOf is the part of an id that says that it is a replay's.
func simReplayOf(id string) string {
	if i := strings.LastIndex(id, "~r"); i > 0 {
		return id[i:]
	}
	return ""
}
