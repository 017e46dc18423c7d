package classify

import (
	"testing"
	"time"
)

// TestRetryAfterPlaces: whatever place it stands in, and the longest of several.
func TestRetryAfterPlaces(t *testing.T) {
	p, err := Parse("places.yaml", []byte(`
body: {retry_after: [retryAfter, error.retry_after], retry_after_ms: wait_ms}
headers: {retry_after: X-Wait, remaining: X-Left, reset: X-Again}
`))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		headers []string
		body    string
		want    time.Duration
		assumed bool
	}{
		"nothing":                 {want: time.Minute, assumed: true},
		"garbage":                 {headers: []string{"Retry-After: soon", "X-Wait: -1"}, body: `{"retryAfter":null}`, want: time.Minute, assumed: true},
		"at once":                 {headers: []string{"Retry-After: 0"}},
		"Retry-After":             {headers: []string{"Retry-After: 5"}, want: 5 * time.Second},
		"milliseconds":            {headers: []string{"retry-after-ms: 1500.5"}, want: 1500500 * time.Microsecond},
		"X-RateLimit-Retry-After": {headers: []string{"X-RateLimit-Retry-After: 7"}, want: 7 * time.Second},
		"own header":              {headers: []string{"X-Wait: 8"}, want: 8 * time.Second},
		"body":                    {body: `{"retryAfter":9}`, want: 9 * time.Second},
		"body, deeper":            {body: `{"error":{"retry_after":"1.5"}}`, want: 1500 * time.Millisecond},
		"body, a time":            {body: `{"retryAfter":"2026-03-01T12:00:10Z"}`, want: 10 * time.Second},
		"body, milliseconds":      {body: `{"wait_ms":250}`, want: 250 * time.Millisecond},
		"body, milliseconds text": {body: `{"wait_ms":"250"}`, want: 250 * time.Millisecond},
		"the longest":             {headers: []string{"Retry-After: 5", "Retry-After: 20", "retry-after-ms: 9000"}, body: `{"retryAfter":9}`, want: 20 * time.Second},
		"the longest is a window": {headers: []string{"Retry-After: 5", "X-RateLimit-Remaining: 0", "X-RateLimit-Reset: 30"}, want: 30 * time.Second},
		"own window":              {headers: []string{"X-Left: 0", "X-Again: 40"}, want: 40 * time.Second},
		"own window, calls left":  {headers: []string{"X-Left: 1", "X-Again: 40"}, want: time.Minute, assumed: true},
		"two windows":             {headers: []string{"X-RateLimit-Remaining: 9", "X-RateLimit-Reset: 30", "RateLimit-Remaining: 0", "RateLimit-Reset: 3"}, want: 3 * time.Second},
		"Unix milliseconds":       {headers: []string{"X-Rate-Limit-Remaining: 0", "X-Rate-Limit-Reset: 1772366405000"}, want: 5 * time.Second},
		"RateLimit":               {headers: []string{`RateLimit: "default";r=0;t=30`}, want: 30 * time.Second},
		"RateLimit, two policies": {headers: []string{`RateLimit: "burst";r=0;t=2, "daily";r=5;t=3600`}, want: 2 * time.Second},
		"RateLimit, odd name":     {headers: []string{`RateLimit: "a;r=1,\"b";r=0;t=4`}, want: 4 * time.Second},
		"RateLimit, older":        {headers: []string{"RateLimit: limit=100, remaining=0, reset=50"}, want: 50 * time.Second},
		"RateLimit, older, left":  {headers: []string{"RateLimit: limit=100, remaining=2, reset=50"}, want: time.Minute, assumed: true},
		"RateLimit, no time":      {headers: []string{`RateLimit: "default";r=0`}, want: time.Minute, assumed: true},
	} {
		f, failed := p.Classify(Answer{Status: 429, Header: headers(c.headers...), Body: []byte(c.body)}, noon)
		if !failed || !f.RetryAfterKnown || f.RetryAfter != c.want || f.RetryAfterAssumed != c.assumed {
			t.Errorf("%s: %v, known %v, assumed %v, want %v, %v", name, f.RetryAfter, f.RetryAfterKnown, f.RetryAfterAssumed, c.want, c.assumed)
		}
	}
}

// TestWindowOnlyIfRefused: that a window is used up says nothing about when a
// broken server is well again.
func TestWindowOnlyIfRefused(t *testing.T) {
	f, _ := profileOf(t, "generic").Classify(Answer{
		Status: 500, Header: headers("X-RateLimit-Remaining: 0", "X-RateLimit-Reset: 3600"),
	}, noon)
	if f.RetryAfterKnown {
		t.Errorf("after %v, want unknown", f.RetryAfter)
	}
}

func TestHints(t *testing.T) {
	for name, c := range map[string]struct {
		headers []string
		want    Hints
	}{
		"nothing":           {},
		"calls left":        {headers: []string{"X-RateLimit-Remaining: 3", "X-RateLimit-Reset: 60"}},
		"none left":         {headers: []string{"X-RateLimit-Remaining: 0", "X-RateLimit-Reset: 60"}, want: Hints{Exhausted: true, HoldFor: time.Minute}},
		"no word of calls":  {headers: []string{"X-RateLimit-Reset: 60"}},
		"until when?":       {headers: []string{"X-RateLimit-Remaining: 0"}},
		"until just now":    {headers: []string{"X-RateLimit-Remaining: 0", "X-RateLimit-Reset: 1772366400"}},
		"the draft":         {headers: []string{`RateLimit: "default";r=0;t=30`}, want: Hints{Exhausted: true, HoldFor: 30 * time.Second}},
		"not a hint":        {headers: []string{"Retry-After: 30"}},
		"slots":             {headers: []string{"X-Concurrent-Threads: 10", "X-Concurrent-Threads-Active: 3"}, want: Hints{ConcurrencyLimit: 10, ConcurrencyActive: 3}},
		"slots, garbage":    {headers: []string{"X-Concurrent-Threads: -1", "X-Concurrent-Threads-Active: 1e9"}},
		"credits":           {headers: []string{"X-AF-Credits-Cost: 2.5"}, want: Hints{Credits: 2.5}},
		"credits, infinite": {headers: []string{"X-AF-Credits-Cost: Inf"}},
		"credits, not one":  {headers: []string{"X-AF-Credits-Cost: NaN"}},
		"credits, back":     {headers: []string{"X-AF-Credits-Cost: -2"}},
	} {
		if got := profileOf(t, "apifreaks").Hints(headers(c.headers...), noon); got != c.want {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
	if got := profileOf(t, "generic").Hints(headers("X-AF-Credits-Cost: 2", "X-Concurrent-Threads: 3"), noon); got != (Hints{}) {
		t.Errorf("another profile's headers: %+v", got)
	}
}
