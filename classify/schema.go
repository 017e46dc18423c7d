package classify

import (
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/printer"
	"github.com/goccy/go-yaml/token"
)

// The format of a profile's file: docs/profiles.md. Every value is checked
// where it is read, because there its place in the file is known.
type (
	profileFile struct {
		Name     nameText    `yaml:"name"`
		NotFound notFound    `yaml:"not_found"`
		Body     bodyFile    `yaml:"body"`
		Headers  headersFile `yaml:"headers"`
		Rules    ruleList    `yaml:"rules"`
	}

	bodyFile struct {
		Code         placeList `yaml:"code"`
		Message      placeList `yaml:"message"`
		RequestID    placeList `yaml:"request_id"`
		Action       placeList `yaml:"action"`
		Field        placeList `yaml:"field"`
		Retryable    placeList `yaml:"retryable"`
		RetryAfter   placeList `yaml:"retry_after"`
		RetryAfterMS placeList `yaml:"retry_after_ms"`
	}

	headersFile struct {
		RequestID         headerNames `yaml:"request_id"`
		RetryAfter        headerNames `yaml:"retry_after"`
		Remaining         headerName  `yaml:"remaining"`
		Reset             headerName  `yaml:"reset"`
		ConcurrencyLimit  headerName  `yaml:"concurrency_limit"`
		ConcurrencyActive headerName  `yaml:"concurrency_active"`
		Credits           headerName  `yaml:"credits"`

		at *token.Token
	}

	ruleFile struct {
		Code        patternList      `yaml:"code"`
		Status      statusList       `yaml:"status"`
		Error       errorList        `yaml:"error"`
		Body        bodyConditions   `yaml:"body"`
		Headers     headerConditions `yaml:"headers"`
		Concurrency reached          `yaml:"concurrency"`

		Class     className `yaml:"class"`
		Scope     scopeName `yaml:"scope"`
		Action    plainText `yaml:"action"`
		Retryable flag      `yaml:"retryable"`
		Refresh   flag      `yaml:"refresh"`
		Done      doneName  `yaml:"done"`
		CodeFrom  placeList `yaml:"code_from"`
		Note      plainText `yaml:"note"`

		at *token.Token
	}
)

// Classes that a rule can give: those that an API's answer can have.
var ruleClasses = []Class{
	RateLimit, ConcurrencyLimit, ServerError, UpstreamError, NetworkError, Timeout, Locked, RulesOutdated,
	NotFound, Unauthorized, SessionExpired, Forbidden, Validation, Gone, Conflict, PayloadTooLarge, Billing,
	QuotaExceeded, NotAcceptable, Denied, InvalidResponse, Unknown,
}

// Classes are all that a dead letter can have: the API's, and Headgate's own.
func Classes() []Class {
	return slices.Concat(ruleClasses, []Class{Expired, MalformedRequest, Poison, Uncertain, Internal})
}

var scopes = []Scope{ScopeRequest, ScopeCreator, ScopeAccount, ScopeProvider}

// ParseError says where a profile is wrong, why, and what is allowed.
type ParseError struct {
	File         string
	Line, Column int // from 1
	Message      string
	source       string // the lines around, with a caret
}

func (e *ParseError) Error() string {
	return fmt.Sprintf("%s:%d:%d: %s\n%s", e.File, e.Line, e.Column, e.Message, e.source)
}

// readFile decodes a profile's YAML. filename is for the errors.
func readFile(filename string, data []byte) (*profileFile, error) {
	parsed, err := parser.ParseBytes(data, 0)
	if err != nil {
		return nil, place(filename, err)
	}
	docs := slices.DeleteFunc(parsed.Docs, func(d *ast.DocumentNode) bool { return d.Body == nil })
	switch {
	case len(docs) == 0:
		return nil, fmt.Errorf("%s: the profile is empty; it has %s", filename, strings.Join(keysOf[profileFile](), ", "))
	case len(docs) > 1:
		return nil, place(filename, fail(docs[1].Body, "a file holds one profile; a second one starts here"))
	}
	var plain plainValues
	if ast.Walk(&plain, docs[0].Body); plain.err != nil {
		return nil, place(filename, plain.err)
	}
	var file profileFile
	if err := decode(docs[0].Body, &file, "a profile"); err != nil {
		return nil, place(filename, err)
	}
	if file.Name == "" {
		base := filepath.Base(filename)
		file.Name = nameText(strings.TrimSuffix(base, filepath.Ext(base)))
	}
	return &file, nil
}

// plainValues refuses what YAML allows and would mean something else than it
// seems to: a key without a value does not say "any", and an alias is resolved
// within its own part of the file only.
type plainValues struct{ err error }

func (v *plainValues) Visit(node ast.Node) ast.Visitor {
	switch n := node.(type) {
	case *ast.MappingValueNode:
		if n.Value == nil || n.Value.Type() == ast.NullType {
			v.err = fail(n.Key, "%s has no value; leave it out, or write one", n.Key.GetToken().Value)
		}
	case *ast.NullNode:
		v.err = fail(node, "there is no value here; leave it out, or write one")
	case *ast.AliasNode, *ast.AnchorNode, *ast.TagNode, *ast.MergeKeyNode:
		v.err = fail(node, "anchors, aliases and tags are not supported; write the value out")
	}
	if v.err != nil {
		return nil
	}
	return v
}

// fail is an error at a node.
func fail(at ast.Node, format string, args ...any) error {
	return failAt(at.GetToken(), format, args...)
}

func failAt(at *token.Token, format string, args ...any) error {
	return &yaml.SyntaxError{Message: fmt.Sprintf(format, args...), Token: at}
}

// place adds the file, the line and a caret to an error that knows its token.
func place(filename string, err error) error {
	var at yaml.Error
	if !errors.As(err, &at) || at.GetToken() == nil || at.GetToken().Position == nil {
		return fmt.Errorf("%s: %w", filename, err)
	}
	t := at.GetToken()
	var p printer.Printer
	return &ParseError{
		File: filename, Line: t.Position.Line, Column: t.Position.Column,
		Message: at.GetMessage(), source: strings.TrimRight(p.PrintErrorToken(t, false), "\n"),
	}
}

// start is where a mapping starts: its first key.
func start(node ast.Node) *token.Token {
	if m, ok := node.(ast.MapNode); ok {
		if entries := m.MapRange(); entries.Next() {
			return entries.Key().GetToken()
		}
	}
	return node.GetToken()
}

// decode reads a mapping into a struct, and says what is allowed where it does
// not fit.
func decode[T any](node ast.Node, into *T, what string) error {
	if _, ok := node.(ast.MapNode); !ok {
		return fail(node, "%s is a mapping, with the keys %s", what, strings.Join(keysOf[T](), ", "))
	}
	err := yaml.NodeToValue(node, into, yaml.Strict())
	var unknown *yaml.UnknownFieldError
	if errors.As(err, &unknown) {
		return failAt(unknown.Token, "unknown key %q; %s has %s", unknown.Token.Value, what, strings.Join(keysOf[T](), ", "))
	}
	return err
}

func keysOf[T any]() []string {
	var keys []string
	for f := range reflect.TypeFor[T]().Fields() {
		if key := f.Tag.Get("yaml"); key != "" {
			keys = append(keys, key)
		}
	}
	return keys
}

func (b *bodyFile) UnmarshalYAML(node ast.Node) error {
	type plain bodyFile
	return decode(node, (*plain)(b), "body")
}

func (h *headersFile) UnmarshalYAML(node ast.Node) error {
	type plain headersFile
	h.at = start(node)
	return decode(node, (*plain)(h), "headers")
}

type ruleList []ruleFile

func (l *ruleList) UnmarshalYAML(node ast.Node) error {
	list, ok := node.(*ast.SequenceNode)
	if !ok {
		return fail(node, "rules is a list; each rule starts with a dash")
	}
	type plain ruleFile
	for _, item := range list.Values {
		var r ruleFile
		if err := decode(item, (*plain)(&r), "a rule"); err != nil {
			return err
		}
		r.at = start(item)
		*l = append(*l, r)
	}
	return nil
}

// scalarText returns the text of a scalar as it is written.
func scalarText(node ast.Node) (string, error) {
	switch n := node.(type) {
	case *ast.StringNode:
		return n.Value, nil
	case *ast.LiteralNode:
		return n.Value.Value, nil
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
		return n.GetToken().Value, nil
	}
	return "", fail(node, "a text, a number, true or false is expected here, not %s", strings.ToLower(node.Type().YAMLName()))
}

// items returns the texts of a list, or of the one scalar that stands for it.
func items(node ast.Node) ([]string, []ast.Node, error) {
	nodes := []ast.Node{node}
	if list, ok := node.(*ast.SequenceNode); ok {
		nodes = list.Values
	}
	if len(nodes) == 0 {
		return nil, nil, fail(node, "an empty list matches nothing; leave the key out, or name something")
	}
	all := make([]string, len(nodes))
	for i, n := range nodes {
		s, err := scalarText(n)
		if err != nil {
			return nil, nil, err
		}
		if s == "" {
			return nil, nil, fail(n, "an empty text matches nothing; leave the key out, or name something")
		}
		all[i] = s
	}
	return all, nodes, nil
}

// each parses the items of a list.
func each[T any](node ast.Node, into *[]T, parse func(string, ast.Node) (T, error)) error {
	all, nodes, err := items(node)
	if err != nil {
		return err
	}
	for i, s := range all {
		v, err := parse(s, nodes[i])
		if err != nil {
			return err
		}
		*into = append(*into, v)
	}
	return nil
}

// oneOf is a text of which few are allowed.
func oneOf[T ~string](node ast.Node, into *T, what string, allowed ...T) error {
	s, err := scalarText(node)
	if err != nil {
		return err
	}
	if !slices.Contains(allowed, T(s)) {
		return fail(node, "unknown %s %q; there are %s", what, s, join(allowed))
	}
	*into = T(s)
	return nil
}

func join[T ~string](list []T) string {
	all := make([]string, len(list))
	for i, s := range list {
		all[i] = string(s)
	}
	return strings.Join(all, ", ")
}

type (
	plainText   string
	nameText    string
	notFound    string
	reached     string
	className   Class
	scopeName   Scope
	headerName  string
	headerNames []string
	placeList   places
	patternList []pattern
	statusList  statuses
	errorList   []Cause
	doneName    Done

	bodyConditions   []condition
	headerConditions []condition
)

// flag is true, false or not said.
type flag struct{ said, value bool }

func (f *flag) UnmarshalYAML(node ast.Node) error {
	b, ok := node.(*ast.BoolNode)
	if !ok {
		return fail(node, "true or false is expected here")
	}
	*f = flag{true, b.Value}
	return nil
}

func (t *plainText) UnmarshalYAML(node ast.Node) error {
	s, err := scalarText(node)
	*t = plainText(s)
	return err
}

func (t *nameText) UnmarshalYAML(node ast.Node) error {
	s, err := scalarText(node)
	if err == nil && (s == "" || len(s) > 64 || strings.Trim(strings.ToLower(s), "abcdefghijklmnopqrstuvwxyz0123456789-_.") != "") {
		return fail(node, "a name has 1 to 64 letters, digits, dashes, dots and underscores")
	}
	*t = nameText(s)
	return err
}

func (t *notFound) UnmarshalYAML(node ast.Node) error {
	return oneOf(node, t, "not_found", "empty", "failure")
}

func (t *reached) UnmarshalYAML(node ast.Node) error {
	return oneOf(node, t, "concurrency", "reached")
}

func (t *className) UnmarshalYAML(node ast.Node) error {
	return oneOf(node, (*Class)(t), "class", ruleClasses...)
}

func (t *scopeName) UnmarshalYAML(node ast.Node) error {
	return oneOf(node, (*Scope)(t), "scope", scopes...)
}

func (t *doneName) UnmarshalYAML(node ast.Node) error {
	return oneOf(node, (*Done)(t), "done", DoneNo, DoneMaybe)
}

func (t *errorList) UnmarshalYAML(node ast.Node) error {
	return each(node, (*[]Cause)(t), func(_ string, at ast.Node) (cause Cause, err error) {
		err = oneOf(at, &cause, "error", causes...)
		return cause, err
	})
}

func (t *statusList) UnmarshalYAML(node ast.Node) error {
	return each(node, (*[]span)(t), func(s string, at ast.Node) (span, error) {
		status, ok := parseStatus(s)
		if !ok {
			return span{}, fail(at, "unknown status %q; write 404, 4xx, 500-599 or any", s)
		}
		return status, nil
	})
}

func (t *patternList) UnmarshalYAML(node ast.Node) error {
	return each(node, (*[]pattern)(t), func(s string, at ast.Node) (pattern, error) {
		p := parsePattern(s)
		if strings.Contains(p.text, "*") {
			return p, fail(at, "a * stands for anything only at the start or the end of %q", s)
		}
		return p, nil
	})
}

func parsePlace(s string, at ast.Node) (path, error) {
	p := path(strings.Split(s, "."))
	if slices.Contains(p, "") || len(p) > 8 {
		return nil, fail(at, "%q leads nowhere; a place in the body is written as keys with dots between them, such as error.code", s)
	}
	return p, nil
}

func (t *placeList) UnmarshalYAML(node ast.Node) error {
	return each(node, (*[]path)(t), parsePlace)
}

func parseHeader(s string, at ast.Node) (string, error) {
	ok := s != "" && strings.IndexFunc(s, func(r rune) bool {
		return r <= ' ' || r >= 0x7f || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, r)
	}) < 0
	if !ok {
		return "", fail(at, "%q is not the name of an HTTP header", s)
	}
	return http.CanonicalHeaderKey(s), nil
}

func (t *headerNames) UnmarshalYAML(node ast.Node) error {
	return each(node, (*[]string)(t), parseHeader)
}

func (t *headerName) UnmarshalYAML(node ast.Node) error {
	s, err := scalarText(node)
	if err != nil {
		return err
	}
	s, err = parseHeader(s, node)
	*t = headerName(s)
	return err
}

func (t *bodyConditions) UnmarshalYAML(node ast.Node) error {
	return conditions(node, (*[]condition)(t), "body", func(c *condition, key string, at ast.Node) (err error) {
		c.path, err = parsePlace(key, at)
		return err
	})
}

func (t *headerConditions) UnmarshalYAML(node ast.Node) error {
	return conditions(node, (*[]condition)(t), "headers", func(c *condition, key string, at ast.Node) (err error) {
		c.header, err = parseHeader(key, at)
		return err
	})
}

func conditions(node ast.Node, into *[]condition, what string, key func(*condition, string, ast.Node) error) error {
	entries, ok := node.(ast.MapNode)
	if !ok {
		return fail(node, "the condition %s is a mapping, such as {status: DENIED}", what)
	}
	for it := entries.MapRange(); it.Next(); {
		var c condition
		if err := key(&c, it.Key().GetToken().Value, it.Key()); err != nil {
			return err
		}
		if err := (*patternList)(&c.values).UnmarshalYAML(it.Value()); err != nil {
			return err
		}
		*into = append(*into, c)
	}
	if len(*into) == 0 {
		return fail(node, "the condition %s is empty; leave it out, or name something", what)
	}
	return nil
}
