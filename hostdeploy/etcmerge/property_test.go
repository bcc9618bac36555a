package etcmerge

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/tree"
)

// A generator makes random trees that have much in common.
type generator struct {
	*rand.Rand
	t testing.TB
	o objects
}

var treeNames = []string{"a", "b", "conf.d", "hosts", "x"}

func (g *generator) content() string {
	s := fmt.Sprintf("content %d\n", g.IntN(6))
	if g.IntN(3) == 0 {
		s = strings.Repeat(s, 20) // an object
	}
	return s
}

func (g *generator) stat(kind uint32) tree.Stat {
	st := tree.Stat{Mode: kind | []uint32{0o644, 0o600, 0o755}[g.IntN(3)], UID: uid, GID: gid, MtimeSec: int64(g.IntN(3)), MtimeNsec: uint32(g.IntN(3))}
	if kind == tree.TypeSymlink {
		st.Mode = kind | 0o777
	}
	return st
}

func (g *generator) node(depth int) *tree.Node {
	switch k := g.IntN(10); {
	case k < 4 && depth > 0:
		n := &tree.Node{Stat: g.stat(tree.TypeDir), Dir: map[string]*tree.Node{}}
		for _, name := range treeNames {
			if g.IntN(2) == 0 {
				n.Dir[name] = g.node(depth - 1)
			}
		}
		return n
	case k == 4:
		return &tree.Node{Stat: g.stat(tree.TypeSymlink), Target: fmt.Sprint("target", g.IntN(3))}
	case k == 5:
		return &tree.Node{Stat: g.stat(tree.TypeFIFO)}
	}
	return &tree.Node{Stat: g.stat(tree.TypeRegular), File: g.o.put(g.t, g.content())}
}

func (g *generator) tree() *tree.Node {
	n := g.node(3)
	for !n.IsDir() {
		n = g.node(3)
	}
	return n
}

// mutate returns a tree that differs in a few places; the argument stays.
func (g *generator) mutate(n *tree.Node, depth, often int) *tree.Node {
	c := *n
	switch g.IntN(often) {
	case 0:
		if !n.IsDir() {
			return g.node(depth)
		}
		c.Stat = g.stat(tree.TypeDir)
	case 1:
		if n.Type() != tree.TypeSymlink {
			c.Stat = g.stat(n.Type())
		}
	}
	if n.IsDir() {
		c.Dir = map[string]*tree.Node{}
		for _, name := range treeNames {
			child := n.Dir[name]
			switch {
			case child == nil && depth > 0 && g.IntN(often) == 0:
				c.Dir[name] = g.node(depth - 1)
			case child != nil && g.IntN(often) != 0:
				c.Dir[name] = g.mutate(child, depth-1, often)
			}
		}
		// Sometimes two names of one file.
		if a, b := c.Dir["a"], c.Dir["b"]; a != nil && b != nil && a.IsRegular() && g.IntN(4) == 0 {
			c.Dir["b"] = a
		}
	}
	return &c
}

// plan merges trees without a disk.
func plan(t testing.TB, o objects, a, n, l *tree.Node) (*sums, *result) {
	t.Helper()
	s := newSums(o, a, n, l)
	var clean [3]*tree.Node
	for i, x := range []*tree.Node{a, n, l} {
		var err error
		clean[i], err = s.image(x)
		check(t, err)
	}
	r, err := merge(s, "/nowhere", clean[0], clean[1], clean[2])
	check(t, err)
	return s, r
}

// key is what of a node a merge must not lose: "" for directories.
func (s *sums) key(n *tree.Node) string {
	switch n.Type() {
	case tree.TypeDir:
		return ""
	case tree.TypeRegular:
		return "file " + s.of[n.File].String()
	}
	return fmt.Sprintf("%o %s %d", n.Type(), n.Target, n.Rdev)
}

func walk(n *tree.Node, fn func(p string, n *tree.Node)) {
	(&tree.Tree{Root: n}).Walk(func(p string, n *tree.Node) error { fn(p, n); return nil })
}

// TestLaws checks, for random trees, what any three-way merge must fulfil.
func TestLaws(t *testing.T) {
	f := newFixture(t)
	conflicts, clean := 0, 0
	for seed := range uint64(1500) {
		g := &generator{rand.New(rand.NewPCG(seed, 1)), t, f.objects}
		often := 3 + g.IntN(20)
		o := g.tree()
		n, l := g.mutate(o, 3, often), g.mutate(o, 3, often)
		fail := func(format string, args ...any) {
			t.Helper()
			t.Fatalf("seed %d: %s\nold   %q\nnew   %q\nlocal %q", seed, fmt.Sprintf(format, args...), f.text(t, o), f.text(t, n), f.text(t, l))
		}

		// What one side did alone is done, without a conflict.
		if s, r := plan(t, f.objects, o, n, o); !s.same(r.root, n) || len(r.conflicts) != 0 {
			fail("unchanged locally: got %q, %v", f.text(t, r.root), r.conflicts)
		}
		if s, r := plan(t, f.objects, o, o, l); !s.same(r.root, l) || len(r.conflicts) != 0 {
			fail("unchanged by the image: got %q, %v", f.text(t, r.root), r.conflicts)
		}
		if s, r := plan(t, f.objects, o, l, l); !s.same(r.root, l) || len(r.conflicts) != 0 {
			fail("the same on both sides: got %q, %v", f.text(t, r.root), r.conflicts)
		}

		s, r := plan(t, f.objects, o, n, l)
		// The same twice, and again with what came out.
		if _, again := plan(t, f.objects, o, n, l); !s.same(r.root, again.root) || !slices.Equal(r.conflicts, again.conflicts) {
			fail("not the same twice")
		}
		if s, again := plan(t, f.objects, n, n, r.root); !s.same(r.root, again.root) || len(again.conflicts) != 0 {
			fail("a second merge changes %v", s.diff(r.root, again.root))
		}

		// Without conflicts the sides may be exchanged.
		_, back := plan(t, f.objects, o, l, n)
		if len(r.conflicts) == 0 {
			clean++
			if !s.same(r.root, back.root) || len(back.conflicts) != 0 {
				fail("not symmetric: got %q and %q, %v", f.text(t, r.root), f.text(t, back.root), back.conflicts)
			}
		} else {
			conflicts++
		}

		// Each local change is at its place, and each of the image there or beside.
		kept := map[string]string{}
		removed := map[string]bool{}
		for _, c := range r.conflicts {
			if c.Kept != "" {
				kept[c.Path] = c.Kept
			}
			removed[c.Path] = c.Reason == RemovedHere
		}
		at := func(root *tree.Node, p string) *tree.Node { return (&tree.Tree{Root: root}).Lookup(p) }
		walk(l, func(p string, x *tree.Node) {
			was := at(o, p)
			got := at(r.root, p)
			if (was == nil || s.key(was) != s.key(x)) && (got == nil || s.key(got) != s.key(x)) {
				fail("%s: the local %q was lost: got %v", p, s.key(x), got)
			}
			if was != nil && !sameMeta(was, x) && (got == nil || got.Type() == x.Type() && meta(got)["mode"] != meta(x)["mode"] && meta(was)["mode"] != meta(x)["mode"]) {
				fail("%s: the local metadata was lost", p)
			}
		})
		walk(o, func(p string, was *tree.Node) {
			got := at(r.root, p)
			if at(l, p) == nil && got != nil && !(was.IsDir() && got.IsDir()) {
				fail("%s: was removed locally and is back", p)
			}
		})
		walk(n, func(p string, x *tree.Node) {
			was := at(o, p)
			if was != nil && s.key(was) == s.key(x) {
				return
			}
			place := p
			for dir := p; dir != "/"; dir = dir[:max(1, strings.LastIndexByte(dir, '/'))] {
				if removed["/etc"+dir] {
					return
				}
				if k, ok := kept["/etc"+dir]; ok {
					place = strings.TrimPrefix(k, "/etc") + strings.TrimPrefix(p, dir)
				}
			}
			got := at(r.root, place)
			if got == nil || s.key(got) != s.key(x) {
				fail("%s: the image's %q was lost: at %s got %v; conflicts %v", p, s.key(x), place, got, r.conflicts)
			}
		})
		// Local files are read from where they are.
		for x, p := range r.local {
			if from := at(l, p); from == nil || s.key(from) != s.key(x) {
				fail("%s: would be read from another file", p)
			}
		}
	}
	if conflicts < 100 || clean < 100 {
		t.Errorf("%d merges with and %d without conflicts: the test shows little", conflicts, clean)
	}
}

// TestWriteRandom writes random merges and reads them back.
func TestWriteRandom(t *testing.T) {
	needRoot(t) // for directories that may not be entered
	f := newFixture(t)
	for seed := range uint64(20) {
		g := &generator{rand.New(rand.NewPCG(seed, 2)), t, f.objects}
		o := g.tree()
		n, l := g.mutate(o, 3, 6), g.mutate(o, 3, 6)
		s, want := plan(t, f.objects, o, n, l)
		m, got := f.merge(o, n, l)
		check(t, s.add(got))
		if d := tree.Diff(&tree.Tree{Root: times(want.root)}, &tree.Tree{Root: times(got)}); len(d) != 0 {
			// Digests of small files are not in both trees.
			if !s.same(want.root, got) {
				t.Fatalf("seed %d: %v", seed, d)
			}
		}
		if !slices.Equal(m.Conflicts, want.conflicts) {
			t.Fatalf("seed %d: conflicts: got %v, want %v", seed, m.Conflicts, want.conflicts)
		}
		dir := f.disk(l)
		changes, err := Changes(context.Background(), o, dir)
		check(t, err)
		if !slices.Equal(changes, m.Local) {
			t.Fatalf("seed %d: Changes: got %v, want %v", seed, changes, m.Local)
		}
	}
}

// times leaves out the times of directories, which a local one may have changed.
func times(n *tree.Node) *tree.Node {
	c := *n
	if n.IsDir() {
		c.MtimeSec, c.MtimeNsec = 0, 0
		c.Dir = maps.Clone(n.Dir)
		for name, child := range c.Dir {
			if child.IsDir() {
				c.Dir[name] = times(child)
			}
		}
	}
	return &c
}
