package classify

import (
	"bytes"
	"runtime"
	"strings"
	"testing"
)

func BenchmarkClassify(b *testing.B) {
	success := []byte(`{"list":[` + strings.Repeat(`{"id":123456789,"name":"somebody","note":"a\nb"},`, 200) + `{}],"status":"ADMITTED"}`)
	for _, c := range []struct {
		name, profile string
		a             Answer
	}{
		{"Failure", "ofauth", Answer{Status: 401, Header: headers("Content-Type: application/json", "Date: Sun, 01 Mar 2026 12:00:00 GMT"),
			Body: []byte(`{"error":"The session of this connection has expired","type":"SESSION_EXPIRED","requestId":"req_abc123","actionRequired":"relink_connection"}`)}},
		{"FailureLastRule", "ofauth-legacy", Answer{Status: 401, Body: []byte(`{"error":"no","code":"RULES_INVALID_SIGNATURE","details":{"field":"x"}}`)}},
		{"RateLimit", "fanfare", Answer{Status: 429, Header: headers("Retry-After: Sun, 01 Mar 2026 12:00:30 GMT", "Date: Sun, 01 Mar 2026 12:00:00 GMT", "X-RateLimit-Remaining: 0", "X-RateLimit-Reset: 1772366430"),
			Body: []byte(`{"error":"Too many requests","retryAfter":30}`)}},
		{"HTML", "generic", Answer{Status: 502, Body: []byte("<html><head><title>502 Bad Gateway</title></head></html>")}},
		{"Success", "ofauth", Answer{Status: 200, Header: headers("Content-Type: application/json"), Body: success}},
		{"SuccessThatMayFail10kB", "fanfare", Answer{Status: 200, Header: headers("Content-Type: application/json"), Body: success}},
	} {
		p := profileOf(b, c.profile)
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p.Classify(c.a, noon)
			}
		})
	}
}

func BenchmarkHints(b *testing.B) {
	p := profileOf(b, "apifreaks")
	for name, h := range map[string][]string{
		"None": {"Content-Type: application/json", "Date: Sun, 01 Mar 2026 12:00:00 GMT", "Content-Length: 17"},
		"All":  {"X-RateLimit-Remaining: 0", "X-RateLimit-Reset: 60", "X-AF-Credits-Cost: 1", "X-Concurrent-Threads: 5", "X-Concurrent-Threads-Active: 2"},
	} {
		header := headers(h...)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p.Hints(header, noon)
			}
		})
	}
}

// TestAllocates: never more than the capped body, whatever is in it.
func TestAllocates(t *testing.T) {
	const size = 1 << 20
	grow := func(unit string) []byte {
		return []byte(`{"type":"X","list":[` + strings.Repeat(unit+",", size/(len(unit)+1)) + `1],"error":"` + strings.Repeat(`\u00e9`, 100) + `"}`)
	}
	for name, body := range map[string][]byte{
		"fields":     []byte(`{` + strings.Repeat(`"a":1,`, size/6) + `"type":"X"}`),
		"a code":     []byte(`{"type":"` + strings.Repeat("x", size) + `"}`),
		"escapes":    []byte(`{"type":"` + strings.Repeat(`\u0000`, size/6) + `","error":"` + strings.Repeat(`\n`, size/2) + `"}`),
		"invalid":    []byte(`{"type":"` + strings.Repeat("\xff", size) + `"}`),
		"deep":       bytes.Repeat([]byte(`{"type":`), size/8),
		"list":       grow(`{"type":1}`),
		"not closed": []byte(`{"type":"` + strings.Repeat("x", size)),
		"number":     []byte(`{"type":` + strings.Repeat("9", size) + `,"retryAfter":` + strings.Repeat("9", size) + `}`),
	} {
		for _, profile := range Builtins() {
			p := profileOf(t, profile)
			a := Answer{Status: 401, Body: body}
			p.Classify(a, noon)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			p.Classify(a, noon)
			runtime.ReadMemStats(&after)
			if n := after.TotalAlloc - before.TotalAlloc; n > size {
				t.Errorf("%s by %s: %d bytes for a body of %d", name, profile, n, len(body))
			}
		}
	}
}
