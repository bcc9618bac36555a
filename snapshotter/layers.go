package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

// refPrefix begins the names in the store of all snapshotters.
const refPrefix = "containerd/"

// What a name in the store is of: a committed snapshot's layer, or the merged image
// of its chain.
const (
	layerRef  = "layer"
	mergedRef = "merged"
)

func (s *Snapshotter) ref(id, what string) string {
	return refPrefix + s.instance + "/" + id + "/" + what
}

// layerOf reads the tree of a snapshot's layer.
func (s *Snapshotter) layerOf(ctx context.Context, txn *store.Txn, id string) (*tree.Tree, error) {
	stream, err := s.store.StreamRef(s.ref(id, layerRef))
	if err == nil {
		return converter.ReadLayer(ctx, s.store, txn, stream)
	}
	if !errors.Is(err, store.ErrNotFound) {
		return nil, err
	}
	f, _, err := s.store.OpenImage("refs/" + s.ref(id, layerRef))
	if err != nil {
		return nil, fmt.Errorf("reading the layer of snapshot %s: %w", id, err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	t, err := erofs.Read(f, fi.Size())
	if err != nil {
		return nil, fmt.Errorf("reading the layer of snapshot %s: %w", id, err)
	}
	return t, nil
}

// merged returns the tree of a chain. It always begins with the layers: a merged
// image no longer tells which directories no layer described.
//
// A tree from memory may need objects that the store no longer has (cached is true
// then): the content of a sparse file is another object in a tree than in a layer's
// stream, and nothing but an image keeps it.
func (s *Snapshotter) merged(ctx context.Context, txn *store.Txn, chain []string) (t *tree.Tree, cached bool, err error) {
	t, have := tree.New(), 0
	for i := len(chain); i > 0; i-- {
		if known := s.trees.get(chain[i-1]); known != nil {
			t, have, cached = known, i, true
			break
		}
	}
	for _, id := range chain[have:] {
		l, err := s.layerOf(ctx, txn, id)
		if err != nil {
			return nil, false, err
		}
		t = tree.Merge(t, l)
	}
	s.trees.put(chain[len(chain)-1], t)
	return t, cached, nil
}

// complete returns the tree of a chain, all of whose objects the transaction or the
// store has.
func (s *Snapshotter) complete(ctx context.Context, txn *store.Txn, chain []string) (*tree.Tree, error) {
	t, cached, err := s.merged(ctx, txn, chain)
	if err != nil || !cached {
		return t, err
	}
	missing := errors.New("an object is missing")
	err = t.Walk(func(_ string, n *tree.Node) error {
		if !n.IsRegular() || n.File.Object.IsZero() {
			return nil
		}
		if has, err := s.store.HasObject(n.File.Object); err != nil || !has {
			return errors.Join(missing, err)
		}
		return nil
	})
	if !errors.Is(err, missing) {
		return t, err
	}
	s.trees.clear()
	t, _, err = s.merged(ctx, txn, chain)
	return t, err
}

// image returns the merged image of a chain of committed snapshots, which it makes
// where there is none yet. A speculative image may be dropped again.
func (s *Snapshotter) image(ctx context.Context, chain []string, speculative bool) (d fsverity.Digest, err error) {
	top := chain[len(chain)-1]
	defer s.lock(imageLock(top))()
	d, err = s.store.ImageDigest("refs/" + s.ref(top, mergedRef))
	if err == nil && !speculative {
		s.state.setSpeculative(top, false)
	}
	if err == nil || !errors.Is(err, store.ErrNotFound) {
		return d, err
	}
	began := time.Now()
	txn, err := s.store.Begin(ctx)
	if err != nil {
		return d, err
	}
	defer func() { err = errors.Join(err, txn.Rollback()) }()
	t, err := s.complete(ctx, txn, chain)
	if err != nil {
		return d, err
	}
	// The image that converting the same layers gives, so that the two are one.
	sealed, err := converter.Seal(t, converter.Rootfs)
	if err != nil {
		return d, err
	}
	if d, err = putImage(ctx, txn, sealed); err != nil {
		return d, fmt.Errorf("writing the image of snapshot %s and its %d ancestors: %w", top, len(chain)-1, err)
	}
	if err := txn.SetRef(store.Images, s.ref(top, mergedRef), d.String()); err != nil {
		return d, err
	}
	if err := txn.Commit(); err != nil {
		return d, err
	}
	s.state.setSpeculative(top, speculative)
	s.counters.images.Add(1)
	s.log.Debug("made an image", "id", top, "layers", len(chain), "image", d.String(), "took", time.Since(began))
	return d, nil
}

func putImage(ctx context.Context, txn *store.Txn, t *tree.Tree) (fsverity.Digest, error) {
	return txn.PutImage(ctx, func(w io.Writer) error { return erofs.Write(w, t, erofs.Options{}) })
}

// Image returns the composefs image of a committed snapshot: all of its layers,
// merged. It is made if it was not needed before.
func (s *Snapshotter) Image(ctx context.Context, name string) (d fsverity.Digest, err error) {
	defer s.lock(keyLock(name))() // it cannot be removed meanwhile
	var ids []string
	err = s.read(ctx, func(ctx context.Context) error {
		_, info, _, err := storage.GetInfo(ctx, name)
		if err != nil {
			return err
		}
		if info.Kind != snapshots.KindCommitted {
			return fmt.Errorf("snapshot %q is not committed: %w", name, errdefs.ErrFailedPrecondition)
		}
		ids, err = chain(ctx, name)
		return err
	})
	if err != nil {
		return d, err
	}
	return s.image(ctx, ids, false)
}

// warmDelay is how long after the commit of an unpacked layer its chain's image is
// made, unless another layer is being unpacked on it by then.
const warmDelay = 300 * time.Millisecond

// warm makes the image of an unpacked chain if no layer follows, while its tree is
// still in memory: the first container then starts at once.
func (s *Snapshotter) warm(name string) {
	s.background.Go(func() {
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(warmDelay):
		}
		defer s.lock(keyLock(name))()
		var ids []string
		err := s.read(s.ctx, func(ctx context.Context) (err error) {
			leaf, err := isLeaf(ctx, name)
			if err != nil || !leaf {
				return err
			}
			ids, err = chain(ctx, name)
			return err
		})
		if err == nil && len(ids) > 0 {
			_, err = s.image(s.ctx, ids, true)
		}
		if err != nil && s.ctx.Err() == nil && !errdefs.IsNotFound(err) {
			s.log.Warn("making an image ahead", "snapshot", name, "error", err)
		}
	})
}

// isLeaf reports whether no snapshot has the parent name, and fails if there is no
// such snapshot.
func isLeaf(ctx context.Context, name string) (bool, error) {
	if _, _, _, err := storage.GetInfo(ctx, name); err != nil {
		return false, err
	}
	leaf := true
	err := storage.WalkInfo(ctx, func(_ context.Context, info snapshots.Info) error {
		leaf = leaf && info.Parent != name
		return nil
	})
	return leaf, err
}

// dropSpeculative removes the image of a chain that was made in case a container
// wants it, when a layer on top of it shows that it was not the last one.
func (s *Snapshotter) dropSpeculative(id string) {
	defer s.lock(s.mountPoint(id, nil))()
	defer s.lock(imageLock(id))()
	s.mounts.mu.Lock()
	used := s.mounts.byTarget[s.mountPoint(id, nil)] != nil
	s.mounts.mu.Unlock()
	if used || !s.state.takeSpeculative(id) {
		return
	}
	s.removeRef(store.Images, id, mergedRef)
}

// removeRefs removes all names in the store of a snapshot.
func (s *Snapshotter) removeRefs(id string) {
	defer s.lock(imageLock(id))()
	s.removeRef(store.Streams, id, layerRef)
	s.removeRef(store.Images, id, layerRef)
	s.removeRef(store.Images, id, mergedRef)
}

func (s *Snapshotter) removeRef(kind store.Kind, id, what string) {
	err := s.store.RemoveRef(kind, s.ref(id, what))
	switch {
	case err == nil:
		s.state.setGarbage(true)
	case !errors.Is(err, store.ErrNotFound):
		// Cleanup tries again: there is no record of the snapshot any more.
		s.log.Warn("removing a name from the store", "name", s.ref(id, what), "error", err)
	}
}

// usageOf counts the files of a layer: all names but further links, and the bytes of
// regular files.
func usageOf(t *tree.Tree) (u snapshots.Usage) {
	seen := map[*tree.Node]bool{}
	_ = t.Walk(func(_ string, n *tree.Node) error {
		if n.IsWhiteout() || !n.IsDir() && seen[n] {
			return nil
		}
		if !n.IsDir() {
			seen[n] = true
		}
		u.Inodes++
		if n.IsRegular() {
			u.Size += n.File.Size
		}
		return nil
	})
	return u
}

// A treeCache keeps the trees of the chains used last for a short while: unpacking an
// image builds each on the one before.
type treeCache struct {
	mu    sync.Mutex
	trees map[string]*tree.Tree
	order []string // the one used last at the end
	timer *time.Timer
}

const (
	maxTrees = 8
	treeLife = 20 * time.Second
)

func (c *treeCache) init() { c.trees = map[string]*tree.Tree{} }

func (c *treeCache) get(id string) *tree.Tree {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.trees[id]
	if t != nil {
		c.touch(id)
	}
	return t
}

func (c *treeCache) put(id string, t *tree.Tree) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.trees[id] = t
	c.touch(id)
	if len(c.order) > maxTrees {
		delete(c.trees, c.order[0])
		c.order = c.order[1:]
	}
}

func (c *treeCache) touch(id string) {
	c.order = append(slices.DeleteFunc(c.order, func(o string) bool { return o == id }), id)
	if c.timer != nil {
		c.timer.Stop()
	}
	c.timer = time.AfterFunc(treeLife, c.clear)
}

func (c *treeCache) remove(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.trees, id)
	c.order = slices.DeleteFunc(c.order, func(o string) bool { return o == id })
}

func (c *treeCache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.trees)
	c.order = nil
	if c.timer != nil {
		c.timer.Stop()
	}
}

// volatile is what a process knows of snapshots and may forget.
type volatile struct {
	mu          sync.Mutex
	speculative map[string]bool       // images of committed snapshots that nobody asked for
	applied     map[string]*tree.Tree // layers of active snapshots, from Apply to Commit
	retiring    map[string]bool       // committed snapshots that still have an upper directory
	garbage     bool                  // names were removed from the store
}

func (v *volatile) init() {
	v.speculative = map[string]bool{}
	v.applied = map[string]*tree.Tree{}
	v.retiring = map[string]bool{}
}

func (v *volatile) setSpeculative(id string, yes bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if yes {
		v.speculative[id] = true
	} else {
		delete(v.speculative, id)
	}
}

func (v *volatile) takeSpeculative(id string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	yes := v.speculative[id]
	delete(v.speculative, id)
	return yes
}

func (v *volatile) setApplied(id string, t *tree.Tree) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.applied[id] = t
}

func (v *volatile) appliedOf(id string) *tree.Tree {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.applied[id]
}

func (v *volatile) setRetiring(id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.retiring[id] = true
}

func (v *volatile) isRetiring(id string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.retiring[id]
}

func (v *volatile) takeRetiring(id string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	yes := v.retiring[id]
	delete(v.retiring, id)
	return yes
}

// forget drops all that is known of a snapshot.
func (v *volatile) forget(id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.speculative, id)
	delete(v.applied, id)
}

func (v *volatile) setGarbage(yes bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.garbage = yes
}

func (v *volatile) takeGarbage() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	yes := v.garbage
	v.garbage = false
	return yes
}

// idOfRef returns the ID of the snapshot that a name in the store belongs to, "" for
// other names.
func (s *Snapshotter) idOfRef(name string) string {
	rest, ok := strings.CutPrefix(name, refPrefix+s.instance+"/")
	if !ok {
		return ""
	}
	id, _, _ := strings.Cut(rest, "/")
	return id
}
