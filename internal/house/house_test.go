// Package house has tests that keep the module in order: which package may import which, and the
// words in which comments, documents and messages are written.
package house

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

// module is the module's path, root its folder as seen from here.
const (
	module = "github.com/headgate-io/headgate"
	root   = "../.."
)

// source is a Go file that is no test.
type source struct {
	name string // from the module's root
	pkg  string // its folder: "consumer", "cmd/headgate"
	file *ast.File
	fset *token.FileSet
}

// sources parses every Go file of the module that is no test, whatever its build tags are.
func sources(t *testing.T) []source {
	t.Helper()
	var all []source
	walk(t, func(name string) {
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, filepath.Join(root, name), nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, source{name: name, pkg: filepath.ToSlash(filepath.Dir(name)), file: file, fset: fset})
	})
	if len(all) < 100 {
		t.Fatalf("only %d Go files were found in %s: is this the module's root?", len(all), root)
	}
	return all
}

// walk visits the files of the module, by their names from its root.
func walk(t *testing.T, visit func(name string)) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		switch base := d.Name(); {
		case d.IsDir() && (base == "testdata" || base == "vendor" || strings.HasPrefix(base, ".") && base != ".." && base != "."):
			return fs.SkipDir
		case !d.IsDir():
			visit(name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
