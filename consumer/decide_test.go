package consumer

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/headgate-io/headgate/classify"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func testOperation() Operation { return Operation{Retry: DefaultRetry()} }

func TestDecide(t *testing.T) {
	type want struct {
		action action
		empty  bool
		after  time.Duration // from noon
		scope  classify.Scope
		until  time.Duration // of the hold, from noon; -1: none stated
	}
	seconds := func(n int) (time.Duration, bool) { return time.Duration(n) * time.Second, true }
	failure := func(c classify.Class, s classify.Scope, after ...int) classify.Failure {
		f := classify.Failure{Class: c, Scope: s, Retryable: c.Retryable()}
		if len(after) > 0 {
			f.RetryAfter, f.RetryAfterKnown = seconds(after[0])
		}
		return f
	}
	for name, tc := range map[string]struct {
		failure  classify.Failure
		op       func(*Operation)
		o        func(*facts)
		want     want
		succeeds bool
	}{
		"success":               {succeeds: true, want: want{action: succeed}},
		"nothing found":         {failure: failure(classify.NotFound, classify.ScopeRequest), want: want{action: deadLetter}},
		"nothing found, empty":  {failure: failure(classify.NotFound, classify.ScopeRequest), op: func(op *Operation) { op.NotFoundEmpty = true }, want: want{action: succeed, empty: true}},
		"validation":            {failure: failure(classify.Validation, classify.ScopeRequest), want: want{action: deadLetter}},
		"429 holds the creator": {failure: failure(classify.RateLimit, classify.ScopeCreator, 30), want: want{action: retry, after: 30 * time.Second, scope: classify.ScopeCreator, until: 30 * time.Second}},
		"429 of the account":    {failure: failure(classify.RateLimit, classify.ScopeAccount, 30), want: want{action: retry, after: 30 * time.Second, scope: classify.ScopeAccount, until: 30 * time.Second}},
		"429 at once":           {failure: failure(classify.RateLimit, classify.ScopeCreator, 0), want: want{action: retry, after: time.Second, scope: classify.ScopeCreator, until: time.Second}},
		"a year is capped":      {failure: failure(classify.RateLimit, classify.ScopeCreator, 365*24*3600), want: want{action: retry, after: 24 * time.Hour, scope: classify.ScopeCreator, until: 24 * time.Hour}},
		"429 at its 20th time":  {failure: failure(classify.RateLimit, classify.ScopeCreator, 1), o: func(o *facts) { o.attempts, o.throttled = 0, 20 }, want: want{action: retry, after: 30 * time.Second, scope: classify.ScopeCreator, until: 30 * time.Second}},
		"429 at its 21st time":  {failure: failure(classify.RateLimit, classify.ScopeCreator, 1), o: func(o *facts) { o.attempts, o.throttled = 0, 21 }, want: want{action: deadLetter, scope: classify.ScopeCreator, until: 30 * time.Second}},
		"throttled is no attempt": {failure: failure(classify.RateLimit, classify.ScopeCreator, 1), o: func(o *facts) { o.attempts, o.throttled = 3, 9 },
			want: want{action: retry, after: 30 * time.Second, scope: classify.ScopeCreator, until: 30 * time.Second}},
		"too many at once": {failure: classify.Failure{Class: classify.ConcurrencyLimit, Scope: classify.ScopeCreator, Retryable: true, RetryAfter: time.Minute, RetryAfterKnown: true, RetryAfterAssumed: true},
			want: want{action: retry, after: time.Second}},
		"no calls left":       {succeeds: true, o: func(o *facts) { o.window = time.Minute }, want: want{action: succeed, scope: classify.ScopeCreator, until: time.Minute}},
		"first 500":           {failure: failure(classify.ServerError, classify.ScopeRequest), want: want{action: retry, after: time.Second}},
		"third 500":           {failure: failure(classify.ServerError, classify.ScopeRequest), o: func(o *facts) { o.attempts = 3 }, want: want{action: retry, after: 4 * time.Second}},
		"fourth 500":          {failure: failure(classify.ServerError, classify.ScopeRequest), o: func(o *facts) { o.attempts = 4 }, want: want{action: deadLetter}},
		"second unknown":      {failure: failure(classify.Unknown, classify.ScopeRequest), o: func(o *facts) { o.attempts = 2 }, want: want{action: deadLetter}},
		"503 of one creator":  {failure: failure(classify.ServerError, classify.ScopeProvider, 60), want: want{action: retry, after: time.Minute, scope: classify.ScopeCreator, until: time.Minute}},
		"503 of several":      {failure: failure(classify.ServerError, classify.ScopeProvider, 60), o: func(o *facts) { o.providerFailing = true }, want: want{action: retry, after: time.Minute, scope: classify.ScopeProvider, until: time.Minute}},
		"uncertain, terminal": {failure: failure(classify.Validation, classify.ScopeRequest), o: func(o *facts) { o.uncertain = true }, want: want{action: deadLetter}},
		"session expired":     {failure: failure(classify.SessionExpired, classify.ScopeCreator), want: want{action: deadLetter, scope: classify.ScopeCreator, until: -1}},
		"billing":             {failure: failure(classify.Billing, classify.ScopeAccount), want: want{action: deadLetter, scope: classify.ScopeAccount, until: accountPause}},
		"quota until":         {failure: failure(classify.QuotaExceeded, classify.ScopeAccount, 3600), want: want{action: deadLetter, scope: classify.ScopeAccount, until: time.Hour}},
		"wrong key":           {failure: failure(classify.Unauthorized, classify.ScopeAccount), want: want{action: deadLetter, scope: classify.ScopeAccount, until: accountPause}},
		"locked request":      {failure: failure(classify.Locked, classify.ScopeRequest, 60), want: want{action: retry, after: time.Minute}},
	} {
		t.Run(name, func(t *testing.T) {
			op := testOperation()
			if tc.op != nil {
				tc.op(&op)
			}
			o := facts{failure: tc.failure, failed: !tc.succeeds, attempts: 1, now: noon}
			if tc.o != nil {
				tc.o(&o)
			}
			v := decide(o, op)
			got := want{action: v.action, empty: v.empty, scope: v.scope}
			if v.action == retry {
				got.after = v.after.Sub(noon)
			}
			if v.hold != nil {
				if got.until = -1; !v.hold.Until.IsZero() {
					got.until = v.hold.Until.Sub(noon)
				}
			}
			if got != tc.want {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
			if (v.action == deadLetter) != (v.reason != "") {
				t.Errorf("action %d with reason %q", v.action, v.reason)
			}
		})
	}
}

// Whatever the API says: no retry before the time it stated, no hold or retry
// beyond the cap, and a request that is tried on has attempts left.
func TestDecideProperties(t *testing.T) {
	classes := []classify.Class{
		classify.RateLimit, classify.ConcurrencyLimit, classify.ServerError, classify.UpstreamError, classify.NetworkError,
		classify.Timeout, classify.Locked, classify.RulesOutdated, classify.NotFound, classify.Unauthorized,
		classify.SessionExpired, classify.Forbidden, classify.Validation, classify.Billing, classify.QuotaExceeded, classify.Unknown,
	}
	scopes := []classify.Scope{classify.ScopeRequest, classify.ScopeCreator, classify.ScopeAccount, classify.ScopeProvider}
	rapid.Check(t, func(t *rapid.T) {
		op := testOperation()
		f := classify.Failure{
			Class: rapid.SampledFrom(classes).Draw(t, "class"), Scope: rapid.SampledFrom(scopes).Draw(t, "scope"),
			Retryable:       rapid.Bool().Draw(t, "retryable"),
			RetryAfterKnown: rapid.Bool().Draw(t, "known"),
		}
		if f.RetryAfterKnown {
			f.RetryAfter = time.Duration(rapid.Int64Min(0).Draw(t, "after"))
		}
		o := facts{
			failure: f, failed: true, now: noon, attempts: rapid.IntRange(0, 50).Draw(t, "attempts"),
			throttled: rapid.IntRange(0, 50).Draw(t, "throttled"), random: rapid.Float64Range(0, 0.999).Draw(t, "random"),
			providerFailing: rapid.Bool().Draw(t, "failing"),
		}
		v := decide(o, op)
		stated := min(f.RetryAfter, op.Retry.Cap)
		if v.action == retry {
			if !f.Retryable {
				t.Fatal("retried what is terminal")
			}
			wait := v.after.Sub(noon)
			if wait < stated || wait > op.Retry.Cap+op.Retry.Max {
				t.Fatalf("waits %v, the API said %v", wait, f.RetryAfter)
			}
			if !f.RetryAfterKnown && wait < op.Retry.Base {
				t.Fatalf("backs off for %v", wait)
			}
			if f.Class.Throttled() && o.throttled > op.Retry.Throttled || !f.Class.Throttled() && o.attempts >= op.Retry.Attempts {
				t.Fatal("tried on with nothing left")
			}
		}
		if v.hold != nil && !v.hold.Until.IsZero() && v.hold.Until.Sub(noon) > op.Retry.Cap {
			t.Fatalf("held for %v", v.hold.Until.Sub(noon))
		}
		if v.hold != nil && v.scope == classify.ScopeProvider && !o.providerFailing && f.Class != classify.RateLimit {
			t.Fatal("the provider is held on one creator's word")
		}
	})
}
