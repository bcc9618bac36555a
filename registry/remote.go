package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// remoteSource is a repository in a registry.
type remoteSource struct {
	*client
	ref Ref
}

// acceptManifests is what a registry may answer with; it can convert to nothing else.
var acceptManifests = strings.Join([]string{
	string(types.OCIManifestSchema1), string(types.OCIImageIndex),
	string(types.DockerManifestSchema2), string(types.DockerManifestList),
}, ", ")

func openRemote(ctx context.Context, ref Ref, opts *Options) (source, error) {
	c, err := newClient(ctx, ref, opts, "pull")
	if err != nil {
		return nil, err
	}
	return &remoteSource{c, ref}, nil
}

func (s *remoteSource) root(ctx context.Context) ([]byte, string, v1.Hash, error) {
	var digest v1.Hash
	id := s.ref.Tag
	if s.ref.Digest != "" {
		var err error
		if digest, err = v1.NewHash(s.ref.Digest); err != nil {
			return nil, "", digest, fmt.Errorf("%w: digest %q: %v", ErrReference, s.ref.Digest, err)
		}
		id = s.ref.Digest
	}
	resp, err := s.manifest(ctx, id)
	if err != nil {
		return nil, "", digest, err
	}
	defer resp.Body.Close()
	raw, err := readLimited(resp.Body, maxManifest)
	if err != nil {
		return nil, "", digest, fmt.Errorf("reading manifest: %w", err)
	}
	// By tag, the registry's own word for the digest must hold at least: it is what
	// other clients pin the image by.
	if said := resp.Header.Get("Docker-Content-Digest"); digest == (v1.Hash{}) && said != "" {
		if digest, err = v1.NewHash(said); err != nil {
			return nil, "", digest, fmt.Errorf("%w: the registry says digest %q: %v", ErrInvalid, said, err)
		}
	}
	mediaType, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	return raw, strings.TrimSpace(mediaType), digest, nil
}

func (s *remoteSource) manifest(ctx context.Context, id string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url("manifests", id).String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", acceptManifests)
	return s.do(req, http.StatusOK)
}

func (s *remoteSource) document(ctx context.Context, desc v1.Descriptor) (io.ReadCloser, error) {
	resp, err := s.manifest(ctx, desc.Digest.String())
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

func (s *remoteSource) blob(ctx context.Context, desc v1.Descriptor) (io.ReadCloser, error) {
	resp, err := s.get(ctx, desc, "", http.StatusOK)
	if err != nil {
		return nil, err
	}
	// Without waiting for the end: a registry that says another size has another blob.
	if n := resp.ContentLength; n >= 0 && n != desc.Size {
		resp.Body.Close()
		return nil, &DigestError{Want: desc.Digest, WantSize: desc.Size, GotSize: min(n, desc.Size+1)}
	}
	return &resuming{ctx: ctx, s: s, desc: desc, body: resp.Body}, nil
}

// blobRange asks for one closed range. Several ranges in one request, and open ended
// ones, are what registries and the caches before them get wrong.
func (s *remoteSource) blobRange(ctx context.Context, desc v1.Descriptor, off, n int64) (io.ReadCloser, error) {
	resp, err := s.get(ctx, desc, fmt.Sprintf("bytes=%d-%d", off, off+n-1), http.StatusPartialContent, http.StatusOK, http.StatusRequestedRangeNotSatisfiable, http.StatusNotImplemented)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusPartialContent {
		resp.Body.Close()
		return nil, fmt.Errorf("%w by %s: answer %s; read the whole blob", ErrNoRanges, s.host, resp.Status)
	}
	// A part of another place would pass for the one asked for: nothing checks parts.
	var start, end int64
	if _, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d/", &start, &end); err != nil || start != off || end != off+n-1 {
		resp.Body.Close()
		return nil, fmt.Errorf("%w by %s: asked for bytes %d-%d, answer has %q; read the whole blob", ErrNoRanges, s.host, off, off+n-1, resp.Header.Get("Content-Range"))
	}
	return resp.Body, nil
}

func (s *remoteSource) get(ctx context.Context, desc v1.Descriptor, byteRange string, want ...int) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url("blobs", desc.Digest.String()).String(), nil)
	if err != nil {
		return nil, err
	}
	if byteRange != "" {
		req.Header.Set("Range", byteRange)
	}
	return s.do(req, want...)
}

func (s *remoteSource) Close() error {
	s.close()
	return nil
}

// resuming goes on where a download broke off, with a range where the registry has
// them and by reading from the start again where not. A fault that comes back
// without one more byte in between uses up the retries.
type resuming struct {
	ctx   context.Context
	s     *remoteSource
	desc  v1.Descriptor
	body  io.ReadCloser
	n     int64 // bytes handed out
	tries int
}

func (r *resuming) Read(p []byte) (int, error) {
	for {
		n, err := r.body.Read(p)
		r.n += int64(n)
		if n > 0 {
			r.tries = 0
		}
		// A clean end is an end; whether too early, the verifier says.
		broken := err != nil && err != io.EOF && r.n < r.desc.Size && r.ctx.Err() == nil
		if !broken {
			return n, err
		}
		if n > 0 {
			return n, nil // the next call meets the fault again, with n = 0
		}
		if r.tries >= r.s.retries {
			return 0, err
		}
		if err := sleep(r.ctx, delay(r.tries)); err != nil {
			return 0, err
		}
		r.tries++
		if err := r.reopen(); err != nil {
			return 0, err
		}
	}
}

func (r *resuming) reopen() error {
	r.body.Close()
	r.body = http.NoBody
	body, err := r.s.blobRange(r.ctx, r.desc, r.n, r.desc.Size-r.n)
	if err == nil {
		r.body = body
		return nil
	}
	if !errors.Is(err, ErrNoRanges) {
		return err
	}
	resp, err := r.s.get(r.ctx, r.desc, "", http.StatusOK)
	if err != nil {
		return err
	}
	r.body = resp.Body
	if _, err := io.CopyN(io.Discard, resp.Body, r.n); err != nil {
		return fmt.Errorf("reading again from the start: %w", err)
	}
	return nil
}

func (r *resuming) Close() error { return r.body.Close() }
