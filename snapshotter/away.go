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

// lockWait is how long to wait for another process to give up a root directory.
const lockWait = time.Second

// hold keeps snapshotters from using a root directory, and returns its real path, which
// is empty if there is none. It takes the lock of the database as bolt does, and does
// not open that: a damaged one must not be in the way.
func hold(dir string) (root string, release func() error, err error) {
	root, err = filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil, nil
	}
	if err != nil {
		return "", nil, err
	}
	if root, err = filepath.Abs(root); err != nil {
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
