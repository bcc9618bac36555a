package converter

import (
	"errors"
	"fmt"
	"maps"
	"strings"

	"github.com/particle-os/particle/converter/tree"
)

// A Kind is one of the composefs images that can be made of an OCI image. All of
// them have the same files; they differ in what of the build shows through.
type Kind int

const (
	// Rootfs is what container engines show of the image: nothing is left out. A
	// root directory that no layer lists takes its Stat from /usr.
	Rootfs Kind = iota
	// Merged is the same wherever the image was read from, be it layers, a
	// directory or a mount (composefs OCI sealing specification, annotation
	// composefs.merged.erofs.v1; composefs-rs transform_for_oci): the root
	// directory has the Stat of /usr, since engines and archivers disagree on it;
	// /run is empty and dated as /usr, since builds leave mount points there; of the
	// xattrs only security.capability is kept, since labels and overlayfs marks
	// belong to the machine that built the image. Sub-second times are kept: layers
	// and file systems have them alike.
	Merged
	// Bootable is Merged with /boot and /sysroot empty and dated as /usr to the
	// second (annotation composefs.merged.bootable.erofs.v1; composefs-rs
	// transform_for_boot): a kernel image in /boot may carry this very digest.
	// Where one of the two is missing it is made, as images need it as a mount
	// point; composefs-rs refuses such images.
	Bootable
)

// Kinds lists all kinds.
var Kinds = []Kind{Rootfs, Merged, Bootable}

// String returns "rootfs", "merged" or "bootable".
func (k Kind) String() string {
	switch k {
	case Rootfs:
		return "rootfs"
	case Merged:
		return "merged"
	case Bootable:
		return "bootable"
	}
	return fmt.Sprintf("kind %d", int(k))
}

// ParseKind is the inverse of Kind.String.
func ParseKind(s string) (Kind, error) {
	for _, k := range Kinds {
		if k.String() == s {
			return k, nil
		}
	}
	return 0, fmt.Errorf("there is no kind of image %q: want rootfs, merged or bootable", s)
}

// ErrNotBootable is returned (wrapped) for trees that cannot be sealed as Bootable.
var ErrNotBootable = errors.New("not an operating system's tree")

// Seal returns the tree of the given kind made of merged layers. The argument is
// not changed.
//
// An image without /usr (one static program, say) has no canonical Stat for its
// root: it gets that of [tree.NewImplied]. As Bootable it is refused.
func Seal(t *tree.Tree, kind Kind) (*tree.Tree, error) {
	usr := t.Root.Dir["usr"]
	if usr != nil && !usr.IsDir() {
		usr = nil
	}
	if usr == nil && kind == Bootable {
		return nil, fmt.Errorf("sealing as %s: %w: it has no directory /usr", kind, ErrNotBootable)
	}

	root := *t.Root
	switch {
	case usr == nil && (kind != Rootfs || root.Implied):
		root.Stat, root.Implied = tree.NewImplied().Stat, false
	case kind != Rootfs || root.Implied:
		root.Stat, root.Implied = usr.Stat, false
	}
	if kind == Rootfs {
		return &tree.Tree{Root: &root}, nil
	}

	root.Dir = maps.Clone(root.Dir)
	empty := func(name string) {
		n := root.Dir[name]
		if n == nil || !n.IsDir() {
			return
		}
		e := *n
		e.Dir = map[string]*tree.Node{}
		if usr != nil {
			e.MtimeSec = usr.MtimeSec
			if name == "run" {
				e.MtimeNsec = usr.MtimeNsec
			}
		}
		root.Dir[name] = &e
	}
	empty("run")
	if kind == Bootable {
		for _, name := range []string{"boot", "sysroot"} {
			switch n := root.Dir[name]; {
			case n == nil:
				made := tree.NewImplied()
				made.Implied, made.MtimeSec = false, usr.MtimeSec
				root.Dir[name] = made
			case !n.IsDir():
				return nil, fmt.Errorf("sealing as %s: %w: /%s is not a directory", kind, ErrNotBootable, name)
			}
			empty(name)
		}
	}
	f := filter{keep: map[string]bool{"security.capability": true}, changed: map[*tree.Node]*tree.Node{}}
	return &tree.Tree{Root: f.node(&root)}, nil
}

// A filter drops xattrs. Nodes that have none to drop are shared with its argument.
type filter struct {
	keep    map[string]bool
	changed map[*tree.Node]*tree.Node // links stay links
}

func (f *filter) node(n *tree.Node) *tree.Node {
	if c := f.changed[n]; c != nil {
		return c
	}
	c := n
	edit := func() {
		if c == n {
			copied := *n
			c = &copied
		}
	}
	for key := range n.Xattrs {
		if !f.keep[key] {
			edit()
			c.Xattrs = maps.Clone(n.Xattrs)
			maps.DeleteFunc(c.Xattrs, func(key, _ string) bool { return !f.keep[key] })
			break
		}
	}
	if !n.IsDir() {
		if c != n {
			f.changed[n] = c
		}
		return c
	}
	cloned := false
	for name, child := range n.Dir {
		if got := f.node(child); got != child {
			if edit(); !cloned {
				c.Dir, cloned = maps.Clone(n.Dir), true
			}
			c.Dir[name] = got
		}
	}
	return c
}

// SELinux reports whether a tree has a policy by which it would have to be
// labelled. Particle labels nothing: labels of a build are dropped by Seal, and the
// system's own policy has to be applied at run time.
func SELinux(t *tree.Tree) bool {
	n := t.Lookup("etc/selinux")
	if n == nil || !n.IsDir() {
		return false
	}
	for name, child := range n.Dir {
		if child.IsDir() && child.Dir["contexts"] != nil && !strings.HasPrefix(name, ".") {
			return true
		}
	}
	return false
}
