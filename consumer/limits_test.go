package consumer

import (
	"testing"

	"github.com/headgate-io/headgate/resilience"
)

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
		if got, err := parseLimits([]byte(value), usual); err != nil || got != want {
			t.Errorf("%s: %+v, %v", value, got, err)
		}
	}
	for _, value := range []string{"", "fast", "30", `{"rate":5}`, `{"rate":"5"}`, `{"brust":5}`, `{"burst":0}`, `{"concurrency":0}`, `{"burst":5} x`, "[]"} {
		if got, err := parseLimits([]byte(value), usual); err == nil {
			t.Errorf("%q: %+v", value, got)
		}
	}
}
