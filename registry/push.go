package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// remoteTarget pushes to a repository.
type remoteTarget struct {
	*client
	ref  Ref
	from []string // repositories of the same registry to mount blobs from

	mu   sync.Mutex
	done bool
}

func createRemote(ctx context.Context, ref Ref, opts *Options) (Target, error) {
	var from []string
	for _, f := range opts.MountFrom {
		if f.Transport == Docker && f.Host == ref.Host && f.Repo != ref.Repo {
			from = append(from, f.Repo)
		}
	}
	c, err := newClient(ctx, ref, opts, "pull,push", from...)
	if err != nil {
		return nil, err
	}
	return &remoteTarget{client: c, ref: ref, from: from}, nil
}

// PutBlob asks whether the blob is there, then to mount it from another repository,
// and uploads it in one request (OCI distribution specification 1.1, "POST then
// PUT") otherwise.
func (t *remoteTarget) PutBlob(ctx context.Context, desc v1.Descriptor, open func() (io.ReadCloser, error)) error {
	err := checkDescriptor(desc)
	if t.ended() {
		err = errDone
	}
	for try := 0; err == nil; try++ {
		if err = t.putBlob(ctx, desc, open); err == nil {
			return nil
		}
		var source *sourceError
		if try >= t.retries || errors.As(err, &source) || !errors.Is(err, errBroken) && !passingError(err) {
			break
		}
		err = sleep(ctx, delay(try))
	}
	return fmt.Errorf("writing %s to %s: %w", desc.Digest, t.ref, err)
}

func (t *remoteTarget) ended() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.done
}

// A sourceError comes from the caller's blob: sending it again would not help.
type sourceError struct{ error }

func (e *sourceError) Unwrap() error { return e.error }

// errBroken marks an upload that ended without an answer of the registry.
var errBroken = errors.New("upload broken off")

func (t *remoteTarget) putBlob(ctx context.Context, desc v1.Descriptor, open func() (io.ReadCloser, error)) error {
	switch there, err := t.has(ctx, desc); {
	case err != nil:
		return err
	case there:
		return nil
	}
	for _, repo := range t.from {
		location, err := t.startUpload(ctx, url.Values{"mount": {desc.Digest.String()}, "from": {repo}})
		switch {
		case err != nil:
			continue // registries deny a mount in all ways there are
		case location == nil:
			return nil
		case repo == t.from[len(t.from)-1]:
			return t.upload(ctx, location, desc, open)
		}
	}
	location, err := t.startUpload(ctx, nil)
	if err != nil || location == nil {
		return err
	}
	return t.upload(ctx, location, desc, open)
}

func (t *remoteTarget) has(ctx context.Context, desc v1.Descriptor) (bool, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, t.url("blobs", desc.Digest.String()).String(), nil)
	if err != nil {
		return false, err
	}
	resp, err := t.do(req, http.StatusOK, http.StatusNotFound)
	if err != nil {
		return false, err
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK && (resp.ContentLength < 0 || resp.ContentLength == desc.Size), nil
}

// startUpload returns where to upload to, nil where the blob was mounted.
func (t *remoteTarget) startUpload(ctx context.Context, query url.Values) (*url.URL, error) {
	u := t.url("blobs", "uploads/")
	u.RawQuery = query.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := t.do(req, http.StatusCreated, http.StatusAccepted)
	if err != nil {
		return nil, err
	}
	resp.Body.Close()
	if resp.StatusCode == http.StatusCreated {
		return nil, nil
	}
	location, err := resp.Location()
	if err != nil {
		return nil, fmt.Errorf("%w: %s starts an upload: %v", ErrInvalid, t.host, err)
	}
	return location, checkTarget(resp.Request.URL, location)
}

func (t *remoteTarget) upload(ctx context.Context, location *url.URL, desc v1.Descriptor, open func() (io.ReadCloser, error)) error {
	body := &blobBody{desc: desc, open: open}
	if err := body.reopen(); err != nil {
		return &sourceError{err}
	}
	defer body.Close()
	query := location.Query()
	query.Set("digest", desc.Digest.String())
	location.RawQuery = query.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, location.String(), body)
	if err != nil {
		return err
	}
	// Without GetBody nothing is repeated on the way: after a failure the upload has to
	// be started anew. The size has to be known, or the body would go in chunks, which
	// some registries do not take.
	req.ContentLength = desc.Size
	if desc.Size == 0 {
		req.Body = http.NoBody
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	resp, err := t.do(req, http.StatusCreated)
	if fault := body.fault(); fault != nil && ctx.Err() == nil {
		return &sourceError{fault}
	}
	var status *transport.Error
	if err != nil && !errors.As(err, &status) && ctx.Err() == nil {
		return fmt.Errorf("%w: %w", errBroken, err)
	}
	if err != nil {
		return err
	}
	resp.Body.Close()
	return nil
}

// A blobBody is the body of an upload. When a token has run out, the transport sends
// the request a second time, with what is left of its body; renew sees to it that this
// is the whole blob again. The body keeps the first error of the source, which
// http.Client would blur.
type blobBody struct {
	desc v1.Descriptor
	open func() (io.ReadCloser, error)

	mu   sync.Mutex
	rc   io.ReadCloser // nil when closed
	sent bool          // a transport has had it
	err  error
}

func (b *blobBody) reopen() error {
	rc, err := openVerified(b.desc, b.open)
	b.rc = rc
	return err
}

// renew is called by the lowest transport before each sending.
func (b *blobBody) renew() (io.ReadCloser, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.sent {
		b.sent = true
		return b, nil
	}
	again := &blobBody{desc: b.desc, open: b.open, sent: true}
	err := again.reopen()
	if err != nil {
		b.err = err
		return nil, err
	}
	return &renewed{again, b}, nil
}

// renewed is the second sending, whose faults count for the first.
type renewed struct {
	*blobBody
	first *blobBody
}

func (r *renewed) Read(p []byte) (int, error) {
	n, err := r.blobBody.Read(p)
	if fault := r.fault(); fault != nil {
		r.first.mu.Lock()
		r.first.err = fault
		r.first.mu.Unlock()
	}
	return n, err
}

func (b *blobBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rc == nil {
		return 0, errBroken // the transport gave up already
	}
	n, err := b.rc.Read(p)
	if err != nil && err != io.EOF && b.err == nil {
		b.err = err
	}
	return n, err
}

func (b *blobBody) fault() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

func (b *blobBody) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rc == nil {
		return nil
	}
	rc := b.rc
	b.rc = nil
	return rc.Close()
}

// PutManifest puts the manifest under the tag, or under its digest where the
// reference has none.
func (t *remoteTarget) PutManifest(ctx context.Context, raw []byte, mediaType string) error {
	if err := t.putManifest(ctx, raw, mediaType); err != nil {
		return fmt.Errorf("writing the manifest to %s: %w", t.ref, err)
	}
	return nil
}

func (t *remoteTarget) putManifest(ctx context.Context, raw []byte, mediaType string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.done {
		return errDone
	}
	doc, err := parseImage(raw, mediaType)
	if err != nil {
		return err
	}
	desc := describe(raw, doc.mediaType)
	if t.ref.Digest != "" && t.ref.Digest != desc.Digest.String() {
		return fmt.Errorf("%w: the reference has digest %s, the manifest %s; push to a tag", ErrReference, t.ref.Digest, desc.Digest)
	}
	id := t.ref.Tag
	if id == "" {
		id = desc.Digest.String()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, t.url("manifests", id).String(), bytes.NewReader(raw))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", string(doc.mediaType))
	resp, err := t.do(req, http.StatusCreated, http.StatusOK, http.StatusAccepted)
	if err != nil {
		return err
	}
	resp.Body.Close()
	// A registry that rewrites manifests breaks whoever pins them.
	if said := resp.Header.Get("Docker-Content-Digest"); said != "" && !strings.EqualFold(said, desc.Digest.String()) {
		return fmt.Errorf("%w: the registry stored the manifest as %s, not %s", ErrDigest, said, desc.Digest)
	}
	t.done = true
	return nil
}

// Close ends the connection. Blobs without a manifest are swept by the registry.
func (t *remoteTarget) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.done = true
	t.close()
	return nil
}
