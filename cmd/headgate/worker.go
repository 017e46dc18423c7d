package main

import (
	"errors"
	"fmt"
	"net/http"
	"os"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/consumer"
	"github.com/headgate-io/headgate/internal/api"
	"github.com/headgate-io/headgate/internal/config"
	"github.com/headgate-io/headgate/resilience"
)

// workerConfig turns a configuration into a worker's. The returned function
// ends the connections to the API.
func workerConfig(s *session) (consumer.Config, func(), error) {
	c := s.cfg
	profile, err := classify.Load(c.Provider.Profile)
	if err != nil {
		return consumer.Config{}, nil, exitError{exitConfig, fmt.Errorf("provider.profile: %w", err)}
	}
	key, refresh, err := credentials(c.Provider.Auth)
	if err != nil {
		return consumer.Config{}, nil, exitError{exitConfig, err}
	}
	calls := make(map[string]api.Operation, len(c.Operations))
	operations := make(map[string]consumer.Operation, len(c.Operations))
	for name, op := range c.Operations {
		calls[name] = api.Operation{Method: op.Method, Path: op.Path, Query: op.Query, Payload: op.SendsPayload(), JSON: op.Expect == "json", Timeout: op.Timeout}
		operations[name] = consumer.Operation{
			Kind: kind(op.Method), NotFoundEmpty: notFoundEmpty(op, profile), Retry: retryOf(c, op.Retry),
			NotIdempotent: op.Idempotent != nil && !*op.Idempotent, RetryUncertain: op.Uncertain == "retry",
		}
	}
	client, err := api.New(api.Config{
		BaseURL: c.Provider.BaseURL, AuthHeader: c.Provider.Auth.Header, Key: key, KeyPrefix: c.Provider.Auth.Prefix, Refresh: refresh,
		CreatorHeader: c.Provider.CreatorHeader, Headers: c.Provider.Headers,
		Timeout: c.Provider.Timeout, MaxBody: int64(c.Provider.MaxResponseBytes),
		InFlight: c.Limits.InFlight, UserAgent: "headgate/" + buildVersion(), Operations: calls,
	})
	if err != nil {
		return consumer.Config{}, nil, exitError{exitConfig, fmt.Errorf("provider: %w", err)}
	}
	return consumer.Config{
		Name: workerName(), Provider: c.Provider.Name, Topology: s.topology(),
		Profile: profile, API: client, Operations: operations, Gates: gates(c),
		Credits: consumer.Credits{PerDay: c.Limits.CreditsPerDay, Hold: c.Limits.CreditsHold},
		Grace:   c.ShutdownGrace, Log: s.log,
	}, client.Close, nil
}

func gates(c *config.Config) resilience.Config {
	creator := c.Limits.Creator
	g := resilience.Config{
		Creator: resilience.Limits{
			Rate:        resilience.Rate{PerSecond: creator.Rate.PerSecond(), Burst: creator.Burst},
			Read:        rateOf(creator.Read),
			Write:       rateOf(creator.Write),
			Concurrency: creator.Concurrency,
		},
		InFlight: c.Limits.InFlight,
		Breaker:  resilience.Breaker{Failures: c.Breaker.Failures, OpenFor: c.Breaker.OpenFor, Successes: c.Breaker.Successes},
	}
	if account := rateOf(c.Limits.Account); account != nil {
		g.Account = *account
	}
	return g
}

func rateOf(r *config.RateLimit) *resilience.Rate {
	if r == nil {
		return nil
	}
	return &resilience.Rate{PerSecond: r.Rate.PerSecond(), Burst: r.Burst}
}

func retryOf(c *config.Config, own *config.OperationRetry) consumer.Retry {
	r := consumer.Retry{
		Backoff:  resilience.Backoff{Base: c.Retry.Base, Max: c.Retry.Max, Jitter: c.Retry.Jitter},
		Attempts: c.Retry.Attempts, Throttled: c.Retry.Throttled, MaxAge: c.Retry.MaxAge, Cap: c.Limits.RetryAfterCap,
	}
	if own != nil {
		r.Attempts = orElse(own.Attempts, r.Attempts)
		r.Base = orElse(own.Base, r.Base)
		r.Max = max(orElse(own.Max, r.Max), r.Base)
	}
	return r
}

func orElse[T comparable](value, otherwise T) T {
	var zero T
	if value == zero {
		return otherwise
	}
	return value
}

func kind(method string) resilience.Kind {
	if method == http.MethodGet || method == http.MethodHead {
		return resilience.Read
	}
	return resilience.Write
}

// notFoundEmpty: what an operation says, otherwise, for look-ups, what the provider
// means by a 404.
func notFoundEmpty(op config.Operation, p *classify.Profile) bool {
	if op.NotFound == "" {
		return kind(op.Method) == resilience.Read && p.NotFoundEmpty()
	}
	return op.NotFound == "empty"
}

// credentials reads the key, and what renews it, from the environment. They are
// never printed.
func credentials(a config.Auth) (key string, refresh *api.Refresh, err error) {
	if a.Header == "" {
		return "", nil, nil
	}
	if a.Env != "" {
		key = os.Getenv(a.Env)
	}
	if a.Type != config.AuthRefresh {
		if key == "" {
			return "", nil, errors.New("the API key is missing: set it in the environment variable " + a.Env + ", which provider.auth.env names")
		}
		return key, nil, nil
	}
	refresh = &api.Refresh{TokenURL: a.TokenURL, ClientID: a.ClientID, Token: os.Getenv(a.RefreshTokenEnv)}
	if refresh.Token == "" {
		return "", nil, errors.New("the refresh token is missing: set it in the environment variable " + a.RefreshTokenEnv + ", which provider.auth.refresh_token_env names")
	}
	if a.ClientSecretEnv != "" {
		if refresh.ClientSecret = os.Getenv(a.ClientSecretEnv); refresh.ClientSecret == "" {
			return "", nil, errors.New("the client's secret is missing: set it in the environment variable " + a.ClientSecretEnv + ", which provider.auth.client_secret_env names")
		}
	}
	return key, refresh, nil
}
