package classify

import (
	"math/big"
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
		"9223372036": 9223372036 * time.Second, "9223372037": forever, "9223372036.9": forever,
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

		"5, 10": 10 * time.Second, "10, 5": 10 * time.Second, "soon, 5": 5 * time.Second, "5,": 5 * time.Second, ",,7,,": 7 * time.Second,
		"5, Sun, 01 Mar 2026 12:00:30 GMT":                             30 * time.Second,
		"Sun, 01 Mar 2026 12:00:30 GMT, 40":                            40 * time.Second,
		"Sun, 01 Mar 2026 12:00:30 GMT, Sun, 01 Mar 2026 12:01:00 GMT": time.Minute,

		"": none, " ": none, ",": none, "-10": none, "-0": none, "+5": none, "NaN": none, "Inf": none, "Infinity": none, "1e3": none, "0x10": none,
		".5": none, "5.": none, "1.2.3": none, "5s": none, "5 seconds": none, "soon": none, "null": none, "１": none, "1_000": none,
		"Sun, 01 Mar 2026 12:00:30": none, "Sun, 01 Mar 2026 12:00:30 PST": none, "Sun, 01 Mar 2026 12:00:30 +0000": none,
		"Sun, 31 Feb 2026 12:00:30 GMT": none, "Sunday, 01-Mar-26 12:00:30 PST": none, "Sun, 01 Mar 2026 12:60:30 GMT": none,
		"2026-03-01T12:00:30": none, "2026-03-01": none, "2026-13-01T12:00:30Z": none, "2026-03-01T12:00:30+0100": none,
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
		if d, ok := c.reset("1772366430"); !ok || d != want {
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

func TestReset(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"30": 30 * time.Second, "0": 0, "0.5": 500 * time.Millisecond, "999999999": 999999999 * time.Second,
		"1772366430": 30 * time.Second, "1772366430.5": 30500 * time.Millisecond, "1772366400": 0, "1000000000": 0,
		"1772366430000": 30 * time.Second, "1772366430250": 30250 * time.Millisecond, "1772366300000": 0,
		"2026-03-01T12:00:30Z": 30 * time.Second, "Sun, 01 Mar 2026 12:00:30 GMT": 30 * time.Second,
		strings.Repeat("9", 30): forever - time.Duration(noon.UnixNano()),
	} {
		if d, ok := (clock{now: noon}).reset(in); !ok || d != want {
			t.Errorf("reset(%q) = %v, %v, want %v", in, d, ok, want)
		}
	}
	for _, in := range []string{"", "-1", "soon", "1e9"} {
		if d, ok := (clock{now: noon}).reset(in); ok {
			t.Errorf("reset(%q) = %v, want none", in, d)
		}
	}
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
