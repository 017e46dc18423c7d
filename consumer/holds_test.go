package consumer

import (
	"strings"
	"testing"
	"time"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/resilience"
)

func TestParseHold(t *testing.T) {
	for name, tc := range map[string]struct {
		value string
		until time.Time
		err   string
	}{
		"duration":    {"1h", noon.Add(time.Hour), ""},
		"with spaces": {" 90s\n", noon.Add(90 * time.Second), ""},
		"time":        {"2026-03-02T00:00:00+01:00", noon.Add(11 * time.Hour), ""},
		"JSON":        {`{"until":"2026-03-01T13:00:00Z","reason":"maintenance"}`, noon.Add(time.Hour), ""},
		"no end":      {`{"reason":"until I say so"}`, time.Time{}, ""},
		"negative":    {"-1h", time.Time{}, "no end in the future"},
		"garbage":     {"tomorrow", time.Time{}, "a hold is a duration"},
		"empty":       {"", time.Time{}, "a hold is a duration"},
		"bad JSON":    {`{"until":"tomorrow"}`, time.Time{}, "a hold's JSON"},
	} {
		t.Run(name, func(t *testing.T) {
			h, err := parseHold([]byte(tc.value), noon)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Fatalf("error %v, want %q", err, tc.err)
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
	} {
		value, err := EncodeHold(h)
		if err != nil {
			t.Fatal(err)
		}
		got, err := parseHold(value, noon.Add(time.Minute))
		if err != nil || got != h {
			t.Errorf("%s became %+v, %v", value, got, err)
		}
	}
}
