package classify

import (
	"bytes"
	"encoding/json"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// What is kept of the provider's words, in bytes.
const (
	maxID      = 256
	maxMessage = 1024
)

// object is the text of a valid JSON object, or nil. It is searched where it
// lies, so that an answer made of a million fields costs no memory.
type object []byte

var bom = []byte("\xef\xbb\xbf")

// readObject returns nil for what is not, in whole, one JSON object: nothing,
// HTML, a list, JSON that is cut off.
func readObject(body []byte) object {
	body = skipSpace(bytes.TrimPrefix(body, bom))
	if len(body) == 0 || body[0] != '{' || !json.Valid(body) {
		return nil
	}
	return body
}

// path leads to a value: the keys from the outside in.
type path []string

func (p path) String() string { return strings.Join(p, ".") }

// find returns the raw value that p leads to, nil if there is none or it is
// null. Of a list on the way, the first object in which p goes on counts. Of a
// key that is there twice, the last counts, as in encoding/json.
func (o object) find(p path) []byte {
	return find(o, p)
}

func find(v []byte, p path) []byte {
	if len(p) == 0 || len(v) == 0 {
		return v
	}
	switch v[0] {
	case '{':
		return find(member(v, p[0]), p[1:])
	case '[':
		for rest := skipSpace(v[1:]); rest[0] != ']'; {
			end := valueEnd(rest)
			if rest[0] == '{' {
				if found := find(rest[:end], p); found != nil {
					return found
				}
			}
			rest = skipSpace(rest[end:])
			if rest[0] == ',' {
				rest = skipSpace(rest[1:])
			}
		}
	}
	return nil
}

// member returns the raw value of key in the object v, nil if it is not there
// or null.
func member(v []byte, key string) []byte {
	var found []byte
	for rest := skipSpace(v[1:]); rest[0] != '}'; {
		end := valueEnd(rest)
		name := rest[:end]
		rest = skipSpace(rest[end:])
		rest = skipSpace(rest[1:]) // the colon
		end = valueEnd(rest)
		if isKey(name, key) {
			found = rest[:end]
		}
		rest = skipSpace(rest[end:])
		if rest[0] == ',' {
			rest = skipSpace(rest[1:])
		}
	}
	if len(found) > 0 && found[0] == 'n' {
		return nil
	}
	return found
}

func isKey(quoted []byte, key string) bool {
	if inner := quoted[1 : len(quoted)-1]; bytes.IndexByte(inner, '\\') < 0 {
		return string(inner) == key
	}
	return text(quoted, len(key)+utf8.UTFMax) == key
}

// valueEnd returns the length of the value, of valid JSON, that v starts with.
func valueEnd(v []byte) int {
	depth := 0
	for i := 0; ; i++ {
		switch v[i] {
		case '"':
			for i++; v[i] != '"'; i++ {
				if v[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			depth++
			continue
		case '}', ']':
			depth--
		default:
			if depth > 0 {
				continue
			}
			for i+1 < len(v) && !bytes.ContainsRune([]byte(",]} \t\r\n"), rune(v[i+1])) {
				i++
			}
		}
		if depth == 0 {
			return i + 1
		}
	}
}

func skipSpace(v []byte) []byte {
	for len(v) > 0 && (v[0] == ' ' || v[0] == '\t' || v[0] == '\r' || v[0] == '\n') {
		v = v[1:]
	}
	return v
}

// text returns the JSON string raw, cut to limit bytes, or "" for what is not a
// string.
func text(raw []byte, limit int) string {
	if len(raw) == 0 || raw[0] != '"' {
		return ""
	}
	s := raw[1 : len(raw)-1]
	if bytes.IndexByte(s, '\\') < 0 {
		return clip(string(s[:min(len(s), limit+utf8.UTFMax)]), limit)
	}
	var b strings.Builder
	for i := 0; i < len(s) && b.Len() < limit+utf8.UTFMax; i++ {
		if s[i] != '\\' {
			b.WriteByte(s[i])
			continue
		}
		i++
		switch s[i] {
		case 'b':
			b.WriteByte('\b')
		case 'f':
			b.WriteByte('\f')
		case 'n':
			b.WriteByte('\n')
		case 'r':
			b.WriteByte('\r')
		case 't':
			b.WriteByte('\t')
		case 'u':
			r := hex4(s[i+1:])
			i += 4
			if utf16.IsSurrogate(r) && bytes.HasPrefix(s[i+1:], []byte(`\u`)) {
				if pair := utf16.DecodeRune(r, hex4(s[i+3:])); pair != utf8.RuneError {
					r = pair
					i += 6
				}
			}
			b.WriteRune(r) // of half a surrogate pair: U+FFFD
		default: // " \ /
			b.WriteByte(s[i])
		}
	}
	return clip(b.String(), limit)
}

func hex4(s []byte) rune {
	var r rune
	for _, c := range s[:4] {
		switch {
		case c >= 'a':
			c -= 'a' - 10
		case c >= 'A':
			c -= 'A' - 10
		default:
			c -= '0'
		}
		r = r<<4 | rune(c)
	}
	return r
}

// clip cuts s to limit bytes, between characters. Each byte that is no UTF-8
// becomes U+FFFD, as in encoding/json.
func clip(s string, limit int) string {
	// A character that the limit cuts in two must not become several others.
	s = s[:min(len(s), limit+utf8.UTFMax)]
	if !utf8.ValidString(s) {
		s = string([]rune(s))
	}
	if len(s) <= limit {
		return s
	}
	for limit > 0 && !utf8.RuneStart(s[limit]) {
		limit--
	}
	return s[:limit]
}

// number returns the text of a JSON number, "" for what is none.
func number(raw []byte) string {
	if len(raw) == 0 || len(raw) > maxID || raw[0] != '-' && (raw[0] < '0' || raw[0] > '9') {
		return ""
	}
	return string(raw)
}

// scalar returns the text of a string, a number, true or false.
func scalar(raw []byte, limit int) (string, bool) {
	switch {
	case len(raw) == 0 || raw[0] == '{' || raw[0] == '[':
		return "", false
	case raw[0] == '"':
		return text(raw, limit), true
	}
	return string(raw[:min(len(raw), limit)]), true
}
