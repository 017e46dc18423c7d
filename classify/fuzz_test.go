package classify

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func FuzzRetryAfter(f *testing.F) {
	for _, s := range []string{
		"5", "1.5", "-1", "NaN", "1e3", "Sun, 01 Mar 2026 12:00:30 GMT", "Sunday, 01-Mar-26 12:00:30 GMT", "Sun Mar  1 12:00:30 2026",
		"2026-03-01T12:00:30.5+01:00", "2026-03-01T12:00:60Z", "1772366430", "1772366430000", "5, Sun, 01 Mar 2026 12:00:30 GMT", ",", "",
		"120 seconds", "1h30m", "+120", `"120"`, "1,000", "@1772366430", "Sun, 1 Mar 26 12:00:30 -0000", "2026-03-01 12:00:30 +0000 UTC", "Sun Mar  1 12:00:30 UTC 2026",
		"Sun Mar 01 2026 12:00:30 GMT+0000 (Coordinated Universal Time)", "2026-03-01T12:00:30.5", "Sunday, 01-Mar-2026 12:00:30 UTC",
		`"default";r=0;t=30`, "limit=1, remaining=0, reset=5", `"a;\",b";r=0;t=1`, "99999999999999999999.99999",
	} {
		f.Add(s, "Sun, 01 Mar 2026 12:00:00 GMT", noon.Unix())
	}
	f.Fuzz(func(t *testing.T, s, date string, unix int64) {
		c := clock{now: time.Unix(unix, 0), header: http.Header{"Date": {date}}}
		check := func(what string, d time.Duration, ok bool) {
			if d < 0 || !ok && d != 0 {
				t.Errorf("%s(%q) = %v, %v", what, s, d, ok)
			}
		}
		d, ok := c.wait(s)
		check("wait", d, ok)
		d, ok = c.in(time.Millisecond, s)
		check("in ms", d, ok)
		if raw, err := json.Marshal(s); err == nil {
			d, ok = c.value(time.Second, raw)
			check("value", d, ok)
		}
		for _, refused := range []bool{true, false} {
			d, ok = parseRateLimit(s, c, refused)
			check("parseRateLimit", d, ok)
		}
		d, ok = parseDecimal(s, time.Second)
		check("parseDecimal", d, ok)
		d, ok = parseNumber(s, time.Millisecond)
		check("parseNumber", d, ok)
	})
}

// FuzzDate compares with package time: what it reads in the standard forms is read alike.
func FuzzDate(f *testing.F) {
	for _, s := range []string{
		"Sun, 01 Mar 2026 12:00:30 GMT", "Sunday, 01-Mar-26 12:00:30 GMT", "Sun Mar  1 12:00:30 2026", "2026-03-01T12:00:30.5+01:00", "2026-02-29T00:00:00Z",
	} {
		f.Add(s, noon.Unix())
	}
	f.Fuzz(func(t *testing.T, s string, unix int64) {
		now := time.Unix(unix%1e11, 0)
		got, ok := parseDate(s, now)
		if ok && (got.Year() < -1 || got.Year() > 10000) {
			t.Fatalf("%q: %v", s, got)
		}
		for _, layout := range []string{"Mon, 02 Jan 2006 15:04:05 GMT", time.ANSIC, time.RFC3339} {
			want, err := time.Parse(layout, s)
			if err != nil || len(s) > 100 || layout == time.RFC3339 && (strings.ContainsAny(s, "\t,") || s[13] != ':') {
				continue // RFC 3339 itself is stricter
			}
			if !ok || !got.Equal(want) {
				t.Fatalf("%q as %s: %v, %v, want %v", s, layout, got, ok, want)
			}
		}
	})
}

// FuzzBody compares with encoding/json.
func FuzzBody(f *testing.F) {
	for _, s := range []string{
		`{"a":"b"}`, `{"a":{"b":"c"}}`, `{"a":[1,{"b":"\ud83d\ude00\ud83d"}]}`, `{"a":"x","a":null}`, " {\"\\u0061\" : -1e5 } ", `{"a":"\"\\\/\b\f\n\r\t"}`,
		"{\"a\":\"\xff\"}", "{\"a\":\"\xf0\xf0\"}", `{"a":[[{"b":1}],{"b":null},{"b":2}]}`, `[]`, `{`, `{"a":true,"b":"` + strings.Repeat("é", 200) + `"}`,
	} {
		f.Add([]byte(s), "a", "b")
	}
	f.Fuzz(func(t *testing.T, body []byte, outer, inner string) {
		o := readObject(body)
		var want map[string]json.RawMessage
		if err := json.Unmarshal(bytes.TrimPrefix(body, bom), &want); (o != nil) != (err == nil && want != nil) {
			t.Fatalf("readObject(%q) = %q, encoding/json: %v", body, o, err)
		}
		if o == nil {
			return
		}
		raw := o.find(path{outer})
		if w := want[outer]; utf8.ValidString(outer) && utf8.Valid(body) && !bytes.Equal(raw, w) && string(w) != "null" {
			t.Fatalf("find(%q) in %q = %q, want %q", outer, body, raw, w)
		}
		var s string
		if json.Unmarshal(raw, &s) != nil {
			s = ""
		}
		if got := text(raw, 1<<20); got != s {
			t.Fatalf("text(%q) = %q, want %q", raw, got, s)
		}
		cut := text(raw, 10)
		if len(cut) > 10 || !utf8.ValidString(cut) || !strings.HasPrefix(s, cut) || len(s) > 13 && len(cut) < 7 {
			t.Fatalf("text(%q, 10) = %q of %q", raw, cut, s)
		}
		if raw = o.find(path{outer, inner}); raw != nil && !json.Valid(raw) {
			t.Fatalf("find(%q, %q) in %q = %q", outer, inner, body, raw)
		}
		number(raw)
		scalar(raw, 10)
	})
}

func FuzzClassify(f *testing.F) {
	f.Add("ofauth", 401, []byte(`{"type":"SESSION_EXPIRED","requestId":"r"}`), "Retry-After", "5", "", "", false, false)
	f.Add("fanfare", 200, []byte(`{"status":"DENIED"}`), "X-RateLimit-Remaining", "0", "X-RateLimit-Reset", "1772366430", false, false)
	f.Add("apifreaks", 429, []byte(`{"message":"slow down"}`), "X-Concurrent-Threads", "1", "X-Concurrent-Threads-Active", "1", false, false)
	f.Add("generic", 503, []byte(`{"retryable":true,"retryAfterSec":1e9}`), "RateLimit", `"d";r=0;t=1`, "Date", "x", true, false)
	f.Add("ofauth-legacy", 0, []byte(nil), "", "", "", "", false, true)
	f.Add("ofapi", 999, []byte("<html>"), "retry-after-ms", "1", "Retry-After", "-", false, true)
	f.Fuzz(func(t *testing.T, name string, status int, body []byte, h1, v1, h2, v2 string, cut, broken bool) {
		p, ok := Builtin(name)
		if !ok {
			names := Builtins()
			p, _ = Builtin(names[(len(name)+len(body))%len(names)])
		}
		a := Answer{Status: status, Body: body, Header: http.Header{}, Truncated: cut}
		a.Header.Add(h1, v1)
		a.Header.Add(h2, v2)
		if broken {
			a.Err = errors.New(v1)
		}
		before := slices.Clone(body)
		got, failed := p.Classify(a, noon)
		again, _ := p.Classify(a, noon)
		if got != again {
			t.Fatalf("not the same twice: %+v, %+v", got, again)
		}
		if !bytes.Equal(before, body) {
			t.Fatal("the body was written to")
		}
		if !failed && (status < 200 || status > 299 || cut || broken) || failed && got.Rule == "" {
			t.Fatalf("failed %v by %q", failed, got.Rule)
		}
		if failed && (!slices.Contains(ruleClasses, got.Class) || !slices.Contains(scopes, got.Scope)) {
			t.Fatalf("class %q, scope %q", got.Class, got.Scope)
		}
		if got.RetryAfter < 0 || !got.RetryAfterKnown && got.RetryAfter != 0 || got.RetryAfterAssumed && got.RetryAfter != time.Minute {
			t.Fatalf("retry after %v, known %v, assumed %v", got.RetryAfter, got.RetryAfterKnown, got.RetryAfterAssumed)
		}
		for _, s := range []string{got.Code, got.RequestID, got.Action, got.Field} {
			if len(s) > maxID || !utf8.ValidString(s) {
				t.Fatalf("%q", s)
			}
		}
		if len(got.Message) > maxMessage || !utf8.ValidString(got.Message) {
			t.Fatalf("%q", got.Message)
		}
		if h := p.Hints(a.Header, noon); h.HoldFor < 0 || h.Exhausted != (h.HoldFor > 0) || h.ConcurrencyLimit < 0 || h.ConcurrencyActive < 0 || !(h.Credits >= 0) {
			t.Fatalf("%+v", h)
		}
	})
}

func FuzzParse(f *testing.F) {
	for _, name := range Builtins() {
		data, err := profileFiles.ReadFile("profiles/" + name + ".yaml")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("rules: [{status: any, code: A*, class: GONE}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse("f.yaml", data)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "f.yaml:") {
				t.Fatalf("no file in %q", err)
			}
			return
		}
		for _, status := range []int{0, 100, 200, 404, 500} {
			p.Classify(Answer{Status: status, Body: []byte(`{"status":"DENIED"}`)}, noon)
		}
	})
}
