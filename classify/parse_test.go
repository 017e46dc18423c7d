package classify

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestBuiltins(t *testing.T) {
	want := []string{"apifreaks", "fanfare", "generic", "ofapi", "ofauth", "ofauth-legacy"}
	if got := Builtins(); !slices.Equal(got, want) {
		t.Errorf("Builtins() = %v, want %v", got, want)
	}
	for _, name := range want {
		p, err := Load(name)
		if err != nil || p.Name() != name {
			t.Errorf("Load(%q) = %v, %v", name, p, err)
			continue
		}
		if p.NotFoundEmpty() != (name == "apifreaks") {
			t.Errorf("%s: NotFoundEmpty() = %v", name, p.NotFoundEmpty())
		}
	}
	if _, ok := Builtin("base"); ok {
		t.Error("base is no profile")
	}
}

func TestLoad(t *testing.T) {
	if _, err := Load("ofaut"); err == nil || !strings.Contains(err.Error(), "apifreaks, fanfare, generic") || !strings.Contains(err.Error(), "./my-api.yaml") {
		t.Errorf("an unknown name: %v", err)
	}
	if _, err := Load("./none.yaml"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	file := filepath.Join(t.TempDir(), "acme.yml")
	if err := os.WriteFile(file, []byte("rules: [{status: 404, class: GONE}]"), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	if p.Name() != "acme" {
		t.Errorf("name %q, want that of the file", p.Name())
	}
	f, _ := p.Classify(Answer{Status: 404}, noon)
	if f.Class != Gone || f.Rule != "acme.yml:1: status 404" {
		t.Errorf("%s by %q", f.Class, f.Rule)
	}
}

// TestOwnProfile: an API that no built-in profile covers.
func TestOwnProfile(t *testing.T) {
	p, err := Load("../examples/my-api.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if p.Name() != "my-api" || !p.NotFoundEmpty() {
		t.Errorf("%s, not found empty %v", p.Name(), p.NotFoundEmpty())
	}
	for _, g := range []golden{
		{status: 200, body: `{"ok":true,"error":null}`, want: "success"},
		{status: 200, body: `{"ok":false}`, want: "INVALID_RESPONSE request final"},
		{status: 200, body: `{"ok":false,"error":{"code":88,"wait":3}}`, want: "RATE_LIMIT creator?account retry after 3s code=88"},
		{status: 200, body: `{"error":{"code":"TOO_FAST","wait_ms":250}}`, want: "RATE_LIMIT creator?account retry after 250ms code=TOO_FAST"},
		{status: 200, body: `{"error":{"code":"TOKEN_OLD"}}`, want: "success"},
		{status: 400, body: `{"error":{"code":"TOKEN_OLD"}}`, want: "UNAUTHORIZED account final code=TOKEN_OLD refresh"},
		{status: 400, body: `{"error":{"code":89}}`, want: "VALIDATION request final"},
		{status: 400, body: `{"error_code":"TOO_FAST"}`, want: "RATE_LIMIT creator?account retry after 1m0s code=TOO_FAST"},
		{status: 400, body: `{"error_code":"OTHER"}`, want: "VALIDATION request final"},
		{status: 400, body: `{"error":{"code":"AUTH_NO_KEY"}}`, want: "UNAUTHORIZED account final code=AUTH_NO_KEY"},
		{status: 500, body: `{"error":{"code":"LOGIN_AGAIN"},"meta":{"trace":"t1"}}`, want: "SESSION_EXPIRED creator final code=LOGIN_AGAIN action=log_in_again id=t1"},
		{status: 500, body: `{"error":{"code":"LOGIN_AGAIN","todo":"ask_support"}}`, want: "SESSION_EXPIRED creator final code=LOGIN_AGAIN action=ask_support"},
		{status: 400, body: `{"error":{"fields":[{"name":7},{"name":"age"}]}}`, want: "VALIDATION request final"},
		{status: 400, body: `{"error":{"fields":[{},{"name":"age"}]}}`, want: "VALIDATION request final field=age"},
		{status: 500, body: `{"error":{"temporary":false}}`, headers: []string{"X-Amzn-Trace-Id: r"}, want: "SERVER_ERROR request final id=r"},
		{status: 403, headers: []string{"X-Limit: daily-calls", "X-Quota-Left: 0", "X-Quota-Renews: 60"}, want: "QUOTA_EXCEEDED account final after 1m0s"},
		{status: 403, headers: []string{"X-Limit: none"}, want: "FORBIDDEN request final"},
		{status: 429, headers: []string{"X-Slots: 2", "X-Slots-Used: 2", "X-Come-Back: 1"}, want: "CONCURRENCY_LIMIT request retry after 1s"},
		{status: 503, body: `{"error":{"text":"down for maintenance until 5"}}`, want: "LOCKED provider retry"},
		{status: 503, body: `{"error":{"text":"oops"}}`, want: "SERVER_ERROR provider retry"},
		{status: 526, want: "UPSTREAM_ERROR provider retry"},
		{status: 527, want: "SERVER_ERROR request retry"},
		{status: 501, want: "VALIDATION request final"},
		{status: 418, want: "VALIDATION request final"},
	} {
		f, failed := p.Classify(Answer{Status: g.status, Header: headers(g.headers...), Body: []byte(g.body)}, noon)
		if got := summary(f, failed); got != g.want {
			t.Errorf("%d %s %s\ngot  %s\nwant %s\nby   %s", g.status, g.headers, g.body, got, g.want, f.Rule)
		}
	}
	f, _ := p.Classify(Answer{Err: &net.DNSError{}}, noon)
	if got := summary(f, true); got != "NETWORK_ERROR provider retry" {
		t.Error(got)
	}
}

// TestCodeBeatsStatus, whatever the order in the file.
func TestCodeBeatsStatus(t *testing.T) {
	p, err := Parse("order.yaml", []byte("body: {code: c}\nrules:\n- {status: 401, class: BILLING}\n- {code: X, class: LOCKED}\n- {class: GONE}\n- {code: Y, class: DENIED}"))
	if err != nil {
		t.Fatal(err)
	}
	for body, want := range map[string]Class{`{"c":"X"}`: Locked, `{"c":"Y"}`: Denied, `{"c":"Z"}`: Billing, ``: Billing} {
		if f, _ := p.Classify(Answer{Status: 401, Body: []byte(body)}, noon); f.Class != want {
			t.Errorf("%s: %s, want %s", body, f.Class, want)
		}
	}
	if f, _ := p.Classify(Answer{Status: 500}, noon); f.Class != Gone {
		t.Errorf("500: %s", f.Class)
	}
}

// TestWrongProfiles: each is refused with its place and with what is allowed.
func TestWrongProfiles(t *testing.T) {
	for name, c := range map[string]struct{ file, want string }{
		"empty":             {"", "w.yaml: the profile is empty; it has name, not_found, body, headers, rules"},
		"only a comment":    {"# nothing", "the profile is empty"},
		"two":               {"name: a\n---\nname: b", "w.yaml:3:5: a file holds one profile"},
		"a list":            {"- a", "w.yaml:1:1: a profile is a mapping, with the keys name, not_found, body, headers, rules"},
		"a text":            {"hello", "w.yaml:1:1: a profile is a mapping"},
		"no YAML":           {"rules: [", "w.yaml:1:8: "},
		"twice":             {"name: a\nname: b", `w.yaml:2:1: mapping key "name" already defined`},
		"unknown key":       {"nmae: a", `w.yaml:1:1: unknown key "nmae"; a profile has name,`},
		"unknown in body":   {"body:\n  cod: x", `w.yaml:2:3: unknown key "cod"; body has code, message, request_id, action, field, retryable, retry_after, retry_after_ms`},
		"unknown in header": {"headers:\n  remain: x", `w.yaml:2:3: unknown key "remain"; headers has request_id, retry_after, remaining, reset,`},
		"unknown in rule":   {"rules:\n  - stauts: 4", `w.yaml:2:5: unknown key "stauts"; a rule has code, status, error, body, headers, concurrency, class, scope, action, retryable, refresh, done, code_from, note`},
		"body":              {"body: x", "w.yaml:1:7: body is a mapping"},
		"rules":             {"rules: {status: 4}", "rules is a list"},
		"a rule":            {"rules: [GONE]", "w.yaml:1:9: a rule is a mapping"},
		"null rule":         {"rules: [null]", "there is no value here"},
		"name":              {"name: a b", "w.yaml:1:7: a name has 1 to 64 letters"},
		"not found":         {"not_found: ok", `w.yaml:1:12: unknown not_found "ok"; there are empty, failure`},
		"class":             {"rules:\n  - status: 404\n    class: LOST", `w.yaml:3:12: unknown class "LOST"; there are RATE_LIMIT, CONCURRENCY_LIMIT,`},
		"our class":         {"rules: [{class: EXPIRED}]", `unknown class "EXPIRED"`},
		"no class":          {"rules:\n- scope: creator\n  status: 404", "w.yaml:2:3: the rule has no class; there are RATE_LIMIT,"},
		"scope":             {"rules: [{class: GONE, scope: all}]", `unknown scope "all"; there are request, creator, account, provider`},
		"status":            {"rules: [{class: GONE, status: 99}]", `unknown status "99"; write 404, 4xx, 500-599 or any`},
		"status range":      {"rules: [{class: GONE, status: 599-500}]", `unknown status "599-500"`},
		"status family":     {"rules: [{class: GONE, status: 0xx}]", `unknown status "0xx"`},
		"empty list":        {"rules: [{class: GONE, status: []}]", "an empty list matches nothing"},
		"null":              {"rules: [{class: GONE, status: null}]", "w.yaml:1:23: status has no value; leave it out, or write one"},
		"no value":          {"rules:\n- status:\n  class: GONE", "w.yaml:2:3: status has no value"},
		"not a text":        {"rules: [{class: [GONE]}]", "a text, a number, true or false is expected here, not sequence"},
		"error":             {"rules: [{class: GONE, error: tiemout}]", `unknown error "tiemout"; there are timeout, connect_timeout, read_timeout, refused, reset, broken_pipe, eof, dns, unreachable, tls, invalid, local, other`},
		"error and status":  {"rules: [{class: GONE, error: dns, status: 404}]", "it goes with no other condition"},
		"flag":              {"rules: [{class: GONE, retryable: maybe}]", "true or false is expected here"},
		"alias":             {"name: &a x\nrules: [{class: *a}]", "anchors, aliases and tags are not supported"},
		"star in between":   {"body: {code: c}\nrules: [{class: GONE, code: A*B}]", `a * stands for anything only at the start or the end of "A*B"`},
		"code, but where":   {"rules: [{class: GONE, code: A}]", "no code can match: say where in the body it is"},
		"place":             {"body: {code: a..b}", `"a..b" leads nowhere`},
		"header":            {"headers: {credits: 'X Cost'}", `"X Cost" is not the name of an HTTP header`},
		"half a window":     {"name: a\nheaders:\n  reset: X-R", "w.yaml:3:3: remaining and reset go together"},
		"no slots":          {"rules: [{class: CONCURRENCY_LIMIT, concurrency: reached}]", "needs headers.concurrency_limit and headers.concurrency_active"},
		"concurrency":       {"rules: [{class: CONCURRENCY_LIMIT, concurrency: high}]", `unknown concurrency "high"; there are reached`},
		"every success":     {"rules: [{class: GONE, status: any}]", "the rule makes a failure of every success"},
		"refresh":           {"rules: [{class: GONE, refresh: true}]", "refresh is for credentials"},
		"no condition":      {"rules: [{class: GONE, body: {}}]", "the condition body is empty"},
		"condition":         {"rules: [{class: GONE, body: DENIED}]", "the condition body is a mapping"},
		"never":             {"rules:\n- {status: 4xx, class: GONE}\n- {status: [404, 410], class: GONE}", "w.yaml:3:4: the rule can never match: the one in line 2 comes first"},
		"never, after all":  {"rules:\n- {class: GONE}\n- {status: 404, body: {a: b}, class: GONE}", "w.yaml:3:4: the rule can never match: the one in line 2"},
	} {
		p, err := Parse("w.yaml", []byte(c.file))
		if err == nil {
			t.Errorf("%s: accepted as %+v", name, p)
			continue
		}
		if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s:\n%v\nlacks\n%s", name, err, c.want)
		}
		var at *ParseError
		if errors.As(err, &at) && !strings.Contains(err.Error(), "^") {
			t.Errorf("%s: no caret in\n%v", name, err)
		}
	}
	_, err := Parse("w.yaml", []byte("rules:\n  - status: 404\n    class: LOST"))
	want := "w.yaml:3:12: unknown class \"LOST\"; there are " + join(ruleClasses) + `
   1 | rules:
   2 |   - status: 404
>  3 |     class: LOST
                  ^`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}

// TestDocumented: the reference names every key, class, scope and error, and its example works.
func TestDocumented(t *testing.T) {
	data, err := os.ReadFile("../docs/profiles.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(data)
	words := slices.Concat(keysOf[profileFile](), keysOf[bodyFile](), keysOf[headersFile](), keysOf[ruleFile](), Builtins())
	for _, c := range ruleClasses {
		words = append(words, string(c))
	}
	for _, s := range scopes {
		words = append(words, string(s))
	}
	for _, e := range causes {
		words = append(words, string(e))
	}
	for _, w := range words {
		if !strings.Contains(doc, "`"+w+"`") {
			t.Errorf("docs/profiles.md does not explain `%s`", w)
		}
	}
	_, example, _ := strings.Cut(doc, "```yaml\n")
	example, _, _ = strings.Cut(example, "```")
	if _, err := Parse("docs.yaml", []byte(example)); err != nil || example == "" {
		t.Errorf("its example: %v", err)
	}
}
