package prepare

import (
	"context"
	"embed"
	"fmt"
	"io/fs"
	"path"
	"strings"
)

// rootfs has the files that every prepared tree gets, each with its reason in it. They
// are in /usr where that is possible, so that upgrades bring newer ones.
//
//go:embed rootfs
var rootfs embed.FS

// links are the links that every prepared tree gets. Those in .wants directories make
// the units part of a boot; presets are not asked, since a machine with an empty
// /etc/machine-id has no first boot in systemd's sense (machine-id(5)).
var links = []struct{ name, target string }{
	{"usr/lib/systemd/system/ssh.service.wants/particle-ssh-keys.service", "../particle-ssh-keys.service"},
	{"usr/lib/systemd/system/ssh.socket.wants/particle-ssh-keys.service", "../particle-ssh-keys.service"},
	{"usr/lib/systemd/system/sysinit.target.wants/particle-build-stubs.service", "../particle-build-stubs.service"},
	// It makes /home and /srv, which are links now, and complains at each boot.
	{"etc/tmpfiles.d/home.conf", "/dev/null"},
}

// files writes rootfs.
func (p *preparation) files(context.Context) error {
	err := fs.WalkDir(rootfs, "rootfs", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := rootfs.ReadFile(name)
		if err != nil {
			return err
		}
		return p.write(strings.TrimPrefix(name, "rootfs/"), data, 0o644)
	})
	if err != nil {
		return err
	}
	for _, l := range links {
		// A file of the image author's own in that place stays.
		if fi, err := p.lstat(l.name); err != nil {
			return err
		} else if fi != nil && fi.Mode().IsRegular() {
			continue
		}
		if err := p.link(l.name, l.target, ""); err != nil {
			return err
		}
	}
	return p.machineID()
}

// machineID empties /etc/machine-id. "uninitialized" stays: whoever wrote it wants a
// first boot in systemd's sense, with all its presets.
func (p *preparation) machineID() error {
	const name = "etc/machine-id"
	fi, err := p.lstat(name)
	if err != nil {
		return err
	}
	if fi != nil {
		if mounted, err := p.mounted(name); mounted || err != nil {
			return err
		}
		if fi.IsDir() {
			return fmt.Errorf("emptying /%s: a directory: %w", name, ErrConflict)
		}
		if fi.Mode().IsRegular() && fi.Size() == 0 {
			return nil
		}
		if data, err := p.root.ReadFile(name); err == nil && strings.TrimSpace(string(data)) == "uninitialized" {
			return nil
		}
	}
	return p.write(name, nil, 0o444)
}

// glob returns what a pattern of [path.Match] stands for, element by element, in the
// order of names, but for what is behind a mount.
func (p *preparation) glob(pattern string) ([]entry, error) {
	dir, last := path.Split(pattern)
	dirs := []string{path.Clean("./" + dir)}
	if !strings.ContainsAny(dir, `*?[\`) {
		if behind, err := p.behindMount(dirs[0]); behind || err != nil {
			return nil, err
		}
	} else {
		parents, err := p.glob(path.Clean(dir))
		if err != nil {
			return nil, err
		}
		dirs = nil
		for _, d := range parents {
			if d.IsDir() && !d.mount {
				dirs = append(dirs, d.path)
			}
		}
	}
	var found []entry
	for _, d := range dirs {
		entries, err := p.list(d)
		if err != nil {
			return nil, err
		}
		for _, en := range entries {
			if ok, err := path.Match(last, en.Name()); err != nil {
				return nil, err
			} else if ok {
				found = append(found, en)
			}
		}
	}
	return found, nil
}
