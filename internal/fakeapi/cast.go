package fakeapi

import (
	"math/rand/v2"
	"strconv"
	"time"
)

// Healthy answers within a time, most of it by chance.
func Healthy(least, most time.Duration) Behaviour {
	return func(_ int, random *rand.Rand) Response {
		return Response{Status: 200, After: between(random, least, most)}
	}
}

// Throttled answers 429 to every n-th call, with a Retry-After.
func Throttled(every int, retryAfter time.Duration, otherwise Behaviour) Behaviour {
	return func(n int, random *rand.Rand) Response {
		if n%every == 0 {
			return Response{Status: 429, RetryAfter: retryAfter}
		}
		return otherwise(n, random)
	}
}

// Bursts answers 503 to length calls in a row, out of every so many.
func Bursts(every, length int, otherwise Behaviour) Behaviour {
	return func(n int, random *rand.Rand) Response {
		if n%every < length {
			return Response{Status: 503}
		}
		return otherwise(n, random)
	}
}

// Invalid answers 422 to a part of the calls.
func Invalid(part float64, otherwise Behaviour) Behaviour {
	return func(n int, random *rand.Rand) Response {
		if random.Float64() < part {
			return Response{Status: 422}
		}
		return otherwise(n, random)
	}
}

// Expires answers 401 once a session has had so many calls, until it is
// relinked.
func Expires(after int, relinked func() bool, otherwise Behaviour) Behaviour {
	return func(n int, random *rand.Rand) Response {
		if n > after && !relinked() {
			return Response{Status: 401}
		}
		return otherwise(n, random)
	}
}

// Down breaks every connection.
func Down(int, *rand.Rand) Response { return Response{} }

// Hangs answers after an hour.
func Hangs(int, *rand.Rand) Response { return Response{After: time.Hour, Status: 200} }

// Always is the same answer to every call.
func Always(r Response) Behaviour { return func(int, *rand.Rand) Response { return r } }

func between(random *rand.Rand, least, most time.Duration) time.Duration {
	if most <= least {
		return least
	}
	return least + time.Duration(random.Int64N(int64(most-least)))
}

var names = []string{
	"lily-rose", "alexa", "mia-wolf", "noor", "jade-fox", "stella", "ruby-lane", "kai", "luna-grey", "ivy",
	"cora-bell", "zoe", "maya-sol", "nina", "dahlia", "rio", "sasha-moon", "vera", "tess", "wren",
}

// Name is the n-th invented creator's.
func Name(n int) string {
	name := names[n%len(names)]
	if n >= len(names) {
		name += "-" + strconv.Itoa(n/len(names)+1)
	}
	return name
}

// Cast is the demo's: most creators are healthy, and a few of each kind are
// not.
type Cast struct {
	// Relinked is asked whether the creators whose sessions expire have
	// connected their accounts again.
	Relinked func() bool
}

// Down is the creator that nothing is to be had of.
func (Cast) Down() string { return Name(7) }

// Expired are the creators whose sessions expire.
func (Cast) Expired() []string { return []string{Name(11), Name(23)} }

// Behaviour of a creator, by its name.
func (c Cast) Behaviour(name string) Behaviour {
	n := 0
	for n < 10_000 && Name(n) != name {
		n++
	}
	healthy := Invalid(0.02, Healthy(20*time.Millisecond, 80*time.Millisecond))
	switch {
	case name == c.Down():
		return Down
	case name == Name(11) || name == Name(23):
		return Expires(20, c.Relinked, healthy)
	case n%10 == 3:
		return Invalid(0.02, Healthy(300*time.Millisecond, 900*time.Millisecond))
	case n%10 == 5:
		return Throttled(15, time.Duration(1+n/10%3)*time.Second, healthy)
	case n%10 == 8:
		return Bursts(40, 6, healthy)
	}
	return healthy
}
