package consumer

import (
	"errors"
	"flag"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/headgate-io/headgate/internal/failpoint"
	"github.com/headgate-io/headgate/internal/mutant"
)

var allMutants = flag.Bool("mutants", false, "plant all bugs, also those that take minutes to find")

// TestMutants plants one bug after the other: the simulation has to find each of them within
// 200 seeds. Without -mutants only those are planted that are found within seconds.
func TestMutants(t *testing.T) {
	if testing.Short() || !failpoint.Enabled {
		t.Skip("builds the tests anew and takes minutes: -tags failpoints")
	}
	program := filepath.Join(t.TempDir(), "consumer.test")
	if out, err := exec.Command("go", "test", "-c", "-tags", "mutants", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	violation := regexp.MustCompile(`seed \d+:\n.*`)
	names := []string{mutant.AckBeforeStore, mutant.NoArbiter, mutant.WhyGuesses}
	if *allMutants {
		names = mutant.Names
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, err := exec.Command(program, "-test.run", "TestSimulation$", "-test.timeout", "20m", "-mutant", name, "-seeds", "200", "-failures", "0").CombinedOutput()
			var exit *exec.ExitError
			found := violation.Find(out)
			if !errors.As(err, &exit) || found == nil {
				t.Fatalf("not found in 200 seeds: %v\n%s", err, out)
			}
			t.Logf("%s", found)
		})
	}
}
