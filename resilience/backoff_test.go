package resilience

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestBackoff(t *testing.T) {
	b := Backoff{Base: time.Second, Max: 30 * time.Second}
	for i, want := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
		if d := b.Delay(i+1, 0.99); d != want*time.Second {
			t.Errorf("after attempt %d: %v, want %vs", i+1, d, int64(want))
		}
	}
}

func TestBackoffProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := Backoff{
			Base:   time.Duration(rapid.Int64Range(1, int64(time.Hour)).Draw(t, "base")),
			Max:    time.Duration(rapid.Int64Range(1, int64(24*time.Hour)).Draw(t, "max")),
			Jitter: rapid.Float64Range(0, 1).Draw(t, "jitter"),
		}
		attempt := rapid.IntRange(-1, 1<<40).Draw(t, "attempt")
		random := rapid.Float64Range(0, 0.999).Draw(t, "random")
		plain, moved := b.Delay(attempt, 0), b.Delay(attempt, random)
		if plain <= 0 || plain > b.Max {
			t.Fatalf("%v is not in (0, %v]", plain, b.Max)
		}
		if moved < plain || float64(moved) > float64(plain)*(1+b.Jitter)+1 {
			t.Fatalf("jitter made %v of %v", moved, plain)
		}
	})
}
