package consumer

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/resilience"
)

// limits mirrors the LIMITS bucket: creators whose limits differ from what is
// configured. Changes count at once.
type limits struct {
	kv    jetstream.KeyValue
	log   zerolog.Logger
	usual resilience.Limits

	mu       sync.RWMutex
	creators map[string]resilience.Limits
}

// parseLimits reads what a program or a person put into LIMITS: a rate alone,
// or JSON with any of rate, burst and concurrency. What it leaves out is as
// usual.
func parseLimits(value []byte, usual resilience.Limits) (resilience.Limits, error) {
	const form = `limits are a rate ("30/m"), or a JSON object such as {"rate":"30/m","burst":10,"concurrency":1}`
	text := strings.TrimSpace(string(value))
	s := struct {
		Rate        *string `json:"rate"`
		Burst       *int    `json:"burst"`
		Concurrency *int    `json:"concurrency"`
	}{}
	if strings.HasPrefix(text, "{") {
		d := json.NewDecoder(bytes.NewReader(value))
		d.DisallowUnknownFields()
		if err := d.Decode(&s); err != nil {
			return resilience.Limits{}, fmt.Errorf("%s: %w", form, err)
		}
		if _, err := d.Token(); !errors.Is(err, io.EOF) {
			return resilience.Limits{}, errors.New(form)
		}
	} else {
		s.Rate = &text
	}
	l := usual
	if s.Rate != nil {
		calls, per, err := resilience.ParseRate(*s.Rate)
		if err != nil {
			return resilience.Limits{}, fmt.Errorf("%s: %w", form, err)
		}
		l.Read, l.Write = nil, nil // it stands for both
		l.PerSecond = 0
		if !math.IsInf(calls, 1) {
			l.PerSecond = calls / per.Seconds()
			l.Burst = max(l.Burst, 1)
		}
	}
	if s.Burst != nil {
		l.Burst = *s.Burst
	}
	if s.Concurrency != nil {
		l.Concurrency = *s.Concurrency
	}
	return l, l.Check()
}

func (ls *limits) of(creator string) (resilience.Limits, bool) {
	ls.mu.RLock()
	defer ls.mu.RUnlock()
	l, ok := ls.creators[creator]
	return l, ok
}

// apply takes an entry of LIMITS, as it is or as it has become.
func (ls *limits) apply(w *Worker, entry jetstream.KeyValueEntry) {
	name, err := creatorOf(entry.Key())
	if err != nil {
		ls.log.Warn().Err(err).Str("key", entry.Key()).Msg("ignored: a key of LIMITS is creator.<encoded creator>")
		return
	}
	l, special := ls.usual, false
	if entry.Operation() == jetstream.KeyValuePut {
		if l, err = parseLimits(entry.Value(), ls.usual); err != nil {
			ls.log.Warn().Err(err).Str("key", entry.Key()).Msg("ignored: cannot read these limits")
			return
		}
		special = true
	}
	ls.mu.Lock()
	if special {
		ls.creators[name] = l
	} else {
		delete(ls.creators, name)
	}
	ls.mu.Unlock()
	if p := w.partitionOf(name); p != nil {
		p.limit(name, l)
	}
	if since := time.Since(entry.Created()); since < time.Minute { // not those read at the start
		ls.log.Info().Str("creator", name).Bool("special", special).Msg("limits changed")
	}
}
