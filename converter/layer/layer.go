// Package layer turns one OCI layer, a tar, into one [tree.Tree], and back.
//
// [Read] takes the tar in one pass, compressed or not. Bodies of files go to
// [Objects] while the stream is still being decompressed; all other bytes (headers,
// padding, what follows the end of the tar) go to a [Recorder]. Chunks of the
// recorded stream and objects together are the layer again, bit by bit
// ([Assemble]), so that its diffID holds after a way through the store.
// [FromChunks] makes the same tree from a recorded stream. [Write] makes a tar of a
// tree that was never one, and [NewCompressor] compresses it, both always to the
// same bytes.
//
// What a layer may contain is settled by the OCI image specification
// (https://github.com/opencontainers/image-spec/blob/main/layer.md) and, where that
// is silent, by what podman and containerd do with it, with these differences:
//
//   - A name with a ".." element and an absolute name are refused. Podman and
//     containerd clean them, so that two names in one layer can mean one file; no
//     tool that builds images writes them.
//   - An entry below a symbolic link or another non-directory of the same layer is
//     refused. Podman would follow the link within the layer's directory; what the
//     link points to in the running container is another file.
//   - A symbolic link has mode 0777, whatever the tar says, because that is what
//     Linux shows of any.
//   - A hard link has the metadata of its target; its own header's are not looked at.
//   - PAX global headers are ignored, as podman, containerd and Go do, with a
//     warning if they would have meant something.
//
// Whiteouts become the nodes that [tree.Merge] consumes, and hold for the lower
// layers only, never for siblings in the same layer, whatever the order in the tar.
//
// Left out: multi-volume tars, access control lists in text form (SCHILY.acl.*),
// partial reading of eStargz and zstd:chunked (both are read here as the plain
// compressed streams that they also are), and where blobs come from.
package layer

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// Errors that callers test for with errors.Is. All are wrapped with the entry or
// the offset in the uncompressed tar.
var (
	ErrCompression = errors.New("unsupported compression")
	ErrFormat      = errors.New("not a valid tar")
	ErrTruncated   = errors.New("the layer is truncated")
	ErrTooLarge    = errors.New("the layer is too large")
	ErrDiffID      = errors.New("the layer has another diffID")
	ErrName        = errors.New("unsafe name")
	ErrLink        = errors.New("bad link")
	ErrType        = errors.New("unsupported type of entry")
	ErrValue       = errors.New("value out of range")
	ErrChunks      = errors.New("bad recorded stream")
)

// Objects stores file bodies by their fs-verity digest.
type Objects interface {
	Algorithm() fsverity.Algorithm
	// Put stores what r gives, exactly size bytes. Calls may run side by side, and
	// side by side with PutBytes.
	Put(ctx context.Context, r io.Reader, size int64) (fsverity.Digest, error)
	// PutBytes stores data, which it must not keep.
	PutBytes(ctx context.Context, data []byte) (fsverity.Digest, error)
}

// A Recorder takes the layer as a split stream, from one goroutine and in stream
// order. Adjacent Inline calls mean one run of bytes; where such a run is cut
// depends on nothing but the layer.
type Recorder interface {
	// Inline adds bytes that are kept as they are. The slice is reused afterwards.
	Inline(p []byte) error
	// Object adds the content of an object, of size bytes.
	Object(d fsverity.Digest, size int64) error
}

// Chunks is a recorded stream, read back. Next returns either inline bytes, which
// stay valid until the next call, or an object with its size; io.EOF at the end.
type Chunks interface {
	Next() (inline []byte, object fsverity.Digest, size int64, err error)
}

// An Opener opens objects by digest.
type Opener func(fsverity.Digest) (io.ReadSeekCloser, error)

// Default limits of Options.
const (
	DefaultMaxSize     = 64 << 30
	DefaultMaxMetadata = 1 << 30
)

// maxPath is PATH_MAX less its NUL: podman could not create longer paths either.
// It also bounds the depth of the tree.
const maxPath = 4095

// Options tune Read and FromChunks. The zero value is ready for use.
type Options struct {
	// DiffID is the digest that the uncompressed layer must have ("sha256:…"); ""
	// stands for any. FromChunks does not look at it.
	DiffID string
	// MaxSize limits the uncompressed size in bytes, holes of sparse files
	// included: a few kilobytes of gzip can expand to terabytes. 0 means
	// DefaultMaxSize; negative means no limit.
	MaxSize int64
	// MaxMetadata limits the memory in bytes that the tree may take, roughly: names,
	// links, xattrs, small files and some hundred bytes an entry. 0 means
	// DefaultMaxMetadata; negative means no limit.
	MaxMetadata int64
	// Workers is the number of bodies that are stored at once; 0 means twice the
	// number of processors, because storing also waits for the disk.
	Workers int
}

func (o Options) maxSize() int64 { return limit(o.MaxSize, DefaultMaxSize) }

func (o Options) maxMetadata() int64 { return limit(o.MaxMetadata, DefaultMaxMetadata) }

func limit(n, unset int64) int64 {
	switch {
	case n == 0:
		return unset
	case n < 0:
		return 1<<63 - 1
	}
	return n
}

func (o Options) workers() int {
	if o.Workers > 0 {
		return o.Workers
	}
	return 2 * runtime.GOMAXPROCS(0)
}

// A Result is what Read found.
type Result struct {
	Tree        *tree.Tree
	DiffID      string // "sha256:…" of the uncompressed bytes
	Size        int64  // uncompressed bytes, those after the tar's end included
	Entries     int    // in the tar, whiteouts included
	Compression Compression
	// Warnings tell what was accepted but may surprise, one line each, in an order
	// that depends on the layer alone.
	Warnings []string
}

// Read reads a layer to the end of r, stores the bodies of its files in objects and
// gives the split stream to rec, which may be nil.
//
// Bodies of more than [tree.InlineSize] bytes become objects of the stream; smaller
// ones stay inline in both stream and tree. A sparse file is one object as the tar
// packs it, for the stream, and another one as the file reads, for the tree.
//
// Memory is about 32 MiB and the tree, plus the window of zstd (at most 128 MiB).
// When Read has returned, nothing reads from r any more: when ctx is done it waits
// for the one call of r.Read that is under way. An error may leave objects behind
// that nothing refers to.
func Read(ctx context.Context, r io.Reader, objects Objects, rec Recorder, opts Options) (Result, error) {
	if opts.DiffID != "" && !validDiffID(opts.DiffID) {
		return Result{}, fmt.Errorf("%w: want %q, which is not a sha256 digest", ErrDiffID, opts.DiffID)
	}
	if rec == nil {
		rec = noRecord{}
	}
	dec, err := newDecompressor(r)
	if err != nil {
		return Result{}, err
	}
	defer dec.Close()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := startStream(ctx, dec, opts.maxSize())
	q := newQueue(ctx, objects, rec, opts.workers())
	b := newBuilder(opts)
	src := &recording{ctx: ctx, in: s, objects: objects, queue: q, builder: b}
	err = scan(ctx, src, b)
	if err == nil {
		err = src.trailer()
	}
	if err == nil {
		err = q.flush()
	}
	cancel()
	q.close()
	sum := s.close()
	if err != nil {
		return Result{}, err
	}

	res := Result{DiffID: "sha256:" + hex.EncodeToString(sum), Size: src.offset, Entries: b.entries, Compression: dec.compression}
	if opts.DiffID != "" && res.DiffID != opts.DiffID {
		return Result{}, fmt.Errorf("%w: got %s, want %s", ErrDiffID, res.DiffID, opts.DiffID)
	}
	res.Tree, res.Warnings = b.finish()
	return res, nil
}

func validDiffID(s string) bool {
	h, ok := strings.CutPrefix(s, "sha256:")
	_, err := hex.DecodeString(h)
	return ok && err == nil && len(h) == 2*sha256.Size && strings.ToLower(h) == h
}

type noRecord struct{}

func (noRecord) Inline([]byte) error                 { return nil }
func (noRecord) Object(fsverity.Digest, int64) error { return nil }

// Discard returns Objects that computes digests and stores nothing.
func Discard(alg fsverity.Algorithm) Objects {
	return &discard{alg, sync.Pool{New: func() any { return fsverity.NewHasher(alg) }}}
}

type discard struct {
	alg     fsverity.Algorithm
	hashers sync.Pool
}

func (d *discard) Algorithm() fsverity.Algorithm { return d.alg }

func (d *discard) Put(ctx context.Context, r io.Reader, size int64) (fsverity.Digest, error) {
	digest, n, err := fsverity.Read(d.alg, io.LimitReader(r, size))
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	return digest, err
}

func (d *discard) PutBytes(ctx context.Context, data []byte) (fsverity.Digest, error) {
	h := d.hashers.Get().(*fsverity.Hasher)
	defer d.hashers.Put(h)
	h.Reset()
	h.Write(data)
	return h.Sum(), nil
}
