package publisher

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// maxToken is the longest encoded subject token, in bytes. NATS has no limit of
// its own, but a token of 5,000 bytes makes a server close the connection.
const maxToken = 128

// checkName refuses names that would not stay one-to-one on their way to the API, or that were
// not meant as a name. HTTP trims blanks at the ends and has no place for control bytes, JSON
// none for invalid UTF-8, and * and > are wildcards.
func checkName(s string) error {
	switch {
	case s == "":
		return errors.New("a name must not be empty")
	case s == "*" || s == ">":
		return fmt.Errorf("%q is a wildcard, not a name", s)
	case strings.Trim(s, " \t") != s:
		return fmt.Errorf("name %q must not begin or end with a blank", clip(s, 40))
	case !utf8.ValidString(s):
		return fmt.Errorf("name %q must be UTF-8", clip(s, 40))
	}
	for i := range len(s) {
		if s[i] < ' ' || s[i] == 0x7f {
			return fmt.Errorf("name %q must not have control bytes", clip(s, 40))
		}
	}
	return nil
}

// EncodeToken turns a name into a subject token that is also a valid key of a
// bucket: each byte outside [A-Za-z0-9_-] becomes =XX, its value in upper-case
// hex. It refuses what is no name, and what is longer than 128 bytes once encoded.
func EncodeToken(s string) (string, error) {
	plain := 0
	for plain < len(s) && plainByte(s[plain]) {
		plain++
	}
	if plain == len(s) && plain > 0 && plain <= maxToken {
		return s, nil
	}
	if err := checkName(s); err != nil {
		return "", err
	}
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; plainByte(c) {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "=%02X", c)
		}
		if b.Len() > maxToken {
			return "", fmt.Errorf("name %q is too long: it may have %d bytes, each outside [A-Za-z0-9_-] counted as 3", clip(s, 40), maxToken)
		}
	}
	return b.String(), nil
}

// DecodeToken reverses EncodeToken. It takes no other spelling, so that two
// subjects never name one creator.
func DecodeToken(token string) (string, error) {
	if token == "" || len(token) > maxToken {
		return "", fmt.Errorf("token %q must have 1 to %d bytes", clip(token, 40), maxToken)
	}
	var b strings.Builder
	for i := 0; i < len(token); i++ {
		c := token[i]
		if plainByte(c) {
			b.WriteByte(c)
			continue
		}
		if c == '=' && i+2 < len(token) {
			value, err := hex.DecodeString(token[i+1 : i+3])
			if err == nil && !plainByte(value[0]) && token[i+1:i+3] == strings.ToUpper(token[i+1:i+3]) {
				b.WriteByte(value[0])
				i += 2
				continue
			}
		}
		return "", fmt.Errorf("token %q: byte %d must be one of A-Z a-z 0-9 _ - or start =XX, the upper-case hex of any other byte", clip(token, 40), i)
	}
	if err := checkName(b.String()); err != nil {
		return "", fmt.Errorf("token %q: %w", token, err)
	}
	return b.String(), nil
}

// IDToken is the subject token, and key, of a request id: encoded like a name, or,
// when that is too long, its SHA-256 in hex. The id must not be empty.
func IDToken(id string) string {
	token, err := EncodeToken(id)
	if err != nil {
		sum := sha256.Sum256([]byte(id))
		return hex.EncodeToString(sum[:])
	}
	return token
}

func plainByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '_' || c == '-'
}

// clip shortens what came from outside for a message to people.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return s[:n] + "…"
}
