package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// Info is what the head of an image says.
type Info struct {
	Version   int       // composefs version: 0, 1 or 2
	HasACL    bool      // some file has an ACL
	Inodes    uint64    // with the 256 of the names that V0 and V1 reserve
	Blocks    uint32    // of 4096 bytes
	BuildTime time.Time // the earliest of all files; 1970 in V2
}

// ReadInfo reads the head of an image.
func ReadInfo(r io.ReaderAt) (Info, error) {
	b := make([]byte, inodesStart)
	if n, err := r.ReadAt(b, 0); n < len(b) {
		if errors.Is(err, io.EOF) {
			return Info{}, fmt.Errorf("%w: got %d bytes, want more", ErrNotComposefs, n)
		}
		return Info{}, fmt.Errorf("reading image: %w", err)
	}
	h, err := parseHead(b)
	return h.Info, err
}

// A head is the composefs header and the superblock.
type head struct {
	Info
	root      uint64
	inodes    int64 // position of inode 0
	xattrs    int64 // position from which shared xattrs are counted
	buildSec  int64
	buildNsec uint32
}

func parseHead(b []byte) (head, error) {
	s := b[superOffset:]
	switch {
	case le.Uint32(b) != headerMagic:
		return head{}, fmt.Errorf("%w: magic number is %#x, want %#x", ErrNotComposefs, le.Uint32(b), uint32(headerMagic))
	case le.Uint32(b[4:]) != headerVersion:
		return head{}, fmt.Errorf("%w: header version is %d, want %d", ErrUnsupported, le.Uint32(b[4:]), headerVersion)
	case le.Uint32(b[12:]) > 2:
		return head{}, fmt.Errorf("%w: composefs version is %d, want 0, 1 or 2", ErrUnsupported, le.Uint32(b[12:]))
	case le.Uint32(s) != superMagic:
		return head{}, fmt.Errorf("%w: EROFS magic number is %#x, want %#x", ErrNotComposefs, le.Uint32(s), uint32(superMagic))
	case s[12] != blockBits:
		return head{}, fmt.Errorf("%w: blocks of 2^%d bytes, want 2^%d", ErrUnsupported, s[12], blockBits)
	case le.Uint32(s[80:]) != 0:
		return head{}, fmt.Errorf("%w: EROFS features %#x", ErrUnsupported, le.Uint32(s[80:]))
	case le.Uint32(s[32:]) > 999_999_999:
		return head{}, fmt.Errorf("%w: build time has %d nanoseconds", ErrCorrupt, le.Uint32(s[32:]))
	}
	h := head{
		Info: Info{
			Version: int(le.Uint32(b[12:])),
			HasACL:  le.Uint32(b[8:])&flagACL != 0,
			Inodes:  le.Uint64(s[16:]),
			Blocks:  le.Uint32(s[36:]),
		},
		root:      uint64(le.Uint16(s[14:])),
		buildSec:  int64(le.Uint64(s[24:])),
		buildNsec: le.Uint32(s[32:]),
		inodes:    int64(le.Uint32(s[40:])) << blockBits,
		xattrs:    int64(le.Uint32(s[44:])) << blockBits,
	}
	h.BuildTime = time.Unix(h.buildSec, int64(h.buildNsec)).UTC()
	return h, nil
}

// Read reads an image of the given size in bytes and undoes what Write adds: the
// names that hide the object store, escaped whiteouts and xattrs, and the xattrs
// that stand for objects. Written in the image's format, the tree gives the same image
// again, unless that has sizes on devices (see [tree.Node]): they are not in images.
//
// The image may be anybody's: memory stays within a small multiple of its size, and
// what a reader of the tree could not bear (directories within themselves or with a
// second name, names out of order, content beyond the end) is an error.
func Read(r io.ReaderAt, size int64) (*tree.Tree, error) {
	rd := reader{}
	if err := rd.read(r, size); err != nil {
		return nil, fmt.Errorf("reading image: %w", err)
	}
	return rd.tree(), nil
}

// Objects returns the objects that an image needs, each once, in ascending order. It
// builds no tree.
func Objects(r io.ReaderAt, size int64) ([]fsverity.Digest, error) {
	rd := reader{objects: map[fsverity.Digest]bool{}}
	if err := rd.read(r, size); err != nil {
		return nil, fmt.Errorf("reading image: %w", err)
	}
	return rd.sortedObjects(), nil
}

// A reader walks an image breadth first, as Write numbers inodes.
type reader struct {
	*source
	head
	root    *tree.Node
	xattrs  *xattrReader
	files   map[uint64]*file
	dirs    map[uint64]bool
	linked  []*file // with more than one name
	nextIno uint32
	nodes   []tree.Node // allocated ahead

	attrMaps map[string]map[string]string // of files, by their content
	attrKey  []byte                       // scratch

	// If it is not nil, only objects are wanted.
	objects map[fsverity.Digest]bool
	view    *View // nil unless wanted
}

// A dir is a directory that is to be read.
type dir struct {
	parent *dir
	name   string
	nid    uint64
	depth  int
	in     rawInode

	node      *tree.Node // nil if only objects are wanted
	xattrs    []xattrID
	whiteouts bool // it has some
}

func (d *dir) path() string {
	if d.parent == nil {
		return "/"
	}
	return tree.Join(d.parent.path(), d.name)
}

// A name is a name of a file.
type name struct {
	dir  *dir
	name string
}

func (n name) path() string { return tree.Join(n.dir.path(), n.name) }

// A file is what is not a directory.
type file struct {
	node  *tree.Node // nil if the tree does not show it
	nlink uint32
	ino   uint32
	typ   byte // in directory entries
	first name
	more  []name // further names
	owner name   // see tree.Tree; unknown where inodes are numbered otherwise
}

// own notes that a name may be the one which counts: inodes are numbered as their
// owners are met.
func (r *reader) own(f *file, at name) {
	if f.owner.dir == nil && f.ino == r.nextIno {
		f.owner = at
		r.nextIno++
	}
}

// A rawInode is an inode with its place.
type rawInode struct {
	inodeHead
	pos  int64
	body int64 // size of the inode with its xattrs
}

func (r *reader) read(ra io.ReaderAt, size int64) error {
	r.source = newSource(ra, size)
	if size < blockSize {
		return fmt.Errorf("%w: got %d bytes, want at least %d", ErrNotComposefs, size, blockSize)
	}
	b, err := r.at(0, inodesStart)
	if err != nil {
		return err
	}
	if r.head, err = parseHead(b); err != nil {
		return err
	}
	r.files, r.dirs = map[uint64]*file{}, map[uint64]bool{}
	r.attrMaps = map[string]map[string]string{}
	r.xattrs = newXattrReader(r.source, r.head.xattrs)

	in, err := r.inode(r.head.root)
	if err != nil {
		return err
	}
	root := &dir{nid: r.head.root, in: in, depth: 1}
	if direntType(in.mode) != direntType(tree.TypeDir) {
		return fmt.Errorf("%w: the root is not a directory", ErrCorrupt)
	}
	r.dirs[root.nid] = true
	if err := r.openDir(root); err != nil {
		return err
	}
	r.root, r.nextIno = root.node, in.ino+1
	for queue := []*dir{root}; len(queue) > 0; queue = queue[1:] {
		d := queue[0]
		subdirs, err := r.dir(d)
		if err != nil {
			return fmt.Errorf("%q: %w", d.path(), err)
		}
		queue = append(queue, subdirs...)
	}
	return nil
}

// inode reads an inode, but not its xattrs and data.
func (r *reader) inode(nid uint64) (rawInode, error) {
	if nid > uint64(r.size>>slotBits) {
		return rawInode{}, fmt.Errorf("%w: inode %d lies beyond its end", ErrCorrupt, nid)
	}
	pos := r.head.inodes + int64(nid)<<slotBits
	b, err := r.at(pos, compactSize)
	if err != nil {
		return rawInode{}, err
	}
	size := int64(headSize(le.Uint16(b)))
	if b, err = r.at(pos, size); err != nil {
		return rawInode{}, err
	}
	in := rawInode{inodeHead: parseInode(b), pos: pos}
	in.body = size + int64(xattrSize(in.xattrs))
	if err := r.spend(in.body); err != nil {
		return rawInode{}, err
	}
	if in.compact {
		in.sec, in.nsec = r.buildSec, r.buildNsec
	}
	switch in.layout {
	case layoutPlain, layoutInline, layoutChunks:
	default:
		return rawInode{}, fmt.Errorf("%w: data layout %d", ErrUnsupported, in.layout)
	}
	if in.nsec > 999_999_999 {
		return rawInode{}, fmt.Errorf("%w: time has %d nanoseconds", ErrCorrupt, in.nsec)
	}
	return in, nil
}

// dir reads the entries of a directory and returns those that are directories.
func (r *reader) dir(d *dir) (subdirs []*dir, err error) {
	if d.in.layout == layoutChunks {
		return nil, fmt.Errorf("%w: directory of chunks", ErrUnsupported)
	}
	size := int64(d.in.size)
	if size <= 0 || size > r.size {
		return nil, fmt.Errorf("%w: directory of %d bytes", ErrCorrupt, d.in.size)
	}
	var last string
	var seen int // of "." and ".."
	for off := int64(0); off < size; off += blockSize {
		b, err := r.data(&d.in, off, min(blockSize, size-off))
		if err != nil {
			return nil, err
		}
		err = direntsIn(b, func(name string, nid uint64, typ byte) error {
			if name <= last {
				return fmt.Errorf("%w: name %q comes after %q", ErrCorrupt, name, last)
			}
			last = name
			if name == "." || name == ".." {
				want := d.nid
				if name == ".." && d.parent != nil {
					want = d.parent.nid
				}
				if nid != want {
					return fmt.Errorf("%w: %q is inode %d, want %d", ErrCorrupt, name, nid, want)
				}
				seen++
				return nil
			}
			if err := tree.CheckName(name); err != nil {
				return fmt.Errorf("%w: %w", ErrCorrupt, err)
			}
			sub, err := r.entry(d, name, nid, typ)
			if err != nil {
				return fmt.Errorf("%q: %w", name, err)
			}
			if sub != nil {
				subdirs = append(subdirs, sub)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	if seen != 2 {
		return nil, fmt.Errorf("%w: directory without \".\" or \"..\"", ErrCorrupt)
	}
	return subdirs, r.closeDir(d)
}

// direntsIn calls fn for the entries in a block of a directory (struct erofs_dirent).
func direntsIn(b []byte, fn func(name string, nid uint64, typ byte) error) error {
	if len(b) < direntSize {
		return fmt.Errorf("%w: directory block of %d bytes", ErrCorrupt, len(b))
	}
	start := int(le.Uint16(b[8:]))
	count := start / direntSize
	if start%direntSize != 0 || count == 0 || start > len(b) {
		return fmt.Errorf("%w: names of a directory begin at %d", ErrCorrupt, start)
	}
	for i := range count {
		e := b[i*direntSize:]
		from, to := int(le.Uint16(e[8:])), len(b)
		if i+1 < count {
			to = int(le.Uint16(e[direntSize+8:]))
		}
		if from < start || to < from || to > len(b) {
			return fmt.Errorf("%w: name from %d to %d of %d bytes", ErrCorrupt, from, to, len(b))
		}
		name := b[from:to]
		if i+1 == count { // zeros fill the block
			if i := bytes.IndexByte(name, 0); i >= 0 {
				name = name[:i]
			}
		}
		if err := fn(string(name), le.Uint64(e), e[10]); err != nil {
			return err
		}
	}
	return nil
}

// entry adds a name to a directory. It returns a directory that is still to be read.
func (r *reader) entry(d *dir, entryName string, nid uint64, typ byte) (*dir, error) {
	at := name{d, entryName}
	if f := r.files[nid]; f != nil {
		if f.node != nil {
			d.node.Dir[entryName] = f.node
			d.whiteouts = d.whiteouts || f.node.IsWhiteout()
		}
		if len(f.more) == 0 {
			r.linked = append(r.linked, f)
		}
		f.more = append(f.more, at)
		r.own(f, at)
		return nil, checkType(typ, f.typ)
	}
	if r.dirs[nid] {
		return nil, fmt.Errorf("%w: a directory has a second name", ErrCorrupt)
	}
	in, err := r.inode(nid)
	if err != nil {
		return nil, err
	}
	if err := checkType(typ, direntType(in.mode)); err != nil {
		return nil, err
	}
	if in.mode&tree.TypeMask == tree.TypeDir {
		if in.ino == r.nextIno {
			r.nextIno++
		}
		if d.depth == MaxDepth {
			return nil, fmt.Errorf("%w: more than %d directories within each other", ErrCorrupt, MaxDepth)
		}
		r.dirs[nid] = true
		sub := &dir{parent: d, name: entryName, nid: nid, depth: d.depth + 1, in: in}
		if err := r.openDir(sub); err != nil {
			return nil, err
		}
		if r.objects == nil {
			d.node.Dir[entryName] = sub.node
		}
		return sub, nil
	}
	f := &file{first: at, nlink: in.nlink, ino: in.ino, typ: direntType(in.mode)}
	r.own(f, at)
	r.files[nid] = f
	if f.node, err = r.file(&in); err != nil {
		return nil, err
	}
	if f.node != nil {
		d.node.Dir[entryName] = f.node
		d.whiteouts = d.whiteouts || f.node.IsWhiteout()
	}
	return nil, nil
}

func checkType(got, want byte) error {
	if got != want || want == 0 {
		return fmt.Errorf("%w: directory entry of type %d, want %d", ErrCorrupt, got, want)
	}
	return nil
}

// data returns n bytes of an inode's data from an offset, which is a multiple of
// the block size; they do not go beyond that block.
func (r *reader) data(in *rawInode, off, n int64) ([]byte, error) {
	if err := r.spend(n); err != nil {
		return nil, err
	}
	if in.layout == layoutInline && off+n == int64(in.size) {
		if n == blockSize { // it would be a full block
			return nil, fmt.Errorf("%w: a full block behind an inode", ErrCorrupt)
		}
		return r.at(in.pos+in.body, n)
	}
	return r.at(int64(in.data)<<blockBits+off, n)
}

// content returns all data of an inode that may have up to limit bytes.
func (r *reader) content(in *rawInode, limit int64) ([]byte, error) {
	if in.size > uint64(limit) {
		return nil, fmt.Errorf("%w: %d bytes of data, want at most %d", ErrCorrupt, in.size, limit)
	}
	var b []byte
	for off := int64(0); off < int64(in.size); off += blockSize {
		p, err := r.data(in, off, min(blockSize, int64(in.size)-off))
		if err != nil {
			return nil, err
		}
		b = append(b, p...)
	}
	return b, nil
}

func (r *reader) tree() *tree.Tree {
	t := &tree.Tree{Root: r.root}
	for _, f := range r.linked {
		if f.node == nil {
			continue // a whiteout that stands for nothing
		}
		if f.nlink == uint32(1+len(f.more)) {
			f.node.Nlink = 0
		} else if f.node.Nlink == 0 {
			f.node.Nlink = f.nlink // 1
		}
		if f.owner.dir == nil {
			continue
		}
		owner := f.owner.path()
		for _, n := range append(f.more, f.first) {
			if tree.ComparePaths(n.path(), owner) < 0 {
				if t.Owners == nil {
					t.Owners = map[*tree.Node]string{}
				}
				t.Owners[f.node] = owner
				break
			}
		}
	}
	return t
}

func (r *reader) sortedObjects() []fsverity.Digest {
	list := make([]fsverity.Digest, 0, len(r.objects))
	for d := range r.objects {
		list = append(list, d)
	}
	var x, y [64]byte
	slices.SortFunc(list, func(a, b fsverity.Digest) int { return bytes.Compare(a.AppendTo(x[:0]), b.AppendTo(y[:0])) })
	return list
}
