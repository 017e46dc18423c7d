package publisher

import (
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"pgregory.net/rapid"

	"github.com/headgate-io/headgate/classify"
)

func TestTokens(t *testing.T) {
	for name, want := range map[string]string{
		"alice":                  "alice",
		"mia_wolf-2":             "mia_wolf-2",
		"a.b":                    "a=2Eb",
		"**":                     "=2A=2A",
		"=":                      "=3D",
		"a b":                    "a=20b",
		"é":                      "=C3=A9",
		"a\u00a0":                "a=C2=A0", // HTTP leaves it alone
		strings.Repeat("a", 128): strings.Repeat("a", 128),
	} {
		if got, err := EncodeToken(name); err != nil || got != want {
			t.Errorf("EncodeToken(%q) = %q, %v, want %q", name, got, err, want)
		}
	}
	// HTTP trims blanks, and has no control bytes: alice and what it would make alice are not two.
	refused := []string{"", "*", ">", " ", "\t \t", " alice", "alice ", "\talice", "alice\t", "a\x00b", "a\nb", "a\x7fb", "a\x1b[31m", "\xff"}
	for _, name := range append(refused, strings.Repeat("a", 129), strings.Repeat(".", 43)) {
		if got, err := EncodeToken(name); err == nil {
			t.Errorf("EncodeToken(%q) = %q, want an error", name, got)
		}
	}
	// One name has one token: everything else is refused.
	for _, token := range []string{"", "=", "=2", "=2e", "=61", "a.b", "*", "=2A", "=3E", "=zz", "a\x00", strings.Repeat("a", 129),
		"=20", "=09", "alice=20", "=20alice", "alice=09", "a=00b", "a=7Fb", "=FF"} {
		if got, err := DecodeToken(token); err == nil {
			t.Errorf("DecodeToken(%q) = %q, want an error", token, got)
		}
	}
}

func TestTokensAreReversible(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name := string(rapid.SliceOfN(rapid.Byte(), 2, 42).Draw(t, "name"))
		token, err := EncodeToken(name)
		if err != nil {
			if checkName(name) == nil && len(name) <= maxToken/3 {
				t.Fatal(err)
			}
			return
		}
		if strings.ContainsAny(token, ".*> \t\r\n") {
			t.Fatalf("%q is not one token", token)
		}
		back, err := DecodeToken(token)
		if err != nil || back != name {
			t.Fatalf("%q → %q → %q, %v", name, token, back, err)
		}
	})
}

func FuzzDecodeToken(f *testing.F) {
	f.Add("alice")
	f.Add("=2A")
	f.Fuzz(func(t *testing.T, token string) {
		name, err := DecodeToken(token)
		if err != nil {
			return
		}
		if back, err := EncodeToken(name); err != nil || back != token {
			t.Fatalf("%q names %q, whose token is %q, %v", token, name, back, err)
		}
	})
}

func TestIDToken(t *testing.T) {
	if got := IDToken("hook:42"); got != "hook=3A42" {
		t.Errorf("got %q", got)
	}
	long := IDToken(strings.Repeat(":", 100))
	if len(long) != 64 || long == IDToken(strings.Repeat(":", 101)) {
		t.Errorf("a long id's token is its hash, got %q", long)
	}
}

func FuzzParseRequest(f *testing.F) {
	f.Add("requests.3.alice.top", "id", "2026-01-02T03:04:05Z")
	f.Add("requests.3.a.b.c", "", "")
	f.Add("requests.3.=2A.top", "a\nb", "soon")
	f.Add("requests.alice.*", "~1-7-9", "0001-01-01T00:00:00Z")
	f.Fuzz(func(t *testing.T, subject, id, deadline string) {
		h := nats.Header{nats.MsgIdHdr: {id}, HeaderDeadline: {deadline}}
		r, err := ParseRequest("", subject, h, nil, "7-9")
		if r.ID != id && r.ID != "~7-9" || r.ID != oneLine(r.ID, maxHeader) {
			t.Fatalf("id %q is %q", id, r.ID)
		}
		result, errResult := Namespace("").ResultSubject(r.Creator, r.Operation, r.ID)
		letter, errLetter := Namespace("").DeadLetterSubject(classify.MalformedRequest, r.Creator, r.Operation, r.ID)
		if errResult != nil || errLetter != nil {
			t.Fatalf("it can have no outcome: %v, %v", errResult, errLetter)
		}
		_, creator, operation, token, errParse := Namespace("").ParseDeadLetter(letter)
		if errParse != nil || creator != r.Creator || operation != r.Operation || token != IDToken(r.ID) || !strings.HasSuffix(result, "."+token) {
			t.Fatalf("%+v: its letter %s says %q, %q, %q, %v", r, letter, creator, operation, token, errParse)
		}
		if err != nil {
			return
		}
		if _, err := Namespace("").RequestSubject(r.Creator, r.Operation); err != nil {
			t.Fatalf("what was read cannot be published again: %v", err)
		}
		if deadline != "" && r.Deadline.IsZero() {
			t.Fatalf("deadline %q is none", deadline)
		}
	})
}

func TestParseRequest(t *testing.T) {
	r, err := ParseRequest("of", "of.requests.3.a=2Eb.top", nats.Header{
		nats.MsgIdHdr: {"hook:1"}, HeaderCorrelationID: {"c\n1"}, HeaderTraceparent: {"00-1"}, HeaderDeadline: {"2026-01-02T03:04:05Z"},
	}, []byte("x"), "7-9")
	if err != nil || r.Creator != "a.b" || r.Operation != "top" || r.ID != "hook:1" || r.CorrelationID != "c 1" || r.Deadline.Unix() != 1767323045 {
		t.Errorf("got %+v, %v", r, err)
	}
	for subject, c := range map[string]struct{ creator, operation, complaint string }{
		"requests.3.alice":                             {"3", "alice", "must be requests.<creator>.<operation>"},
		"requests.3.a.b.c":                             {"", "", "must be requests.<creator>.<operation>"},
		"requests.3.*.top":                             {"", "top", "byte 0 must be one of"},
		"requests.3.alice.\x1b[31m":                    {"alice", "", "byte 0 must be one of"},
		"requests.3.=FF.top":                           {"", "top", "must be UTF-8"},
		"requests.3.alice." + strings.Repeat("x", 200): {"alice", "", "must have 1 to 128 bytes"},
		// Stored without a partition, since the server's transform wants a literal subject.
		"requests.*.top":          {"", "top", "without wildcards"},
		"requests.alice.*":        {"alice", "", "without wildcards"},
		"requests.alice.>":        {"alice", "", "without wildcards"},
		"requests.>.top":          {"", "top", "without wildcards"},
		"requests.*.*":            {"", "", "without wildcards"},
		"requests.3.a\x7fb.op":    {"", "op", "byte 1 must be one of"},
		"requests.3.alice=20.top": {"", "top", "must not begin or end with a blank"},
		"requests.3.=20.top":      {"", "top", "must not begin or end with a blank"},
		"requests.3.alice.=09":    {"alice", "", "must not begin or end with a blank"},
		"requests.3.a=00b.top":    {"", "top", "control bytes"},
		"requests.3.a=7Fb.top":    {"", "top", "control bytes"},
	} {
		r, err := ParseRequest("", subject, nil, nil, "7-9")
		if err == nil || !strings.Contains(err.Error(), c.complaint) || r.ID != "~7-9" || r.Creator != c.creator || r.Operation != c.operation {
			t.Errorf("%q: got %+v, %v, want %+v", subject, r, err, c)
		}
	}
	_, err = ParseRequest("", "requests.3.alice.top", nats.Header{HeaderDeadline: {"tomorrow"}}, nil, "7-9")
	if err == nil || !strings.Contains(err.Error(), "RFC 3339") {
		t.Errorf("a deadline that is none: %v", err)
	}
}

// An id is the same in subject, header and key, or it counts as none. No client can take the
// place of a request without one.
func TestIDs(t *testing.T) {
	long := strings.Repeat("x", maxHeader)
	for id, want := range map[string]string{
		"hook:1": "hook:1", "é": "é", "a b": "a b", "*": "*", ">": ">", long: long, "x~r1": "x~r1",
		"": "~7-9", "dup\x01": "~7-9", "a\tb": "~7-9", "a\x7fb": "~7-9", "a\x00b": "~7-9", "tail ": "~7-9", " head": "~7-9", "tail\u00a0": "~7-9",
		"a\nb": "~7-9", "\xff": "~7-9", long + "x": "~7-9", "~7-9": "~7-9", "~7-8": "~7-9", "7-9": "7-9",
	} {
		r, err := ParseRequest("", "requests.3.alice.top", nats.Header{nats.MsgIdHdr: {id}}, nil, "7-9")
		if err != nil || r.ID != want {
			t.Errorf("%q: got %q, %v, want %q", clip(id, 40), clip(r.ID, 40), err, clip(want, 40))
		}
		if valid := id == want && id != "~7-9"; validID(id) != valid {
			t.Errorf("%q: the publisher may use it: %v", clip(id, 40), !valid)
		}
	}
}

// What a request says about its body, or about replays, is not a client's to say.
func TestForgedHeaders(t *testing.T) {
	h := nats.Header{
		nats.MsgIdHdr: {"hook:1"}, HeaderBodyBucket: {"PAYROLL"}, HeaderBodyObject: {"salaries"}, HeaderBodyContentType: {"a/b"},
		HeaderReplay: {"99"}, HeaderReplayedClass: {"POISON"}, "Ours": {"1"},
	}
	r, err := ParseRequest("", "requests.3.alice.top", h, nil, "7-9")
	if err != nil || len(r.Header) != 2 || r.Header.Get("Ours") != "1" {
		t.Errorf("got %v, %v", r.Header, err)
	}
	if len(h) != 7 {
		t.Errorf("the message was changed: %v", h)
	}
	h[nats.MsgIdHdr] = []string{"hook:1~r2"}
	if r, err = ParseRequest("", "requests.3.alice.top", h, nil, "7-9"); err != nil || r.Header.Get(HeaderReplay) != "99" || r.Header.Get(HeaderBodyObject) != "" {
		t.Errorf("a replay: got %v, %v", r.Header, err)
	}
}

// The zero time is an instant like any other: long over.
func TestFirstDeadline(t *testing.T) {
	for _, deadline := range []string{"0001-01-01T00:00:00Z", "0001-01-01T01:00:00+01:00"} {
		r, err := ParseRequest("", "requests.3.alice.top", nats.Header{HeaderDeadline: {deadline}}, nil, "7-9")
		if err != nil || r.Deadline.IsZero() || !r.Deadline.Before(time.Now()) {
			t.Errorf("%s: got %v, %v", deadline, r.Deadline, err)
		}
	}
}

func TestReplayIDs(t *testing.T) {
	long := strings.Repeat("x", maxHeader)
	for id, want := range map[string]string{
		"hook:1": "hook:1~r3", "hook:1~r2": "hook:1~r3", "hook:1~rx": "hook:1~rx~r3", "~r2": "noid:r2~r3", "hook:1~r-2": "hook:1~r-2~r3",
		"~1767-9": "noid:1767-9~r3", "noid:1767-9~r1": "noid:1767-9~r3", long: IDToken(long) + "~r3", IDToken(long) + "~r1": IDToken(long) + "~r3",
		long[:maxHeader-3]: long[:maxHeader-3] + "~r3",
	} {
		if got := replayID(id, 3); got != want || !validID(got) || Replays(got) != 3 {
			t.Errorf("%q: got %q, want %q", clip(id, 40), clip(got, 80), clip(want, 80))
		}
	}
}
