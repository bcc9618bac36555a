// Package snapshotter gives containerd the layers of a store as native snapshots.
//
// A Snapshotter is containerd's snapshots.Snapshotter (and Cleaner) over a
// [store.Store]: the files of all snapshots are objects of the store, so that each is
// on disk and in memory once, whichever image it came with. Records lie in a bolt
// database of containerd's own storage package.
//
// A committed snapshot is a layer in the store: a split stream where the layer's tar
// is known (our own differ, or the store had it), else a composefs image of what the
// upper directory held. What is mounted is the whole chain, merged into one composefs
// image: one lower layer whatever the number of layers, and no whiteouts in it. That
// image is made when it is first needed, and for the last layer of an image soon
// after its commit, so that the layers below cost no image each. Its bytes follow
// from the layers alone: a chain looks the same however often its image is made.
//
// The mount of an image is this package's (Root/mounts/ID), so that containerd gets
// plain bind and overlay mounts, which all its releases understand. A container's
// root is an overlay on it, which makes two overlays: Linux allows no third one.
//
// Layers come in by three ways:
//
//   - any differ of containerd's writes into the upper directory, and Commit takes
//     the files from there;
//   - our differ ([Differ]) streams the blob into the store, without a second copy;
//   - Prepare finds that the store has the layer (it was pulled, the host boots it,
//     podman brought it), or fetches it through a [Source], and answers
//     ErrAlreadyExists: containerd fetches nothing (the remote-snapshot protocol).
//
// On disk, below Root:
//
//	metadata.db             the records
//	instance                an ID that the names in the store begin with
//	store                   the path of the store that has them
//	snapshots/ID/{fs,work}  upper and work directory of an active snapshot
//	snapshots/ID/taken      what fs was, while its files become objects
//	mounts/ID[-MAP]         the merged image of a committed snapshot, while it is used
//	mounts/ID-parents       its directories, while a layer is unpacked on top of it
//	empty/                  the lower directory of a layer without a parent
//
// and in the store, as names that keep a snapshot's data from being collected:
//
//	streams/refs/containerd/INSTANCE/ID/layer
//	images/refs/containerd/INSTANCE/ID/layer
//	images/refs/containerd/INSTANCE/ID/merged
//
// What a record needs is durable in the store before the record is written. Whatever
// a crash leaves without a record is swept by New and Cleanup.
//
// Left out: user namespaces without root on the host, where the kernel mounts no
// EROFS; and redirects of renamed directories (redirect_dir), which the tools that
// read upper directories do not know: rename(2) of a lower directory is EXDEV, as
// with containerd's overlayfs snapshotter.
package snapshotter

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/moby/locker"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/store"
)

// Labels that Stat and Walk add to active snapshots and views that have a parent.
// They are never stored: they say what holds now.
const (
	// LabelVerification is a [mount.Verification]: who checks the files of the
	// snapshot's lower layer.
	LabelVerification = "io.particle-os.verification"
	// LabelImage is the fs-verity digest of the composefs image that is the lower
	// layer.
	LabelImage = "io.particle-os.image"
)

// Files in the root.
const (
	metadataFile = "metadata.db"
	instanceFile = "instance"
	storeFile    = "store"
)

// maxRoot limits the length of Root in bytes: containerd shortens mount options of
// more than 3,584 bytes in a way that takes ":" apart, and three paths are in them.
const maxRoot = 1000

// Errors of this package beyond those of containerd's interface (package errdefs).
var (
	// ErrRoot: the root directory cannot serve.
	ErrRoot = errors.New("unfit root directory")
	// ErrInUse: another process uses the root directory, or a container its files.
	ErrInUse = errors.New("in use")
	// ErrStore: Purge needs the store that the snapshotter used.
	ErrStore = errors.New("not the store of the snapshotter")
	// ErrUpper: an upper directory has something that no layer can be made of.
	ErrUpper = errors.New("no layer can be made of the upper directory")
	// ErrChain: a layer in the store or from a source is not the one that was asked
	// for.
	ErrChain = errors.New("not the layer of this chain")
)

// Options are those of a Snapshotter. Root and Store must be set.
type Options struct {
	// Root is the directory of the records and of what is not in the store. It must
	// take xattrs and be no overlay itself. Where it is on the store's filesystem,
	// files of unpacked layers are linked into the store instead of copied.
	Root  string
	Store *store.Store
	// Source fetches layers that neither containerd nor the store has; nil fetches
	// none.
	Source Source
	// NoLookup makes Prepare not look whether the store has a layer. Then containerd
	// always fetches all blobs, and can push and export any image.
	NoLookup bool
	// KeepGarbage makes Cleanup leave in the store what no name leads to.
	KeepGarbage bool
	// Log is where to tell what goes on; nil is slog.Default().
	Log *slog.Logger
}

// A Snapshotter is containerd's view of a store. Its methods may be called side by
// side. One process at a time can use a root directory.
type Snapshotter struct {
	o        Options
	root     string
	instance string
	store    *store.Store
	meta     *storage.MetaStore
	log      *slog.Logger
	features mount.Features

	locks  *locker.Locker // of keys, mount points and images, by name
	mounts mountTable
	trees  treeCache
	state  volatile

	recording  sync.Mutex  // of new snapshots, with their directories
	projects   sync.Mutex  // held while one is given out
	differs    atomic.Bool // our differ unpacks layers
	background sync.WaitGroup
	ctx        context.Context // ends with Close
	cancel     context.CancelFunc
	counters   counters
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// New opens the snapshotter in a root directory, makes that if it is missing, sweeps
// what a crash left there, and mounts again what active snapshots and views need.
//
// A snapshot whose image cannot be mounted is logged and does not keep the others
// from working.
func New(ctx context.Context, o Options) (_ *Snapshotter, err error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	s := &Snapshotter{o: o, store: o.Store, log: o.Log, locks: locker.New()}
	if s.root, err = makeRoot(o.Root); err != nil {
		return nil, fmt.Errorf("opening the snapshotter in %q: %w", o.Root, err)
	}
	s.features = mount.Probe(s.root)
	if err := s.features.Mountable(); err != nil {
		return nil, fmt.Errorf("opening the snapshotter in %q: %w", s.root, err)
	}
	if s.instance, err = instanceID(s.root); err != nil {
		return nil, fmt.Errorf("opening the snapshotter in %q: %w", s.root, err)
	}
	s.meta, err = storage.NewMetaStore(filepath.Join(s.root, metadataFile), func(o *bolt.Options) error {
		o.Timeout = 5 * time.Second
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := recordStore(s.root, s.store); err != nil {
		return nil, errors.Join(fmt.Errorf("opening the snapshotter in %q: %w", s.root, err), s.meta.Close())
	}
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	s.mounts.init()
	s.trees.init()
	s.state.init()
	s.state.setGarbage(true) // who knows what an earlier process removed
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	// Temporary directories are only there while their creator lives.
	if err := s.sweep(ctx, true); err != nil {
		if errors.Is(err, bolterrors.ErrTimeout) {
			err = fmt.Errorf("%w by another process: %w", ErrInUse, err)
		}
		return nil, fmt.Errorf("opening the snapshotter in %q: %w", s.root, err)
	}
	if err := s.restore(ctx); err != nil {
		return nil, fmt.Errorf("restoring mounts below %q: %w", s.root, err)
	}
	return s, nil
}

// makeRoot makes the directories of a root and returns its real path.
func makeRoot(root string) (string, error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return "", err
	}
	real, err := realPath(root)
	if err != nil {
		return "", err
	}
	if strings.ContainsAny(real, ",:\\\"\n") {
		return "", fmt.Errorf("%w: its path %q has characters that mean something in mount options", ErrRoot, real)
	}
	if len(real) > maxRoot {
		return "", fmt.Errorf("%w: its path has %d bytes, want at most %d", ErrRoot, len(real), maxRoot)
	}
	for _, dir := range []string{"snapshots", "mounts", "empty"} {
		if err := os.Mkdir(filepath.Join(real, dir), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", err
		}
	}
	return real, nil
}

// instanceID returns the ID of a root, which it makes the first time. Several roots
// can use one store.
func instanceID(root string) (string, error) {
	path := filepath.Join(root, instanceFile)
	const digits = 16
	b, err := os.ReadFile(path)
	if err == nil {
		id := strings.TrimSpace(string(b))
		if len(id) != digits || strings.Trim(id, "0123456789abcdef") != "" {
			return "", fmt.Errorf("%w: %q has %.40q, want %d hexadecimal digits", ErrRoot, path, id, digits)
		}
		return id, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	var random [digits / 2]byte
	rand.Read(random[:])
	id := hex.EncodeToString(random[:])
	return id, writeDurably(path, []byte(id+"\n"))
}

// recordStore notes which store has the root's names, for who takes the snapshotter away.
func recordStore(root string, st *store.Store) error {
	dir, err := realPath(st.Dir())
	if err != nil {
		return err
	}
	path := filepath.Join(root, storeFile)
	if have, err := os.ReadFile(path); err == nil && string(have) == dir+"\n" {
		return nil
	}
	return writeDurably(path, []byte(dir+"\n"))
}

// realPath returns the absolute path of a directory, without links.
func realPath(dir string) (string, error) {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return "", err
	}
	return filepath.Abs(dir)
}

// tempPrefix begins the names of temporary files in the root.
const tempPrefix = ".tmp-"

// writeDurably writes a file that is either there with all its bytes or not at all.
func writeDurably(path string, data []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), tempPrefix)
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(data)
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Features returns what the kernel and the filesystem of the root can do.
func (s *Snapshotter) Features() mount.Features { return s.features }

// Close waits for what goes on in the background and closes the database. Mounts
// stay, for running containers and for the next New; see [UnmountAll].
func (s *Snapshotter) Close() error {
	s.cancel()
	s.background.Wait()
	s.trees.clear()
	return s.meta.Close()
}

// read runs fn in a transaction that only reads.
func (s *Snapshotter) read(ctx context.Context, fn func(context.Context) error) error {
	return s.meta.WithTransaction(ctx, false, fn)
}

// write runs fn in a transaction that is durable when write returns nil.
func (s *Snapshotter) write(ctx context.Context, fn func(context.Context) error) error {
	return s.meta.WithTransaction(ctx, true, fn)
}

func (s *Snapshotter) lock(name string) (unlock func()) {
	s.locks.Lock(name)
	return func() {
		if err := s.locks.Unlock(name); err != nil {
			panic(err) // unlocked twice
		}
	}
}

// Lock names. Locks are taken in this order: key, mount point, image.
func keyLock(key string) string  { return "key/" + key }
func imageLock(id string) string { return "image/" + id }

// Paths below the root.
func (s *Snapshotter) dir(id string) string   { return filepath.Join(s.root, "snapshots", id) }
func (s *Snapshotter) upper(id string) string { return filepath.Join(s.dir(id), "fs") }
func (s *Snapshotter) work(id string) string  { return filepath.Join(s.dir(id), "work") }
func (s *Snapshotter) taken(id string) string { return filepath.Join(s.dir(id), "taken") }
func (s *Snapshotter) empty() string          { return filepath.Join(s.root, "empty") }

// isExtract reports whether a key is of a snapshot that a layer is unpacked into.
// containerd's metadata store puts the namespace and a number before the client's
// key.
func isExtract(key string) bool {
	return strings.HasPrefix(key[strings.LastIndexByte(key, '/')+1:], snapshots.UnpackKeyPrefix+"-")
}
