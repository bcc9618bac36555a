// Package tree is the file tree that every part of the converter speaks: layers
// are read into it, merged in it, and written from it as EROFS, dump or tar.
//
// A Tree is a value: once a function has returned one nobody changes it, so trees
// may share subtrees. [Merge] relies on that to copy only the directories that an
// upper layer touches.
//
// In the tree of one layer, what the layer deletes has the form that overlayfs
// gives it (Linux Documentation/filesystems/overlayfs.rst, "whiteouts and opaque
// directories"): a deleted name is a character device 0:0, and a directory that
// hides all that lies below it has the xattr trusted.overlay.opaque=y. Merge
// consumes both; what it returns has neither from its layers.
//
// Left out: file contents (an [fsverity.Digest] names them), paths inside nodes (a
// node does not know its name or parent), and any input or output.
package tree

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/particle-os/particle/converter/fsverity"
)

// The file types of st_mode (inode(7)).
const (
	TypeMask    = 0o170000
	TypeFIFO    = 0o010000
	TypeChar    = 0o020000
	TypeDir     = 0o040000
	TypeBlock   = 0o060000
	TypeRegular = 0o100000
	TypeSymlink = 0o120000
	TypeSocket  = 0o140000
)

// Limits of Linux and of the composefs format, in bytes.
const (
	MaxName    = 255   // a name within a directory (NAME_MAX)
	MaxTarget  = 4095  // a symbolic link's target (PATH_MAX less its NUL)
	MaxXattr   = 255   // an xattr's name (XATTR_NAME_MAX)
	MaxValue   = 65535 // an xattr's value (XATTR_SIZE_MAX)
	MaxXattrs  = 32767 // all names and values of one inode, as libcomposefs limits them
	InlineSize = 64    // a file up to this size is stored in the metadata
	OpaqueAttr = "trusted.overlay.opaque"
)

// Stat is what inodes of all types have.
type Stat struct {
	Mode      uint32 // st_mode: type and permission bits
	UID, GID  uint32
	MtimeSec  int64  // seconds since 1970
	MtimeNsec uint32 // 0 to 999,999,999
	Xattrs    map[string]string
}

// A Node is one inode. Its shape follows from the type in Mode: Dir is non-nil for
// directories and File for regular files only. A hard link is the same Node in
// several places.
type Node struct {
	Stat
	Dir map[string]*Node // by name; never "", "." or ".."
	// File has one meaning more, in trees read from dumps: on devices, FIFOs and
	// sockets it carries a size over 4 GiB, which makes libcomposefs choose the
	// larger form of inode. It is nil in all others.
	File   *File
	Target string // of a symbolic link
	Rdev   uint64 // of a device, encoded as glibc's makedev(3)

	// Implied marks a directory that its layer did not list but needs as a parent.
	// Merge takes the lower layer's Stat for it.
	Implied bool
	// Nlink is the number of hard links that a dump gave, 0 where they are
	// to be counted.
	Nlink uint32
}

// A File is the content of a regular file: Inline, or an object in a store, or
// neither (nothing but holes).
type File struct {
	Size   int64 // bytes
	Inline []byte
	Object fsverity.Digest
	// Payload is the object's path below the objects directory where that is not
	// Object.Path(): a dump may name any. NoPayload says that there is none.
	Payload string
}

// NoPayload in File.Payload stands for an object that is known by its digest and
// has no path. (NUL occurs in no path.)
const NoPayload = "\x00"

// Path returns the path of the file's object below the objects directory, "" where
// it has none.
func (f *File) Path() string {
	switch f.Payload {
	case "":
		return f.Object.Path()
	case NoPayload:
		return ""
	}
	return f.Payload
}

// A Tree is a root directory with all below it.
type Tree struct {
	Root *Node
	// Owners names, for a Node with several names, the path that counts as the file
	// itself while the others are links to it. Only nodes whose owner is not the
	// first of their names in the order of Walk need an entry. A dump can say this,
	// and composefs numbers inodes by owner.
	Owners map[*Node]string
}

// DefaultDirMode is the mode of a directory that nobody described: what mkdir(2)
// gives under the usual umask.
const DefaultDirMode = TypeDir | 0o755

// New returns a tree with nothing but an implied root directory.
func New() *Tree { return &Tree{Root: NewImplied()} }

// NewImplied returns an empty directory that no layer described: mode 0755, owned
// by root, dated 1970. Zero is the one date that every reader agrees on.
func NewImplied() *Node {
	return &Node{Stat: Stat{Mode: DefaultDirMode}, Dir: map[string]*Node{}, Implied: true}
}

// NewWhiteout returns the node that deletes its name from the layers below.
func NewWhiteout() *Node { return &Node{Stat: Stat{Mode: TypeChar}} }

// Type returns the type bits of Mode.
func (n *Node) Type() uint32 { return n.Mode & TypeMask }

// IsDir reports whether n is a directory.
func (n *Node) IsDir() bool { return n.Type() == TypeDir }

// IsRegular reports whether n is a regular file.
func (n *Node) IsRegular() bool { return n.Type() == TypeRegular }

// IsWhiteout reports whether n is a character device 0:0.
func (n *Node) IsWhiteout() bool { return n.Type() == TypeChar && n.Rdev == 0 }

// IsOpaque reports whether n is a directory that hides what lies below it.
func (n *Node) IsOpaque() bool { return n.IsDir() && n.Xattrs[OpaqueAttr] == "y" }

// Names returns the names in a directory in byte order.
func (n *Node) Names() []string { return slices.Sorted(maps.Keys(n.Dir)) }

// Children yields the entries of a directory in byte order of their names.
func (n *Node) Children() iter.Seq2[string, *Node] {
	return func(yield func(string, *Node) bool) {
		for _, name := range n.Names() {
			if !yield(name, n.Dir[name]) {
				return
			}
		}
	}
}

// Lookup returns the node at a path, nil if there is none. The path is taken
// literally: symbolic links are not followed, empty elements are skipped.
func (t *Tree) Lookup(path string) *Node {
	n := t.Root
	for name := range strings.SplitSeq(path, "/") {
		if name == "" {
			continue
		}
		if n = n.Dir[name]; n == nil { // a nil map is fine to read
			return nil
		}
	}
	return n
}

// Walk calls fn for every name in t, parents first and siblings in byte order, until
// it returns an error. The root's path is "/". A hard-linked node is visited once a
// name.
func (t *Tree) Walk(fn func(path string, n *Node) error) error {
	return walk("/", t.Root, fn)
}

func walk(path string, n *Node, fn func(string, *Node) error) error {
	if err := fn(path, n); err != nil {
		return err
	}
	for name, child := range n.Children() {
		if err := walk(Join(path, name), child, fn); err != nil {
			return err
		}
	}
	return nil
}

// Join appends a name to an absolute path.
func Join(dir, name string) string {
	if dir == "/" {
		return "/" + name
	}
	return dir + "/" + name
}

// ComparePaths orders absolute paths as Walk does, by their elements.
func ComparePaths(a, b string) int {
	i := 0
	for i < len(a) && i < len(b) && a[i] == b[i] {
		i++
	}
	switch {
	case i == len(a) || i == len(b):
		return cmp.Compare(len(a), len(b))
	case a[i] == '/':
		return -1
	case b[i] == '/':
		return 1
	}
	return cmp.Compare(a[i], b[i])
}

// Links counts the names of each node that is not a directory.
func (t *Tree) Links() map[*Node]int {
	links := map[*Node]int{}
	_ = t.Walk(func(_ string, n *Node) error {
		if !n.IsDir() {
			links[n]++
		}
		return nil
	})
	return links
}

// CheckName returns an error unless name may stand in a directory.
func CheckName(name string) error {
	switch {
	case name == "":
		return errors.New("empty name")
	case name == "." || name == "..":
		return fmt.Errorf("name %q is reserved", name)
	case strings.IndexByte(name, '/') >= 0, strings.IndexByte(name, 0) >= 0:
		return fmt.Errorf("name %q contains a slash or NUL", name)
	case len(name) > MaxName:
		return fmt.Errorf("name %.40q… is too long: got %d bytes, want at most %d", name, len(name), MaxName)
	}
	return nil
}

// CheckXattrs returns an error unless the xattrs fit the limits.
func CheckXattrs(xattrs map[string]string) error {
	total := 0
	for _, key := range slices.Sorted(maps.Keys(xattrs)) {
		value := xattrs[key]
		switch {
		case key == "":
			return errors.New("xattr without a name")
		case len(key) > MaxXattr:
			return fmt.Errorf("xattr name %.40q… is too long: got %d bytes, want at most %d", key, len(key), MaxXattr)
		case len(value) > MaxValue:
			return fmt.Errorf("value of xattr %q is too long: got %d bytes, want at most %d", key, len(value), MaxValue)
		}
		total += len(key) + len(value)
	}
	if total > MaxXattrs {
		return fmt.Errorf("xattrs are too large: got %d bytes of names and values, want at most %d", total, MaxXattrs)
	}
	return nil
}

// Makedev encodes a device number as glibc's makedev(3), which stat(2) and dumps
// use.
func Makedev(major, minor uint32) uint64 {
	return uint64(major&0xfffff000)<<32 | uint64(major&0xfff)<<8 | uint64(minor&0xffffff00)<<12 | uint64(minor&0xff)
}

// Major returns the major number of a device.
func Major(rdev uint64) uint32 { return uint32(rdev>>32)&0xfffff000 | uint32(rdev>>8)&0xfff }

// Minor returns the minor number of a device.
func Minor(rdev uint64) uint32 { return uint32(rdev>>12)&0xffffff00 | uint32(rdev)&0xff }
