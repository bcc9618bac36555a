package tree

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// A Change is a path at which two trees differ.
type Change struct {
	Path string
	// What says how: "only in the first", "only in the second", or the fields that
	// differ with both values.
	What string
}

func (c Change) String() string { return fmt.Sprintf("%s: %s", quotePath(c.Path), c.What) }

// Diff lists where two trees differ in what a mount shows of them: names, types,
// permissions, owners, times, sizes, contents, targets, device numbers, xattrs and
// which names are links of one file. It returns paths in the order of Walk.
func Diff(a, b *Tree) []Change {
	d := differ{pairs: map[*Node]*Node{}, back: map[*Node]*Node{}}
	d.node("/", a.Root, b.Root)
	return d.changes
}

type differ struct {
	changes []Change
	// Nodes of a and the nodes of b at the same path: links agree when this is a
	// one-to-one relation.
	pairs, back map[*Node]*Node
}

func (d *differ) add(path, format string, args ...any) {
	d.changes = append(d.changes, Change{path, fmt.Sprintf(format, args...)})
}

func (d *differ) node(path string, a, b *Node) {
	if !a.IsDir() && !b.IsDir() {
		if p, ok := d.pairs[a]; ok && p != b {
			d.add(path, "linked to another name in the first only")
		} else if p, ok := d.back[b]; ok && p != a {
			d.add(path, "linked to another name in the second only")
		}
		d.pairs[a], d.back[b] = b, a
	}
	if what := compare(a, b); what != "" {
		d.add(path, "%s", what)
	}
	names := slices.Collect(maps.Keys(a.Dir))
	for name := range b.Dir {
		if _, ok := a.Dir[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		ca, cb := a.Dir[name], b.Dir[name]
		switch p := Join(path, name); {
		case cb == nil:
			d.add(p, "only in the first")
		case ca == nil:
			d.add(p, "only in the second")
		default:
			d.node(p, ca, cb)
		}
	}
}

// compare returns what differs between two nodes apart from children, "" if nothing.
func compare(a, b *Node) string {
	var s []string
	add := func(field, format string, x, y any) {
		if x != y {
			s = append(s, fmt.Sprintf("%s "+format+" and "+format, field, x, y))
		}
	}
	add("mode", "%07o", a.Mode, b.Mode)
	add("uid", "%d", a.UID, b.UID)
	add("gid", "%d", a.GID, b.GID)
	add("mtime", "%s", fmt.Sprintf("%d.%09d", a.MtimeSec, a.MtimeNsec), fmt.Sprintf("%d.%09d", b.MtimeSec, b.MtimeNsec))
	add("target", "%q", a.Target, b.Target)
	if t := a.Type(); t == TypeChar || t == TypeBlock {
		add("device", "%s", fmt.Sprintf("%d:%d", Major(a.Rdev), Minor(a.Rdev)), fmt.Sprintf("%d:%d", Major(b.Rdev), Minor(b.Rdev)))
	}
	if a.IsRegular() && b.IsRegular() && a.File != nil && b.File != nil {
		add("size", "%d", a.File.Size, b.File.Size)
		if a.File.Object != b.File.Object || string(a.File.Inline) != string(b.File.Inline) {
			s = append(s, "content")
		}
	}
	for _, key := range slices.Sorted(maps.Keys(a.Xattrs)) {
		if v, ok := b.Xattrs[key]; !ok || v != a.Xattrs[key] {
			s = append(s, fmt.Sprintf("xattr %s", key))
		}
	}
	for _, key := range slices.Sorted(maps.Keys(b.Xattrs)) {
		if _, ok := a.Xattrs[key]; !ok {
			s = append(s, fmt.Sprintf("xattr %s", key))
		}
	}
	return strings.Join(s, ", ")
}

// quotePath quotes a path that a terminal could not show as it is.
func quotePath(p string) string {
	if q := fmt.Sprintf("%q", p); q[1:len(q)-1] != p {
		return q
	}
	return p
}
