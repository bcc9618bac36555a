package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/scan"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

// Commit makes a committed snapshot of an active one. Where our differ or the store
// provided the layer nothing is left to do but to record it; else the files of the
// upper directory are taken into the store.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	var base snapshots.Info
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return err
		}
	}
	opts = append(slices.Clone(opts), dropOurs)
	defer s.lock(keyLock(key))()
	var a *active
	err := s.read(ctx, func(ctx context.Context) error {
		// Before the work is done; CommitActive settles it.
		if _, _, _, err := storage.GetInfo(ctx, name); err == nil {
			return fmt.Errorf("committed snapshot %q: %w", name, errdefs.ErrAlreadyExists)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if a, err = s.active(ctx, key); err != nil {
		return err
	}
	if a.kind != snapshots.KindActive {
		return fmt.Errorf("snapshot %q is not active: %w", key, errdefs.ErrFailedPrecondition)
	}
	t, err := s.layerToCommit(ctx, a)
	if err != nil {
		return fmt.Errorf("committing snapshot %q: %w", key, err)
	}
	var below []string
	if !isExtract(key) {
		s.state.setRetiring(a.id) // before Cleanup sees that it is committed
	}
	err = s.write(ctx, func(ctx context.Context) error {
		if _, err := storage.CommitActive(ctx, key, name, usageOf(t), opts...); err != nil {
			return err
		}
		_, info, _, err := storage.GetInfo(ctx, name)
		if err != nil {
			return err
		}
		below, err = chain(ctx, info.Parent)
		return err
	})
	if err != nil {
		s.state.takeRetiring(a.id)
		return err
	}
	s.counters.commits.Add(1)
	s.grown(a.id, below, t)
	if isExtract(key) {
		s.release(a.id)
		s.discard(a.id)
		s.warm(name)
		return nil
	}
	s.retire(a.id)
	return nil
}

// retireDelay is how long the mounts of an active snapshot work after its commit.
const retireDelay = 2 * time.Minute

// retire takes away what the mounts of an active snapshot referred to, some time after
// its commit. BuildKit asks for the mounts of a build step's result, commits that when
// the next step begins, and only then mounts them, without its upper directory as such.
//
// Commit has marked the snapshot as retiring.
func (s *Snapshotter) retire(id string) {
	s.background.Go(func() {
		select {
		case <-s.ctx.Done(): // the next New does it
			return
		case <-time.After(retireDelay):
		}
		s.retired(id)
	})
}

// retired ends what retire began, if nothing else has.
func (s *Snapshotter) retired(id string) {
	if s.state.takeRetiring(id) {
		s.release(id)
		s.discard(id)
	}
}

// grown notes that a chain was committed whose last layer has the tree t.
func (s *Snapshotter) grown(id string, below []string, t *tree.Tree) {
	s.state.forget(id)
	lower := tree.New()
	if len(below) > 0 {
		top := below[len(below)-1]
		lower = s.trees.get(top)
		s.dropSpeculative(top)
	}
	if lower != nil {
		s.trees.put(id, tree.Merge(lower, t))
	}
}

// layerToCommit returns the layer of an active snapshot, which is in the store when
// it returns.
func (s *Snapshotter) layerToCommit(ctx context.Context, a *active) (*tree.Tree, error) {
	stream, err := s.store.StreamRef(s.ref(a.id, layerRef))
	if errors.Is(err, store.ErrNotFound) {
		return s.takeUpper(ctx, a)
	}
	if err != nil {
		return nil, err
	}
	empty, err := isEmpty(s.upper(a.id))
	if err != nil {
		return nil, err
	}
	if !empty {
		return nil, fmt.Errorf("%w: it has files besides the layer %s that was applied: %w", ErrUpper, stream, errdefs.ErrFailedPrecondition)
	}
	if t := s.state.appliedOf(a.id); t != nil {
		return t, nil
	}
	txn, err := s.store.Begin(ctx)
	if err != nil {
		return nil, err
	}
	t, err := converter.ReadLayer(ctx, s.store, txn, stream)
	return t, errors.Join(err, txn.Rollback())
}

// takeUpper takes the files of an upper directory into the store, as a layer image.
func (s *Snapshotter) takeUpper(ctx context.Context, a *active) (_ *tree.Tree, err error) {
	if _, mounted := s.mounts.of(a.id); isExtract(a.key) && len(a.chain) > 0 && !mounted {
		// Another differ than ours has unpacked it, and took made-up attributes for those
		// of directories that only the layers below have.
		s.differs.Store(false)
		return nil, fmt.Errorf("%w: another differ than Particle's unpacked it, which was not expected: pull the image again: %w", ErrUpper, errdefs.ErrUnavailable)
	}
	txn, err := s.store.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, txn.Rollback()) }()
	link, err := s.mayLink(a)
	if err != nil {
		return nil, err
	}
	dir := s.upper(a.id)
	if link {
		// The files become objects in what follows, and stay them where that, or the record
		// after it, fails: nobody may write to them any more. The paths that the client knows
		// lead nowhere now, and active refuses the snapshot.
		if err := os.Rename(dir, s.taken(a.id)); err != nil {
			return nil, err
		}
		dir = s.taken(a.id)
	}
	txn.SetImmutableSources(link)
	// A bind mount has no whiteouts: what looks like one there is a device.
	overlay := len(a.chain) > 0 || isExtract(a.key)
	t, err := scan.Dir(ctx, dir, txn, scan.Options{
		OverlayUpper: overlay, TrustedXattrs: true, OneFileSystem: true,
		Live: !link, // a container may still run
	})
	switch {
	case errors.Is(err, scan.ErrChanged):
		return nil, fmt.Errorf("%w: somebody writes to the snapshot: stop the container first: %w", err, errdefs.ErrUnavailable)
	case errors.Is(err, scan.ErrNotLayer):
		return nil, fmt.Errorf("%w: %w", ErrUpper, err)
	case err != nil:
		return nil, err
	}
	if a.ids != nil {
		if n := a.ids.unmap(t); n > 0 {
			s.log.Warn("files have owners that the user namespace does not have", "key", a.key, "files", n)
		}
	}
	d, err := putImage(ctx, txn, t)
	if err != nil {
		return nil, fmt.Errorf("writing the layer's image: %w", err)
	}
	if err := txn.SetRef(store.Images, s.ref(a.id, layerRef), d.String()); err != nil {
		return nil, err
	}
	if err := txn.Commit(); err != nil {
		return nil, err
	}
	_, bytes := txn.Added()
	s.counters.ingested.Add(bytes)
	return t, nil
}

// mayLink reports whether the files of an upper directory can become objects as they
// are. That holds for unpacked layers, which nobody writes to after Commit; a
// container, or whoever has it still mounted, could write to its files and so to
// everybody's. Such objects keep their modes, setuid among them, so that nobody but
// the owner may reach into the store.
func (s *Snapshotter) mayLink(a *active) (bool, error) {
	if !isExtract(a.key) {
		return false, nil
	}
	if st, err := os.Stat(s.store.Dir()); err != nil || st.Mode().Perm()&0o077 != 0 {
		return false, err
	}
	used, err := upperInUse(s.upper(a.id))
	return !used, err
}
