package ownership

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestAssign(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		partitions := rapid.IntRange(1, 200).Draw(t, "partitions")
		workers := rapid.SliceOfNDistinct(rapid.StringMatching(`[a-z]{1,3}-[0-9]{1,4}`), 1, 20, rapid.ID).Draw(t, "workers")
		owners := assign(partitions, workers)
		load := map[string]int{}
		for n, name := range owners {
			if !slices.Contains(workers, name) {
				t.Fatalf("partition %d belongs to %q", n, name)
			}
			load[name]++
		}
		for _, name := range workers {
			if load[name] < partitions/len(workers) || load[name] > (partitions+len(workers)-1)/len(workers) {
				t.Fatalf("%s has %d of %d partitions, among %d workers", name, load[name], partitions, len(workers))
			}
		}
		// All workers come to the same, whatever order they see the others in.
		reversed := slices.Clone(workers)
		slices.Reverse(reversed)
		if !slices.Equal(owners, assign(partitions, reversed)) {
			t.Fatal("the order of the workers matters")
		}
	})
	if got := assign(3, nil); !slices.Equal(got, []string{"", "", ""}) {
		t.Errorf("without workers: %q", got)
	}
}

// Few partitions move when a worker comes or goes.
func TestAssignMovesLittle(t *testing.T) {
	const partitions = 64
	for workers := 2; workers <= 8; workers++ {
		var names []string
		for n := range workers + 1 {
			names = append(names, fmt.Sprintf("host-%d-4711-abcd%d", n, n))
		}
		before, after := assign(partitions, names[:workers]), assign(partitions, names)
		moved := 0
		for n := range before {
			if before[n] != after[n] {
				moved++
			}
		}
		if most := 3 * partitions / (workers + 1); moved > most {
			t.Errorf("%d of %d partitions move when worker %d comes, want at most %d", moved, partitions, workers+1, most)
		}
	}
}
