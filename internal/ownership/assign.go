package ownership

import (
	"hash/fnv"
	"slices"
)

// assign says which worker ought to own which partition: by rendezvous hashing, so that few
// move when workers come or go, and balanced, so that no two workers differ by
// more than one.
func assign(partitions int, workers []string) []string {
	owners := make([]string, partitions)
	if len(workers) == 0 {
		return owners
	}
	workers = slices.Sorted(slices.Values(workers))
	hashes := make([]uint64, len(workers))
	for i, name := range workers {
		h := fnv.New64a()
		_, _ = h.Write([]byte(name))
		hashes[i] = h.Sum64()
	}
	least, more := partitions/len(workers), partitions%len(workers)
	load := make([]int, len(workers))
	for n := range partitions {
		best, most := -1, uint64(0)
		for i := range workers {
			// more of them may have one above the least.
			if load[i] > least || load[i] == least && more == 0 {
				continue
			}
			if score := rendezvous(n, hashes[i]); best < 0 || score > most {
				best, most = i, score
			}
		}
		owners[n] = workers[best]
		if load[best]++; load[best] > least {
			more--
		}
	}
	return owners
}

func rendezvous(partition int, worker uint64) uint64 {
	x := worker ^ uint64(partition)*0x9e3779b97f4a7c15
	// FNV alone leaves similar names similar.
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}
