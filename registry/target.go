package registry

import (
	"context"
	"errors"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// A Target takes one image: blobs in any order and side by side, then the manifest,
// which makes the image visible. Close without PutManifest, or after it failed,
// leaves the place as it was; it must be called in any case.
type Target interface {
	// PutBlob stores a blob, checking its size and digest. open is not called where
	// the target has the blob already, and more than once to repeat a transfer.
	PutBlob(ctx context.Context, desc v1.Descriptor, open func() (io.ReadCloser, error)) error
	// PutManifest stores an image manifest whose blobs are all there. It ends the
	// target: nothing can be put after it succeeded.
	PutManifest(ctx context.Context, raw []byte, mediaType string) error
	Close() error
}

// errDone is for calls after the end.
var errDone = errors.New("the image is complete")

// Create opens the way to write an image. Layouts are added to: an image of the same
// tag is replaced. Archive files are replaced as a whole, with the last rename.
func Create(ctx context.Context, ref Ref, opts *Options) (Target, error) {
	if opts == nil {
		opts = new(Options)
	}
	t, err := create(ctx, ref, opts)
	if err != nil {
		return nil, fmt.Errorf("writing %s: %w", ref, err)
	}
	return t, nil
}

func create(ctx context.Context, ref Ref, opts *Options) (Target, error) {
	if ref.Tag != "" && ref.Tag[0] == '@' {
		return nil, fmt.Errorf("%w: %q is a number to read by; write to a tag", ErrReference, ref.Tag)
	}
	switch ref.Transport {
	case Docker:
		return createRemote(ctx, ref, opts)
	case OCILayout:
		return createLayout(ref)
	case OCIArchive:
		return createArchive(ref, opts)
	case DockerArchive:
		return createDockerArchive(ref, opts)
	case ContainersStorage:
		return createPodman(ctx, ref, opts)
	}
	return nil, fmt.Errorf("%w: %s", ErrReference, ref.Transport)
}

// parseImage reads a manifest that is to be written.
func parseImage(raw []byte, mediaType string) (*document, error) {
	doc, err := parseDocument(raw, mediaType)
	if err == nil && doc.manifest == nil {
		err = fmt.Errorf("%w: writing an index; write the image of one platform", ErrUnsupported)
	}
	return doc, err
}

// openVerified opens a blob that a caller offers. Without a check here, a caller's
// broken blob would go as far as the far end's own check, if it has one.
func openVerified(desc v1.Descriptor, open func() (io.ReadCloser, error)) (io.ReadCloser, error) {
	rc, err := open()
	if err != nil {
		return nil, err
	}
	v, err := newVerifier(rc, desc)
	if err != nil {
		return nil, errors.Join(err, rc.Close())
	}
	return v, nil
}
