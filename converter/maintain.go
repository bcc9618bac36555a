package converter

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

// GC removes what no name of the store leads to.
func GC(ctx context.Context, st *store.Store, o store.GCOptions) (store.GCStats, error) {
	o.ImageObjects = imageObjects
	return st.GC(ctx, o)
}

// Fsck looks for damage and returns what it found.
func Fsck(ctx context.Context, st *store.Store, o store.FsckOptions) (*store.FsckReport, error) {
	o.ImageObjects = imageObjects
	report, err := st.Fsck(ctx, o)
	if err != nil || !report.Clean() {
		return report, err
	}
	// The structure is sound; now what the streams say of images.
	all, err := List(st)
	for _, s := range all {
		if s.Damage != "" {
			report.Problems = append(report.Problems, store.Problem{
				Path:    string(store.Streams) + "/" + store.ManifestPrefix + s.Manifest.String(),
				Problem: s.Damage,
				Advice:  "remove the image's names with particle rm, convert or pull it again",
			})
		}
	}
	return report, err
}

// DF tells what the store's disk space is used for.
func DF(ctx context.Context, st *store.Store) (store.Usage, error) {
	return st.DF(ctx, imageObjects)
}

// imageObjects lists the objects of an EROFS image, which the store cannot read.
func imageObjects(r io.ReaderAt, size int64) ([]fsverity.Digest, error) {
	return erofs.Objects(r, size)
}

// ReadImage reads the tree of one of an image's composefs images.
func ReadImage(st *store.Store, s *Stored, kind Kind) (*tree.Tree, error) {
	f, err := OpenImage(st, s, kind)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	t, err := erofs.Read(f, fi.Size())
	if err != nil {
		return nil, fmt.Errorf("reading the %s image %s: %w", kind, s.Images[kind.String()], err)
	}
	return t, nil
}

// OpenImage opens one of an image's composefs images.
func OpenImage(st *store.Store, s *Stored, kind Kind) (*os.File, error) {
	d, ok := s.Images[kind.String()]
	if !ok {
		return nil, fmt.Errorf("image %s has no %s image: %w; convert it again with --bootable", s.Manifest, kind, ErrNotFound)
	}
	f, _, err := st.OpenImage(d.String())
	return f, err
}
