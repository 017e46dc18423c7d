package telemetry

import (
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/headgate-io/headgate/consumer"
)

func TestMetrics(t *testing.T) {
	m := NewMetrics()
	m.Watch(func() consumer.Snapshot {
		return consumer.Snapshot{Partitions: 3, Parked: 7, Breakers: map[string]int{"open": 2}, Held: map[string]int{"RATE_LIMIT": 4}, Account: true, Backlog: 9, Oldest: 90 * time.Second}
	})
	m.Called("top", "", 200, 20*time.Millisecond, false)
	m.Called("top", "RATE_LIMIT", 429, 10*time.Millisecond, true)
	m.Retried("RATE_LIMIT")
	m.Settled("", 2)
	m.Settled("VALIDATION", 1)

	problems, err := testutil.GatherAndLint(m.Registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	want := `# HELP headgate_api_calls_inside_hold_total Calls that began although their creator was held. Must stay 0.
# TYPE headgate_api_calls_inside_hold_total counter
headgate_api_calls_inside_hold_total 1
# HELP headgate_api_calls_total Calls to the API by operation and class of the failure, ok for none.
# TYPE headgate_api_calls_total counter
headgate_api_calls_total{class="RATE_LIMIT",operation="top"} 1
headgate_api_calls_total{class="ok",operation="top"} 1
# HELP headgate_api_responses_total Answers of the API by HTTP status, 0 for none.
# TYPE headgate_api_responses_total counter
headgate_api_responses_total{code="200"} 1
headgate_api_responses_total{code="429"} 1
# HELP headgate_backlog_oldest_age_seconds Since the oldest of them was stored.
# TYPE headgate_backlog_oldest_age_seconds gauge
headgate_backlog_oldest_age_seconds 90
# HELP headgate_creators_held Creators that are held, by class of the answer that caused it, or operator.
# TYPE headgate_creators_held gauge
headgate_creators_held{reason="RATE_LIMIT"} 4
# HELP headgate_dead_letters_total Requests that ended as a dead letter, by class.
# TYPE headgate_dead_letters_total counter
headgate_dead_letters_total{class="VALIDATION"} 1
# HELP headgate_results_after_retry_total Of these, those that took more than one call.
# TYPE headgate_results_after_retry_total counter
headgate_results_after_retry_total 1
`
	err = testutil.GatherAndCompare(m.Registry, strings.NewReader(want), "headgate_api_calls_inside_hold_total", "headgate_api_calls_total",
		"headgate_api_responses_total", "headgate_backlog_oldest_age_seconds", "headgate_creators_held", "headgate_dead_letters_total", "headgate_results_after_retry_total")
	if err != nil {
		t.Error(err)
	}
}
