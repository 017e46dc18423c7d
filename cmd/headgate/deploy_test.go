package main

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"

	"github.com/headgate-io/headgate/internal/config"
)

// The compose file is valid for each of its profiles, what it mounts is there,
// and what it starts is what the program knows.
func TestCompose(t *testing.T) {
	for profiles, want := range map[string][]string{
		"":            {"fakeapi", "nats", "worker"}, // .env
		"single":      {"fakeapi", "nats", "worker"},
		"cluster":     {"fakeapi", "nats-1", "nats-2", "nats-3", "worker-1", "worker-2"},
		"single,obs":  {"fakeapi", "grafana", "nats", "prometheus", "worker"},
		"cluster,obs": {"fakeapi", "grafana", "nats-1", "nats-2", "nats-3", "prometheus", "worker-1", "worker-2"},
	} {
		t.Run(profiles, func(t *testing.T) {
			var selected []string
			if profiles != "" {
				selected = strings.Split(profiles, ",")
			}
			options, err := cli.NewProjectOptions([]string{"../../docker-compose.yml"}, cli.WithEnvFiles(), cli.WithDotEnv, cli.WithDefaultProfiles(selected...))
			if err != nil {
				t.Fatal(err)
			}
			project, err := options.LoadProject(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			names := project.ServiceNames()
			slices.Sort(names)
			if !slices.Equal(names, want) {
				t.Errorf("starts %v, want %v", names, want)
			}
			for name, s := range project.Services {
				for _, v := range s.Volumes {
					if v.Type == "bind" {
						if _, err := os.Stat(v.Source); err != nil {
							t.Errorf("%s mounts %v", name, err)
						}
					}
				}
				if s.Build != nil {
					if c, _, err := rootCommand().Find(s.Command); err != nil || c.Name() != s.Command[0] {
						t.Errorf("%s: headgate has no command %v", name, s.Command)
					}
				}
			}
		})
	}
	if _, err := config.Load("../../deploy/compose/headgate.yaml", nil); err != nil {
		t.Error(err)
	}
}
