//go:build mutants

package consumer

import (
	"flag"

	"github.com/headgate-io/headgate/internal/mutant"
)

func init() {
	flag.Func("mutant", "plant this bug", mutant.Set)
}
