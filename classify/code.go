package classify

import (
	"net/http"
	"slices"
	"strings"
)

// readCode returns the provider's code. Where the profile says to look first, any
// text is one; a number, and a text at another place of the profile, only if a rule
// names it. A failure's code is looked for deeper, too, where the profile does not expect it.
func (p *Profile) readCode(o object, failed bool) string {
	for i, at := range p.code {
		raw := o.find(at)
		if s := text(raw, maxID); s != "" && (i == 0 || p.named(s)) {
			return s
		}
		if s := number(raw); s != "" && p.named(s) {
			return s
		}
	}
	if !failed || len(p.code) == 0 {
		return ""
	}
	return search(o, codeKeys, p.named)
}

func (p *Profile) named(code string) bool {
	folded := fold(code)
	return slices.ContainsFunc(p.rules, func(r *rule) bool {
		return slices.ContainsFunc(r.codes, func(c pattern) bool { return c.names(code, folded) })
	})
}

// Keys, folded, under which APIs put their codes and the action that is needed.
var (
	codeKeys   = []string{"code", "errorcode", "type", "errortype", "error", "err", "reason", "name", "kind"}
	actionKeys = []string{"action", "actionrequired", "requiredaction", "actionneeded", "nextaction", "todo"}
)

// How far search goes.
const (
	maxDepth = 3
	maxFound = 100
)

// search looks for a text or a number that wanted takes, under one of keys, in the object o
// and in those within it, the outer ones first.
func search(o object, keys []string, wanted func(string) bool) string {
	found := 0
	for depth := range maxDepth {
		var result string
		walk(o, depth, func(key, raw []byte) bool {
			if !slices.ContainsFunc(keys, func(k string) bool { return foldsTo(key, k) }) {
				return true
			}
			s := text(raw, maxID)
			if s == "" {
				s = number(raw)
			}
			if s == "" {
				return true
			}
			if wanted(s) {
				result = s
			}
			found++
			return result == "" && found < maxFound
		})
		if result != "" || found >= maxFound {
			return result
		}
	}
	return ""
}

// walk visits the members of the objects that lie depth objects deep in v, until visit
// returns false; it reports whether that never happened. Lists do not count.
func walk(v []byte, depth int, visit func(key, raw []byte) bool) bool {
	if len(v) == 0 || v[0] != '{' && v[0] != '[' {
		return true
	}
	list := v[0] == '['
	for rest := skipSpace(v[1:]); rest[0] != ']' && rest[0] != '}'; {
		var key []byte
		end := valueEnd(rest)
		if !list {
			key = rest[1 : end-1]
			rest = skipSpace(skipSpace(rest[end:])[1:]) // the colon
			end = valueEnd(rest)
		}
		raw, going := rest[:end], true
		switch {
		case list && raw[0] == '{':
			going = walk(raw, depth, visit)
		case list:
		case depth == 0:
			going = visit(key, raw)
		default:
			going = walk(raw, depth-1, visit)
		}
		if !going {
			return false
		}
		if rest = skipSpace(rest[end:]); rest[0] == ',' {
			rest = skipSpace(rest[1:])
		}
	}
	return true
}

// mayBeSession reports whether an answer that r matches can be about the creator's session.
func (r *rule) mayBeSession(c *call) bool {
	return c.status == http.StatusUnauthorized && (r.class == Unauthorized || r.class == NotFound) && r.scope != ScopeRequest
}

// noticeSession makes SESSION_EXPIRED of a 401 that names the creator's session or connection,
// by its code or by the action that it asks for: that says nothing about the key, whatever else
// the answer says.
func (p *Profile) noticeSession(f *Failure, c *call) {
	code, action := f.Code, f.Action
	if !namesSession(code) && c.body != nil {
		code = search(c.body, codeKeys, namesSession)
	}
	if !demandsSession(action) && c.body != nil {
		action = search(c.body, actionKeys, demandsSession)
	}
	if !namesSession(code) && !demandsSession(action) {
		return
	}
	f.Class, f.Scope, f.Suspect, f.Retryable = SessionExpired, ScopeCreator, "", false
	f.Rule += "; it names the session"
	if f.Code == "" {
		f.Code = code
	}
	if f.Action == "" {
		f.Action = action
	}
}

// Parts, folded, of the codes and actions that speak of a creator's session or connection.
var (
	sessionWords = []string{
		"session", "connection", "reconnect", "disconnect", "notconnected", "relink", "unlinked", "notlinked", "linkexpired", "linkrevoked",
		"reauth", "relogin", "loginrequired", "loginagain", "loginneeded", "loginexpired", "needslogin", "mustlogin", "loggedout", "notloggedin",
		"signinrequired", "signinagain", "signedout", "notsignedin",
	}
	loginActions = []string{"login", "signin", "logon", "authenticate", "link", "linkaccount", "connect", "connectaccount"}
	keyWords     = []string{"apikey", "secretkey", "accesskey", "signature", "clientsecret"}
)

// maxCode tells codes, which may be a few words, from sentences.
const maxCode = 48

// namesSession reports whether a code is about the creator's session. A sentence is no code.
func namesSession(code string) bool {
	if code == "" || len(code) > maxCode || strings.Count(code, " ") > 4 || strings.ContainsAny(code, "<>{}") {
		return false
	}
	folded := fold(code)
	in := func(word string) bool { return strings.Contains(folded, word) }
	return slices.ContainsFunc(sessionWords, in) && !slices.ContainsFunc(keyWords, in)
}

// demandsSession reports whether an action is about the creator's session.
func demandsSession(action string) bool {
	return namesSession(action) || slices.Contains(loginActions, fold(action))
}
