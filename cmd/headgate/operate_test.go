package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/headgate-io/headgate/internal/dlq"
	"github.com/headgate-io/headgate/internal/failpoint"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/publisher"
)

// Whoever asks why something waits gets the answer, and can act on it.
func TestOperate(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	w.api.answer("throttled", func(_ int, rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Retry-After", "3600")
		rw.WriteHeader(http.StatusTooManyRequests)
	})
	defer w.worker()()
	w.publish("requests.throttled.send", `{}`, nats.MsgIdHdr, "a")
	w.publish("requests.throttled.send", `{}`, nats.MsgIdHdr, "b")
	why := func(creator string) (y creatorWhy) {
		t.Helper()
		if err := json.Unmarshal([]byte(w.headgate("why", creator, "-o", "json")), &y); err != nil {
			t.Fatal(err)
		}
		return y
	}
	eventually(t, "throttled is held, and both are set aside", func() bool { y := why("throttled"); return y.Reason == "hold" && y.Parked == 2 })
	y := why("throttled")
	if y.Until == nil || time.Until(*y.Until) < 50*time.Minute || y.Stored != 2 || y.Parked != 2 || len(y.Failures) == 0 || y.Failures[0].Status != 429 {
		t.Errorf("%+v", y)
	}
	for id, says := range map[string]string{"a": "held: RATE_LIMIT", "never": "never published"} {
		if text := w.headgate("why", "--request", id); !strings.Contains(text, says) {
			t.Errorf("why --request %s says\n%s", id, text)
		}
	}
	if text := w.headgate("why", "throttled"); !strings.Contains(text, "held: RATE_LIMIT") || !strings.Contains(text, "until:") || !strings.Contains(text, "failed:") {
		t.Errorf("why says\n%s", text)
	}
	if out := w.headgate("creators", "ls", "-o", "jsonl"); !strings.Contains(out, `"creator":"throttled"`) {
		t.Errorf("creators says\n%s", out)
	}
	var status fleetStatus
	if err := json.Unmarshal([]byte(w.headgate("status", "-o", "json")), &status); err != nil {
		t.Fatal(err)
	}
	if status.Backlog != 2 || status.Held["RATE_LIMIT"] != 1 || len(status.Workers) != 1 || status.Missing != 0 {
		t.Errorf("%+v", status)
	}
	if text := w.headgate("status"); !strings.Contains(text, "held        1 RATE_LIMIT") || !strings.Contains(text, "backlog     2 requests") {
		t.Errorf("status says\n%s", text)
	}

	w.api.answer("throttled", nil)
	w.headgate("release", "throttled", "--force")
	w.outcome("RESULTS", "results.throttled.send.a")
	w.outcome("RESULTS", "results.throttled.send.b")
	if text := w.headgate("why", "--request", "a"); !strings.Contains(text, "it has its result") {
		t.Errorf("why --request a says\n%s", text)
	}

	// The service does the same for any NATS client.
	say := func(subject, body string) string {
		t.Helper()
		m, err := w.nc.Request(subject, []byte(body), patience)
		if err != nil {
			t.Fatalf("%s: %v", subject, err)
		}
		return m.Header.Get("Nats-Service-Error") + string(m.Data)
	}
	if answer := say("headgate.hold", `{"creator":"dora","for":"1h","reason":"test"}`); answer != `{"ok":true}` {
		t.Error(answer)
	}
	eventually(t, "dora is held", func() bool { return strings.Contains(say("headgate.why.dora", ""), `"reason":"hold"`) })
	if answer := say("headgate.release", `{"creator":"dora"}`); answer != `{"ok":true}` {
		t.Error(answer)
	}
	for _, body := range []string{`{"creator":"dora","for":"1h"}`, `{"for":"1h","reason":"x"}`, `{"scope":"world","reason":"x"}`, `no`} {
		if answer := say("headgate.hold", body); strings.Contains(answer, "ok") {
			t.Errorf("%s: %s", body, answer)
		}
	}

	w.headgate("hold", "alice", "--for", "1h", "--reason", "she asked for it")
	eventually(t, "alice is held", func() bool { return why("alice").Reason == "hold" })
	w.publish("requests.alice.send", `{}`)
	eventually(t, "her request waits", func() bool { return why("alice").Parked == 1 })
	if y := why("alice"); !strings.Contains(y.Text, "she asked for it") || len(w.api.of("alice")) != 0 {
		t.Errorf("%+v", y)
	}
	w.headgate("release", "alice")
	w.outcome("RESULTS", "results.alice.>")

	w.headgate("hold", "--account", "--reason", "the bill")
	eventually(t, "all are held", func() bool { return why("bob").Reason == "account_hold" })
	w.headgate("release", "--account")
	eventually(t, "nobody is held", func() bool { return why("bob").Reason == "" })

	w.headgate("limits", "carol", "--rate", "1/h", "--burst", "1")
	published := 0
	eventually(t, "carol is slower", func() bool {
		if y := why("carol"); y.Reason == "limit" && y.Parked > 0 {
			return true
		}
		w.publish("requests.carol.send", `{}`) // the worker may not have heard of it yet
		published++
		return false
	})
	w.headgate("limits", "carol", "--reset")
	w.outcomes("RESULTS", "results.carol.>", published)

	for _, args := range []string{"hold", "hold alice", "hold alice --account --reason x", "release", "limits alice", "limits alice --rate fast", "limits alice --burst 0", "why", "why a --output xml", "dlq drop --class NO_SUCH", "dlq ls --since yesterday", "purge"} {
		if code, _, stderr := program(t, "", append(strings.Fields(args), "-c", w.config, "--server", w.url)...); code != exitUsage && code != exitFailed || stderr == "" {
			t.Errorf("headgate %s: exit code %d: %s", args, code, stderr)
		}
	}
}

// Also where nobody works there is an answer.
func TestWhyNobodyWorks(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	w.publish("requests.alice.send", `{}`)
	var y creatorWhy
	if err := json.Unmarshal([]byte(w.headgate("why", "alice", "-o", "json")), &y); err != nil {
		t.Fatal(err)
	}
	if y.Reason != reasonNobody || y.Stored != 1 || y.Creator != "alice" {
		t.Errorf("%+v", y)
	}
	if text := w.headgate("why", "alice"); !strings.Contains(text, "no worker answers") || !strings.Contains(text, "headgate run") || !strings.Contains(text, "1 stored") {
		t.Errorf("why says\n%s", text)
	}
}

// letters makes n dead letters of creators, by the real way.
func (w *world) letters(n, creators int) {
	w.t.Helper()
	for c := range creators {
		w.api.answer(fmt.Sprintf("c%d", c), status(422, `{"error":{"code":"too_long"}}`))
	}
	stop := w.worker()
	w.publishMany(n, func(i int) *nats.Msg {
		m := nats.NewMsg(fmt.Sprintf("requests.c%d.send", i%creators))
		m.Header.Set(nats.MsgIdHdr, fmt.Sprintf("r-%d", i))
		m.Data = fmt.Appendf(nil, `{"n":%d}`, i)
		return m
	})
	within(w.t, patience, "all are dead letters", func() bool { return int(w.messages("DLQ")) == n })
	stop()
	for c := range creators {
		w.api.answer(fmt.Sprintf("c%d", c), nil)
	}
}

// Ten thousand dead letters are replayed, each once, although the command is killed
// and started again and a second copy runs beside it; the creators' limits hold
// meanwhile.
func TestReplay(t *testing.T) {
	letters := 10_000
	if testing.Short() {
		letters = 500
	}
	const creators = 20
	w := newWorld(t, natsservertest.URL(t))
	w.letters(letters, creators)
	w.change("creator: {rate: inf, concurrency: 3}", "creator: {rate: 150/s, burst: 60, concurrency: 3}")
	w.api.forget()
	out := w.headgate("dlq", "replay", "--class", "VALIDATION", "--dry-run")
	if !strings.Contains(out, fmt.Sprint(letters)) || int(w.messages("DLQ")) != letters {
		t.Fatalf("dry run:\n%s", out)
	}
	defer w.worker()()
	args := []string{"dlq", "replay", "--class", "VALIDATION"}
	first := w.process(args...)
	eventually(t, "the first one is in the middle", func() bool { return int(w.messages("DLQ")) < letters*9/10 })
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait()
	if int(w.messages("DLQ")) == 0 {
		t.Error("it was killed when all was done")
	}
	var both [2]*exec.Cmd
	for i := range both {
		both[i] = w.process(args...)
	}
	for _, cmd := range both {
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	if n := int(w.messages("DLQ")); n != 0 {
		t.Errorf("%d dead letters are left", n)
	}
	// Beside the tombstones of the dead letters.
	within(t, patience, "all have results", func() bool { return int(w.messages("RESULTS")) == 2*letters })
	total := 0
	for c := range creators {
		name := fmt.Sprintf("c%d", c)
		calls := w.api.of(name)
		total += len(calls)
		keys := map[string]bool{}
		var at []time.Time
		for _, call := range calls {
			keys[call.header.Get("Idempotency-Key")] = true
			at = append(at, call.at)
		}
		if len(keys) != letters/creators || len(calls) != letters/creators {
			t.Errorf("%s: %d calls of %d requests, want %d", name, len(calls), len(keys), letters/creators)
		}
		keeps(t, name, at, 150, 60+3) // as many as are in flight may come late, and together
	}
	t.Logf("%d letters replayed, %d calls", letters, total)
}

// What comes back with the same class stops the rest, unless somebody insists; and it is
// not replayed for ever.
func TestReplayStops(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	w.letters(400, 4)
	for c := range 4 {
		w.api.answer(fmt.Sprintf("c%d", c), status(422, "{}"))
	}
	defer w.worker()()
	code, out, stderr := program(t, "", "dlq", "replay", "--rate", "100", "-c", w.config, "--server", w.url)
	if code != exitPartly || !strings.Contains(stderr, "comes back with the same class") || !strings.Contains(out, "came back") {
		t.Errorf("exit code %d: %s%s", code, out, stderr)
	}
	if n := int(w.messages("DLQ")); n < 390 {
		t.Errorf("%d dead letters are left", n)
	}
	for range 3 {
		w.headgate("dlq", "replay", "--keep-going")
		eventually(t, "all came back", func() bool { return int(w.messages("DLQ")) == 400 })
	}
	if out := w.headgate("dlq", "replay", "--keep-going"); !strings.Contains(out, "left (replayed 3 times before") {
		t.Errorf("replayed too often:\n%s", out)
	}
	if out := w.headgate("dlq", "stats"); !strings.Contains(out, "VALIDATION") || !strings.Contains(out, "400") {
		t.Errorf("stats:\n%s", out)
	}
	if out := w.headgate("dlq", "ls", "--creator", "c1", "--limit", "5", "-o", "jsonl"); strings.Count(out, "\n") != 5 {
		t.Errorf("ls:\n%s", out)
	}
	var l exportedLetter
	first, _, _ := strings.Cut(w.headgate("dlq", "export", "--creator", "c1"), "\n")
	if err := json.Unmarshal([]byte(first), &l); err != nil || l.Creator != "c1" || l.Class != "VALIDATION" {
		t.Errorf("export: %v: %s", err, first)
	}
	if out := w.headgate("dlq", "show", l.RequestID); !strings.Contains(out, `"n":`) || !strings.Contains(out, "Dlq-Reason") {
		t.Errorf("show:\n%s", out)
	}
	if code, _, _ := program(t, "", "dlq", "drop", "--creator", "c1", "-c", w.config, "--server", w.url); code != exitUsage || int(w.messages("DLQ")) != 400 {
		t.Errorf("drop without --yes: exit code %d", code)
	}
	w.headgate("dlq", "drop", "--creator", "c1", "--yes")
	if n := int(w.messages("DLQ")); n != 300 {
		t.Errorf("%d dead letters are left, want 300", n)
	}
}

// The filters mean what they say.
func TestDLQFilters(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	w.letters(20, 4)
	box, err := dlq.Open(t.Context(), w.js, "")
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		f dlq.Filter
		n int
	}{
		"all":           {dlq.Filter{}, 20},
		"class":         {dlq.Filter{Class: "VALIDATION"}, 20},
		"another class": {dlq.Filter{Class: "GONE"}, 0},
		"creator":       {dlq.Filter{Creator: "c1"}, 5},
		"operation":     {dlq.Filter{Operation: "send"}, 20},
		"status":        {dlq.Filter{Status: 422}, 20},
		"other status":  {dlq.Filter{Status: 400}, 0},
		"since":         {dlq.Filter{Since: time.Now().Add(time.Hour)}, 0},
		"until":         {dlq.Filter{Until: time.Now().Add(-time.Hour)}, 0},
	} {
		n := 0
		if err := box.Each(t.Context(), tc.f, false, func(dlq.Letter) error { n++; return nil }); err != nil || n != tc.n {
			t.Errorf("%s: %d, %v; want %d", name, n, err, tc.n)
		}
	}
}

// Nothing of a creator is left, in any stream or bucket.
func TestPurge(t *testing.T) {
	const who = "Erased.One"
	token, err := publisher.EncodeToken(who)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, natsservertest.URL(t))
	w.api.answer(who, func(n int, rw http.ResponseWriter, r *http.Request) {
		switch r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:] {
		case "large":
			_, _ = io.WriteString(rw, `"`+strings.Repeat("x", 2<<20)+`"`)
		case "bad":
			rw.WriteHeader(422)
		case "retried":
			if n < 5 {
				rw.WriteHeader(503)
			}
		}
	})
	defer w.worker()()
	// Of a letter that was dropped, the ledger still knows.
	w.publish("requests."+token+".bad", `{}`, nats.MsgIdHdr, "purge-6")
	w.outcome("DLQ", "dlq.*."+token+".bad.>")
	w.headgate("dlq", "drop", "--creator", who, "--yes")
	w.publish("requests."+token+".send", `{"of":"Erased.One"}`, nats.MsgIdHdr, "purge-1")
	w.publish("requests."+token+".large", `{}`, nats.MsgIdHdr, "purge-2")
	w.publish("requests."+token+".bad", `{}`, nats.MsgIdHdr, "purge-3")
	w.publish("requests."+token+".retried", `{}`, nats.MsgIdHdr, "purge-4")
	w.publish("requests.alice.send", `{}`, nats.MsgIdHdr, "kept")
	w.outcome("RESULTS", "results."+token+".large.>")
	w.outcome("RESULTS", "results."+token+".send.>")
	w.outcome("DLQ", "dlq.*."+token+".bad.>")
	w.outcome("RESULTS", "results.alice.>")
	w.headgate("limits", who, "--rate", "30/m")
	w.headgate("hold", who, "--reason", "x")
	eventually(t, "held", func() bool { return strings.Contains(w.headgate("why", who), "is held") })
	w.publish("requests."+token+".send", `{}`, nats.MsgIdHdr, "purge-5")

	if out := w.headgate("purge", "--creator", who, "--dry-run"); !strings.Contains(out, "RESULTS") || int(w.messages("DLQ")) != 1 {
		t.Errorf("dry run:\n%s", out)
	}
	if code, _, _ := program(t, "", "purge", "--creator", who, "-c", w.config, "--server", w.url); code != exitUsage {
		t.Errorf("without --yes: exit code %d", code)
	}
	w.headgate("purge", "--creator", who, "--yes")

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	names := w.js.StreamNames(ctx)
	for name := range names.Name() {
		stream, err := w.js.Stream(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		for seq := uint64(1); seq <= stream.CachedInfo().State.LastSeq; seq++ {
			m, err := stream.GetMsg(ctx, seq)
			if err != nil {
				continue // erased
			}
			all := m.Subject + fmt.Sprint(m.Header) + string(m.Data)
			for _, trace := range []string{who, token, "purge-1", "purge-2", "purge-3", "purge-4", "purge-5", "purge-6"} {
				if strings.Contains(all, trace) {
					t.Errorf("stream %s still has %s: %.300s", name, trace, all)
				}
			}
		}
	}
	if err := names.Err(); err != nil {
		t.Fatal(err)
	}
	if n := int(w.messages("RESULTS")); n != 1 {
		t.Errorf("%d results are left, want alice's", n)
	}
}

// With many creators known, 100,000 at full length, the answers come at once.
func TestManyCreators(t *testing.T) {
	creators := 2_000
	switch {
	case *long:
		creators = 100_000
	case failpoint.Enabled:
		creators = 20_000
	}
	w := newWorld(t, natsservertest.URL(t))
	// A bucket that is full again only in an hour keeps a creator known. There is enough in it for
	// calls that fail on a busy machine.
	w.change("creator: {rate: inf, concurrency: 3}", "creator: {rate: 1/h, burst: 10, concurrency: 3}")
	w.publishMany(creators, func(i int) *nats.Msg {
		return &nats.Msg{Subject: fmt.Sprintf("requests.creator-%d.send", i), Data: []byte("{}")}
	})
	defer w.worker()()
	within(t, patience, "all have results", func() bool { return int(w.messages("RESULTS")) == creators })
	for _, args := range [][]string{{"status"}, {"creators"}, {"why", "creator-5"}} {
		began := time.Now()
		w.headgate(args...)
		t.Logf("headgate %s with %d creators: %v", args[0], creators, time.Since(began).Round(time.Millisecond))
	}
	var status fleetStatus
	if err := json.Unmarshal([]byte(w.headgate("status", "-o", "json")), &status); err != nil || status.Creators < creators*99/100 {
		t.Errorf("%d creators, %v", status.Creators, err)
	}
}
