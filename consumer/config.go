package consumer

import (
	"context"
	"time"

	"github.com/rs/zerolog"

	"github.com/headgate-io/headgate/classify"
	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// API makes the calls. Prepare checks a request against what its operation
// needs and returns the call; its error says what the request lacks, and makes
// it a dead letter without a call. A call never fails in a way that its answer
// does not tell.
type API interface {
	Prepare(*publisher.Request) (call func(context.Context) classify.Answer, err error)
}

// Refresher is an API whose credentials can be renewed.
type Refresher interface {
	// Refresh renews the credentials with which a call was refused, once however
	// many calls were. It reports false if they cannot be renewed, and an error if
	// the renewal failed and may succeed later.
	Refresh(ctx context.Context, refused classify.Answer) (bool, error)
}

// Operation tells a worker how to treat one kind of request.
type Operation struct {
	Kind resilience.Kind
	// NotFoundEmpty: nothing found is an empty result, not a failure.
	NotFoundEmpty bool
	// NotIdempotent: to call it twice does harm. When it is not known whether a call
	// was made the request is a dead letter, UNCERTAIN, unless RetryUncertain.
	NotIdempotent  bool
	RetryUncertain bool
	Retry          Retry

	name string
}

// AnyOperation is the key of the operation that stands for all that are not named.
const AnyOperation = "*"

// Config of a worker. Fields may be left zero only where their comment says so.
type Config struct {
	Name       string // of this worker, unique
	Provider   string // for people
	Topology   publisher.Topology
	Profile    *classify.Profile
	API        API
	Operations map[string]Operation
	Gates      resilience.Config
	Credits    Credits

	// Grace is how long calls in flight may go on when the worker is told to
	// stop. Zero: they are cut off at once.
	Grace time.Duration
	// StoreTimeout bounds one attempt to write to the server; default 5 s.
	StoreTimeout time.Duration
	// Memory bounds the payloads that wait in the worker, in bytes; default 64 MiB.
	Memory   int64
	Observer Observer // nil: none
	Log      zerolog.Logger
}

func (c Config) withDefaults() Config {
	if c.Observer == nil {
		c.Observer = silent{}
	}
	if c.StoreTimeout == 0 {
		c.StoreTimeout = 5 * time.Second
	}
	if c.Memory == 0 {
		c.Memory = 64 << 20
	}
	c.Topology = c.Topology.WithDefaults()
	return c
}

// Observer learns of each step that a worker takes, when it takes it. Operations that
// are not named in the configuration come as AnyOperation.
type Observer interface {
	// Called: a call has ended, with a class if it failed. insideHold means that it
	// began although the creator was held, which must not happen.
	Called(operation string, class classify.Class, status int, took time.Duration, insideHold bool)
	// Retried: the request will be called again.
	Retried(class classify.Class)
	// Settled: a request has its outcome, after so many calls; a class if it is
	// a dead letter.
	Settled(class classify.Class, calls int)
}

type silent struct{}

func (silent) Called(string, classify.Class, int, time.Duration, bool) {}
func (silent) Retried(classify.Class)                                  {}
func (silent) Settled(classify.Class, int)                             {}

// Stats counts the work of a worker since it was made.
type Stats struct {
	Calls, Results, DeadLetters, Retries int64
	Held                                 time.Duration // sum of all holds that answers asked for
}
