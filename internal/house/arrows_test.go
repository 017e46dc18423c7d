package house

import (
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// floors are the packages of the module, from the top of the house to its ground. A package imports
// packages of lower floors only, so that there is one direction in which to read.
var floors = []struct {
	about    string
	packages []string
}{
	{"the program: commands, tables, exit codes, wiring", []string{"cmd/headgate"}},
	{"what the CLI, a service and a console share", []string{"internal/operator", "internal/bench"}},
	{"what a worker tells about itself", []string{"internal/telemetry"}},
	{"the way of a request", []string{"consumer"}},
	{"the parts around it", []string{
		"internal/ownership", "internal/control", "internal/budget", "internal/api", "internal/dlq", "internal/config",
	}},
	{"what is stored, and whether a call may begin", []string{"publisher", "resilience"}},
	{"the server's answers", []string{"internal/broker"}},
	{"what an API's answer means", []string{"classify"}},
	{"nothing of the module", []string{
		"internal/failpoint", "internal/mutant", "internal/fakeapi", "internal/natsserver", "internal/natsserver/natsservertest",
		"internal/house",
	}},
}

// floorOf is a package's floor, counted from the top; false: it has none.
func floorOf(pkg string) (int, bool) {
	for i, f := range floors {
		if slices.Contains(f.packages, pkg) {
			return i, true
		}
	}
	return 0, false
}

// outside are libraries that belong to one place.
var outside = []struct {
	library string   // and what is below it
	by      []string // the only packages that import it
	why     string
}{
	{"github.com/nats-io/nats-server", []string{"internal/natsserver", "internal/natsserver/natsservertest"},
		"a worker talks to a server by its protocol; a server inside the program is internal/natsserver's"},
	{"github.com/sony/gobreaker", []string{"resilience"}, "resilience decides whether a creator may be called"},
	{"golang.org/x/time/rate", []string{"resilience", "internal/dlq"},
		"resilience limits calls; internal/dlq paces replays, which are no calls"},
	{"golang.org/x/oauth2", []string{"internal/api"}, "credentials of the API are internal/api's"},
	{"github.com/spf13/cobra", []string{"cmd/headgate"}, "commands are the program's"},
	{"github.com/prometheus", []string{"internal/telemetry", "cmd/headgate"}, "metrics are internal/telemetry's"},
	{"net/http", []string{"classify", "internal/api", "internal/fakeapi", "internal/bench", "internal/config", "cmd/headgate"},
		"only internal/api calls an API; a worker is given it as an interface"},
}

// needs are the only libraries that the lower packages import beside the standard library.
var needs = map[string][]string{
	"classify":           {"github.com/goccy/go-yaml"},
	"resilience":         {"github.com/sony/gobreaker", "golang.org/x/time/rate"},
	"publisher":          {"github.com/nats-io/nats.go", "github.com/nats-io/nuid"},
	"internal/broker":    {"github.com/nats-io/nats.go"},
	"internal/failpoint": nil,
	"internal/mutant":    nil,
}

func TestArrows(t *testing.T) {
	for _, s := range sources(t) {
		for _, spec := range s.file.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if wrong := arrow(s.pkg, path); wrong != "" {
				t.Errorf("%s: %s", position(s, spec.Pos()), wrong)
			}
		}
	}
}

// TestArchitecture holds docs/architecture.md against the floors.
func TestArchitecture(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "docs", "architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{"internal/house": true, "internal/natsserver/natsservertest": true} // of tests only
	for _, s := range sources(t) {
		if !named[s.pkg] && !strings.Contains(string(text), s.pkg) {
			t.Errorf("docs/architecture.md does not name package %s", s.pkg)
		}
		named[s.pkg] = true
	}
	for _, link := range regexp.MustCompile(`\]\(([^)#]+)`).FindAllStringSubmatch(string(text), -1) {
		if _, err := os.Stat(filepath.Join(root, "docs", link[1])); err != nil {
			t.Errorf("docs/architecture.md links to %s: %v", link[1], err)
		}
	}
}

func position(s source, p token.Pos) string {
	return s.name + ":" + strconv.Itoa(s.fset.Position(p).Line)
}

// arrow says what is wrong with an import, "" if nothing is.
func arrow(pkg, path string) string {
	own, placed := floorOf(pkg)
	if !placed {
		return "package " + pkg + " has no floor; put it into the table of internal/house/arrows_test.go and into docs/architecture.md"
	}
	if path == module || strings.HasPrefix(path, module+"/") {
		other := strings.TrimPrefix(path, module+"/")
		floor, placed := floorOf(other)
		switch {
		case !placed:
			return "package " + other + " has no floor; put it into the table of internal/house/arrows_test.go and into docs/architecture.md"
		case floor <= own:
			return pkg + " must not import " + other + ": arrows point down, and that is on floor " + strconv.Itoa(floor) +
				" (" + floors[floor].about + "), this on floor " + strconv.Itoa(own) + "; hand in an interface, or move the code down"
		}
		return ""
	}
	for _, o := range outside {
		if below(path, o.library) && !slices.Contains(o.by, pkg) {
			return pkg + " must not import " + path + ", only " + strings.Join(o.by, ", ") + " may: " + o.why
		}
	}
	allowed, few := needs[pkg]
	standard := !strings.Contains(strings.Split(path, "/")[0], ".")
	if few && !standard && !slices.ContainsFunc(allowed, func(l string) bool { return below(path, l) }) {
		return pkg + " must not import " + path + ": beside the standard library it needs " + strings.Join(append([]string{"nothing"}, allowed...)[min(1, len(allowed)):], " and ")
	}
	return ""
}

// below reports whether path is a library, a package of it or a later major version of it.
func below(path, library string) bool { return path == library || strings.HasPrefix(path, library+"/") }

func TestArrow(t *testing.T) {
	for _, c := range []struct {
		pkg, path string
		wrong     string // a part of the message; "": nothing
	}{
		{"cmd/headgate", module + "/consumer", ""},
		{"consumer", module + "/internal/ownership", ""},
		{"internal/ownership", module + "/consumer", "arrows point down"},
		{"internal/ownership", module + "/internal/control", "arrows point down"},
		{"internal/control", module + "/resilience", ""},
		{"resilience", module + "/publisher", "arrows point down"},
		{"publisher", module + "/internal/broker", ""},
		{"internal/broker", module + "/publisher", "arrows point down"},
		{"publisher", module + "/classify", ""},
		{"classify", module + "/resilience", "arrows point down"},
		{"internal/new", module + "/classify", "has no floor"},
		{"consumer", module + "/internal/new", "has no floor"},
		{"consumer", "github.com/nats-io/nats-server/v2/server", "only internal/natsserver"},
		{"internal/natsserver", "github.com/nats-io/nats-server/v2/server", ""},
		{"consumer", "github.com/sony/gobreaker/v2", "only resilience"},
		{"internal/budget", "golang.org/x/time/rate", "only resilience"},
		{"resilience", "golang.org/x/time/rate", ""},
		{"classify", "github.com/goccy/go-yaml/ast", ""},
		{"classify", "github.com/rs/zerolog", "needs github.com/goccy/go-yaml"},
		{"internal/failpoint", "github.com/rs/zerolog", "needs nothing"},
		{"classify", "encoding/json", ""},
		{"resilience", "net/http", "only classify"},
	} {
		got := arrow(c.pkg, c.path)
		if c.wrong == "" && got != "" || !strings.Contains(got, c.wrong) {
			t.Errorf("arrow(%q, %q) = %q, want %q", c.pkg, c.path, got, c.wrong)
		}
	}
}
