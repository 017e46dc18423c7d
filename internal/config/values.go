package config

import (
	"encoding"
	"fmt"
	"math"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"

	"github.com/headgate-io/headgate/resilience"
)

// Rate is a number of calls in a time, written 60/m, 10/s, 600/h, 5000/d, or
// inf for no limit.
type Rate struct {
	Calls float64
	Per   time.Duration
}

// Unlimited is no limit.
var Unlimited = Rate{Calls: math.Inf(1), Per: time.Second}

// ParseRate reads a rate.
func ParseRate(s string) (Rate, error) {
	calls, per, err := resilience.ParseRate(s)
	return Rate{calls, per}, err
}

// PerSecond is 0 without a limit.
func (r Rate) PerSecond() float64 {
	if r.Per == 0 || math.IsInf(r.Calls, 1) {
		return 0
	}
	return r.Calls / r.Per.Seconds()
}

func (r Rate) String() string {
	if r.PerSecond() == 0 {
		return "inf"
	}
	unit := map[time.Duration]string{time.Second: "s", time.Minute: "m", time.Hour: "h", 24 * time.Hour: "d"}[r.Per]
	if unit == "" {
		return strconv.FormatFloat(r.PerSecond(), 'g', -1, 64) + "/s"
	}
	return strconv.FormatFloat(r.Calls, 'g', -1, 64) + "/" + unit
}

// MarshalText is String.
func (r Rate) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText is ParseRate.
func (r *Rate) UnmarshalText(text []byte) (err error) {
	*r, err = ParseRate(string(text))
	return err
}

// UnmarshalYAML is UnmarshalText, with the place of what is wrong.
func (r *Rate) UnmarshalYAML(node ast.Node) error { return fromNode(node, r) }

// fromNode reads a scalar of the file.
func fromNode(node ast.Node, into encoding.TextUnmarshaler) error {
	if err := into.UnmarshalText([]byte(node.GetToken().Value)); err != nil {
		return &yaml.SyntaxError{Message: err.Error(), Token: node.GetToken()}
	}
	return nil
}

// Size is a number of bytes, written 16MiB, 512KiB or 1000.
type Size int64

var sizeUnits = []struct {
	suffix string
	bytes  int64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"", 1}}

// ParseSize reads a size.
func ParseSize(s string) (Size, error) {
	for _, u := range sizeUnits {
		if number, ok := strings.CutSuffix(s, u.suffix); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
			if err != nil || n < 0 || n > math.MaxInt64/u.bytes {
				break
			}
			return Size(n * u.bytes), nil
		}
	}
	return 0, fmt.Errorf("a size is bytes, such as 16MiB, 512KiB or 1000; not %q", s)
}

func (s Size) String() string {
	for _, u := range sizeUnits {
		if s != 0 && int64(s)%u.bytes == 0 {
			return strconv.FormatInt(int64(s)/u.bytes, 10) + u.suffix
		}
	}
	return strconv.FormatInt(int64(s), 10)
}

// MarshalText is String.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is ParseSize.
func (s *Size) UnmarshalText(text []byte) (err error) {
	*s, err = ParseSize(string(text))
	return err
}

// UnmarshalYAML is UnmarshalText, with the place of what is wrong.
func (s *Size) UnmarshalYAML(node ast.Node) error { return fromNode(node, s) }

func redactURL(s string) string {
	var out []string
	for part := range strings.SplitSeq(s, ",") {
		u, err := url.Parse(strings.TrimSpace(part))
		switch {
		case err != nil:
			part = "[redacted]"
		case u.User != nil:
			// A user without a password is a token.
			u.User = url.User("[redacted]")
			part, _ = url.PathUnescape(u.String())
		}
		out = append(out, part)
	}
	return strings.Join(out, ",")
}
