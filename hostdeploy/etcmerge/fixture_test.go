package etcmerge

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// objects is a store in a directory.
type objects struct{ dir string }

func (o objects) OpenObject(d fsverity.Digest) (*os.File, error) {
	return os.Open(filepath.Join(o.dir, d.String()))
}

func (o objects) put(t testing.TB, content string) *tree.File {
	f := &tree.File{Size: int64(len(content))}
	if len(content) <= tree.InlineSize {
		if len(content) > 0 {
			f.Inline = []byte(content)
		}
		return f
	}
	f.Object = fsverity.Sum(fsverity.SHA256, []byte(content))
	name := filepath.Join(o.dir, f.Object.String())
	if _, err := os.Lstat(name); err != nil {
		check(t, os.WriteFile(name, []byte(content), 0o600))
	}
	return f
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A spec describes a tree: paths to nodes. Strings are what stands for a node in tests:
//
//	"text"           a file, mode 0644
//	"mode=600 text"  the same with other permissions
//	"-> target"      a symbolic link
//	"= path"         a link to a file named before, in byte order
//	"fifo"           a FIFO
//	"dir", "dir=700" a directory
type spec map[string]string

// owner of everything in specs: a test without root cannot give files away.
var uid, gid = uint32(os.Getuid()), uint32(os.Getgid())

func (s spec) tree(t testing.TB, o objects) *tree.Node {
	t.Helper()
	root := &tree.Node{Stat: tree.Stat{Mode: tree.DefaultDirMode, UID: uid, GID: gid, MtimeSec: 1e9}, Dir: map[string]*tree.Node{}}
	at := func(p string) (*tree.Node, string) {
		dir, name := filepath.Split(p)
		n := root
		for e := range strings.SplitSeq(strings.Trim(dir, "/"), "/") {
			if e == "" {
				continue
			}
			if n.Dir[e] == nil {
				n.Dir[e] = &tree.Node{Stat: root.Stat, Dir: map[string]*tree.Node{}}
			}
			n = n.Dir[e]
		}
		return n, name
	}
	for _, p := range slices.Sorted(maps.Keys(s)) {
		dir, name := at(p)
		dir.Dir[name] = s.node(t, o, root, s[p])
	}
	return root
}

func (s spec) node(t testing.TB, o objects, root *tree.Node, text string) *tree.Node {
	n := &tree.Node{Stat: tree.Stat{Mode: tree.TypeRegular | 0o644, UID: uid, GID: gid, MtimeSec: 1e9 + 1, MtimeNsec: 5}}
	var perm uint32
	switch {
	case strings.HasPrefix(text, "-> "):
		n.Mode, n.Target = tree.TypeSymlink|0o777, text[3:]
	case strings.HasPrefix(text, "= "):
		n = (&tree.Tree{Root: root}).Lookup(text[2:])
		if n == nil {
			t.Fatalf("%q: no such file before", text)
		}
	case text == "fifo":
		n.Mode = tree.TypeFIFO | 0o644
	case text == "dir":
		n.Mode, n.Dir = tree.DefaultDirMode, map[string]*tree.Node{}
	case strings.HasPrefix(text, "dir="):
		_, err := fmt.Sscanf(text, "dir=%o", &perm)
		check(t, err)
		n.Mode, n.Dir = tree.TypeDir|perm, map[string]*tree.Node{}
	case strings.HasPrefix(text, "mode="):
		_, err := fmt.Sscanf(text, "mode=%o", &perm)
		check(t, err)
		_, text, _ = strings.Cut(text, " ")
		n.Mode = tree.TypeRegular | perm
		n.File = o.put(t, text)
	default:
		n.File = o.put(t, text)
	}
	return n
}

// text is the inverse of tree, links left out. Directories that are not empty and have
// the usual mode do not appear.
func (o objects) text(t testing.TB, root *tree.Node) spec {
	t.Helper()
	s := spec{}
	check(t, (&tree.Tree{Root: root}).Walk(func(p string, n *tree.Node) error {
		switch {
		case p == "/":
		case n.IsDir() && n.Mode != tree.DefaultDirMode:
			s[p] = fmt.Sprintf("dir=%o", n.Mode&permissions)
		case n.IsDir() && len(n.Dir) == 0:
			s[p] = "dir"
		case n.IsDir():
		case n.IsRegular():
			r, err := open(o, n.File)
			check(t, err)
			data, err := io.ReadAll(r)
			check(t, err)
			s[p] = string(data)
			if n.Mode&permissions != 0o644 {
				s[p] = fmt.Sprintf("mode=%o %s", n.Mode&permissions, data)
			}
		case n.Type() == tree.TypeSymlink:
			s[p] = "-> " + n.Target
		case n.Type() == tree.TypeFIFO:
			s[p] = "fifo"
		default:
			s[p] = fmt.Sprintf("type %o", n.Type())
		}
		return nil
	}))
	return s
}

// A fixture is a place for trees.
type fixture struct {
	testing.TB
	objects
	base string
	n    int
}

func newFixture(t testing.TB) *fixture {
	f := &fixture{TB: t, base: t.TempDir()}
	f.objects.dir = filepath.Join(f.base, "objects")
	check(t, os.Mkdir(f.objects.dir, 0o700))
	return f
}

func (f *fixture) path() string {
	f.n++
	return filepath.Join(f.base, fmt.Sprint(f.n))
}

// disk writes a tree to a directory with this package's own writer, which
// TestWriteAsOthers compares with other programs.
func (f *fixture) disk(n *tree.Node) string {
	f.Helper()
	dir := f.path()
	check(f, Fresh(context.Background(), n, f.objects, dir))
	return dir
}

// read reads a directory back, with the contents in the fixture's store.
func (f *fixture) read(dir string) *tree.Node {
	f.Helper()
	root, err := newSums(nil).directory(context.Background(), dir)
	check(f, err)
	check(f, (&tree.Tree{Root: root}).Walk(func(p string, n *tree.Node) error {
		if n.IsRegular() {
			data, err := os.ReadFile(filepath.Join(dir, p))
			check(f, err)
			f.put(f, string(data))
		}
		return nil
	}))
	return root
}

// merge plans and writes a merge; it returns what is in the new directory.
func (f *fixture) merge(o, n, l *tree.Node) (*Merge, *tree.Node) {
	f.Helper()
	m, err := Plan(context.Background(), Input{o, n, f.disk(l), f.objects})
	check(f, err)
	dst := f.path()
	check(f, m.Write(context.Background(), dst))
	return m, f.read(dst)
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
}

func sameBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}
