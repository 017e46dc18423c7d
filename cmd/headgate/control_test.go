package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/internal/control"
	"github.com/headgate-io/headgate/internal/natsserver/natsservertest"
	"github.com/headgate-io/headgate/resilience"
)

// holdByAPI stores a hold as a worker does.
func (w *world) holdByAPI(target control.Target, h resilience.Hold) {
	w.t.Helper()
	key, err := target.Key(control.ByAPI)
	if err != nil {
		w.t.Fatal(err)
	}
	value, err := control.EncodeHold(h)
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.holds().Put(w.t.Context(), key, value); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) holds() jetstream.KeyValue {
	w.t.Helper()
	kv, err := w.js.KeyValue(w.t.Context(), "HOLDS")
	if err != nil {
		w.t.Fatal(err)
	}
	return kv
}

func (w *world) held(key string) bool {
	_, err := w.holds().Get(w.t.Context(), key)
	return err == nil
}

// rateLimit is the hold of a Retry-After.
func rateLimit() resilience.Hold {
	return resilience.Hold{Since: time.Now(), Until: time.Now().Add(55*time.Minute + 10*time.Second), Reason: "RATE_LIMIT", Class: classify.RateLimit, Who: "w1"}
}

// A release says what the API still asks for, and ends it only by force.
func TestReleaseSaysWhatStands(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	release := func(args ...string) (code int, said string) {
		t.Helper()
		code, stdout, stderr := program(t, "", append(append([]string{"release"}, args...), "-c", w.config, "--server", w.url)...)
		return code, stdout + stderr
	}
	says := func(args string, code int, texts ...string) {
		t.Helper()
		got, said := release(strings.Fields(args)...)
		for _, text := range texts {
			if got != code || !strings.Contains(said, text) {
				t.Errorf("release %s: exit code %d, %q; want %d, %q", args, got, said, code, text)
			}
		}
	}
	for target, name := range map[control.Target]string{{Creator: "alice"}: "alice", {Kind: control.Account}: "--account", {Kind: control.Provider}: "--provider"} {
		w.holdByAPI(target, rateLimit())
		w.headgate("hold", name, "--for", "2h", "--reason", "x")
		says(name, exitPartly, "the hold by people is ended", "the API still asks for 55m", "RATE_LIMIT", "`headgate release "+name+" --force`")
		says(name, exitPartly, "is not held by people")
		says(name+" --force", exitOK, "is released")
		says(name, exitOK, "is not held")
	}
	w.holdByAPI(control.Target{Creator: "alice"}, resilience.Hold{Since: time.Now(), Reason: "SESSION_EXPIRED", Class: classify.SessionExpired})
	says("alice", exitOK, "alice is released")
	w.holdByAPI(control.Target{Kind: control.Account}, resilience.Hold{Since: time.Now(), Until: time.Now().Add(time.Hour), Reason: "BILLING", Class: classify.Billing})
	says("--account", exitOK, "the account is released")

}

// The service answers as the command does.
func TestReleaseByTheService(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	desk, err := control.OpenDesk(t.Context(), w.js, "HOLDS")
	if err != nil {
		t.Fatal(err)
	}
	answer := func(body string) string {
		t.Helper()
		var o order
		if err := json.Unmarshal([]byte(body), &o); err != nil {
			t.Fatal(err)
		}
		a, err := o.release(desk)
		if err != nil {
			return err.Error()
		}
		text, err := json.Marshal(a)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	h := rateLimit()
	w.holdByAPI(control.Target{Creator: "alice"}, h)
	if got, want := answer(`{"creator":"alice"}`), fmt.Sprintf(`{"ok":false,"until":%q,"reason":"RATE_LIMIT"}`, h.Until.UTC().Format(time.RFC3339Nano)); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	for body, want := range map[string]string{`{"creator":"alice","force":true}`: `{"ok":true}`, `{"scope":"account"}`: `{"ok":true}`, `{"scope":"world"}`: "scope:"} {
		if got := answer(body); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s, want %s", body, got, want)
		}
	}
	if w.held("creator.alice.api") {
		t.Error("force ended nothing")
	}
}

// A purge erases what people and the API hold, but for a hold of the API's that has an end:
// that one it names.
func TestPurgeKeepsTheAPIsHold(t *testing.T) {
	w := newWorld(t, natsservertest.URL(t))
	alice := control.Target{Creator: "alice"}
	w.headgate("hold", "alice", "--reason", "x")
	w.holdByAPI(alice, resilience.Hold{Since: time.Now(), Until: time.Now().Add(6 * time.Hour), Reason: "RATE_LIMIT", Class: classify.RateLimit})
	code, out, stderr := program(t, "", "purge", "--creator", "alice", "--yes", "-c", w.config, "--server", w.url)
	if code != exitPartly || !strings.Contains(stderr, "alice is erased except for the hold that the API asks for until") || !strings.Contains(out, "HOLDS") {
		t.Errorf("exit code %d: %s%s", code, out, stderr)
	}
	if w.held("creator.alice") || !w.held("creator.alice.api") {
		t.Error("people's hold is there, or the API's is not")
	}
	w.headgate("release", "alice", "--force")
	w.headgate("purge", "--creator", "alice", "--yes")
	st, err := w.js.Stream(t.Context(), "KV_HOLDS")
	if err != nil {
		t.Fatal(err)
	}
	info, err := st.Info(t.Context(), jetstream.WithSubjectFilter("$KV.HOLDS.creator.alice.>"))
	if err != nil || len(info.State.Subjects) != 0 {
		t.Errorf("%v, %v are left", info.State.Subjects, err)
	}
}
