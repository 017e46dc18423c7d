package api

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
)

// raw is a server that writes bytes, after it has read a request; then it waits
// for the client to go.
func raw(t *testing.T, write func(net.Conn)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
					write(conn)
				}
			}()
		}
	}()
	return "http://" + listener.Addr().String()
}

func callTo(t *testing.T, url, operation string, timeout time.Duration) classify.Answer {
	t.Helper()
	c := newClient(t, http.NotFoundHandler(), func(cfg *Config) {
		cfg.BaseURL, cfg.Timeout = url, timeout
	})
	call, err := c.Prepare(&publisher.Request{ID: "1", Creator: "c", Operation: operation, Payload: []byte(`{"limit":1}`)})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	a := call(t.Context())
	if took := time.Since(began); took > timeout+10*time.Second {
		t.Errorf("it took %v, its deadline was %v", took, timeout)
	}
	return a
}

func failure(t *testing.T, a classify.Answer) classify.Failure {
	t.Helper()
	p, _ := classify.Builtin("generic")
	f, failed := p.Classify(a, time.Now())
	if !failed {
		t.Fatalf("a success: %d %q", a.Status, a.Body)
	}
	return f
}

// TestEveryStateOfAnAnswerEnds: whatever a server sends, and wherever it stops, the call ends with its
// deadline, and is called by its name.
func TestEveryStateOfAnAnswerEnds(t *testing.T) {
	silence := func(text string) func(net.Conn) {
		return func(c net.Conn) {
			fmt.Fprint(c, text)
			_, _ = io.Copy(io.Discard, c) // until the client goes
		}
	}
	trickle := func(text, drop string) func(net.Conn) {
		return func(c net.Conn) {
			fmt.Fprint(c, text)
			gone := make(chan struct{})
			go func() { _, _ = io.Copy(io.Discard, c); close(gone) }()
			for tick := time.NewTicker(10 * time.Millisecond); ; {
				select {
				case <-tick.C:
					fmt.Fprint(c, drop)
				case <-gone:
					return
				}
			}
		}
	}
	cut := func(text string) func(net.Conn) { return func(c net.Conn) { fmt.Fprint(c, text) } }
	for name, tc := range map[string]struct {
		write func(net.Conn)
		class classify.Class
		cause classify.Cause
	}{
		"nothing":              {silence(""), classify.Timeout, classify.CauseReadTimeout},
		"closed":               {cut(""), classify.NetworkError, classify.CauseEOF},
		"half a status":        {silence("HTTP/1.1 2"), classify.Timeout, classify.CauseReadTimeout},
		"headers trickle":      {trickle("HTTP/1.1 200 OK\r\nX: ", "x"), classify.Timeout, classify.CauseReadTimeout},
		"many headers":         {trickle("HTTP/1.1 200 OK\r\n", "X: y\r\n"), classify.Timeout, classify.CauseReadTimeout},
		"headers, cut":         {cut("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n"), classify.NetworkError, classify.CauseEOF},
		"no body":              {silence("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"), classify.Timeout, classify.CauseReadTimeout},
		"half a body":          {silence("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{\"a"), classify.Timeout, classify.CauseReadTimeout},
		"half a body, cut":     {cut("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{\"a"), classify.NetworkError, classify.CauseEOF},
		"the body trickles":    {trickle("HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n", "x"), classify.Timeout, classify.CauseReadTimeout},
		"until close, trickle": {trickle("HTTP/1.1 200 OK\r\n\r\n", "x"), classify.Timeout, classify.CauseReadTimeout},
		"half a chunk":         {silence("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"), classify.Timeout, classify.CauseReadTimeout},
		"half a chunk, cut":    {cut("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"), classify.NetworkError, classify.CauseEOF},
		"no last chunk":        {silence("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"), classify.Timeout, classify.CauseReadTimeout},
		"chunks trickle":       {trickle("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\nx\r\n"), classify.Timeout, classify.CauseReadTimeout},
		"no chunk":             {silence("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"), classify.InvalidResponse, classify.CauseInvalid},
		"chunk too long":       {silence("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n"), classify.InvalidResponse, classify.CauseInvalid},
		"101, silence":         {silence("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"), classify.InvalidResponse, classify.CauseInvalid},
		"101, trickle":         {trickle("HTTP/1.1 101 Switching Protocols\r\n\r\n", "x"), classify.InvalidResponse, classify.CauseInvalid},
		"103, silence":         {silence("HTTP/1.1 103 Early Hints\r\n\r\n"), classify.Timeout, classify.CauseReadTimeout},
		"103 for ever":         {trickle("", "HTTP/1.1 103 Early Hints\r\n\r\n"), classify.Timeout, classify.CauseReadTimeout},
		"bare CR":              {silence("HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 2\r\n\r\n{}"), classify.InvalidResponse, classify.CauseInvalid},
		"NUL":                  {silence("HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 2\r\n\r\n{}"), classify.InvalidResponse, classify.CauseInvalid},
		"ESC":                  {silence("HTTP/1.1 200 OK\r\nX: a\x1bb\r\nContent-Length: 2\r\n\r\n{}"), classify.InvalidResponse, classify.CauseInvalid},
		"no colon":             {silence("HTTP/1.1 200 OK\r\nhello\r\n\r\n"), classify.InvalidResponse, classify.CauseInvalid},
		"not HTTP":             {silence("SSH-2.0-OpenSSH_9.9\r\n"), classify.InvalidResponse, classify.CauseInvalid},
		"no status":            {silence("HTTP/1.1 abc OK\r\n\r\n"), classify.InvalidResponse, classify.CauseInvalid},
		"length -1":            {silence("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"), classify.InvalidResponse, classify.CauseInvalid},
		"two lengths":          {silence("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"), classify.InvalidResponse, classify.CauseInvalid},
		"unknown encoding":     {silence("HTTP/1.1 200 OK\r\nTransfer-Encoding: brotli\r\n\r\n"), classify.InvalidResponse, classify.CauseInvalid},
		"headers, 2 MB":        {silence("HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 2<<20) + "\r\n\r\n"), classify.InvalidResponse, classify.CauseInvalid},
		"no gzip":              {silence("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 20\r\n\r\nthis is no gzip at all"), classify.InvalidResponse, classify.CauseInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, operation := range []string{"top", "send"} {
				timeout := time.Minute
				if tc.cause == classify.CauseReadTimeout {
					timeout = 500 * time.Millisecond
				}
				a := callTo(t, raw(t, tc.write), operation, timeout)
				a.Done()
				f := failure(t, a)
				if f.Class != tc.class || f.Cause != tc.cause || f.Done != classify.DoneMaybe || a.Unsent || a.Status != 0 {
					t.Errorf("%s: %s, done %q, unsent %v, status %d: %v", operation, f.Describe(), f.Done, a.Unsent, a.Status, a.Err)
				}
			}
		})
	}
}

// TestInterimAnswers are not the answer.
func TestInterimAnswers(t *testing.T) {
	a := callTo(t, raw(t, func(c net.Conn) {
		fmt.Fprint(c, strings.Repeat("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", 50)+"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
	}), "send", time.Minute)
	if a.Status != 200 || string(a.Body) != "{}" {
		t.Errorf("%d %q, %v", a.Status, a.Body, a.Err)
	}
}

// TestFailureThatBreaksOff keeps its status.
func TestFailureThatBreaksOff(t *testing.T) {
	a := callTo(t, raw(t, func(c net.Conn) { fmt.Fprint(c, "HTTP/1.1 409 Conflict\r\nContent-Length: 50\r\n\r\n{\"co") }), "send", time.Minute)
	if f := failure(t, a); f.Class != classify.Conflict || f.Done != classify.DoneNo {
		t.Errorf("%s, done %q", f.Describe(), f.Done)
	}
}

// TestProvablyUnsent: what never reached the API may be called again.
func TestProvablyUnsent(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := "http://" + listener.Addr().String()
	listener.Close()
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and says nothing: no TLS handshake
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	foreign := httptest.NewUnstartedServer(http.NotFoundHandler())
	foreign.Config.ErrorLog = log.New(io.Discard, "", 0)
	foreign.StartTLS()
	defer foreign.Close()
	for url, cause := range map[string]classify.Cause{
		closed:                               classify.CauseRefused,
		"https://" + silent.Addr().String():  classify.CauseConnectTimeout,
		foreign.URL:                          classify.CauseTLS,
		"http://headgate.invalid":            "", // no such host, or no answer of the resolver in time
		"http://[fe80::1%25headgate0]:12345": "", // no way, or no such address, as the machine has it
	} {
		a := callTo(t, url, "send", time.Second)
		f := failure(t, a)
		if !a.Unsent || a.Uncertain() || f.Done != classify.DoneNo || cause != "" && f.Cause != cause {
			t.Errorf("%s: %s, unsent %v, done %q: %v", url, f.Describe(), a.Unsent, f.Done, a.Err)
		}
	}
}

// TestHTTP2Refusals: a stream that the server says it has not begun with is certain, another is not.
func TestHTTP2Refusals(t *testing.T) {
	keys := httptest.NewUnstartedServer(http.NotFoundHandler())
	keys.StartTLS()
	defer keys.Close()
	for name, tc := range map[string]struct {
		answer func(f *http2.Framer, stream uint32) error
		done   classify.Done
	}{
		"refused stream": {func(f *http2.Framer, stream uint32) error {
			return f.WriteRSTStream(stream, http2.ErrCodeRefusedStream)
		}, classify.DoneNo},
		"GOAWAY before":     {func(f *http2.Framer, _ uint32) error { return f.WriteGoAway(0, http2.ErrCodeNo, nil) }, classify.DoneNo},
		"GOAWAY, an error":  {func(f *http2.Framer, _ uint32) error { return f.WriteGoAway(0, http2.ErrCodeEnhanceYourCalm, nil) }, classify.DoneNo},
		"GOAWAY after":      {func(f *http2.Framer, stream uint32) error { return f.WriteGoAway(stream, http2.ErrCodeNo, nil) }, classify.DoneMaybe},
		"reset":             {func(f *http2.Framer, stream uint32) error { return f.WriteRSTStream(stream, http2.ErrCodeInternal) }, classify.DoneMaybe},
		"closed":            {func(*http2.Framer, uint32) error { return io.EOF }, classify.DoneMaybe},
		"unasked end, 1xx":  {func(f *http2.Framer, stream uint32) error { return writeStatus(f, stream, "101") }, classify.DoneMaybe},
		"no status":         {func(f *http2.Framer, stream uint32) error { return writeStatus(f, stream, "") }, classify.DoneMaybe},
		"a status of words": {func(f *http2.Framer, stream uint32) error { return writeStatus(f, stream, "fine") }, classify.DoneMaybe},
	} {
		t.Run(name, func(t *testing.T) {
			listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: keys.TLS.Certificates, NextProtos: []string{"h2"}})
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			go func() {
				for {
					conn, err := listener.Accept()
					if err != nil {
						return
					}
					go serveHTTP2(conn, tc.answer)
				}
			}()
			c := newClient(t, http.NotFoundHandler(), func(cfg *Config) { cfg.BaseURL, cfg.Timeout = "https://"+listener.Addr().String(), time.Second })
			c.transport.TLSClientConfig = keys.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
			c.transport.TLSClientConfig.NextProtos = nil
			call, err := c.Prepare(&publisher.Request{ID: "1", Creator: "c", Operation: "send", Payload: []byte("{}")})
			if err != nil {
				t.Fatal(err)
			}
			a := call(t.Context())
			if f := failure(t, a); f.Done != tc.done {
				t.Errorf("%s, done %q: %v", f.Describe(), f.Done, a.Err)
			}
		})
	}
}

// serveHTTP2 answers every stream in the same way.
func serveHTTP2(conn net.Conn, answer func(*http2.Framer, uint32) error) {
	defer conn.Close()
	if _, err := io.ReadFull(conn, make([]byte, len(http2.ClientPreface))); err != nil {
		return
	}
	f := http2.NewFramer(conn, conn)
	if f.WriteSettings() != nil {
		return
	}
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				err = f.WriteSettingsAck()
			}
		case *http2.DataFrame:
			if frame.StreamEnded() {
				err = answer(f, frame.StreamID)
			}
		}
		if err != nil {
			return
		}
	}
}

func writeStatus(f *http2.Framer, stream uint32, status string) error {
	var block bytes.Buffer
	field := hpack.HeaderField{Name: ":status", Value: status}
	if status == "" {
		field = hpack.HeaderField{Name: "x", Value: "y"}
	}
	if err := hpack.NewEncoder(&block).WriteField(field); err != nil {
		return err
	}
	return f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true})
}

// TestExpectJSON: where an operation promises JSON, a success is JSON.
func TestExpectJSON(t *testing.T) {
	for name, tc := range map[string]struct {
		method, contentType, body string
		status                    int
		ok                        bool
	}{
		"an object":        {body: `{"a":1}`, ok: true},
		"a list":           {body: ` [1, 2] ` + "\n", ok: true},
		"a byte order":     {body: "\xef\xbb\xbf{}", ok: true},
		"created":          {body: `{"a":1}`, status: 201, ok: true},
		"wrong type named": {body: `{}`, contentType: "text/html", ok: true},
		"204":              {status: 204, ok: true},
		"205":              {status: 205, ok: true},
		"HEAD":             {method: "HEAD", ok: true},
		"a page":           {body: "<!DOCTYPE html><html></html>", contentType: "text/html"},
		"text":             {body: "OK", contentType: "text/plain"},
		"nothing":          {},
		"blanks":           {body: " \r\n"},
		"cut":              {body: `{"a":[1,2`},
		"two":              {body: `{}{}`},
		"a part":           {body: `{"a":1}`, status: 206},
		"accepted":         {status: 202},
	} {
		handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", tc.contentType)
			w.WriteHeader(max(tc.status, 200))
			_, _ = io.WriteString(w, tc.body)
		})
		for _, promised := range []bool{true, false} {
			c := newClient(t, handler, func(cfg *Config) {
				method := tc.method
				if method == "" {
					method = "POST"
				}
				cfg.Operations = map[string]Operation{"send": {Method: method, Path: "/x", JSON: promised}}
			})
			call, err := c.Prepare(&publisher.Request{ID: "1", Creator: "c", Operation: "send"})
			if err != nil {
				t.Fatal(err)
			}
			a := call(t.Context())
			for _, profile := range classify.Builtins() {
				p, _ := classify.Builtin(profile)
				f, failed := p.Classify(a, time.Now())
				if failed != (promised && !tc.ok) || failed && (f.Class != classify.InvalidResponse || f.Done != classify.DoneMaybe || f.Retryable) {
					t.Errorf("%s: %s: promised %v: %v %s, done %q", name, profile, promised, failed, f.Describe(), f.Done)
				}
			}
		}
	}
}

// TestCompressedAnswer is read as what it stands for.
func TestCompressedAnswer(t *testing.T) {
	text := `{"a":"` + strings.Repeat("x", 300_000) + `"}`
	c := newClient(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		_, _ = io.WriteString(z, text)
		_ = z.Close()
	}), nil)
	call, err := c.Prepare(&publisher.Request{ID: "1", Creator: "c", Operation: "send"})
	if err != nil {
		t.Fatal(err)
	}
	if a := call(t.Context()); string(a.Body) != text {
		t.Errorf("%d bytes, %v", len(a.Body), a.Err)
	}
}
