package scan

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/tree"
)

const (
	dirFlags  = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fileFlags = unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NOCTTY | unix.O_NONBLOCK | unix.O_CLOEXEC
	statMask  = unix.STATX_BASIC_STATS | unix.STATX_MNT_ID

	// window is how many directories on the way down to the present one are held
	// open. Those further up are opened again through "..", on the way back.
	window = 32
)

// A dir is a directory on the way from the root to the present place.
type dir struct {
	parent *dir
	name   string // of the root: the path that the caller gave
	depth  int
	fd     int // -1 while it is closed
	id     inode
	mount  uint64
}

// path returns the path of a name in d, for messages.
func (d *dir) path(name string) string {
	for ; d != nil; d = d.parent {
		if name == "" {
			name = d.name
		} else {
			name = tree.Join(d.name, name)
		}
	}
	return name
}

// root reads the root directory, which fd is open on.
func (s *scanner) root(name string, fd int) (*tree.Node, error) {
	d := &dir{name: name, fd: fd}
	defer d.close()
	var st unix.Statx_t
	if err := statx(fd, "", unix.AT_EMPTY_PATH, &st); err != nil {
		return nil, fmt.Errorf("scanning %q: %w", name, err)
	}
	d.id, d.mount = inodeOf(&st), st.Mnt_id
	n := s.newNode(&st)
	if err := s.list(d, n); err != nil {
		return nil, err
	}
	return n, nil
}

// list reads the xattrs and the entries of a directory into n.
func (s *scanner) list(d *dir, n *tree.Node) error {
	if err := s.xattrs(n, fdXattrs(d.fd)); err != nil {
		return fmt.Errorf("reading directory %q: %w", d.path(""), err)
	}
	names, err := s.readNames(d.fd)
	if err == unix.ENOENT { // of a directory that was removed
		err = fmt.Errorf("%w: %v", ErrChanged, err)
	}
	if err != nil {
		return fmt.Errorf("reading directory %q: %w", d.path(""), err)
	}
	n.Dir = make(map[string]*tree.Node, len(names))
	for _, name := range names {
		if s.ctx.Err() != nil {
			return nil // Dir has the cause
		}
		child, err := s.entry(d, name)
		if err != nil {
			return err
		}
		if child != nil {
			n.Dir[name] = child
		}
	}
	return nil
}

// entry reads one name in a directory; it returns nil for what is left out. In a live
// directory it tries again. What is below a directory has spent all tries before the
// directory itself is tried again, so that their number is that of the scan.
func (s *scanner) entry(d *dir, name string) (*tree.Node, error) {
	for {
		n, err := s.entryOnce(d, name)
		if !s.opts.Live || !errors.Is(err, ErrChanged) || s.retries == 0 || s.ctx.Err() != nil {
			return n, err
		}
		s.retries--
	}
}

func (s *scanner) entryOnce(d *dir, name string) (node *tree.Node, err error) {
	fail := func(err error) (*tree.Node, error) {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			// It was there a moment ago, and as another type.
			err = fmt.Errorf("%w: %v", ErrChanged, err)
		}
		return nil, fmt.Errorf("scanning %q: %w", d.path(name), err)
	}
	flags := unix.AT_SYMLINK_NOFOLLOW
	if s.opts.OneFileSystem {
		flags |= unix.AT_NO_AUTOMOUNT
	}
	var st unix.Statx_t
	if err := statx(d.fd, name, flags, &st); err != nil {
		if s.opts.Live && err == unix.ENOENT {
			return nil, nil
		}
		return fail(err)
	}
	mode := uint32(st.Mode)
	mounted := s.opts.OneFileSystem && crosses(d, &st)

	if mode&tree.TypeMask == tree.TypeDir {
		n := s.newNode(&st)
		if mounted {
			n.Dir = map[string]*tree.Node{}
			if err := s.xattrs(n, pathXattrs(d.fd, name)); err != nil {
				return fail(err)
			}
			return n, nil
		}
		sub, err := d.enter(name, &st)
		if err != nil {
			return fail(err)
		}
		err = s.list(sub, n)
		if back := sub.leave(); err == nil && back != nil {
			return fail(back)
		}
		return n, err
	}

	if mounted || s.opts.SkipDevices && isDevice(&st) && !(s.opts.OverlayUpper && isWhiteout(&st)) {
		return nil, nil
	}
	linked := st.Nlink > 1 && !s.opts.SplitLinks
	if linked {
		if n := s.links[inodeOf(&st)]; n != nil {
			return n, nil
		}
	}
	n := s.newNode(&st)
	if linked {
		s.links[inodeOf(&st)] = n
		defer func() {
			if err != nil {
				delete(s.links, inodeOf(&st))
			}
		}()
	}
	switch mode & tree.TypeMask {
	case tree.TypeRegular:
		n.File = &tree.File{Size: int64(st.Size)}
		if st.Size > 0 && s.objects != nil {
			return n, s.submit(d, name, &st, n)
		}
	case tree.TypeSymlink:
		target, err := readlink(d.fd, name)
		if err != nil {
			return fail(err)
		}
		n.Target = target
	case tree.TypeChar, tree.TypeBlock:
		n.Rdev = tree.Makedev(st.Rdev_major, st.Rdev_minor)
	}
	if err := s.xattrs(n, pathXattrs(d.fd, name)); err != nil {
		return fail(err)
	}
	return n, nil
}

// submit opens a regular file and hands it to the workers.
func (s *scanner) submit(d *dir, name string, st *unix.Statx_t, n *tree.Node) error {
	fd, err := openRetry(d.fd, name, fileFlags)
	if err != nil {
		if err == unix.ENOENT || err == unix.ELOOP || err == unix.ENXIO {
			err = fmt.Errorf("%w: %v", ErrChanged, err)
		}
		return fmt.Errorf("opening %q: %w", d.path(name), err)
	}
	j := job{dir: d, name: name, file: os.NewFile(uintptr(fd), name), stat: *st, node: n}
	var now unix.Statx_t
	if err := statx(fd, "", unix.AT_EMPTY_PATH, &now); err != nil {
		j.file.Close()
		return fmt.Errorf("opening %q: %w", j.path(), err)
	}
	if inodeOf(&now) != inodeOf(st) || now.Mode&tree.TypeMask != tree.TypeRegular {
		j.file.Close()
		return fmt.Errorf("opening %q: %w: another file took its place", j.path(), ErrChanged)
	}
	select {
	case s.jobs <- j:
	case <-s.ctx.Done():
		j.file.Close()
	}
	return nil
}

// enter opens a directory in d. One far above is closed in exchange.
func (d *dir) enter(name string, st *unix.Statx_t) (*dir, error) {
	fd, err := openRetry(d.fd, name, dirFlags)
	if err != nil {
		return nil, err
	}
	sub := &dir{parent: d, name: name, depth: d.depth + 1, fd: fd, id: inodeOf(st), mount: st.Mnt_id}
	if err := sub.verify(); err != nil {
		sub.close()
		return nil, err
	}
	if sub.depth >= window {
		up := d
		for range window - 1 {
			up = up.parent
		}
		up.close()
	}
	return sub, nil
}

// leave closes d and opens its parent again where that was closed.
func (d *dir) leave() error {
	defer d.close()
	up := d.parent
	if up.fd >= 0 || d.fd < 0 {
		return nil
	}
	fd, err := openRetry(d.fd, "..", dirFlags)
	if err != nil {
		return err
	}
	up.fd = fd
	return up.verify()
}

// verify returns ErrChanged unless d's descriptor is open on d.
func (d *dir) verify() error {
	var st unix.Statx_t
	if err := statx(d.fd, "", unix.AT_EMPTY_PATH, &st); err != nil {
		return err
	}
	if inodeOf(&st) != d.id {
		return fmt.Errorf("%w: directory %q was moved or replaced", ErrChanged, d.path(""))
	}
	return nil
}

func (d *dir) close() {
	if d.fd >= 0 {
		unix.Close(d.fd)
		d.fd = -1
	}
}

// crosses reports whether an entry of d is on another mount than d.
func crosses(d *dir, st *unix.Statx_t) bool {
	if st.Mask&unix.STATX_MNT_ID != 0 {
		return st.Mnt_id != d.mount
	}
	// Linux before 5.8 shows no mounts. Non-directories are not compared: overlayfs
	// gives them device numbers of their own.
	return st.Mode&tree.TypeMask == tree.TypeDir && inodeOf(st).dev != d.id.dev
}

func (s *scanner) newNode(st *unix.Statx_t) *tree.Node {
	n := &tree.Node{Stat: tree.Stat{Mode: uint32(st.Mode), UID: st.Uid, GID: st.Gid}}
	if !s.opts.UseEpoch {
		n.MtimeSec, n.MtimeNsec = st.Mtime.Sec, st.Mtime.Nsec
	}
	return n
}

func inodeOf(st *unix.Statx_t) inode {
	return inode{tree.Makedev(st.Dev_major, st.Dev_minor), st.Ino}
}

func isDevice(st *unix.Statx_t) bool {
	t := uint32(st.Mode) & tree.TypeMask
	return t == tree.TypeChar || t == tree.TypeBlock
}

func isWhiteout(st *unix.Statx_t) bool {
	return uint32(st.Mode)&tree.TypeMask == tree.TypeChar && st.Rdev_major == 0 && st.Rdev_minor == 0
}

func statx(dirfd int, name string, flags int, st *unix.Statx_t) error {
	for {
		if err := unix.Statx(dirfd, name, flags, statMask, st); err != unix.EINTR {
			return err
		}
	}
}

func openRetry(dirfd int, name string, flags int) (int, error) {
	for {
		if fd, err := unix.Openat(dirfd, name, flags, 0); err != unix.EINTR {
			return fd, err
		}
	}
}

// readlink reads a symbolic link whole: a target has at most tree.MaxTarget bytes.
func readlink(dirfd int, name string) (string, error) {
	buf := make([]byte, tree.MaxTarget+1)
	n, err := unix.Readlinkat(dirfd, name, buf)
	if err != nil {
		if err == unix.EINVAL {
			err = fmt.Errorf("%w: it is no symbolic link any more", ErrChanged)
		}
		return "", err
	}
	return string(buf[:n]), nil
}

// readNames returns the names in a directory in byte order.
func (s *scanner) readNames(fd int) ([]string, error) {
	var names []string
	for {
		n, err := unix.Getdents(fd, s.dents[:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			slices.Sort(names)
			return names, nil
		}
		_, _, names = unix.ParseDirent(s.dents[:n], -1, names)
	}
}

// readFull reads until buf is full or the file ends.
func readFull(f *os.File, buf []byte) (int, error) {
	n := 0
	for n < len(buf) {
		m, err := unix.Read(int(f.Fd()), buf[n:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return n, err
		}
		if m == 0 {
			break
		}
		n += m
	}
	return n, nil
}
