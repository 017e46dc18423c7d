package config

import (
	"fmt"
	"math"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"pgregory.net/rapid"
)

const sample = "../../examples/headgate.yaml"

// The sample states defaults, except where it says that it does not.
func TestSampleStatesTheDefaults(t *testing.T) {
	text, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	c, err := Load(sample, nil)
	if err != nil {
		t.Fatal(err)
	}
	got, want := flat(t, *c), flat(t, Default())
	for path, value := range want {
		if got[path] == value {
			continue
		}
		key := path[strings.LastIndex(path, ".")+1:]
		line := regexp.MustCompile(`(?m)^\s*` + key + `:.*$`)
		excused := false
		for _, l := range line.FindAllString(string(text), -1) {
			excused = excused || strings.Contains(l, "example")
		}
		if !excused {
			t.Errorf("%s: the sample says %v, the default is %v", path, got[path], value)
		}
	}
}

// Every knob is in the sample.
func TestSampleIsComplete(t *testing.T) {
	text, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	var check func(reflect.Type)
	check = func(typ reflect.Type) {
		for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Map {
			typ = typ.Elem()
		}
		if typ.Kind() != reflect.Struct {
			return
		}
		for i := range typ.NumField() {
			name, _, _ := strings.Cut(typ.Field(i).Tag.Get("yaml"), ",")
			if _, removed := typ.Field(i).Tag.Lookup("removed"); removed {
				continue
			}
			if name != "" && !regexp.MustCompile(`\b`+name+`:`).Match(text) {
				t.Errorf("%s.%s is not in the sample", typ.Name(), name)
			}
			check(typ.Field(i).Type)
		}
	}
	check(reflect.TypeFor[Config]())
}

func flat(t *testing.T, c Config) map[string]any {
	t.Helper()
	text, err := yaml.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	var tree map[string]any
	if err := yaml.Unmarshal(text, &tree); err != nil {
		t.Fatal(err)
	}
	out := map[string]any{}
	var walk func(string, any)
	walk = func(path string, v any) {
		if m, ok := v.(map[string]any); ok {
			for k, v := range m {
				walk(strings.TrimPrefix(path+"."+k, "."), v)
			}
			return
		}
		out[path] = v
	}
	walk("", tree)
	return out
}

func TestErrorsSayWhereAndWhat(t *testing.T) {
	for name, tc := range map[string]struct {
		text string
		want []string
	}{
		"unknown key":    {"nats:\n  ulr: x\n", []string{"h.yaml:2:3:", "ulr", "^"}},
		"not YAML":       {"nats: [\n", []string{"h.yaml:1:"}},
		"wrong type":     {"partitions: many\n", []string{"h.yaml:1:13:", "^"}},
		"out of range":   {"retry:\n  attempts: 0\n", []string{"h.yaml:2:13: retry.attempts must be 1 to 100, not 0", "attempts: 0", "^"}},
		"rate":           {"limits: {creator: {rate: 60/x}}\n", []string{"h.yaml:1:26:", "60/m"}},
		"size":           {"provider: {max_response_bytes: lots}\n", []string{"h.yaml:1:32:", "16MiB"}},
		"duration":       {"breaker: {open_for: 60}\n", []string{"h.yaml:1:21: a duration is a number and a unit"}},
		"several":        {"partitions: 0\nretry: {jitter: 2}\n", []string{"partitions must be 1 to 1024, not 0", "retry.jitter must be 0 to 1, not 2"}},
		"method":         {"operations: {a: {method: FETCH, path: /x}}\n", []string{"h.yaml:1:26: operations.a.method must be one of GET"}},
		"path":           {"operations:\n  \"*\": {method: GET, path: \"/x/{\"}\n", []string{"path must start with /"}},
		"percent":        {"operations: {a: {method: GET, path: /x/%/y}}\n", []string{"h.yaml:1:37: operations.a.path has a % that is followed by no two", "%25"}},
		"expect":         {"operations: {a: {method: GET, path: /x, expect: xml}}\n", []string{"operations.a.expect must be json"}},
		"body of a GET":  {"operations: {a: {method: GET, path: /x, body: payload}}\n", []string{"cannot be sent with GET"}},
		"base URL":       {"provider: {base_url: api.example.com}\n", []string{"absolute http or https URL"}},
		"user in URL":    {"provider: {base_url: \"https://u:hunter2@api.example.com\"}\n", []string{"without user"}},
		"auth":           {"provider: {auth: {header: apiKey}}\n", []string{"needs env"}},
		"account":        {"limits: {account: {rate: inf, burst: 1}}\n", []string{"limits.account needs a rate"}},
		"url or context": {"nats: {url: x, context: y}\n", []string{"keep one"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("h.yaml", []byte(tc.text), nil)
			if err == nil {
				t.Fatal("taken for right")
			}
			for _, want := range tc.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error lacks %q:\n%v", want, err)
				}
			}
		})
	}
}

func TestEnvironment(t *testing.T) {
	text := []byte("partitions: 8\nprovider: {auth: {header: k, env: HEADGATE_MY_KEY}}\nlimits: {account: {rate: 1/s, burst: 1}}\n")
	c, err := Parse("h.yaml", text, []string{
		"HEADGATE_PARTITIONS=16", "HEADGATE_LIMITS_CREATOR_RATE=30/m", "HEADGATE_LIMITS_CREATOR_BURST=7", "HEADGATE_PROVIDER_TIMEOUT=3s",
		"HEADGATE_RESULTS_ID_IN_SUBJECT=true", "HEADGATE_RESULTS_MAX_AGE=24h", "HEADGATE_RETRY_JITTER=0.5", "HEADGATE_PROVIDER_MAX_RESPONSE_BYTES=1MiB",
		"HEADGATE_LIMITS_ACCOUNT_RATE=2/s", "HEADGATE_MY_KEY=secret", "HEADGATE_CONFIG=h.yaml", "PATH=/bin",
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.Partitions != 16 || c.Limits.Creator.Rate.PerSecond() != 0.5 || c.Limits.Creator.Burst != 7 || c.Provider.Timeout != 3*time.Second ||
		c.Results.MaxAge != 24*time.Hour || c.Retry.Jitter != 0.5 || c.Provider.MaxResponseBytes != 1<<20 || c.Limits.Account.Rate.PerSecond() != 2 {
		t.Errorf("got %+v", c)
	}
	for entry, want := range map[string]string{
		"HEADGATE_PARTITION=16":        "HEADGATE_PARTITIONS",
		"HEADGATE_PARTITIONS=x":        "HEADGATE_PARTITIONS in the environment: must be a whole number",
		"HEADGATE_PARTITIONS=0":        "partitions must be 1 to 1024, not 0",
		"HEADGATE_RETRY_MAX=soon":      "a duration is a number and a unit",
		"HEADGATE_LIMITS_ACCOUNT_X=1s": "sets nothing",
	} {
		if _, err := Parse("", nil, []string{entry}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %q", entry, err, want)
		}
	}
}

func TestRedacted(t *testing.T) {
	c := Default()
	c.NATS.URL = "nats://user:hunter2@one:4222,nats://tok3n@two:4222,nats://three:4222"
	c.Provider.Headers = map[string]string{"X-Secret": "hunter3"}
	text, err := c.Redacted()
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"hunter2", "tok3n", "hunter3"} {
		if strings.Contains(string(text), secret) {
			t.Errorf("%s is printed:\n%s", secret, text)
		}
	}
	if !strings.Contains(string(text), "nats://three:4222") {
		t.Errorf("what is no secret is left out:\n%s", text)
	}
	if c.Provider.Headers["X-Secret"] != "hunter3" {
		t.Error("redacting changed the configuration")
	}
}

// What is printed can be read again, and means the same.
func TestPrintedConfigurationIsOne(t *testing.T) {
	c, err := Load(sample, nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := c.Redacted()
	if err != nil {
		t.Fatal(err)
	}
	again, err := Parse("again.yaml", text, nil)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	again.Provider.Headers, c.Provider.Headers = nil, nil
	if !reflect.DeepEqual(again, c) {
		t.Errorf("got %+v\nwant %+v", again, c)
	}
}

func TestNothingIsTheDefault(t *testing.T) {
	want := Default()
	for _, text := range []string{"", "\n", "# only a comment\n", "---\n", "retry:\n  # attempts: 3\nnats:\n", "limits: {creator: }\n"} {
		c, err := Parse("h.yaml", []byte(text), nil)
		if err != nil {
			t.Errorf("%q: %v", text, err)
		} else if !reflect.DeepEqual(*c, want) {
			t.Errorf("%q: got %+v", text, c)
		}
	}
}

func TestProfileIsRelativeToTheFile(t *testing.T) {
	c, err := Parse("/etc/headgate/h.yaml", []byte("provider: {profile: ./my-api.yaml}\n"), nil)
	if err != nil || c.Provider.Profile != "/etc/headgate/my-api.yaml" {
		t.Errorf("profile %v, %v", c, err)
	}
}

func TestRate(t *testing.T) {
	for text, perSecond := range map[string]float64{"60/m": 1, "10/s": 10, "1.5/s": 1.5, "7200/h": 2, "86400/d": 1, "inf": 0, "unlimited": 0} {
		r, err := ParseRate(text)
		if err != nil || r.PerSecond() != perSecond {
			t.Errorf("%s: %v a second, %v", text, r.PerSecond(), err)
		}
	}
	for _, bad := range []string{"", "60", "60/", "/m", "60/min", "-1/s", "0/s", "NaN/s", "Inf/s", "1e999/s"} {
		if r, err := ParseRate(bad); err == nil {
			t.Errorf("%q is read as %v", bad, r)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		r := Rate{rapid.Float64Range(0.001, 1e9).Draw(t, "calls"), rapid.SampledFrom([]time.Duration{time.Second, time.Minute, time.Hour, 24 * time.Hour}).Draw(t, "per")}
		again, err := ParseRate(r.String())
		if err != nil || math.Abs(again.PerSecond()-r.PerSecond()) > 1e-9*r.PerSecond() {
			t.Fatalf("%v is read as %v, %v", r, again, err)
		}
	})
}

func TestSize(t *testing.T) {
	for text, bytes := range map[string]Size{"16MiB": 16 << 20, "512KiB": 512 << 10, "1000": 1000, "2GiB": 2 << 30, "0": 0} {
		if s, err := ParseSize(text); err != nil || s != bytes {
			t.Errorf("%s: %d, %v", text, s, err)
		}
	}
	for _, bad := range []string{"", "MiB", "-1", "1.5MiB", "16MB", "99999999999GiB"} {
		if s, err := ParseSize(bad); err == nil {
			t.Errorf("%q is read as %d", bad, s)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		s := Size(rapid.Int64Min(0).Draw(t, "size"))
		if again, err := ParseSize(s.String()); err != nil || again != s {
			t.Fatalf("%d is read as %d, %v", s, again, err)
		}
	})
}

func FuzzParse(f *testing.F) {
	text, err := os.ReadFile(sample)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte("operations: {\"a'b\": {method: GET}}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := Parse("fuzz.yaml", data, nil); err != nil {
			_ = fmt.Sprint(err)
		}
	})
}

// The knob was removed: files with its former default stay valid, those that switch it off learn
// why they are refused.
func TestIDInSubjectWasRemoved(t *testing.T) {
	if _, err := Parse("h.yaml", []byte("results:\n  id_in_subject: true\n"), nil); err != nil {
		t.Error(err)
	}
	const want = "results.id_in_subject was removed: "
	if _, err := Parse("h.yaml", []byte("results:\n  id_in_subject: false\n"), nil); err == nil || !strings.Contains(err.Error(), "h.yaml:2:18: "+want) {
		t.Errorf("got %v", err)
	}
	if _, err := Parse("", nil, []string{"HEADGATE_RESULTS_ID_IN_SUBJECT=false"}); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v", err)
	}
	c := Default()
	text, err := c.Redacted()
	if err != nil || strings.Contains(string(text), "id_in_subject") {
		t.Errorf("%v: %s", err, text)
	}
}
