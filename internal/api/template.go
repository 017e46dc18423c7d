package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/headgate-io/headgate/publisher"
)

// template is text with {name}s in it: literals and names in turn, a literal
// first.
type template []string

func parseTemplate(s string) (template, error) {
	var t template
	for {
		literal, rest, found := strings.Cut(s, "{")
		if strings.Contains(literal, "}") {
			return nil, fmt.Errorf("%q has a } without a {", s)
		}
		t = append(t, literal)
		if !found {
			return t, nil
		}
		name, after, closed := strings.Cut(rest, "}")
		if !closed || name == "" || strings.ContainsAny(name, "{/?") {
			return nil, fmt.Errorf("%q: a placeholder is {name}", s)
		}
		t = append(t, name)
		s = after
	}
}

// escapeLiterals percent-encodes the bytes of a path's literals that cannot stand in a
// path. A percent sign in them starts an encoded byte.
func (t template) escapeLiterals() error {
	for i := 0; i < len(t); i += 2 {
		if _, err := url.PathUnescape(t[i]); err != nil {
			return fmt.Errorf("in %q a %% is followed by no two hexadecimal digits; write %%25 for a percent sign", t[i])
		}
		var b strings.Builder
		for _, c := range []byte(t[i]) {
			if c <= ' ' || c >= 0x7f || strings.IndexByte("\"<>\\^`{|}?#", c) >= 0 {
				fmt.Fprintf(&b, "%%%02X", c)
			} else {
				b.WriteByte(c)
			}
		}
		t[i] = b.String()
	}
	return nil
}

// fields reports whether a name is one of the payload's.
func (t template) fields() bool {
	for i := 1; i < len(t); i += 2 {
		if t[i] != "creator" && t[i] != "operation" {
			return true
		}
	}
	return false
}

func (t template) fill(v *values, escape func(string) (string, error)) (string, error) {
	var b strings.Builder
	for i, part := range t {
		if i%2 == 0 {
			b.WriteString(part)
			continue
		}
		value, err := v.get(part)
		if err != nil {
			return "", err
		}
		if value, err = escape(value); err != nil {
			return "", fmt.Errorf("{%s}: %w", part, err)
		}
		b.WriteString(value)
	}
	return b.String(), nil
}

// pathSegment escapes a value so that it stays one segment: a request must
// not choose another endpoint.
func pathSegment(s string) (string, error) {
	if s == "" || s == "." || s == ".." {
		return "", fmt.Errorf("%q cannot stand in a path", s)
	}
	return url.PathEscape(s), nil
}

func anyText(s string) (string, error) { return s, nil }

// values are what a request fills a template with.
type values struct {
	request *publisher.Request
	fields  map[string]json.RawMessage
}

func (v *values) readFields() error {
	if err := json.Unmarshal(v.request.Payload, &v.fields); err != nil {
		return fmt.Errorf("operation %s needs fields of the payload, so the payload must be a JSON object: %w",
			v.request.Operation, withoutValue(err))
	}
	return nil
}

func (v *values) get(name string) (string, error) {
	switch name {
	case "creator":
		return v.request.Creator, nil
	case "operation":
		return v.request.Operation, nil
	}
	raw, ok := v.fields[name]
	if !ok || string(raw) == "null" {
		return "", fmt.Errorf("operation %s needs the field %q, which the payload lacks", v.request.Operation, name)
	}
	switch raw[0] {
	case '"':
		var s string
		err := json.Unmarshal(raw, &s)
		return s, err
	case '{', '[':
		return "", fmt.Errorf("the field %q must be a string, a number or a boolean", name)
	}
	return string(raw), nil // a number or a boolean, as it was written
}

// withoutValue keeps what is wrong and leaves out what was found.
func withoutValue(err error) error {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &kind):
		return fmt.Errorf("found a JSON %s", kind.Value)
	case errors.As(err, &syntax):
		return fmt.Errorf("not JSON at byte %d", syntax.Offset)
	}
	return errors.New("not JSON")
}
