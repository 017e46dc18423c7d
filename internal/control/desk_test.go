package control

import (
	"testing"
	"time"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/resilience"
)

// An hour of the API's that comes during an operator's hold outlives its release.
func TestReleaseEndsPeoplesHoldOnly(t *testing.T) {
	simulate(t, func(r *rig) {
		w := r.start().ready(t)
		if err := r.desk().Hold(r.ctx, theAlice, until(2*time.Hour, "she asked for it")); err != nil {
			t.Fatal(err)
		}
		within(t, time.Second, "held", func() bool { return left(w.held(theAlice)) == 2*time.Hour })
		if err := w.h.Put(r.ctx, theAlice, until(time.Hour, "RATE_LIMIT")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		ended, err := r.desk().Release(r.ctx, theAlice, false, "bob")
		if err != nil || ended.People == nil || ended.API != nil || left(ended.Stands).Round(time.Minute) != 55*time.Minute {
			t.Fatalf("%+v, %v", ended, err)
		}
		within(t, time.Second, "the API's hour goes on", func() bool { return left(w.held(theAlice)).Round(time.Minute) == 55*time.Minute })
		time.Sleep(time.Minute)
		if left(w.held(theAlice)) == 0 {
			t.Fatal("released")
		}
		if ended, err = r.desk().Release(r.ctx, theAlice, true, "bob"); err != nil || ended.API == nil || ended.Stands != nil {
			t.Fatalf("%+v, %v", ended, err)
		}
		within(t, time.Second, "released by force", func() bool { return w.held(theAlice) == nil })
		if ended, err = r.desk().Release(r.ctx, theAlice, false, "bob"); err != nil || ended != (Ended{}) {
			t.Errorf("%+v, %v", ended, err)
		}
	})
}

// A release ends the holds of the API's that wait for people.
func TestReleaseEndsWhatWaitsForPeople(t *testing.T) {
	account, provider := Target{Kind: Account}, Target{Kind: Provider}
	with := func(h resilience.Hold, c classify.Class) resilience.Hold {
		h.Class = c
		return h
	}
	cases := []struct {
		target Target
		hold   resilience.Hold
		ends   bool
	}{
		{Target{Creator: "expired"}, with(until(0, "SESSION_EXPIRED"), classify.SessionExpired), true},
		{Target{Creator: "limited"}, with(until(time.Hour, "RATE_LIMIT"), classify.RateLimit), false},
		{Target{Creator: "quota"}, with(until(time.Hour, "QUOTA_EXCEEDED"), classify.QuotaExceeded), false},
		{account, with(until(time.Hour, "the bill"), classify.Billing), true},
		{account, with(until(time.Hour, "the key"), classify.Unauthorized), true},
		{account, with(until(time.Hour, "the credits"), classify.QuotaExceeded), true},
		{account, with(until(time.Hour, "RATE_LIMIT"), classify.RateLimit), false},
		{provider, with(until(time.Hour, "maintenance"), classify.ServerError), false},
		{provider, until(0, "gone"), true},
	}
	r := newRig(t)
	w := r.start().ready(t)
	for _, tc := range cases {
		if err := w.h.Put(r.ctx, tc.target, tc.hold); err != nil {
			t.Fatal(err)
		}
		ended, err := r.desk().Release(r.ctx, tc.target, false, "bob")
		if err != nil || (ended.API != nil) != tc.ends || (ended.Stands == nil) != tc.ends {
			t.Errorf("%v, %s: %+v, %v", tc.target, tc.hold.Reason, ended, err)
		}
		if _, err := r.desk().Release(r.ctx, tc.target, true, "bob"); err != nil {
			t.Fatal(err)
		}
		within(t, time.Minute, "released", func() bool { return w.held(tc.target) == nil })
	}
}

// HoldMeanwhile never shortens a hold, and puts back what was there.
func TestHoldMeanwhile(t *testing.T) {
	simulate(t, func(r *rig) {
		desk := r.desk()
		during := func(before string) (meanwhile, after time.Duration) {
			t.Helper()
			if before != "" {
				r.put(bucketHolds, "creator.alice", before)
			}
			undo, err := desk.HoldMeanwhile(r.ctx, theAlice, until(5*time.Minute, "is being erased"))
			if err != nil {
				t.Fatal(err)
			}
			meanwhile = left(r.stored("creator.alice"))
			if err := undo(r.ctx); err != nil {
				t.Fatal(err)
			}
			after = left(r.stored("creator.alice"))
			_ = r.kv(bucketHolds).Delete(r.ctx, "creator.alice")
			return meanwhile, after
		}
		for before, want := range map[string][2]time.Duration{
			"":                       {5 * time.Minute, 0},
			"1h":                     {time.Hour, time.Hour},
			`{"reason":"no end"}`:    {-1, -1},
			"1m":                     {5 * time.Minute, time.Minute},
			"2020-01-01T00:00:00Z":   {5 * time.Minute, 0},
			`{"stream":"A","seq":1}`: {5 * time.Minute, 0},
		} {
			if meanwhile, after := during(before); meanwhile != want[0] || after != want[1] {
				t.Errorf("%q: held for %v meanwhile and %v after it, want %v", before, meanwhile, after, want)
			}
		}
		undo, err := desk.HoldMeanwhile(r.ctx, theAlice, until(5*time.Minute, "is being erased"))
		if err != nil {
			t.Fatal(err)
		}
		r.put(bucketHolds, "creator.alice", "2h")
		if err := undo(r.ctx); err != nil || left(r.stored("creator.alice")) != 2*time.Hour {
			t.Errorf("%v, %v: what people put meanwhile is gone", left(r.stored("creator.alice")), err)
		}
	})
}
