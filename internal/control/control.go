// Package control keeps two buckets in which people and workers say what calls
// are allowed: HOLDS (which creator, or all of them, must not be called until
// when) and LIMITS (which creators have limits of their own).
//
// A hold has one of two authorities, and each has a key of its own. People's keys are
//
//	creator.<token>   account   provider
//
// They are put and deleted freely, by headgate or by nats kv put. The API's answers
// are stored by workers only, in the same key followed by ".api", by
// compare-and-set: a shorter hold never replaces a longer one. The later of the two
// counts, and each ends on its own. So a hold of an hour by hand does not shorten
// the six hours of a Retry-After, and a release ends no more than it says.
//
// Each worker mirrors both buckets in memory. A mirror outlives its bucket: what is
// known and lacks in a bucket that was deleted and made again is written back by
// the worker that owns the creator.
package control

import (
	"fmt"
	"strings"
	"time"

	"github.com/headgate-io/headgate/publisher"
	"github.com/headgate-io/headgate/resilience"
)

// Kind is the scope of a hold.
type Kind uint8

// The scopes.
const (
	Creator  Kind = iota // one creator
	Account              // all creators, because of the API key
	Provider             // all creators, because of the provider
)

// Target names what is held: a creator, or with an empty name the account or the
// provider.
type Target struct {
	Kind    Kind
	Creator string
}

// String names the target for people.
func (t Target) String() string {
	switch t.Kind {
	case Account:
		return "the account"
	case Provider:
		return "the provider"
	default:
		return t.Creator
	}
}

// The parts of keys.
const (
	keyAccount  = "account"
	keyProvider = "provider"
	keyCreator  = "creator." // + the creator's token; also a key of LIMITS
	keyAPI      = ".api"     // an encoded token has no dots
)

// Key is the target's key in HOLDS.
func (t Target) Key(by Authority) (string, error) {
	var key string
	switch t.Kind {
	case Account:
		key = keyAccount
	case Provider:
		key = keyProvider
	default:
		token, err := publisher.EncodeToken(t.Creator)
		if err != nil {
			return "", fmt.Errorf("creator: %w", err)
		}
		key = keyCreator + token
	}
	if by == ByAPI {
		key += keyAPI
	}
	return key, nil
}

// ParseKey reads a key of HOLDS.
func ParseKey(key string) (Target, Authority, error) {
	by := ByPeople
	name, isAPI := strings.CutSuffix(key, keyAPI)
	if isAPI && name != strings.TrimSuffix(keyCreator, ".") { // creator.api is the creator "api"
		by = ByAPI
	} else {
		name = key
	}
	switch name {
	case keyAccount:
		return Target{Kind: Account}, by, nil
	case keyProvider:
		return Target{Kind: Provider}, by, nil
	}
	creator, err := creatorOf(name)
	if err != nil {
		return Target{}, by, fmt.Errorf("a key of HOLDS is creator.<encoded creator>, account or provider, with .api for the API's own: %w", err)
	}
	return Target{Creator: creator}, by, nil
}

// creatorOf reads a key that names a creator.
func creatorOf(key string) (string, error) {
	token, ok := strings.CutPrefix(key, keyCreator)
	if !ok {
		return "", fmt.Errorf("key %q does not start with %s", key, keyCreator)
	}
	name, err := publisher.DecodeToken(token)
	if err != nil {
		return "", fmt.Errorf("key %q: %w", key, err)
	}
	return name, nil
}

// Gates obey holds and limits. Their methods are called from one goroutine at a
// time for each bucket, in the order of the bucket; Put calls Hold, too.
type Gates interface {
	// Hold forbids calls. A hold by people replaces the one by people that was
	// there; of two by the API the longer one stays.
	Hold(t Target, by Authority, h resilience.Hold)
	// Release ends an authority's hold before its time.
	Release(t Target, by Authority)
	// Limit gives a creator limits, its own or the usual ones.
	Limit(creator string, l resilience.Limits)
	// Owns reports whether the creator is this worker's to call.
	Owns(creator string) bool
}

// ChangeKind says what happened to a hold.
type ChangeKind uint8

// The changes.
const (
	Held     ChangeKind = iota // it began, or was replaced by one with another end or reason
	Released                   // it was ended before its time
	Expired                    // its time was over
)

// Change is something that happened to a hold. Held by the API is told once, by the
// worker that stored the hold. Everything else is told by the creator's owner,
// and of the account and the provider by each worker, with the same Once.
type Change struct {
	Kind     ChangeKind
	Target   Target
	By       Authority       // the side whose hold it is
	Hold     resilience.Hold // the hold that began or has ended
	Who      string          // the worker or operator that held or released; "" if unknown
	Revision uint64          // of the entry that tells of it; 0: it is not stored yet
}

// Once is the same text wherever the same change is told.
func (c Change) Once() string {
	if c.Revision == 0 {
		return "until " + c.Hold.Until.UTC().Format(time.RFC3339Nano)
	}
	return fmt.Sprintf("%d.%d", c.Revision, c.Kind)
}

// Later returns the hold that counts of the two authorities': the one that ends
// later, of those that stand. nil: none stands.
func Later(now time.Time, a, b *resilience.Hold) *resilience.Hold {
	switch {
	case !a.Stands(now) && !b.Stands(now):
		return nil
	case !a.Stands(now):
		return b
	case !b.Stands(now) || !b.Outlasts(a):
		return a
	}
	return b
}
