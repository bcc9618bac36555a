package initramfs

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// openat2 opens a file that must not be outside of a directory. The kernel does not follow
// ".." while anything anywhere is renamed or mounted, as on a machine that boots, and asks
// to try again (openat2(2), EAGAIN).
func openat2(dir *os.File, name string, flags, resolve uint64) (fd int, err error) {
	const tries = 1000
	for range tries {
		fd, err = unix.Openat2(int(dir.Fd()), name, &unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: resolve})
		if err != unix.EAGAIN && err != unix.EINTR {
			break
		}
		time.Sleep(time.Millisecond)
	}
	return fd, err
}

// openat opens a directory below another one, as a handle for mounting.
func openat(dir *os.File, name string, resolve uint64) (*os.File, error) {
	fd, err := openat2(dir, name, unix.O_PATH|unix.O_DIRECTORY, resolve)
	if err != nil {
		return nil, &os.PathError{Op: "opening", Path: filepath.Join(dir.Name(), name), Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Join(dir.Name(), name)), nil
}

// openTree returns a detached copy of the mount that f is in, from f on.
func openTree(f *os.File, flags uint) (*os.File, error) {
	fd, err := unix.OpenTree(int(f.Fd()), "", flags|unix.AT_EMPTY_PATH)
	if err != nil {
		return nil, &os.PathError{Op: "open_tree", Path: f.Name(), Err: err}
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// attachAt gives a detached mount its place.
func attachAt(f *os.File, target string) error {
	err := unix.MoveMount(int(f.Fd()), "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("mounting on %q: %w", target, err)
	}
	return nil
}

// isMount reports whether a mount begins at a directory.
func isMount(dir string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, 0, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// unmountAll takes a mount and all below it from view.
func unmountAll(dir string) error {
	return unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
}

// remountWritable makes a mount and its file system writable, and leaves all other
// options as they are.
func remountWritable(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	if st.Flags&unix.ST_RDONLY == 0 {
		return nil
	}
	fd, err := unix.Fspick(unix.AT_FDCWD, dir, unix.FSPICK_CLOEXEC|unix.FSPICK_NO_AUTOMOUNT)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.FsconfigSetFlag(fd, "rw"); err != nil {
		return err
	}
	if err := unix.FsconfigReconfigure(fd); err != nil {
		return err
	}
	return unix.MountSetattr(unix.AT_FDCWD, dir, 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY})
}

// tmpfs mounts a file system in memory for an overlay and returns a directory of it
// that has the directories upper and work. It goes from view with the setup.
func (s *setup) tmpfs(name string) (string, error) {
	dir := filepath.Join(s.run, "transient")
	if len(s.temp) == 0 || s.temp[0] != dir {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return "", fmt.Errorf("preparing what is transient: %w", err)
		}
		if err := unix.Mount("particle", dir, "tmpfs", unix.MS_NODEV, "mode=0700"); err != nil {
			return "", fmt.Errorf("preparing what is transient: mounting a tmpfs: %w", err)
		}
		s.temp = append([]string{dir}, s.temp...)
	}
	dir = filepath.Join(dir, name)
	for _, d := range []string{dir, filepath.Join(dir, "work")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return "", fmt.Errorf("preparing what is transient: %w", err)
		}
	}
	upper := filepath.Join(dir, "upper")
	if err := os.Mkdir(upper, 0o755); err != nil {
		return "", fmt.Errorf("preparing what is transient: %w", err)
	}
	return dir, os.Chmod(upper, 0o755) // whatever the umask
}

// overlay mounts a tmpfs over directories, the first on top, detached.
func (s *setup) overlay(name string, lower ...*os.File) (*os.File, error) {
	dir, err := s.tmpfs(name)
	if err != nil {
		return nil, err
	}
	// The root of the overlay shows the mode, the owner and the times of its upper layer.
	var st unix.Stat_t
	upper := filepath.Join(dir, "upper")
	if err := unix.Fstat(int(lower[0].Fd()), &st); err != nil {
		return nil, err
	}
	if err := os.Chown(upper, int(st.Uid), int(st.Gid)); err != nil {
		return nil, err
	}
	if err := unix.Chmod(upper, st.Mode&0o7777); err != nil {
		return nil, err
	}
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("opening file system overlay: %w", err)
	}
	defer unix.Close(fd)
	set := [][2]string{{"source", "particle:" + name}, {"upperdir", upper}, {"workdir", filepath.Join(dir, "work")}}
	if len(lower) == 1 {
		set = append(set, [2]string{"lowerdir", fdPath(lower[0])})
	} else { // Linux 6.7
		for _, l := range lower {
			set = append(set, [2]string{"lowerdir+", fdPath(l)})
		}
	}
	for _, kv := range set {
		if err := unix.FsconfigSetString(fd, kv[0], kv[1]); err != nil {
			return nil, fmt.Errorf("setting overlay option %s=%q: %w", kv[0], kv[1], err)
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return nil, fmt.Errorf("creating overlay: %w", err)
	}
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("mounting overlay: %w", err)
	}
	return os.NewFile(uintptr(m), "overlay"), nil
}

// fdPath names an open file in a way that needs no escaping.
func fdPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }
