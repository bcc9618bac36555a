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
	"sync/atomic"

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

// A sourceError comes from the caller's blob: sending it again would not help.
type sourceError struct{ error }

func (e *sourceError) Unwrap() error { return e.error }

// errBroken marks an upload that ended without an answer of the registry, also one
// that a token's end cut short: its second sending has no body left.
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
	var first error // of the source, seen only by the HTTP transport
	var mu sync.Mutex
	rc, err := openVerified(desc, open)
	if err != nil {
		return &sourceError{err}
	}
	body := &watched{ReadCloser: rc, tell: func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if first == nil && ctx.Err() == nil {
			first = &sourceError{err}
		}
	}}
	query := location.Query()
	query.Set("digest", desc.Digest.String())
	location.RawQuery = query.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, location.String(), body)
	if err != nil {
		return errors.Join(err, rc.Close())
	}
	// Without GetBody the layers below repeat nothing: after a failure the upload has
	// to be started anew. The size has to be known, or the body would go in chunks,
	// which some registries do not take; and an unsized empty body would not go at all.
	req.ContentLength = desc.Size
	if desc.Size == 0 {
		rc.Close()
		req.Body = http.NoBody
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	resp, err := t.do(req, http.StatusCreated)
	mu.Lock()
	defer mu.Unlock()
	if first != nil {
		return first
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

// watched tells of errors of a request's body, which http.Client blurs.
type watched struct {
	io.ReadCloser
	tell   func(error)
	closed atomic.Bool
}

func (w *watched) Close() error {
	w.closed.Store(true)
	return w.ReadCloser.Close()
}

func (w *watched) Read(p []byte) (int, error) {
	if w.closed.Load() {
		return 0, errBroken
	}
	n, err := w.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		w.tell(err)
	}
	return n, err
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
	t.close()
	return nil
}
