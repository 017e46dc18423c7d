package control

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func TestParseHold(t *testing.T) {
	for name, tc := range map[string]struct {
		value string
		until time.Time
		err   string
	}{
		"duration":              {"1h", noon.Add(time.Hour), ""},
		"with spaces":           {" 90s\n", noon.Add(90 * time.Second), ""},
		"time":                  {"2026-03-02T00:00:00+01:00", noon.Add(11 * time.Hour), ""},
		"JSON":                  {`{"until":"2026-03-01T13:00:00Z","reason":"maintenance"}`, noon.Add(time.Hour), ""},
		"no end":                {`{"reason":"until I say so"}`, time.Time{}, ""},
		"only who":              {`{"who":"me"}`, time.Time{}, ""},
		"only until":            {`{"until":"2026-03-01T13:00:00Z"}`, noon.Add(time.Hour), ""},
		"negative":              {"-1h", time.Time{}, "no end in the future"},
		"garbage":               {"tomorrow", time.Time{}, "a hold is a duration"},
		"empty":                 {"", time.Time{}, "a hold is a duration"},
		"null":                  {"null", time.Time{}, "a hold is a duration"},
		"a list":                {"[]", time.Time{}, "a hold is a duration"},
		"bad JSON":              {`{"until":"tomorrow"}`, time.Time{}, "a hold's JSON"},
		"a typing error":        {`{"untill":"2026-03-01T13:00:00Z","reason":"x"}`, time.Time{}, "unknown field"},
		"two values":            {`{"reason":"x"} {"reason":"y"}`, time.Time{}, "behind the object"},
		"nothing said":          {`{}`, time.Time{}, "at least one of"},
		"nothing but since":     {`{"since":"2026-03-01T13:00:00Z","until":null,"reason":""}`, time.Time{}, "at least one of"},
		"the year 1 as JSON":    {`{"until":"0001-01-01T00:00:00Z","reason":"x"}`, time.Time{}, "no time"},
		"the year 1":            {"0001-01-01T00:00:00Z", time.Time{}, "a hold is a duration"},
		"a PubAck":              {`{"stream":"REQUESTS","seq":1}`, time.Time{}, "unknown field"},
		"a PubAck of a cluster": {`{"stream":"REQUESTS","domain":"hub","seq":1,"duplicate":true}`, time.Time{}, "unknown field"},
		"an answer of the API":  {`{"type":"io.nats.jetstream.api.v1.stream_info_response","error":{"code":404,"err_code":10059,"description":"stream not found"}}`, time.Time{}, "unknown field"},
		"an answer of a worker": {`{"creator":"alice","reason":"hold","until":"2026-03-01T13:00:00Z","parked":3}`, time.Time{}, "unknown field"},
	} {
		t.Run(name, func(t *testing.T) {
			h, err := ParseHold([]byte(tc.value), noon)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Fatalf("%+v, error %v, want %q", h, err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !h.Until.Equal(tc.until) || h.Since.IsZero() {
				t.Errorf("until %v, since %v, want until %v", h.Until, h.Since, tc.until)
			}
		})
	}
}

func TestHoldSurvivesTheBucket(t *testing.T) {
	for _, h := range []resilience.Hold{
		{Until: noon.Add(time.Hour), Since: noon, Reason: "RATE_LIMIT", Class: classify.RateLimit, Who: "w1"},
		{Since: noon, Reason: "SESSION_EXPIRED", Class: classify.SessionExpired},
		{Since: noon, Until: noon.Add(time.Second)},
	} {
		value, err := EncodeHold(h)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseHold(value, noon.Add(time.Minute))
		if err != nil || got != h {
			t.Errorf("%s became %+v, %v", value, got, err)
		}
	}
	if value, err := EncodeHold(resilience.Hold{Since: noon}); err == nil {
		t.Errorf("%s cannot be read again", value)
	}
}

// Whatever stands in the bucket: a hold without an end says who or why, and can be stored again.
func FuzzParseHold(f *testing.F) {
	for _, seed := range []string{"1h", "2026-03-02T00:00:00+01:00", `{"until":"2026-03-01T13:00:00Z"}`, `{"reason":"x"}`, `{"stream":"A","seq":1}`, "9999-12-31T23:59:59Z"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		h, err := ParseHold(value, noon)
		if err != nil {
			return
		}
		if h.Until.IsZero() && h.Reason == "" && h.Who == "" {
			t.Fatalf("%q holds without end or reason", value)
		}
		again, err := EncodeHold(h)
		if err != nil {
			t.Fatalf("%q cannot be stored again: %v", value, err)
		}
		if got, err := ParseHold(again, noon.Add(time.Hour)); err != nil || !got.Until.Equal(h.Until) {
			t.Fatalf("%q became %s: %+v, %v", value, again, got, err)
		}
	})
}

func TestParseLimits(t *testing.T) {
	read := resilience.Rate{PerSecond: 9, Burst: 9}
	usual := resilience.Limits{Rate: resilience.Rate{PerSecond: 1, Burst: 90}, Read: &read, Concurrency: 3}
	for value, want := range map[string]resilience.Limits{
		"30/m":                          {Rate: resilience.Rate{PerSecond: 0.5, Burst: 90}, Concurrency: 3},
		" inf\n":                        {Rate: resilience.Rate{Burst: 90}, Concurrency: 3},
		`{"rate":"30/m","burst":10}`:    {Rate: resilience.Rate{PerSecond: 0.5, Burst: 10}, Concurrency: 3},
		`{"concurrency":1}`:             {Rate: resilience.Rate{PerSecond: 1, Burst: 90}, Read: &read, Concurrency: 1},
		`{"burst":5, "concurrency":12}`: {Rate: resilience.Rate{PerSecond: 1, Burst: 5}, Read: &read, Concurrency: 12},
	} {
		if got, err := ParseLimits([]byte(value), usual); err != nil || got != want {
			t.Errorf("%s: %+v, %v", value, got, err)
		}
	}
	for _, value := range []string{"", "fast", "30", `{"rate":5}`, `{"rate":"5"}`, `{"brust":5}`, `{"burst":0}`, `{"concurrency":0}`, `{"burst":5} x`, "[]", `{"stream":"A","seq":1}`} {
		if got, err := ParseLimits([]byte(value), usual); err == nil {
			t.Errorf("%q: %+v", value, got)
		}
	}
}

// A key names its target and its authority, whatever the creator is called.
func TestKeys(t *testing.T) {
	seen := map[string]Target{}
	rapid.Check(t, func(t *rapid.T) {
		target := Target{Kind: Kind(rapid.IntRange(0, 2).Draw(t, "kind"))}
		if target.Kind == Creator {
			target.Creator = rapid.OneOf(rapid.SampledFrom([]string{"api", "account", "provider", ".api", "a.api", "creator", "creator.api"}), rapid.StringN(1, 20, 40)).Draw(t, "creator")
		}
		by := Authority(rapid.IntRange(0, 1).Draw(t, "by"))
		key, err := target.Key(by)
		if err != nil {
			if _, encode := publisher.EncodeToken(target.Creator); encode == nil {
				t.Fatal(err)
			}
			return
		}
		if got, authority, err := ParseKey(key); err != nil || got != target || authority != by {
			t.Fatalf("%q: %+v %v %v, want %+v %v", key, got, authority, err, target, by)
		}
		if other, taken := seen[key]; taken && other != target {
			t.Fatalf("%q is the key of %+v and %+v", key, other, target)
		}
		seen[key] = target
	})
	for _, key := range []string{"", "api", ".api", "creator", "creator.", "accounts", "account.x", "account.api.api", "creator.a.b", "creator.a.api.api", "worker.x"} {
		if got, by, err := ParseKey(key); err == nil {
			t.Errorf("%q: %+v %v", key, got, by)
		}
	}
}

func TestLater(t *testing.T) {
	short, long, end, over := resilience.Hold{Until: noon.Add(1)}, resilience.Hold{Until: noon.Add(2)}, resilience.Hold{}, resilience.Hold{Until: noon}
	for _, tc := range []struct{ a, b, want *resilience.Hold }{
		{nil, nil, nil}, {&short, nil, &short}, {nil, &short, &short}, {&short, &long, &long}, {&long, &short, &long},
		{&end, &long, &end}, {&long, &end, &end}, {&over, nil, nil}, {&over, &over, nil}, {&over, &short, &short}, {&short, &over, &short},
	} {
		if got := Later(noon, tc.a, tc.b); got != tc.want {
			t.Errorf("of %v and %v counts %v, want %v", tc.a, tc.b, got, tc.want)
		}
	}
}
