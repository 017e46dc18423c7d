package classify

import (
	"strconv"
	"strings"
	"time"
)

// parseDate reads the dates that software writes into HTTP headers: the three forms of an
// HTTP-date (RFC 9110, section 5.6.7) and what comes out of the usual libraries of
// other languages instead, RFC 3339 and ISO 8601 with or without a zone, the dates of
// e-mails, date(1), Java and JavaScript. Without a zone a date is in UTC. now decides
// the century of a year of two digits.
func parseDate(s string, now time.Time) (time.Time, bool) {
	const shortest, longest = len("1 Mar 26 12:00:30 Z"), 100 // JavaScript's may be long
	if len(s) < shortest || len(s) > longest {
		return time.Time{}, false
	}
	if i := strings.LastIndex(s, " ("); i > 0 && s[len(s)-1] == ')' { // JavaScript names the zone again
		s = s[:i]
	}
	if len(s) > 4 && s[0] >= '0' && s[0] <= '9' && s[4] == '-' {
		return parseISO(s)
	}
	return parseWords(s, now)
}

// parseISO reads 2026-03-01T12:00:30, with a space for the T, small letters,
// a fraction and any zone.
func parseISO(s string) (time.Time, bool) {
	const dateLen, timeLen = len("2026-03-01"), len("2026-03-01T12:00:30")
	if len(s) < timeLen || s[dateLen] != 'T' && s[dateLen] != 't' && s[dateLen] != ' ' {
		return time.Time{}, false
	}
	rest := s[timeLen:]
	clockEnd := timeLen
	if strings.HasPrefix(rest, ".") {
		digits := len(rest[1:]) - len(strings.TrimLeft(rest[1:], "0123456789"))
		clockEnd += 1 + digits
		rest = rest[1+digits:]
	}
	day, err := time.Parse(time.DateOnly, s[:dateLen])
	if err != nil {
		return time.Time{}, false
	}
	return moment{year: day.Year(), month: day.Month(), day: day.Day()}.at(s[dateLen+1:clockEnd], strings.Fields(rest))
}

// moment is a date before its time of day is known.
type moment struct {
	year  int
	month time.Month
	day   int
}

// at adds a time of day and zones, which have to agree if there are several, such
// as "+0000 UTC".
func (m moment) at(clock string, zones []string) (time.Time, bool) {
	clock, leap := leapSecond(clock)
	t, err := time.Parse(time.TimeOnly, clock)
	if err != nil || len(zones) > 2 {
		return time.Time{}, false
	}
	var offset time.Duration
	for i, z := range zones {
		o, ok := parseZone(z)
		if !ok || i > 0 && o != offset {
			return time.Time{}, false
		}
		offset = o
	}
	date := time.Date(m.year, m.month, m.day, t.Hour(), t.Minute(), t.Second(), t.Nanosecond(), time.UTC)
	if date.Month() != m.month || date.Day() != m.day {
		return time.Time{}, false // the 31st of February
	}
	return date.Add(leap - offset), true
}

// leapSecond rewrites the second 60, which package time does not know.
func leapSecond(clock string) (string, time.Duration) {
	if len(clock) >= len("23:59:60") && clock[5:8] == ":60" {
		return clock[:5] + ":59" + clock[8:], time.Second
	}
	return clock, 0
}

// parseZone reads Z, UTC, GMT, UT, an offset, or an offset from UTC or GMT.
func parseZone(z string) (time.Duration, bool) {
	named := false
	for _, name := range []string{"UTC", "GMT", "UT", "Z"} {
		if len(z) >= len(name) && strings.EqualFold(z[:len(name)], name) {
			z, named = z[len(name):], true
			break
		}
	}
	if z == "" {
		return 0, named
	}
	digits := strings.Replace(z[1:], ":", "", 1)
	if z[0] != '+' && z[0] != '-' || len(digits) != 2 && len(digits) != 4 {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 16)
	if err != nil {
		return 0, false
	}
	if len(digits) == 2 {
		n *= 100
	}
	if n/100 > 23 || n%100 > 59 {
		return 0, false
	}
	offset := time.Duration(n/100)*time.Hour + time.Duration(n%100)*time.Minute
	if z[0] == '-' {
		offset = -offset
	}
	return offset, true
}

// parseWords reads the dates that name their month:
//
//	Sun, 01 Mar 2026 12:00:30 GMT     Sunday, 01-Mar-26 12:00:30 GMT
//	Sun Mar  1 12:00:30 2026          Sun Mar  1 12:00:30 UTC 2026
//	Sun Mar 01 2026 12:00:30 GMT+0000
func parseWords(s string, now time.Time) (time.Time, bool) {
	words := strings.FieldsFunc(s, func(r rune) bool { return r == ' ' || r == '\t' })
	if len(words) > 1 && isWeekday(strings.TrimSuffix(words[0], ",")) {
		words = words[1:]
	}
	if len(words) > 0 && strings.Count(words[0], "-") == 2 { // 01-Mar-26
		words = append(strings.Split(words[0], "-"), words[1:]...)
	}
	if len(words) < 4 || len(words) > 6 {
		return time.Time{}, false
	}
	var day, month, year, clock string
	var zones []string
	switch {
	case len(words) > 4 && isNumber(words[0]): // 01 Mar 2026 12:00:30 GMT
		day, month, year, clock, zones = words[0], words[1], words[2], words[3], words[4:]
	case len(words) > 4 && strings.Contains(words[3], ":"): // Mar 01 2026 12:00:30 GMT
		month, day, year, clock, zones = words[0], words[1], words[2], words[3], words[4:]
	case strings.Contains(words[2], ":"): // Mar 1 12:00:30 UTC 2026
		last := len(words) - 1
		month, day, clock, zones, year = words[0], words[1], words[2], words[3:last], words[last]
	}
	return parseParts(day, month, year, clock, zones, now)
}

func parseParts(day, month, year, clock string, zones []string, now time.Time) (time.Time, bool) {
	m, ok := monthOf(month)
	d, err := strconv.ParseUint(day, 10, 8)
	if !ok || err != nil || len(day) > 2 || !isNumber(year) {
		return time.Time{}, false
	}
	y, _ := strconv.Atoi(year)
	date := moment{year: y, month: m, day: int(d)}
	switch len(year) {
	case 4:
		return date.at(clock, zones)
	case 2:
		return century(date, clock, zones, now)
	}
	return time.Time{}, false
}

// century takes the last such year that is not more than 50 years after now
// (RFC 9110, section 5.6.7).
func century(date moment, clock string, zones []string, now time.Time) (time.Time, bool) {
	limit := now.UTC().AddDate(50, 0, 0)
	two := date.year
	date.year = limit.Year() - limit.Year()%100 + two
	t, ok := date.at(clock, zones)
	if ok && !t.After(limit) {
		return t, true
	}
	date.year -= 100
	return date.at(clock, zones)
}

func isNumber(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == "" && len(s) <= 4
}

func monthOf(s string) (time.Month, bool) {
	for m := time.January; m <= time.December; m++ {
		if len(s) == 3 && strings.EqualFold(s, m.String()[:3]) || strings.EqualFold(s, m.String()) {
			return m, true
		}
	}
	return 0, false
}

func isWeekday(s string) bool {
	for d := time.Sunday; d <= time.Saturday; d++ {
		if len(s) == 3 && strings.EqualFold(s, d.String()[:3]) || strings.EqualFold(s, d.String()) {
			return true
		}
	}
	return false
}
