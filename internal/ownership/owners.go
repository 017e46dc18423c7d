package ownership

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/nats-io/nats.go/jetstream"
)

// Ownership is a live worker and the partitions that it has.
type Ownership struct {
	Member
	Partitions []int `json:"partitions"`
}

// Owners reads OWNERS: the live workers, by name, and which partitions they have. Partitions of a worker
// that is not alive any more, until their leases expire, are listed under
// its name. Values that no worker wrote are left out.
func Owners(ctx context.Context, kv jetstream.KeyValue) ([]Ownership, error) {
	watcher, err := kv.WatchAll(ctx, jetstream.IgnoreDeletes())
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", kv.Bucket(), err)
	}
	defer func() { _ = watcher.Stop() }()
	workers, leases := map[string]Member{}, map[int]string{}
	for {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("read %s: %w", kv.Bucket(), ctx.Err())
		case e, open := <-watcher.Updates():
			if !open {
				return nil, fmt.Errorf("read %s: the connection was closed", kv.Bucket())
			}
			if e == nil {
				return owners(workers, leases), nil
			}
			if n, ok := parsePartitionKey(e.Key()); ok {
				if s := parseLeaseValue(e.Value()); s != nil {
					leases[n] = s.Worker
				}
			} else if name, ok := parseWorkerKey(e.Key()); ok {
				if m := parseMember(name, e.Value()); m != nil {
					workers[name] = *m
				}
			}
		}
	}
}

func owners(workers map[string]Member, leases map[int]string) []Ownership {
	all := map[string]*Ownership{}
	for name, m := range workers {
		all[name] = &Ownership{Member: m}
	}
	for _, n := range slices.Sorted(maps.Keys(leases)) {
		name := leases[n]
		if all[name] == nil {
			all[name] = &Ownership{Member: Member{Worker: name}}
		}
		all[name].Partitions = append(all[name].Partitions, n)
	}
	list := make([]Ownership, 0, len(all))
	for _, name := range slices.Sorted(maps.Keys(all)) {
		list = append(list, *all[name])
	}
	return list
}
