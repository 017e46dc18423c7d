package consumer

import (
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	pullExpires   = 30 * time.Second
	pullHeartbeat = 5 * time.Second
	troubleEvery  = 10 * time.Second
)

// puller asks a partition's consumer for as many messages as can be looked at
// now, and no more: the server counts AckWait from delivery, so what lies in a
// buffer expires there.
//
// It speaks the pull protocol itself (ADR-37). A client that takes a message
// without a body for a status of the server, as jetstream's does by its
// "Status" header, can be stopped by one request that carries such a header.
// Here a request is what has a reply subject to settle it by.
type puller struct {
	nc      *nats.Conn
	next    string // API subject that asks for messages
	window  int
	receive func(*nats.Msg)
	trouble func(error) // the consumer or its stream cannot be asked

	mu    sync.Mutex
	sub   *nats.Subscription // nil: stopped
	asked int                // asked for and not arrived
	heard time.Time

	told time.Time // when trouble was logged last
	lost time.Time // since when the consumer does not answer as it should; zero: it does
	wait time.Duration
}

// more asks for what is missing to a full window, if that is worth a request.
// busy counts the messages here about which nothing is decided yet.
func (p *puller) more(busy int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	missing := p.window - p.asked - busy
	if p.sub == nil || missing < (p.window+1)/2 {
		return
	}
	request := fmt.Sprintf(`{"batch":%d,"expires":%d,"idle_heartbeat":%d}`, missing, pullExpires, pullHeartbeat)
	if err := p.nc.PublishRequest(p.next, p.sub.Subject, []byte(request)); err != nil {
		return // closed or its buffer is full: the watchdog asks again
	}
	if p.asked == 0 {
		p.heard = time.Now()
	}
	p.asked += missing
}

// bind starts over with a new inbox. What the server sent to the old one in the meantime
// is redelivered after AckWait.
func (p *puller) bind() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.unbind()
	inbox := p.nc.NewInbox()
	sub, err := p.nc.Subscribe(inbox, func(m *nats.Msg) { p.arrived(inbox, m) })
	if err != nil {
		return fmt.Errorf("subscribe for pulled messages: %w", err)
	}
	// The window bounds what is pending; dropping some of it would only
	// delay them by AckWait.
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return fmt.Errorf("subscribe for pulled messages: %w", err)
	}
	p.sub, p.asked, p.heard, p.lost = sub, 0, time.Now(), time.Time{}
	return nil
}

func (p *puller) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.unbind()
}

func (p *puller) unbind() {
	if p.sub != nil {
		// Drain: what has arrived is still looked at.
		_ = p.sub.Drain()
		p.sub = nil
	}
}

// waits reports that the server has been asked for messages and has had none
// lately.
func (p *puller) waits() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sub != nil && p.asked > 0
}

// silent reports that it is time to bind again: the server owes a heartbeat, so that it does not know
// any more that it was asked, or the consumer is not the one that it was.
func (p *puller) silent(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.lost.IsZero() && now.Sub(p.lost) >= p.wait {
		p.lost, p.wait = now, min(2*p.wait, maxRebind)
		return true
	}
	return p.sub != nil && p.asked > 0 && now.Sub(p.heard) > 3*pullHeartbeat
}

const (
	minRebind = 500 * time.Millisecond
	maxRebind = 10 * time.Second
)

// failed takes an error that keeps the partition from being pulled from.
func (p *puller) failed(err error) {
	p.mu.Lock()
	now := time.Now()
	if p.lost.IsZero() {
		p.lost, p.wait = now, max(p.wait, minRebind)
	}
	tell := now.Sub(p.told) > troubleEvery
	if tell {
		p.told = now
	}
	p.mu.Unlock()
	if tell {
		p.trouble(err)
	}
}

func (p *puller) arrived(inbox string, m *nats.Msg) {
	request := strings.HasPrefix(m.Reply, "$JS.ACK.")
	p.mu.Lock()
	current := p.sub != nil && p.sub.Subject == inbox
	if current {
		p.heard = time.Now()
		if request {
			p.asked, p.wait = max(0, p.asked-1), 0
		}
	}
	p.mu.Unlock()
	switch {
	case request:
		p.receive(m)
	case current:
		p.status(m)
	}
}

// status takes the server's word about a pull: over, or impossible.
func (p *puller) status(m *nats.Msg) {
	status, description := m.Header.Get("Status"), m.Header.Get("Description")
	if status == "100" {
		return
	}
	pending, err := strconv.Atoi(m.Header.Get("Nats-Pending-Messages"))
	p.mu.Lock()
	if err == nil {
		p.asked = max(0, p.asked-pending)
	} else {
		p.asked = 0
	}
	p.mu.Unlock()
	if status == "408" || status == "409" && err == nil {
		p.receive(nil)
		return
	}
	p.failed(fmt.Errorf("pull: %s %s", status, description))
}
