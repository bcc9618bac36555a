// Package converter turns OCI images into composefs images in a store, and back.
//
// [Convert] reads the layers of an [Image] once, each into a tree and a split
// stream, merges them and writes EROFS images. [Export] assembles the very bytes of
// each layer again and gives them to a [Target].
//
// Left out: where images come from and go to (package registry has registries,
// layouts and archives), mounting (package mount), and boot (hostdeploy).
package converter

import (
	"context"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// An Image is one OCI image for one platform, wherever it lies.
type Image interface {
	// Manifest returns the image manifest as it was served, of an OCI or a Docker
	// v2 schema 2 media type. Indexes have been resolved already.
	Manifest(ctx context.Context) (raw []byte, mediaType string, err error)
	// Blob opens the config or a layer that the manifest describes. Size and digest
	// are checked on the way: a stream that does not have them ends in an error
	// instead of io.EOF. Calls may run side by side.
	Blob(ctx context.Context, desc v1.Descriptor) (io.ReadCloser, error)
}

// A Ranger is an Image that can open a part of a blob: n bytes from offset off. No
// digest can be checked.
type Ranger interface {
	BlobRange(ctx context.Context, desc v1.Descriptor, off, n int64) (io.ReadCloser, error)
}

// A Target takes an image: blobs first, in any order and side by side, the manifest
// last.
type Target interface {
	// PutBlob stores a blob of known digest and size. open may be called more than
	// once (a retry), or not at all where the target has the blob already.
	PutBlob(ctx context.Context, desc v1.Descriptor, open func() (io.ReadCloser, error)) error
	// PutManifest stores the manifest and makes the image visible under the
	// target's name.
	PutManifest(ctx context.Context, raw []byte, mediaType string) error
}
