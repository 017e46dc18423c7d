package classify

import (
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const forever = time.Duration(math.MaxInt64)

// clock turns what an API says about a moment or a wait into a wait.
type clock struct {
	now    time.Time
	header http.Header // of the answer
}

// until returns how long after now t is, 0 if it is past. The provider's own
// Date counts, if the answer has one: its clock and ours may differ by hours.
// Date is cut to the second and was written before the answer came in, so this
// errs, by a second or so, on the side of waiting.
func (c clock) until(t time.Time) time.Duration {
	now := c.now
	if date := c.header["Date"]; len(date) > 0 {
		if d, ok := parseDate(strings.TrimSpace(date[0]), c.now); ok {
			now = d
		}
	}
	return max(0, t.Sub(now))
}

// wait reads what an API says about when to call again, in any form that software is
// known to write into Retry-After and its like: a number of seconds, a duration with
// its units, a Unix time, a date. Of a list the longest counts. Anything else, and a negative
// number, is as if it were not there.
func (c clock) wait(s string) (time.Duration, bool) { return c.in(time.Second, s) }

// in is wait where a number without a unit counts units.
func (c clock) in(unit time.Duration, s string) (time.Duration, bool) {
	s = strings.TrimSpace(s)
	if d, ok := c.one(unit, s); ok {
		return d, true
	}
	longest, known := time.Duration(0), false
	for rest, more := s, strings.Contains(s, ","); more; {
		d, ok, n := c.item(unit, rest)
		if ok {
			longest, known = max(longest, d), true
		}
		if more = n < len(rest); more {
			rest = rest[n+1:]
		}
	}
	return longest, known
}

// maxCommas is how many commas an item of a list may have itself: a date has one,
// 1,000,000 two.
const maxCommas = 4

// item reads the first item of a list, and returns how long it is. An item may have commas
// itself: the longest text that can be read is one.
func (c clock) item(unit time.Duration, s string) (longest time.Duration, known bool, length int) {
	length = -1
	for n, commas := 0, 0; commas <= maxCommas && n <= len(s); commas++ {
		end := len(s)
		if i := strings.IndexByte(s[n:], ','); i >= 0 {
			end = n + i
		}
		if length < 0 {
			length = end
		}
		if d, ok := c.one(unit, strings.TrimSpace(s[:end])); ok {
			longest, known, length = d, true, end
		}
		n = end + 1
	}
	return longest, known, length
}

// one reads a text that is no list.
func (c clock) one(unit time.Duration, s string) (time.Duration, bool) {
	if n := len(s); n > 1 && s[0] == s[n-1] && (s[0] == '"' || s[0] == '\'') {
		s = strings.TrimSpace(s[1 : n-1])
	}
	if len(s) == 0 {
		return 0, false
	}
	if at, ok := strings.CutPrefix(s, "@"); ok { // a Date of RFC 9651
		if d, ok := parseDecimal(at, time.Second); ok {
			return c.until(unix(d)), true
		}
		return 0, false
	}
	if d, ok := c.number(unit, ungroup(strings.TrimPrefix(s, "+")), parseDecimal); ok {
		return d, true
	}
	if d, ok := parseDuration(s); ok {
		return d, true
	}
	if t, ok := parseDate(s, c.now); ok {
		return c.until(t), true
	}
	return 0, false
}

// value is in for a JSON value.
func (c clock) value(unit time.Duration, raw []byte) (time.Duration, bool) {
	if n := number(raw); n != "" {
		return c.number(unit, n, parseNumber)
	}
	return c.in(unit, text(raw, maxID))
}

// A number of seconds below this is a wait, from it on a Unix time: it would be a wait of 31
// years, or a date before 2001-09-09.
const firstUnix = 1e9 * time.Second

// number reads a number of units to wait or, if it has as many digits as the present
// moment has in seconds (10), milliseconds (13), microseconds (16) or nanoseconds (19), a
// Unix time. Other numbers are longer waits than any, and saturate.
func (c clock) number(unit time.Duration, s string, parse func(string, time.Duration) (time.Duration, bool)) (time.Duration, bool) {
	d, ok := parse(s, unit)
	if !ok || d < firstUnix {
		return d, ok
	}
	for ; unit >= time.Nanosecond; unit /= 1000 {
		if d, _ = parse(s, unit); d < firstUnix {
			break
		}
		if d != forever {
			return c.until(unix(d)), true
		}
	}
	return forever, true
}

func unix(d time.Duration) time.Time { return time.Unix(0, int64(d)) }

// ungroup takes the commas out of 1,000 and 12,345,678.9.
func ungroup(s string) string {
	if len(s) > 40 || !strings.Contains(s, ",") {
		return s
	}
	groups := strings.Split(s, ",")
	for i, g := range groups {
		if i == len(groups)-1 {
			g, _, _ = strings.Cut(g, ".")
		}
		if len(g) != 3 && (i > 0 || len(g) == 0 || len(g) > 3) {
			return s
		}
	}
	return strings.Join(groups, "")
}

var units = map[string]time.Duration{
	"ns": time.Nanosecond, "us": time.Microsecond, "µs": time.Microsecond, "ms": time.Millisecond, "msec": time.Millisecond, "millis": time.Millisecond,
	"millisecond": time.Millisecond, "s": time.Second, "sec": time.Second, "second": time.Second, "m": time.Minute, "min": time.Minute,
	"minute": time.Minute, "h": time.Hour, "hr": time.Hour, "hour": time.Hour, "d": 24 * time.Hour, "day": 24 * time.Hour,
}

// unitOf knows a unit by its name, short or long, singular or plural.
func unitOf(name string) (time.Duration, bool) {
	name = strings.ToLower(name)
	if unit, ok := units[name]; ok {
		return unit, true
	}
	unit, ok := units[strings.TrimSuffix(name, "s")]
	return unit, ok
}

// maxUnits is how many parts a duration may have: 1d 2h 3m 4s 5ms.
const maxUnits = 6

// parseDuration reads numbers that have units: 120s, 120 seconds, 1h30m, "2 min 5 sec".
func parseDuration(s string) (time.Duration, bool) {
	if len(s) > 64 {
		return 0, false
	}
	s = strings.TrimPrefix(s, "+")
	var total time.Duration
	for part := 0; ; part++ {
		n := strings.IndexFunc(s, func(r rune) bool { return (r < '0' || r > '9') && r != '.' && r != ',' })
		if n <= 0 || part == maxUnits {
			return 0, false
		}
		number := s[:n]
		s = strings.TrimLeft(s[n:], " ")
		end := strings.IndexAny(s, "0123456789 ")
		if end < 0 {
			end = len(s)
		}
		unit, ok := unitOf(s[:end])
		if !ok {
			return 0, false
		}
		d, ok := parseDecimal(ungroup(number), unit)
		if !ok {
			return 0, false
		}
		total = add(total, d)
		if s = strings.TrimLeft(s[end:], " "); s == "" {
			return total, true
		}
	}
}

// parseDecimal reads a decimal number of units without sign or exponent. It
// saturates, and rounds up to the nanosecond.
func parseDecimal(s string, unit time.Duration) (time.Duration, bool) {
	whole, fraction, point := strings.Cut(s, ".")
	if whole == "" || point && fraction == "" {
		return 0, false
	}
	var d time.Duration
	for i := range len(whole) {
		c := whole[i]
		if c < '0' || c > '9' {
			return 0, false
		}
		digit := time.Duration(c-'0') * unit
		if d > (forever-digit)/10 {
			d = forever
			continue
		}
		d = d*10 + digit
	}
	up := time.Duration(0)
	for i := range len(fraction) {
		c := fraction[i]
		if c < '0' || c > '9' {
			return 0, false
		}
		unit /= 10
		if unit == 0 && c != '0' {
			up = 1
		}
		d = add(d, time.Duration(c-'0')*unit)
	}
	return add(d, up), true
}

// add adds, of which neither is negative, and saturates.
func add(a, b time.Duration) time.Duration {
	if a > forever-b {
		return forever
	}
	return a + b
}

// parseNumber is parseDecimal for JSON numbers, which may have an exponent.
func parseNumber(s string, unit time.Duration) (time.Duration, bool) {
	if d, ok := parseDecimal(s, unit); ok {
		return d, true
	}
	f, err := strconv.ParseFloat(s, 64)
	switch {
	case err != nil && !math.IsInf(f, 1), math.IsNaN(f), f < 0, math.Signbit(f):
		return 0, false
	case f >= float64(forever)/float64(unit):
		return forever, true
	}
	return time.Duration(math.Ceil(f * float64(unit))), true
}
