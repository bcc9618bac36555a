package prepare

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"syscall"
)

// syncFactory copies what v wants into the factory, and removes what an earlier run, by
// the lines it wrote, has copied there and nobody wants any more. What packages have in
// the factory stays.
func (p *preparation) syncFactory(ctx context.Context, v *variableTree) error {
	if err := p.removeStale(ctx, v); err != nil {
		return err
	}
	var made []string
	for _, en := range v.copies {
		if err := ctx.Err(); err != nil {
			return err
		}
		to := path.Join(factory, en.path)
		same, err := p.same(en, to)
		if err != nil {
			return fmt.Errorf("comparing /%s and /%s: %w", en.path, to, err)
		}
		if same {
			continue
		}
		made = append(made, to)
		if p.check {
			continue
		}
		if err := p.copyEntry(en, to); err != nil {
			return fmt.Errorf("copying /%s to /%s: %w", en.path, to, err)
		}
	}
	if len(made) > 0 {
		p.will(Write, path.Join(factory, "var"), "", fmt.Sprintf("%d copies of files and directories in /var", len(made)))
	}
	return nil
}

// removeStale removes copies without an original.
func (p *preparation) removeStale(ctx context.Context, v *variableTree) error {
	old, err := p.read(tmpfilesConf)
	if err != nil || old == nil {
		return err
	}
	wanted := map[string]bool{}
	for _, en := range v.copies {
		wanted[path.Join(factory, en.path)] = true
	}
	var stale []entry
	for _, l := range parseTmpfiles(string(old)) {
		name := strings.TrimPrefix(path.Clean(l.argument), "/")
		if l.kind != "C" || name != path.Join(factory, l.path) || !strings.HasPrefix(l.path, "/var/") {
			continue
		}
		fi, err := p.lstat(name)
		if err != nil {
			return err
		}
		if fi == nil {
			continue
		}
		all := []entry{{FileInfo: fi, path: name}}
		if fi.IsDir() {
			below, err := p.below(ctx, name)
			if err != nil {
				return err
			}
			all = append(all, below...)
		}
		for _, en := range all {
			if !wanted[en.path] {
				stale = append(stale, en)
			}
		}
	}
	if len(stale) == 0 || !p.will(Remove, path.Join(factory, "var"), "", fmt.Sprintf("%d copies without an original", len(stale))) {
		return nil
	}
	for _, en := range slices.Backward(stale) {
		if err := p.root.Remove(en.path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) {
			return err
		}
		// Directories that were made for it.
		for dir := path.Dir(en.path); dir != factory && !wanted[dir] && p.root.Remove(dir) == nil; {
			dir = path.Dir(dir)
		}
	}
	return nil
}

// same reports whether a copy has the type, the owner, the mode and the content of its
// original. Times do not matter.
func (p *preparation) same(en entry, copied string) (bool, error) {
	fi, err := p.lstat(copied)
	if fi == nil || err != nil {
		return false, err
	}
	st := fi.Sys().(*syscall.Stat_t)
	if st.Mode != en.stat.Mode || st.Uid != en.stat.Uid || st.Gid != en.stat.Gid {
		return false, nil
	}
	switch en.Mode().Type() {
	case fs.ModeDir:
		return true, nil
	case fs.ModeSymlink:
		a, err := p.root.Readlink(en.path)
		if err != nil {
			return false, err
		}
		b, err := p.root.Readlink(copied)
		return a == b, err
	}
	if fi.Size() != en.Size() {
		return false, nil
	}
	return p.sameContent(en.path, copied)
}

// sameContent compares two regular files.
func (p *preparation) sameContent(one, other string) (bool, error) {
	a, err := p.root.Open(one)
	if err != nil {
		return false, err
	}
	defer a.Close()
	b, err := p.root.Open(other)
	if err != nil {
		return false, err
	}
	defer b.Close()
	return sameBytes(a, b)
}

// sameBytes compares two streams.
func sameBytes(a, b io.Reader) (bool, error) {
	bufA, bufB := make([]byte, 1<<16), make([]byte, 1<<16)
	for {
		n, errA := io.ReadFull(a, bufA)
		m, errB := io.ReadFull(b, bufB)
		for _, err := range []error{errA, errB} {
			if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
				return false, err
			}
		}
		if !bytes.Equal(bufA[:n], bufB[:m]) {
			return false, nil
		}
		if errA != nil || errB != nil {
			return errA != nil && errB != nil, nil
		}
	}
}

// copyEntry makes a copy in the place of what is there.
func (p *preparation) copyEntry(en entry, to string) error {
	there, err := p.lstat(to)
	if err != nil {
		return err
	}
	if there != nil && there.IsDir() != en.IsDir() {
		if err := p.root.RemoveAll(to); err != nil {
			return err
		}
		there = nil
	}
	switch en.Mode().Type() {
	case fs.ModeDir:
		if there == nil {
			if err := p.parents(to); err != nil {
				return err
			}
			if err := p.root.Mkdir(to, 0o700); err != nil {
				return err
			}
		}
		return p.like(to, en)
	case fs.ModeSymlink:
		target, err := p.root.Readlink(en.path)
		if err != nil {
			return err
		}
		if err := p.parents(to); err != nil {
			return err
		}
		tmp := temporary(to)
		if err := p.root.Symlink(target, tmp); err != nil {
			return err
		}
		if err := p.root.Lchown(tmp, int(en.stat.Uid), int(en.stat.Gid)); err != nil {
			return err
		}
		return p.root.Rename(tmp, to)
	}
	f, err := p.root.Open(en.path)
	if err != nil {
		return err
	}
	defer f.Close()
	return p.put(to, f, func(tmp string) error { return p.like(tmp, en) })
}
