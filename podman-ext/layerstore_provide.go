package podmanext

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/particle-os/particle/converter"
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

// A flight is work that several look-ups may wait for: a layer on its way into the
// store, or the composefs image of one being made.
type flight struct {
	name    string
	cancel  context.CancelFunc
	done    chan struct{}
	waiting int // under LayerStore.mu; the flight is cancelled when it falls to 0

	image fsverity.Digest // valid after done
	err   error
}

// fly returns the flight of a name with one more who waits for it. s.mu is held.
func (s *LayerStore) fly(name string, img *resolved, work func(ctx context.Context) (fsverity.Digest, error)) *flight {
	f := s.flights[name]
	if f == nil {
		ctx, cancel := context.WithCancel(s.ctx)
		f = &flight{name: name, cancel: cancel, done: make(chan struct{})}
		s.flights[name] = f
		img.users++
		s.busy.Go(func() {
			defer cancel()
			f.image, f.err = work(ctx)
			s.mu.Lock()
			s.forgetFlight(f)
			s.unuseLocked(img)
			s.mu.Unlock()
			close(f.done)
		})
	}
	f.waiting++
	return f
}

// land gives flights up. One that nobody waits for any more is cancelled.
func (s *LayerStore) land(flights ...*flight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range flights {
		if f.waiting--; f.waiting == 0 {
			f.cancel()
			s.forgetFlight(f) // who comes now must not join it
		}
	}
}

// forgetFlight makes a flight one that nobody can join. s.mu is held.
func (s *LayerStore) forgetFlight(f *flight) {
	if s.flights[f.name] == f {
		delete(s.flights, f.name)
	}
}

// wait waits for a flight, as long as ctx allows.
func (f *flight) wait(ctx context.Context) (fsverity.Digest, error) {
	select {
	case <-f.done:
		return f.image, f.err
	case <-ctx.Done():
		return fsverity.Digest{}, context.Cause(ctx)
	}
}

// Provide makes sure that the tree has a layer and that it is mounted, fetching it if
// the store lacks it. It waits as long as that takes, or until ctx is done.
func (s *LayerStore) Provide(ctx context.Context, key Key) (Layer, error) {
	s.mu.Lock()
	if e := s.entries[key]; e != nil {
		err := s.mountEntry(e)
		l := e.layer()
		s.mu.Unlock()
		if err == nil {
			return l, nil
		}
		s.log.Info("a layer is not in the store any more", "image", key.Ref, "layer", key.Digest, "error", err)
	} else {
		s.mu.Unlock()
	}
	img, err := s.resolve(ctx, key)
	if err != nil {
		return Layer{}, err
	}
	defer s.unuse(img)
	s.begin()
	defer s.end()
	if err := s.unchain(ctx, img); err != nil {
		return Layer{}, err
	}
	i := img.find(key.Digest)
	ahead := s.fetchAhead(img)
	// Where podman was interrupted nobody waits for the rest.
	defer func() {
		if ctx.Err() != nil {
			s.land(ahead...)
		} else if len(ahead) > 0 {
			time.AfterFunc(aheadLife+time.Second, func() {
				s.land(ahead...)
				s.begin()
				s.end() // sweeps what nobody came for
			})
		}
	}()
	e, err := s.build(ctx, key, img, i, false)
	if err != nil {
		return Layer{}, fmt.Errorf("providing layer %s of %s: %w", key.Digest, key.Ref, err)
	}
	return s.enter(e)
}

// fetchAhead begins to fetch all layers of an image that the store lacks: podman looks
// for one after the other.
func (s *LayerStore) fetchAhead(img *resolved) (ahead []*flight) {
	if img.local {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range img.layers {
		if diffID := img.layers[i].diffID; !s.o.Store.HasStream(store.LayerPrefix + diffID) {
			s.leases[diffID] = time.Now().Add(aheadLife)
			ahead = append(ahead, s.flyFetch(img, i))
		}
	}
	return ahead
}

// flyFetch returns the flight that brings a layer into the store. s.mu is held.
func (s *LayerStore) flyFetch(img *resolved, i int) *flight {
	return s.fly("fetch "+img.layers[i].diffID, img, func(ctx context.Context) (fsverity.Digest, error) {
		return fsverity.Digest{}, s.fetch(ctx, img, i)
	})
}

// build makes the entry of a layer: its bytes are in the store and its image is made.
// With alone the image depends on nothing but the layer.
func (s *LayerStore) build(ctx context.Context, key Key, img *resolved, i int, alone bool) (*entry, error) {
	l := img.layers[i]
	chain := img.chain(i)
	if alone {
		chain = l.diffID
	}
	s.mu.Lock()
	f := s.fly("image "+chain, img, func(ctx context.Context) (fsverity.Digest, error) {
		return s.makeImage(ctx, img, i, alone)
	})
	s.mu.Unlock()
	image, err := f.wait(ctx)
	s.land(f)
	if err != nil {
		return nil, err
	}
	r, err := s.o.Store.OpenStream(store.LayerPrefix+l.diffID, store.LayerStream)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	e := &entry{key: key, image: image, verification: mount.None, info: LayerInfo{
		CompressedDigest: l.digest, CompressedSize: l.size, DiffID: l.diffID, Size: r.Size(), TOCDigest: l.toc,
	}}
	if !alone {
		e.info.Chain = chain
	}
	e.info.UIDs, e.info.GIDs, err = s.owners(image)
	return e, err
}

// enter adds a layer to the tree, or replaces it there.
func (s *LayerStore) enter(e *entry) (Layer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.entries[e.key]
	if old != nil {
		e.uses = old.uses
	}
	if err := s.mountEntry(e); err != nil {
		return Layer{}, fmt.Errorf("mounting layer %s of %s: %w", e.key.Digest, e.key.Ref, err)
	}
	if err := s.writeEntry(e); err != nil {
		return Layer{}, err
	}
	s.entries[e.key] = e
	delete(s.unread, e.key)
	delete(s.leases, e.info.DiffID)
	s.dirty = true
	return e.layer(), nil
}

// unchain makes the images of layers stand alone that were made for another image of
// the same reference: podman asks for both under one name. Such images show the same;
// but see [putLayerImage].
func (s *LayerStore) unchain(ctx context.Context, img *resolved) error {
	s.mu.Lock()
	var other []*entry
	for key, e := range s.entries {
		if key.Ref != img.ref || e.info.Chain == "" {
			continue
		}
		if i := img.find(key.Digest); i >= 0 && img.chain(i) != e.info.Chain {
			other = append(other, e)
		}
	}
	s.mu.Unlock()
	for _, old := range other {
		e, err := s.build(ctx, old.key, img, img.find(old.key.Digest), true)
		if err == nil {
			_, err = s.enter(e)
		}
		if err != nil {
			return fmt.Errorf("making layer %s of %s fit for two images: %w", old.key.Digest, old.key.Ref, err)
		}
	}
	return nil
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

// stored reads the tree of a layer of an image, which it fetches if the store lacks it.
func (s *LayerStore) stored(ctx context.Context, txn *store.Txn, img *resolved, i int) (*tree.Tree, error) {
	id := store.LayerPrefix + img.layers[i].diffID
	if !s.o.Store.HasStream(id) {
		s.mu.Lock()
		f := s.flyFetch(img, i)
		s.mu.Unlock()
		_, err := f.wait(ctx)
		s.land(f)
		if err != nil {
			return nil, err
		}
	}
	return converter.ReadLayer(ctx, s.o.Store, txn, id)
}

// makeImage makes the composefs image of a layer and gives both names that keep them.
func (s *LayerStore) makeImage(ctx context.Context, img *resolved, i int, alone bool) (image fsverity.Digest, err error) {
	txn, err := s.o.Store.Begin(ctx)
	if err != nil {
		return image, err
	}
	defer func() { err = errors.Join(err, txn.Rollback()) }()
	t, err := s.stored(ctx, txn, img, i)
	if err != nil {
		return image, err
	}
	if deletes(t) {
		if !s.features.Whiteouts.OK {
			return image, ErrWhiteouts
		}
		if !alone {
			lower := tree.New()
			for k := range i {
				below, err := s.stored(ctx, txn, img, k)
				if err != nil {
					return image, fmt.Errorf("reading layer %d, on which layer %d is: %w", k+1, i+1, err)
				}
				lower = tree.Merge(lower, below)
			}
			t = fill(lower, t)
		}
	}
	if image, err = putLayerImage(ctx, txn, t); err != nil {
		return image, fmt.Errorf("writing the image of layer %s: %w", img.layers[i].diffID, err)
	}
	diffID := img.layers[i].diffID
	if err := txn.SetRef(store.Streams, s.streamRef(diffID), store.LayerPrefix+diffID); err != nil {
		return image, err
	}
	if err := txn.SetRef(store.Images, s.imageRef(image), image.String()); err != nil {
		return image, err
	}
	return image, txn.Commit()
}

// fetch brings a layer from the registry into the store, which keeps it under a name.
func (s *LayerStore) fetch(ctx context.Context, img *resolved, i int) (err error) {
	l := img.layers[i]
	if img.source == nil {
		return fmt.Errorf("%w: the store lacks %s", ErrNoLayer, l.diffID)
	}
	if err := s.fetching.Acquire(ctx, 1); err != nil {
		return err
	}
	defer s.fetching.Release(1)
	began := time.Now()
	txn, err := s.o.Store.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, txn.Rollback()) }()
	ctx, moved, stop := stallGuard(ctx)
	defer stop()
	blob, err := img.source.Blob(ctx, l.descriptor)
	if err != nil {
		return stalled(ctx, err)
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
		return stalled(ctx, err)
	}
	for _, w := range res.Warnings {
		s.log.Info(w, "image", img.ref, "layer", l.digest)
	}
	id := store.LayerPrefix + l.diffID
	if _, err := stream.Close(id); err != nil {
		return err
	}
	if err := txn.SetRef(store.Streams, s.streamRef(l.diffID), id); err != nil {
		return err
	}
	if err := txn.Commit(); err != nil {
		return err
	}
	s.log.Info("fetched a layer", "image", img.ref, "layer", l.digest, "bytes", l.size, "took", time.Since(began).Round(time.Millisecond))
	return nil
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
