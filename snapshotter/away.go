package snapshotter

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/store"
)

// UnmountAll unmounts all images below the root directory of a snapshotter that is
// not running (else the error is ErrInUse), and removes their mount points. Containers
// that run keep their files. It is for taking a snapshotter away; New mounts them
// again. Where there is no such directory it has nothing to do.
func UnmountAll(root string) error {
	root, release, err := hold(root)
	if root == "" || err != nil {
		return err
	}
	return errors.Join(unmountAll(root), release())
}

// Purge takes away what a snapshotter that is not running has: its mounts, the names in
// the store that keep its layers from being collected, and its own files in the root
// directory; the directory itself if nothing else is there. It may be repeated where it
// was interrupted. The error is ErrInUse, and no file is gone, where a container has a
// snapshot mounted; and ErrStore where there is something to take away and st is nil or
// another store than the snapshotter's: whose the names there are would never be known again.
func Purge(root string, st *store.Store) (err error) {
	root, release, err := hold(root)
	if root == "" || err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release()) }()
	if _, err := os.Stat(filepath.Join(root, instanceFile)); errors.Is(err, fs.ErrNotExist) {
		return nil // no snapshotter's, whatever is there
	}
	if err := checkStore(root, st); err != nil {
		return err
	}
	instance, err := instanceID(root)
	if err != nil {
		return err
	}
	if err := unmountAll(root); err != nil {
		return err
	}
	if err := unused(root); err != nil {
		return err
	}
	if err := removeNames(st, refPrefix+instance+"/"); err != nil {
		return err
	}
	own, err := filepath.Glob(filepath.Join(root, tempPrefix+"*"))
	if err != nil {
		return err
	}
	// The instance is the last: without it nobody knows the names in the store.
	for _, name := range []string{"snapshots", "mounts", "empty", metadataFile, storeFile, instanceFile} {
		own = append(own, filepath.Join(root, name))
	}
	for _, path := range own {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	err = os.Remove(root)
	for _, stays := range []error{unix.ENOTEMPTY, unix.EBUSY, unix.ENOENT} { // other files; a mount point
		if errors.Is(err, stays) {
			return nil
		}
	}
	return err
}

// checkStore returns ErrStore unless st is the store that a root's record names.
func checkStore(root string, st *store.Store) error {
	want := ""
	switch recorded, err := os.ReadFile(filepath.Join(root, storeFile)); {
	case err == nil:
		want = strings.TrimSuffix(string(recorded), "\n")
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if st == nil {
		return fmt.Errorf("%w in %q: got none, want %q", ErrStore, root, want)
	}
	got, err := realPath(st.Dir())
	if err == nil && want != "" && got != want {
		err = fmt.Errorf("%w in %q: got %q, want %q", ErrStore, root, got, want)
	}
	return err
}

// lockWait is how long to wait for another process to give up a root directory.
const lockWait = time.Second

// hold keeps snapshotters from using a root directory, and returns its real path, which
// is empty if there is none. It takes the lock of the database as bolt does, and does
// not open that: a damaged one must not be in the way.
func hold(dir string) (root string, release func() error, err error) {
	root, err = realPath(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil, nil
	}
	if err != nil {
		return "", nil, err
	}
	f, err := os.OpenFile(filepath.Join(root, metadataFile), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return root, func() error { return nil }, nil
	}
	if err != nil {
		return "", nil, err
	}
	for end := time.Now().Add(lockWait); ; time.Sleep(50 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return root, f.Close, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			break
		}
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("%w by another process", ErrInUse)
	}
	return "", nil, errors.Join(fmt.Errorf("locking %q: %w", root, err), f.Close())
}

func unmountAll(root string) error {
	dirs, err := os.ReadDir(filepath.Join(root, "mounts"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range dirs {
		errs = append(errs, clearMountPoint(filepath.Join(root, "mounts", e.Name())))
	}
	return errors.Join(errs...)
}

// clearMountPoint unmounts all images at a mount point and removes it.
func clearMountPoint(target string) error {
	if err := detachAll(target); err != nil {
		return err
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// unused checks that nothing is mounted below a root directory, and no overlay has its
// files there.
func unused(root string) error {
	return eachMount(func(e mount.Entry) error {
		below := func(dir string) bool { return strings.HasPrefix(dir, root+"/") }
		if below(e.Target) || slices.ContainsFunc(overlaid(e), below) {
			return fmt.Errorf("%w: what is mounted at %q needs files below %q", ErrInUse, e.Target, root)
		}
		return nil
	})
}

// upperInUse reports whether an overlay that this process sees has the directory as
// upper directory, or as a lower one: BuildKit mounts it so to read it.
func upperInUse(dir string) (used bool, err error) {
	err = eachMount(func(e mount.Entry) error {
		used = used || slices.Contains(overlaid(e), dir)
		return nil
	})
	return used, err
}

// overlaid returns the upper and lower directories of an overlay.
func overlaid(e mount.Entry) (dirs []string) {
	if e.Type != "overlay" {
		return nil
	}
	dirs = append(e.SuperOption("upperdir"), e.SuperOption("lowerdir+")...)
	for _, lowers := range e.SuperOption("lowerdir") {
		dirs = append(dirs, strings.Split(lowers, ":")...)
	}
	return dirs
}

func eachMount(fn func(mount.Entry) error) error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	return mount.ParseMountinfo(f, fn)
}

// removeNames removes all names in a store that begin with prefix.
func removeNames(st *store.Store, prefix string) error {
	images, err := st.ImageRefs()
	if err != nil {
		return err
	}
	streams, err := st.StreamRefs(prefix)
	if err != nil {
		return err
	}
	for kind, refs := range map[store.Kind][]store.Ref{store.Images: images, store.Streams: streams} {
		for _, ref := range refs {
			if !strings.HasPrefix(ref.Name, prefix) {
				continue
			}
			if err := st.RemoveRef(kind, ref.Name); err != nil && !errors.Is(err, store.ErrNotFound) {
				return err
			}
		}
	}
	return nil
}
