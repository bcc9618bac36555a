package converter

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/layer"
	"github.com/particle-os/particle/converter/store"
)

// A Recorder is an Image that has the files of its layers apart from their tars, as
// podman's storage has them, and brings them into a store itself.
type Recorder interface {
	// RecordLayer stores the files of a layer in the transaction and gives the layer
	// to rec as [layer.Read] would: bodies over [tree.InlineSize] bytes as objects,
	// all else inline. It may promise by [store.Txn.SetImmutableSources] that the
	// files never change. The caller compares the diffID, so that nothing but the
	// layer's own bytes is taken for it.
	RecordLayer(ctx context.Context, diffID v1.Hash, txn *store.Txn, rec layer.Recorder) error
}

// record brings a layer into the transaction whose files the image has itself.
func (f *fetch) record(ctx context.Context, img Recorder, i int) (*aLayer, error) {
	desc, diffID := f.descs[i], f.diffIDs[i]
	f.progress(i, LayerStarted, 0)
	rec := &recording{
		hashing: hashing{StreamWriter: f.txn.NewStream(store.LayerStream), txn: f.txn, sum: sha256.New()},
		// The manifest may count compressed bytes, which nobody has here.
		moved: func(n int64) { f.progress(i, LayerMoved, min(n, desc.Size)) },
	}
	err := img.RecordLayer(ctx, diffID, f.txn, rec)
	if got := "sha256:" + hex.EncodeToString(rec.sum.Sum(nil)); err == nil && got != diffID.String() {
		err = fmt.Errorf("%w: got %s, want %s", layer.ErrDiffID, got, diffID)
	}
	if err != nil {
		rec.Abort()
		return nil, err
	}
	l, err := closeLayer(rec.StreamWriter, diffID.String(), rec.size, nil)
	if err != nil {
		return nil, err
	}
	stream, err := f.txn.OpenStreamDigest(l.stream, store.LayerStream)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	l.tree, err = layer.FromChunks(ctx, stream, opener(f.txn), f.txn, layer.Options{MaxSize: f.o.MaxLayerSize})
	if err != nil {
		return nil, err
	}
	f.progress(i, LayerDone, desc.Size)
	return l, nil
}

// recording is hashing that tells how far it is.
type recording struct {
	hashing
	moved func(total int64)
}

func (r *recording) Object(d fsverity.Digest, size int64) error {
	err := r.hashing.Object(d, size)
	if err == nil {
		r.moved(r.size)
	}
	return err
}
