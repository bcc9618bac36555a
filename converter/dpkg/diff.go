package dpkg

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	version "github.com/knqyf263/go-deb-version"
)

// A Kind says what became of a package.
type Kind string

const (
	Added      Kind = "added"
	Removed    Kind = "removed"
	Upgraded   Kind = "upgraded"
	Downgraded Kind = "downgraded"
	// Changed: another version or architecture, of which none is newer.
	Changed Kind = "changed"
)

// A Change is a package that differs between two databases.
type Change struct {
	Name string `json:"name"`
	Arch string `json:"arch"` // the newer side's, where it has the package
	Kind Kind   `json:"kind"`
	Old  string `json:"old,omitempty"` // version, "" where there was none
	New  string `json:"new,omitempty"`
}

// String returns the change for people: "upgraded libc6:amd64 2.41-11 -> 2.41-12".
func (c Change) String() string {
	s := fmt.Sprintf("%s %s:%s", c.Kind, c.Name, c.Arch)
	switch {
	case c.Old == "":
		return s + " " + c.New
	case c.New == "":
		return s + " " + c.Old
	}
	return s + " " + c.Old + " -> " + c.New
}

// Diff lists what makes the installed packages of b of those of a, in the order of names
// and architectures. A package that one side has for one architecture and the other for
// another one, as from "all" to "amd64", is one change.
func Diff(a, b *Database) []Change {
	changes := []Change{}
	add := func(old, now *Package) {
		c := Change{}
		if old != nil {
			c.Name, c.Arch, c.Old, c.Kind = old.Name, old.Arch, old.Version, Removed
		}
		if now != nil {
			c.Name, c.Arch, c.New, c.Kind = now.Name, now.Arch, now.Version, Added
		}
		if old != nil && now != nil {
			if old.Version == now.Version && old.Arch == now.Arch {
				return
			}
			c.Kind = Changed
			if order, ok := CompareVersions(old.Version, now.Version); ok && order < 0 {
				c.Kind = Upgraded
			} else if ok && order > 0 {
				c.Kind = Downgraded
			}
		}
		changes = append(changes, c)
	}
	x, y := installed(a), installed(b)
	for len(x) > 0 || len(y) > 0 {
		// All of one name from both sides.
		name := ""
		if len(y) == 0 || len(x) > 0 && x[0].Name < y[0].Name {
			name = x[0].Name
		} else {
			name = y[0].Name
		}
		var olds, news []*Package
		olds, x = cut(x, name)
		news, y = cut(y, name)
		if len(olds) == 1 && len(news) == 1 {
			add(olds[0], news[0])
			continue
		}
		for _, old := range olds {
			i := slices.IndexFunc(news, func(p *Package) bool { return p.Arch == old.Arch })
			if i < 0 {
				add(old, nil)
				continue
			}
			add(old, news[i])
			news = slices.Delete(news, i, i+1)
		}
		for _, now := range news {
			add(nil, now)
		}
	}
	slices.SortFunc(changes, func(a, b Change) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Arch, b.Arch))
	})
	return changes
}

func installed(d *Database) []*Package {
	var list []*Package
	for i := range d.Packages {
		if p := &d.Packages[i]; p.Installed() {
			list = append(list, p)
		}
	}
	return list
}

// cut splits off the packages of one name, which are the first or not there.
func cut(list []*Package, name string) (of, rest []*Package) {
	i := 0
	for i < len(list) && list[i].Name == name {
		i++
	}
	return list[:i], list[i:]
}

// CompareVersions orders two versions as `dpkg --compare-versions` does (deb-version(7)):
// negative where a is the older. ok is false where one of them is no version, or has a
// number that does not fit into 63 bits.
func CompareVersions(a, b string) (order int, ok bool) {
	x, err := version.NewVersion(a)
	if err != nil || !fits(a) {
		return 0, false
	}
	y, err := version.NewVersion(b)
	if err != nil || !fits(b) {
		return 0, false
	}
	return cmp.Compare(x.Compare(y), 0), true
}

// fits reports whether all numbers in a version have at most 18 digits: the
// library takes larger ones for equal.
func fits(v string) bool {
	digits := 0
	for i := range len(v) {
		if v[i] < '0' || v[i] > '9' {
			digits = 0
		} else if digits++; digits > 18 {
			return false
		}
	}
	return true
}
