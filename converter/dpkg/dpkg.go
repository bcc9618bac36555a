// Package dpkg reads the dpkg database of a tree: which packages are in it, their
// versions, files and configuration files (dpkg(1), "FILES"; deb822(5)).
//
// The database is where dpkg has it, /var/lib/dpkg, or where images keep it that are
// upgraded as a whole, /usr/lib/sysimage/dpkg; symbolic links in the tree are followed
// inside it. Images without dpkg that have a file for each package in
// /var/lib/dpkg/status.d (distroless ones) are read as well.
//
// Paths compare as the tree shows them: what a package's list calls /lib/x is /usr/lib/x
// in a tree whose /lib is a link to usr/lib, and files that dpkg-divert(1) renamed count
// under the new name.
//
// Read takes the packages only. Lists of files are read when they are first asked for.
//
// Left out: writing, dependencies as more than text, triggers, statoverride and the
// available packages of repositories.
package dpkg

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// Errors of this package; test with errors.Is.
var (
	// ErrNoDatabase: the tree has no dpkg database.
	ErrNoDatabase = errors.New("no dpkg database")
	// ErrFormat: a file of the database is not what dpkg writes.
	ErrFormat = errors.New("bad dpkg database")
	// ErrTooLarge: a file of the database is larger than any real one.
	ErrTooLarge = errors.New("file of the dpkg database is too large")
)

// Limits in bytes. A desktop with 3,000 packages has a status of 4 MB, and lists of
// less than 10 MB; the list of one package has up to 3 MB.
const (
	maxStatus = 64 << 20
	maxList   = 32 << 20
)

// An Opener opens the contents of a tree's files: a store or a transaction.
type Opener interface {
	OpenObject(fsverity.Digest) (*os.File, error)
}

// A Package is one that the database knows.
type Package struct {
	Name    string `json:"name"`
	Arch    string `json:"arch"` // as "amd64" or "all"
	Version string `json:"version"`
	// Want, Flag and State are the three words of Status (dpkg(1), "INFORMATION ABOUT
	// PACKAGES"), as "install", "ok", "installed".
	Want  string `json:"want"`
	Flag  string `json:"flag"`
	State string `json:"state"`
	// Source and SourceVersion are those of the package itself where the database names
	// no others.
	Source        string `json:"source"`
	SourceVersion string `json:"sourceVersion"`
	Section       string `json:"section,omitempty"`
	Priority      string `json:"priority,omitempty"`
	Maintainer    string `json:"maintainer,omitempty"`
	Homepage      string `json:"homepage,omitempty"`
	Synopsis      string `json:"synopsis,omitempty"`      // first line of the description
	MultiArch     string `json:"multiArch,omitempty"`     // "same", "foreign", "allowed" or ""
	InstalledSize int64  `json:"installedSize,omitempty"` // KiB, an estimate; 0 where unknown
	Essential     bool   `json:"essential,omitempty"`
	// Conffiles are in the order of the database.
	Conffiles []Conffile `json:"conffiles,omitempty"`
	// Fields is all that the database says, the above included.
	Fields Paragraph `json:"-"`
}

// A Conffile is a configuration file that dpkg does not overwrite where it was changed
// (deb-conffiles(5)).
type Conffile struct {
	Path string `json:"path"`
	// MD5 is that of the packaged version, in hexadecimal, "newconffile" while the
	// package is being installed.
	MD5 string `json:"md5"`
	// Obsolete: the package's present version has it no more.
	Obsolete bool `json:"obsolete,omitempty"`
	// RemoveOnUpgrade: dpkg will remove it.
	RemoveOnUpgrade bool `json:"removeOnUpgrade,omitempty"`
}

// Installed reports whether the package has files in the tree, configured or not. Of
// others the database keeps configuration files or a selection only.
func (p *Package) Installed() bool {
	return p.State != "not-installed" && p.State != "config-files" && p.State != ""
}

// String returns the name as dpkg prints it: with the architecture where there may be
// several of them.
func (p *Package) String() string {
	if p.MultiArch == "same" {
		return p.Name + ":" + p.Arch
	}
	return p.Name
}

// A Database is the packages of a tree. Its methods may be called side by side.
type Database struct {
	// Packages is sorted by name and architecture, in byte order.
	Packages []Package
	// Dir is the directory of the database, links in the tree resolved.
	Dir string

	paths   *paths
	objects Opener
	single  bool // status.d: one file a package, and no lists but md5sums

	mu    sync.Mutex
	index map[string][]int32 // of a path to Packages
}

// Read reads the packages of a tree. Errors are ErrNoDatabase, ErrFormat, ErrTooLarge
// and those of the opener.
func Read(t *tree.Tree, objects Opener) (*Database, error) {
	d := &Database{paths: newPaths(t), objects: objects}
	for _, dir := range []string{"/var/lib/dpkg", "/usr/lib/sysimage/dpkg"} {
		at := d.paths.resolve(dir)
		if at.node == nil || !at.node.IsDir() {
			continue
		}
		d.Dir = at.path
		if d.paths.resolve(tree.Join(at.path, "status")).node != nil {
			return d, d.readStatus()
		}
		if n := d.paths.resolve(tree.Join(at.path, "status.d")).node; n != nil && n.IsDir() {
			d.single = true
			return d, d.readSingle(n)
		}
	}
	return nil, fmt.Errorf("%w: neither /var/lib/dpkg nor /usr/lib/sysimage/dpkg has a status file", ErrNoDatabase)
}

// readStatus reads status and what updates/ has on top of it: dpkg writes its changes
// there first, as files whose names are numbers of equal length.
func (d *Database) readStatus() error {
	var all []Package
	add := func(name string) error {
		text, err := d.file(name, maxStatus)
		if err != nil {
			return err
		}
		paragraphs, err := Parse(text)
		if err != nil {
			return fmt.Errorf("reading %q: %w", tree.Join(d.Dir, name), err)
		}
		all = slices.Grow(all, len(paragraphs))
		for _, p := range paragraphs {
			pkg, err := newPackage(p)
			if err != nil {
				return fmt.Errorf("reading %q: %w", tree.Join(d.Dir, name), err)
			}
			all = append(all, pkg)
		}
		return nil
	}
	if err := add("status"); err != nil {
		return err
	}
	if updates := d.paths.resolve(tree.Join(d.Dir, "updates")).node; updates != nil {
		for name := range updates.Children() {
			if strings.Trim(name, "0123456789") != "" {
				continue
			}
			if err := add("updates/" + name); err != nil {
				return err
			}
		}
	}
	d.set(all)
	return nil
}

// readSingle reads status.d.
func (d *Database) readSingle(dir *tree.Node) error {
	var all []Package
	for name := range dir.Children() {
		if strings.HasSuffix(name, ".md5sums") {
			continue
		}
		file := "status.d/" + name
		text, err := d.file(file, maxStatus)
		if err != nil {
			return err
		}
		paragraphs, err := Parse(text)
		if err != nil {
			return fmt.Errorf("reading %q: %w", tree.Join(d.Dir, file), err)
		}
		for _, p := range paragraphs {
			pkg, err := newPackage(p)
			if err != nil {
				return fmt.Errorf("reading %q: %w", tree.Join(d.Dir, file), err)
			}
			if pkg.State == "" {
				pkg.Want, pkg.Flag, pkg.State = "install", "ok", "installed"
			}
			all = append(all, pkg)
		}
	}
	d.set(all)
	return nil
}

// set takes packages; of those with one name and architecture the last counts.
func (d *Database) set(all []Package) {
	slices.SortStableFunc(all, func(a, b Package) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Arch, b.Arch))
	})
	d.Packages = []Package{}
	for i := range all {
		if i+1 < len(all) && all[i].Name == all[i+1].Name && all[i].Arch == all[i+1].Arch {
			continue
		}
		d.Packages = append(d.Packages, all[i])
	}
}

// Package returns a package by its name, or name and architecture as "libc6:amd64"; nil
// for none. Of several architectures the first in byte order is returned, an installed
// one before others.
func (d *Database) Package(name string) *Package {
	name, arch, exact := strings.Cut(name, ":")
	i, _ := slices.BinarySearchFunc(d.Packages, name, func(p Package, name string) int { return strings.Compare(p.Name, name) })
	var found *Package
	for ; i < len(d.Packages) && d.Packages[i].Name == name; i++ {
		p := &d.Packages[i]
		switch {
		case exact && p.Arch != arch:
		case found == nil, p.Installed() && !found.Installed():
			found = p
		}
	}
	return found
}

// newPackage makes a Package of its paragraph.
func newPackage(f Paragraph) (Package, error) {
	p := Package{Fields: f}
	var status, source, size, conffiles string
	for _, field := range f {
		v := field.Value
		switch strings.ToLower(field.Name) {
		case "package":
			p.Name = v
		case "architecture":
			p.Arch = v
		case "version":
			p.Version = v
		case "status":
			status = v
		case "source":
			source = v
		case "section":
			p.Section = v
		case "priority":
			p.Priority = v
		case "maintainer":
			p.Maintainer = v
		case "homepage":
			p.Homepage = v
		case "description":
			p.Synopsis, _, _ = strings.Cut(v, "\n")
		case "multi-arch":
			if v != "no" {
				p.MultiArch = v
			}
		case "installed-size":
			size = v
		case "essential":
			p.Essential = v == "yes"
		case "conffiles":
			conffiles = v
		}
	}
	// Both go into names of files.
	if !isName(p.Name, "-+._") {
		return p, fmt.Errorf("%w: package name %s", ErrFormat, excerpt(p.Name))
	}
	if p.Arch != "" && !isName(p.Arch, "-") {
		return p, fmt.Errorf("%w: package %s: architecture %s", ErrFormat, p.Name, excerpt(p.Arch))
	}
	if words := strings.Fields(status); len(words) == 3 {
		p.Want, p.Flag, p.State = words[0], words[1], words[2]
	} else if status != "" {
		return p, fmt.Errorf("%w: package %s: status %s: want three words", ErrFormat, p.Name, excerpt(status))
	}
	// A size that is none is ignored: dpkg keeps it as text, too.
	if n, err := strconv.ParseInt(size, 10, 64); err == nil && n > 0 {
		p.InstalledSize = n
	}
	p.Source, p.SourceVersion = p.Name, p.Version
	if source != "" {
		name, version, ok := strings.Cut(source, " ")
		p.Source = name
		if ok {
			p.SourceVersion = strings.Trim(version, "() ")
		}
	}
	var err error
	p.Conffiles, err = parseConffiles(conffiles)
	if err != nil {
		return p, fmt.Errorf("package %s: %w", p.Name, err)
	}
	return p, nil
}

// parseConffiles reads lines of a path, which may have blanks in it, a digest and flags.
func parseConffiles(text string) ([]Conffile, error) {
	if text == "" {
		return nil, nil
	}
	var list []Conffile
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		var c Conffile
		for {
			i := strings.LastIndexByte(line, ' ')
			if i <= 0 {
				return nil, fmt.Errorf("%w: conffile %s", ErrFormat, excerpt(line))
			}
			word := line[i+1:]
			line = line[:i]
			if word == "obsolete" && !c.Obsolete {
				c.Obsolete = true
			} else if word == "remove-on-upgrade" && !c.RemoveOnUpgrade {
				c.RemoveOnUpgrade = true
			} else {
				c.MD5 = word
				break
			}
		}
		if c.Path = strings.TrimRight(line, " "); !strings.HasPrefix(c.Path, "/") {
			return nil, fmt.Errorf("%w: conffile %s", ErrFormat, excerpt(line))
		}
		list = append(list, c)
	}
	return list, nil
}

// isName reports whether s consists of ASCII letters, digits and the characters of more,
// and begins with one of the former, as dpkg has names.
func isName(s, more string) bool {
	for i := range len(s) {
		c := s[i]
		alnum := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		if !alnum && (i == 0 || strings.IndexByte(more, c) < 0) {
			return false
		}
	}
	return s != ""
}

// file reads a file of the database.
func (d *Database) file(name string, limit int64) (string, error) {
	path := tree.Join(d.Dir, name)
	n := d.paths.resolve(path).node
	if n == nil || !n.IsRegular() {
		return "", fmt.Errorf("reading %q: %w: no such file", path, ErrFormat)
	}
	r, err := open(d.objects, n.File)
	if err != nil {
		return "", fmt.Errorf("reading %q: %w", path, err)
	}
	defer r.Close()
	if n.File.Size > limit {
		return "", fmt.Errorf("reading %q: %w: %d bytes, at most %d", path, ErrTooLarge, n.File.Size, limit)
	}
	var b strings.Builder
	b.Grow(int(n.File.Size))
	if _, err := io.Copy(&b, io.LimitReader(r, n.File.Size)); err != nil {
		return "", fmt.Errorf("reading %q: %w", path, err)
	}
	return b.String(), nil
}

func open(objects Opener, f *tree.File) (io.ReadCloser, error) {
	if f.Object.IsZero() { // inline, or nothing but holes, which no file here is
		return io.NopCloser(strings.NewReader(string(f.Inline))), nil
	}
	return objects.OpenObject(f.Object)
}
