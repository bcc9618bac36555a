package erofs

import (
	"cmp"
	"fmt"
	"math"
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

// An xattr is a pair of name and value, which several inodes may have.
type xattr struct {
	*xattrName
	kind  valueKind
	uses  int32
	ref   uint32 // place among the shared xattrs, in units of 4 bytes
	value string
	file  *tree.File
}

// A valueKind says how to make a value. Those of objects are made when they are
// written: most occur once, and together they are larger than the names of a tree.
type valueKind uint8

const (
	literal  valueKind = iota // value
	ofDigest                  // the digest of file
	toObject                  // the path of file's object
	toPath                    // value, a path
)

// An xattrName is a name in the form of the format.
type xattrName struct {
	name   string
	index  uint8
	suffix string
	filter uint32
}

func (x *xattr) shared() bool { return x.uses > 1 }

func (x *xattr) append(b []byte) []byte {
	head := len(b)
	b = append(b, uint8(len(x.suffix)), x.index, 0, 0)
	b = append(b, x.suffix...)
	value := len(b)
	b = x.appendValue(b)
	le.PutUint16(b[head+2:], uint16(len(b)-value))
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func (x *xattr) appendValue(b []byte) []byte {
	switch x.kind {
	case toPath:
		return append(append(b, '/'), x.value...)
	case toObject:
		return append(append(b, '/'), x.file.Object.Path()...)
	case ofDigest:
		// struct ovl_metacopy in fs/overlayfs/overlayfs.h of Linux
		d := x.file.Object
		b = append(b, 0, byte(4+d.Algorithm().Size()), 0, byte(d.Algorithm()))
		return d.AppendTo(b)
	}
	return append(b, x.value...)
}

// An object is what the inodes of files with one digest have in common.
type object struct{ metacopy, redirect *xattr }

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

// An xattrID is an xattr as it comes from a tree.
type xattrID struct{ name, value string }

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

// plain returns the xattrs of a node as they are stored, in the builder's scratch.
func (b *builder) plain(n *tree.Node) []xattrID {
	ids := b.ids[:0]
	for name, value := range n.Xattrs {
		if suffix, ok := strings.CutPrefix(name, overlayPrefix); ok {
			name = escapedPrefix + suffix
		}
		ids = append(ids, xattrID{name, value})
	}
	b.ids = ids
	return ids
}

// setXattr adds an xattr, or changes its value.
func setXattr(ids []xattrID, name, value string) []xattrID {
	for i := range ids {
		if ids[i].name == name {
			ids[i].value = value
			return ids
		}
	}
	return append(ids, xattrID{name, value})
}

// intern returns the xattrs of an inode in their order, and counts them.
func (b *builder) intern(ids []xattrID) []*xattr {
	b.ids = ids
	slices.SortFunc(ids, func(a, b xattrID) int { return strings.Compare(a.name, b.name) })
	list := b.list(len(ids))
	for _, id := range ids {
		list = append(list, b.xattr(id))
	}
	return list
}

// internFile is intern for a regular file with an object: it adds what names that.
func (b *builder) internFile(ids []xattrID, f *tree.File) []*xattr {
	if f.Object.IsZero() {
		ids = append(ids, xattrID{attrMetacopy, ""})
	}
	list := b.intern(ids)
	if !f.Object.IsZero() {
		list = insertXattr(list, b.object(f).metacopy)
	}
	switch {
	case f.Payload == "" && !f.Object.IsZero():
		list = insertXattr(list, b.object(f).redirect)
	case f.Payload != "" && f.Payload != tree.NoPayload:
		list = insertXattr(list, b.path(f.Payload))
	}
	return list
}

// path returns the redirect to a path that is spelled out. It may still be that of a
// digest, and equal to another file's.
func (b *builder) path(path string) *xattr {
	x := b.paths[path]
	if x != nil {
		return x
	}
	if d := digestOfPath(path); !d.IsZero() {
		return b.object(&tree.File{Object: d}).redirect
	}
	x = b.newXattr(attrRedirect)
	x.kind, x.value = toPath, path
	b.paths[path] = x
	return x
}

// insertXattr puts x at its place among those of an inode, and counts it.
func insertXattr(list []*xattr, x *xattr) []*xattr {
	x.uses++
	i, _ := slices.BinarySearchFunc(list, x.name, func(x *xattr, name string) int { return strings.Compare(x.name, name) })
	return slices.Insert(list, i, x)
}

// list returns an empty list for n xattrs and two more.
func (b *builder) list(n int) []*xattr {
	if n += 2; len(b.lists) < n {
		b.lists = make([]*xattr, max(n, 4096))
	}
	l := b.lists[:0:n]
	b.lists = b.lists[n:]
	return l
}

func (b *builder) xattr(id xattrID) *xattr {
	x := b.xattrs[id]
	if x == nil {
		x = b.newXattr(id.name)
		x.value = id.value
		b.xattrs[id] = x
		b.hasACL = b.hasACL || id.name == xattrPrefixes[2] || id.name == xattrPrefixes[3]
	}
	x.uses++
	return x
}

// object returns the object of a file's digest.
func (b *builder) object(f *tree.File) object {
	o, ok := b.objects[f.Object]
	if !ok {
		o = object{b.newXattr(attrMetacopy), b.newXattr(attrRedirect)}
		o.metacopy.kind, o.metacopy.file = ofDigest, f
		o.redirect.kind, o.redirect.file = toObject, f
		b.objects[f.Object] = o
	}
	return o
}

// digestOfPath returns the digest whose path is given, zero if it is none's. Images
// of ostree have other paths for all their files: most must not cost an error value.
func digestOfPath(path string) fsverity.Digest {
	if n := len(path) - 1; n != 2*fsverity.SHA256.Size() && n != 2*fsverity.SHA512.Size() {
		return fsverity.Digest{}
	}
	d, err := fsverity.ParsePath(path)
	if err != nil {
		return fsverity.Digest{}
	}
	return d
}

func (b *builder) newXattr(name string) *xattr {
	if len(b.room) == 0 {
		b.room = make([]xattr, 512)
	}
	x := &b.room[0]
	b.room = b.room[1:]
	x.xattrName = b.name(name)
	return x
}

func (b *builder) name(name string) *xattrName {
	x := b.names[name]
	if x == nil {
		x = &xattrName{name: name}
		x.index, x.suffix = splitXattr(name)
		x.filter = filterBit(x.index, x.suffix)
		b.names[name] = x
	}
	return x
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

// share lists the xattrs that several inodes have in the order of
// compute_erofs_shared_xattrs: by name, length and value, all descending.
func (b *builder) share() {
	list := &b.inodeTable.shared
	add := func(x *xattr) {
		if x.shared() {
			x.kind, x.value = literal, string(x.appendValue(nil))
			*list = append(*list, x)
		}
	}
	for _, x := range b.xattrs {
		add(x)
	}
	for _, x := range b.paths {
		add(x)
	}
	for _, o := range b.objects {
		add(o.metacopy)
		add(o.redirect)
	}
	slices.SortFunc(*list, func(x, y *xattr) int {
		return cmp.Or(
			strings.Compare(y.name, x.name),
			cmp.Compare(len(y.value), len(x.value)),
			strings.Compare(y.value, x.value),
		)
	})
	b.xattrs, b.paths, b.objects, b.files = nil, nil, nil, nil
}

// check returns an error if a node has no form as an inode.
func check(n *tree.Node) error {
	switch {
	case n.Mode > 0o177777:
		return fmt.Errorf("mode %o has more bits than st_mode", n.Mode)
	case n.MtimeNsec > 999_999_999:
		return fmt.Errorf("time has %d nanoseconds", n.MtimeNsec)
	}
	size := bodySize
	for name, value := range n.Xattrs {
		switch {
		case name == "":
			return fmt.Errorf("xattr without a name")
		case len(name) > tree.MaxXattr:
			return fmt.Errorf("xattr name %.40q… is too long: got %d bytes, want at most %d", name, len(name), tree.MaxXattr)
		case len(value) > tree.MaxValue:
			return fmt.Errorf("value of xattr %q is too long: got %d bytes, want at most %d", name, len(value), tree.MaxValue)
		}
		size += roundUp(entrySize+len(name)+len("overlay.")+len(value), 4)
	}
	// Room for what the format adds: at most five xattrs of directories or the two
	// of files, one of them with a path.
	const reserve = 5000
	if xattrCount(size)+reserve/4 > math.MaxUint16 {
		return fmt.Errorf("xattrs are too large: got %d bytes", size)
	}

	switch n.Type() {
	case tree.TypeDir, tree.TypeFIFO, tree.TypeSocket:
		return nil
	case tree.TypeChar, tree.TypeBlock:
		if n.Rdev > math.MaxUint32 {
			return fmt.Errorf("device %d:%d does not fit the 32 bits of EROFS", tree.Major(n.Rdev), tree.Minor(n.Rdev))
		}
		return nil
	case tree.TypeSymlink:
		switch {
		case n.Target == "":
			return fmt.Errorf("symbolic link without a target")
		case len(n.Target) > tree.MaxTarget:
			return fmt.Errorf("target is too long: got %d bytes, want at most %d", len(n.Target), tree.MaxTarget)
		case strings.IndexByte(n.Target, 0) >= 0:
			return fmt.Errorf("target %q contains NUL", n.Target)
		}
		return nil
	case tree.TypeRegular:
		return checkFile(n.File)
	}
	return fmt.Errorf("mode %o names no file type", n.Mode)
}

func checkFile(f *tree.File) error {
	switch {
	case f == nil:
		return fmt.Errorf("regular file without a File")
	case f.Size < 0 || f.Size > MaxSize:
		return fmt.Errorf("size %d is out of range: want at most %d", f.Size, int64(MaxSize))
	case len(f.Inline) > 0 && int64(len(f.Inline)) != f.Size:
		return fmt.Errorf("inline content has %d bytes, but size says %d", len(f.Inline), f.Size)
	case len(f.Inline) > MaxInline:
		return fmt.Errorf("inline content is too long: got %d bytes, want at most %d", len(f.Inline), MaxInline)
	case len(f.Payload) > tree.MaxTarget:
		return fmt.Errorf("payload is too long: got %d bytes, want at most %d", len(f.Payload), tree.MaxTarget)
	case f.Payload != tree.NoPayload && strings.IndexByte(f.Payload, 0) >= 0:
		return fmt.Errorf("payload %q contains NUL", f.Payload)
	}
	return nil
}
