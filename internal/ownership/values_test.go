package ownership

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/headgate-io/headgate/publisher"
)

// Creators come through OWNERS as they are.
func TestCalling(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bytes := rapid.SliceOf(rapid.SliceOfN(rapid.Byte(), 0, 60)).Draw(t, "creators")
		var creators, want []string
		for _, b := range bytes {
			creators = append(creators, string(b))
			if _, err := publisher.EncodeToken(string(b)); err == nil {
				want = append(want, string(b))
			}
		}
		got, ok := parseCalling("worker", encodeCalling("worker", creators))
		if !ok || !slices.Equal(got, want) {
			t.Fatalf("%q, want %q", got, want)
		}
		if _, ok := parseCalling("other", encodeCalling("worker", creators)); ok {
			t.Fatal("taken for another worker's")
		}
	})
}

// Two keys never name one thing, and a value is taken only for its own key.
func FuzzValues(f *testing.F) {
	f.Add("worker.a", []byte(`{"worker":"a","pid":1,"since":"2026-11-24T00:00:00Z"}`))
	f.Add("partition.1", []byte(`{"worker":"a","since":"2026-11-24T00:00:00Z"}`))
	f.Add("calling.1.a", []byte(`{"worker":"a","creators":["b"]}`))
	f.Add("partition.01", []byte("garbage"))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		if name, ok := parseWorkerKey(key); ok {
			if token, err := publisher.EncodeToken(name); err != nil || keyWorker+token != key {
				t.Errorf("%q names worker %q", key, name)
			}
			if m := parseMember(name, value); m != nil && m.Worker != name {
				t.Errorf("%q is taken for %q", value, name)
			}
		}
		if n, name, ok := parseCallingKey(key); ok && callingKey(n, name) != key {
			t.Errorf("%q names partition %d and worker %q", key, n, name)
		}
		if s := parseLeaseValue(value); s != nil && s.Worker == "" {
			t.Errorf("%q is a lease of no worker", value)
		}
	})
}
