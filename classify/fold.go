package classify

import (
	"bytes"
	"strings"
	"unicode"
	"unicode/utf8"
)

// fold makes one text of the spellings of a code: SESSION_EXPIRED, session-expired,
// "Session expired" and sessionExpired are the same.
func fold(s string) string {
	if !strings.ContainsFunc(s, func(r rune) bool { return separates(r) || unicode.ToLower(r) != r }) {
		return s
	}
	return strings.Map(func(r rune) rune {
		if separates(r) {
			return -1
		}
		return unicode.ToLower(r)
	}, s)
}

func separates(r rune) bool { return r == ' ' || r == '-' || r == '_' }

// foldsTo reports whether v folds to the folded ASCII text, without making a copy.
func foldsTo(v []byte, text string) bool {
	n, ok := foldPrefix(v, text)
	return ok && len(bytes.TrimLeft(v[n:], " -_")) == 0
}

// foldPrefix reports whether v starts with what folds to text, and how long that is.
func foldPrefix(v []byte, text string) (int, bool) {
	i := 0
	for j := range len(text) {
		for i < len(v) && separates(rune(v[i])) {
			i++
		}
		if i == len(v) || lower(v[i]) != text[j] {
			return 0, false
		}
		i++
	}
	return i, true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}

// mayContainFolded is a cheap look whether body may have a part that folds to text. Of
// a text that is not ASCII it errs on the side of yes.
func mayContainFolded(body []byte, text string) bool {
	if text == "" || strings.ContainsFunc(text, func(r rune) bool { return r >= utf8.RuneSelf }) {
		return true
	}
	for i, c := range body {
		if lower(c) == text[0] {
			if _, ok := foldPrefix(body[i:], text); ok {
				return true
			}
		}
	}
	return false
}
