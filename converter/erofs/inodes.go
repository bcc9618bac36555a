package erofs

import (
	"fmt"
	"slices"
	"strings"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// An inode is one inode of an image that is being written.
type inode struct {
	node    *tree.Node
	mode    uint32 // the node's, but of a whiteout that of the file in its place
	nlink   uint32
	entries []dirent // of a directory, in byte order, with "." and ".."
	xattrs  []*xattr // as stored, in byte order of names

	placed bool // its owner has been met

	// What the layout says, true once it has run.
	compact bool
	blocks  uint32 // full blocks of data; all else follows the inode
	block   uint32 // number of the first of blocks
	nid     uint64 // position in the image, in slots
}

// A dirent is an entry of a directory.
type dirent struct {
	name  string
	child *inode
	owner bool // "." and ".." are not, and of a file with several names only one is
}

// An inodeTable is a tree as the inodes of an image.
type inodeTable struct {
	version uint32
	inodes  []*inode // breadth first, the root first
	shared  []*xattr // in the order of the image
	minSec  int64    // the earliest time of all inodes
	minNsec uint32
	hasACL  bool
}

// A builder makes an inodeTable.
type builder struct {
	inodeTable
	files  map[*tree.Node]*inode
	owners map[place]bool // of the files that tree.Tree.Owners names
	named  map[*tree.Node]string

	names   map[string]*xattrName
	xattrs  map[xattrID]*xattr
	objects map[fsverity.Digest]object
	paths   map[string]*xattr // redirects to paths that no digest implies

	pool  []inode  // allocated ahead
	lists []*xattr // the same, of which inodes have parts
	room  []xattr  // the same
	ids   []xattrID
	stub  *tree.Node
}

// A place is a name in a directory.
type place struct {
	dir  *tree.Node
	name string
}

// newInodeTable makes the inodes of t: what lcfs_write_erofs_to does with its clone
// of a tree. t stays as it is.
func newInodeTable(t *tree.Tree, o Options) (*inodeTable, error) {
	if t.Root == nil || !t.Root.IsDir() {
		return nil, fmt.Errorf("%w: the root is not a directory", ErrTree)
	}
	c := census{dirs: map[*tree.Node]bool{}}
	if err := c.count("/", t.Root, 1); err != nil {
		return nil, err
	}
	b := builder{
		files:   make(map[*tree.Node]*inode, c.nodes),
		pool:    make([]inode, 1+c.nodes+256),
		names:   map[string]*xattrName{},
		xattrs:  map[xattrID]*xattr{},
		objects: make(map[fsverity.Digest]object, c.objects),
		paths:   make(map[string]*xattr, c.paths),
		named:   t.Owners,
		stub:    newStub(t.Root),
	}
	switch {
	case o.Format == V1, o.Format == Auto && c.whiteouts:
		b.version = 1
	case o.Format > Auto:
		return nil, fmt.Errorf("%w: %s", ErrUnsupported, o.Format)
	}
	if err := b.findOwners(t); err != nil {
		return nil, err
	}

	root := b.newInode(t.Root)
	if err := b.dir("/", root, root); err != nil {
		return nil, err
	}
	b.order(root)
	b.share()
	return &b.inodeTable, nil
}

// A census is taken before anything is allocated.
type census struct {
	nodes, objects, paths int
	whiteouts             bool
	dirs                  map[*tree.Node]bool
}

func (c *census) count(name string, dir *tree.Node, depth int) error {
	if depth > MaxDepth {
		return fmt.Errorf("%w: more than %d directories within each other at %q", ErrTree, MaxDepth, name)
	}
	if c.dirs[dir] {
		return fmt.Errorf("%w: directory %q has a second name", ErrTree, name)
	}
	c.dirs[dir] = true
	c.nodes += len(dir.Dir)
	for name, child := range dir.Dir {
		switch {
		case child == nil:
			return fmt.Errorf("%w: the node of %q is nil", ErrTree, name)
		case child.IsDir():
			if err := c.count(name, child, depth+1); err != nil {
				return err
			}
		case child.IsRegular() && child.File != nil:
			if !child.File.Object.IsZero() {
				c.objects++
			}
			if len(child.File.Payload) > len(tree.NoPayload) {
				c.paths++
			}
		case child.IsWhiteout():
			c.whiteouts = true
		}
	}
	return nil
}

// findOwners looks up the places that t names as owners.
func (b *builder) findOwners(t *tree.Tree) error {
	if len(t.Owners) == 0 {
		return nil
	}
	b.owners = make(map[place]bool, len(t.Owners))
	for n, path := range t.Owners {
		i := strings.LastIndexByte(path, '/')
		if i < 0 {
			return fmt.Errorf("%w: owner %q is no absolute path", ErrTree, path)
		}
		dir := t.Lookup(path[:i])
		if dir == nil || dir.Dir[path[i+1:]] != n {
			return fmt.Errorf("%w: owner %q of a file is not one of its names", ErrTree, path)
		}
		b.owners[place{dir, path[i+1:]}] = true
	}
	return nil
}

func (b *builder) newInode(n *tree.Node) *inode {
	in := &b.pool[0]
	b.pool = b.pool[1:]
	in.node, in.mode = n, n.Mode
	return in
}

// inode returns the inode of a node: the same one for each of a file's names.
func (b *builder) inode(n *tree.Node) *inode {
	if n.IsDir() {
		return b.newInode(n)
	}
	in := b.files[n]
	if in == nil {
		in = b.newInode(n)
		in.nlink = n.Nlink
		b.files[n] = in
	}
	if n.Nlink == 0 {
		in.nlink++
	}
	return in
}

// dir fills in a directory and all that is below it.
func (b *builder) dir(path string, in, parent *inode) error {
	n := in.node
	if err := check(n); err != nil {
		return fmt.Errorf("%w: %q: %w", ErrTree, path, err)
	}
	isRoot := in == parent
	in.entries = make([]dirent, 0, len(n.Dir)+2)
	in.entries = append(in.entries, dirent{name: ".", child: in}, dirent{name: "..", child: parent})
	for name, child := range n.Dir {
		if err := tree.CheckName(name); err != nil {
			return fmt.Errorf("%w: in %q: %w", ErrTree, path, err)
		}
		in.entries = append(in.entries, dirent{name: name, child: b.inode(child)})
	}
	if isRoot {
		for i := range 256 {
			if name := fmt.Sprintf("%02x", i); n.Dir[name] == nil {
				in.entries = append(in.entries, dirent{name: name, child: b.newInode(b.stub)})
			}
		}
	}
	slices.SortFunc(in.entries, func(a, b dirent) int { return strings.Compare(a.name, b.name) })

	in.nlink = 2
	whiteouts := false
	for i := range in.entries {
		e := &in.entries[i]
		switch child := e.child.node; {
		case e.child == in || e.child == parent: // "." and ".."
		case child == b.stub:
			e.owner, e.child.nlink = true, 1
			e.child.xattrs = b.intern(b.plain(child))
		case child.IsDir():
			in.nlink++
			e.owner = true
			if err := b.dir(tree.Join(path, e.name), e.child, in); err != nil {
				return err
			}
		default:
			if err := b.file(path, n, e); err != nil {
				return err
			}
			whiteouts = whiteouts || e.owner && child.IsWhiteout()
		}
	}

	ids := b.plain(n)
	if whiteouts {
		ids = setXattr(ids, attrWhiteouts, "")
		ids = setXattr(ids, userWhiteouts, "")
		if b.version >= 1 {
			ids = setXattr(ids, attrHasOpaque, opaqueWhiteouts)
			ids = setXattr(ids, userHasOpaque, opaqueWhiteouts)
		}
	}
	if isRoot {
		ids = setXattr(ids, attrOpaque, opaqueYes)
	}
	in.xattrs = b.intern(ids)
	return nil
}

// newStub returns what the names that the root lacks show: a whiteout with the
// root's owner, time and SELinux label.
func newStub(root *tree.Node) *tree.Node {
	n := &tree.Node{Stat: root.Stat}
	n.Mode = tree.TypeChar | 0o644
	n.Xattrs = nil
	const selinux = "security.selinux"
	if label, ok := root.Xattrs[selinux]; ok {
		n.Xattrs = map[string]string{selinux: label}
	}
	return n
}

// file fills in the entry of what is not a directory.
func (b *builder) file(path string, dir *tree.Node, e *dirent) error {
	in := e.child
	n := in.node
	first := !in.placed
	in.placed, e.owner = true, first
	if b.owners != nil {
		if _, named := b.named[n]; named {
			e.owner = b.owners[place{dir, e.name}]
		}
	}
	if !first {
		return nil
	}
	if err := check(n); err != nil {
		return fmt.Errorf("%w: %q: %w", ErrTree, tree.Join(path, e.name), err)
	}
	ids := b.plain(n)
	switch {
	case n.IsRegular() && n.File.Size > 0 && len(n.File.Inline) == 0:
		in.xattrs = b.internFile(ids, n.File)
		return nil
	case n.IsWhiteout():
		in.mode = tree.TypeRegular | n.Mode&^tree.TypeMask
		ids = setXattr(ids, attrWhiteout, "")
		ids = setXattr(ids, userWhiteout, "")
	}
	in.xattrs = b.intern(ids)
	return nil
}

// order puts the inodes in order and finds the earliest time.
func (b *builder) order(root *inode) {
	b.inodes = append(make([]*inode, 0, len(b.files)+256), root)
	b.minSec, b.minNsec = root.node.MtimeSec, root.node.MtimeNsec
	for i := 0; i < len(b.inodes); i++ {
		in := b.inodes[i]
		if n := in.node; n.MtimeSec < b.minSec || n.MtimeSec == b.minSec && n.MtimeNsec < b.minNsec {
			b.minSec, b.minNsec = n.MtimeSec, n.MtimeNsec
		}
		for _, e := range in.entries {
			if e.owner {
				b.inodes = append(b.inodes, e.child)
			}
		}
	}
}
