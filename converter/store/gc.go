package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
	"golang.org/x/sys/unix"
)

// GCOptions are those of a garbage collection.
type GCOptions struct {
	// ImageObjects is needed when the store has images.
	ImageObjects ImageObjects
	// DryRun counts and removes nothing.
	DryRun bool
	// Roots are streams, by content id, and images, by digest in hexadecimal, that
	// are kept as if they had names.
	Roots []string
	// Wait is how long to wait until nobody else uses the store; then the error is
	// ErrBusy. 0 is as long as it takes.
	Wait time.Duration
}

// GCStats tells what a garbage collection kept and removed (or would have).
type GCStats struct {
	ObjectsKept    int `json:"objectsKept"`
	ObjectsRemoved int `json:"objectsRemoved"`
	// BytesRemoved is the disk space that the removed objects took, in bytes, those
	// left out that have another link elsewhere.
	BytesRemoved   int64 `json:"bytesRemoved"`
	StreamsRemoved int   `json:"streamsRemoved"`
	ImagesRemoved  int   `json:"imagesRemoved"`
	RefsRemoved    int   `json:"refsRemoved"`    // that led nowhere
	StagingRemoved int   `json:"stagingRemoved"` // transactions of dead processes
}

// GC removes every object that no ref leads to, the streams and images among them,
// refs that lead nowhere, and what dead processes left. It waits until nobody else
// uses the store, as long as ctx allows.
//
// A stream leads to its objects and to the streams and images it names; an image
// leads to its objects. When one of these is missing or damaged, nothing is removed,
// for what it leads to is unknown.
//
// Links go before the objects they lead to, so that a crash leaves no broken ones.
func (s *Store) GC(ctx context.Context, o GCOptions) (GCStats, error) {
	st, err := s.gc(ctx, o)
	if err != nil {
		return st, fmt.Errorf("collecting garbage in store %q: %w", s.dir, err)
	}
	return st, nil
}

func (s *Store) gc(ctx context.Context, o GCOptions) (st GCStats, err error) {
	how := unix.LOCK_EX
	if o.DryRun {
		how = unix.LOCK_SH
	} else if s.readOnly != "" {
		return st, fmt.Errorf("%w: %s", ErrReadOnly, s.readOnly)
	}
	wait := ctx
	if o.Wait > 0 {
		var cancel context.CancelFunc
		wait, cancel = context.WithTimeoutCause(ctx, o.Wait, ErrBusy)
		defer cancel()
	}
	lock, err := s.lock(wait, how)
	if err != nil {
		return st, err
	}
	defer lock.Close()

	if !o.DryRun {
		if st.StagingRemoved, err = s.sweep(); err != nil {
			return st, err
		}
	}
	m := s.newMarker(o.ImageObjects)
	dangling, err := m.markRefs(ctx)
	if err == nil {
		err = m.markRoots(ctx, o.Roots)
	}
	if err != nil {
		return st, fmt.Errorf("%w\nnothing was removed; run \"particle store fsck\", and remove what is damaged", err)
	}

	c := collector{s: s, dry: o.DryRun}
	st.RefsRemoved, err = c.remove(dangling)
	if err != nil {
		return st, err
	}
	for kind, n := range map[Kind]*int{Streams: &st.StreamsRemoved, Images: &st.ImagesRemoved} {
		entries, err := s.entries(kind)
		if err != nil {
			return st, err
		}
		var paths []string
		for _, e := range entries {
			if _, ok := m.walked[e.Digest]; !ok {
				paths = append(paths, string(kind)+"/"+e.ID)
			}
		}
		if *n, err = c.remove(paths); err != nil {
			return st, err
		}
	}
	testPoint("gc objects")
	return st, c.objects(ctx, m.live, &st)
}

// markRoots walks what the caller wants kept.
func (m *marker) markRoots(ctx context.Context, roots []string) error {
	for _, id := range roots {
		found := false
		for _, kind := range []Kind{Images, Streams} {
			if checkEntryName(kind, id) != nil {
				continue
			}
			d, err := m.s.entry(kind, id)
			if errors.Is(err, ErrNotFound) {
				continue
			}
			if err != nil {
				return err
			}
			found = true
			if err := m.walk(ctx, pending{d, string(kind) + "/" + id, kind}); err != nil {
				return err
			}
		}
		if !found {
			return fmt.Errorf("keeping %q: %w", id, ErrNotFound)
		}
	}
	return nil
}

// A collector removes things, or only counts them.
type collector struct {
	s   *Store
	dry bool
}

// remove removes links, durably, and returns their number. Below refs/ it removes
// the directories that become empty, too.
func (c collector) remove(paths []string) (int, error) {
	dirs := map[string]bool{}
	for _, p := range paths {
		if c.dry {
			continue
		}
		if err := os.Remove(c.s.path(p)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
		dirs[filepath.Dir(p)] = true
	}
	for dir := range dirs {
		if err := syncDir(c.s.path(dir)); err != nil {
			return 0, err
		}
		for ; strings.Count(dir, "/") > 1 && unix.Rmdir(c.s.path(dir)) == nil; dir = filepath.Dir(dir) {
		}
	}
	return len(paths), nil
}

// objects removes the objects that are not live, and temporary files of
// composefs-rs, which cannot be in use: the lock is ours.
func (c collector) objects(ctx context.Context, live map[fsverity.Digest]struct{}, st *GCStats) error {
	return c.s.walkObjects(ctx, func(o foundObject) error {
		if o.problem == "" {
			if _, ok := live[o.digest]; ok {
				st.ObjectsKept++
				return nil
			}
			st.ObjectsRemoved++
			if o.stat.Nlink == 1 {
				st.BytesRemoved += o.stat.Blocks * 512
			}
		} else if !o.temp {
			return nil // fsck tells
		}
		if c.dry {
			return nil
		}
		if err := os.Remove(c.s.path(o.path)); err != nil {
			return err
		}
		if st.ObjectsRemoved%16 == 1 {
			testPoint("gc object")
		}
		return nil
	}, func(dir string) error {
		if !c.dry {
			unix.Rmdir(c.s.path(dir)) // when empty
		}
		return nil
	})
}

// A foundObject is a directory entry below objects/.
type foundObject struct {
	path    string // below the store
	digest  fsverity.Digest
	stat    unix.Stat_t
	temp    bool   // a temporary file of composefs-rs
	problem string // why it is no object, "" if it is one
}

// walkObjects calls do for every file below objects/, and after for each of the
// directories there, both if they are well named.
func (s *Store) walkObjects(ctx context.Context, do func(foundObject) error, after func(dir string) error) error {
	top, err := os.ReadDir(s.ObjectsDir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range top {
		dir := objectsDir + "/" + e.Name()
		if !e.IsDir() || len(e.Name()) != 2 {
			if err := do(foundObject{path: dir, temp: isObjectTemp(e), problem: "want directories of two hexadecimal digits here"}); err != nil {
				return err
			}
			continue
		}
		files, err := os.ReadDir(s.path(dir))
		if err != nil {
			return err
		}
		for _, f := range files {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			o := foundObject{path: dir + "/" + f.Name(), temp: isObjectTemp(f)}
			if err := unix.Lstat(s.path(o.path), &o.stat); err == unix.ENOENT {
				continue
			} else if err != nil {
				return fmt.Errorf("looking at %q: %w", o.path, err)
			}
			if o.digest, err = fsverity.ParsePath(e.Name() + "/" + f.Name()); err != nil {
				o.problem = "the name is no digest"
			} else if o.digest.Algorithm() != s.alg {
				o.problem = "the name is a digest of another algorithm than the store's " + s.alg.Name()
			} else if o.stat.Mode&unix.S_IFMT != unix.S_IFREG {
				o.problem = "not a regular file"
			}
			if err := do(o); err != nil {
				return err
			}
		}
		if err := after(dir); err != nil {
			return err
		}
	}
	return nil
}

// isObjectTemp recognizes the files that composefs-rs writes objects to where there
// is no O_TMPFILE (create_named_object_tmpfile in its repository.rs).
func isObjectTemp(e fs.DirEntry) bool {
	return e.Type().IsRegular() && strings.HasPrefix(e.Name(), ".tmp-object-")
}
