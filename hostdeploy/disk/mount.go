package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/mount"
)

// mountSource begins the source of the mount that all others of one disk are in; the
// disk's key follows.
const mountSource = "particle-disk:"

// mounts are what is mounted of one disk: a directory in memory, for root only, and the
// file systems in it.
type mounts struct {
	base  string
	names []string
}

// newMounts makes the directory.
func newMounts(key string) (*mounts, error) {
	base, err := os.MkdirTemp("", "particle-disk-")
	if err != nil {
		return nil, fmt.Errorf("making a directory to mount in: %w", err)
	}
	if err := unix.Mount(mountSource+key, base, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=64k,mode=0700"); err != nil {
		os.Remove(base)
		return nil, fmt.Errorf("mounting a private directory: %w", err)
	}
	m := &mounts{base: base}
	// What is mounted inside must not spread to other namespaces.
	if err := unix.Mount("", base, "", unix.MS_PRIVATE, ""); err != nil {
		return nil, errors.Join(fmt.Errorf("making %q private: %w", base, err), m.close(true))
	}
	return m, nil
}

// path is "" when all is unmounted: better no path than one in the working directory.
func (m *mounts) path(name string) string {
	if m == nil || m.base == "" {
		return ""
	}
	return filepath.Join(m.base, name)
}

// add mounts a file system in a directory of that name.
func (m *mounts) add(name, source, kind string, flags uintptr, data string) error {
	dir := m.path(name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(source, dir, kind, flags, data); err != nil {
		return fmt.Errorf("mounting the %s file system, %s: %w", name, kind, err)
	}
	m.names = append(m.names, name)
	return nil
}

// close unmounts all, the last first. A namespace that was made meanwhile, as service
// managers and container engines do, has copies of all mounts: they go when the directory
// is removed (vfs_rmdir of Linux detaches what is mounted on it anywhere). What somebody still uses gives ErrBusy; with force
// it goes out of sight all the same, and away when the user does.
func (m *mounts) close(force bool) (err error) {
	if m == nil || m.base == "" {
		return nil
	}
	for len(m.names) > 0 {
		last := len(m.names) - 1
		if err = errors.Join(err, unmount(m.path(m.names[last]), force)); err != nil && !force {
			return err
		}
		m.names = m.names[:last]
	}
	if err = errors.Join(err, unmount(m.base, force)); err != nil && !force {
		return err
	}
	err = errors.Join(err, os.Remove(m.base))
	m.base = ""
	return err
}

// unmount tries for a moment, since indexers and the like look at every new mount.
func unmount(dir string, force bool) error {
	var err error
	settle(func() bool {
		err = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		return !errors.Is(err, unix.EBUSY)
	})
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("%w: a program has files open in %q, or works there", ErrBusy, dir)
	} else {
		err = fmt.Errorf("unmounting %q: %w", dir, err)
	}
	if force {
		err = errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
	}
	return err
}

// sweep unmounts what a run that was killed has left of a disk. The caller has the disk's
// lock, so that run is no more.
func sweep(key string) error {
	entries, err := mountinfo()
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Type != "tmpfs" || e.Source != mountSource+key {
			continue
		}
		for _, sub := range slices.Backward(entries) {
			if sub.Target != e.Target && !strings.HasPrefix(sub.Target, e.Target+"/") {
				continue
			}
			if err := unmount(sub.Target, false); err != nil {
				return fmt.Errorf("taking away what a killed run has left: %w", err)
			}
		}
		if err := os.Remove(e.Target); err != nil {
			return fmt.Errorf("taking away what a killed run has left: %w", err)
		}
	}
	return nil
}

func mountinfo() ([]mount.Entry, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var entries []mount.Entry
	err = mount.ParseMountinfo(f, func(e mount.Entry) error {
		entries = append(entries, e)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading what is mounted: %w", err)
	}
	return entries, nil
}
