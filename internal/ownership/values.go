package ownership

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/publisher"
)

// Keys of OWNERS.
const (
	keyWorker    = "worker."    // + the worker's token
	keyPartition = "partition." // + its number
	keyCalling   = "calling."   // + the partition's number + "." + the worker's token
)

// Member is a worker as it describes itself in OWNERS.
type Member struct {
	Worker   string    `json:"worker"`
	Host     string    `json:"host,omitempty"`
	PID      int       `json:"pid"`
	Since    time.Time `json:"since"`
	InFlight int       `json:"in_flight"`
}

// calling is a value of calling.<n>.<worker>. The creators are subject tokens: names may have
// bytes that JSON cannot carry.
type calling struct {
	Worker   string   `json:"worker"`
	Creators []string `json:"creators"`
}

// parseWorkerKey returns the worker that a key names.
func parseWorkerKey(key string) (string, bool) {
	token, ok := strings.CutPrefix(key, keyWorker)
	if !ok {
		return "", false
	}
	name, err := publisher.DecodeToken(token)
	return name, err == nil
}

// parsePartitionKey returns the partition that a key names.
func parsePartitionKey(key string) (int, bool) {
	number, ok := strings.CutPrefix(key, keyPartition)
	if !ok {
		return 0, false
	}
	return parseNumber(number)
}

// parseCallingKey returns the partition and the worker that a key names.
func parseCallingKey(key string) (int, string, bool) {
	rest, ok := strings.CutPrefix(key, keyCalling)
	if !ok {
		return 0, "", false
	}
	number, token, _ := strings.Cut(rest, ".")
	n, ok := parseNumber(number)
	name, err := publisher.DecodeToken(token)
	return n, name, ok && err == nil
}

// parseNumber takes one spelling only, so that two keys never name one partition.
func parseNumber(s string) (int, bool) {
	n, err := strconv.Atoi(s)
	return n, err == nil && n >= 0 && strconv.Itoa(n) == s
}

// parseMember returns nil for a value that is not the named worker's. It may have fields that
// this version does not know.
func parseMember(name string, value []byte) *Member {
	var m Member
	if json.Unmarshal(value, &m) != nil || m.Worker != name || m.Since.IsZero() {
		return nil
	}
	return &m
}

// parseLease returns nil for a message that is no lease: a mark, or a foreign value.
func parseLease(m *message) *storedLease {
	if m == nil || m.marks() {
		return nil
	}
	return parseLeaseValue(m.data)
}

func parseLeaseValue(value []byte) *storedLease {
	var s storedLease
	if strict(value, &s) != nil || s.Since.IsZero() {
		return nil
	}
	if _, err := publisher.EncodeToken(s.Worker); err != nil {
		return nil
	}
	return &s
}

// parseCalling returns the creators that a worker says it is calling.
func parseCalling(name string, value []byte) ([]string, bool) {
	var c calling
	if strict(value, &c) != nil || c.Worker != name {
		return nil, false
	}
	creators := make([]string, 0, len(c.Creators))
	for _, token := range c.Creators {
		creator, err := publisher.DecodeToken(token)
		if err != nil {
			return nil, false
		}
		creators = append(creators, creator)
	}
	return creators, true
}

// encodeCalling leaves out names that no request can have.
func encodeCalling(worker string, creators []string) []byte {
	c := calling{Worker: worker, Creators: make([]string, 0, len(creators))}
	for _, creator := range creators {
		if token, err := publisher.EncodeToken(creator); err == nil {
			c.Creators = append(c.Creators, token)
		}
	}
	value, _ := json.Marshal(c)
	return value
}

// strict decodes one JSON value without unknown fields.
func strict(data []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one value")
	}
	return nil
}

const (
	foreignEvery = 10 * time.Minute
	foreignMost  = 20
)

// foreign reports keys whose values no worker has written: each key once in a while, and not
// more than a few keys, however many there are.
type foreign struct {
	log zerolog.Logger

	mu    sync.Mutex
	since time.Time
	told  map[string]time.Time
}

func (f *foreign) report(key string, size int) {
	now := time.Now()
	f.mu.Lock()
	if now.Sub(f.since) > foreignEvery {
		f.since = now
		clear(f.told)
	}
	_, before := f.told[key]
	if before || len(f.told) >= foreignMost {
		f.mu.Unlock()
		return
	}
	f.told[key] = now
	f.mu.Unlock()
	// Not the value: it may be a request's payload.
	f.log.Error().Str("key", key).Int("bytes", size).
		Msg("a key of OWNERS has a value that no worker wrote; it is ignored. Only workers may have the right to write there; delete the key with `nats kv del`")
}
