package control

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/resilience"
)

// storedHold is a hold as JSON in HOLDS.
type storedHold struct {
	Until  *time.Time     `json:"until,omitempty"` // absent: until it is released
	Since  time.Time      `json:"since"`
	Reason string         `json:"reason,omitempty"`
	Class  classify.Class `json:"class,omitempty"`
	Who    string         `json:"who,omitempty"`
}

// ParseHold reads a value of HOLDS that was put at a time: JSON, a duration from
// then on, or an RFC 3339 time. It is strict, because anything that a server or a
// service answers can be made to land in the bucket: an answer is not a hold.
func ParseHold(value []byte, put time.Time) (resilience.Hold, error) {
	text := strings.TrimSpace(string(value))
	byHand := resilience.Hold{Since: put, Reason: "held by hand", Who: "operator"}
	if d, err := time.ParseDuration(text); err == nil {
		if d <= 0 {
			return resilience.Hold{}, fmt.Errorf("a hold of %s has no end in the future", d)
		}
		byHand.Until = put.Add(d)
		return byHand, nil
	}
	if at, err := time.Parse(time.RFC3339, text); err == nil && !at.IsZero() {
		byHand.Until = at
		return byHand, nil
	}
	if !strings.HasPrefix(text, "{") {
		return resilience.Hold{}, errors.New(`a hold is a duration ("1h"), an RFC 3339 time, or a JSON object with "until", "reason" or "who"`)
	}
	var s storedHold
	if err := strictly(value, &s); err != nil {
		return resilience.Hold{}, fmt.Errorf("a hold's JSON: %w", err)
	}
	h := resilience.Hold{Since: s.Since, Reason: s.Reason, Class: s.Class, Who: s.Who}
	if h.Since.IsZero() {
		h.Since = put
	}
	switch {
	case s.Until == nil && s.Reason == "" && s.Who == "":
		return resilience.Hold{}, errors.New(`a hold's JSON: name at least one of "until", "reason" and "who"`)
	case s.Until != nil && s.Until.IsZero():
		return resilience.Hold{}, errors.New(`a hold's JSON: "until" is no time; leave it out for a hold without an end`)
	case s.Until != nil:
		h.Until = *s.Until
	}
	return h, nil
}

// EncodeHold is a hold as it stands in HOLDS.
func EncodeHold(h resilience.Hold) ([]byte, error) {
	s := storedHold{Since: h.Since.UTC().Round(0), Reason: h.Reason, Class: h.Class, Who: h.Who}
	if !h.Until.IsZero() {
		until := h.Until.UTC().Round(0)
		s.Until = &until
	} else if h.Reason == "" && h.Who == "" {
		return nil, errors.New("encode a hold: it has neither an end nor a reason")
	}
	value, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode a hold: %w", err)
	}
	return value, nil
}

// ParseLimits reads a value of LIMITS: a rate alone, or JSON with any of rate,
// burst and concurrency. What it leaves out is as usual.
func ParseLimits(value []byte, usual resilience.Limits) (resilience.Limits, error) {
	const form = `limits are a rate ("30/m"), or a JSON object such as {"rate":"30/m","burst":10,"concurrency":1}`
	text := strings.TrimSpace(string(value))
	s := struct {
		Rate        *string `json:"rate"`
		Burst       *int    `json:"burst"`
		Concurrency *int    `json:"concurrency"`
	}{}
	if strings.HasPrefix(text, "{") {
		if err := strictly(value, &s); err != nil {
			return resilience.Limits{}, fmt.Errorf("%s: %w", form, err)
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

// strictly reads one JSON value that has no fields but those of into.
func strictly(value []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(value))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is something behind the object")
	}
	return nil
}
