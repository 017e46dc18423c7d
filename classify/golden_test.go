package classify

import (
	"cmp"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

var noon = time.Date(2026, time.March, 1, 12, 0, 0, 0, time.UTC)

// headers makes headers of "Name: value" lines.
func headers(lines ...string) http.Header {
	h := http.Header{}
	for _, line := range lines {
		name, value, _ := strings.Cut(line, ":")
		h.Add(name, strings.TrimSpace(value))
	}
	return h
}

func profileOf(t testing.TB, name string) *Profile {
	t.Helper()
	p, ok := Builtin(name)
	if !ok {
		t.Fatalf("no profile %q", name)
	}
	return p
}

// summary is class, scope and the wider one that is suspected, "retry" or "final", and what else there is.
func summary(f Failure, failed bool) string {
	if !failed {
		return "success"
	}
	scope := string(f.Scope)
	if f.Suspect != "" {
		scope += "?" + string(f.Suspect)
	}
	s := fmt.Sprintf("%s %s %s", f.Class, scope, map[bool]string{true: "retry", false: "final"}[f.Retryable])
	if f.RetryAfterKnown {
		s += " after " + f.RetryAfter.String()
	}
	for _, extra := range []struct{ name, value string }{
		{"code", f.Code}, {"action", f.Action}, {"field", f.Field}, {"id", f.RequestID},
	} {
		if extra.value != "" {
			s += " " + extra.name + "=" + extra.value
		}
	}
	if f.Refresh {
		s += " refresh"
	}
	return s
}

type golden struct {
	status  int
	body    string
	headers []string
	want    string
}

// TestGolden holds every code, type and status that the built-in profiles know.
func TestGolden(t *testing.T) {
	code := func(c string) string { return `{"error":"words","code":"` + c + `"}` }
	kind := func(c string) string { return `{"error":"words","type":"` + c + `","requestId":"req_1"}` }
	retryAfter := func(s string) []string { return []string{"Retry-After: " + s} }
	for profile, rows := range map[string][]golden{
		"ofapi": {
			{status: 400, want: "VALIDATION request final"},
			{status: 422, want: "VALIDATION request final"},
			{status: 401, want: "UNAUTHORIZED creator?account final"},
			{status: 402, want: "BILLING account final"},
			{status: 403, want: "FORBIDDEN request final"},
			{status: 404, want: "NOT_FOUND request final"},
			{status: 410, want: "GONE request final"},
			{status: 429, want: "RATE_LIMIT creator?account retry after 1m0s"},
			{status: 429, headers: retryAfter("7"), want: "RATE_LIMIT creator?account retry after 7s"},
			{status: 429, headers: retryAfter("0"), want: "RATE_LIMIT creator?account retry after 0s"},
			{status: 500, want: "SERVER_ERROR request retry"},
			{status: 502, want: "SERVER_ERROR provider retry"},
			{status: 503, want: "SERVER_ERROR provider retry"},
			{status: 504, want: "SERVER_ERROR provider retry"},
			{status: 501, want: "SERVER_ERROR request retry"},
			{status: 520, want: "SERVER_ERROR request retry"},
			{status: 599, want: "SERVER_ERROR request retry"},
			{status: 0, want: "UNKNOWN request retry"},
			{status: -1, want: "UNKNOWN request retry"},
			{status: 101, want: "UNKNOWN request retry"},
			{status: 302, want: "UNKNOWN request retry"},
			{status: 408, want: "UNKNOWN request retry"},
			{status: 409, want: "UNKNOWN request retry"},
			{status: 418, want: "UNKNOWN request retry"},
			{status: 600, want: "UNKNOWN request retry"},
			{status: 200, want: "success"},
			{status: 204, want: "success"},
			{status: 299, want: "success"},
		},
		"ofauth-legacy": {
			{status: 401, body: code("AUTH_INVALID_KEY"), want: "UNAUTHORIZED account final code=AUTH_INVALID_KEY"},
			{status: 401, body: code("AUTH_KEY_EXPIRED"), want: "UNAUTHORIZED account final code=AUTH_KEY_EXPIRED"},
			{status: 403, body: code("AUTH_INSUFFICIENT_SCOPE"), want: "FORBIDDEN request final code=AUTH_INSUFFICIENT_SCOPE"},
			{status: 404, body: code("AUTH_CONNECTION_NOT_FOUND"), want: "NOT_FOUND creator final code=AUTH_CONNECTION_NOT_FOUND action=relink_connection"},
			{status: 404, body: code("CONNECTION_NOT_FOUND"), want: "NOT_FOUND creator final code=CONNECTION_NOT_FOUND action=relink_connection"},
			{status: 401, body: code("AUTH_SESSION_EXPIRED"), want: "SESSION_EXPIRED creator final code=AUTH_SESSION_EXPIRED action=relink_connection"},
			{status: 401, body: code("CONNECTION_EXPIRED"), want: "SESSION_EXPIRED creator final code=CONNECTION_EXPIRED action=relink_connection"},
			{status: 422, body: `{"code":"VALIDATION_REQUIRED_FIELD","details":{"field":"name"}}`, want: "VALIDATION request final code=VALIDATION_REQUIRED_FIELD field=name"},
			{status: 422, body: `{"code":"VALIDATION_INVALID_FORMAT","details":{"field":"date"}}`, want: "VALIDATION request final code=VALIDATION_INVALID_FORMAT field=date"},
			{status: 422, body: `{"code":"VALIDATION_INVALID_VALUE","details":{"field":"limit"}}`, want: "VALIDATION request final code=VALIDATION_INVALID_VALUE field=limit"},
			{status: 422, body: `{"code":"VALIDATION_FIELD_TOO_LONG","details":{"field":"text"}}`, want: "VALIDATION request final code=VALIDATION_FIELD_TOO_LONG field=text"},
			{status: 429, body: code("RATE_LIMIT_EXCEEDED"), want: "RATE_LIMIT creator?account retry after 1m0s code=RATE_LIMIT_EXCEEDED"},
			{status: 429, body: code("RATE_LIMIT_EXCEEDED"), headers: []string{"X-RateLimit-Retry-After: 12"}, want: "RATE_LIMIT creator?account retry after 12s code=RATE_LIMIT_EXCEEDED"},
			{status: 429, body: code("RATE_LIMIT_QUOTA_EXCEEDED"), want: "QUOTA_EXCEEDED account final code=RATE_LIMIT_QUOTA_EXCEEDED"},
			{status: 429, body: code("RATE_LIMIT_QUOTA_EXCEEDED"), headers: []string{"X-RateLimit-Retry-After: 3600"}, want: "QUOTA_EXCEEDED account final after 1h0m0s code=RATE_LIMIT_QUOTA_EXCEEDED"},
			{status: 400, body: code("CONNECTION_INVALID_STATE"), want: "VALIDATION request final code=CONNECTION_INVALID_STATE"},
			{status: 403, body: code("CONNECTION_LIMIT_EXCEEDED"), want: "FORBIDDEN request final code=CONNECTION_LIMIT_EXCEEDED"},
			{status: 502, body: code("UPSTREAM_UNAVAILABLE"), want: "UPSTREAM_ERROR provider retry code=UPSTREAM_UNAVAILABLE"},
			{status: 504, body: code("UPSTREAM_TIMEOUT"), want: "UPSTREAM_ERROR provider retry code=UPSTREAM_TIMEOUT"},
			{status: 502, body: code("UPSTREAM_INVALID_RESPONSE"), want: "UPSTREAM_ERROR provider retry code=UPSTREAM_INVALID_RESPONSE"},
			{status: 429, body: code("UPSTREAM_RATE_LIMITED"), want: "RATE_LIMIT creator retry after 1m0s code=UPSTREAM_RATE_LIMITED"},
			{status: 503, body: code("RULES_OUTDATED"), want: "RULES_OUTDATED provider retry code=RULES_OUTDATED"},
			{status: 503, body: code("RULES_UNAVAILABLE"), want: "SERVER_ERROR provider retry code=RULES_UNAVAILABLE"},
			{status: 401, body: code("RULES_INVALID_SIGNATURE"), want: "UNAUTHORIZED request final code=RULES_INVALID_SIGNATURE"},
			{status: 500, body: code("NEW_CODE"), want: "SERVER_ERROR request retry code=NEW_CODE"},
			{status: 401, want: "UNAUTHORIZED creator?account final"},
			{status: 401, body: code("AUTH_NEW"), want: "UNAUTHORIZED creator?account final code=AUTH_NEW"},
			{status: 200, body: code("AUTH_INVALID_KEY"), want: "success"},
		},
		"ofauth": {
			{status: 401, body: kind("UNAUTHORIZED"), want: "UNAUTHORIZED account final code=UNAUTHORIZED id=req_1"},
			{status: 401, body: kind("SESSION_NOT_PROVIDED"), want: "SESSION_EXPIRED creator final code=SESSION_NOT_PROVIDED action=relink_connection id=req_1"},
			{status: 401, body: kind("SESSION_EXPIRED"), want: "SESSION_EXPIRED creator final code=SESSION_EXPIRED action=relink_connection id=req_1"},
			{status: 403, body: kind("FORBIDDEN"), want: "FORBIDDEN request final code=FORBIDDEN id=req_1"},
			{status: 401, body: kind("RULES_OUTDATED"), want: "RULES_OUTDATED request retry code=RULES_OUTDATED id=req_1"},
			{status: 400, body: kind("BAD_REQUEST"), want: "VALIDATION request final code=BAD_REQUEST id=req_1"},
			{status: 404, body: kind("RESOURCE_NOT_FOUND"), want: "NOT_FOUND request final code=RESOURCE_NOT_FOUND id=req_1"},
			{status: 404, body: kind("ROUTE_NOT_FOUND"), want: "NOT_FOUND request final code=ROUTE_NOT_FOUND id=req_1"},
			{status: 429, body: kind("RATE_LIMIT_EXCEEDED"), want: "RATE_LIMIT creator?account retry after 1m0s code=RATE_LIMIT_EXCEEDED id=req_1"},
			{status: 429, body: kind("RATE_LIMIT_EXCEEDED"), headers: retryAfter("30"), want: "RATE_LIMIT creator?account retry after 30s code=RATE_LIMIT_EXCEEDED id=req_1"},
			{status: 502, body: kind("UPLOAD_ERROR"), want: "UPSTREAM_ERROR provider retry code=UPLOAD_ERROR id=req_1"},
			{status: 500, body: kind("UNKNOWN_ERROR"), want: "SERVER_ERROR request retry code=UNKNOWN_ERROR id=req_1"},
			{status: 503, body: kind("UNKNOWN_ERROR"), want: "SERVER_ERROR provider retry code=UNKNOWN_ERROR id=req_1"},
			{status: 502, body: kind("PROXY_ERROR"), want: "UPSTREAM_ERROR provider retry code=PROXY_ERROR id=req_1"},
			{status: 503, body: kind("NETWORK_ERROR"), want: "NETWORK_ERROR provider retry code=NETWORK_ERROR id=req_1"},
			{status: 401, body: `{"type":"SESSION_EXPIRED","actionRequired":"relink_connection"}`, want: "SESSION_EXPIRED creator final code=SESSION_EXPIRED action=relink_connection"},
			{status: 403, body: `{"type":"FORBIDDEN","actionRequired":"verify_identity"}`, want: "FORBIDDEN request final code=FORBIDDEN action=verify_identity"},
			{status: 401, body: `{"type":"RULES_OUTDATED","actionRequired":"refresh_rules"}`, want: "RULES_OUTDATED request retry code=RULES_OUTDATED action=refresh_rules"},
			{status: 500, body: `{"type":"UNKNOWN_ERROR","actionRequired":"try_again"}`, want: "SERVER_ERROR request retry code=UNKNOWN_ERROR action=try_again"},
			{status: 401, body: `{"type":"SESSION_EXPIRED","actionRequired":"refresh_session"}`, want: "SESSION_EXPIRED creator final code=SESSION_EXPIRED action=refresh_session"},
			{status: 403, body: kind("SOMETHING_NEW"), want: "FORBIDDEN request final code=SOMETHING_NEW id=req_1"},
			{status: 403, body: kind("session_expired"), want: "SESSION_EXPIRED creator final code=session_expired action=relink_connection id=req_1"},
		},
		"fanfare": {
			{status: 400, body: `{"error":"Validation failed","details":[{"field":"email","message":"Invalid"},{"field":"capacity","message":"Positive"}]}`, want: "VALIDATION request final field=email"},
			{status: 400, body: `{"error":"x","details":[{"message":"first has none"},{"field":"slug"}]}`, want: "VALIDATION request final field=slug"},
			{status: 400, body: `{"error":"x","code":"FP001"}`, want: "VALIDATION request final code=FP001"},
			{status: 403, body: `{"error":"x","code":"FP002"}`, want: "FORBIDDEN request final code=FP002"},
			{status: 401, body: `{"error":"Authentication required"}`, want: "UNAUTHORIZED account final refresh"},
			{status: 401, body: `{"error":"Secret key required"}`, want: "UNAUTHORIZED account final"},
			{status: 401, body: `{"error":"invalid refresh token"}`, want: "UNAUTHORIZED account final"},
			{status: 401, body: `{"error":"otp_expired"}`, want: "UNAUTHORIZED request final code=otp_expired"},
			{status: 401, body: `{"error":"x","code":"otp_invalid"}`, want: "UNAUTHORIZED request final code=otp_invalid"},
			{status: 403, body: `{"error":"Forbidden"}`, want: "FORBIDDEN request final"},
			{status: 404, headers: []string{"X-Request-Id: abc"}, want: "NOT_FOUND request final id=abc"},
			{status: 409, want: "CONFLICT request final"},
			{status: 413, want: "PAYLOAD_TOO_LARGE request final"},
			{status: 423, want: "LOCKED request retry"},
			{status: 423, headers: retryAfter("2026-03-01T12:05:00Z"), want: "LOCKED request retry after 5m0s"},
			{status: 429, body: `{"error":"Queue is full"}`, want: "RATE_LIMIT creator?account retry after 1m0s"},
			{status: 429, body: `{"error":"x","retryAfter":45}`, want: "RATE_LIMIT creator?account retry after 45s"},
			{status: 429, body: `{"error":"x","retryAfter":45}`, headers: retryAfter("50"), want: "RATE_LIMIT creator?account retry after 50s"},
			{status: 429, headers: []string{"X-RateLimit-Remaining: 0", "X-RateLimit-Reset: 1772366490"}, want: "RATE_LIMIT creator?account retry after 1m30s"},
			{status: 429, headers: []string{"X-RateLimit-Reset: 90"}, want: "RATE_LIMIT creator?account retry after 1m30s"},
			{status: 429, headers: []string{"X-RateLimit-Remaining: 3", "X-RateLimit-Reset: 90"}, want: "RATE_LIMIT creator?account retry after 1m0s"},
			{status: 500, want: "SERVER_ERROR request retry"},
			{status: 503, want: "SERVER_ERROR provider retry"},
			{status: 200, body: `{"status":"DENIED","denyReason":"limit"}`, want: "DENIED request final code=limit"},
			{status: 403, body: `{"status":"DENIED","denyReason":"limit"}`, want: "DENIED request final code=limit"},
			{status: 503, body: `{"denyReason":null, "status" : "\u0044ENIED"}`, want: "DENIED request final"},
			{status: 200, body: `{"denyReason":null, "status" : "\u0044ENIED"}`, want: "DENIED request final"},
			{status: 200, body: `{"status":"Denied","denyReason":"Limit reached"}`, want: "DENIED request final code=Limit reached"},
			{status: 200, body: `{"status":"ADMITTED","note":"not DENIED"}`, want: "success"},
			{status: 200, body: `[{"status":"DENIED"}]`, want: "success"},
			{status: 200, body: `{"status":"DENIED"`, want: "success"},
		},
		"apifreaks": {
			{status: 400, body: `{"message":"bad ip"}`, want: "VALIDATION request final"},
			{status: 401, want: "UNAUTHORIZED account final"},
			{status: 402, want: "BILLING account final"},
			{status: 403, want: "FORBIDDEN request final"},
			{status: 404, want: "NOT_FOUND request final"},
			{status: 406, want: "NOT_ACCEPTABLE request final"},
			{status: 429, want: "RATE_LIMIT creator?account retry after 1m0s"},
			{status: 429, headers: []string{"X-Concurrent-Threads: 5", "X-Concurrent-Threads-Active: 5"}, want: "CONCURRENCY_LIMIT request retry after 1m0s"},
			{status: 429, headers: []string{"X-Concurrent-Threads: 5", "X-Concurrent-Threads-Active: 6", "Retry-After: 2"}, want: "CONCURRENCY_LIMIT request retry after 2s"},
			{status: 429, headers: []string{"X-Concurrent-Threads: 5", "X-Concurrent-Threads-Active: 4"}, want: "RATE_LIMIT creator?account retry after 1m0s"},
			{status: 429, headers: []string{"X-Concurrent-Threads: 5"}, want: "RATE_LIMIT creator?account retry after 1m0s"},
			{status: 429, headers: []string{"X-Concurrent-Threads: five", "X-Concurrent-Threads-Active: 5"}, want: "RATE_LIMIT creator?account retry after 1m0s"},
			{status: 500, want: "SERVER_ERROR request retry"},
			{status: 502, want: "SERVER_ERROR provider retry"},
			{status: 503, want: "SERVER_ERROR provider retry"},
			{status: 504, want: "SERVER_ERROR provider retry"},
			{status: 507, want: "SERVER_ERROR request retry"},
			{status: 0, want: "UNKNOWN request final"},
			{status: 100, want: "UNKNOWN request final"},
			{status: 301, want: "UNKNOWN request final"},
			{status: 408, want: "UNKNOWN request final"},
			{status: 410, want: "UNKNOWN request final"},
			{status: 418, want: "UNKNOWN request final"},
			{status: 422, want: "VALIDATION request final"},
			{status: 423, want: "UNKNOWN request final"},
			{status: 999, want: "UNKNOWN request final"},
		},
		"generic": {
			{status: 100, want: "UNKNOWN request retry"},
			{status: 300, want: "INVALID_RESPONSE request final"},
			{status: 304, want: "INVALID_RESPONSE request final"},
			{status: 308, headers: []string{"Location: /"}, want: "INVALID_RESPONSE request final"},
			{status: 400, want: "VALIDATION request final"},
			{status: 401, want: "UNAUTHORIZED creator?account final"},
			{status: 402, want: "BILLING account final"},
			{status: 403, want: "FORBIDDEN request final"},
			{status: 404, want: "NOT_FOUND request final"},
			{status: 405, want: "VALIDATION request final"},
			{status: 406, want: "NOT_ACCEPTABLE request final"},
			{status: 407, want: "UNAUTHORIZED account final"},
			{status: 408, want: "TIMEOUT request retry"},
			{status: 409, want: "CONFLICT request final"},
			{status: 410, want: "GONE request final"},
			{status: 412, want: "VALIDATION request final"},
			{status: 413, want: "PAYLOAD_TOO_LARGE request final"},
			{status: 415, want: "VALIDATION request final"},
			{status: 418, want: "VALIDATION request final"},
			{status: 422, want: "VALIDATION request final"},
			{status: 423, want: "LOCKED request retry"},
			{status: 425, want: "UNKNOWN request retry"},
			{status: 429, want: "RATE_LIMIT creator?account retry after 1m0s"},
			{status: 451, want: "FORBIDDEN request final"},
			{status: 499, want: "VALIDATION request final"},
			{status: 500, want: "SERVER_ERROR request retry"},
			{status: 501, want: "SERVER_ERROR request retry"},
			{status: 502, want: "SERVER_ERROR provider retry"},
			{status: 503, want: "SERVER_ERROR provider retry"},
			{status: 504, want: "SERVER_ERROR provider retry"},
			{status: 505, want: "SERVER_ERROR request retry"},
			{status: 530, want: "SERVER_ERROR request retry"},
			{status: 600, want: "SERVER_ERROR request retry"},
			{status: 99, want: "SERVER_ERROR request retry"},
			{status: -503, want: "SERVER_ERROR request retry"},
			{status: 0, want: "UNKNOWN request retry"},
			{status: 503, body: `{"type":"about:blank","code":"down","retryable":false}`, want: "SERVER_ERROR provider final code=down"},
			{status: 409, body: `{"code":"busy","retryable":true,"retryAfterSec":2.5}`, want: "CONFLICT request retry after 2.5s code=busy"},
			{status: 409, body: `{"code":"busy","retryable":"true"}`, want: "CONFLICT request final code=busy"},
			{status: 429, body: `{"retryAfterSec":30}`, want: "RATE_LIMIT creator?account retry after 30s"},
			{status: 429, body: `{"retryAfterSec":"30"}`, want: "RATE_LIMIT creator?account retry after 30s"},
			{status: 429, body: `{"retryAfterSec":-30}`, want: "RATE_LIMIT creator?account retry after 1m0s"},
			{status: 429, body: `{"retryAfterSec":1e400}`, want: "RATE_LIMIT creator?account retry after 2562047h47m16.854775807s"},
			{status: 429, body: `{"retryable":false}`, want: "RATE_LIMIT creator?account final after 1m0s"},
			{status: 400, body: `{"code":17}`, want: "VALIDATION request final"},
			{status: 404, headers: retryAfter("120"), want: "NOT_FOUND request final after 2m0s"},
		},
	} {
		for _, g := range rows {
			t.Run(fmt.Sprintf("%s/%d", profile, g.status), func(t *testing.T) {
				f, failed := profileOf(t, profile).Classify(
					Answer{Status: g.status, Header: headers(g.headers...), Body: []byte(g.body)}, noon)
				if got := summary(f, failed); got != g.want {
					t.Errorf("%d %s %s\ngot  %s\nwant %s\nby   %s", g.status, g.headers, g.body, got, g.want, cmp.Or(f.Rule, "-"))
				}
			})
		}
	}
}

// TestUnreadableBody: what cannot be read leaves the status its meaning.
func TestUnreadableBody(t *testing.T) {
	for _, body := range []string{
		"", " ", "null", "true", "42", `"SESSION_EXPIRED"`, "[]", `[{"type":"SESSION_EXPIRED"}]`, "{", "{}",
		`{"type":"SESSION_EXPIRED"`, `{"type":"SESSION_EXPIRED"}}`, `{"type":"SESSION_EXPIRED"} {}`,
		`{'type':'SESSION_EXPIRED'}`, `{"type":SESSION_EXPIRED}`, `{"type":"SESSION_EXPIRED",}`, "type=SESSION_EXPIRED",
		`{"type":null}`, `{"type":1}`, `{"type":["SESSION_EXPIRED"]}`, `{"type":""}`, `{"message":"SESSION_EXPIRED"}`,
		`{"kid":"SESSION_EXPIRED"}`, `{"a":{"b":{"c":{"type":"SESSION_EXPIRED"}}}}`, "\x00\x00", "\xff\xfe{", "<html></html>",
		strings.Repeat("[", 100_000), strings.Repeat(`{"type":`, 100_000),
	} {
		f, failed := profileOf(t, "ofauth").Classify(Answer{Status: 403, Body: []byte(body)}, noon)
		if got := summary(f, failed); got != "FORBIDDEN request final" {
			t.Errorf("%.40q: %s", body, got)
		}
	}
}

func TestBodyForms(t *testing.T) {
	const want = "SESSION_EXPIRED creator final code=SESSION_EXPIRED action=relink_connection"
	for _, body := range []string{
		`{"type":"SESSION_EXPIRED"}`, " \r\n\t{ \"type\" : \"SESSION_EXPIRED\" }\n", "\xef\xbb\xbf{\"type\":\"SESSION_EXPIRED\"}",
		`{"type":"\u0053ESSION_EXPIRED"}`, `{"\u0074ype":"SESSION_EXPIRED"}`, `{"type":"FORBIDDEN","type":"SESSION_EXPIRED"}`,
		`{"a":{"type":"FORBIDDEN"},"b":["\"}",{}],"c":-1.5e3,"type":"SESSION_EXPIRED","d":null}`,
	} {
		f, failed := profileOf(t, "ofauth").Classify(Answer{Status: 403, Body: []byte(body)}, noon)
		if got := summary(f, failed); got != want {
			t.Errorf("%s: %s", body, got)
		}
	}
}
