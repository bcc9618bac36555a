package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/particle-os/particle/converter/store"
)

// Blobs opens the blobs that containerd has fetched.
type Blobs interface {
	// Blob opens a blob, as it was fetched: compressed or not. The context has
	// containerd's namespace.
	Blob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)
}

// A Differ unpacks layers for active snapshots of a Snapshotter, by streaming them into
// the store: nothing is written to upper directories. For other mounts, and for what
// it cannot read, it returns ErrNotImplemented: containerd then asks the next of its
// differs.
type Differ struct {
	s     *Snapshotter
	blobs Blobs
}

var (
	_ diff.Applier  = (*Differ)(nil)
	_ diff.Comparer = (*Differ)(nil)
)

// Differ returns the differ that reads containerd's blobs.
func (s *Snapshotter) Differ(blobs Blobs) *Differ { return &Differ{s: s, blobs: blobs} }

// Apply unpacks a layer.
func (d *Differ) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []cmount.Mount, opts ...diff.ApplyOpt) (_ ocispec.Descriptor, err error) {
	var config diff.ApplyConfig
	for _, opt := range opts {
		if err := opt(ctx, desc, &config); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	key, err := d.s.keyOf(ctx, mounts)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer d.s.lock(keyLock(key))()
	a, err := d.s.active(ctx, key)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if why := d.cannot(a, desc, config); why != "" {
		return ocispec.Descriptor{}, d.s.passOn(ctx, a, why)
	}
	blob, err := d.blobs.Blob(ctx, desc)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("opening blob %s: %w", desc.Digest, err)
	}
	defer blob.Close()
	applied, err := d.s.applyTo(ctx, a.id, blob)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("applying layer %s: %w", desc.Digest, err)
	}
	if config.Progress != nil {
		config.Progress(desc.Size)
	}
	return applied, nil
}

// Compare leaves making layers of changes to containerd's own differ. There it is under
// the caller's lease, which containerd does not pass on to proxies: a blob that one
// writes may be collected before anything refers to it.
func (d *Differ) Compare(context.Context, []cmount.Mount, []cmount.Mount, ...diff.Opt) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, fmt.Errorf("comparing mounts: %w", errdefs.ErrNotImplemented)
}

// keyOf returns the key of the active snapshot whose mounts these are.
func (s *Snapshotter) keyOf(ctx context.Context, mounts []cmount.Mount) (key string, err error) {
	not := fmt.Errorf("mounts of another snapshotter: %w", errdefs.ErrNotImplemented)
	if len(mounts) != 1 || mounts[0].Type != "overlay" {
		return "", not
	}
	for _, o := range mounts[0].Options {
		upper, ok := strings.CutPrefix(o, "upperdir=")
		if !ok {
			continue
		}
		id := filepath.Base(filepath.Dir(upper))
		if upper != s.upper(id) {
			return "", not
		}
		err = s.read(ctx, func(ctx context.Context) error {
			ids, err := storage.IDMap(ctx)
			key = ids[id]
			return err
		})
		if err != nil && !errdefs.IsNotFound(err) {
			return "", err
		}
	}
	if key == "" {
		return "", not
	}
	return key, nil
}

// cannot says why a layer cannot be unpacked here, "" if it can.
func (d *Differ) cannot(a *active, desc ocispec.Descriptor, config diff.ApplyConfig) string {
	if a.kind != snapshots.KindActive || !isExtract(a.key) {
		return "the snapshot is not for unpacking"
	}
	if len(config.ProcessorPayloads) > 0 {
		return "the layer needs a stream processor"
	}
	if _, err := images.DiffCompression(context.Background(), desc.MediaType); err != nil {
		return "media type " + desc.MediaType
	}
	if empty, err := isEmpty(d.s.upper(a.id)); err != nil || !empty {
		return "another differ has written to the snapshot"
	}
	return ""
}

// passOn leaves a layer to another differ, which wants to see the layers below.
func (s *Snapshotter) passOn(ctx context.Context, a *active, why string) error {
	if a.kind == snapshots.KindActive && len(a.chain) > 0 {
		if err := s.acquire(ctx, a); err != nil {
			return err
		}
	}
	s.log.Info("leaving a layer to another differ", "key", a.key, "why", why)
	return fmt.Errorf("%s: %w", why, errdefs.ErrNotImplemented)
}

// applyTo reads a layer and makes it that of the active snapshot id.
func (s *Snapshotter) applyTo(ctx context.Context, id string, blob io.Reader) (_ ocispec.Descriptor, err error) {
	txn, err := s.store.Begin(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer func() { err = errors.Join(err, txn.Rollback()) }()
	res, err := s.ingest(ctx, txn, blob, func(digest.Digest) error { return nil })
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if err := txn.SetRef(store.Streams, s.ref(id, layerRef), store.LayerPrefix+res.DiffID); err != nil {
		return ocispec.Descriptor{}, err
	}
	if err := txn.Commit(); err != nil {
		return ocispec.Descriptor{}, err
	}
	s.state.setApplied(id, res.Tree)
	s.counters.applied.Add(1)
	s.differs.Store(true)
	return ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayer,
		Digest:    digest.Digest(res.DiffID),
		Size:      res.Size,
	}, nil
}
