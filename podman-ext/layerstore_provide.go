package podmanext

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/layer"
	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

const (
	// maxFetches is how many layers are fetched at once.
	maxFetches = 4
	// aheadLife is how long the other layers of an image go on being fetched after
	// podman had one: it asks for them one after the other, holding a lock.
	aheadLife = 30 * time.Second
)

// An imageKey is what the composefs image of a layer depends on.
type imageKey struct {
	diffID string
	base   bool // it is the lowest of its image's layers
}

// A job brings one layer into the store, for all who wait for it.
type job struct {
	cancel  context.CancelFunc
	done    chan struct{}
	waiting int // under LayerStore.mu; the job is cancelled when it falls to 0

	image fsverity.Digest // valid after done
	size  int64
	err   error
}

// Provide makes sure that the tree has a layer and that it is mounted, fetching it if
// the store lacks it. It waits as long as that takes, or until ctx is done.
func (s *LayerStore) Provide(ctx context.Context, key Key) (Layer, error) {
	s.mu.Lock()
	if e := s.entries[key]; e != nil {
		err := s.mountEntry(e)
		l := s.layer(e)
		s.mu.Unlock()
		if err == nil {
			return l, nil
		}
		s.log.Warn("mounting a layer again", "image", key.Ref, "layer", key.Digest, "error", err)
	} else {
		s.mu.Unlock()
	}
	img, err := s.resolve(ctx, key)
	if err != nil {
		return Layer{}, err
	}
	defer s.unuse(img)
	i := img.find(key.Digest)
	jobs := s.start(img, i)
	defer s.leave(jobs, ctx)
	j := jobs[0]
	select {
	case <-j.done:
	case <-ctx.Done():
		return Layer{}, context.Cause(ctx)
	}
	if j.err != nil {
		return Layer{}, fmt.Errorf("providing layer %s of %s: %w", key.Digest, key.Ref, j.err)
	}
	return s.enter(key, img, i, j)
}

// layer returns what is known of an entry. s.mu is held.
func (s *LayerStore) layer(e *entry) Layer {
	return Layer{
		Key: e.key, DiffID: e.info.DiffID, Size: e.info.Size, Uses: e.uses,
		Image: e.image, Verification: e.verification,
	}
}

// start begins to bring a layer of an image into the store, and those that podman will
// ask for next. The first job is that of the layer.
func (s *LayerStore) start(img *resolved, i int) []*job {
	s.mu.Lock()
	defer s.mu.Unlock()
	jobs := []*job{s.join(img, i)}
	for k := range img.layers {
		key := imageKey{img.layers[k].diffID, k == 0}
		if k != i && !img.local && (s.jobs[key] != nil || !s.o.Store.HasStream(store.LayerPrefix+key.diffID)) {
			jobs = append(jobs, s.join(img, k))
		}
	}
	return jobs
}

// join returns the job of a layer with one more who waits for it. s.mu is held.
func (s *LayerStore) join(img *resolved, i int) *job {
	key := imageKey{img.layers[i].diffID, i == 0}
	j := s.jobs[key]
	if j == nil {
		ctx, cancel := context.WithCancel(s.ctx)
		j = &job{cancel: cancel, done: make(chan struct{})}
		s.jobs[key] = j
		img.users++
		s.busy.Go(func() {
			defer cancel()
			j.image, j.size, j.err = s.bring(ctx, img, i)
			s.unuse(img)
			s.mu.Lock()
			delete(s.jobs, key)
			s.mu.Unlock()
			close(j.done)
		})
	}
	j.waiting++
	return j
}

// leave gives jobs up: at once where ctx is done, that is where podman was
// interrupted, else those for other layers a while later.
func (s *LayerStore) leave(jobs []*job, ctx context.Context) {
	drop := func(jobs []*job) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, j := range jobs {
			if j.waiting--; j.waiting == 0 {
				j.cancel()
			}
		}
	}
	if ctx.Err() != nil {
		drop(jobs)
		return
	}
	drop(jobs[:1])
	if len(jobs) > 1 {
		time.AfterFunc(aheadLife, func() { drop(jobs[1:]) })
	}
}

// enter adds a layer that the store has to the tree.
func (s *LayerStore) enter(key Key, img *resolved, i int, j *job) (Layer, error) {
	l := img.layers[i]
	e := &entry{key: key, image: j.image, verification: mount.None, info: LayerInfo{
		CompressedDigest: l.digest, CompressedSize: l.size, DiffID: l.diffID, Size: j.size, TOCDigest: l.toc,
	}}
	var err error
	if e.info.UIDs, e.info.GIDs, err = s.owners(j.image); err != nil {
		return Layer{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.entries[key]; old != nil {
		e.uses = old.uses
	}
	if err := s.mountEntry(e); err != nil {
		return Layer{}, fmt.Errorf("mounting layer %s of %s: %w", key.Digest, key.Ref, err)
	}
	if err := s.writeEntry(e); err != nil {
		return Layer{}, err
	}
	s.entries[key] = e
	return s.layer(e), nil
}

// owners returns the users and groups that own anything in an image, sorted.
func (s *LayerStore) owners(image fsverity.Digest) (uids, gids []uint32, err error) {
	f, _, err := s.o.Store.OpenImage(image.String())
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	t, err := erofs.Read(f, fi.Size())
	if err != nil {
		return nil, nil, err
	}
	u, g := map[uint32]bool{}, map[uint32]bool{}
	err = t.Walk(func(_ string, n *tree.Node) error {
		u[n.UID], g[n.GID] = true, true
		return nil
	})
	return slices.Sorted(maps.Keys(u)), slices.Sorted(maps.Keys(g)), err
}

// bring makes the composefs image of a layer, which it fetches if the store lacks it,
// and gives both names that keep them.
func (s *LayerStore) bring(ctx context.Context, img *resolved, i int) (image fsverity.Digest, size int64, err error) {
	l := img.layers[i]
	txn, err := s.o.Store.Begin(ctx)
	if err != nil {
		return image, 0, err
	}
	defer func() { err = errors.Join(err, txn.Rollback()) }()
	id := store.LayerPrefix + l.diffID

	var t *tree.Tree
	if s.o.Store.HasStream(id) {
		t, size, err = readStored(ctx, s.o.Store, txn, id)
	} else if img.source == nil {
		err = fmt.Errorf("%w: the store lacks %s", ErrNoLayer, l.diffID)
	} else {
		t, size, err = s.fetch(ctx, txn, img, i)
	}
	if err != nil {
		return image, 0, err
	}
	if !s.features.Whiteouts.OK && deletes(t) {
		return image, 0, ErrWhiteouts
	}
	if image, err = putLayerImage(ctx, txn, t, i == 0); err != nil {
		return image, 0, fmt.Errorf("writing the image of layer %s: %w", l.diffID, err)
	}
	if err := txn.SetRef(store.Streams, streamRef(l.diffID), id); err != nil {
		return image, 0, err
	}
	if err := txn.SetRef(store.Images, imageRef(image), image.String()); err != nil {
		return image, 0, err
	}
	return image, size, txn.Commit()
}

// readStored reads the tree of a layer that the store has.
func readStored(ctx context.Context, st *store.Store, txn *store.Txn, id string) (*tree.Tree, int64, error) {
	r, err := st.OpenStream(id, store.LayerStream)
	if err != nil {
		return nil, 0, err
	}
	defer r.Close()
	open := func(d fsverity.Digest) (io.ReadSeekCloser, error) { return txn.OpenObject(d) }
	t, err := layer.FromChunks(ctx, r, open, txn, layer.Options{MaxSize: -1})
	if err != nil {
		return nil, 0, fmt.Errorf("reading the stored layer %s (particle store fsck says more): %w", id, err)
	}
	return t, r.Size(), nil
}

// fetch reads a layer from the registry into a transaction.
func (s *LayerStore) fetch(ctx context.Context, txn *store.Txn, img *resolved, i int) (*tree.Tree, int64, error) {
	if err := s.fetching.Acquire(ctx, 1); err != nil {
		return nil, 0, err
	}
	defer s.fetching.Release(1)
	began, l := time.Now(), img.layers[i]
	ctx, moved, stop := stallGuard(ctx)
	defer stop()
	blob, err := img.source.Blob(ctx, l.descriptor)
	if err != nil {
		return nil, 0, stalled(ctx, err)
	}
	defer blob.Close()
	stream := txn.NewStream(store.LayerStream)
	res, err := layer.Read(ctx, readerFunc(func(p []byte) (int, error) {
		n, err := blob.Read(p)
		moved()
		return n, err
	}), txn, stream, layer.Options{DiffID: l.diffID})
	if err != nil {
		stream.Abort()
		return nil, 0, stalled(ctx, err)
	}
	for _, w := range res.Warnings {
		s.log.Info(w, "image", img.ref, "layer", l.digest)
	}
	if _, err := stream.Close(store.LayerPrefix + l.diffID); err != nil {
		return nil, 0, err
	}
	s.log.Info("fetched a layer", "image", img.ref, "layer", l.digest, "bytes", l.size, "took", time.Since(began).Round(time.Millisecond))
	return res.Tree, res.Size, nil
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// stallTime is how long a registry may send nothing: podman waits without a limit.
const stallTime = time.Minute

// stallGuard returns a context that ends with ErrStalled when moved is not called for
// stallTime.
func stallGuard(ctx context.Context) (_ context.Context, moved, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(stallTime, func() { cancel(ErrStalled) })
	return ctx, func() { timer.Reset(stallTime) }, func() {
		timer.Stop()
		cancel(nil)
	}
}

// stalled returns the reason why a context ended instead of that it did.
func stalled(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), ErrStalled) {
		return fmt.Errorf("%w for %s", ErrStalled, stallTime)
	}
	return err
}
