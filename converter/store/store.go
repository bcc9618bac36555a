// Package store keeps files by their fs-verity digest, in a repository of the
// layout of composefs-rs, so that its tools open ours and we open theirs
// (crates/composefs/src/repository_format.rs of composefs-rs):
//
//	meta.json                      format version, digest algorithm, features
//	objects/xx/<rest>              every file, named by its digest
//	images/<digest>                -> ../objects/xx/<rest>, an EROFS image
//	images/refs/<name>             -> ../<digest>, names may contain slashes
//	streams/<content id>           -> ../objects/xx/<rest>, a split stream
//	streams/refs/<name>            -> ../<content id>
//	.staging/txn-*/                what unfinished transactions wrote (ours alone)
//
// All writing goes through a [Txn]. Nothing of it is visible before [Txn.Commit],
// nothing is left after [Txn.Rollback], and a crash at any moment leaves a store
// that [Store.Fsck] calls clean. What becomes visible does so in the order objects,
// links, refs, each durable before the next.
//
// Several processes may use a store at once. They lock its directory with flock(2)
// as composefs-rs does: shared for transactions and readers, exclusive for
// [Store.GC].
//
// Left out: reading EROFS images (callers pass a function that lists the objects of
// one), mounting, what the streams contain, and repositories without meta.json,
// which composefs-rs made before its release 0.7.
package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/particle-os/particle/converter/fsverity"
	"golang.org/x/sys/unix"
)

// A Kind is one of the two sorts of things that have names in a store. Its text is
// the directory's name.
type Kind string

const (
	Images  Kind = "images"
	Streams Kind = "streams"
)

const (
	objectsDir = "objects"
	refsDir    = "refs"
	stagingDir = ".staging"
)

// Modes, as composefs-rs makes them. The store itself is its owner's alone: an
// image's files keep their set-user-ID meaning only under a mount.
const (
	rootMode   = 0o700
	dirMode    = 0o755
	objectMode = 0o444
)

// A Store is an open repository. Its methods may be called side by side.
type Store struct {
	// Waiting is told once, when a lock has not been had for two seconds, what is
	// being waited for. It may be nil. Set it before the first use.
	Waiting func(message string)

	dir      string // absolute
	meta     meta
	alg      fsverity.Algorithm
	verity   bool   // meta.json has fs-verity, so every object must have it
	readOnly string // why nothing may be written; "" when it may
	chmod    bool   // the umask takes bits of objectMode away
}

// Options are those of a new store. The zero value is a store of
// fsverity-sha256-12.
type Options struct {
	Algorithm fsverity.Algorithm
}

// Open opens the store in dir. Errors are ErrNotStore where there is none,
// ErrVersion and ErrFeature for one of another format.
func Open(dir string) (*Store, error) {
	s, err := open(dir)
	if err != nil {
		return nil, fmt.Errorf("opening store %q: %w", dir, err)
	}
	return s, nil
}

func open(dir string) (*Store, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	s := &Store{dir: abs, chmod: umaskHides(objectMode)}
	return s, s.readMeta()
}

// Init makes a store in dir, with missing parent directories, and opens it. A store
// that is there already is opened, provided that it has the algorithm asked for (any
// when opts names none). A directory that holds something else is refused.
//
// Whoever sees meta.json sees all of it: it is the last thing that Init makes, and
// of several callers at once one makes it.
func Init(dir string, opts Options) (*Store, error) {
	s, err := initStore(dir, opts)
	if err != nil {
		return nil, fmt.Errorf("making store %q: %w", dir, diskFull(dir, err))
	}
	return s, nil
}

func initStore(dir string, opts Options) (*Store, error) {
	s, err := open(dir)
	if err == nil {
		return s, s.wantAlgorithm(opts.Algorithm)
	}
	if !errors.Is(err, ErrNotStore) {
		return nil, err
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(abs), dirMode); err != nil {
		return nil, err
	}
	if err := os.Mkdir(abs, rootMode); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	if err := onlyEmptyStore(abs); err != nil {
		return nil, err
	}
	s = &Store{dir: abs, chmod: umaskHides(objectMode)}
	if err := s.makeDirs(); err != nil {
		return nil, err
	}
	alg := opts.Algorithm
	if alg == 0 {
		alg = fsverity.SHA256
	}
	if err := writeMeta(abs, newMeta(alg)); err != nil {
		return nil, err
	}
	if s, err = Open(abs); err != nil {
		return nil, err
	}
	return s, s.wantAlgorithm(opts.Algorithm)
}

// onlyEmptyStore refuses a directory that holds anything but what an interrupted
// Init leaves.
func onlyEmptyStore(dir string) error {
	top, err := os.ReadDir(dir)
	if errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("%w: it is no directory", ErrNotStore)
	}
	if err != nil {
		return err
	}
	for _, e := range top {
		if isMetaTemp(e.Name()) {
			continue
		}
		switch e.Name() {
		case metaName: // somebody was faster
			return nil
		case objectsDir, string(Images), string(Streams), stagingDir:
			sub, err := os.ReadDir(filepath.Join(dir, e.Name()))
			if err == nil && e.Name() == objectsDir && len(sub) > 0 {
				return fmt.Errorf("%w: it holds objects but no %s: it was made by composefs-rs before 0.7, whose cfsctl can upgrade it",
					ErrNotStore, metaName)
			}
			if err == nil {
				continue
			}
		}
		return fmt.Errorf("%w: the directory holds %q; choose an empty or a new one", ErrNotStore, e.Name())
	}
	return nil
}

// makeDirs makes the directories that a store written by others may lack yet.
func (s *Store) makeDirs() error {
	for _, d := range []struct {
		name string
		mode os.FileMode
	}{
		{objectsDir, dirMode},
		{string(Images), dirMode},
		{filepath.Join(string(Images), refsDir), dirMode},
		{string(Streams), dirMode},
		{filepath.Join(string(Streams), refsDir), dirMode},
		{stagingDir, rootMode},
	} {
		if err := os.Mkdir(s.path(d.name), d.mode); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

func (s *Store) wantAlgorithm(alg fsverity.Algorithm) error {
	if alg != 0 && alg != s.alg {
		return fmt.Errorf("%w: it has %s, not %s", ErrAlgorithm, s.alg.Name(), alg.Name())
	}
	return nil
}

// Dir returns the absolute path of the store.
func (s *Store) Dir() string { return s.dir }

// ObjectsDir returns the absolute path of the directory that overlayfs takes as
// data-only lower layer.
func (s *Store) ObjectsDir() string { return s.path(objectsDir) }

// Algorithm returns the algorithm of all digests in the store.
func (s *Store) Algorithm() fsverity.Algorithm { return s.alg }

// Verity reports whether the store promises fs-verity on every object, which is so
// when its meta.json has it.
func (s *Store) Verity() bool { return s.verity }

// ReadOnly returns why the store may only be read, "" when it may be written.
func (s *Store) ReadOnly() string { return s.readOnly }

// path joins names to the store's directory.
func (s *Store) path(names ...string) string {
	return filepath.Join(append([]string{s.dir}, names...)...)
}

// HasObject reports whether the store has the object. It does not read it.
func (s *Store) HasObject(d fsverity.Digest) (bool, error) {
	_, err := s.objectSize(d)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// objectSize returns the size of an object in bytes.
func (s *Store) objectSize(d fsverity.Digest) (int64, error) {
	var st unix.Stat_t
	name := s.path(objectsDir, d.Path())
	switch err := unix.Lstat(name, &st); {
	case d.IsZero() || err == unix.ENOENT:
		return 0, fmt.Errorf("object %s: %w", d, ErrNotFound)
	case err != nil:
		return 0, fmt.Errorf("looking for object %s: %w", d, err)
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return 0, fmt.Errorf("%w: %q is not a regular file", ErrCorrupt, name)
	}
	return st.Size, nil
}

// OpenObject opens an object for reading. Where the store promises fs-verity, the
// kernel's digest is compared with d (ErrVerity); else the content is as good as
// the disk.
func (s *Store) OpenObject(d fsverity.Digest) (*os.File, error) {
	if d.IsZero() {
		return nil, fmt.Errorf("opening object: %w: no digest", ErrNotFound)
	}
	f, err := os.OpenFile(s.path(objectsDir, d.Path()), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("opening object %s: %w", d, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("opening object %s: %w", d, err)
	}
	if s.verity {
		if err := measured(f, d); err != nil {
			f.Close()
			return nil, fmt.Errorf("opening object %s: %w", d, err)
		}
	}
	return f, nil
}

// measured checks that the kernel knows f by the digest want.
func measured(f *os.File, want fsverity.Digest) error {
	got, err := fsverity.Measure(f)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrVerity, err)
	}
	if got != want {
		return fmt.Errorf("%w: the kernel has digest %s", ErrVerity, got)
	}
	return nil
}

// Hold takes the shared lock until release is called, so that nothing is collected
// meanwhile. A transaction holds it anyway.
func (s *Store) Hold(ctx context.Context) (release func(), err error) {
	f, err := s.lock(ctx, unix.LOCK_SH)
	if err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}
