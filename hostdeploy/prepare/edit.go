package prepare

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// An editor changes a tree, or only notes what it would change. Paths are relative to
// the tree's root; [os.Root] keeps them in it.
type editor struct {
	root   *os.Root
	check  bool
	report *Report
	// gone are the paths that would have been removed: to later steps of a check they are
	// not there.
	gone map[string]bool
}

// will notes a change and reports whether to make it.
func (e *editor) will(a Action, name, to, why string) bool {
	e.report.Changes = append(e.report.Changes, Change{a, "/" + name, to, why})
	return !e.check
}

func (e *editor) warnf(format string, args ...any) {
	e.report.Warnings = append(e.report.Warnings, fmt.Sprintf(format, args...))
}

// lstat returns nil for what is not there.
func (e *editor) lstat(name string) (fs.FileInfo, error) {
	if e.gone[name] {
		return nil, nil
	}
	fi, err := e.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil
	}
	return fi, err
}

// exists follows links, within the tree.
func (e *editor) exists(name string) (bool, error) {
	if e.gone[name] {
		return false, nil
	}
	_, err := e.root.Stat(name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return false, nil
	}
	return err == nil, err
}

// resolve follows the links of a path as a program in the tree would: absolute targets
// begin at the tree's root, whereas [os.Root] refuses them. What is not there is kept.
func (e *editor) resolve(name string) (string, error) {
	const most = 40 // links, as in path_resolution(7)
	at, rest := "/", name
	for links := 0; rest != ""; {
		var first string
		first, rest, _ = strings.Cut(rest, "/")
		next := path.Join(at, first)
		if next == "/" {
			at = next
			continue
		}
		fi, err := e.lstat(next[1:])
		if err != nil {
			return "", err
		}
		if fi == nil || fi.Mode().Type() != fs.ModeSymlink {
			at = next
			continue
		}
		if links++; links > most {
			return "", fmt.Errorf("following the links of /%s: %w", name, syscall.ELOOP)
		}
		target, err := e.root.Readlink(next[1:])
		if err != nil {
			return "", err
		}
		if path.IsAbs(target) {
			at = "/"
		}
		rest = target + "/" + rest
	}
	return path.Clean("." + at), nil
}

// read returns nil for a file that is not there.
func (e *editor) read(name string) ([]byte, error) {
	data, err := e.root.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return data, err
}

// An entry is a name in a directory.
type entry struct {
	fs.FileInfo
	path  string
	stat  *syscall.Stat_t
	mount bool // something is mounted on it
}

// list reads a directory, in the order of names; one that is not there has none.
func (e *editor) list(dir string) ([]entry, error) {
	f, err := e.root.Open(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("listing %q: %w", dir, err)
	}
	slices.Sort(names)
	entries := make([]entry, 0, len(names))
	for _, name := range names {
		en := entry{path: path.Join(dir, name)}
		if e.gone[en.path] {
			continue
		}
		if en.FileInfo, err = e.root.Lstat(en.path); err != nil {
			return nil, err
		}
		en.stat = en.Sys().(*syscall.Stat_t)
		if en.mount, err = isMount(f, name); err != nil {
			return nil, fmt.Errorf("looking at %q: %w", en.path, err)
		}
		entries = append(entries, en)
	}
	return entries, nil
}

// isMount reports whether a name in a directory is where something is mounted
// (statx(2), STATX_ATTR_MOUNT_ROOT, Linux 5.8).
func isMount(dir *os.File, name string) (bool, error) {
	var st unix.Statx_t
	err := unix.Statx(int(dir.Fd()), name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, 0, &st)
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, err
}

// mounted reports whether something is mounted on a path.
func (e *editor) mounted(name string) (bool, error) {
	f, err := e.root.Open(path.Dir(name))
	if err != nil {
		return false, err
	}
	defer f.Close()
	return isMount(f, path.Base(name))
}

// behindMount reports whether something is mounted where a path leads, or above that.
func (e *editor) behindMount(name string) (bool, error) {
	name, err := e.resolve(name)
	if err != nil {
		return false, err
	}
	for ; name != "."; name = path.Dir(name) {
		mounted, err := e.mounted(name)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
			continue
		}
		if mounted || err != nil {
			return mounted, err
		}
	}
	return false, nil
}

// makeDir makes a directory, and those above it, where there is none. A link stays,
// wherever it leads.
func (e *editor) makeDir(name string, mode fs.FileMode) error {
	if fi, err := e.lstat(name); fi != nil || err != nil {
		return err
	}
	if !e.will(Make, name, "", "") {
		return nil
	}
	if err := e.parents(name); err != nil {
		return err
	}
	if err := e.root.Mkdir(name, mode.Perm()); err != nil {
		return err
	}
	// The umask, and the sticky bit.
	return e.root.Chmod(name, mode)
}

// parents makes the directories above a path.
func (e *editor) parents(name string) error {
	dir := path.Dir(name)
	if ok, err := e.exists(dir); ok || err != nil {
		return err
	}
	if err := e.parents(dir); err != nil {
		return err
	}
	if err := e.root.Mkdir(dir, 0o755); err != nil {
		return err
	}
	return e.root.Chmod(dir, 0o755)
}

// link makes a symbolic link where there is nothing, or another link.
func (e *editor) link(name, target, why string) error {
	fi, err := e.lstat(name)
	if err != nil {
		return err
	}
	if fi != nil {
		if fi.Mode().Type() != fs.ModeSymlink {
			return fmt.Errorf("linking /%s to %q: %w", name, target, ErrConflict)
		}
		if have, err := e.root.Readlink(name); err != nil || have == target {
			return err
		}
	}
	if !e.will(Link, name, target, why) {
		return nil
	}
	if err := e.parents(name); err != nil {
		return err
	}
	tmp := temporary(name)
	if err := e.root.Symlink(target, tmp); err != nil {
		return err
	}
	return e.root.Rename(tmp, name)
}

// temporary returns a name beside name.
func temporary(name string) string {
	return path.Join(path.Dir(name), ".particle-"+rand.Text())
}

// write makes a regular file of root's with this content and mode. One that is right
// already is not touched.
func (e *editor) write(name string, data []byte, mode fs.FileMode) error {
	fi, err := e.lstat(name)
	if err != nil {
		return err
	}
	if fi != nil && fi.Mode() == mode {
		if have, err := e.root.ReadFile(name); err != nil {
			return err
		} else if bytes.Equal(have, data) {
			return nil
		}
	}
	if fi != nil && fi.IsDir() {
		return fmt.Errorf("writing /%s: a directory: %w", name, ErrConflict)
	}
	if !e.will(Write, name, "", "") {
		return nil
	}
	return e.put(name, bytes.NewReader(data), func(tmp string) error { return e.root.Chmod(tmp, mode) })
}

// put writes a file under a name of its own, has it finished, and renames it.
func (e *editor) put(name string, r io.Reader, finish func(tmp string) error) (err error) {
	if err := e.parents(name); err != nil {
		return err
	}
	tmp := temporary(name)
	f, err := e.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.root.Remove(tmp))
		}
	}()
	_, err = io.Copy(f, r)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("writing %q: %w", name, err)
	}
	if err := finish(tmp); err != nil {
		return err
	}
	return e.root.Rename(tmp, name)
}

// removeAll removes what is at a path and all below, but for what is mounted there. It
// counts what is no directory, and reports whether all of it went.
func (e *editor) removeAll(en entry) (n int, gone bool, err error) {
	if en.mount {
		return 0, false, nil
	}
	if !en.IsDir() {
		return 1, true, e.remove(en.path)
	}
	children, err := e.list(en.path)
	if err != nil {
		return 0, false, err
	}
	gone = true
	for _, c := range children {
		m, g, err := e.removeAll(c)
		n += m
		gone = gone && g
		if err != nil {
			return n, false, err
		}
	}
	if gone {
		err = e.remove(en.path)
	}
	return n, gone, err
}

// remove removes what a change that was noted already is about.
func (e *editor) remove(name string) error {
	if e.check {
		e.gone[name] = true
		return nil
	}
	return e.root.Remove(name)
}

// move moves a directory to another path, into the directory that may be there. It does
// so entry by entry: overlayfs, on which images are built, renames no directory of a
// lower layer (EXDEV). A run that was cut off is completed by the next; last names the
// entry, of the directory itself, that moves after all others.
func (e *editor) move(from, to, last string) error {
	children, err := e.list(from)
	if err != nil {
		return err
	}
	fi, err := e.root.Lstat(from)
	if err != nil {
		return err
	}
	there, err := e.lstat(to)
	switch {
	case err != nil:
		return err
	case there == nil:
		if err := e.parents(to); err != nil {
			return err
		}
		if err := e.root.Mkdir(to, 0o700); err != nil {
			return err
		}
	case !there.IsDir():
		return fmt.Errorf("moving /%s to /%s: %w", from, to, ErrConflict)
	}
	slices.SortStableFunc(children, func(a, b entry) int {
		switch {
		case a.Name() == last && b.Name() != last:
			return 1
		case b.Name() == last && a.Name() != last:
			return -1
		}
		return strings.Compare(a.path, b.path)
	})
	for _, c := range children {
		dst := path.Join(to, c.Name())
		switch {
		case c.mount:
			return fmt.Errorf("moving /%s: %w; run particle prepare in a RUN of its own, without --mount", c.path, ErrMounted)
		case c.IsDir():
			err = e.move(c.path, dst, "")
		default:
			err = e.moveFile(c.path, dst)
		}
		if err != nil {
			return err
		}
	}
	// Its attributes come last: its time changed with each entry.
	if there == nil {
		if err := e.likeDir(from, to, fi); err != nil {
			return err
		}
	}
	return e.root.Remove(from)
}

func (e *editor) moveFile(from, to string) error {
	there, err := e.lstat(to)
	if err != nil {
		return err
	}
	if there != nil {
		return fmt.Errorf("moving /%s to /%s: %w; remove one of the two", from, to, ErrConflict)
	}
	return e.root.Rename(from, to)
}

// likeDir gives a directory the attributes of another.
func (e *editor) likeDir(from, to string, fi fs.FileInfo) error {
	src, err := e.root.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := e.root.Open(to)
	if err != nil {
		return err
	}
	defer dst.Close()
	if err := copyXattrs(src, dst); err != nil {
		return fmt.Errorf("copying the xattrs of %q: %w", from, err)
	}
	return e.like(to, fi)
}

// like gives a path the owner, the mode and the time of modification of another.
func (e *editor) like(name string, fi fs.FileInfo) error {
	st := fi.Sys().(*syscall.Stat_t)
	if err := e.root.Chown(name, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	// After chown(2), which clears the set-id bits.
	if err := e.root.Chmod(name, fi.Mode()); err != nil {
		return err
	}
	return e.root.Chtimes(name, fi.ModTime(), fi.ModTime())
}

// copyXattrs copies the extended attributes, ACLs among them, from one file to another.
func copyXattrs(src, dst *os.File) error {
	buf := make([]byte, 1<<16) // XATTR_LIST_MAX and XATTR_SIZE_MAX
	n, err := unix.Flistxattr(int(src.Fd()), buf)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	} else if err != nil {
		return err
	}
	for _, name := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") || name == "security.selinux" {
			continue // these belong to the file system of the build
		}
		n, err := unix.Fgetxattr(int(src.Fd()), name, buf)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := unix.Fsetxattr(int(dst.Fd()), name, buf[:n], 0); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}
