package prepare

import (
	"context"
	"fmt"
	"io/fs"
	"path"
	"strings"
)

// moved are the directories of the root that belong to the machine: links into /var, by
// the names that ostree gave them. Their targets stay in the image's /var, since dpkg
// would replace a link that leads nowhere by a directory.
//
// /opt and /usr/local are not among them: what an image has there belongs to the image,
// and has to come and go with it.
var moved = []struct {
	name, to string
	mode     fs.FileMode
}{
	{"home", "var/home", 0o755},
	{"media", "var/media", 0o755},
	{"mnt", "var/mnt", 0o755},
	{"root", "var/roothome", 0o700},
	{"srv", "var/srv", 0o755},
}

// mountPoints are the directories of the root that something is mounted on, or that a
// boot needs. /sysroot is where the physical root goes.
var mountPoints = []struct {
	name string
	mode fs.FileMode
}{
	{"boot", 0o755}, {"dev", 0o755}, {"efi", 0o755}, {"etc", 0o755}, {"opt", 0o755}, {"proc", 0o755},
	{"run", 0o755}, {"sys", 0o755}, {"sysroot", 0o755}, {"tmp", 0o777 | fs.ModeSticky},
	{"usr/local", 0o755}, {"var", 0o755}, {"var/tmp", 0o777 | fs.ModeSticky},
}

// layout makes the directories of the root what a read-only root needs.
func (p *preparation) layout(ctx context.Context) error {
	for _, m := range moved {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := p.moveOut(m.name, m.to, m.mode); err != nil {
			return err
		}
	}
	for _, m := range mountPoints {
		if err := p.makeDir(m.name, m.mode); err != nil {
			return err
		}
	}
	return p.tmpMount()
}

// moveOut moves a directory of the root into /var and leaves a link. A link that is there
// already stays, wherever it leads: somebody has decided.
func (p *preparation) moveOut(name, to string, mode fs.FileMode) error {
	fi, err := p.lstat(name)
	if err != nil {
		return err
	}
	if fi != nil && fi.Mode().Type() == fs.ModeSymlink {
		target, err := p.root.Readlink(name)
		if err != nil {
			return err
		}
		if path.Clean(strings.TrimPrefix(target, "/")) != to {
			return nil
		}
	} else if fi != nil {
		if !fi.IsDir() {
			return fmt.Errorf("moving /%s: not a directory: %w", name, ErrConflict)
		}
		mounted, err := p.mounted(name)
		if err != nil {
			return err
		}
		if mounted {
			return fmt.Errorf("moving /%s: %w; run particle prepare in a RUN of its own, without --mount", name, ErrMounted)
		}
		if !p.will(Move, name, "/"+to, "it belongs to the machine") {
			return nil
		}
		if err := p.move(name, to, ""); err != nil {
			return err
		}
		return p.root.Symlink(to, name)
	}
	if err := p.makeDir(to, mode); err != nil {
		return err
	}
	if fi != nil {
		return nil
	}
	return p.link(name, to, "")
}

// tmpMount sees to it that a file system in memory is mounted on /tmp at boot. Debian 13
// does so by itself; Debian 12 and Ubuntu 24.04 have the unit among the examples.
func (p *preparation) tmpMount() error {
	const (
		unit = "usr/lib/systemd/system/tmp.mount"
		wish = "usr/lib/systemd/system/local-fs.target.wants/tmp.mount"
		ours = "usr/share/systemd/tmp.mount"
	)
	masked, err := p.lstat("etc/systemd/system/tmp.mount")
	if err != nil {
		return err
	}
	if masked != nil {
		if to, err := p.root.Readlink("etc/systemd/system/tmp.mount"); err == nil && to == "/dev/null" {
			p.warnf("tmp.mount is masked in /etc/systemd/system: /tmp will be read-only unless something else is mounted there")
		}
		return nil
	}
	for _, dir := range []string{wish, "etc/systemd/system/local-fs.target.wants/tmp.mount"} {
		if fi, err := p.lstat(dir); fi != nil || err != nil {
			return err
		}
	}
	have, err := p.exists(unit)
	if err != nil {
		return err
	}
	if !have {
		data, err := p.read(ours)
		if err != nil {
			return err
		}
		if data == nil {
			return nil // no systemd here, or none that we know
		}
		if err := p.write(unit, data, 0o644); err != nil {
			return err
		}
	}
	return p.link(wish, "../tmp.mount", "/tmp in memory")
}
