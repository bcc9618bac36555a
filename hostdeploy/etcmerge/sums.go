package etcmerge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/scan"
	"github.com/particle-os/particle/converter/tree"
)

// updated is the one name of /etc itself that no merge has: a stamp that says that
// ldconfig, sysusers and the like have run for this /usr.
const updated = ".updated"

// sums compares contents: the digest of each file of the trees that it has seen.
type sums struct {
	objects Opener
	alg     fsverity.Algorithm
	of      map[*tree.File]fsverity.Digest
}

// newSums takes the algorithm of the trees' objects.
func newSums(objects Opener, trees ...*tree.Node) *sums {
	s := &sums{objects: objects, alg: fsverity.SHA256, of: map[*tree.File]fsverity.Digest{}}
	for _, t := range trees {
		if t == nil {
			continue
		}
		found := errors.New("found")
		if (&tree.Tree{Root: t}).Walk(func(_ string, n *tree.Node) error {
			if n.File == nil || n.File.Object.IsZero() {
				return nil
			}
			s.alg = n.File.Object.Algorithm()
			return found
		}) != nil {
			break
		}
	}
	return s
}

// image returns the part of an image's /etc that merges look at, nil for none.
func (s *sums) image(n *tree.Node) (*tree.Node, error) {
	if n == nil {
		return nil, nil
	}
	if !n.IsDir() {
		return nil, fmt.Errorf("%w: mode %07o", ErrNotDir, n.Mode)
	}
	n = clean(n, true)
	return n, s.add(n)
}

// directory reads a directory on disk, as image.
func (s *sums) directory(ctx context.Context, dir string) (*tree.Node, error) {
	t, err := scan.Dir(ctx, dir, scan.Hash(s.alg), scan.Options{Live: true})
	if errors.Is(err, scan.ErrChanged) {
		err = fmt.Errorf("%w: %w; stop what writes to it", ErrChanged, err)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the current /etc: %w", err)
	}
	n := clean(t.Root, true)
	return n, s.add(n)
}

// clean returns a copy of a directory without sockets and, at the top, without the
// stamp. Other nodes are shared: their identity says which names are links.
func clean(n *tree.Node, top bool) *tree.Node {
	c := *n
	c.Dir = make(map[string]*tree.Node, len(n.Dir))
	for name, child := range n.Dir {
		switch {
		case child.Type() == tree.TypeSocket, top && name == updated:
		case child.IsDir():
			c.Dir[name] = clean(child, false)
		default:
			c.Dir[name] = child
		}
	}
	return &c
}

// add computes the digests of all files in a tree.
func (s *sums) add(root *tree.Node) error {
	return (&tree.Tree{Root: root}).Walk(func(p string, n *tree.Node) error {
		if !n.IsRegular() || n.File == nil {
			return nil
		}
		if _, ok := s.of[n.File]; ok {
			return nil
		}
		if d := n.File.Object; d.Algorithm() == s.alg {
			s.of[n.File] = d
			return nil
		}
		r, err := open(s.objects, n.File)
		if err != nil {
			return fmt.Errorf("%q: %w", p[1:], err)
		}
		defer r.Close()
		d, size, err := fsverity.Read(s.alg, r)
		if err == nil && size != n.File.Size {
			err = fmt.Errorf("%w: got %d bytes, want %d", ErrContent, size, n.File.Size)
		}
		if err != nil {
			return fmt.Errorf("%q: %w", p[1:], err)
		}
		s.of[n.File] = d
		return nil
	})
}

// open opens the content of an image's file.
func open(objects Opener, f *tree.File) (io.ReadCloser, error) {
	switch {
	case f.Inline != nil || f.Size == 0:
		return io.NopCloser(strings.NewReader(string(f.Inline))), nil
	case f.Object.IsZero(): // nothing but holes
		return io.NopCloser(io.LimitReader(zeros{}, f.Size)), nil
	case objects == nil:
		return nil, fmt.Errorf("%w: no store to read object %s from", ErrContent, f.Object)
	}
	return objects.OpenObject(f.Object)
}

// zeros is an endless file of zero bytes.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// sameContent reports whether two nodes have the same type and, for all but
// directories, show the same.
func (s *sums) sameContent(a, b *tree.Node) bool {
	if a.Type() != b.Type() {
		return false
	}
	switch a.Type() {
	case tree.TypeRegular:
		return a.File.Size == b.File.Size && s.of[a.File] == s.of[b.File]
	case tree.TypeSymlink:
		return a.Target == b.Target
	case tree.TypeChar, tree.TypeBlock:
		return a.Rdev == b.Rdev
	}
	return true
}

// same reports whether two nodes are the same with their metadata, and directories with
// all below them.
func (s *sums) same(a, b *tree.Node) bool {
	if !s.sameContent(a, b) || !sameMeta(a, b) || len(a.Dir) != len(b.Dir) {
		return false
	}
	for name, child := range a.Dir {
		if other := b.Dir[name]; other == nil || !s.same(child, other) {
			return false
		}
	}
	return true
}

// diff lists what makes b of a, in the order of paths. Either may be nil.
func (s *sums) diff(a, b *tree.Node) []Change {
	changes := []Change{}
	var walk func(p string, a, b *tree.Node)
	walk = func(p string, a, b *tree.Node) {
		switch {
		case a == nil && b == nil:
			return
		case a == nil:
			changes = append(changes, Change{Path: etcPath(p), Kind: Added})
			a = &tree.Node{}
		case b == nil:
			changes = append(changes, Change{Path: etcPath(p), Kind: Removed})
			b = &tree.Node{}
		default:
			what := metaChanges(a, b)
			if a.Type() != b.Type() {
				what = append([]string{"type"}, what...)
			} else if !s.sameContent(a, b) {
				what = append([]string{"content"}, what...)
			}
			if what != nil {
				changes = append(changes, Change{etcPath(p), Modified, strings.Join(what, ", ")})
			}
		}
		for _, name := range names(a, b) {
			walk(tree.Join(p, name), a.Dir[name], b.Dir[name])
		}
	}
	walk("/", a, b)
	return changes
}

// names returns the names that any of the directories has, in byte order. Nil and other
// nodes have none.
func names(dirs ...*tree.Node) []string {
	all := map[string]bool{}
	for _, d := range dirs {
		if d != nil {
			for name := range d.Dir {
				all[name] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(all))
}
