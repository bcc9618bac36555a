package erofs_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// A generator makes trees that reach the corners of the format.
type generator struct {
	*rand.Rand
	files []*tree.Node
	dirs  []*tree.Node
}

// randomTree returns a tree that depends on nothing but seed.
func randomTree(seed uint64) *tree.Tree {
	g := &generator{Rand: rand.New(rand.NewPCG(seed, 1))}
	t := &tree.Tree{Root: g.dir(0)}
	if g.IntN(3) == 0 { // names that the format wants for itself
		t.Root.Dir["00"] = g.file()
		t.Root.Dir["fe"] = tree.NewWhiteout()
	}
	g.link(t)
	return t
}

func pick[T any](g *generator, of ...T) T { return of[g.IntN(len(of))] }

func (g *generator) stat(typ uint32) tree.Stat {
	return tree.Stat{
		Mode:      typ | uint32(g.IntN(0o10000)),
		UID:       pick[uint32](g, 0, 0, 0, 1000, 65535, 65536, 4294967295),
		GID:       pick[uint32](g, 0, 0, 0, 1000, 65535, 65536, 4294967295),
		MtimeSec:  pick[int64](g, 0, 0, 0, 0, 1, 1700000000, 1<<33, -5),
		MtimeNsec: pick[uint32](g, 0, 0, 0, 1, 999999999),
		Xattrs:    g.xattrs(),
	}
}

func (g *generator) xattrs() map[string]string {
	if g.IntN(3) == 0 {
		return nil
	}
	m := map[string]string{}
	for range g.IntN(4) {
		name := pick(g, "user.a", "user.b", "user.", "trusted.x", "security.selinux", "security.capability",
			"system.posix_acl_access", "system.posix_acl_default", "system.posix_acl_accessory",
			"trusted.overlay.opaque", "trusted.overlay.metacopy", "trusted.overlay.redirect", "trusted.overlay.overlay.x",
			"trusted.overlay.x", "user.overlay.whiteouts", "user.overlay.opaque",
			"lustre.lov", "system.other", "x", strings.Repeat("n", 255), "trusted.overlay."+strings.Repeat("n", 239))
		value := pick(g, "", "y", "x", "value", "other", strings.Repeat("v", g.IntN(40)), g.bytes(g.IntN(20)))
		// libcomposefs fails where a whiteout makes it replace one of these by a
		// shorter value.
		if strings.HasSuffix(name, "overlay.opaque") || strings.HasSuffix(name, "overlay.whiteouts") {
			value = pick(g, "", "x")
			if strings.HasSuffix(name, "whiteouts") {
				value = ""
			}
		}
		m[name] = value
	}
	if g.IntN(60) == 0 { // more shared ones than an inode may refer to
		for i := range 100 + g.IntN(100) {
			m[fmt.Sprintf("user.many%03d", i)] = "1"
		}
	}
	if g.IntN(60) == 0 {
		m["user.large"] = g.bytes(g.IntN(20000))
	}
	return m
}

func (g *generator) bytes(n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(g.Uint32())
	}
	return string(b)
}

func (g *generator) name() string {
	switch g.IntN(12) {
	case 0: // these come before "."
		return pick(g, "!x", "-", "#", " ", "\n", "\x01")
	case 1:
		return pick(g, "...", ".a", "..a", "=", "\\", "a=b", "\xff\xfe", "ü", "@")
	case 2:
		return strings.Repeat(pick(g, "l", "m", "n"), 1+g.IntN(255))
	}
	return fmt.Sprintf("%s%d", pick(g, "file", "a", "lib", "ab"), g.IntN(1000))
}

func (g *generator) dir(depth int) *tree.Node {
	n := &tree.Node{Stat: g.stat(tree.TypeDir), Dir: map[string]*tree.Node{}}
	g.dirs = append(g.dirs, n)
	count := g.IntN(8)
	if large := g.IntN(12) == 0; large {
		count, depth = 50+g.IntN(300), 4 // files only
	}
	for range count {
		name := g.name()
		if n.Dir[name] != nil {
			continue
		}
		if depth < 4 && g.IntN(4) == 0 {
			n.Dir[name] = g.dir(depth + 1)
		} else {
			n.Dir[name] = g.file()
		}
	}
	return n
}

func (g *generator) file() *tree.Node {
	n := new(tree.Node)
	defer func() { g.files = append(g.files, n) }()
	switch g.IntN(16) {
	case 0:
		*n = tree.Node{Stat: g.stat(tree.TypeChar)}
		if g.IntN(3) > 0 {
			n.Rdev = uint64(g.Uint32())
		} else if g.IntN(2) == 0 {
			n.File = &tree.File{Size: 1 << 33} // see tree.Node
		}
	case 1:
		*n = tree.Node{Stat: g.stat(tree.TypeBlock), Rdev: uint64(g.IntN(70000))}
	case 2:
		*n = tree.Node{Stat: g.stat(pick[uint32](g, tree.TypeFIFO, tree.TypeSocket))}
	case 3, 4, 5:
		size := pick(g, 1+g.IntN(100), 1+g.IntN(4095), 3900+g.IntN(196), 2000+g.IntN(100), 4095)
		*n = tree.Node{Stat: g.stat(tree.TypeSymlink), Target: strings.Repeat("t", size)}
	default:
		*n = tree.Node{Stat: g.stat(tree.TypeRegular), File: g.content()}
	}
	if !n.IsWhiteout() && g.IntN(10) == 0 {
		n.Nlink = uint32(1 + g.IntN(100000))
	}
	return n
}

func (g *generator) content() *tree.File {
	if g.IntN(2) == 0 {
		b := g.bytes(pick(g, 0, 1, g.IntN(64), g.IntN(4097), 2040+g.IntN(20), 4090+g.IntN(7)))
		return &tree.File{Size: int64(len(b)), Inline: []byte(b)}
	}
	f := &tree.File{Size: pick[int64](g, 1, 65, 4096, 4097, 1<<32-1, 1<<32, 1<<43, 1<<43+1, 1<<53, 1+g.Int64N(1<<45))}
	if g.IntN(8) > 0 {
		// Few different ones, so that some are shared.
		f.Object = fsverity.Sum(fsverity.SHA256, []byte{byte(g.IntN(40))})
	}
	switch g.IntN(8) {
	case 0:
		f.Payload = tree.NoPayload
	case 1:
		f.Payload = pick(g, "some/where", "/abs", strings.Repeat("p", 100))
	}
	if f.Payload == tree.NoPayload && f.Object.IsZero() {
		f.Payload = ""
	}
	return f
}

// link gives some files further names, and lets any of the names be the owner.
func (g *generator) link(t *tree.Tree) {
	if len(g.files) == 0 {
		return
	}
	linked := map[*tree.Node]bool{}
	for range g.IntN(6) {
		n := g.files[g.IntN(len(g.files))]
		dir := g.dirs[g.IntN(len(g.dirs))]
		if name := g.name(); dir.Dir[name] == nil && !n.IsWhiteout() {
			dir.Dir[name] = n
			linked[n] = true
		}
	}
	paths := map[*tree.Node][]string{}
	var order []*tree.Node
	_ = t.Walk(func(path string, n *tree.Node) error {
		if linked[n] {
			if paths[n] == nil {
				order = append(order, n)
			}
			paths[n] = append(paths[n], path)
		}
		return nil
	})
	for _, n := range order {
		names := paths[n]
		if n.Nlink == uint32(len(names)) {
			n.Nlink = 0
		}
		if i := slices.Index(names, pick(g, names...)); i > 0 {
			if t.Owners == nil {
				t.Owners = map[*tree.Node]string{}
			}
			t.Owners[n] = names[i]
		}
	}
}
