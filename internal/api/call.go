package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"

	"github.com/headgate-io/headgate/classify"
)

// do makes the call and reads its answer, all within ctx. Redirects are not followed: they
// are an answer, and lead to hosts that are not configured.
func (c *Client) do(ctx context.Context, req *http.Request, op *operation, body []byte, with *credential) classify.Answer {
	connected := false
	req = req.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { connected = true },
	}))
	once(req, op.safe, body)
	if name := c.credentials.header; name != "" {
		// As it is spelled: some providers compare it byte by byte.
		req.Header[name] = with.value
	}
	resp, err := c.transport.RoundTrip(req)
	if err != nil {
		return classify.Answer{Err: noURL(err), Unsent: !connected}
	}
	if resp.StatusCode < 200 {
		// Nothing was asked to be switched, and net/http reads on without a deadline.
		closeBody(resp)
		return classify.Answer{Err: fmt.Errorf("status %d is no final answer: %w", resp.StatusCode, classify.ErrInvalid)}
	}
	// Reading ends with ctx, even where net/http would go on.
	stop := context.AfterFunc(ctx, func() { closeBody(resp) })
	defer closeBody(resp)
	defer stop()

	room := c.memory.room()
	a := classify.Answer{Status: resp.StatusCode, Header: resp.Header, Release: room.release}
	a.Body, a.Truncated, err = readBody(ctx, resp, c.cfg.MaxBody, room)
	if ctx.Err() != nil && err != nil && !errors.Is(err, classify.ErrLocal) {
		err = ctx.Err() // closing the body says something else
	}
	switch {
	case err != nil && resp.StatusCode < 300:
		// Half an answer is none.
		room.release()
		return classify.Answer{Err: fmt.Errorf("read the answer: %w", noURL(err))}
	case op.JSON && resp.StatusCode < 300 && !a.Truncated:
		a.Unexpected = notJSON(op.Method, resp.StatusCode, a.Body)
	}
	return a
}

func closeBody(resp *http.Response) { _ = resp.Body.Close() }

// Steps in which the memory for an answer of unknown length is taken.
const (
	firstStep = 4 << 10
	step      = 64 << 10
)

// readBody reads an answer up to limit bytes, once there is room for it.
func readBody(ctx context.Context, resp *http.Response, limit int64, room *room) (body []byte, truncated bool, err error) {
	if resp.Body == http.NoBody {
		return nil, false, nil
	}
	size := min(resp.ContentLength, limit)
	if size < 0 {
		size = min(firstStep, limit)
	}
	if err := room.grow(ctx, size); err != nil {
		return nil, false, err
	}
	body = make([]byte, 0, size)
	for {
		if len(body) == cap(body) {
			var next [1]byte
			switch _, err := io.ReadFull(resp.Body, next[:]); {
			case err == io.EOF:
				return body, false, nil
			case err != nil:
				return body, false, err
			case int64(len(body)) >= limit:
				return body, true, nil
			}
			more := min(max(int64(cap(body)), firstStep), max(step, int64(cap(body))/4), limit-int64(cap(body)))
			if err := room.grow(ctx, more); err != nil {
				return body, false, err
			}
			grown := make([]byte, len(body), int64(cap(body))+more)
			copy(grown, body)
			body = append(grown, next[0])
		}
		n, err := resp.Body.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		switch {
		case err == io.EOF:
			return body, false, nil
		case err != nil:
			return body, false, err
		}
	}
}

// notJSON says why a success is not the JSON that was promised, "" if it is, or if its status says
// that it has no body.
func notJSON(method string, status int, body []byte) string {
	body = bytes.TrimSpace(bytes.TrimPrefix(body, []byte("\xef\xbb\xbf")))
	switch {
	case status == http.StatusPartialContent:
		return "it is a part of the content, not JSON"
	case len(body) == 0 && (method == http.MethodHead || status == http.StatusNoContent || status == http.StatusResetContent):
		return ""
	case len(body) == 0:
		return "it is empty, not JSON"
	case json.Valid(body):
		return ""
	case body[0] == '<':
		return "it is a page of HTML or XML, not JSON"
	}
	return "it is not valid JSON"
}

// noURL takes a URL, which may carry what a request asked for, out of an error.
func noURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}
