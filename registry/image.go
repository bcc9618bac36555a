// Package registry reads and writes images where the world keeps them: registries,
// OCI layouts, archives of OCI and of Docker, and podman's storage. It serves
// bytes: manifests, whole blobs, and closed ranges of blobs.
//
// [ParseRef] reads a reference in skopeo's syntax, [Open] finds the image behind
// one for one platform, [Create] opens the way to write one. What comes out is
// checked: a blob whose size and digest are not those of its descriptor ends in a
// [DigestError] and never in io.EOF. What goes in becomes visible with the manifest,
// last, or not at all. [Serve] is a small registry for demos and tests.
//
// The transport under registries (ping, token exchange) is that of
// go-containerregistry; requests for blobs are this package's own, because ranges
// and the repair of a broken download need them.
//
// Left out: what to fetch in ranges (package layer decides), Docker schema 1
// images, layers at foreign URLs (a registry that does not have such a layer says
// not found), references to another podman storage than the configured one, and
// unpacking: archives are read in place.
package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Options modify [Open] and [Create]. Nil is the zero value.
type Options struct {
	// Platform is OS/ARCH[/VARIANT]; empty is this machine's, on Linux. It chooses
	// from an index; an image without an index is taken whatever its platform is.
	Platform string
	// Auth says where credentials for a registry come from.
	Auth Auth
	// Insecure allows plain HTTP and certificates that nobody vouches for.
	// Registries on the loopback interface may speak plain HTTP without it.
	Insecure bool
	// CertDir holds certificates for a registry: *.crt are authorities besides the
	// system's, NAME.cert with NAME.key identify the client (containers-certs.d(5)).
	// Empty is the registry's directory below /etc/containers/certs.d or
	// /etc/docker/certs.d, if it has one.
	CertDir string
	// UserAgent comes before go-containerregistry's own in requests.
	UserAgent string
	// Retries is how often a request is repeated that failed for a passing reason.
	// Zero is DefaultRetries, a negative number means never.
	Retries int
	// MountFrom are images in registries whose layers a new image may share. A push to
	// another repository of the same registry asks for their blobs there before it
	// uploads them.
	MountFrom []Ref
	// TempDir is where compressed archives are unpacked, podman exports to, and
	// archives are assembled. Empty is $TMPDIR or /var/tmp for reading, and the
	// folder of the new file for writing.
	TempDir string
	// MaxUnpacked is how many bytes a compressed archive, or a compressed layer that goes
	// into a Docker archive, may unpack to; zero is DefaultMaxUnpacked. A bomb is refused when it gets there.
	MaxUnpacked int64
}

const (
	DefaultRetries     = 3
	DefaultMaxUnpacked = 64 << 30 // bytes
)

func (o *Options) retries() int {
	switch {
	case o.Retries == 0:
		return DefaultRetries
	case o.Retries < 0:
		return 0
	}
	return o.Retries
}

func (o *Options) maxUnpacked() int64 {
	if o.MaxUnpacked > 0 {
		return o.MaxUnpacked
	}
	return DefaultMaxUnpacked
}

// tempDir returns the folder for large temporary files. It is not /tmp, which is in
// memory on many machines.
func (o *Options) tempDir() string {
	if o.TempDir != "" {
		return o.TempDir
	}
	if dir := os.Getenv("TMPDIR"); dir != "" {
		return dir
	}
	return "/var/tmp"
}

// A source is one place with the bytes of an image. It checks nothing: Image does.
type source interface {
	// root returns the manifest or index that the reference names. digest is the
	// digest that somebody vouched for, zero where nobody did.
	root(ctx context.Context) (raw []byte, mediaType string, digest v1.Hash, err error)
	// document opens a manifest or index that an index describes.
	document(ctx context.Context, desc v1.Descriptor) (io.ReadCloser, error)
	// blob opens a config or layer.
	blob(ctx context.Context, desc v1.Descriptor) (io.ReadCloser, error)
	// blobRange opens n > 0 bytes from off, which lie within the blob.
	blobRange(ctx context.Context, desc v1.Descriptor, off, n int64) (io.ReadCloser, error)
	Close() error
}

// An Image is an image for one platform. Its methods may be called side by side.
type Image struct {
	ref       Ref
	src       source
	raw       []byte
	mediaType string
	digest    v1.Hash
}

// Open finds an image and reads its manifest. Indexes are resolved, also nested
// ones. Errors wrap ErrNotFound, ErrUnauthorized, ErrPlatform, ErrAmbiguous,
// ErrUnsupported, ErrInvalid or ErrDigest where these are the reason.
func Open(ctx context.Context, ref Ref, opts *Options) (*Image, error) {
	if opts == nil {
		opts = new(Options)
	}
	src, err := openSource(ctx, ref, opts)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", ref, err)
	}
	img := &Image{ref: ref, src: src}
	if err := img.resolve(ctx, opts.Platform); err != nil {
		return nil, errors.Join(fmt.Errorf("opening %s: %w", ref, err), src.Close())
	}
	return img, nil
}

func openSource(ctx context.Context, ref Ref, opts *Options) (source, error) {
	switch ref.Transport {
	case Docker:
		return openRemote(ctx, ref, opts)
	case OCILayout:
		return openLayout(dirFiles(ref.Path), ref.Tag, opts)
	case OCIArchive:
		files, err := openArchive(ctx, ref.Path, opts)
		if err != nil {
			return nil, err
		}
		return closeOnError(files, func() (source, error) { return openLayout(files, ref.Tag, opts) })
	case DockerArchive:
		files, err := openArchive(ctx, ref.Path, opts)
		if err != nil {
			return nil, err
		}
		return closeOnError(files, func() (source, error) { return openDockerArchive(ctx, files, ref.Tag) })
	case ContainersStorage:
		return openPodman(ctx, ref.Name, opts)
	}
	return nil, fmt.Errorf("%w: %s", ErrReference, ref.Transport)
}

func closeOnError(c io.Closer, open func() (source, error)) (source, error) {
	src, err := open()
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return src, nil
}

// resolve reads the manifest, through indexes.
func (i *Image) resolve(ctx context.Context, platform string) error {
	want, err := parsePlatform(platform)
	if err != nil {
		return err
	}
	raw, mediaType, digest, err := i.src.root(ctx)
	if err != nil {
		return err
	}
	if digest != (v1.Hash{}) {
		if err := checkBytes(raw, digest); err != nil {
			return fmt.Errorf("reading manifest: %w", err)
		}
	}
	for range maxNesting {
		doc, err := parseDocument(raw, mediaType)
		if err != nil {
			return err
		}
		if doc.manifest != nil {
			i.raw, i.mediaType = raw, string(doc.mediaType)
			if i.digest = digest; digest == (v1.Hash{}) {
				i.digest = describe(raw, "").Digest
			}
			return nil
		}
		desc, err := i.choose(ctx, doc.index, want)
		if err != nil {
			return err
		}
		if raw, err = i.document(ctx, desc); err != nil {
			return err
		}
		mediaType, digest = string(desc.MediaType), desc.Digest
	}
	return fmt.Errorf("%w: indexes nested deeper than %d", ErrInvalid, maxNesting)
}

// choose picks from an index. Where the index names no platform that fits, an only
// entry without any platform is taken, and a nested index is looked into for one.
func (i *Image) choose(ctx context.Context, index *v1.IndexManifest, want v1.Platform) (v1.Descriptor, error) {
	desc, err := choosePlatform(index.Manifests, want)
	if err == nil {
		return desc, nil
	}
	var open []v1.Descriptor
	for _, d := range index.Manifests {
		if d.Platform == nil && (d.MediaType.IsIndex() || d.MediaType.IsImage()) {
			open = append(open, d)
		}
	}
	if len(open) == 1 {
		return open[0], nil
	}
	return v1.Descriptor{}, err
}

func (i *Image) document(ctx context.Context, desc v1.Descriptor) ([]byte, error) {
	rc, err := i.src.document(ctx, desc)
	if err != nil {
		return nil, fmt.Errorf("reading manifest %s: %w", desc.Digest, err)
	}
	raw, err := readAll(rc, desc, maxManifest)
	if err != nil {
		return nil, fmt.Errorf("reading manifest %s: %w", desc.Digest, err)
	}
	return raw, nil
}

// Ref returns the reference that the image was opened by.
func (i *Image) Ref() Ref { return i.ref }

// Digest returns the digest of the manifest.
func (i *Image) Digest() v1.Hash { return i.digest }

// Manifest returns the image manifest as it was served, of an OCI or a Docker v2
// schema 2 media type. For a Docker archive, which has none, it is an OCI manifest
// made from the archive.
func (i *Image) Manifest(context.Context) (raw []byte, mediaType string, err error) {
	return append([]byte(nil), i.raw...), i.mediaType, nil
}

// Blob opens the config or a layer. A stream that has not the descriptor's size and
// digest ends in a *DigestError instead of io.EOF.
func (i *Image) Blob(ctx context.Context, desc v1.Descriptor) (io.ReadCloser, error) {
	if err := checkDescriptor(desc); err != nil {
		return nil, fmt.Errorf("reading from %s: %w", i.ref, err)
	}
	rc, err := i.src.blob(ctx, desc)
	if err != nil {
		return nil, fmt.Errorf("reading %s from %s: %w", desc.Digest, i.ref, err)
	}
	v, err := newVerifier(&cappedReadCloser{&contextReader{ctx, rc}, rc}, desc)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("reading from %s: %w", i.ref, err), rc.Close())
	}
	return v, nil
}

// BlobRange opens n bytes of a blob from offset off. Nothing checks them. Where a
// registry does not serve ranges the error wraps ErrNoRanges, and the caller reads
// the whole blob; a part that ends early ends in io.ErrUnexpectedEOF.
func (i *Image) BlobRange(ctx context.Context, desc v1.Descriptor, off, n int64) (io.ReadCloser, error) {
	if err := checkDescriptor(desc); err != nil {
		return nil, fmt.Errorf("reading from %s: %w", i.ref, err)
	}
	if off < 0 || n <= 0 || n > desc.Size || off > desc.Size-n {
		return nil, fmt.Errorf("reading %s from %s: %w: range of %d bytes from %d in a blob of %d", desc.Digest, i.ref, ErrInvalid, n, off, desc.Size)
	}
	rc, err := i.src.blobRange(ctx, desc, off, n)
	if err != nil {
		return nil, fmt.Errorf("reading %d bytes from %d of %s from %s: %w", n, off, desc.Digest, i.ref, err)
	}
	return &exact{rc: rc, left: n}, nil
}

// Close frees what the image holds open. Open blobs of archives end with it.
func (i *Image) Close() error { return i.src.Close() }

// exact ends after left bytes and fails where there are fewer.
type exact struct {
	rc   io.ReadCloser
	left int64
}

func (e *exact) Read(p []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	n, err := e.rc.Read(p[:min(int64(len(p)), e.left)])
	e.left -= int64(n)
	if err == io.EOF && e.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (e *exact) Close() error { return e.rc.Close() }
