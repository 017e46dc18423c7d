package publisher

import (
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"pgregory.net/rapid"
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
		"\x00":                   "=00",
		strings.Repeat("a", 128): strings.Repeat("a", 128),
	} {
		if got, err := EncodeToken(name); err != nil || got != want {
			t.Errorf("EncodeToken(%q) = %q, %v, want %q", name, got, err, want)
		}
	}
	for _, name := range []string{"", "*", ">", strings.Repeat("a", 129), strings.Repeat(".", 43)} {
		if got, err := EncodeToken(name); err == nil {
			t.Errorf("EncodeToken(%q) = %q, want an error", name, got)
		}
	}
	// One name has one token: everything else is refused.
	for _, token := range []string{"", "=", "=2", "=2e", "=61", "a.b", "*", "=2A", "=3E", "=zz", "a\x00", strings.Repeat("a", 129)} {
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
			t.Fatal(err)
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
	f.Fuzz(func(t *testing.T, subject, id, deadline string) {
		h := nats.Header{nats.MsgIdHdr: {id}, HeaderDeadline: {deadline}}
		r, err := ParseRequest("", subject, h, nil, "7-9")
		if r.ID == "" {
			t.Fatal("a request without an id")
		}
		if err != nil {
			return
		}
		if _, err := Namespace("").RequestSubject(r.Creator, r.Operation); err != nil {
			t.Fatalf("what was read cannot be published again: %v", err)
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
	for subject, complaint := range map[string]string{
		"requests.3.alice":                             "must be requests.<creator>.<operation>",
		"requests.3.a.b.c":                             "must be requests.<creator>.<operation>",
		"requests.3.*.top":                             "byte 0 must be one of",
		"requests.3.alice.\x1b[31m":                    "byte 0 must be one of",
		"requests.3.=FF.top":                           "must be UTF-8",
		"requests.3.alice." + strings.Repeat("x", 200): "must have 1 to 128 bytes",
	} {
		r, err := ParseRequest("", subject, nil, nil, "7-9")
		if err == nil || !strings.Contains(err.Error(), complaint) || r.ID != "7-9" {
			t.Errorf("%q: got %v, want %q", subject, err, complaint)
		}
	}
	_, err = ParseRequest("", "requests.3.alice.top", nats.Header{HeaderDeadline: {"tomorrow"}}, nil, "7-9")
	if err == nil || !strings.Contains(err.Error(), "RFC 3339") {
		t.Errorf("a deadline that is none: %v", err)
	}
}
