package consumer

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

func TestDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var d deadlines
		parent, cancel := context.WithCancel(t.Context())
		for range 1000 {
			now := time.Now()
			ctx := d.context(parent, now, 4*time.Second)
			if at, ok := ctx.Deadline(); !ok || at.Sub(now) < 4*time.Second || at.Sub(now) > 5*time.Second || ctx.Err() != nil {
				t.Fatalf("deadline in %v, %v", at.Sub(now), ctx.Err())
			}
			time.Sleep(170 * time.Millisecond)
		}
		ctx := d.context(parent, time.Now(), 4*time.Second)
		cancel()
		if ctx.Err() == nil {
			t.Error("it does not end with its parent")
		}
	})
}

func BenchmarkDeadlines(b *testing.B) {
	parent := b.Context()
	b.Run("shared", func(b *testing.B) {
		var d deadlines
		b.ReportAllocs()
		for b.Loop() {
			_ = d.context(parent, time.Now(), 5*time.Second)
		}
	})
	b.Run("each its own", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, cancel := context.WithTimeout(parent, 5*time.Second)
			cancel()
		}
	})
}
