package dpkg

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/particle-os/particle/converter/tree"
)

// A Sum is the MD5 of a file as it was packaged.
type Sum struct {
	Path string `json:"path"` // as "/usr/bin/ls"
	MD5  string `json:"md5"`  // hexadecimal
}

// infoFile returns the name of a package's file below the database's directory, "" for
// none. Packages of which several architectures may be installed have it in the name.
func (d *Database) infoFile(p *Package, kind string) string {
	names := []string{"info/" + p.Name + ":" + p.Arch + "." + kind, "info/" + p.Name + "." + kind}
	if p.MultiArch != "same" {
		slices.Reverse(names)
	}
	if d.single {
		names = []string{"status.d/" + p.Name + "." + kind}
	}
	for _, name := range names {
		if n := d.paths.resolve(tree.Join(d.Dir, name)).node; n != nil && n.IsRegular() {
			return name
		}
	}
	return ""
}

// Files returns the paths that belong to a package, directories included, in the order
// of its list; nil where it has none. They are as the package calls them: what may be
// /lib/x there can be /usr/lib/x in the tree.
func (d *Database) Files(p *Package) ([]string, error) {
	if d.single {
		sums, err := d.MD5Sums(p)
		var list []string
		for _, s := range sums {
			list = append(list, s.Path)
		}
		return list, err
	}
	name := d.infoFile(p, "list")
	if name == "" {
		return nil, nil
	}
	text, err := d.file(name, maxList)
	if err != nil {
		return nil, err
	}
	list := make([]string, 0, strings.Count(text, "\n")+1)
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if line == "/." {
			line = "/"
		}
		if !strings.HasPrefix(line, "/") {
			return nil, fmt.Errorf("reading %q: %w: path %s", tree.Join(d.Dir, name), ErrFormat, excerpt(line))
		}
		list = append(list, line)
	}
	return list, nil
}

// MD5Sums returns the digests of a package's files, as far as it has them: conffiles
// are not among them. The paths are as in Files.
func (d *Database) MD5Sums(p *Package) ([]Sum, error) {
	name := d.infoFile(p, "md5sums")
	if name == "" {
		return nil, nil
	}
	text, err := d.file(name, maxList)
	if err != nil {
		return nil, err
	}
	sums, err := parseSums(text)
	if err != nil {
		return nil, fmt.Errorf("reading %q: %w", tree.Join(d.Dir, name), err)
	}
	return sums, nil
}

// parseSums reads lines of a digest, two blanks and a path from the root without its
// slash (deb-md5sums(5)).
func parseSums(text string) ([]Sum, error) {
	sums := make([]Sum, 0, strings.Count(text, "\n")+1)
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		sum, path, ok := strings.Cut(line, " ")
		path = strings.TrimPrefix(strings.TrimLeft(path, " "), "./")
		if b, err := hex.DecodeString(sum); !ok || err != nil || len(b) != 16 || path == "" {
			return nil, fmt.Errorf("%w: line %s", ErrFormat, excerpt(line))
		}
		sums = append(sums, Sum{"/" + strings.TrimPrefix(path, "/"), strings.ToLower(sum)})
	}
	return sums, nil
}

// Owner returns the packages that a path belongs to, in the order of Packages: several
// for most directories, none for what no package has. All names of a file in the tree
// lead to the same: /lib/x and /usr/lib/x where /lib is a link. Where one package's file
// was diverted it belongs to that package under its new name.
//
// The first call reads all lists.
func (d *Database) Owner(path string) ([]*Package, error) {
	index, err := d.owners()
	if err != nil {
		return nil, err
	}
	var list []*Package
	for _, i := range index[d.paths.canonical(path)] {
		list = append(list, &d.Packages[i])
	}
	return list, nil
}

func (d *Database) owners() (map[string][]int32, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.index != nil {
		return d.index, nil
	}
	diverted, err := d.diversions()
	if err != nil {
		return nil, err
	}
	index := map[string][]int32{}
	for i := range d.Packages {
		p := &d.Packages[i]
		files, err := d.Files(p)
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			if v, ok := diverted[f]; ok && v.by != p.Name {
				f = v.to
			}
			key := d.paths.canonical(f)
			if had := index[key]; len(had) == 0 || had[len(had)-1] != int32(i) {
				index[key] = append(had, int32(i))
			}
		}
	}
	d.index = index
	return index, nil
}

// A diversion is another name for the file that packages other than one have at a path.
type diversion struct{ to, by string }

// diversions reads the file of that name: triples of lines, a path, its other name and
// the package that keeps the path; ":" is no package but the administrator.
func (d *Database) diversions() (map[string]diversion, error) {
	path := tree.Join(d.Dir, "diversions")
	if d.paths.resolve(path).node == nil {
		return nil, nil
	}
	text, err := d.file("diversions", maxList)
	if err != nil {
		return nil, err
	}
	v, err := parseDiversions(text)
	if err != nil {
		return nil, fmt.Errorf("reading %q: %w", path, err)
	}
	return v, nil
}

func parseDiversions(text string) (map[string]diversion, error) {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if text == "" {
		return nil, nil
	}
	if len(lines)%3 != 0 {
		return nil, fmt.Errorf("%w: %d lines, want three for each diversion", ErrFormat, len(lines))
	}
	v := make(map[string]diversion, len(lines)/3)
	for t := range slices.Chunk(lines, 3) {
		if !strings.HasPrefix(t[0], "/") || !strings.HasPrefix(t[1], "/") {
			return nil, fmt.Errorf("%w: diversion of %s to %s", ErrFormat, excerpt(t[0]), excerpt(t[1]))
		}
		v[t[0]] = diversion{t[1], t[2]}
	}
	return v, nil
}
