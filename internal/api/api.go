// Package api makes the HTTP calls: it turns a request into the call that its
// operation describes and reads the answer, whatever it is.
package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
)

// Config says how the provider is called.
type Config struct {
	BaseURL       string            // absolute, http or https; a request cannot change it
	AuthHeader    string            // carries Key; "": none
	Key           string            // never logged; may be empty if it can be renewed
	KeyPrefix     string            // in front of it, e.g. "Bearer "
	Refresh       *Refresh          // how the key is renewed; nil: it is not
	CreatorHeader string            // carries the creator; "": none
	Headers       map[string]string // sent with every call
	Timeout       time.Duration     // of a whole call, unless its operation has one
	MaxBody       int64             // bytes of a decoded answer
	InFlight      int               // calls at once, for the pool of connections
	UserAgent     string
	Operations    map[string]Operation // "*" stands for all that are not named
}

// Operation describes the call for one kind of request. {name} in Path and
// Query is filled from the creator, the operation or the request's JSON object.
type Operation struct {
	Method  string
	Path    string
	Query   map[string]string
	Payload bool // send the request's payload as the body
	Timeout time.Duration
}

// Client calls one provider.
type Client struct {
	cfg       Config
	base      *url.URL
	header    http.Header // of every call
	transport *http.Transport
	ops       map[string]*operation

	credentials *credentials
}

type operation struct {
	Operation
	path   template
	query  []queryTemplate
	fields bool // needs the payload's fields
	safe   bool // RFC 9110 section 9.2.1
}

type queryTemplate struct {
	name  string
	value template
}

// New checks cfg and compiles its operations.
func New(cfg Config) (*Client, error) {
	base, err := url.Parse(cfg.BaseURL)
	if err != nil || base.Host == "" || base.Scheme != "http" && base.Scheme != "https" {
		return nil, fmt.Errorf("base URL %q must be absolute, http or https", cfg.BaseURL)
	}
	c := &Client{cfg: cfg, base: base, ops: make(map[string]*operation), header: http.Header{
		"Accept":     {"application/json"},
		"User-Agent": {cfg.UserAgent},
	}}
	for name, value := range cfg.Headers {
		c.header.Set(name, value)
	}
	for name, op := range cfg.Operations {
		if c.ops[name], err = compile(op); err != nil {
			return nil, fmt.Errorf("operation %q: %w", name, err)
		}
	}
	dialer := &net.Dialer{Timeout: min(cfg.Timeout, 10*time.Second), KeepAlive: 15 * time.Second}
	c.transport = &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         dialer.DialContext,
		ForceAttemptHTTP2:   true,
		MaxIdleConns:        cfg.InFlight,
		MaxIdleConnsPerHost: cfg.InFlight, // the default of 2 would dial for almost every call
		IdleConnTimeout:     30 * time.Second,
		TLSHandshakeTimeout: 10 * time.Second,
	}
	c.credentials = newCredentials(&cfg, c.transport)
	return c, nil
}

// Close drops idle connections.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

func compile(op Operation) (*operation, error) {
	o := &operation{Operation: op}
	var err error
	if o.path, err = parseTemplate(op.Path); err != nil {
		return nil, fmt.Errorf("path: %w", err)
	}
	o.fields = o.path.fields()
	for name, value := range op.Query {
		t, err := parseTemplate(value)
		if err != nil {
			return nil, fmt.Errorf("query %s: %w", name, err)
		}
		o.query = append(o.query, queryTemplate{name, t})
		o.fields = o.fields || t.fields()
	}
	switch op.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		o.safe = true
	}
	return o, nil
}

// Prepare turns a request into a call, or says what the request lacks.
func (c *Client) Prepare(r *publisher.Request) (func(context.Context) classify.Answer, error) {
	op := c.ops[r.Operation]
	if op == nil {
		op = c.ops["*"]
	}
	if op == nil {
		return nil, fmt.Errorf("no operation %q is configured", r.Operation)
	}
	target, err := c.target(op, r)
	if err != nil {
		return nil, err
	}
	header := c.header.Clone()
	if c.cfg.CreatorHeader != "" {
		if !printable(r.Creator) {
			return nil, fmt.Errorf("creator %q cannot be sent in the header %s", r.Creator, c.cfg.CreatorHeader)
		}
		header[c.cfg.CreatorHeader] = []string{r.Creator}
	}
	if r.CorrelationID != "" && printable(r.CorrelationID) {
		header["X-Correlation-Id"] = []string{r.CorrelationID}
	}
	if r.Traceparent != "" && printable(r.Traceparent) {
		header["Traceparent"] = []string{r.Traceparent}
	}
	if !op.safe {
		// The same on every attempt, so that an API that honours it does
		// once what it is asked twice.
		key := r.ID
		if !printable(key) {
			key = publisher.IDToken(key)
		}
		// Spelled so that http.Transport does not know it, see once.
		header["idempotency-key"] = []string{key}
	}
	var body []byte
	if op.Payload {
		body = r.Payload
		contentType := r.Header.Get("Content-Type")
		if contentType == "" || !printable(contentType) {
			contentType = "application/json"
		}
		header["Content-Type"] = []string{contentType}
	}
	timeout := op.Timeout
	if timeout == 0 {
		timeout = c.cfg.Timeout
	}
	return func(ctx context.Context) classify.Answer {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		req := (&http.Request{
			Method: op.Method, URL: target, Host: target.Host, Header: header,
			Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		}).WithContext(ctx)
		once(req, op.safe, body)
		used := c.credentials.current.Load()
		if name := c.credentials.header; name != "" {
			// As it is spelled: some providers compare it byte by byte.
			req.Header[name] = used.value
		}
		a := c.do(req)
		a.Credentials = used.number
		return a
	}, nil
}

// once gives req its body in a way that http.Transport cannot send a second time.
// On a connection that breaks before the answer comes, it repeats by itself
// what is safe or carries an Idempotency-Key, if the body can be had again: a call
// that no limiter has seen and that would break the API's limit.
func once(req *http.Request, safe bool, body []byte) {
	switch {
	case len(body) > 0:
		req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	case safe:
		// A body of unknown length, which turns out to be empty.
		req.Body = io.NopCloser(bytes.NewReader(nil))
	default:
		req.Body = http.NoBody
	}
}

func (c *Client) target(op *operation, r *publisher.Request) (*url.URL, error) {
	values := values{request: r}
	if op.fields {
		if err := values.readFields(); err != nil {
			return nil, err
		}
	}
	path, err := op.path.fill(&values, pathSegment)
	if err != nil {
		return nil, fmt.Errorf("path: %w", err)
	}
	escaped := strings.TrimSuffix(c.base.EscapedPath(), "/") + path
	plain, err := url.PathUnescape(escaped)
	if err != nil {
		return nil, fmt.Errorf("path: %w", err)
	}
	target := &url.URL{Scheme: c.base.Scheme, Host: c.base.Host, Path: plain, RawPath: escaped}
	if len(op.query) > 0 {
		query := make(url.Values, len(op.query))
		for _, q := range op.query {
			value, err := q.value.fill(&values, anyText)
			if err != nil {
				return nil, fmt.Errorf("query %s: %w", q.name, err)
			}
			query[q.name] = []string{value}
		}
		target.RawQuery = query.Encode()
	}
	return target, nil
}

// do makes the call. Redirects are not followed: they are an answer, and lead
// to hosts that nobody configured.
func (c *Client) do(req *http.Request) classify.Answer {
	resp, err := c.transport.RoundTrip(req)
	if err != nil {
		return classify.Answer{Err: err}
	}
	defer resp.Body.Close()
	a := classify.Answer{Status: resp.StatusCode, Header: resp.Header}
	a.Body, err = io.ReadAll(io.LimitReader(resp.Body, c.cfg.MaxBody+1))
	switch {
	case int64(len(a.Body)) > c.cfg.MaxBody:
		a.Body, a.Truncated = a.Body[:c.cfg.MaxBody], true
	case err != nil && resp.StatusCode < 300:
		// Half an answer is none.
		return classify.Answer{Err: fmt.Errorf("read the answer: %w", noURL(err))}
	}
	return a
}

// noURL takes a URL, which may carry what a request asked for, out of an error.
func noURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// printable reports whether s may stand in an HTTP header (RFC 9110 section 5.5).
func printable(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}
