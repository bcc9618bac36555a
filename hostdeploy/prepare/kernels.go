package prepare

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

const (
	modulesDir = "usr/lib/modules"
	// bootDir takes what packages have in /boot besides kernels.
	bootDir = "usr/lib/boot"
	// initrdName is what ostree, bootc and dracut call it beside the kernel.
	initrdName = "initramfs.img"
)

// kernelFile fits the names that kernel packages use in /boot.
var kernelFile = regexp.MustCompile(`^boot/(vmlinuz|vmlinux|config|System\.map|initrd\.img)-([^/]+)$`)

// kernels moves what packages have in /boot into /usr, and leaves links to it: on a host,
// /boot is the boot file system, and has what the boot loader needs of all deployments.
// Kernels go to where other image-based systems have them.
//
// dpkg is told by diversions, as dpkg-divert(1) has them: so dpkg --verify finds the files
// on a host, and a newer package of the same kernel goes to the same place. In builds the
// links serve programs that look into /boot: update-initramfs, linux-version.
func (p *preparation) kernels(ctx context.Context) error {
	if fi, err := p.lstat("boot"); err != nil || !isDir(fi) {
		return err
	}
	if mounted, err := p.mounted("boot"); err != nil {
		return err
	} else if mounted {
		return fmt.Errorf("moving what is in /boot: %w; run particle prepare in a RUN of its own, without --mount", ErrMounted)
	}
	owned, err := p.ownedFiles(ctx)
	if err != nil {
		return err
	}
	if err := p.dropOrphans(owned); err != nil {
		return err
	}
	files, err := p.below(ctx, "boot")
	if err != nil {
		return err
	}
	for _, en := range files {
		switch {
		case en.mount || en.IsDir():
		case en.Mode().IsRegular():
			if err := p.moveBootFile(en, owned); err != nil {
				return err
			}
		case en.Mode().Type() == fs.ModeSymlink:
			if err := p.dropStaleLink(en); err != nil {
				return err
			}
		}
	}
	return p.divert(owned)
}

// isDir takes nil for what is not there.
func isDir(fi fs.FileInfo) bool { return fi != nil && fi.IsDir() }

// bootTarget returns where a file of /boot goes, "" for nowhere.
func (p *preparation) bootTarget(name string, owned map[string]bool) (string, error) {
	if m := kernelFile.FindStringSubmatch(name); m != nil {
		dir := path.Join(modulesDir, m[2])
		if fi, err := p.lstat(dir); err != nil {
			return "", err
		} else if isDir(fi) {
			to := path.Join(dir, m[1])
			if m[1] == "initrd.img" {
				to = path.Join(dir, initrdName)
			}
			if owned[to] {
				return "", nil // packages have it in both places
			}
			return to, nil
		}
	}
	if !owned[name] {
		return "", nil
	}
	return path.Join(bootDir, strings.TrimPrefix(name, "boot/")), nil
}

// moveBootFile moves a file of /boot to its place, and leaves a link. What is there is
// older: only what a build has made since can be in /boot.
func (p *preparation) moveBootFile(en entry, owned map[string]bool) error {
	to, err := p.bootTarget(en.path, owned)
	if err != nil || to == "" {
		return err
	}
	// update-initramfs makes one for each version that it has in its records, and those
	// stay when a kernel is removed without the hooks of initramfs-tools.
	if path.Base(to) == initrdName {
		if gone, err := p.dropInitrd(en, path.Base(path.Dir(to)), owned); gone || err != nil {
			return err
		}
	}
	if there, err := p.lstat(to); err != nil {
		return err
	} else if isDir(there) {
		return fmt.Errorf("moving /%s to /%s: a directory: %w", en.path, to, ErrConflict)
	}
	if !p.will(Move, en.path, "/"+to, "/boot is the boot loader's") {
		return nil
	}
	if err := p.parents(to); err != nil {
		return err
	}
	if err := p.root.Rename(en.path, to); err != nil {
		return err
	}
	target, err := relative(en.path, to)
	if err != nil {
		return err
	}
	return p.root.Symlink(target, en.path)
}

// relative gives a link's target from where it is to a path of the tree.
func relative(link, to string) (string, error) { return filepath.Rel(path.Dir(link), to) }

// dropStaleLink removes a link of ours whose file is gone, as its package is.
func (p *preparation) dropStaleLink(en entry) error {
	target, err := p.root.Readlink(en.path)
	if err != nil {
		return err
	}
	to := path.Join(path.Dir(en.path), target)
	if path.IsAbs(target) || !strings.HasPrefix(to, modulesDir+"/") && !strings.HasPrefix(to, bootDir+"/") {
		return nil
	}
	if have, err := p.exists(to); have || err != nil {
		return err
	}
	return p.removeFiles(en.path, "what it led to is gone", []entry{en})
}

// dropInitrd removes an initramfs of a version whose kernel is gone, and tells whether it
// did.
func (p *preparation) dropInitrd(en entry, version string, owned map[string]bool) (bool, error) {
	if owned[en.path] {
		return false, nil
	}
	dir := path.Join(modulesDir, version)
	for _, name := range []string{path.Join(dir, "vmlinuz"), path.Join(dir, "vmlinux"), "boot/vmlinuz-" + version, "boot/vmlinux-" + version} {
		if have, err := p.exists(name); have || err != nil {
			return false, err
		}
	}
	return true, p.removeFiles(en.path, "its kernel is gone", []entry{en})
}

// dropOrphans removes the initramfs of kernels that are gone, and links in / that lead to
// the /boot of a build.
func (p *preparation) dropOrphans(owned map[string]bool) error {
	initrds, err := p.glob(path.Join(modulesDir, "*", initrdName))
	if err != nil {
		return err
	}
	for _, en := range initrds {
		dir := path.Dir(en.path)
		if gone, err := p.dropInitrd(en, path.Base(dir), owned); err != nil {
			return err
		} else if !gone {
			continue
		}
		if left, err := p.list(dir); err != nil {
			return err
		} else if len(left) == 0 {
			if err := p.remove(dir); err != nil {
				return err
			}
		}
	}
	for _, name := range []string{"initrd.img", "initrd.img.old", "vmlinuz", "vmlinuz.old"} {
		fi, err := p.lstat(name)
		if err != nil {
			return err
		}
		if fi == nil || fi.Mode().Type() != fs.ModeSymlink {
			continue
		}
		target, err := p.root.Readlink(name)
		if err != nil {
			return err
		}
		if !strings.HasPrefix(strings.TrimPrefix(target, "/"), "boot/") {
			continue
		}
		if err := p.removeFiles(name, "it leads into the /boot of the build", []entry{{FileInfo: fi, path: name}}); err != nil {
			return err
		}
	}
	return nil
}

// ownedFiles returns what packages have in /boot, and their files in directories of
// kernels: lines of the package lists of dpkg.
func (p *preparation) ownedFiles(ctx context.Context) (map[string]bool, error) {
	dir := dpkgDir
	if have, err := p.exists(path.Join(dir, "status")); err != nil {
		return nil, err
	} else if !have {
		dir = dpkgLink
	}
	lists, err := p.glob(path.Join(dir, "info", "*.list"))
	if err != nil {
		return nil, err
	}
	owned := map[string]bool{}
	for _, en := range lists {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		data, err := p.root.ReadFile(en.path)
		if err != nil {
			return nil, err
		}
		if !bytes.Contains(data, []byte("\n/boot/")) && !bytes.Contains(data, []byte("/lib/modules/")) {
			continue
		}
		for line := range strings.Lines(string(data)) {
			name := strings.TrimPrefix(strings.TrimSuffix(line, "\n"), "/")
			if strings.HasPrefix(name, "lib/modules/") {
				name = "usr/" + name
			}
			// No module is called as the files that matter: those lie directly there.
			if strings.HasPrefix(name, "boot/") || strings.HasPrefix(name, modulesDir+"/") && strings.Count(name, "/") == 4 {
				owned[name] = true
			}
		}
	}
	return owned, nil
}

// A diversion is an entry of dpkg's file diversions: three lines, the last ":" for one
// that is of no package (dpkg's lib/dpkg/db-fsys-divert.c).
type diversion struct{ from, to, pkg string }

func parseDiversions(data []byte) ([]diversion, error) {
	var all []diversion
	lines := strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
	if len(data) == 0 {
		return nil, nil
	}
	if len(lines)%3 != 0 {
		return nil, fmt.Errorf("%d lines, want three for each diversion", len(lines))
	}
	for d := range slices.Chunk(lines, 3) {
		all = append(all, diversion{d[0], d[1], d[2]})
	}
	return all, nil
}

func formatDiversions(all []diversion) []byte {
	var b bytes.Buffer
	for _, d := range all {
		fmt.Fprintf(&b, "%s\n%s\n%s\n", d.from, d.to, d.pkg)
	}
	return b.Bytes()
}

// divert tells dpkg where the files of /boot are. Diversions of files that no package has
// any more go.
func (p *preparation) divert(owned map[string]bool) error {
	name := path.Join(dpkgDir, "diversions")
	data, err := p.read(name)
	if err != nil {
		return err
	}
	old, err := parseDiversions(data)
	if err != nil {
		return fmt.Errorf("reading /%s: %w", name, err)
	}
	var ours []diversion
	for from := range owned {
		fi, err := p.lstat(from)
		if err != nil {
			return err
		}
		if !strings.HasPrefix(from, "boot/") || isDir(fi) {
			continue
		}
		to, err := p.bootTarget(from, owned)
		if err != nil {
			return err
		}
		if to == "" {
			continue
		}
		if have, err := p.exists(to); err != nil {
			return err
		} else if have {
			ours = append(ours, diversion{"/" + from, "/" + to, ":"})
		}
	}
	slices.SortFunc(ours, func(a, b diversion) int { return strings.Compare(a.from, b.from) })

	// dpkg writes the file in an order of its own: only what is in it counts.
	now := slices.DeleteFunc(slices.Clone(old), func(d diversion) bool {
		return d.pkg == ":" && strings.HasPrefix(d.from, "/boot/") && !slices.Contains(ours, d) &&
			(strings.HasPrefix(d.to, "/"+modulesDir+"/") || strings.HasPrefix(d.to, "/"+bootDir+"/"))
	})
	for _, d := range ours {
		switch i := slices.IndexFunc(now, func(o diversion) bool { return o.from == d.from }); {
		case i < 0:
			now = append(now, d)
		case now[i] != d:
			p.warnf("%s is diverted to %s already: dpkg --verify will miss it on a host", d.from, now[i].to)
		}
	}
	if slices.Equal(now, old) {
		return nil
	}
	return p.write(name, formatDiversions(now), 0o644)
}
