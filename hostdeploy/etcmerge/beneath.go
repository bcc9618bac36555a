package etcmerge

import (
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// A beneath reaches the names below one directory, each relative to its parent's
// descriptor, and follows no symbolic link: whoever puts one in the place of a directory
// leads nowhere. Paths begin with a slash and have no "..", and may be of any length.
type beneath struct {
	fd    int
	at    string // the directory that atFD is open on, "" for none
	atFD  int
	label string // the directory, for messages
}

func openBeneath(dir string) (*beneath, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening %q: %w", dir, err)
	}
	return &beneath{fd: fd, label: dir}, nil
}

func (b *beneath) close() {
	b.forget()
	unix.Close(b.fd)
}

func (b *beneath) forget() {
	if b.at != "" {
		unix.Close(b.atFD)
		b.at = ""
	}
}

// parent returns a descriptor of a path's parent, which is valid until the next call,
// and the path's last element; for "/" these are the directory itself and ".".
func (b *beneath) parent(p string) (dirfd int, name string, err error) {
	dir, name := path.Split(p)
	if name == "" {
		name = "."
	}
	if dir = strings.TrimSuffix(dir, "/"); dir == "" {
		return b.fd, name, nil
	}
	if dir == b.at {
		return b.atFD, name, nil
	}
	fd := b.fd
	for element := range strings.SplitSeq(dir[1:], "/") {
		next, err := openat(fd, element, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if fd != b.fd {
			unix.Close(fd)
		}
		if err != nil {
			return -1, "", err
		}
		fd = next
	}
	b.forget()
	b.at, b.atFD = dir, fd
	return fd, name, nil
}

// open opens a regular file for reading. Anything else that took its place is
// ErrChanged.
func (b *beneath) open(p string) (*os.File, error) {
	dirfd, name, err := b.parent(p)
	var fd int
	if err == nil {
		fd, err = openat(dirfd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	}
	switch err {
	case nil:
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.ENXIO:
		return nil, fmt.Errorf("%w: %w", ErrChanged, err)
	default:
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path.Join(b.label, p))
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		f.Close()
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		f.Close()
		return nil, fmt.Errorf("%w: it is no file any more", ErrChanged)
	}
	return f, nil
}

// openLocal opens a regular file below a directory.
func openLocal(dir, p string) (*os.File, error) {
	b, err := openBeneath(dir)
	if err != nil {
		return nil, err
	}
	defer b.close()
	return b.open(p)
}

func openat(dirfd int, name string, flags int, mode uint32) (int, error) {
	for {
		fd, err := unix.Openat(dirfd, name, flags|unix.O_CLOEXEC, mode)
		if err != unix.EINTR {
			return fd, err
		}
	}
}
