package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/layer"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

// Labels that containerd's unpacker and CRI put on the snapshot of a layer to be
// unpacked (containerd core/snapshots, core/unpack/unpacker.go and
// pkg/snapshotters/annotations.go).
const (
	labelParentChain = "containerd.io/snapshot/parent-chain-id"
	labelImageRef    = "containerd.io/snapshot/cri.image-ref"
	labelLayerDigest = "containerd.io/snapshot/cri.layer-digest"
)

// A Source fetches layers.
type Source interface {
	// Layer opens the blob of a layer, compressed or not: digest is that of the blob,
	// "sha256:…", and ref the image's reference as containerd has it
	// ("docker.io/library/debian:13"). What is read must end in an error instead of
	// io.EOF if it has another digest.
	Layer(ctx context.Context, ref, digest string) (io.ReadCloser, error)
}

// A request asks for a committed snapshot instead of an active one.
type request struct {
	name   string        // to commit under
	parent string        // of the snapshot
	target digest.Digest // chainID of the layer (OCI image-spec, config.md)
	below  digest.Digest // chainID of the layers below, "" for none
	// rebase says that the client gives the parent at Commit only. It then takes no
	// committed snapshot, but may take an active one that needs no layer.
	rebase bool
	diffID digest.Digest // of the layer, if the client says it (containerd 2.3 and newer)
	ref    string
	blob   string
}

// asked returns the request that a Prepare has in its labels, nil for none.
func (s *Snapshotter) asked(kind snapshots.Kind, key, parent string, labels map[string]string) *request {
	target, err := digest.Parse(labels[snapshots.LabelSnapshotRef])
	if err != nil || kind != snapshots.KindActive {
		return nil
	}
	r := &request{
		name: scope(key) + target.String(), parent: parent, target: target,
		ref: labels[labelImageRef], blob: labels[labelLayerDigest],
	}
	if d, err := digest.Parse(labels[snapshots.LabelSnapshotDiffID]); err == nil {
		r.diffID = d
	}
	if below, err := digest.Parse(labels[labelParentChain]); err == nil {
		r.below = below
	} else if parent != "" {
		// Before 2.x there is no such label, but the parent has the chain's name.
		if r.below, err = digest.Parse(strings.TrimPrefix(parent, scope(parent))); err != nil {
			return nil
		}
	}
	r.rebase = parent == "" && r.below != ""
	return r
}

// alreadyCommitted returns ErrAlreadyExists if there is a committed snapshot of the
// chain: of another namespace, say. containerd looks for it by label and parent.
func (s *Snapshotter) alreadyCommitted(ctx context.Context, r *request) error {
	found := false
	filter := fmt.Sprintf("kind==committed,labels.%q==%s", snapshots.LabelSnapshotRef, r.target)
	err := s.read(ctx, func(ctx context.Context) error {
		return walkAll(ctx, func(_ context.Context, info snapshots.Info) error {
			found = found || info.Parent == r.parent
			return nil
		}, filter)
	})
	if err == nil && found && !r.rebase {
		err = fmt.Errorf("snapshot of chain %s: %w", r.target, errdefs.ErrAlreadyExists)
	}
	return err
}

// provide gives a new active snapshot its layer, if the store or the source has it.
// It returns ErrAlreadyExists where it made a committed snapshot of it, and nil where
// the client goes on. A layer that cannot be had is no error: the client fetches it.
func (s *Snapshotter) provide(ctx context.Context, a *active, r *request) error {
	if r.rebase && r.diffID == "" {
		return nil // this client (2.2) could not take it
	}
	t, diffID, err := s.obtain(ctx, a.id, r)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		s.log.Warn("looking for a layer; containerd fetches it", "chain", r.target.String(), "error", err)
		return nil
	}
	if t == nil {
		return nil
	}
	if r.rebase {
		return s.stage(ctx, a, diffID)
	}
	err = s.write(ctx, func(ctx context.Context) error {
		_, info, _, err := storage.GetInfo(ctx, a.key)
		if err != nil {
			return err
		}
		_, err = storage.CommitActive(ctx, a.key, r.name, usageOf(t), snapshots.WithLabels(withoutOurs(info.Labels)))
		return err
	})
	if err != nil {
		return err
	}
	s.grown(a.id, a.chain, t)
	s.discard(a.id)
	s.warm(r.name)
	return fmt.Errorf("layer %s, snapshot of chain %s: %w", diffID, r.target, errdefs.ErrAlreadyExists)
}

// stage marks an active snapshot as complete: its mounts are read-only, which tells
// the client that nothing has to be unpacked (containerd 2.4, isStaged).
func (s *Snapshotter) stage(ctx context.Context, a *active, diffID digest.Digest) error {
	a.staged = true
	return s.write(ctx, func(ctx context.Context) error {
		_, info, _, err := storage.GetInfo(ctx, a.key)
		if err != nil {
			return err
		}
		if info.Labels == nil {
			info.Labels = map[string]string{}
		}
		info.Labels[labelStaged] = diffID.String()
		_, err = storage.UpdateInfo(ctx, info, "labels")
		return err
	})
}

// obtain makes a layer of the store, or one that it fetches, the layer of the
// snapshot id. The tree is nil where there is none to be had.
func (s *Snapshotter) obtain(ctx context.Context, id string, r *request) (_ *tree.Tree, diffID digest.Digest, err error) {
	txn, err := s.store.Begin(ctx)
	if err != nil {
		return nil, "", err
	}
	defer func() { err = errors.Join(err, txn.Rollback()) }()

	var t *tree.Tree
	if !s.o.NoLookup {
		if diffID, err = s.lookup(r); err != nil {
			return nil, "", err
		}
		if diffID != "" {
			// Read whole before the client is told that it need not fetch it.
			if t, err = converter.ReadLayer(ctx, s.store, txn, store.LayerPrefix+diffID.String()); err != nil {
				return nil, "", err
			}
			s.counters.found.Add(1)
		}
	}
	if t == nil && s.o.Source != nil && r.ref != "" && r.blob != "" {
		if t, diffID, err = s.fetch(ctx, txn, r); err != nil {
			return nil, "", err
		}
		s.counters.fetched.Add(1)
	}
	if t == nil {
		return nil, "", nil
	}
	if err := txn.SetRef(store.Streams, s.ref(id, layerRef), store.LayerPrefix+diffID.String()); err != nil {
		return nil, "", err
	}
	if err := txn.Commit(); err != nil {
		return nil, "", err
	}
	s.state.setApplied(id, t)
	return t, diffID, nil
}

// chainOf returns the chainID of a layer on top of a chain.
func chainOf(below, diffID digest.Digest) digest.Digest {
	if below == "" {
		return diffID
	}
	return identity.ChainID([]digest.Digest{below, diffID})
}

// lookup returns the diffID of the layer that the request is about if the store has
// it, else "". A chainID is a hash of the diffIDs in it, so that each layer of the
// store is tried on the chain below, which costs a hash of 150 bytes.
func (s *Snapshotter) lookup(r *request) (digest.Digest, error) {
	if r.diffID != "" {
		if chainOf(r.below, r.diffID) != r.target {
			return "", fmt.Errorf("%w: layer %s on chain %s", ErrChain, r.diffID, r.below)
		}
		if !s.store.HasStream(store.LayerPrefix + r.diffID.String()) {
			return "", nil
		}
		return r.diffID, nil
	}
	all, err := s.store.Streams()
	if err != nil {
		return "", err
	}
	for _, e := range all {
		name, ok := strings.CutPrefix(e.ID, store.LayerPrefix)
		if !ok {
			continue
		}
		if d, err := digest.Parse(name); err == nil && chainOf(r.below, d) == r.target {
			return d, nil
		}
	}
	return "", nil
}

// fetch reads a layer from the source into the transaction. That it is the right one
// is known at its end, from its diffID.
func (s *Snapshotter) fetch(ctx context.Context, txn *store.Txn, r *request) (*tree.Tree, digest.Digest, error) {
	blob, err := s.o.Source.Layer(ctx, r.ref, r.blob)
	if err != nil {
		return nil, "", fmt.Errorf("fetching layer %s of %s: %w", r.blob, r.ref, err)
	}
	defer blob.Close()
	res, err := s.ingest(ctx, txn, blob, func(diffID digest.Digest) error {
		if got := chainOf(r.below, diffID); got != r.target {
			return fmt.Errorf("%w: layer %s on chain %q gives %s, want %s", ErrChain, diffID, r.below, got, r.target)
		}
		return nil
	})
	if err != nil {
		return nil, "", fmt.Errorf("fetching layer %s of %s: %w", r.blob, r.ref, err)
	}
	return res.Tree, digest.Digest(res.DiffID), nil
}

// ingest reads a layer into a transaction as a split stream, which is kept if check
// approves its diffID.
func (s *Snapshotter) ingest(ctx context.Context, txn *store.Txn, r io.Reader, check func(diffID digest.Digest) error) (layer.Result, error) {
	stream := txn.NewStream(store.LayerStream)
	res, err := layer.Read(ctx, r, txn, stream, layer.Options{})
	if err == nil {
		err = check(digest.Digest(res.DiffID))
	}
	if err != nil {
		stream.Abort()
		return layer.Result{}, err
	}
	for _, w := range res.Warnings {
		s.log.Info(w, "layer", res.DiffID)
	}
	if _, err := stream.Close(store.LayerPrefix + res.DiffID); err != nil {
		return layer.Result{}, err
	}
	s.counters.ingested.Add(res.Size)
	return res, nil
}
