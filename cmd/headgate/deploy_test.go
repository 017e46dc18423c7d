package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/headgate-io/headgate/internal/config"
)

// The files that docker-compose.yml mounts are there, and what it starts is
// what the program knows.
func TestCompose(t *testing.T) {
	const root = "../.."
	text, err := os.ReadFile(filepath.Join(root, "docker-compose.yml"))
	if err != nil {
		t.Fatal(err)
	}
	var compose struct {
		Services map[string]struct {
			Image, Build string
			Command      []string
			Volumes      []string
			DependsOn    map[string]any `yaml:"depends_on"`
		}
		Volumes map[string]any
	}
	if err := yaml.Unmarshal(text, &compose); err != nil {
		t.Fatal(err)
	}
	for name, s := range compose.Services {
		if (s.Image == "") == (s.Build == "") {
			t.Errorf("%s needs an image or a build", name)
		}
		for other := range s.DependsOn {
			if _, there := compose.Services[other]; !there {
				t.Errorf("%s depends on %s, which is not there", name, other)
			}
		}
		for _, v := range s.Volumes {
			source, _, _ := strings.Cut(v, ":")
			if !strings.HasPrefix(source, ".") {
				if _, there := compose.Volumes[source]; !there {
					t.Errorf("%s: no volume %s", name, source)
				}
			} else if _, err := os.Stat(filepath.Join(root, source)); err != nil {
				t.Errorf("%s mounts %v", name, err)
			}
		}
		if s.Build != "" {
			if c, _, err := rootCommand().Find(s.Command); err != nil || c.Name() != s.Command[0] {
				t.Errorf("%s: headgate has no command %v", name, s.Command)
			}
		}
	}
	if _, err := config.Load(filepath.Join(root, "deploy/compose/headgate.yaml"), nil); err != nil {
		t.Error(err)
	}
}
