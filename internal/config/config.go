// Package config reads what an operator configures: a YAML file, overridden by
// HEADGATE_… variables of the environment. examples/headgate.yaml shows every
// knob.
package config

import (
	"time"

	"github.com/goccy/go-yaml"
)

// Config is a whole configuration. Default says what is left out.
type Config struct {
	NATS       NATS                 `yaml:"nats" env:"NATS"`
	Namespace  string               `yaml:"namespace"`
	Partitions int                  `yaml:"partitions"`
	Provider   Provider             `yaml:"provider"`
	Limits     Limits               `yaml:"limits"`
	Breaker    Breaker              `yaml:"breaker"`
	Retry      Retry                `yaml:"retry"`
	Operations map[string]Operation `yaml:"operations,omitempty"`

	Results           Results       `yaml:"results"`
	DLQ               DLQ           `yaml:"dlq"`
	BacklogPerSubject int64         `yaml:"backlog_per_subject"`
	ShutdownGrace     time.Duration `yaml:"shutdown_grace"`
	DataDir           string        `yaml:"data_dir"`
	Listen            string        `yaml:"listen"`
	Admin             string        `yaml:"admin"`
	Log               Log           `yaml:"log"`
}

// NATS is where the streams are. Without URL and Context the program runs a
// server of its own.
type NATS struct {
	URL      string `yaml:"url"`
	Context  string `yaml:"context"`
	Creds    string `yaml:"creds"`
	Replicas int    `yaml:"replicas"`
}

// Provider is the API that is called.
type Provider struct {
	Name             string            `yaml:"name"`
	Profile          string            `yaml:"profile"`
	BaseURL          string            `yaml:"base_url"`
	Auth             Auth              `yaml:"auth"`
	CreatorHeader    string            `yaml:"creator_header"`
	Headers          map[string]string `yaml:"headers,omitempty"`
	Timeout          time.Duration     `yaml:"timeout"`
	MaxResponseBytes Size              `yaml:"max_response_bytes"`
}

// Auth names the header that carries the API key, and the variable of the
// environment that holds it. The key itself is in no file.
type Auth struct {
	Type   string `yaml:"type"` // key or refresh_token
	Header string `yaml:"header"`
	Env    string `yaml:"env"`
	Prefix string `yaml:"prefix"`

	// Of refresh_token: where the access token is renewed, and the variables of the
	// environment that hold what it takes.
	TokenURL        string `yaml:"token_url"`
	RefreshTokenEnv string `yaml:"refresh_token_env"`
	ClientID        string `yaml:"client_id"`
	ClientSecretEnv string `yaml:"client_secret_env"`
}

// Kinds of Auth.
const (
	AuthKey     = "key"
	AuthRefresh = "refresh_token"
)

// Limits of calls.
type Limits struct {
	Creator       CreatorLimits `yaml:"creator"`
	Account       *RateLimit    `yaml:"account,omitempty"`
	InFlight      int           `yaml:"in_flight"`
	RetryAfterCap time.Duration `yaml:"retry_after_cap"`
	CreditsPerDay float64       `yaml:"credits_per_day"`
	CreditsHold   bool          `yaml:"credits_hold"`
}

// CreatorLimits are each creator's.
type CreatorLimits struct {
	Rate        Rate       `yaml:"rate"`
	Burst       int        `yaml:"burst"`
	Concurrency int        `yaml:"concurrency"`
	Read        *RateLimit `yaml:"read,omitempty"`
	Write       *RateLimit `yaml:"write,omitempty"`
}

// RateLimit is a rate and how much of it may come at once.
type RateLimit struct {
	Rate  Rate `yaml:"rate"`
	Burst int  `yaml:"burst"`
}

// Breaker is the circuit breakers'.
type Breaker struct {
	Failures  int           `yaml:"failures"`
	OpenFor   time.Duration `yaml:"open_for"`
	Successes int           `yaml:"successes"`
}

// Retry is how often and how far apart a request is tried.
type Retry struct {
	Attempts  int           `yaml:"attempts"`
	Base      time.Duration `yaml:"base"`
	Max       time.Duration `yaml:"max"`
	Jitter    float64       `yaml:"jitter"`
	Throttled int           `yaml:"throttled"`
	MaxAge    time.Duration `yaml:"max_age"`
}

// Operation is a kind of request and the call it becomes.
type Operation struct {
	Method     string            `yaml:"method"`
	Path       string            `yaml:"path"`
	Query      map[string]string `yaml:"query,omitempty"`
	Body       string            `yaml:"body,omitempty"`      // payload or none
	NotFound   string            `yaml:"not_found,omitempty"` // fail or empty
	Expect     string            `yaml:"expect,omitempty"`    // json
	Idempotent *bool             `yaml:"idempotent,omitempty"`
	Uncertain  string            `yaml:"uncertain,omitempty"` // dead_letter or retry
	Timeout    time.Duration     `yaml:"timeout,omitempty"`
	Retry      *OperationRetry   `yaml:"retry,omitempty"`
}

// OperationRetry overrides Retry for one operation; zero fields do not.
type OperationRetry struct {
	Attempts int           `yaml:"attempts,omitempty"`
	Base     time.Duration `yaml:"base,omitempty"`
	Max      time.Duration `yaml:"max,omitempty"`
}

// Results is how answers are kept.
type Results struct {
	MaxAge time.Duration `yaml:"max_age"`

	// IDInSubject was removed. Files that say true say what is the case, and stay valid.
	IDInSubject *bool `yaml:"id_in_subject,omitempty" removed:"true"`
}

// DLQ is how dead letters are kept.
type DLQ struct {
	MaxAge time.Duration `yaml:"max_age"`
}

// Log is what the program tells on standard error.
type Log struct {
	Level  string `yaml:"level"`
	Format string `yaml:"format"`
}

// Default is a configuration that lacks only the API to call.
func Default() Config {
	return Config{
		NATS:       NATS{Replicas: 1},
		Partitions: 32,
		Provider:   Provider{Name: "api", Profile: "generic", Timeout: 10 * time.Second, MaxResponseBytes: 16 << 20, Auth: Auth{Type: AuthKey}},
		Limits: Limits{
			Creator:       CreatorLimits{Rate: Unlimited, Burst: 1, Concurrency: 3},
			InFlight:      1024,
			RetryAfterCap: 24 * time.Hour,
			CreditsHold:   true,
		},
		Breaker:           Breaker{Failures: 5, OpenFor: time.Minute, Successes: 2},
		Retry:             Retry{Attempts: 4, Base: time.Second, Max: 30 * time.Second, Jitter: 0.3, Throttled: 20, MaxAge: 24 * time.Hour},
		Results:           Results{MaxAge: 72 * time.Hour},
		DLQ:               DLQ{MaxAge: 30 * 24 * time.Hour},
		BacklogPerSubject: 100_000,
		ShutdownGrace:     20 * time.Second,
		DataDir:           "./data",
		Listen:            "127.0.0.1:4222",
		Admin:             "127.0.0.1:9464",
		Log:               Log{Level: "info", Format: "auto"},
	}
}

// Redacted is c without what may be a secret, as YAML.
func (c *Config) Redacted() ([]byte, error) {
	r := *c
	r.NATS.URL = redactURL(r.NATS.URL)
	r.Provider.Headers = make(map[string]string, len(c.Provider.Headers))
	for name, value := range c.Provider.Headers {
		if value != "" {
			value = "[redacted]"
		}
		r.Provider.Headers[name] = value
	}
	return yaml.MarshalWithOptions(r, yaml.Indent(2))
}
