package publisher

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/headgate-io/headgate/internal/broker"
)

const (
	// headerReserve is what the server adds to a message, and what a line of its
	// headers takes beside name and value.
	headerReserve = 64
	// maxChunk is the largest part of an object that is one message, in bytes.
	maxChunk = 128 << 10
	// maxUploads is how many bodies a Publisher uploads at once, so that they leave room for
	// what else is sent on its connection.
	maxUploads = 4
	// storeTimeout and slowest bound an upload: so long, and a second more for so many bytes.
	storeTimeout = 5 * time.Second
	slowest      = 1 << 20
	// cleanTimeout bounds the deletion of a body that no outcome refers to.
	cleanTimeout = 2 * time.Second
)

// StoreFor is for how long storing an outcome whose body has so many bytes may take.
func (p *Publisher) StoreFor(size int) time.Duration {
	if int64(size) <= p.js.Conn().MaxPayload() {
		return storeTimeout
	}
	return storeTimeout + time.Duration(size)*time.Second/slowest
}

// uploading is the context of an upload. A deadline of ctx does not end it: where each attempt
// has a shorter one than the upload takes, it would begin again for ever. Cancelling ctx does,
// and so does a deadline of its own.
func uploading(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	upload, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	stop := context.AfterFunc(ctx, func() {
		if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			cancel()
		}
	})
	return upload, func() { stop(); cancel() }
}

// fits reports whether m is within the server's max_payload, which counts headers
// and body.
func (p *Publisher) fits(m *nats.Msg) bool {
	size := int64(headerReserve + len(m.Data))
	for name, values := range m.Header {
		for _, value := range values {
			size += int64(len(name) + len(value) + 4)
		}
	}
	return size <= p.js.Conn().MaxPayload()
}

// storing runs store, which publishes m, and puts m's body into the object store first if m is
// too large for a message. Of a stream's own limit only its refusal tells.
func (p *Publisher) storing(ctx context.Context, m *nats.Msg, name string, store func() error) error {
	if p.fits(m) {
		err := store()
		if err == nil || len(m.Data) == 0 || !tooLarge(err) {
			return err
		}
	}
	if err := p.outsource(ctx, m, name); err != nil {
		return err
	}
	return store()
}

func tooLarge(err error) bool {
	var api *jetstream.APIError
	return broker.TroubleOf(err) == broker.Never &&
		(errors.Is(err, nats.ErrMaxPayload) || errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamMessageExceedsMaximum)
}

// outsource puts the body of a message that is too large for the server into
// the object store, and a notice in its place.
func (p *Publisher) outsource(ctx context.Context, m *nats.Msg, name string) error {
	bucket := p.ns.Stream(Bodies)
	o, err := p.upload(ctx, bucket, name, m.Data)
	if err != nil {
		return fmt.Errorf("store a body of %d bytes in object store %s: %w", len(m.Data), bucket, err)
	}
	set(m.Header, HeaderBodyContentType, m.Header.Get(HeaderContentType), maxHeader)
	m.Header[HeaderContentType] = []string{"application/json"}
	m.Header[HeaderBodyBucket] = []string{bucket}
	m.Header[HeaderBodyObject] = []string{o.Name}
	m.Header[HeaderBodySize] = []string{strconv.FormatUint(o.Size, 10)}
	m.Header[HeaderBodyDigest] = []string{o.Digest}
	m.Data, err = json.Marshal(map[string]any{
		"headgate": fmt.Sprintf("this body was too large for a message; nats object get %s %s", bucket, o.Name),
		"bucket":   bucket, "object": o.Name, "size": o.Size, "digest": o.Digest,
	})
	return err
}

// upload stores a body under a name that ends in its digest: equal bodies of a request are one
// object, different ones never meet, and nothing that is stored is ever written over. What is
// there already is not uploaded again.
func (p *Publisher) upload(ctx context.Context, bucket, name string, body []byte) (*jetstream.ObjectInfo, error) {
	select {
	case p.uploads <- struct{}{}:
		defer func() { <-p.uploads }()
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for %d other uploads: %w", maxUploads, ctx.Err())
	}
	ctx, cancel := uploading(ctx, p.StoreFor(len(body)))
	defer cancel()
	store, err := p.js.ObjectStore(ctx, bucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return nil, fmt.Errorf("%w (has `headgate setup` been run?)", err)
	}
	if err != nil {
		return nil, err
	}
	hash := sha256.New()
	hash.Write(body)
	digest := jetstream.GetObjectDigestValue(hash)
	name += "-" + hex.EncodeToString(hash.Sum(nil)[:8])
	for try := range 3 {
		object := name
		if try > 0 {
			object += "-" + strconv.Itoa(try) // something else has the name
		}
		o, err := store.GetInfo(ctx, object)
		switch {
		case errors.Is(err, jetstream.ErrObjectNotFound):
			// Chunks are messages as well: the store's own size is too large for a server with
			// a small max_payload.
			chunk := min(maxChunk, p.js.Conn().MaxPayload()/2)
			meta := jetstream.ObjectMeta{Name: object, Opts: &jetstream.ObjectMetaOptions{ChunkSize: uint32(chunk)}}
			return store.Put(ctx, meta, bytes.NewReader(body))
		case errors.Is(err, jetstream.ErrBadObjectMeta):
		case err != nil:
			return nil, err
		case o.Name == object && o.Digest == digest && o.Size == uint64(len(body)):
			return o, nil
		}
	}
	return nil, fmt.Errorf("other objects have the names %s, %[1]s-1 and %[1]s-2: delete them", name)
}

// discard deletes the body of a result that was refused. If that fails, the body stays until it
// is too old.
func (p *Publisher) discard(ctx context.Context, object string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
	defer cancel()
	if store, err := p.js.ObjectStore(ctx, p.ns.Stream(Bodies)); err == nil {
		_ = store.Delete(ctx, object)
	}
}

// Body is the whole body of a stored result or dead letter, wherever it is. It reads no other
// object store than the namespace's own, whatever the headers say.
func Body(ctx context.Context, js jetstream.JetStream, ns Namespace, header nats.Header, data []byte) ([]byte, error) {
	bucket, name := header.Get(HeaderBodyBucket), header.Get(HeaderBodyObject)
	if bucket == "" && name == "" {
		return data, nil
	}
	if want := ns.Stream(Bodies); bucket != want || name == "" {
		return nil, fmt.Errorf("read a body: object %q of %q is not in object store %s, where Headgate keeps bodies", clip(name, 80), clip(bucket, 80), want)
	}
	store, err := js.ObjectStore(ctx, bucket)
	if err != nil {
		return nil, fmt.Errorf("read a body: bind to object store %s: %w", bucket, err)
	}
	body, err := store.GetBytes(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("read a body: get %s from object store %s: %w", name, bucket, err)
	}
	return body, nil
}

// objectName begins the name of a stored request's body in the object store. It ends in the
// body's digest.
func objectName(kind, creator, operation, id string, s Source) (string, error) {
	c, o, i, err := outcomeTokens(creator, operation, id)
	if err != nil {
		return "", err
	}
	return kind + "." + c + "." + o + "." + i + "." + strconv.FormatUint(s.Sequence, 10), nil
}

// ObjectSubjects are where an object store keeps an object (ADR-20): its description, and its
// chunks.
func ObjectSubjects(bucket, name, nuid string) []string {
	return []string{
		"$O." + bucket + ".M." + base64.URLEncoding.EncodeToString([]byte(name)),
		"$O." + bucket + ".C." + nuid,
	}
}
