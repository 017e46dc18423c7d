package classify

import (
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const forever = time.Duration(math.MaxInt64)

// clock turns a moment of the provider's clock into a wait.
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
		if d, ok := parseHTTPDate(strings.TrimSpace(date[0]), c.now); ok {
			now = d
		}
	}
	return max(0, t.Sub(now))
}

// wait reads what an API says about when to call again, in any of the forms of
// Retry-After: seconds (RFC 9110 section 10.2.3), which may have decimals, an
// HTTP-date, or an RFC 3339 time. Of a list the longest counts. What is none of
// these, a negative number among them, is as if it were not there.
func (c clock) wait(s string) (time.Duration, bool) {
	s = strings.TrimSpace(s)
	if d, ok := c.waitOne(s); ok {
		return d, true
	}
	var longest time.Duration
	known := false
	for more := strings.Contains(s, ","); more; {
		var part string
		part, s, more = strings.Cut(s, ",")
		d, ok := c.waitOne(strings.TrimSpace(part))
		if !ok && more {
			// An HTTP-date has a comma itself.
			tail, rest, again := strings.Cut(s, ",")
			if d, ok = c.waitOne(strings.TrimSpace(part + "," + tail)); ok {
				s, more = rest, again
			}
		}
		if ok {
			longest, known = max(longest, d), true
		}
	}
	return longest, known
}

func (c clock) waitOne(s string) (time.Duration, bool) {
	if d, ok := parseDecimal(s, time.Second); ok {
		return d, true
	}
	if t, ok := c.date(s); ok {
		return c.until(t), true
	}
	return 0, false
}

func (c clock) date(s string) (time.Time, bool) {
	if t, ok := parseHTTPDate(s, c.now); ok {
		return t, true
	}
	return parseRFC3339(s)
}

// reset reads when a window ends: like wait, but a number from 10^9 on is a Unix
// time, in seconds or, where those would lie past the year 2262, milliseconds.
// Smaller ones would be dates before 2001, and are seconds from now.
func (c clock) reset(s string) (time.Duration, bool) {
	s = strings.TrimSpace(s)
	d, ok := parseDecimal(s, time.Second)
	switch {
	case !ok:
		return c.wait(s)
	case d < 1e9*time.Second:
		return d, true
	case d == forever:
		d, _ = parseDecimal(s, time.Millisecond)
	}
	return c.until(time.Unix(0, int64(d))), true
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

// The forms of an HTTP-date (RFC 9110 section 5.6.7). All are in GMT.
const (
	imfFixdate = "Mon, 02 Jan 2006 15:04:05 GMT"
	rfc850     = "Monday, 02-Jan-06 15:04:05 GMT"
	asctime    = "Mon Jan _2 15:04:05 2006"
)

// parseHTTPDate reads the three forms of an HTTP-date. now decides the century
// of the one that has two digits for the year.
func parseHTTPDate(s string, now time.Time) (time.Time, bool) {
	if !likeDate(s) || s[0] >= '0' && s[0] <= '9' {
		return time.Time{}, false
	}
	s, leap := leapSecond(s)
	for _, layout := range [...]string{imfFixdate, asctime, rfc850} {
		t, err := time.Parse(layout, s)
		if err != nil {
			continue
		}
		if layout == rfc850 {
			t = century(t, now)
		}
		return t.Add(leap), true
	}
	return time.Time{}, false
}

// century moves t, of whose year two digits are known, to the last such year
// that is not more than 50 years after now (RFC 9110 section 5.6.7).
func century(t, now time.Time) time.Time {
	limit := now.UTC().AddDate(50, 0, 0)
	year := limit.Year() - limit.Year()%100 + t.Year()%100
	in := func(year int) time.Time {
		return time.Date(year, t.Month(), t.Day(), t.Hour(), t.Minute(), t.Second(), 0, time.UTC)
	}
	if t := in(year); !t.After(limit) {
		return t
	}
	return in(year - 100)
}

// parseRFC3339 is time.Parse, and takes what section 5.6 of RFC 3339 lets people
// write besides: small letters, a space for the T, a leap second.
func parseRFC3339(s string) (time.Time, bool) {
	if !likeDate(s) || s[0] < '0' || s[0] > '9' {
		return time.Time{}, false
	}
	s, leap := leapSecond(strings.ToUpper(s))
	if s[10] == ' ' {
		s = s[:10] + "T" + s[11:]
	}
	t, err := time.Parse(time.RFC3339, s)
	return t.Add(leap), err == nil
}

// likeDate spares a long text the attempts, and their errors the memory.
func likeDate(s string) bool { return len(s) >= len("2006-01-02T15:04:05Z") && len(s) <= 64 }

// leapSecond rewrites the second 60, which package time does not know.
func leapSecond(s string) (string, time.Duration) {
	if i := strings.Index(s, ":60"); i >= 3 && s[i-3] == ':' {
		return s[:i] + ":59" + s[i+3:], time.Second
	}
	return s, 0
}
