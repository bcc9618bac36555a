package erofs_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/dump"
	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/tree"
)

func readErr(image []byte) error {
	_, err := erofs.Read(bytes.NewReader(image), int64(len(image)))
	return err
}

// TestHostile has images that are wrong in one point each.
func TestHostile(t *testing.T) {
	const nid = 64 // of a child of the root
	reg := ent{"f", nid, isReg}
	for _, c := range []struct {
		name  string
		image func() []byte
		kind  error
		want  string
	}{
		{"empty", func() []byte { return nil }, erofs.ErrNotComposefs, "got 0 bytes, want at least 4096"},
		{"zeros", func() []byte { return make([]byte, 8192) }, erofs.ErrNotComposefs, "magic number is 0x0"},
		{"not EROFS", func() []byte {
			b := emptyV2()
			b[1024]++
			return b
		}, erofs.ErrNotComposefs, "EROFS magic number"},
		{"version 3", func() []byte { return newImage(3, 1).b }, erofs.ErrUnsupported, "composefs version is 3, want 0, 1 or 2"},
		{"header version", func() []byte {
			b := emptyV2()
			b[4] = 2
			return b
		}, erofs.ErrUnsupported, "header version is 2, want 1"},
		{"block size", func() []byte {
			b := emptyV2()
			b[1036] = 9
			return b
		}, erofs.ErrUnsupported, "blocks of 2^9 bytes"},
		{"features", func() []byte {
			b := emptyV2()
			b[1024+80] = 1
			return b
		}, erofs.ErrUnsupported, "EROFS features 0x1"},
		{"root beyond the end", func() []byte {
			b := emptyV2()
			le.PutUint16(b[1038:], 60000)
			return b
		}, erofs.ErrCorrupt, "inode 60000 lies beyond its end"},
		{"inodes beyond the end", func() []byte {
			b := emptyV2()
			le.PutUint32(b[1064:], 1<<31)
			return b
		}, erofs.ErrCorrupt, "it refers to 32 bytes at"},
		{"root is a file", func() []byte {
			a := newImage(1, 1)
			a.inode(rootNid, plain, 0o100644, 0, 0, "", "")
			return a.b
		}, erofs.ErrCorrupt, "the root is not a directory"},
		{"no entries", func() []byte {
			a := newImage(1, 1)
			a.inode(rootNid, plain, 0o40755, 0, 0, "", "")
			return a.b
		}, erofs.ErrCorrupt, "directory of 0 bytes"},
		{"endless directory", func() []byte {
			a := newImage(1, 1)
			a.inode(rootNid, plain, 0o40755, -1, 0, "", "")
			return a.b
		}, erofs.ErrCorrupt, "directory of 18446744073709551615 bytes"},
		{"no dot", func() []byte {
			a := newImage(1, 1)
			a.dir(rootNid, 0o40755, "", ent{"..", rootNid, isDir})
			return a.b
		}, erofs.ErrCorrupt, `directory without "." or ".."`},
		{"wrong parent", func() []byte {
			a := small(t, ent{"d", nid, isDir})
			a.dir(nid, 0o40755, "", ent{".", nid, isDir}, ent{"..", nid, isDir})
			return a.b
		}, erofs.ErrCorrupt, `"/d": corrupt composefs image: ".." is inode 64, want 36`},
		{"directory in itself", func() []byte {
			return small(t, ent{"d", rootNid, isDir}).b
		}, erofs.ErrCorrupt, `"d": corrupt composefs image: a directory has a second name`},
		{"directory with two names", func() []byte {
			a := small(t, ent{"d", nid, isDir}, ent{"e", nid, isDir})
			a.dir(nid, 0o40755, "", ent{".", nid, isDir}, ent{"..", rootNid, isDir})
			return a.b
		}, erofs.ErrCorrupt, `"e": corrupt composefs image: a directory has a second name`},
		{"name twice", func() []byte {
			a := small(t, reg, reg)
			a.inode(nid, plain, 0o100644, 0, 0, "", "")
			return a.b
		}, erofs.ErrCorrupt, `name "f" comes after "f"`},
		{"order", func() []byte {
			a := small(t, reg, ent{"a", nid, isReg})
			a.inode(nid, plain, 0o100644, 0, 0, "", "")
			return a.b
		}, erofs.ErrCorrupt, `name "a" comes after "f"`},
		{"slash", func() []byte {
			return small(t, ent{"a/b", nid, isReg}).b
		}, erofs.ErrCorrupt, `name "a/b" contains a slash or NUL`},
		{"empty name", func() []byte {
			a := newImage(1, 1)
			a.dir(rootNid, 0o40755, "", ent{"", nid, isReg}, ent{".", rootNid, isDir})
			return a.b
		}, erofs.ErrCorrupt, `name "" comes after ""`},
		{"long name", func() []byte {
			return small(t, ent{strings.Repeat("n", 256), nid, isReg}).b
		}, erofs.ErrCorrupt, "too long: got 256 bytes, want at most 255"},
		{"type of an entry", func() []byte {
			a := small(t, ent{"f", nid, isDir})
			a.inode(nid, plain, 0o100644, 0, 0, "", "")
			return a.b
		}, erofs.ErrCorrupt, "directory entry of type 2, want 1"},
		{"type of an inode", func() []byte {
			a := small(t, ent{"f", nid, 0})
			a.inode(nid, plain, 0o644, 0, 0, "", "")
			return a.b
		}, erofs.ErrCorrupt, "directory entry of type 0, want 0"},
		{"names begin nowhere", func() []byte {
			b := emptyV2()
			le.PutUint16(b[rootNid*32+64+8:], 25)
			return b
		}, erofs.ErrCorrupt, "names of a directory begin at 25"},
		{"names end before they begin", func() []byte {
			b := emptyV2()
			le.PutUint16(b[rootNid*32+64+12+8:], 3)
			return b
		}, erofs.ErrCorrupt, "name from 24 to 3 of 27 bytes"},
		{"layout", func() []byte {
			a := small(t, reg)
			a.inode(nid, 3, 0o100644, 0, 0, "", "")
			return a.b
		}, erofs.ErrUnsupported, "data layout 3"},
		{"content beyond the end", func() []byte {
			a := small(t, reg)
			a.inode(nid, plain, 0o100644, 100, 1<<30, "", "")
			return a.b
		}, erofs.ErrCorrupt, "it refers to 100 bytes at"},
		{"large content", func() []byte {
			a := small(t, reg)
			a.inode(nid, plain, 0o100644, 5001, 1, "", "")
			return a.b
		}, erofs.ErrCorrupt, "5001 bytes of data, want at most 5000"},
		{"full block behind an inode", func() []byte {
			a := small(t, reg)
			a.inode(nid, inline, 0o100644, 4096, 1, "", "")
			return a.b
		}, erofs.ErrCorrupt, "a full block behind an inode"},
		{"chunks of nothing", func() []byte {
			a := small(t, reg)
			a.inode(nid, chunks, 0o100644, 0, 0, "", "")
			return a.b
		}, erofs.ErrCorrupt, "chunks of 0 bytes"},
		{"chunks without end", func() []byte {
			a := small(t, reg)
			a.inode(nid, chunks, 0o100644, 1<<60, 0, "", "")
			return a.b
		}, erofs.ErrCorrupt, "chunks of 1152921504606846976 bytes"},
		{"target with NUL", func() []byte {
			a := small(t, ent{"l", nid, isLnk})
			a.inode(nid, inline, 0o120777, 3, 0, "", "a\x00b")
			return a.b
		}, erofs.ErrCorrupt, `target "a\x00b" contains NUL`},
		{"no target", func() []byte {
			a := small(t, ent{"l", nid, isLnk})
			a.inode(nid, plain, 0o120777, 0, 0, "", "")
			return a.b
		}, erofs.ErrCorrupt, "symbolic link without a target"},
		{"xattr beyond its inode", func() []byte {
			a := small(t, reg)
			x := []byte(xattrs(0, xattr{1, "a", "b"}))
			x[14] = 200
			a.inode(nid, plain, 0o100644, 0, 0, string(x), "")
			return a.b
		}, erofs.ErrCorrupt, "an xattr goes beyond 8 bytes"},
		{"shared xattrs beyond their inode", func() []byte {
			a := small(t, reg)
			x := []byte(xattrs(0, xattr{1, "a", "b"}))
			x[4] = 200
			a.inode(nid, plain, 0o100644, 0, 0, string(x), "")
			return a.b
		}, erofs.ErrCorrupt, "200 shared xattrs in 20 bytes"},
		{"shared xattr beyond the end", func() []byte {
			a := small(t, reg)
			a.inode(nid, plain, 0o100644, 0, 0, sharingXattrs(0, []uint32{1 << 31}), "")
			return a.b
		}, erofs.ErrCorrupt, "it refers to 4 bytes at 8589934592"},
		{"xattr twice", func() []byte {
			a := small(t, reg)
			a.inode(nid, plain, 0o100644, 0, 0, xattrs(0, xattr{1, "a", "b"}, xattr{0, "user.a", "c"}), "")
			return a.b
		}, erofs.ErrCorrupt, `two xattrs "user.a"`},
		{"xattr prefix", func() []byte {
			a := small(t, reg)
			a.inode(nid, plain, 0o100644, 0, 0, xattrs(0, xattr{0x80, "a", "b"}), "")
			return a.b
		}, erofs.ErrUnsupported, "xattr prefix 128"},
		{"xattr without a name", func() []byte {
			a := small(t, reg)
			a.inode(nid, plain, 0o100644, 0, 0, xattrs(0, xattr{0, "", "b"}), "")
			return a.b
		}, erofs.ErrCorrupt, "xattr without a name"},
		{"metacopy", func() []byte {
			a := small(t, reg)
			a.inode(nid, chunks, 0o100644, 100, 0, xattrs(0, xattr{4, "overlay.metacopy", objectMeta[:20]}), nullChunk)
			return a.b
		}, erofs.ErrCorrupt, "metacopy"},
		{"object besides content", func() []byte {
			a := small(t, reg)
			a.inode(nid, inline, 0o100644, 4, 0, xattrs(0, xattr{4, "overlay.redirect", "/" + objectPath}), "hihi")
			return a.b
		}, erofs.ErrCorrupt, "an object besides content of 4 bytes"},
		{"redirected directory", func() []byte {
			a := newImage(1, 1)
			a.dir(rootNid, 0o40755, xattrs(0, xattr{4, "overlay.redirect", "/etc"}), ent{".", rootNid, isDir}, ent{"..", rootNid, isDir})
			return a.b
		}, erofs.ErrCorrupt, "redirection of what is no regular file"},
		{"whiteout with content", func() []byte {
			a := small(t, reg)
			a.inode(nid, inline, 0o100644, 4, 0, xattrs(0, xattr{4, "overlay.overlay.whiteout", ""}), "hihi")
			return a.b
		}, erofs.ErrCorrupt, "whiteout with content"},
		{"nanoseconds", func() []byte {
			a := small(t, reg)
			a.inode(nid, plain, 0o100644, 0, 0, "", "")
			le.PutUint32(a.b[nid*32+40:], 1e9)
			return a.b
		}, erofs.ErrCorrupt, "1000000000 nanoseconds"},
	} {
		err := readErr(c.image())
		if !errors.Is(err, c.kind) || !strings.Contains(fmt.Sprint(err), c.want) {
			t.Errorf("%s:\n got %v\nwant %v: %s", c.name, err, c.kind, c.want)
		}
		if _, err := erofs.Objects(bytes.NewReader(c.image()), int64(len(c.image()))); err != nil && !errors.Is(err, c.kind) {
			t.Errorf("%s: Objects: got %v, want nil or %v", c.name, err, c.kind)
		}
	}
}

// TestUnfolding has directories with one block of entries in common, which are links
// to one file. Sharing any more than that, the number of names would be quadratic in
// the size of the image.
func TestUnfolding(t *testing.T) {
	const dirs, block, file = 100, 31, 960
	a := newImage(1, block+1)
	root := []ent{{".", rootNid, isDir}, {"..", rootNid, isDir}}
	for i := range dirs {
		nid := 128 + 6*i
		root = append(root, ent{fmt.Sprintf("d%02d", i), nid, isDir})
		tail := dirents(ent{".", nid, isDir}, ent{"..", rootNid, isDir})
		a.inode(nid, inline, 0o40755, 4096+len(tail), block, "", tail)
	}
	a.dir(rootNid, 0o40755, "", root...)
	a.inode(file, plain, 0o100644, 0, 0, "", "")
	var shared []ent
	for i := range 200 {
		shared = append(shared, ent{fmt.Sprintf("!%03d", i), file, isReg}) // before "."
	}
	copy(a.b[block*4096:], dirents(shared...))

	err := readErr(a.b)
	if !errors.Is(err, erofs.ErrCorrupt) || !strings.Contains(err.Error(), "it uses more bytes than it has") {
		t.Errorf("got %v", err)
	}
}

// TestBudget has files whose contents are the same block.
func TestBudget(t *testing.T) {
	a := newImage(1, 6)
	entries := []ent{{".", rootNid, isDir}, {"..", rootNid, isDir}}
	for i := range 20 {
		nid := 256 + 2*i
		entries = append(entries, ent{fmt.Sprintf("f%02d", i), nid, isReg})
		a.inode(nid, plain, 0o100644, 4096, 5, "", "")
	}
	a.dir(rootNid, 0o40755, "", entries...)
	if err := readErr(a.b); !errors.Is(err, erofs.ErrCorrupt) || !strings.Contains(err.Error(), "it uses more bytes than it has") {
		t.Errorf("got %v", err)
	}
}

// chain returns a tree of directories within each other, the root included.
func chain(depth int) *tree.Tree {
	t := tree.New()
	for n := t.Root; depth > 1; depth-- {
		n.Dir["d"] = tree.NewImplied()
		n = n.Dir["d"]
	}
	return t
}

// TestDepth checks that what Write writes can be read up to the limit, and that
// neither goes beyond it.
func TestDepth(t *testing.T) {
	tr := chain(erofs.MaxDepth)
	if changes := tree.Diff(tr, readImage(t, write(t, tr, erofs.V1))); len(changes) > 0 {
		t.Errorf("the tree has changed: %v", changes)
	}
	if err := erofs.Write(new(bytes.Buffer), chain(erofs.MaxDepth+1), erofs.Options{}); !errors.Is(err, erofs.ErrTree) {
		t.Errorf("writing: got %v, want %v", err, erofs.ErrTree)
	}

	a := newImage(2, (erofs.MaxDepth+10)*128/4096+2)
	parent := rootNid
	for i := range erofs.MaxDepth + 1 {
		nid := rootNid + 4*i
		a.dir(nid, 0o40755, "", ent{".", nid, isDir}, ent{"..", parent, isDir}, ent{"d", nid + 4, isDir})
		parent = nid
	}
	err := readErr(a.b)
	if !errors.Is(err, erofs.ErrCorrupt) || !strings.Contains(err.Error(), "more than 2048 directories within each other") {
		t.Errorf("reading: got %.100v", err)
	}
}

// TestTruncated cuts an image at many places: what remains is refused, or was all
// that is needed.
func TestTruncated(t *testing.T) {
	image := write(t, parse(t, read(t, conformance+"/special.dump"), dump.Options{}), erofs.V1)
	for n := 0; n < len(image); n += 97 {
		err := readErr(image[:n])
		if err == nil || !errors.Is(err, erofs.ErrCorrupt) && !errors.Is(err, erofs.ErrNotComposefs) {
			t.Errorf("%d of %d bytes: got %v", n, len(image), err)
		}
	}
	// The size may be a lie.
	_, err := erofs.Read(bytes.NewReader(image[:5000]), int64(len(image)))
	if err == nil || errors.Is(err, erofs.ErrCorrupt) {
		t.Errorf("got %v, want an error of the reader", err)
	}
}

// TestRefusedTrees has trees that have no form as an image.
func TestRefusedTrees(t *testing.T) {
	node := func(mode uint32) *tree.Node { return &tree.Node{Stat: tree.Stat{Mode: mode}} }
	file := func(f *tree.File) *tree.Node {
		n := node(tree.TypeRegular | 0o644)
		n.File = f
		return n
	}
	link := func(target string) *tree.Node {
		n := node(tree.TypeSymlink)
		n.Target = target
		return n
	}
	attr := func(name, value string) *tree.Node {
		n := node(tree.TypeFIFO)
		n.Xattrs = map[string]string{name: value}
		return n
	}
	shared := tree.NewImplied()
	for _, c := range []struct {
		name string
		node *tree.Node
		want string
	}{
		{"f", nil, `the node of "f" is nil`},
		{"f", node(0), "names no file type"},
		{"f", node(1 << 20), "more bits than st_mode"},
		{"f", file(nil), "regular file without a File"},
		{"f", file(&tree.File{Size: -1}), "size -1 is out of range"},
		{"f", file(&tree.File{Size: erofs.MaxSize + 1}), "is out of range"},
		{"f", file(&tree.File{Size: 2, Inline: []byte("x")}), "inline content has 1 bytes, but size says 2"},
		{"f", file(&tree.File{Size: 5001, Inline: make([]byte, 5001)}), "inline content is too long"},
		{"f", file(&tree.File{Size: 9, Payload: "a\x00"}), "contains NUL"},
		{"f", file(&tree.File{Size: 9, Payload: strings.Repeat("p", 4096)}), "payload is too long"},
		{"f", link(""), "symbolic link without a target"},
		{"f", link(strings.Repeat("t", 4096)), "target is too long: got 4096 bytes, want at most 4095"},
		{"f", link("\x00"), "contains NUL"},
		{"f", attr("", ""), "xattr without a name"},
		{"f", attr(strings.Repeat("n", 256), ""), "is too long: got 256 bytes, want at most 255"},
		{"f", attr("user.x", strings.Repeat("v", 65536)), "is too long: got 65536 bytes, want at most 65535"},
		{"f", &tree.Node{Stat: tree.Stat{Mode: tree.TypeChar}, Rdev: 1 << 32}, "does not fit the 32 bits of EROFS"},
		{"f", &tree.Node{Stat: tree.Stat{Mode: tree.TypeFIFO, MtimeNsec: 1e9}}, "1000000000 nanoseconds"},
		{"", node(tree.TypeFIFO), "empty name"},
		{"..", node(tree.TypeFIFO), `name ".." is reserved`},
		{"a/b", tree.NewImplied(), "contains a slash"},
		{"f", shared, "has a second name"},
	} {
		tr := tree.New()
		tr.Root.Dir[c.name] = c.node
		if c.node == shared {
			tr.Root.Dir["g"] = shared
		}
		err := erofs.Write(new(bytes.Buffer), tr, erofs.Options{})
		if !errors.Is(err, erofs.ErrTree) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q %v:\n got %v\nwant %s", c.name, c.node, err, c.want)
		}
	}
	tr := tree.New()
	tr.Owners = map[*tree.Node]string{tree.NewWhiteout(): "/x"}
	if err := erofs.Write(new(bytes.Buffer), tr, erofs.Options{}); !errors.Is(err, erofs.ErrTree) {
		t.Errorf("stray owner: got %v", err)
	}
}

// TestWriteError checks that an error of the writer is not lost.
func TestWriteError(t *testing.T) {
	want := errors.New("full")
	if err := erofs.Write(full{want}, tree.New(), erofs.Options{}); !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}

type full struct{ err error }

func (f full) Write([]byte) (int, error) { return 0, f.err }

// TestUnchanged checks that Write leaves its tree as it was, whiteouts, names of the
// root and all.
func TestUnchanged(t *testing.T) {
	for seed := range uint64(20) {
		tr := randomTree(seed)
		before := printDump(t, tr)
		first := write(t, tr, erofs.V1)
		if printDump(t, tr) != before {
			t.Fatalf("seed %d: the tree has changed", seed)
		}
		if !bytes.Equal(write(t, tr, erofs.V1), first) {
			t.Fatalf("seed %d: the second image differs", seed)
		}
	}
}

// TestRandomRoundTrip reads random trees back.
func TestRandomRoundTrip(t *testing.T) {
	for seed := range uint64(50) {
		tr := randomTree(seed)
		for _, f := range []erofs.Format{erofs.V0, erofs.V1} {
			image := write(t, tr, f)
			back := readImage(t, image)
			if !bytes.Equal(write(t, back, f), image) {
				t.Fatalf("seed %d, %s: the image of what was read differs", seed, f)
			}
		}
	}
}
