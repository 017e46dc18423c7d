package publisher

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// headerReserve is what the server adds to a message, and what a line of its
// headers takes beside name and value.
const headerReserve = 64

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

// outsource puts the body of a message that is too large for the server into
// the object store, and a notice in its place.
func (p *Publisher) outsource(ctx context.Context, m *nats.Msg, name string) error {
	bucket := p.ns.Stream(Bodies)
	store, err := p.js.ObjectStore(ctx, bucket)
	if err != nil {
		return fmt.Errorf("store a body of %d bytes: bind to object store %s (has `headgate setup` been run?): %w", len(m.Data), bucket, err)
	}
	info, err := store.Put(ctx, jetstream.ObjectMeta{Name: name}, bytes.NewReader(m.Data))
	if err != nil {
		return fmt.Errorf("store a body of %d bytes in object store %s: %w", len(m.Data), bucket, err)
	}
	set(m.Header, HeaderBodyContentType, m.Header.Get(HeaderContentType), maxHeader)
	m.Header[HeaderContentType] = []string{"application/json"}
	m.Header[HeaderBodyBucket] = []string{bucket}
	m.Header[HeaderBodyObject] = []string{name}
	m.Header[HeaderBodySize] = []string{strconv.FormatUint(info.Size, 10)}
	m.Header[HeaderBodyDigest] = []string{info.Digest}
	m.Data, err = json.Marshal(map[string]any{
		"headgate": fmt.Sprintf("this body was too large for a message; nats object get %s %s", bucket, name),
		"bucket":   bucket, "object": name, "size": info.Size, "digest": info.Digest,
	})
	return err
}

// Body is the whole body of a stored result or dead letter, wherever it is.
func Body(ctx context.Context, js jetstream.JetStream, header nats.Header, data []byte) ([]byte, error) {
	bucket, name := header.Get(HeaderBodyBucket), header.Get(HeaderBodyObject)
	if bucket == "" {
		return data, nil
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

// objectName is where a request's body is in the object store.
func objectName(kind, creator, operation, id string) (string, error) {
	c, o, err := named(creator, operation)
	if err != nil {
		return "", err
	}
	return kind + "." + c + "." + o + "." + IDToken(id), nil
}

// ObjectSubjects are where an object store keeps an object (ADR-20): its description, and its
// chunks.
func ObjectSubjects(bucket, name, nuid string) []string {
	return []string{
		"$O." + bucket + ".M." + base64.URLEncoding.EncodeToString([]byte(name)),
		"$O." + bucket + ".C." + nuid,
	}
}
