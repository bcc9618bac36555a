package converter

import (
	"context"
	"fmt"
	"io"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/layer"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

// ReadLayer reads the tree of a layer that the store has, whiteouts included, by the id of
// its split stream. Objects that it makes on the way are the transaction's. Errors are
// those of the store, and of a damaged stream.
func ReadLayer(ctx context.Context, st *store.Store, txn *store.Txn, id string) (*tree.Tree, error) {
	r, err := st.OpenStream(id, store.LayerStream)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	open := func(d fsverity.Digest) (io.ReadSeekCloser, error) { return txn.OpenObject(d) }
	t, err := layer.FromChunks(ctx, r, open, txn, layer.Options{MaxSize: -1})
	if err != nil {
		return nil, fmt.Errorf("reading the stored layer %s (particle store fsck says more): %w", id, err)
	}
	return t, nil
}
