package resilience

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

const (
	// year and the other bounds keep every time that is computed from a rate far
	// below what a Duration can hold, which is 292 years.
	year        = 365 * 24 * time.Hour
	fastestRate = 1e9
	longestFill = 50 * year

	// transit is how much later than others a call may reach the API, which counts it
	// then: while its connection is made, for one. Burst has to cover that.
	transit = 100 * time.Millisecond
)

// Rate allows PerSecond calls a second on average, and at most Burst at once as
// the API counts them. Calls arrive at the API earlier or later than others that began at
// the same time, so a part of the burst is kept back: the calls of a tenth
// of a second, but at most a quarter of the burst and at least one call
// if the burst has two. A burst of one leaves nothing to keep back. An API that counts
// exactly may then see two calls closer together than it allows, by as much as
// one of them was late; ask for a rate that is a little lower than such an API's.
type Rate struct {
	PerSecond float64 // 0: no limit; otherwise from a call a year to 1e9
	Burst     int     // at least 1 where there is a limit
}

var ratePer = map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour, "d": 24 * time.Hour}

// ParseRate reads a rate as people write it: 60/m, 10/s, 600/h, 5000/d, or
// inf for no limit, which is +Inf calls a second.
func ParseRate(s string) (calls float64, per time.Duration, err error) {
	if s == "inf" || s == "unlimited" {
		return math.Inf(1), time.Second, nil
	}
	n, unit, ok := strings.Cut(s, "/")
	calls, err = strconv.ParseFloat(n, 64)
	per = ratePer[unit]
	if !ok || err != nil || per == 0 || calls <= 0 || math.IsInf(calls, 0) || math.IsNaN(calls) {
		return 0, 0, fmt.Errorf("a rate is calls per s, m, h or d, such as 60/m, or inf; not %q", s)
	}
	return calls, per, nil
}

func (r Rate) unlimited() bool { return r.PerSecond <= 0 }

func (r Rate) check(what string) error {
	switch {
	case r.PerSecond < 0 || math.IsNaN(r.PerSecond) || r.PerSecond > fastestRate:
		return fmt.Errorf("%s: rate must be a number of calls a second from 0 (no limit) to %.0f, not %v", what, fastestRate, r.PerSecond)
	case r.unlimited():
		return nil
	case r.PerSecond < 1/year.Seconds():
		return fmt.Errorf("%s: rate must be at least a call a year, not %v a second; hold the creator if it shall not be called", what, r.PerSecond)
	case r.Burst < 1:
		return fmt.Errorf("%s: burst must be at least 1, not %d", what, r.Burst)
	case float64(r.Burst)/r.PerSecond > longestFill.Seconds():
		return fmt.Errorf("%s: a burst of %d takes over 50 years to come back at %v a second; lower the burst", what, r.Burst, r.PerSecond)
	}
	return nil
}

func (r Rate) limiter() *rate.Limiter {
	if r.unlimited() {
		return nil
	}
	return rate.NewLimiter(rate.Limit(r.PerSecond), r.bucket())
}

// bucket is the burst less the part that is kept back, see Rate.
func (r Rate) bucket() int {
	late := min(r.PerSecond*transit.Seconds(), float64(r.Burst)/4)
	return max(1, r.Burst-int(math.Ceil(late)))
}

// interval is the time between two calls at this rate, 0 without a limit.
func (r Rate) interval() time.Duration {
	if r.unlimited() {
		return 0
	}
	return seconds(1 / r.PerSecond)
}

// seconds is s seconds, as far as a Duration can tell.
func seconds(s float64) time.Duration {
	if s >= math.MaxInt64/float64(time.Second) {
		return math.MaxInt64
	}
	return time.Duration(s * float64(time.Second))
}
