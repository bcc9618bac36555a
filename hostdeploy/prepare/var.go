package prepare

import (
	"context"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

const (
	// tmpfilesConf makes on the machine what packages have in the image's /var. Of two
	// lines for one path systemd-tmpfiles takes that of the first file by name, so only
	// paths are in it that no other file has; it comes first because of /home and the
	// like, which others declare and which lead into /var.
	tmpfilesConf = "usr/lib/tmpfiles.d/00-particle.conf"
	// factory has the contents of files that tmpfilesConf copies.
	factory = "usr/share/factory"
)

// seeded are the directories that are copied as a whole where the machine's is missing
// or empty: what somebody removes from them does not come back with the next boot.
var seeded = []string{"var/home", "var/roothome", "var/srv", "var/www"}

// buildState is what only maintainer scripts and apt read, which run in builds, or what
// the machine makes anew by itself.
var buildState = []string{
	"var/cache/debconf/*",
	"var/lib/apt/periodic/*",
	"var/lib/initramfs-tools",
	"var/lib/pam",
	"var/lib/shells.state",
	"var/lib/systemd/catalog/database",
	"var/lib/systemd/deb-systemd-helper-*",
	"var/lib/systemd/deb-systemd-user-helper-*",
	"var/lib/ucf",
}

// largeFactory is the size in bytes from which the copies in /usr/share/factory are
// worth a word.
const largeFactory = 64 << 20

// A variableTree is what becomes of the image's /var.
type variableTree struct {
	lines  []tmpfile
	copies []entry // into the factory, directories before what is in them
	above  map[string]bool
	odd    []string
	size   int64
}

// variable writes the lines of tmpfiles.d for /var and the files that they copy.
func (p *preparation) variable(ctx context.Context) error {
	a, err := p.accounts()
	if err != nil {
		return err
	}
	declared, err := p.declared()
	if err != nil {
		return err
	}
	v := &variableTree{above: map[string]bool{}}
	if err := p.collect(ctx, v, "var", nil, a, declared); err != nil {
		return err
	}
	if len(v.odd) > 0 {
		p.warnf("devices in /var, which upgrades will not make: %s", strings.Join(v.odd, ", "))
	}
	if v.size > largeFactory {
		p.warnf("/%s will hold %d MiB, copies of files in /var: data belongs into /usr, or onto the machine", factory, v.size>>20)
	}

	var b strings.Builder
	b.WriteString("# Written by particle prepare: what packages have in the image's /var, so that it is\n")
	b.WriteString("# there on machines whose /var is older than the image.\n")
	for _, l := range v.lines {
		b.WriteString(l.String() + "\n")
	}
	if err := p.syncFactory(ctx, v); err != nil {
		return err
	}
	return p.write(tmpfilesConf, []byte(b.String()), 0o644)
}

// declared returns the paths that other files of tmpfiles.d make.
func (p *preparation) declared() (map[string]bool, error) {
	paths := map[string]bool{}
	for _, dir := range []string{"etc/tmpfiles.d", "usr/local/lib/tmpfiles.d", "usr/lib/tmpfiles.d"} {
		// /usr/local may be a link, of the author's own.
		dir, err := p.resolve(dir)
		if err != nil {
			return nil, err
		}
		entries, err := p.list(dir)
		if err != nil {
			return nil, err
		}
		for _, en := range entries {
			if en.path == tmpfilesConf || path.Ext(en.Name()) != ".conf" || !en.Mode().IsRegular() {
				continue
			}
			data, err := p.root.ReadFile(en.path)
			if err != nil {
				return nil, err
			}
			for _, l := range parseTmpfiles(string(data)) {
				paths[l.path] = true
			}
		}
	}
	return paths, nil
}

// collect goes through a directory of /var, in the order of names. above are the
// directories that lead to it.
func (p *preparation) collect(ctx context.Context, v *variableTree, dir string, above []entry, a *accounts, declared map[string]bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	entries, err := p.list(dir)
	if err != nil {
		return err
	}
	for _, en := range entries {
		if matchesAny(buildState, en.path) {
			continue
		}
		if slices.Contains(seeded, en.path) {
			if seed, err := p.seed(ctx, v, en); err != nil {
				return err
			} else if seed {
				continue
			}
		}
		name := "/" + en.path
		l := tmpfile{path: name, mode: fmt.Sprintf("%04o", en.stat.Mode&0o7777), user: a.userName(en.stat.Uid), group: a.groupName(en.stat.Gid)}
		switch en.Mode().Type() {
		case fs.ModeDir:
			l.kind = "d"
		case fs.ModeSymlink:
			target, err := p.root.Readlink(en.path)
			if err != nil {
				return err
			}
			l = tmpfile{kind: "L", path: name, argument: target}
			if en.path == dpkgLink {
				// A machine that was installed otherwise has a directory there, with a
				// database that is not true of this image.
				l.kind = "L+"
			}
		case fs.ModeNamedPipe:
			l.kind = "p"
		case fs.ModeSocket:
			continue // its server makes it
		case 0:
			l.kind = "f"
			if en.Size() > 0 {
				l.kind, l.argument = "C", "/"+path.Join(factory, en.path)
				// systemd, up to 257 at least, takes these of a C line for what is there, too.
				l.mode, l.user, l.group = "", notCopied(l.user, en.stat.Uid), notCopied(l.group, en.stat.Gid)
			}
		default:
			v.odd = append(v.odd, name)
			continue
		}
		if !declared[name] {
			v.lines = append(v.lines, l)
			if l.kind == "C" {
				// Who may not read a file for its directory's sake may not read the copy.
				for _, dir := range above {
					if !v.above[dir.path] {
						v.above[dir.path] = true
						v.copies = append(v.copies, dir)
					}
				}
				v.copies, v.size = append(v.copies, en), v.size+en.Size()
			}
		}
		if en.IsDir() && !en.mount {
			if err := p.collect(ctx, v, en.path, append(above[:len(above):len(above)], en), a, declared); err != nil {
				return err
			}
		}
	}
	return nil
}

// notCopied returns the name of an owner, "" for one that the copy of a file has anyway:
// root, the numbers that are the same on each Debian (Debian Policy, 9.2.2), and those
// without a name.
func notCopied(name string, id uint32) string {
	if name == "root" || id < 100 || name == strconv.FormatUint(uint64(id), 10) {
		return ""
	}
	return name
}

// seed has a directory copied as a whole. It reports false for one without anything in
// it. Owners are those of the copy, by number: a line's owner would be that of all files.
func (p *preparation) seed(ctx context.Context, v *variableTree, dir entry) (bool, error) {
	if !dir.IsDir() || dir.mount {
		return false, nil
	}
	below, err := p.below(ctx, dir.path)
	if err != nil || len(below) == 0 {
		return false, err
	}
	v.copies = append(v.copies, dir)
	for _, en := range below {
		switch en.Mode().Type() {
		case 0:
			v.size += en.Size()
			fallthrough
		case fs.ModeDir, fs.ModeSymlink:
			v.copies = append(v.copies, en)
		}
	}
	root := path.Join(factory, dir.path)
	v.lines = append(v.lines, tmpfile{kind: "C", path: "/" + dir.path, argument: "/" + root})
	return true, nil
}

// matchesAny reports whether one of the patterns, as [path.Match] has them, fits.
func matchesAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool {
		ok, err := path.Match(pattern, name)
		return ok && err == nil
	})
}
