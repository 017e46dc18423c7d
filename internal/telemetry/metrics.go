package telemetry

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/consumer"
)

// Metrics observes a worker for Prometheus. No label carries a creator: 100,000
// of them would cost 52 MB for each counter.
type Metrics struct {
	Registry *prometheus.Registry

	calls       *prometheus.CounterVec
	responses   *prometheus.CounterVec
	duration    *prometheus.HistogramVec
	inside      prometheus.Counter
	retries     *prometheus.CounterVec
	results     prometheus.Counter
	retried     prometheus.Counter
	deadLetters *prometheus.CounterVec
}

// NewMetrics makes metrics with a registry of their own.
func NewMetrics() *Metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "headgate", Name: name, Help: help})
	}
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "headgate", Name: name, Help: help}, labels)
	}
	m := &Metrics{
		Registry:  prometheus.NewRegistry(),
		calls:     counters("api_calls_total", "Calls to the API by operation and class of the failure, ok for none.", "operation", "class"),
		responses: counters("api_responses_total", "Answers of the API by HTTP status, 0 for none.", "code"),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "headgate", Name: "api_call_duration_seconds", Help: "How long calls to the API took.",
			Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"operation"}),
		inside:      counter("api_calls_inside_hold_total", "Calls that began although their creator was held. Must stay 0."),
		retries:     counters("retries_total", "Calls whose request will be called again, by class of the failure.", "class"),
		results:     counter("results_total", "Requests that ended in a result."),
		retried:     counter("results_after_retry_total", "Of these, those that took more than one call."),
		deadLetters: counters("dead_letters_total", "Requests that ended as a dead letter, by class.", "class"),
	}
	m.Registry.MustRegister(m.calls, m.responses, m.duration, m.inside, m.retries, m.results, m.retried, m.deadLetters,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Called counts a call.
func (m *Metrics) Called(operation string, class classify.Class, status int, took time.Duration, insideHold bool) {
	name := string(class)
	if name == "" {
		name = "ok"
	}
	m.calls.WithLabelValues(operation, name).Inc()
	m.responses.WithLabelValues(strconv.Itoa(status)).Inc()
	m.duration.WithLabelValues(operation).Observe(took.Seconds())
	if insideHold {
		m.inside.Inc()
	}
}

// Retried counts a retry.
func (m *Metrics) Retried(class classify.Class) { m.retries.WithLabelValues(string(class)).Inc() }

// Settled counts an outcome.
func (m *Metrics) Settled(class classify.Class, calls int) {
	switch {
	case class != "":
		m.deadLetters.WithLabelValues(string(class)).Inc()
	default:
		m.results.Inc()
		if calls > 1 {
			m.retried.Inc()
		}
	}
}

// Watch adds the figures that are counted when they are read.
func (m *Metrics) Watch(snapshot func() consumer.Snapshot) {
	m.Registry.MustRegister(&snapshots{snapshot})
}

// snapshots turns a worker's snapshot into gauges.
type snapshots struct{ take func() consumer.Snapshot }

func gauge(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("headgate_"+name, help, labels, nil)
}

var (
	partitionsDesc = gauge("partitions_owned", "Partitions that this worker owns.")
	inFlightDesc   = gauge("calls_in_flight", "Calls that have not been settled.")
	waitingDesc    = gauge("requests_waiting", "Requests that wait for their turn, in the worker or set aside at the server.", "where")
	creatorsDesc   = gauge("creators", "Creators that this worker remembers, by state of their circuit breaker.", "breaker")
	heldDesc       = gauge("creators_held", "Creators that are held, by class of the answer that caused it, or operator.", "reason")
	blockedDesc    = gauge("blocked", "1 while no creator is called, by what is held.", "scope")
	backlogDesc    = gauge("backlog_requests", "Requests stored, over all workers.")
	creditsDesc    = gauge("credits_used_today", "What calls have cost today (UTC), over all workers, where the API says so.")
	perDayDesc     = gauge("credits_per_day", "What they may cost; 0 for no limit.")
	oldestDesc     = gauge("backlog_oldest_age_seconds", "Since the oldest of them was stored.")
)

func (s *snapshots) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{partitionsDesc, inFlightDesc, waitingDesc, creatorsDesc, heldDesc, blockedDesc, backlogDesc, oldestDesc, creditsDesc, perDayDesc} {
		ch <- d
	}
}

func (s *snapshots) Collect(ch chan<- prometheus.Metric) {
	n := s.take()
	send := func(d *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	truth := map[bool]float64{true: 1}
	send(partitionsDesc, float64(n.Partitions))
	send(inFlightDesc, float64(n.InFlight))
	send(waitingDesc, float64(n.Near), "worker")
	send(waitingDesc, float64(n.Parked), "server")
	for _, state := range []string{"closed", "open", "half_open"} {
		send(creatorsDesc, float64(n.Breakers[state]), state)
	}
	for reason, count := range n.Held {
		send(heldDesc, float64(count), reason)
	}
	send(blockedDesc, truth[n.Account], "account")
	send(blockedDesc, truth[n.Provider], "provider")
	send(backlogDesc, float64(n.Backlog))
	send(creditsDesc, n.Credits)
	send(perDayDesc, n.CreditsPerDay)
	send(oldestDesc, n.Oldest.Seconds())
}
