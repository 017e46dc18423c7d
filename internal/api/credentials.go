package api

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

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

// RenewError says that it could not be found out whether the credentials can be renewed. It is
// no attempt of the request that was refused: nothing can be called until Retry.
type RenewError struct {
	Retry  time.Time // nothing is tried before
	Reason string    // for people; holds no secret
}

func (e *RenewError) Error() string {
	return fmt.Sprintf("renew the access token: %s; the next try is at %s", e.Reason, e.Retry.UTC().Format(time.TimeOnly))
}

// RetryAt returns Retry.
func (e *RenewError) RetryAt() time.Time { return e.Retry }

// Pauses between renewals that fail: doubled after each.
const (
	firstPause = time.Second
	maxPause   = 30 * time.Second
	// maxStatedPause bounds a Retry-After of the token endpoint.
	maxStatedPause = 10 * time.Minute
)

// credentials are what the API knows us by. They are numbered, so that a call
// that was refused with old ones does not renew the new ones.
type credentials struct {
	header  string
	prefix  string
	current atomic.Pointer[credential]
	client  *http.Client

	turn    chan struct{} // holds one element: the right to renew, and to use what follows
	refresh *Refresh
	style   oauth2.AuthStyle // that the endpoint has taken; unknown until then
	pause   time.Duration    // after the last renewal, which failed; 0: it did not
	failed  *RenewError      // likewise
}

type credential struct {
	number uint64
	value  []string // of the header
}

func newCredentials(cfg *Config, transport http.RoundTripper) *credentials {
	c := &credentials{
		header: cfg.AuthHeader, prefix: cfg.KeyPrefix, turn: make(chan struct{}, 1),
		client: &http.Client{
			Transport:     tokenAnswers{transport},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
	if cfg.Refresh != nil {
		r := *cfg.Refresh
		c.refresh = &r
	}
	c.current.Store(&credential{number: 1, value: []string{cfg.KeyPrefix + cfg.Key}})
	c.turn <- struct{}{}
	return c
}

// Refresh renews the access token with which a call was refused. It reports false if there
// is no way to, or if the refresh token itself is refused, and a [*RenewError] if
// that could not be found out.
func (c *Client) Refresh(ctx context.Context, refused classify.Answer) (bool, error) {
	return c.credentials.renew(ctx, refused.Credentials)
}

func (c *credentials) renew(ctx context.Context, refused uint64) (bool, error) {
	if c.refresh == nil {
		return false, nil
	}
	select {
	case <-c.turn:
		defer func() { c.turn <- struct{}{} }()
	case <-ctx.Done():
		return false, &RenewError{Retry: time.Now().Add(firstPause), Reason: "another call's renewal takes too long"}
	}
	current := c.current.Load()
	if current.number != refused {
		return true, nil // by another call
	}
	if c.failed != nil && time.Now().Before(c.failed.Retry) {
		return false, c.failed
	}
	token, err := c.retrieve(ctx)
	switch {
	case refusedForGood(err):
		c.pause, c.failed = 0, nil
		return false, nil
	case err != nil:
		return false, c.fail(err)
	case strings.TrimSpace(token.AccessToken) != token.AccessToken || !printable(token.AccessToken):
		return false, c.fail(errUnusable)
	}
	c.pause, c.failed = 0, nil
	if token.RefreshToken != "" {
		c.refresh.Token = token.RefreshToken
	}
	c.current.Store(&credential{number: current.number + 1, value: []string{c.prefix + token.AccessToken}})
	return true, nil
}

// retrieve asks the token endpoint. A client with a secret sends it in a header, as every
// server must understand (RFC 6749, section 2.3.1), and in the body to one that refuses that.
func (c *credentials) retrieve(ctx context.Context) (*oauth2.Token, error) {
	styles := []oauth2.AuthStyle{c.style}
	if c.style == oauth2.AuthStyleAutoDetect {
		styles = []oauth2.AuthStyle{oauth2.AuthStyleInParams}
		if c.refresh.ClientSecret != "" {
			styles = []oauth2.AuthStyle{oauth2.AuthStyleInHeader, oauth2.AuthStyleInParams}
		}
	}
	ctx = context.WithValue(ctx, oauth2.HTTPClient, c.client)
	for i, style := range styles {
		conf := oauth2.Config{
			ClientID: c.refresh.ClientID, ClientSecret: c.refresh.ClientSecret,
			Endpoint: oauth2.Endpoint{TokenURL: c.refresh.TokenURL, AuthStyle: style},
		}
		token, err := conf.TokenSource(ctx, &oauth2.Token{RefreshToken: c.refresh.Token}).Token()
		if err == nil {
			c.style = style
		}
		if err == nil || i == len(styles)-1 || !refusedForGood(err) {
			return token, err
		}
	}
	return nil, errUnusable // there is always a style
}

// refusedForGood reports whether a token endpoint refuses what it was sent, as opposed to
// being in trouble itself.
func refusedForGood(err error) bool {
	var answer *oauth2.RetrieveError
	if !errors.As(err, &answer) {
		return false
	}
	switch status := answer.Response.StatusCode; {
	case status == http.StatusTooManyRequests, status == http.StatusRequestTimeout:
		return false
	case status >= 400 && status < 500:
		return true
	}
	return slices.Contains([]string{"invalid_grant", "invalid_client", "unauthorized_client"}, answer.ErrorCode)
}

var errUnusable = errors.New("the answer has no usable access token")

// fail remembers that a renewal failed, for all calls.
func (c *credentials) fail(err error) error {
	c.pause = min(max(c.pause*2, firstPause), maxPause)
	now := time.Now()
	e := &RenewError{Reason: shown(c.refresh.TokenURL) + " answered without a usable access token"}
	pause := c.pause
	var answer *oauth2.RetrieveError
	var transport *url.Error
	generic, _ := classify.Builtin("generic")
	switch {
	case errors.As(err, &answer):
		// Its text has the answer's body, which may hold secrets.
		e.Reason = fmt.Sprintf("%s answered %d", shown(c.refresh.TokenURL), answer.Response.StatusCode)
		if f, failed := generic.Classify(classify.Answer{Status: answer.Response.StatusCode, Header: answer.Response.Header}, now); failed && !f.RetryAfterAssumed {
			pause = max(pause, min(f.RetryAfter, maxStatedPause))
		}
	case errors.As(err, &transport):
		f, _ := generic.Classify(classify.Answer{Err: transport.Err}, now)
		e.Reason = fmt.Sprintf("%s gave no answer: %s", shown(c.refresh.TokenURL), f.Describe())
	}
	e.Retry = now.Add(pause)
	c.failed = e
	return e
}

// shown is a URL without the parts that may be secret.
func shown(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return "the token endpoint"
	}
	return u.Scheme + "://" + u.Host + u.EscapedPath()
}

// tokenAnswers passes answers of a token endpoint on in the form of RFC 6749, section 5.1, which
// some providers write accessToken and refreshToken.
type tokenAnswers struct{ next http.RoundTripper }

// maxTokenAnswer bounds the answer of a token endpoint.
const maxTokenAnswer = 1 << 20

// RoundTrip implements http.RoundTripper.
func (t tokenAnswers) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode < 200 {
		closeBody(resp)
		return nil, fmt.Errorf("status %d is no final answer: %w", resp.StatusCode, classify.ErrInvalid)
	}
	defer closeBody(resp)
	stop := context.AfterFunc(req.Context(), func() { closeBody(resp) })
	defer stop()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenAnswer))
	if err != nil {
		return nil, cmp.Or(req.Context().Err(), err)
	}
	if standard, ok := standardToken(body); ok && resp.StatusCode < 300 {
		body = standard
		resp.Header.Set("Content-Type", "application/json")
	}
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	return resp, nil
}

// standardToken rewrites a token answer that is a JSON object. Members that are not needed may
// have any type.
func standardToken(body []byte) ([]byte, bool) {
	var said map[string]json.RawMessage
	if json.Unmarshal(body, &said) != nil || said == nil {
		return nil, false
	}
	text := func(names ...string) (s string) {
		for _, name := range names {
			if json.Unmarshal(said[name], &s) == nil && s != "" {
				return s
			}
		}
		return ""
	}
	standard, err := json.Marshal(map[string]string{
		"access_token": text("access_token", "accessToken"), "refresh_token": text("refresh_token", "refreshToken"),
		"token_type": text("token_type", "tokenType"), "error": text("error"),
	})
	return standard, err == nil
}
