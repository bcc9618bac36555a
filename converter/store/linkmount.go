package store

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// link(2) refuses to cross mounts, also where both show one file system: podman mounts
// its storage on itself, and so no file of it could be linked. A private copy of the
// store's mount (open_tree(2)) has nothing mounted on it, and both places in it.

// linkAcross links f as name into the staging directory if both lie on the file system
// that the staging directory's mount shows, whatever mount f was opened by.
func (t *Txn) linkAcross(f *os.File, name string) error {
	to, err := t.mountView()
	if err != nil {
		return err
	}
	from, err := to.mounts.placeOf(f)
	if err != nil {
		return err
	}
	if from.device != to.place.device {
		return unix.EXDEV
	}
	source, ok := below(from.path, to.place.root)
	if !ok {
		return unix.EXDEV
	}
	target := filepath.Join(to.stage, name)
	if err := unix.Linkat(to.fd, source, to.fd, target, 0); err != nil {
		return err
	}
	// The path may have come to mean another file since f was opened.
	var want, got unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &want)
	if err == nil {
		err = unix.Fstatat(int(t.stage.dir.Fd()), name, &got, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err == nil && (got.Ino != want.Ino || got.Dev != want.Dev) {
		err = unix.ESTALE
	}
	if err != nil {
		_ = unix.Unlinkat(to.fd, target, 0)
	}
	return err
}

// A mountView is a copy of the mount that a transaction's staging directory lies on.
type mountView struct {
	fd    int // its root; lives as long as the transaction
	stage string
	place place
	file  *os.File
	// Of files' mounts: there are many files. That it may be out of date does no harm,
	// for what was linked is compared.
	mounts mountTable
}

// mountView makes the view once.
func (t *Txn) mountView() (*mountView, error) {
	t.viewOnce.Do(func() { t.view, t.viewErr = newMountView(t.stage.dir) })
	return t.view, t.viewErr
}

func newMountView(dir *os.File) (*mountView, error) {
	v := &mountView{}
	p, err := v.mounts.placeOf(dir)
	if err != nil {
		return nil, err
	}
	stage, ok := below(p.path, p.root)
	if !ok {
		return nil, unix.EXDEV
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, p.target, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), p.target)
	// The target's path may show another mount than the one looked for.
	var want, got unix.Stat_t
	err = unix.Fstat(int(dir.Fd()), &want)
	if err == nil {
		err = unix.Fstatat(fd, stage, &got, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err == nil && (got.Ino != want.Ino || got.Dev != want.Dev) {
		err = unix.EXDEV
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	v.fd, v.stage, v.place, v.file = fd, stage, p, file
	return v, nil
}

// A place says where on its file system an open file lies.
type place struct {
	device string // major:minor
	root   string // the directory of the file system that the file's mount shows
	target string // where that mount is
	path   string // of the file, from the file system's root
}

// A mountTable knows mounts by their IDs (proc_pid_mountinfo(5)).
type mountTable struct {
	mu    sync.Mutex
	known map[string]place // without paths
}

// placeOf finds the place of an open file by its path and its mount.
func (m *mountTable) placeOf(f *os.File) (place, error) {
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return place{}, err
	}
	id, err := mountID(f.Fd())
	if err != nil {
		return place{}, err
	}
	p, err := m.mount(id)
	if err != nil {
		return place{}, err
	}
	rest, ok := below(path, p.target)
	if !ok {
		return place{}, unix.EXDEV
	}
	p.path = filepath.Join(p.root, rest)
	return p, nil
}

func (m *mountTable) mount(id string) (place, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p, ok := m.known[id]; ok {
		return p, nil
	}
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return place{}, err
	}
	m.known = map[string]place{}
	for line := range strings.Lines(string(raw)) {
		// "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw"
		if f := strings.Fields(line); len(f) >= 5 {
			m.known[f[0]] = place{device: f[2], root: unescapeMount(f[3]), target: unescapeMount(f[4])}
		}
	}
	p, ok := m.known[id]
	if !ok {
		return place{}, unix.EXDEV // a detached mount
	}
	return p, nil
}

// mountID returns the ID of the mount that a file was opened by.
func mountID(fd uintptr) (string, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(raw)) {
		if id, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strings.TrimSpace(id), nil
		}
	}
	return "", unix.ENOSYS
}

// below returns a path from dir on, "." for dir itself.
func below(path, dir string) (string, bool) {
	rel, err := filepath.Rel(dir, path)
	return rel, err == nil && filepath.IsLocal(rel)
}

// unescapeMount undoes the octal escapes of mountinfo.
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
