package ownership

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/rs/zerolog"
)

// entry is one of a bucket.
type entry struct {
	jetstream.KeyValueEntry
	key, value string
	revision   uint64
	op         jetstream.KeyValueOp
}

func (e entry) Key() string                     { return e.key }
func (e entry) Value() []byte                   { return []byte(e.value) }
func (e entry) Revision() uint64                { return e.revision }
func (e entry) Operation() jetstream.KeyValueOp { return e.op }

const testTTL = 10 * time.Second

// mirror is worker a's, which follows OWNERS and is alive.
func mirror() *members {
	m := newMembers("a", 4, testTTL, &foreign{log: zerolog.Nop(), told: map[string]time.Time{}})
	m.follows(true)
	m.beaten(time.Now())
	return m
}

func (m *members) hear(key, value string, revision uint64) {
	m.apply(entry{key: key, value: value, revision: revision})
}

func (m *members) member(name string) {
	m.hear("worker."+name, fmt.Sprintf(`{"worker":%q,"pid":1,"since":"2026-11-24T00:00:00Z"}`, name), 1)
}

func (m *members) owns(name string, partitions ...int) {
	for _, n := range partitions {
		m.hear(fmt.Sprint("partition.", n), fmt.Sprintf(`{"worker":%q,"since":"2026-11-24T00:00:00Z"}`, name), 1)
	}
}

func without(all []int, n int) []int {
	return slices.DeleteFunc(slices.Clone(all), func(other int) bool { return other == n })
}

// What a worker ought to do follows from what it knows.
func TestPlan(t *testing.T) {
	for name, c := range planned() {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := mirror()
				c.happens(m)
				p := m.plan(time.Now())
				if got := slices.Sorted(maps.Keys(p.claim)); !slices.Equal(got, c.claim) || p.move != c.move {
					t.Errorf("claims %v, moves %v; want %v, %v", got, p.move, c.claim, c.move)
				}
			})
		})
	}
}

type planCase struct {
	happens func(*members)
	claim   []int
	move    bool
}

func planned() map[string]planCase {
	all := []int{0, 1, 2, 3}
	var mine []int
	for n, name := range assign(4, []string{"a", "b"}) {
		if name == "a" {
			mine = append(mine, n)
		}
	}
	return map[string]planCase{
		"alone":               {func(*members) {}, all, true},
		"not following":       {func(m *members) { m.follows(false) }, nil, false},
		"not following, late": {func(m *members) { m.follows(false); m.plan(time.Now()); time.Sleep(patience) }, all, false},
		"cut off":             {func(*members) { time.Sleep(testTTL + time.Second) }, nil, false},
		"left":                {func(m *members) { m.leave() }, nil, false},
		"another has come":    {func(m *members) { m.member("b") }, nil, false},
		"there are two":       {func(m *members) { m.member("b"); time.Sleep(quiet) }, mine, true},
		"the other is silent": {func(m *members) { m.member("b"); time.Sleep(testTTL); m.beaten(time.Now()); time.Sleep(testTTL / 2) }, all, true},
		"the other owns all":  {func(m *members) { m.member("b"); m.owns("b", all...); time.Sleep(quiet) }, nil, true},
		"it stopped":          {func(m *members) { m.owns("b", all...); m.apply(entry{key: "partition.2", op: jetstream.KeyValuePurge}) }, []int{2}, true},
		"it is silent": {func(m *members) {
			m.owns("b", all...)
			time.Sleep(testTTL)
			m.beaten(time.Now())
			time.Sleep(testTTL / 2)
		}, all, true},
		"a claim unconfirmed": {func(m *members) { m.owns("a", all...) }, all, true},
		"the other is late":   {func(m *members) { m.member("b"); m.plan(time.Now()); time.Sleep(patience) }, all, true},
		"it could not claim": {func(m *members) {
			m.member("b")
			m.plan(time.Now())
			m.opens(time.Now().Add(time.Second))
			time.Sleep(patience)
		}, mine, true},
		"it could not, before": {func(m *members) {
			m.member("b")
			m.opens(time.Now().Add(time.Second))
			m.plan(time.Now())
			time.Sleep(patience)
		}, mine, true},
		"late, but it owns one": {func(m *members) { m.owns("b", mine[0]); m.plan(time.Now()); time.Sleep(patience) }, without(all, mine[0]), true},
		"after an outage": {func(m *members) {
			time.Sleep(2 * testTTL)
			m.beaten(time.Now())
			time.Sleep(testTTL / 3)
		}, nil, false},
		"some time after": {func(m *members) {
			time.Sleep(2 * testTTL)
			m.beaten(time.Now())
			time.Sleep(testTTL/3 + quiet)
		}, all, true},
		"made again": {func(m *members) { m.restarted() }, nil, false},
	}
}

// The leader is ahead of the watch, and the watch of what the leader said a moment ago.
func TestStillCalledBetweenWatchAndLeader(t *testing.T) {
	const calls = `{"worker":"f","creators":["%s"]}`
	stored := func(creator string, sequence uint64) []*message {
		return []*message{{key: "calling.0.f", data: fmt.Appendf(nil, calls, creator), sequence: sequence}}
	}
	for name, c := range map[string]struct {
		happens func(*members)
		want    []string
	}{
		"read":                  {func(m *members) { m.read(0, stored("new", 9)) }, []string{"new"}},
		"then an old one heard": {func(m *members) { m.read(0, stored("new", 9)); m.hear("calling.0.f", fmt.Sprintf(calls, "old"), 5) }, []string{"new"}},
		"then an old end heard": {func(m *members) {
			m.read(0, stored("new", 9))
			m.apply(entry{key: "calling.0.f", op: jetstream.KeyValuePurge, revision: 6})
		}, []string{"new"}},
		"then its end heard": {func(m *members) {
			m.read(0, stored("new", 9))
			m.apply(entry{key: "calling.0.f", op: jetstream.KeyValuePurge, revision: 10})
		}, nil},
		"its end heard before": {func(m *members) {
			m.apply(entry{key: "calling.0.f", op: jetstream.KeyValuePurge, revision: 10})
			m.read(0, stored("new", 9))
		}, nil},
		"of an earlier bucket": {func(m *members) {
			m.hear("calling.0.f", fmt.Sprintf(calls, "old"), 99)
			m.restarted()
			m.hear("calling.0.f", fmt.Sprintf(calls, "new"), 3)
		}, []string{"new"}},
		"gone, and not read":     {func(m *members) { m.read(0, stored("new", 9)); time.Sleep(2 * testTTL); m.read(0, nil) }, nil},
		"silent, but still read": {func(m *members) { m.read(0, stored("new", 9)); time.Sleep(2 * testTTL); m.read(0, stored("new", 11)) }, []string{"new"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := mirror()
				c.happens(m)
				if got := m.stillCalled(0); !slices.Equal(got, c.want) {
					t.Errorf("%q, want %q", got, c.want)
				}
			})
		})
	}
}
