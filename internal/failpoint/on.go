//go:build failpoints

package failpoint

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
)

// Variable of the environment that arms a program: point=action, and after a
// colon how often (default 1) or "@" and the request at which it happens every
// time, as in "call=kill:@r-7" or "result-done=error:5". Actions are error, panic
// and kill.
const Variable = "TEST_FAILPOINT"

// Enabled reports whether the program is built with failpoints, for tests that take long.
const Enabled = true

var hook atomic.Pointer[func(Point, string) error]

var arm = sync.OnceFunc(func() {
	if spec := os.Getenv(Variable); spec != "" {
		f, err := parse(spec)
		if err != nil {
			panic(err)
		}
		Set(f)
	}
})

func parse(spec string) (func(Point, string) error, error) {
	name, rest, ok := strings.Cut(spec, "=")
	action, when, _ := strings.Cut(rest, ":")
	if !ok {
		return nil, fmt.Errorf("%s: %q is not point=action", Variable, spec)
	}
	do, ok := Actions[action]
	if !ok {
		return nil, fmt.Errorf("%s: no action %q", Variable, action)
	}
	if id, ok := strings.CutPrefix(when, "@"); ok {
		return func(p Point, request string) error {
			if p != Point(name) || request != id {
				return nil
			}
			return do()
		}, nil
	}
	times := int64(1)
	if when != "" {
		var err error
		if times, err = strconv.ParseInt(when, 10, 64); err != nil {
			return nil, fmt.Errorf("%s: %w", Variable, err)
		}
	}
	return Times(Point(name), times, do), nil
}

// Times does something the first n times that a point is passed.
func Times(at Point, n int64, do func() error) func(Point, string) error {
	var left atomic.Int64
	left.Store(n)
	return func(p Point, _ string) error {
		if p != at || left.Add(-1) < 0 {
			return nil
		}
		return do()
	}
}

// ErrInjected is what the action error returns.
var ErrInjected = errors.New("injected by a failpoint")

// Actions by name.
var Actions = map[string]func() error{
	"error": func() error { return ErrInjected },
	"panic": func() error { panic("injected by a failpoint") },
	"kill": func() error {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	},
}

// Set is called at every point from now on; nil: nothing is.
func Set(f func(at Point, request string) error) {
	if f == nil {
		hook.Store(nil)
		return
	}
	hook.Store(&f)
}

// Hit passes a point on a request's way, or on no request's.
func Hit(at Point, request string) error {
	arm()
	if f := hook.Load(); f != nil {
		return (*f)(at, request)
	}
	return nil
}
