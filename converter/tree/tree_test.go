package tree

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// The combinators below build trees: build(dir("a", file("b", "x"))).
type entry struct {
	name string
	node *Node
}

func build(entries ...entry) *Tree {
	return &Tree{Root: dir("", entries...).node}
}

func dir(name string, entries ...entry) entry {
	n := &Node{Stat: Stat{Mode: TypeDir | 0o755}, Dir: map[string]*Node{}}
	for _, e := range entries {
		n.Dir[e.name] = e.node
	}
	return entry{name, n}
}

func file(name, content string) entry {
	return entry{name, &Node{Stat: Stat{Mode: TypeRegular | 0o644}, File: &File{Size: int64(len(content)), Inline: []byte(content)}}}
}

func whiteout(name string) entry { return entry{name, NewWhiteout()} }

func opaque(e entry) entry {
	e.node.Xattrs = map[string]string{OpaqueAttr: "y", "user.kept": "1"}
	return e
}

func implied(e entry) entry {
	e.node.Implied = true
	return e
}

func mode(e entry, m uint32) entry {
	e.node.Mode = e.node.Type() | m
	return e
}

// show prints a tree as one word a path.
func show(t *Tree) string {
	var s []string
	_ = t.Walk(func(path string, n *Node) error {
		w := path
		if n.File != nil {
			w += "=" + string(n.File.Inline)
		}
		if n.Mode&0o777 != 0o755 && n.IsDir() {
			w += fmt.Sprintf("(%o)", n.Mode&0o777)
		}
		if n.IsWhiteout() {
			w += "(whiteout)"
		}
		if n.IsOpaque() {
			w += "(opaque)"
		}
		s = append(s, w)
		return nil
	})
	return strings.Join(s, " ")
}

func TestMerge(t *testing.T) {
	for _, c := range []struct {
		name         string
		lower, upper *Tree
		want         string
	}{
		{"union", build(file("a", "1")), build(file("b", "2")), "/ /a=1 /b=2"},
		{"replace", build(file("a", "1")), build(file("a", "2")), "/ /a=2"},
		{"whiteout", build(file("a", "1"), file("b", "1")), build(whiteout("a")), "/ /b=1"},
		{"whiteout of nothing", New(), build(whiteout("a")), "/"},
		{"whiteout of a directory", build(dir("a", file("b", "1"))), build(whiteout("a")), "/"},
		{"dir over file", build(file("a", "1")), build(dir("a", file("b", "2"))), "/ /a /a/b=2"},
		{"file over dir", build(dir("a", file("b", "1"))), build(file("a", "2")), "/ /a=2"},
		{"deep", build(dir("a", dir("b", file("c", "1"), file("d", "1")))), build(dir("a", dir("b", file("c", "2")))), "/ /a /a/b /a/b/c=2 /a/b/d=1"},
		{"opaque", build(dir("a", file("b", "1"))), build(opaque(dir("a", file("c", "2")))), "/ /a /a/c=2"},
		{"opaque root", build(file("a", "1")), &Tree{Root: opaque(dir("", file("b", "2"))).node}, "/ /b=2"},
		{"opaque with nothing below", New(), build(opaque(dir("a", file("c", "2")))), "/ /a /a/c=2"},
		{"marks below a new directory", New(), build(dir("a", whiteout("x"), opaque(dir("y")), file("z", "1"))), "/ /a /a/y /a/z=1"},
		{"upper stat wins", build(mode(dir("a", file("b", "1")), 0o700)), build(mode(dir("a"), 0o711)), "/ /a(711) /a/b=1"},
		{"implied keeps the lower stat", build(mode(dir("a", file("b", "1")), 0o700)), build(implied(dir("a", file("c", "2")))), "/ /a(700) /a/b=1 /a/c=2"},
		{"implied over a file", build(file("a", "1")), build(implied(dir("a", file("c", "2")))), "/ /a /a/c=2"},
		{"empty upper directory", build(dir("a", file("b", "1"))), build(dir("a")), "/ /a /a/b=1"},
	} {
		before := show(c.lower) + show(c.upper)
		if got := show(Merge(c.lower, c.upper)); got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
		if after := show(c.lower) + show(c.upper); after != before {
			t.Errorf("%s: Merge changed its arguments: %s, before %s", c.name, after, before)
		}
	}
}

// TestMergeOpaqueXattrs checks that only the mark itself goes.
func TestMergeOpaqueXattrs(t *testing.T) {
	m := Merge(New(), build(opaque(dir("a"))))
	if got := m.Lookup("a").Xattrs; len(got) != 1 || got["user.kept"] != "1" {
		t.Errorf("got %v, want user.kept alone", got)
	}
}

func TestMergeKeepsLinks(t *testing.T) {
	f := file("a", "1")
	lower := build(f, entry{"b", f.node}, dir("d", entry{"c", f.node}))
	m := Merge(lower, build(file("a", "2"), dir("d", file("x", "3"))))
	if m.Lookup("b") != m.Lookup("d/c") {
		t.Error("b and d/c are no longer linked")
	}
	if m.Lookup("a") == m.Lookup("b") || string(m.Lookup("b").File.Inline) != "1" {
		t.Error("the replaced name is still linked, or its peer changed")
	}
	if n := m.Links()[f.node]; n != 2 {
		t.Errorf("got %d links, want 2", n)
	}
}

func TestDiff(t *testing.T) {
	f, g := file("a", "1"), file("a", "1")
	a := build(f, entry{"b", f.node}, dir("d", file("x", "1")), file("only-a", ""))
	b := build(g, file("b", "1"), mode(dir("d", file("x", "2")), 0o700), file("only-b", ""))
	var got []string
	for _, c := range Diff(a, b) {
		got = append(got, c.String())
	}
	want := []string{
		"/b: linked to another name in the first only",
		"/d: mode 0040755 and 0040700",
		"/d/x: content",
		"/only-a: only in the first",
		"/only-b: only in the second",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if d := Diff(a, a); len(d) != 0 {
		t.Errorf("a tree differs from itself: %v", d)
	}
}

func TestDevices(t *testing.T) {
	for _, c := range []struct {
		major, minor uint32
		want         uint64
	}{{0, 0, 0}, {1, 3, 0x103}, {8, 256, 0x100800}, {0xfff, 0xff, 0xfffff}, {0x12345, 0xabcdef, 0x12000abcd45ef | 0x300<<8}} {
		got := Makedev(c.major, c.minor)
		if Major(got) != c.major || Minor(got) != c.minor {
			t.Errorf("%d:%d: got %d:%d back from %#x", c.major, c.minor, Major(got), Minor(got), got)
		}
		if c.major < 0x1000 && got != c.want {
			t.Errorf("Makedev(%d, %d): got %#x, want %#x", c.major, c.minor, got, c.want)
		}
	}
}

func TestChecks(t *testing.T) {
	for name, ok := range map[string]bool{"a": true, "\xff": true, strings.Repeat("n", 255): true, "": false, ".": false, "..": false, "a/b": false, "a\x00": false, strings.Repeat("n", 256): false} {
		if err := CheckName(name); (err == nil) != ok {
			t.Errorf("CheckName(%q): %v", name, err)
		}
	}
	for _, c := range []struct {
		xattrs map[string]string
		ok     bool
	}{
		{map[string]string{"user.a": "b"}, true},
		{map[string]string{"": "b"}, false},
		{map[string]string{strings.Repeat("k", 256): ""}, false},
		{map[string]string{"user.a": strings.Repeat("v", 65536)}, false},
		{map[string]string{"user.a": strings.Repeat("v", 32767)}, false},
	} {
		if err := CheckXattrs(c.xattrs); (err == nil) != c.ok {
			t.Errorf("CheckXattrs: %v", err)
		}
	}
}
