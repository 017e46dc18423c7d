package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"

	"golang.org/x/oauth2"

	"github.com/headgate-io/headgate/classify"
)

// Refresh renews an access token with a refresh token (RFC 6749 section 6). All
// of it is kept in memory only.
type Refresh struct {
	TokenURL     string
	ClientID     string
	ClientSecret string
	Token        string // the refresh token
}

// credentials are what the API knows us by. They are numbered, so that a call
// that was refused with old ones does not renew the new ones.
type credentials struct {
	header  string
	prefix  string
	current atomic.Pointer[credential]

	mu      sync.Mutex // one at a time renews
	refresh *Refresh
	client  *http.Client
}

type credential struct {
	number uint64
	value  []string // of the header
}

func newCredentials(cfg *Config, transport http.RoundTripper) *credentials {
	c := &credentials{
		header: cfg.AuthHeader, prefix: cfg.KeyPrefix,
		client: &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
	}
	if cfg.Refresh != nil {
		r := *cfg.Refresh
		c.refresh = &r
	}
	c.current.Store(&credential{number: 1, value: []string{cfg.KeyPrefix + cfg.Key}})
	return c
}

// Refresh renews the access token with which a call was refused. It reports false if there
// is no way to, or if the refresh token itself is refused, and an error if
// that could not be found out.
func (c *Client) Refresh(ctx context.Context, refused classify.Answer) (bool, error) {
	return c.credentials.renew(ctx, refused.Credentials)
}

func (c *credentials) renew(ctx context.Context, refused uint64) (bool, error) {
	if c.refresh == nil {
		return false, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	current := c.current.Load()
	if current.number != refused {
		return true, nil // by another call
	}
	conf := oauth2.Config{
		ClientID: c.refresh.ClientID, ClientSecret: c.refresh.ClientSecret,
		Endpoint: oauth2.Endpoint{TokenURL: c.refresh.TokenURL},
	}
	token, err := conf.TokenSource(context.WithValue(ctx, oauth2.HTTPClient, c.client), &oauth2.Token{RefreshToken: c.refresh.Token}).Token()
	var answer *oauth2.RetrieveError
	switch {
	case errors.As(err, &answer) && answer.Response.StatusCode >= 400 && answer.Response.StatusCode < 500 &&
		answer.Response.StatusCode != http.StatusTooManyRequests && answer.Response.StatusCode != http.StatusRequestTimeout:
		return false, nil
	case errors.As(err, &answer):
		// Its text has the answer's body, which is nobody's business.
		return false, fmt.Errorf("renew the access token: %s answered %d", c.refresh.TokenURL, answer.Response.StatusCode)
	case err != nil:
		return false, fmt.Errorf("renew the access token: %w", noURL(err))
	}
	if token.RefreshToken != "" {
		c.refresh.Token = token.RefreshToken
	}
	c.current.Store(&credential{number: current.number + 1, value: []string{c.prefix + token.AccessToken}})
	return true, nil
}
