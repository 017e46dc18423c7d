package publisher

import (
	"strings"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
)

// Headers of requests and results. Names are case-sensitive in NATS.
const (
	HeaderRequestID         = "Headgate-Request-Id"
	HeaderCorrelationID     = "Headgate-Correlation-Id"
	HeaderCreator           = "Headgate-Creator"
	HeaderOperation         = "Headgate-Operation"
	HeaderStatus            = "Headgate-Status"
	HeaderAttempts          = "Headgate-Attempts"
	HeaderDurationMs        = "Headgate-Duration-Ms"
	HeaderUpstreamRequestID = "Headgate-Upstream-Request-Id"
	HeaderEmpty             = "Headgate-Empty"
	HeaderDeadline          = "Headgate-Deadline" // RFC 3339
	HeaderTraceparent       = "traceparent"       // W3C Trace Context
	HeaderContentType       = "Content-Type"

	// The stored request that an outcome belongs to.
	HeaderSourceSeq    = "Headgate-Source-Seq"
	HeaderSourceStored = "Headgate-Source-Stored" // RFC 3339, to the nanosecond

	// HeaderDeadLetter marks a tombstone among the results. Its value is the dead letter's class.
	HeaderDeadLetter = "Headgate-Dead-Letter"

	// Where a body is that was too large for a message.
	HeaderBodyBucket      = "Headgate-Body-Bucket"
	HeaderBodyObject      = "Headgate-Body-Object"
	HeaderBodySize        = "Headgate-Body-Size"   // bytes
	HeaderBodyDigest      = "Headgate-Body-Digest" // SHA-256=…
	HeaderBodyContentType = "Headgate-Body-Content-Type"
)

// Headers of dead letters.
const (
	DlqClass             = "Dlq-Class"
	DlqCode              = "Dlq-Code"
	DlqReason            = "Dlq-Reason"
	DlqAction            = "Dlq-Action"
	DlqScope             = "Dlq-Scope"
	DlqField             = "Dlq-Field"
	DlqHTTPStatus        = "Dlq-Http-Status"
	DlqAttempts          = "Dlq-Attempts"
	DlqDeliveries        = "Dlq-Deliveries"
	DlqFirstFailedAt     = "Dlq-First-Failed-At"
	DlqFailedAt          = "Dlq-Failed-At"
	DlqUpstreamRequestID = "Dlq-Upstream-Request-Id"
	DlqProvider          = "Dlq-Provider"
	DlqCreator           = "Dlq-Creator"
	DlqOperation         = "Dlq-Operation"
	DlqSourceStream      = "Dlq-Source-Stream"
	DlqSourceSubject     = "Dlq-Source-Subject"
	DlqSourceSeq         = "Dlq-Source-Seq"
	DlqSourceStored      = "Dlq-Source-Stored" // RFC 3339, to the nanosecond
	DlqMsgID             = "Dlq-Msg-Id"
	DlqHistory           = "Dlq-History"
	DlqHeadersDropped    = "Dlq-Headers-Dropped" // lines of the request's that could not be kept
)

const maxHeader = 1 << 10 // bytes of one value

// set puts a value into h, made fit for a header: one line of valid UTF-8, not longer than
// limit. An empty value is left out.
func set(h nats.Header, name, value string, limit int) {
	if value = oneLine(value, limit); value != "" {
		h[name] = []string{value}
	}
}

func oneLine(s string, limit int) string {
	clean := utf8.ValidString(s)
	for i := 0; clean && i < len(s); i++ {
		clean = s[i] >= ' ' && s[i] != 0x7f
	}
	if !clean {
		s = strings.Map(func(r rune) rune {
			if r < ' ' || r == 0x7f {
				return ' '
			}
			return r
		}, strings.ToValidUTF8(s, "\ufffd"))
	}
	s = strings.TrimSpace(s)
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "")
	}
	return s
}
