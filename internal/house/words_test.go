package house

import (
	"go/ast"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// vague are words that stand for a person or a thing that has a name: the operator, the API, the
// other worker. A text in which they are rare is read once.
var vague = regexp.MustCompile(`(?i)\b(?:whoever|somebody|nobody|everybody|anybody|whom)\b`)

// mostVague is how many of them there may be in 1,000 words.
const mostVague = 0.6

var word = regexp.MustCompile(`[\p{L}\p{N}][\p{L}\p{N}'’_-]*`)

// tally counts words, and remembers where the vague ones are.
type tally struct {
	words int
	at    []string
}

// add counts a text that begins at a line of a file.
func (c *tally) add(name string, line int, text string) {
	for i, l := range strings.Split(text, "\n") {
		c.words += len(word.FindAllString(l, -1))
		for _, w := range vague.FindAllString(l, -1) {
			c.at = append(c.at, name+":"+strconv.Itoa(line+i)+": "+w)
		}
	}
}

func (c *tally) check(t *testing.T, about string) {
	t.Helper()
	if c.words == 0 {
		t.Fatalf("no words were found in %s", about)
	}
	rate := 1000 * float64(len(c.at)) / float64(c.words)
	t.Logf("%s: %d vague words in %d, %.2f per 1,000", about, len(c.at), c.words, rate)
	if rate > mostVague {
		t.Errorf("%s: %.2f vague words per 1,000, more than %.1f; name the operator, the API or the worker instead:\n%s",
			about, rate, mostVague, strings.Join(c.at, "\n"))
	}
}

func TestWordsOfComments(t *testing.T) {
	var c tally
	for _, s := range sources(t) {
		for _, group := range s.file.Comments {
			for _, comment := range group.List {
				c.add(s.name, s.fset.Position(comment.Pos()).Line, comment.Text)
			}
		}
	}
	c.check(t, "comments")
}

// TestWordsOfTexts looks at the strings in the code, which are printed and logged.
func TestWordsOfTexts(t *testing.T) {
	var c tally
	for _, s := range sources(t) {
		ast.Inspect(s.file, func(n ast.Node) bool {
			if _, isImport := n.(*ast.ImportSpec); isImport {
				return false
			}
			if l, isLiteral := n.(*ast.BasicLit); isLiteral && l.Kind == token.STRING {
				if text, err := strconv.Unquote(l.Value); err == nil {
					c.add(s.name, s.fset.Position(l.Pos()).Line, text)
				}
			}
			return true
		})
	}
	c.check(t, "texts")
}

// TestWordsOfDocuments looks at the documents, and at the files that users are given to change.
func TestWordsOfDocuments(t *testing.T) {
	var c tally
	walk(t, func(name string) {
		switch filepath.Ext(name) {
		case ".md", ".yaml", ".yml", ".conf":
		default:
			if !strings.HasSuffix(name, ".schema.json") {
				return
			}
		}
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		c.add(name, 1, string(text))
	})
	c.check(t, "documents")
}

func TestTally(t *testing.T) {
	var c tally
	c.add("a.go", 7, "Nobody asks\nfor whom; nobodies are no such words.")
	if c.words != 9 || len(c.at) != 2 || c.at[0] != "a.go:7: Nobody" || c.at[1] != "a.go:8: whom" {
		t.Errorf("%d words, %q", c.words, c.at)
	}
}
