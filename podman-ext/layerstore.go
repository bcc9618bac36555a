package podmanext

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/store"
)

// Where the layer store is by default.
const (
	// LayerStoreDir is the directory that podman's storage.conf names, with ":ref"
	// behind it.
	LayerStoreDir = "/var/lib/particle-podman/layers"
	// LayerMountsDir holds the mounts of the layers. It does not outlive a boot.
	LayerMountsDir = "/run/particle-podman/layers"
)

// A Source finds images in registries.
type Source interface {
	// Open finds the image that podman calls ref: "docker.io/library/debian:13", with
	// a tag or a digest.
	Open(ctx context.Context, ref string) (SourceImage, error)
}

// A SourceImage is an image of a registry.
type SourceImage interface {
	converter.Image
	io.Closer
}

// LayerStoreOptions are those of a LayerStore. Dir, Mounts and Store must be set.
type LayerStoreOptions struct {
	// Dir is the directory that podman looks into.
	Dir string
	// Mounts is the directory where layers are mounted: one that is empty after a boot.
	Mounts string
	Store  *store.Store
	// Source fetches layers that the store does not have; nil fetches none.
	Source Source
	// Log is where to tell what goes on; nil is slog.Default().
	Log *slog.Logger
}

// A LayerStore keeps the tree of layers in a directory and their mounts. Its methods
// may be called side by side. One process at a time can have a directory open.
type LayerStore struct {
	o        LayerStoreOptions
	log      *slog.Logger
	root     *os.Root // of Dir, below whatever is mounted on it
	lock     *os.File // of Mounts
	dirLock  *os.File // of Dir
	features mount.Features
	prefix   string // of our names in the store

	ctx  context.Context // ends with Close
	stop context.CancelFunc

	mu       sync.Mutex
	entries  map[Key]*entry
	flights  map[string]*flight
	building int                  // calls that are about to add entries
	leases   map[string]time.Time // by diffID: fetched ahead, kept until then
	dirty    bool                 // there may be something to sweep
	unread   map[Key]bool         // layers that are there, but that cannot be read; Digest "" is a whole image
	images   map[string]*resolved // by reference
	fetching *semaphore.Weighted
	busy     sync.WaitGroup // flights
}

// OpenLayerStore opens the layer store in a directory, which it makes if it is
// missing, and mounts the layers that are in it. A front that a killed process left on
// the directory is taken away. The error is ErrBusy where another process has it open.
func OpenLayerStore(o LayerStoreOptions) (_ *LayerStore, err error) {
	s := &LayerStore{
		o: o, log: o.Log,
		entries: map[Key]*entry{}, flights: map[string]*flight{}, leases: map[string]time.Time{}, images: map[string]*resolved{}, unread: map[Key]bool{},
		fetching: semaphore.NewWeighted(maxFetches),
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	for _, dir := range []*string{&s.o.Dir, &s.o.Mounts} {
		if *dir, err = filepath.Abs(*dir); err != nil {
			return nil, err
		}
	}
	s.prefix = refPrefix + fmt.Sprintf("%x/", sha256.Sum256([]byte(s.o.Dir)))[56:]
	if err := os.MkdirAll(s.o.Mounts, 0o700); err != nil {
		return nil, fmt.Errorf("making the directory of mounts: %w", err)
	}
	// As mountinfo has it: mounts of an earlier process are known by it.
	if s.o.Mounts, err = filepath.EvalSymlinks(s.o.Mounts); err != nil {
		return nil, fmt.Errorf("resolving the directory of mounts: %w", err)
	}
	if s.lock, err = lockMounts(s.o.Mounts); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.lock.Close())
		}
	}()
	if err := os.MkdirAll(filepath.Dir(s.o.Dir), 0o755); err != nil {
		return nil, fmt.Errorf("making the layer store's directory: %w", err)
	}
	// Before the front is taken away, which another process may serve with other mounts.
	if s.dirLock, err = lockDir(s.o.Dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.dirLock.Close())
		}
	}()
	if err := detachFront(s.o.Dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.o.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("making the layer store's directory: %w", err)
	}
	if s.root, err = os.OpenRoot(s.o.Dir); err != nil {
		return nil, err
	}
	s.features = mount.Probe(s.o.Store.Dir())
	if err := s.features.Mountable(); err != nil {
		return nil, errors.Join(err, s.root.Close())
	}
	s.ctx, s.stop = context.WithCancel(context.Background())
	if err := s.readEntries(); err != nil {
		s.stop()
		return nil, errors.Join(err, s.root.Close())
	}
	if len(s.unread) > 0 {
		s.log.Warn("some layers cannot be read, and may be in use: until they can, mounts and names in the store are kept that nothing seems to need"+
			"; stop all containers and the service, then remove these directories", "layers", s.unreadPaths())
	}
	s.attach()
	s.dirty = true // whatever a killed process was about to do
	s.sweep()
	return s, nil
}

// begin keeps all mounts and names until end.
func (s *LayerStore) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.building++
}

func (s *LayerStore) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.building--
	s.sweep()
}

// unreadPaths lists the directories of the layers that cannot be read.
func (s *LayerStore) unreadPaths() (paths []string) {
	for key := range s.unread {
		paths = append(paths, filepath.Join(s.o.Dir, key.path()))
	}
	slices.Sort(paths)
	return paths
}

// sweep takes mounts away and names in the store that nothing in the tree needs, unless
// somebody is about to add something, or it is not known what the tree needs. s.mu is
// held.
func (s *LayerStore) sweep() {
	if !s.dirty || s.building > 0 || len(s.unread) > 0 || s.ctx.Err() != nil {
		return
	}
	s.dirty = false
	now, images, streams := time.Now(), map[string]bool{}, map[string]bool{}
	for _, e := range s.entries {
		images[s.imageRef(e.image)], streams[s.streamRef(e.info.DiffID)] = true, true
	}
	for diffID, until := range s.leases {
		if now.Before(until) {
			streams[s.streamRef(diffID)], s.dirty = true, true
		} else {
			delete(s.leases, diffID)
		}
	}
	mounts, err := os.ReadDir(s.o.Mounts)
	if err != nil {
		s.log.Warn("reading the directory of mounts", "error", err)
	}
	for _, m := range mounts {
		d, err := fsverity.Parse(m.Name())
		if err != nil || images[s.imageRef(d)] {
			continue
		}
		if err := unmountLayer(s.target(d)); err != nil {
			s.log.Warn("unmounting a layer", "layer", m.Name(), "error", err)
		}
	}
	refs, err := s.o.Store.ImageRefs()
	s.removeRefs(store.Images, refs, err, images)
	refs, err = s.o.Store.StreamRefs(s.prefix)
	s.removeRefs(store.Streams, refs, err, streams)
}

// removeRefs removes our names from the store but those to be kept.
func (s *LayerStore) removeRefs(kind store.Kind, refs []store.Ref, err error, keep map[string]bool) {
	for _, r := range refs {
		if strings.HasPrefix(r.Name, s.prefix) && !keep[r.Name] {
			err = errors.Join(err, s.o.Store.RemoveRef(kind, r.Name))
		}
	}
	if err != nil {
		s.log.Warn("removing names from the store", "error", err)
	}
}

// lockMounts makes sure that one process has the mounts. The lock goes with the
// process, however that ends.
func lockMounts(dir string) (*os.File, error) {
	return lockFile(filepath.Join(dir, ".lock"), dir)
}

// lockDir makes sure that one process has a layer store's directory, by a file next to
// it: the directory itself may be below a front, dead or alive.
func lockDir(dir string) (*os.File, error) {
	if parent, err := filepath.EvalSymlinks(filepath.Dir(dir)); err == nil {
		dir = filepath.Join(parent, filepath.Base(dir))
	}
	return lockFile(filepath.Join(filepath.Dir(dir), "."+filepath.Base(dir)+".lock"), dir)
}

func lockFile(path, dir string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: another process has %s\nstop the service particle-layer-store first", ErrBusy, dir)
		}
		return nil, fmt.Errorf("locking %s: %w", dir, err)
	}
	return f, nil
}

// attach mounts the layers of the tree again after a boot or a crash. What cannot be
// mounted is tried again when somebody looks for it.
func (s *LayerStore) attach() {
	for _, e := range s.entries {
		if err := s.mountEntry(e); err != nil {
			s.log.Warn("mounting a layer", "image", e.key.Ref, "layer", e.key.Digest, "error", err)
		}
	}
}

// Detach ends the work on layers and closes the store; mounts stay.
func (s *LayerStore) Detach() error {
	s.stop()
	s.busy.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for ref := range s.images {
		s.forgetImage(ref)
	}
	return errors.Join(s.root.Close(), s.dirLock.Close(), s.lock.Close())
}

// Close ends the work on layers and unmounts all of them. Containers that run keep
// their files.
func (s *LayerStore) Close() error {
	s.stop()
	s.busy.Wait()
	return errors.Join(unmountLayers(s.o.Mounts), s.Detach())
}

// UnmountLayers takes away what a layer store that is not running has left mounted:
// its front on dir and the layers below mounts. Containers that run keep their files.
// The error is ErrBusy where a process serves the store.
func UnmountLayers(dir, mounts string) error {
	mounts, err := filepath.Abs(mounts)
	if err != nil {
		return err
	}
	if _, err := os.Stat(mounts); err == nil {
		lock, err := lockMounts(mounts)
		if err != nil {
			return err
		}
		defer lock.Close()
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Dir(dir)); err == nil {
		lock, err := lockDir(dir)
		if err != nil {
			return err
		}
		defer lock.Close()
	}
	return errors.Join(detachFront(dir), unmountLayers(mounts))
}

// A Layer is a layer that the tree has.
type Layer struct {
	Key
	DiffID       string             `json:"diffID"`
	Size         int64              `json:"size"` // uncompressed bytes
	Uses         int                `json:"uses"`
	Image        fsverity.Digest    `json:"image"` // the composefs image that is mounted
	Verification mount.Verification `json:"verification"`
}

// List returns the layers of the tree, sorted by reference and digest.
func (s *LayerStore) List() []Layer {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Layer
	for _, key := range slices.SortedFunc(maps.Keys(s.entries), Key.compare) {
		all = append(all, s.entries[key].layer())
	}
	return all
}

// Use counts one more user of a layer.
func (s *LayerStore) Use(key Key) error { return s.count(key, 1) }

// Release counts one user less. A layer without users leaves the tree; its files stay
// in the store as long as anything else there names them.
func (s *LayerStore) Release(key Key) error { return s.count(key, -1) }

func (s *LayerStore) count(key Key, by int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[key]
	if e == nil {
		return fmt.Errorf("%w: %s of %q", ErrNoLayer, key.Digest, key.Ref)
	}
	// What podman did while nobody served the store was not counted.
	uses := max(0, e.uses+by)
	if err := s.writeUses(key, uses); err != nil {
		return fmt.Errorf("counting the users of layer %s: %w", key.Digest, err)
	}
	e.uses = uses
	if by < 0 && uses == 0 {
		s.drop(e)
	}
	return nil
}

// drop takes a layer out of the tree. s.mu is held.
func (s *LayerStore) drop(e *entry) {
	if err := s.removeEntry(e.key); err != nil {
		s.log.Warn("removing a layer", "image", e.key.Ref, "layer", e.key.Digest, "error", err)
		return
	}
	delete(s.entries, e.key)
	s.dirty = true
	s.sweep()
	s.log.Debug("dropped a layer", "image", e.key.Ref, "layer", e.key.Digest)
}

// Blob opens the bytes of a layer, uncompressed, as they were when their diffID was
// checked.
func (s *LayerStore) Blob(key Key) (io.ReadCloser, error) {
	s.mu.Lock()
	e := s.entries[key]
	s.mu.Unlock()
	if e == nil {
		return nil, fmt.Errorf("%w: %s of %q", ErrNoLayer, key.Digest, key.Ref)
	}
	r, err := s.o.Store.OpenStream(store.LayerPrefix+e.info.DiffID, store.LayerStream)
	if err != nil {
		return nil, fmt.Errorf("opening layer %s: %w", e.info.DiffID, err)
	}
	return r, nil
}

// Add brings all layers of an image that the store has into the tree, under each name
// that podman could ask for. With blobs the tree also gets the layers' bytes, a second
// copy, so that podman can push them while nobody serves the store.
func (s *LayerStore) Add(ctx context.Context, ref string, blobs bool) ([]Layer, error) {
	img, err := s.local(ref)
	if err != nil {
		return nil, err
	}
	var added []Layer
	for _, l := range img.layers {
		for _, digest := range []string{l.digest, l.toc} {
			if digest == "" {
				continue
			}
			layer, err := s.Provide(ctx, Key{ref, digest})
			if err == nil && blobs {
				err = s.keepBlob(layer.Key)
			}
			if err != nil {
				return added, err
			}
			added = append(added, layer)
		}
	}
	return added, nil
}

// failLife is how long a reference that could not be resolved is not tried again:
// podman asks for each layer of an image in turn.
const failLife = 10 * time.Second
