package etcmerge

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/particle-os/particle/converter/tree"
)

// ldCache is derived from the image's libraries (ldconfig(8)): a local one names files
// of the old image.
const ldCache = "/ld.so.cache"

// A result is the merged /etc.
type result struct {
	root *tree.Node
	// local has the paths, below the current /etc, of the files in root whose content
	// is there. All others are in the store, or inline.
	local     map[*tree.Node]string
	conflicts []Conflict
}

// A merger merges three trees that its sums know.
type merger struct {
	*sums
	result
	current string
	links   map[*tree.Node]int          // names of each local file
	made    map[*tree.Node][]*tree.Node // what was made of a file: names that stay links
}

// merge merges the old image's, the new image's and the local /etc; o and n may be nil.
// current is the directory that l was read from.
func merge(s *sums, current string, o, n, l *tree.Node) (*result, error) {
	m := &merger{sums: s, current: current, made: map[*tree.Node][]*tree.Node{}}
	m.local, m.conflicts = map[*tree.Node]string{}, []Conflict{}
	m.links = (&tree.Tree{Root: l}).Links()
	if o == nil {
		o = &tree.Node{Stat: l.Stat} // what /etc itself is, is nobody's change
	}
	if n == nil {
		n = &tree.Node{Stat: o.Stat}
	}
	root, err := m.dir("/", o, n, l)
	if err != nil {
		return nil, err
	}
	m.root = root
	slices.SortStableFunc(m.conflicts, func(a, b Conflict) int { return cmp.Compare(a.Path, b.Path) })
	return &m.result, nil
}

func (m *merger) conflict(p string, why Reason, detail string) {
	m.conflicts = append(m.conflicts, Conflict{Path: etcPath(p), Reason: why, Detail: detail})
}

// A beside is an image's version that is to be kept under another name.
type beside struct {
	name     string
	o, n     *tree.Node
	conflict int // index
}

// name merges what one name is on the three sides, nil where it is nothing. It returns
// what the name becomes, nil for nothing, and whether n is to be kept beside it.
func (m *merger) name(p string, o, n, l *tree.Node) (e *tree.Node, keep bool, err error) {
	switch {
	case l == nil && n == nil:
		return nil, false, nil
	case l == nil && o == nil:
		return m.whole(p, n, false), false, nil
	case l == nil:
		return m.removedHere(p, o, n), false, nil
	case n == nil && o == nil:
		return m.whole(p, l, true), false, nil
	case l.IsDir() && (n != nil && n.IsDir() || n == nil && o.IsDir()):
		e, err = m.dir(p, o, n, l)
		return e, false, err
	case n == nil:
		if m.same(o, l) {
			return nil, false, nil
		}
		m.conflict(p, RemovedByImage, "")
		return m.whole(p, l, true), false, nil
	case l.Type() == n.Type():
		return m.leaf(p, o, n, l)
	// Of two types: nothing of the one can be merged into the other.
	case o != nil && m.same(o, l):
		return m.whole(p, n, false), false, nil
	case o != nil && m.same(o, n):
		return m.whole(p, l, true), false, nil
	}
	m.conflict(p, Both, fmt.Sprintf("here a %s, in the image a %s", typeName(l), typeName(n)))
	return m.whole(p, l, true), true, nil
}

// leaf merges two nodes of one type that are no directories.
func (m *merger) leaf(p string, o, n, l *tree.Node) (e *tree.Node, keep bool, err error) {
	if o != nil && o.Type() != l.Type() {
		o = nil
	}
	local := true
	var merged []byte
	switch {
	case m.sameContent(n, l):
		// The image's needs not be read from a directory that is in use. But names of
		// one local file stay so.
		local = m.links[l] > 1
	case o != nil && m.sameContent(o, l):
		local = false
	case o != nil && m.sameContent(o, n):
	case p == ldCache:
		local = false
		m.conflict(p, Derived, "the image's list of libraries replaces the one made here; run ldconfig where "+etcPath("/ld.so.conf.d")+" has local files")
	default:
		if merged, err = m.records(p, o, n, l); err != nil {
			return nil, false, err
		}
		keep = merged == nil
	}
	base := n
	if local {
		base = l
	}
	st, bad := mergeMeta(o, n, l, base)
	switch {
	case keep:
		m.conflict(p, Both, strings.Join(bad, ", "))
	case bad != nil:
		m.conflict(p, Metadata, strings.Join(bad, ", "))
	}
	if merged != nil {
		e = &tree.Node{Stat: st, File: &tree.File{Size: int64(len(merged)), Inline: merged}}
		return e, false, m.add(e)
	}
	return m.make(p, base, st, local), keep, nil
}

// dir merges directories: l is one, and n or, where n is nil, o. It returns nil where
// the image removed the directory and nothing local is in it.
func (m *merger) dir(p string, o, n, l *tree.Node) (*tree.Node, error) {
	e := &tree.Node{Stat: l.Stat, Dir: map[string]*tree.Node{}}
	if o != nil && !o.IsDir() {
		o = nil
	}
	if n != nil {
		st, bad := mergeMeta(o, n, l, l)
		if bad != nil {
			m.conflict(p, Metadata, strings.Join(bad, ", "))
		}
		e.Stat = st
		e.MtimeSec, e.MtimeNsec = n.MtimeSec, n.MtimeNsec
	}
	var kept []beside
	for _, name := range names(o, n, l) {
		oc, nc, lc := child(o, name), child(n, name), child(l, name)
		c, keep, err := m.name(tree.Join(p, name), oc, nc, lc)
		if err != nil {
			return nil, err
		}
		if c != nil {
			e.Dir[name] = c
		}
		if keep {
			kept = append(kept, beside{name, oc, nc, len(m.conflicts) - 1})
		}
	}
	for _, b := range kept {
		m.keep(p, e, n, l, b)
	}
	if n == nil && len(e.Dir) == 0 {
		if sameMeta(o, l) {
			return nil, nil
		}
		m.conflict(p, RemovedByImage, "")
	}
	return e, nil
}

// removedHere merges what was removed locally: it stays so, but what the image adds to a
// directory that it had is nothing that anybody removed.
func (m *merger) removedHere(p string, o, n *tree.Node) *tree.Node {
	if o.IsDir() && n.IsDir() {
		e := &tree.Node{Stat: n.Stat, Dir: map[string]*tree.Node{}}
		for _, name := range names(n) {
			at, oc, nc := tree.Join(p, name), o.Dir[name], n.Dir[name]
			if oc == nil {
				e.Dir[name] = m.whole(at, nc, false)
			} else if c := m.removedHere(at, oc, nc); c != nil {
				e.Dir[name] = c
			}
		}
		if len(e.Dir) > 0 {
			return e
		}
		if sameMeta(o, n) {
			return nil
		}
	} else if m.same(o, n) {
		return nil
	}
	m.conflict(p, RemovedHere, "")
	return nil
}

func child(dir *tree.Node, name string) *tree.Node {
	if dir == nil {
		return nil
	}
	return dir.Dir[name]
}

// keep puts the image's version of a conflict into the directory e, under a name that is
// free. One that an earlier merge left there, and nobody has changed, is replaced: it is
// the old image's version.
func (m *merger) keep(p string, e, n, l *tree.Node, b beside) {
	for i := 0; ; i++ {
		suffix := Suffix
		if i > 0 {
			suffix = fmt.Sprintf(".%d%s", i, Suffix)
		}
		name := b.name[:min(len(b.name), tree.MaxName-len(suffix))] + suffix
		there := e.Dir[name]
		if there != nil {
			stale := b.o != nil && l.Dir[name] != nil && n.Dir[name] == nil && m.same(b.o, l.Dir[name])
			if !stale && !m.same(b.n, there) {
				continue
			}
		}
		m.conflicts[b.conflict].Kept = etcPath(tree.Join(p, name))
		if there == nil || !m.same(b.n, there) {
			// Not a link to what is in force.
			made := m.made
			m.made = map[*tree.Node][]*tree.Node{}
			e.Dir[name] = m.whole(tree.Join(p, name), b.n, false)
			m.made = made
		}
		return
	}
}

// whole returns a node with all below it, as it is on one side.
func (m *merger) whole(p string, n *tree.Node, local bool) *tree.Node {
	if !n.IsDir() {
		return m.make(p, n, n.Stat, local)
	}
	e := &tree.Node{Stat: n.Stat, Dir: make(map[string]*tree.Node, len(n.Dir))}
	for name, c := range n.Children() {
		e.Dir[name] = m.whole(tree.Join(p, name), c, local)
	}
	return e
}

// make returns a node of the result that has the content of n, a node of the local side
// or of the image. Names of one file stay links where their metadata is the same.
func (m *merger) make(p string, n *tree.Node, st tree.Stat, local bool) *tree.Node {
	e := &tree.Node{Stat: st, File: n.File, Target: n.Target, Rdev: n.Rdev}
	for _, other := range m.made[n] {
		if sameMeta(e, other) {
			return other
		}
	}
	m.made[n] = append(m.made[n], e)
	if local && n.IsRegular() {
		m.local[e] = p
	}
	return e
}

func typeName(n *tree.Node) string {
	switch n.Type() {
	case tree.TypeDir:
		return "directory"
	case tree.TypeRegular:
		return "file"
	case tree.TypeSymlink:
		return "symbolic link"
	case tree.TypeFIFO:
		return "FIFO"
	}
	return "device"
}
