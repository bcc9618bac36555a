package etcmerge

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/scan"
	"github.com/particle-os/particle/converter/tree"
)

// attempts is how often Write starts anew because the current /etc changed.
const attempts = 5

// Write writes the merged /etc to dst, a directory that must not be there (ErrExists),
// and returns when all of it is durable; dst itself gets its place by the caller's
// rename. After an error dst is gone again.
//
// When the current /etc changed since it was read, the merge is worked out and written
// anew, and m is that merge then. If it changes each time, the last one counts, and
// m.Late says which paths are older in it than they could be.
func (m *Merge) Write(ctx context.Context, dst string) error {
	m.Late = nil
	for try := 1; ; try++ {
		late, err := m.write(ctx, dst, try == attempts)
		if err == nil && (len(late) == 0 || try == attempts) {
			m.Late = late
			return nil
		}
		if err == nil {
			err = ErrChanged
			if rerr := os.RemoveAll(dst); rerr != nil {
				return fmt.Errorf("starting anew: %w", rerr)
			}
		}
		if !errors.Is(err, ErrChanged) || try == attempts {
			return err
		}
		if err := pause(ctx, try); err != nil {
			return err
		}
		if err := m.plan(ctx); err != nil {
			return err
		}
	}
}

// write writes the merge once. It returns the paths that changed since they were read.
func (m *Merge) write(ctx context.Context, dst string, tolerant bool) ([]string, error) {
	src, err := openBeneath(m.in.Current)
	if err != nil {
		return nil, err
	}
	defer src.close()
	w := &writer{objects: m.in.Objects, src: src, local: m.result.local, tolerant: tolerant}
	if err := w.tree(ctx, m.result.root, dst); err != nil {
		return nil, err
	}
	now, err := scan.Dir(ctx, m.in.Current, nil, scan.Options{Live: true})
	if errors.Is(err, scan.ErrChanged) && tolerant {
		return append(w.late, "/etc"), nil
	} else if errors.Is(err, scan.ErrChanged) {
		return []string{"/etc"}, nil
	} else if err != nil {
		return nil, fmt.Errorf("reading the current /etc again: %w", errors.Join(err, os.RemoveAll(dst)))
	}
	late := append(w.late, moved("/", m.snapshot, clean(now.Root, true))...)
	slices.Sort(late)
	return slices.Compact(late), nil
}

// moved lists where a directory was changed between two scans, by all that a scan
// without contents sees. The times of directories are not looked at: sockets and the
// like come and go.
func moved(p string, a, b *tree.Node) []string {
	var list []string
	switch {
	case a == nil || b == nil:
		return []string{etcPath(p)}
	case a.IsDir() && b.IsDir():
		if !sameMeta(a, b) {
			list = append(list, etcPath(p))
		}
		for _, name := range names(a, b) {
			list = append(list, moved(tree.Join(p, name), a.Dir[name], b.Dir[name])...)
		}
		return list
	case a.Mode != b.Mode, !sameMeta(a, b), a.Target != b.Target, a.Rdev != b.Rdev,
		a.IsRegular() && (a.File.Size != b.File.Size || a.MtimeSec != b.MtimeSec || a.MtimeNsec != b.MtimeNsec):
		return []string{etcPath(p)}
	}
	return nil
}

// Fresh writes an image's /etc to dst, a directory that must not be there (ErrExists), as
// Merge.Write does: for a first installation. It does for /var as well, which has a
// stamp of the same name.
func Fresh(ctx context.Context, image *tree.Node, objects Opener, dst string) error {
	s := newSums(objects, image)
	root, err := s.image(image)
	if err != nil {
		return fmt.Errorf("reading what to write to %q: %w", dst, err)
	}
	if root == nil {
		root = tree.NewImplied()
	}
	w := &writer{objects: objects}
	return w.tree(ctx, root, dst)
}

// A writer writes a tree to a directory of its own.
type writer struct {
	objects  Opener
	src      *beneath
	local    map[*tree.Node]string // paths below src
	tolerant bool                  // of changes in src: what is there now is taken
	dst      *beneath
	links    map[*tree.Node]string // where in dst a node is already
	late     []string
}

// tree writes and makes durable; after an error nothing is left.
func (w *writer) tree(ctx context.Context, root *tree.Node, dst string) (err error) {
	fail := func(err error) error { return fmt.Errorf("writing %q: %w", dst, err) }
	// Nobody else looks in before all owners and modes are right.
	if err := os.Mkdir(dst, 0o700); errors.Is(err, fs.ErrExist) {
		return fail(fmt.Errorf("%w; remove what an earlier run left", ErrExists))
	} else if err != nil {
		return fail(err)
	}
	defer func() {
		if err != nil {
			err = fail(errors.Join(err, os.RemoveAll(dst)))
		}
	}()
	if w.dst, err = openBeneath(dst); err != nil {
		return err
	}
	defer w.dst.close()
	// What lies in a directory with a default ACL inherits it.
	for _, acl := range []string{defaultACL, accessACL} {
		if err := unix.Fremovexattr(w.dst.fd, acl); err != nil && err != unix.ENODATA && err != unix.ENOTSUP {
			return fmt.Errorf("removing xattr %q: %w", acl, err)
		}
	}
	w.links = map[*tree.Node]string{}
	if err := w.dir(ctx, "/", root); err != nil {
		return err
	}
	// Reports errors of all writing since dst was opened.
	if err := unix.Syncfs(w.dst.fd); err != nil {
		return fmt.Errorf("making it durable: %w", err)
	}
	return syncParent(dst)
}

// syncParent makes the name of a new directory durable.
func syncParent(dst string) error {
	f, err := os.Open(filepath.Dir(filepath.Clean(dst)))
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// dir fills a directory that is there, and then gives it its metadata: a default ACL
// would get to its children, and they change its time.
func (w *writer) dir(ctx context.Context, p string, n *tree.Node) error {
	for name, child := range n.Children() {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := w.node(ctx, tree.Join(p, name), child); err != nil {
			return err
		}
	}
	dirfd, name, err := w.dst.parent(p)
	if err == nil {
		err = setStat(dirfd, name, n)
	}
	if err != nil {
		return fmt.Errorf("%q: %w", cmp.Or(p[1:], "."), err)
	}
	return nil
}

func (w *writer) node(ctx context.Context, p string, n *tree.Node) error {
	fail := func(err error) error { return fmt.Errorf("%q: %w", p[1:], err) }
	dirfd, name, err := w.dst.parent(p)
	if err != nil {
		return fail(err)
	}
	if n.IsDir() {
		if err := unix.Mkdirat(dirfd, name, 0o700); err != nil {
			return fail(err)
		}
		return w.dir(ctx, p, n)
	}
	if first, ok := w.links[n]; ok {
		if err := w.link(first, dirfd, name); err != nil {
			return fail(fmt.Errorf("linking it to %q: %w", first[1:], err))
		}
		return nil
	}
	switch n.Type() {
	case tree.TypeRegular:
		err := w.file(p, dirfd, name, n)
		if errors.Is(err, ErrChanged) && w.tolerant {
			w.late = append(w.late, etcPath(p))
			return nil
		} else if err != nil {
			return fail(err)
		}
	case tree.TypeSymlink:
		if err := unix.Symlinkat(n.Target, dirfd, name); err != nil {
			return fail(err)
		}
	default:
		if err := unix.Mknodat(dirfd, name, n.Type()|0o600, int(n.Rdev)); err != nil {
			return fail(err)
		}
	}
	if err := setStat(dirfd, name, n); err != nil {
		return fail(err)
	}
	w.links[n] = p
	return nil
}

func (w *writer) link(first string, dirfd int, name string) error {
	// The second parent() ends the first one's descriptor.
	dirfd, err := unix.FcntlInt(uintptr(dirfd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dirfd)
	from, fromName, err := w.dst.parent(first)
	if err != nil {
		return err
	}
	return unix.Linkat(from, fromName, dirfd, name, 0)
}

// file writes a regular file. The error is ErrChanged, and no file is left, where a local
// one is other than it was.
func (w *writer) file(p string, dirfd int, name string, n *tree.Node) (err error) {
	from, local := w.local[n]
	var r io.ReadCloser
	if local {
		r, err = w.src.open(from)
	} else {
		r, err = open(w.objects, n.File)
	}
	if err != nil {
		return err
	}
	defer r.Close()
	fd, err := openat(dirfd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), p)
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			unix.Unlinkat(dirfd, name, 0)
		}
	}()
	alg := n.File.Object.Algorithm()
	if alg == 0 {
		alg = fsverity.SHA256
	}
	h := fsverity.NewHasher(alg)
	size, err := io.Copy(io.MultiWriter(f, h), io.LimitReader(r, n.File.Size+1))
	if err != nil {
		return err
	}
	same := size == n.File.Size
	switch {
	case n.File.Inline != nil:
		same = same && h.Sum() == fsverity.Sum(alg, n.File.Inline)
	case !n.File.Object.IsZero():
		same = same && h.Sum() == n.File.Object
	}
	switch {
	case same:
		return nil
	case !local:
		return fmt.Errorf("%w: want object %s of %d bytes; particle store fsck says more", ErrContent, n.File.Object, n.File.Size)
	case !w.tolerant:
		return ErrChanged
	}
	return w.latest(p, from, f)
}

// latest copies a local file as it is now, whatever that is.
func (w *writer) latest(p, from string, f *os.File) error {
	r, err := w.src.open(from)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := f.Truncate(0); err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	w.late = append(w.late, etcPath(p))
	_, err = io.Copy(f, r)
	return err
}

// setStat gives a name, which only this program knows, the metadata of a node. The
// order matters: a new owner clears set-uid bits and file capabilities (chown(2)), and
// each step changes no time but ctime.
func setStat(dirfd int, name string, n *tree.Node) error {
	if err := unix.Fchownat(dirfd, name, int(n.UID), int(n.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("setting the owner %d:%d: %w", n.UID, n.GID, err)
	}
	path := "/proc/self/fd/" + strconv.Itoa(dirfd) + "/" + name
	for _, key := range slices.Sorted(maps.Keys(n.Xattrs)) {
		if err := unix.Lsetxattr(path, key, []byte(n.Xattrs[key]), 0); err != nil {
			return fmt.Errorf("setting xattr %q: %w", key, err)
		}
	}
	if n.Type() != tree.TypeSymlink {
		if err := unix.Fchmodat(dirfd, name, n.Mode&permissions, 0); err != nil {
			return fmt.Errorf("setting the mode %04o: %w", n.Mode&permissions, err)
		}
	}
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: n.MtimeSec, Nsec: int64(n.MtimeNsec)}}
	if err := unix.UtimesNanoAt(dirfd, name, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("setting the time: %w", err)
	}
	return nil
}
