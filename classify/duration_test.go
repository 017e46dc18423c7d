package classify

import (
	"fmt"
	"math/big"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestWait holds the forms of Retry-After; noon is a Sunday.
func TestWait(t *testing.T) {
	const none = -1
	for in, want := range map[string]time.Duration{
		"5": 5 * time.Second, "0": 0, "0030": 30 * time.Second, " \t45 ": 45 * time.Second, "86400": 24 * time.Hour,
		"1.5": 1500 * time.Millisecond, "1.1": 1100 * time.Millisecond, "0.0000000001": 1, "2.0000000010": 2*time.Second + 1,
		"999999999": 999999999 * time.Second, "99999999999": forever, "999999999999999": forever,
		"1,000": 1000 * time.Second, "12,345,678.5": 12345678*time.Second + 500*time.Millisecond, "1,000, 2,000": 2000 * time.Second, "5,10": 10 * time.Second,
		"+120": 2 * time.Minute, `"120"`: 2 * time.Minute, "'120'": 2 * time.Minute, `"Sun, 01 Mar 2026 12:00:30 GMT"`: 30 * time.Second,

		"120s": 2 * time.Minute, "120 s": 2 * time.Minute, "120 seconds": 2 * time.Minute, "1 second": time.Second, "120 Seconds": 2 * time.Minute, "+120s": 2 * time.Minute,
		"1.5 min": 90 * time.Second, "1h30m0s": 90 * time.Minute, "2 hours 5 min": 125 * time.Minute, "250ms": 250 * time.Millisecond, "1 day": 24 * time.Hour,
		"1,000 seconds": 1000 * time.Second, "5s, 10s": 10 * time.Second, "99999999999999999999 days": forever,

		// Unix times: noon is 1772366400.
		"1772366430": 30 * time.Second, "1772366430.5": 30500 * time.Millisecond, "1772366430000": 30 * time.Second, "1772366430250": 30250 * time.Millisecond,
		"1772366430000000": 30 * time.Second, "1772366430000000000": 30 * time.Second, "1772366300": 0, "1000000000": 0, "1772366300000": 0,
		"@1772366430": 30 * time.Second, `"@1772366430"`: 30 * time.Second, "@1772366300": 0, "@5": 0, "5, @1772366430": 30 * time.Second,
		"99999999999999999999": forever, strings.Repeat("9", 400): forever, strings.Repeat("0", 400) + "1": time.Second,

		"Sun, 01 Mar 2026 12:00:30 GMT":    30 * time.Second,
		"Sunday, 01-Mar-26 12:00:30 GMT":   30 * time.Second,
		"Sun Mar  1 12:00:30 2026":         30 * time.Second,
		"  Sun, 01 Mar 2026 12:00:30 GMT ": 30 * time.Second,
		"Sun, 01 Mar 2026 12:00:00 GMT":    0,
		"Sun, 01 Mar 2020 12:00:00 GMT":    0, // past
		"Sun, 01 Mar 2026 12:59:60 GMT":    time.Hour,
		// Two digits of a year: at most 50 years ahead.
		"Sunday, 01-Mar-76 12:00:00 GMT": time.Date(2076, 3, 1, 12, 0, 0, 0, time.UTC).Sub(noon),
		"Monday, 01-Mar-76 12:00:01 GMT": 0, // 1976
		"Monday, 01-Mar-77 12:00:00 GMT": 0, // 1977
		"Sunday, 06-Nov-94 08:49:37 GMT": 0, // 1994

		"2026-03-01T12:00:30Z": 30 * time.Second, "2026-03-01t12:00:30z": 30 * time.Second,
		"2026-03-01 12:00:30Z": 30 * time.Second, "2026-03-01T13:00:30+01:00": 30 * time.Second,
		"2026-03-01T12:00:30-00:00": 30 * time.Second, "2026-03-01T12:00:30.25Z": 30*time.Second + 250*time.Millisecond,
		"2026-03-01T12:00:60Z": time.Minute, "2025-03-01T12:00:30Z": 0, "9999-12-31T23:59:59Z": forever,

		// What software writes instead of an HTTP-date.
		"Sun, 01 Mar 2026 12:00:30 -0000": 30 * time.Second, // Python's formatdate
		"Sun, 01 Mar 2026 12:00:30 +0000": 30 * time.Second, // Go's RFC1123Z, Ruby, PHP
		"Sun, 01 Mar 2026 12:00:30 UTC":   30 * time.Second, // Go's RFC1123
		"Sun, 1 Mar 2026 12:00:30 GMT":    30 * time.Second, // Java
		"Sun, 01 Mar 2026 13:00:30 +0100": 30 * time.Second, "Sun, 01 Mar 2026 06:30:30 -05:30": 30 * time.Second,
		"Sun, 01 Mar 26 12:00:30 +0000": 30 * time.Second, "1 Mar 2026 12:00:30 GMT": 30 * time.Second,
		"Sunday, 01-Mar-2026 12:00:30 GMT": 30 * time.Second, "Sun, 01-Mar-2026 12:00:30 GMT": 30 * time.Second, // Netscape
		"Sunday, 01-Mar-26 12:00:30 UTC": 30 * time.Second, "Sunday, 1-Mar-26 12:00:30 GMT": 30 * time.Second, // PHP
		"Dom, 01 Mar 2026 12:00:30 GMT": 30 * time.Second, // of a list the second item
		"Sun Mar 1 12:00:30 2026":       30 * time.Second,
		"Sun Mar  1 12:00:30 UTC 2026":  30 * time.Second, "Sun Mar 01 12:00:30 +0000 2026": 30 * time.Second, // date, Ruby, Java
		"Sun Mar 01 2026 12:00:30 GMT+0000 (Coordinated Universal Time)":   30 * time.Second, // JavaScript
		"Sun Mar 01 2026 13:00:30 GMT+0100 (Central European Winter Time)": 30 * time.Second,
		"Sun Mar 01 2026 12:00:30 GMT+0000":                                30 * time.Second,
		"2026-03-01T12:00:30":                                              30 * time.Second, "2026-03-01 12:00:30": 30 * time.Second, "2026-03-01T12:00:30.25": 30*time.Second + 250*time.Millisecond,
		"2026-03-01 12:00:30 UTC": 30 * time.Second, "2026-03-01 12:00:30 +0000 UTC": 30 * time.Second, "2026-03-01T13:00:30+0100": 30 * time.Second,
		"2026-03-01T13:00:30+01": 30 * time.Second, "2026-03-01T12:00:30 Z": 30 * time.Second,

		"5, 10": 10 * time.Second, "10, 5": 10 * time.Second, "soon, 5": 5 * time.Second, "5,": 5 * time.Second, ",,7,,": 7 * time.Second,
		"5, Sun, 01 Mar 2026 12:00:30 GMT":                             30 * time.Second,
		"Sun, 01 Mar 2026 12:00:30 GMT, 40":                            40 * time.Second,
		"Sun, 01 Mar 2026 12:00:30 GMT, Sun, 01 Mar 2026 12:01:00 GMT": time.Minute,

		"": none, " ": none, ",": none, "-10": none, "-0": none, "-5s": none, "+-5": none, "@": none, "@-5": none, "@soon": none, "+": none, `"`: none, `""`: none, "NaN": none, "Inf": none, "Infinity": none, "1e3": none, "0x10": none,
		".5": none, "5.": none, "1.2.3": none, "5 parsecs": none, "s": none, "5 s 5": none, "1_000 s": none, "1,00": time.Second, "soon": none, "null": none, "１": none, "1_000": none,
		"Sun, 01 Mar 2026 12:00:30": none, "Sun, 01 Mar 2026 12:00:30 PST": none, "Sun, 01 Mar 2026 12:00:30 +9900": none, "Sun, 01 Mar 2026 12:00:30 GMT GMT GMT": none,
		"Sonst, 01 März 2026 12:00:30 GMT": none, "Sun, 01 Mrz 2026 12:00:30 GMT": none, "Sun, 01 Mar 026 12:00:30 GMT": none, "Sun, 001 Mar 2026 12:00:30 GMT": none,
		"Sun, 31 Feb 2026 12:00:30 GMT": none, "Sunday, 01-Mar-26 12:00:30 PST": none, "Sun, 01 Mar 2026 12:60:30 GMT": none,
		"2026-03-01": none, "2026-13-01T12:00:30Z": none, "2026-02-30T12:00:30Z": none, "2026-03-01T12:00:30+01000": none, "2026-03-01T12:00:30 +0100 UTC": none,
		strings.Repeat("a", 1<<16): none, strings.Repeat("a,", 1<<12): none, "\x00": none,
	} {
		d, ok := clock{now: noon}.wait(in)
		if !ok {
			d = none
		}
		if d != want {
			t.Errorf("wait(%.60q) = %v, want %v", in, d, want)
		}
	}
}

// TestWaitByTheirClock: a date counts from the answer's own Date, whatever our clock says.
func TestWaitByTheirClock(t *testing.T) {
	for date, want := range map[string]time.Duration{
		"Sun, 01 Mar 2026 11:59:30 GMT":  time.Minute,      // their clock is slow
		"Sun, 01 Mar 2026 12:00:20 GMT":  10 * time.Second, // fast
		"Sunday, 01-Mar-26 12:00:20 GMT": 10 * time.Second,
		"Sun, 01 Mar 2026 12:05:00 GMT":  0,
		"yesterday":                      30 * time.Second,
		"":                               30 * time.Second,
		"12":                             30 * time.Second,
	} {
		c := clock{noon, headers("Date: " + date)}
		if d, ok := c.wait("Sun, 01 Mar 2026 12:00:30 GMT"); !ok || d != want {
			t.Errorf("Date %q: HTTP-date %v, %v, want %v", date, d, ok, want)
		}
		if d, ok := c.wait("2026-03-01T12:00:30Z"); !ok || d != want {
			t.Errorf("Date %q: RFC 3339 %v, %v, want %v", date, d, ok, want)
		}
		if d, ok := c.wait("1772366430"); !ok || d != want {
			t.Errorf("Date %q: Unix time %v, %v, want %v", date, d, ok, want)
		}
		if d, _ := c.wait("30"); d != 30*time.Second {
			t.Errorf("Date %q: seconds %v", date, d)
		}
	}
	// Date is cut to the second: never early because of it.
	c := clock{noon.Add(900 * time.Millisecond), headers("Date: Sun, 01 Mar 2026 12:00:00 GMT")}
	if d, _ := c.wait("Sun, 01 Mar 2026 12:00:30 GMT"); d != 30*time.Second {
		t.Errorf("same second: %v, want 30s", d)
	}
}

// TestSameInEveryPlace: what is read in Retry-After is read in a header that says when a window
// ends, and in the body.
func TestSameInEveryPlace(t *testing.T) {
	p, err := Parse("places.yaml", []byte("body: {retry_after: wait, retry_after_ms: millis}"))
	if err != nil {
		t.Fatal(err)
	}
	for _, said := range []string{
		"30", "30s", "+30", `\"30\"`, "1772366430", "1772366430000", "@1772366430", "Sun, 01 Mar 2026 12:00:30 -0000", "2026-03-01T12:00:30",
		"Sun Mar 01 2026 12:00:30 GMT+0000 (Coordinated Universal Time)", "Sun, 1 Mar 2026 12:00:30 GMT", "2026-03-01 12:00:30 UTC",
	} {
		header := strings.ReplaceAll(said, `\`, "")
		answers := map[string]Answer{
			"Retry-After": {Header: headers("Retry-After: " + header)},
			"a reset":     {Header: headers("X-RateLimit-Remaining: 0", "X-RateLimit-Reset: "+header)},
			"the body":    {Body: []byte(`{"wait":"` + said + `"}`)},
		}
		if _, number := parseDecimal(said, time.Second); number {
			answers["a number in the body"] = Answer{Body: []byte(`{"wait":` + said + `}`)}
			answers["RateLimit"] = Answer{Header: headers("RateLimit: \"a\";r=0;t=" + said)}
		}
		if said != "30" && said != "+30" && said != `\"30\"` {
			answers["milliseconds in the body"] = Answer{Body: []byte(`{"millis":"` + said + `"}`)}
			if said != "1772366430" { // 20 days
				answers["Retry-After-Ms"] = Answer{Header: headers("Retry-After-Ms: " + header)}
			} else {
				delete(answers, "milliseconds in the body")
			}
		}
		for where, a := range answers {
			a.Status = 429
			if f, _ := p.Classify(a, noon); f.RetryAfter != 30*time.Second || f.RetryAfterAssumed {
				t.Errorf("%s in %s: %v, assumed %v, want 30s", said, where, f.RetryAfter, f.RetryAfterAssumed)
			}
		}
	}
}

// TestDatesOfAllTimes writes moments in every form, and reads them.
func TestDatesOfAllTimes(t *testing.T) {
	forms := []string{
		time.RFC1123, time.RFC1123Z, time.RFC850, time.ANSIC, time.UnixDate, time.RubyDate, "02 Jan 06 15:04:05 -0700", time.RFC3339, time.RFC3339Nano,
		"Mon, 2 Jan 2006 15:04:05 GMT", "Monday, 02-Jan-2006 15:04:05 MST", "Mon Jan 02 2006 15:04:05 GMT-0700 (Zulu Time)", "2006-01-02 15:04:05 MST",
		"2006-01-02 15:04:05 -0700 MST", "2006-01-02T15:04:05", "2006-01-02 15:04:05.999999999", "2 Jan 2006 15:04:05 -0700",
	}
	rapid.Check(t, func(t *rapid.T) {
		now := time.Unix(rapid.Int64Range(1e9, 4e9).Draw(t, "now"), 0).UTC()
		wait := time.Duration(rapid.Int64Range(0, 40*365*24*3600).Draw(t, "wait")) * time.Second
		form := rapid.SampledFrom(forms).Draw(t, "form")
		said := now.Add(wait).Format(form)
		if rapid.Bool().Draw(t, "quoted") {
			said = `"` + said + `"`
		}
		if d, ok := (clock{now: now}).wait(said); !ok || d != wait {
			t.Fatalf("%s at %v: %v, %v, want %v", said, now, d, ok, wait)
		}
	})
}

// TestNumbersOfAllSizes writes waits and Unix times with and without decoration.
func TestNumbersOfAllSizes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		wait := rapid.Int64Range(0, 999_999_999).Draw(t, "wait")
		want := time.Duration(wait) * time.Second
		form := rapid.SampledFrom([]string{"%d", "+%d", `"%d"`, "%ds", "%d seconds", "%d s", " %d ", "%d.0", "0, %d", "%d, 0"}).Draw(t, "form")
		if d, ok := (clock{now: noon}).wait(fmt.Sprintf(form, wait)); !ok || d != want {
			t.Fatalf(form+": %v, %v", wait, d, ok)
		}
		at := noon.Add(time.Duration(wait%1e8) * time.Second)
		for _, n := range []int64{at.Unix(), at.UnixMilli(), at.UnixMicro(), at.UnixNano()} {
			if d, ok := (clock{now: noon}).wait(strconv.FormatInt(n, 10)); !ok || d != at.Sub(noon) {
				t.Fatalf("%d: %v, %v, want %v", n, d, ok, at.Sub(noon))
			}
			if d, ok := (clock{now: noon}).wait("-" + strconv.FormatInt(n, 10)); ok {
				t.Fatalf("-%d: %v, want none", n, d)
			}
		}
	})
}

// TestDecimalIsExact compares with arbitrary precision: rounded up, saturated.
func TestDecimalIsExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.StringMatching(`[0-9]{1,25}(\.[0-9]{1,15})?`).Draw(t, "number")
		unit := rapid.SampledFrom([]time.Duration{time.Second, time.Millisecond}).Draw(t, "unit")
		exact, ok := new(big.Rat).SetString(s)
		if !ok {
			t.Fatal(s)
		}
		exact.Mul(exact, new(big.Rat).SetInt64(int64(unit)))
		want, rest := new(big.Int).QuoRem(exact.Num(), exact.Denom(), new(big.Int))
		if rest.Sign() > 0 {
			want.Add(want, big.NewInt(1))
		}
		if limit := big.NewInt(int64(forever)); want.Cmp(limit) > 0 {
			want = limit
		}
		if d, ok := parseDecimal(s, unit); !ok || int64(d) != want.Int64() {
			t.Fatalf("parseDecimal(%s, %v) = %d, want %v", s, unit, d, want)
		}
	})
}

func TestNumberForms(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"1e1": 10 * time.Second, "1.5E0": 1500 * time.Millisecond, "1e-12": 1, "1e400": forever, "1e10": forever, "0e0": 0,
	} {
		if d, ok := parseNumber(in, time.Second); !ok || d != want {
			t.Errorf("parseNumber(%s) = %v, %v, want %v", in, d, ok, want)
		}
	}
	for _, in := range []string{"-1", "-1e400", "-0.0", "-0e0"} {
		if d, ok := parseNumber(in, time.Second); ok {
			t.Errorf("parseNumber(%s) = %v, want none", in, d)
		}
	}
}
