// Command headgate calls third-party creator APIs for requests on a NATS
// JetStream stream, so that one creator in trouble never costs another one
// anything. See the README.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set by the linker for releases.
var version = ""

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// Exit codes.
const (
	exitOK = iota
	exitFailed
	exitUsage
	exitConfig
	exitUnreachable
	exitPartly
)

// exitError gives an error its exit code.
type exitError struct {
	code int
	err  error
}

func (e exitError) Error() string { return e.err.Error() }
func (e exitError) Unwrap() error { return e.err }

// run is the whole program, for main and for tests. Its end by ctx is how a
// signal arrives.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := rootCommand()
	running := false
	root.PersistentPreRun = func(*cobra.Command, []string) { running = true }
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	fmt.Fprintf(stderr, "headgate: %v\n", err)
	var exit exitError
	switch {
	case errors.As(err, &exit):
		return exit.code
	case errors.Is(err, errPartly):
		return exitPartly
	case !running: // cobra did not get as far as the command
		fmt.Fprintln(stderr, "Run 'headgate help' to see what there is.")
		return exitUsage
	}
	return exitFailed
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "headgate",
		Short: "Call creator APIs for requests on NATS JetStream, each creator behind a gate of its own",
		Long: `Headgate pulls request messages from NATS JetStream, calls a third-party API for
each through its creator's hold, circuit breaker, rate limit and concurrency
slots, and stores the answer as a result or, when there is none to be had, as a
dead letter.

Try it:  headgate demo`,
		Version:       buildVersion(),
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	flags := root.PersistentFlags()
	flags.StringP("config", "c", "", "configuration `file` (examples/headgate.yaml shows every knob)")
	flags.StringP("server", "s", "", "NATS server `URL`")
	flags.String("context", "", "nats CLI context with the server and credentials")
	flags.String("log-level", "", "trace, debug, info, warn, error or disabled")
	flags.String("log-format", "", "auto, json or console")
	root.AddCommand(runCommand(), demoCommand(), setupCommand(), publishCommand(), workersCommand(), doctorCommand(),
		statusCommand(), creatorsCommand(), whyCommand(), holdCommand(), releaseCommand(), limitsCommand(), dlqCommand(), purgeCommand(),
		configCommand(), classifyCommand(), benchCommand(), fakeapiCommand())
	return root
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
}
