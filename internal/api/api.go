// Package api makes the HTTP calls: it turns a request into the call that its
// operation describes and reads the answer, whatever it is.
package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
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
	Memory        int64             // bytes of answers that are read or not yet stored, at once; 0: a quarter of what the process may have
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
	JSON    bool // a success has to be JSON
	Timeout time.Duration
}

// Client calls one provider.
type Client struct {
	cfg       Config
	base      *url.URL
	header    http.Header // of every call
	transport *http.Transport
	ops       map[string]*operation
	memory    *memory

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
		return nil, errors.New("the base URL must be absolute, http or https")
	}
	if !printable(cfg.KeyPrefix + cfg.Key) {
		return nil, errors.New("the API key has a character that no header can carry, such as a line break at its end")
	}
	if cfg.Memory <= 0 {
		cfg.Memory = defaultMemory()
	}
	c := &Client{cfg: cfg, base: base, memory: newMemory(cfg.Memory, cfg.InFlight), ops: make(map[string]*operation), header: http.Header{
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

		MaxResponseHeaderBytes: 1 << 20,
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
	if err := o.path.escapeLiterals(); err != nil {
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
	header, err := c.headerOf(op, r)
	if err != nil {
		return nil, err
	}
	var body []byte
	if op.Payload {
		body = r.Payload
	}
	timeout := op.Timeout
	if timeout == 0 {
		timeout = c.cfg.Timeout
	}
	return func(ctx context.Context) classify.Answer {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		req := &http.Request{
			// net/http may still read the header of an earlier call that timed out.
			Method: op.Method, URL: target, Host: target.Host, Header: maps.Clone(header),
			Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		}
		used := c.credentials.current.Load()
		a := c.do(ctx, req, op, body, used)
		a.Credentials = used.number
		return a
	}, nil
}

// headerOf returns the header of a call but for its credentials.
func (c *Client) headerOf(op *operation, r *publisher.Request) (http.Header, error) {
	header := c.header.Clone()
	if c.cfg.CreatorHeader != "" {
		// HTTP trims blanks: two creators would be one.
		if !printable(r.Creator) || strings.Trim(r.Creator, " \t") != r.Creator {
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
		// Spelled so that http.Transport does not know it, see once.
		header["idempotency-key"] = []string{idempotencyKey(r.ID)}
	}
	if op.Payload {
		contentType := r.Header.Get("Content-Type")
		if contentType == "" || !printable(contentType) {
			contentType = "application/json"
		}
		header["Content-Type"] = []string{contentType}
	}
	return header, nil
}

// idempotencyKey is the same on every attempt, so that an API that honours it does
// once what it is asked twice, and another for every id. An id that a header would
// change is encoded; then it has a =, as no other key has.
func idempotencyKey(id string) string {
	if !printable(id) || strings.Trim(id, " \t") != id || strings.Contains(id, "=") {
		return publisher.IDToken(id)
	}
	return id
}

// once gives req its body in a way that http.Transport cannot send a second time.
// On a connection that breaks before the answer comes, it repeats by itself a call that
// is safe or carries an Idempotency-Key, if the body can be had again: a call
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
	if target.EscapedPath() != escaped {
		// It would be sent as something else, in which a value may have become a path.
		return nil, errors.New("path: it cannot be sent as it is written; percent-encode the special characters of the operation's path")
	}
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

// printable reports whether s may stand in an HTTP header (RFC 9110 section 5.5).
func printable(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}
