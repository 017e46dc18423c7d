package fakeapi

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

func call(t *testing.T, url, creator string) *http.Response {
	t.Helper()
	limit := time.Minute
	if creator == "hangs" {
		limit = 300 * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("x-creator", creator)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil
	}
	t.Cleanup(func() { _ = resp.Body.Close() })
	return resp
}

func TestReports(t *testing.T) {
	api := New("x-creator", 1, func(name string) Behaviour {
		switch name {
		case "throttled":
			return Throttled(2, time.Second, Healthy(0, 0))
		case "down":
			return Down
		case "hangs":
			return Hangs
		}
		return Bursts(4, 2, Healthy(0, 0))
	})
	server := httptest.NewServer(api)
	t.Cleanup(server.Close)
	began := time.Now()
	for range 2 { // fine, then 429 for a second
		call(t, server.URL, "throttled")
	}
	for api.creator("throttled").earlyCalls() == 0 && time.Since(began) < time.Minute {
		call(t, server.URL, "throttled")
	}
	for range 4 {
		call(t, server.URL, "bursts")
	}
	if resp := call(t, server.URL, "down"); resp != nil {
		t.Errorf("down: %s", resp.Status)
	}
	if resp := call(t, server.URL, "hangs"); resp != nil {
		t.Errorf("hangs: %s", resp.Status)
	}

	reports := map[string]Report{}
	for _, r := range api.Reports() {
		reports[r.Creator] = r
	}
	if r := reports["throttled"]; r.Statuses[200]+r.Statuses[429] != r.Calls || r.Early != 1 {
		t.Errorf("throttled: %+v", r)
	}
	if r := reports["bursts"]; r.Statuses[503] != 2 || r.Statuses[200] != 2 || r.InFlight != 1 {
		t.Errorf("bursts: %+v", r)
	}
	if r := reports["down"]; r.Calls < 1 || len(r.CallStarts) != r.Calls {
		t.Errorf("down: %+v", r)
	}
}

// The demo's cast is the same at each run, and most of it is healthy.
func TestCast(t *testing.T) {
	names := map[string]bool{}
	for n := range 100 {
		names[Name(n)] = true
	}
	if len(names) != 100 {
		t.Errorf("%d names for 100 creators", len(names))
	}
	cast := Cast{Relinked: func() bool { return false }}
	down := cast.Behaviour(cast.Down())
	if r := down(1, nil); r.Status != 0 {
		t.Errorf("%s answers %d", cast.Down(), r.Status)
	}
}

func (c *creator) earlyCalls() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.early
}
