//go:build mutants

package mutant

import (
	"fmt"
	"os"
	"slices"
	"sync/atomic"
)

// Variable of the environment that names the bug in a program of its own.
const Variable = "TEST_MUTANT"

var planted atomic.Pointer[string]

func init() {
	if name := os.Getenv(Variable); name != "" {
		if err := Set(name); err != nil {
			panic(err)
		}
	}
}

// Set plants a bug; "": none.
func Set(name string) error {
	if name != "" && !slices.Contains(Names, name) {
		return fmt.Errorf("there is no mutant %q; there are: %v", name, Names)
	}
	planted.Store(&name)
	return nil
}

// On reports whether a bug is planted.
func On(name string) bool {
	p := planted.Load()
	return p != nil && *p == name
}
