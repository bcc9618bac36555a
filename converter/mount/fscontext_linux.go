package mount

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxString is the length in bytes of the longest value that fsconfig(2) takes as
// a string.
const maxString = 255

// A filesystem is one being configured: fsopen(2), fsconfig(2), fsmount(2).
type filesystem struct {
	fd   int
	kind string
}

func openFilesystem(kind string) (*filesystem, error) {
	fd, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	switch err {
	case nil:
		return &filesystem{fd, kind}, nil
	case unix.ENODEV:
		return nil, fmt.Errorf("%w: it has no %s (try modprobe %s)", ErrUnsupported, kind, kind)
	}
	return nil, fmt.Errorf("opening filesystem %s: %w", kind, err)
}

func (fs *filesystem) close() { unix.Close(fs.fd) }

// fail adds what the kernel has to say about an error.
func (fs *filesystem) fail(doing string, err error) error {
	if log := fs.log(); log != "" {
		return fmt.Errorf("%s: %w (kernel: %s)", doing, err, log)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// log reads the messages of the kernel about this filesystem, which start with a
// letter for their severity.
func (fs *filesystem) log() string {
	var all []string
	buf := make([]byte, 1024)
	for len(all) < 16 {
		n, err := unix.Read(fs.fd, buf)
		if err != nil || n <= 0 {
			break
		}
		msg := strings.TrimSpace(string(buf[:n]))
		if len(msg) > 2 && msg[1] == ' ' {
			msg = msg[2:]
		}
		all = append(all, msg)
	}
	return strings.Join(all, "; ")
}

func (fs *filesystem) setFlag(key string) error {
	if err := unix.FsconfigSetFlag(fs.fd, key); err != nil {
		return fs.fail(fmt.Sprintf("setting %s option %s", fs.kind, key), err)
	}
	return nil
}

func (fs *filesystem) setString(key, value string) error {
	if err := unix.FsconfigSetString(fs.fd, key, value); err != nil {
		return fs.fail(fmt.Sprintf("setting %s option %s=%q", fs.kind, key, value), err)
	}
	return nil
}

func (fs *filesystem) setFd(key string, f *os.File) error {
	if err := unix.FsconfigSetFd(fs.fd, key, int(f.Fd())); err != nil {
		return fs.fail(fmt.Sprintf("setting %s option %s to %q", fs.kind, key, f.Name()), err)
	}
	return nil
}

// mount creates the superblock and a detached mount of it. The attributes are
// MOUNT_ATTR_*.
func (fs *filesystem) mount(attrs int) (*os.File, error) {
	if err := unix.FsconfigCreate(fs.fd); err != nil {
		return nil, fs.fail("creating "+fs.kind, err)
	}
	fd, err := unix.Fsmount(fs.fd, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return nil, fs.fail("mounting "+fs.kind, err)
	}
	return os.NewFile(uintptr(fd), fs.kind+" mount"), nil
}

// fdPath names an open file in a way that needs no escaping and has no limit on
// the length of its real path.
func fdPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// mountErofs mounts an EROFS image from a file or block device, detached.
func mountErofs(source string, acl bool) (*os.File, error) {
	fs, err := openFilesystem("erofs")
	if err != nil {
		return nil, err
	}
	defer fs.close()
	if err := fs.setString("source", source); err != nil {
		return nil, err
	}
	if err := fs.setFlag("ro"); err != nil {
		return nil, err
	}
	if !acl {
		// Saves a look-up for each access. Kernels without ACLs may not know it.
		if err := fs.setFlag("noacl"); err != nil && !errors.Is(err, unix.EINVAL) {
			return nil, err
		}
	}
	return fs.mount(unix.MOUNT_ATTR_RDONLY)
}
