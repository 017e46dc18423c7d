package config

import (
	"encoding"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

// Load reads a file and then the HEADGATE_… variables in environ, which is in the form of
// os.Environ. Without a path there are only those and the defaults.
func Load(path string, environ []string) (*Config, error) {
	if path == "" {
		return Parse("", nil, environ)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the configuration: %w", err)
	}
	return Parse(path, data, environ)
}

// Parse is Load for what has been read from a file. An error names everything that is
// wrong, each with its place and what would be right.
func Parse(filename string, data []byte, environ []string) (*Config, error) {
	c := Default()
	if err := decode(data, &c); err != nil {
		return nil, fmt.Errorf("%s:%w", filename, located(err))
	}
	if err := c.override(environ); err != nil {
		return nil, err
	}
	var errs []error
	for _, p := range c.problems() {
		errs = append(errs, p.at(filename, data))
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	if strings.ContainsAny(c.Provider.Profile, "/.") && !filepath.IsAbs(c.Provider.Profile) && filename != "" {
		c.Provider.Profile = filepath.Join(filepath.Dir(filename), c.Provider.Profile)
	}
	return &c, nil
}

// decode reads data into c. What is there without a value, such as a section
// whose lines are all commented out, keeps its defaults.
func decode(data []byte, c *Config) error {
	file, err := parser.ParseBytes(data, 0)
	if err != nil {
		return err
	}
	for _, doc := range file.Docs {
		if doc.Body == nil || doc.Body.Type() == ast.NullType || doc.Body.Type() == ast.CommentType {
			continue
		}
		ast.Walk(dropNulls{}, doc.Body)
		if err := yaml.NodeToValue(doc.Body, c, yaml.Strict()); err != nil {
			return err
		}
	}
	return nil
}

type dropNulls struct{}

// Visit takes the members without a value out of a mapping.
func (v dropNulls) Visit(node ast.Node) ast.Visitor {
	if m, ok := node.(*ast.MappingNode); ok {
		m.Values = slices.DeleteFunc(m.Values, func(member *ast.MappingValueNode) bool {
			return member.Value.Type() == ast.NullType
		})
	}
	return v
}

// noUnit is what goccy says of a duration without one.
var noUnit = regexp.MustCompile(`cannot unmarshal \S+ into Go struct field \S+ of type time\.Duration`)

// located turns goccy's "[line:column] message" into "line:column: message".
func located(err error) error {
	text := noUnit.ReplaceAllString(yaml.FormatError(err, false, true), "a duration is a number and a unit, such as 30s or 5m")
	if place, rest, ok := strings.Cut(strings.TrimPrefix(text, "["), "] "); ok && strings.HasPrefix(text, "[") {
		return errors.New(place + ": " + rest)
	}
	return errors.New(" " + text)
}

// problem is something in a configuration that cannot be meant.
type problem struct {
	path    string // "$.retry.attempts"
	message string
}

// at says where in the file it is, with the line and a caret, if the file
// has it.
func (p problem) at(filename string, data []byte) error {
	name := strings.TrimPrefix(p.path, "$.")
	if path, err := yaml.PathString(p.path); err == nil && len(data) > 0 {
		if node, err := path.ReadNode(strings.NewReader(string(data))); err == nil {
			at := node.GetToken().Position
			if source, err := path.AnnotateSource(data, false); err == nil {
				return fmt.Errorf("%s:%d:%d: %s %s\n%s", filename, at.Line, at.Column, name, p.message, source)
			}
		}
	}
	if filename == "" {
		return fmt.Errorf("%s %s (set it in a file, or as %s)", name, p.message, variable(name))
	}
	return fmt.Errorf("%s: %s %s", filename, name, p.message)
}

const (
	envPrefix = "HEADGATE_"

	// FileVariable names the configuration file where no flag does.
	FileVariable = envPrefix + "CONFIG"
)

func variable(name string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(name, ".", "_"))
}

// override sets every scalar that a variable names: HEADGATE_ and its path, in upper
// case and joined by _. Variables that name nothing are an error, since a typing
// error would otherwise go unseen.
func (c *Config) override(environ []string) error {
	knobs := map[string]reflect.Value{}
	collect(reflect.ValueOf(c).Elem(), "", knobs)
	var errs []error
	for _, entry := range environ {
		name, value, _ := strings.Cut(entry, "=")
		if !strings.HasPrefix(name, envPrefix) || name == c.Provider.Auth.Env || name == FileVariable {
			continue
		}
		knob, ok := knobs[name]
		if !ok {
			errs = append(errs, fmt.Errorf("%s in the environment sets nothing; the nearest knob is %s", name, nearest(name, knobs)))
			continue
		}
		if err := setText(knob, value); err != nil {
			errs = append(errs, fmt.Errorf("%s in the environment: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

func collect(v reflect.Value, path string, knobs map[string]reflect.Value) {
	for i := range v.NumField() {
		name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("yaml"), ",")
		if path != "" {
			name = path + "." + name
		}
		field := v.Field(i)
		if field.Kind() == reflect.Pointer && field.Type().Elem().Kind() == reflect.Struct {
			if field.IsNil() {
				continue // an optional part is switched on in the file
			}
			field = field.Elem()
		}
		_, text := field.Addr().Interface().(encoding.TextUnmarshaler)
		switch {
		case text, field.Kind() != reflect.Struct && field.Kind() != reflect.Map:
			knobs[variable(name)] = field
		case field.Kind() == reflect.Struct:
			collect(field, name, knobs)
		}
	}
}

func setText(v reflect.Value, s string) (err error) {
	switch target := v.Addr().Interface().(type) {
	case encoding.TextUnmarshaler:
		return target.UnmarshalText([]byte(s))
	case *time.Duration:
		if *target, err = time.ParseDuration(s); err != nil {
			return fmt.Errorf("a duration is a number and a unit, such as 30s or 1h; not %q", s)
		}
	case *string:
		*target = s
	case *bool:
		if *target, err = strconv.ParseBool(s); err != nil {
			return fmt.Errorf("must be true or false, not %q", s)
		}
	case **bool:
		value, err := strconv.ParseBool(s)
		if err != nil {
			return fmt.Errorf("must be true or false, not %q", s)
		}
		*target = &value
	case *int:
		if *target, err = strconv.Atoi(s); err != nil {
			return fmt.Errorf("must be a whole number, not %q", s)
		}
	case *int64:
		if *target, err = strconv.ParseInt(s, 10, 64); err != nil {
			return fmt.Errorf("must be a whole number, not %q", s)
		}
	case *float64:
		if *target, err = strconv.ParseFloat(s, 64); err != nil {
			return fmt.Errorf("must be a number, not %q", s)
		}
	default:
		return fmt.Errorf("cannot be set by the environment")
	}
	return nil
}

// nearest is the knob whose name shares the most with the one that was typed.
func nearest(name string, knobs map[string]reflect.Value) string {
	best, most := "", -1
	names := make([]string, 0, len(knobs))
	for n := range knobs {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		shared := 0
		for shared < min(len(n), len(name)) && n[shared] == name[shared] {
			shared++
		}
		for i := 0; i < min(len(n), len(name)) && n[len(n)-1-i] == name[len(name)-1-i]; i++ {
			shared++
		}
		if shared > most {
			best, most = n, shared
		}
	}
	return best
}
