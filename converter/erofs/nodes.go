package erofs

import (
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// An xattrReader reads the xattrs of inodes.
type xattrReader struct {
	*source
	base  int64              // of shared xattrs
	cache map[uint32]xattrID // shared xattrs
	names map[string]string  // by index and suffix
	list  []xattrID          // scratch
	key   []byte             // scratch
}

func newXattrReader(s *source, base int64) *xattrReader {
	return &xattrReader{source: s, base: base, cache: map[uint32]xattrID{}, names: map[string]string{}}
}

// read returns the xattrs of an inode: its own, then the shared ones. The list is
// valid until the next call.
func (x *xattrReader) read(in *rawInode) ([]xattrID, error) {
	if in.xattrs == 0 {
		return nil, nil
	}
	size := int64(xattrSize(in.xattrs))
	b, err := x.at(in.pos+in.body-size, size)
	if err != nil {
		return nil, err
	}
	refs := b[bodySize:]
	shared := int(b[4])
	if len(refs) < 4*shared {
		return nil, fmt.Errorf("%w: %d shared xattrs in %d bytes", ErrCorrupt, shared, size)
	}
	x.list = x.list[:0]
	for own := refs[4*shared:]; len(own) > 0; {
		n, err := entryLen(own)
		if err != nil {
			return nil, err
		}
		id, err := x.parse(own[:n])
		if err != nil {
			return nil, err
		}
		x.list = append(x.list, id)
		own = own[min(roundUp(n, 4), len(own)):]
	}
	for i := range shared {
		id, err := x.shared(le.Uint32(refs[4*i:]))
		if err != nil {
			return nil, err
		}
		x.list = append(x.list, id)
	}
	return x.list, x.checkNames()
}

// entryLen returns the length of the xattr (struct erofs_xattr_entry) at the
// beginning of b.
func entryLen(b []byte) (int, error) {
	if len(b) >= entrySize {
		if n := entrySize + int(b[0]) + int(le.Uint16(b[2:])); n <= len(b) {
			return n, nil
		}
	}
	return 0, fmt.Errorf("%w: an xattr goes beyond %d bytes", ErrCorrupt, len(b))
}

func (x *xattrReader) parse(b []byte) (xattrID, error) {
	index, value := b[1], b[entrySize+int(b[0]):]
	if int(index) >= len(xattrPrefixes) {
		return xattrID{}, fmt.Errorf("%w: xattr prefix %d", ErrUnsupported, index)
	}
	suffix := b[entrySize : entrySize+int(b[0])]
	x.key = append(append(x.key[:0], index), suffix...)
	name, ok := x.names[string(x.key)]
	if !ok {
		name = xattrPrefixes[index] + string(suffix)
		switch {
		case name == "":
			return xattrID{}, fmt.Errorf("%w: xattr without a name", ErrCorrupt)
		case strings.IndexByte(name, 0) >= 0:
			return xattrID{}, fmt.Errorf("%w: xattr name %q contains NUL", ErrCorrupt, name)
		}
		x.names[string(x.key)] = name
	}
	return xattrID{name, string(value)}, nil
}

func (x *xattrReader) shared(ref uint32) (xattrID, error) {
	if id, ok := x.cache[ref]; ok {
		return id, nil
	}
	pos := x.base + 4*int64(ref)
	b, err := x.at(pos, entrySize)
	if err != nil {
		return xattrID{}, err
	}
	n := int64(entrySize) + int64(b[0]) + int64(le.Uint16(b[2:]))
	if err := x.spend(n); err != nil {
		return xattrID{}, err
	}
	if b, err = x.at(pos, n); err != nil {
		return xattrID{}, err
	}
	id, err := x.parse(b)
	if err == nil {
		x.cache[ref] = id
	}
	return id, err
}

// checkNames returns an error if two xattrs of the list have one name.
func (x *xattrReader) checkNames() error {
	const few = 16
	if len(x.list) <= few {
		for i, a := range x.list {
			for _, b := range x.list[:i] {
				if a.name == b.name {
					return fmt.Errorf("%w: two xattrs %q", ErrCorrupt, a.name)
				}
			}
		}
		return nil
	}
	seen := make(map[string]bool, len(x.list))
	for _, a := range x.list {
		if seen[a.name] {
			return fmt.Errorf("%w: two xattrs %q", ErrCorrupt, a.name)
		}
		seen[a.name] = true
	}
	return nil
}

// An overlay is what the xattrs of a file tell overlayfs.
type overlay struct {
	object   fsverity.Digest
	path     string // of the object
	metacopy bool
	redirect bool
	whiteout bool // escaped
}

// unescape splits the xattrs of an inode into what they say to overlayfs and those
// that a tree has.
func unescape(list []xattrID, regular bool) (o overlay, rest []xattrID, err error) {
	rest = list[:0]
	for _, x := range list {
		suffix, ok := strings.CutPrefix(x.name, overlayPrefix)
		if !ok {
			rest = append(rest, x)
			continue
		}
		switch {
		case x.name == attrMetacopy:
			o.metacopy = true
			if o.object, err = parseMetacopy(x.value); err != nil {
				return o, nil, err
			}
		case x.name == attrRedirect:
			o.redirect = true
			o.path = strings.TrimPrefix(x.value, "/")
			if o.path == "" || strings.IndexByte(o.path, 0) >= 0 {
				return o, nil, fmt.Errorf("%w: redirect to %.100q", ErrCorrupt, x.value)
			}
		case x.name == attrWhiteout && regular:
			o.whiteout = true
		case strings.HasPrefix(x.name, escapedPrefix):
			rest = append(rest, xattrID{overlayPrefix + strings.TrimPrefix(suffix, "overlay."), x.value})
		}
		// Any other is for overlayfs only, such as the root's opaque=y.
	}
	if !regular && (o.metacopy || o.redirect) {
		return o, nil, fmt.Errorf("%w: redirection of what is no regular file", ErrCorrupt)
	}
	return o, rest, nil
}

// parseMetacopy is the inverse of metacopy.
func parseMetacopy(v string) (fsverity.Digest, error) {
	if v == "" {
		return fsverity.Digest{}, nil
	}
	if len(v) < 4 || v[0] != 0 || int(v[1]) != len(v) || v[2] != 0 {
		return fsverity.Digest{}, fmt.Errorf("%w: metacopy %.100q", ErrCorrupt, v)
	}
	d, err := fsverity.New(fsverity.Algorithm(v[3]), []byte(v[4:]))
	if err != nil {
		return d, fmt.Errorf("%w: metacopy: %w", ErrCorrupt, err)
	}
	return d, nil
}

// openDir makes the node of a directory; closeDir completes it when all its entries
// are known.
func (r *reader) openDir(d *dir) error {
	list, err := r.xattrs.read(&d.in)
	if err != nil {
		return err
	}
	_, d.xattrs, err = unescape(slices.Clone(list), false)
	if err != nil || r.objects != nil {
		return err
	}
	d.node = r.node(&d.in)
	d.node.Dir = map[string]*tree.Node{}
	if r.view != nil {
		r.view.add(d.node, int64(d.in.size), slices.Clone(list))
	}
	return nil
}

func (r *reader) closeDir(d *dir) error {
	if d.node == nil {
		return nil
	}
	if d.whiteouts && r.Version < 2 {
		d.xattrs = slices.DeleteFunc(d.xattrs, func(x xattrID) bool {
			switch x.name {
			case overlayPrefix + "whiteouts", userWhiteouts:
				return true
			case attrOpaque, userHasOpaque:
				return r.Version == 1 && x.value == opaqueWhiteouts
			}
			return false
		})
	}
	d.node.Xattrs = r.attrs(d.xattrs)
	return r.check(d.node)
}

// check makes sure that a node which was read can be written.
func (r *reader) check(n *tree.Node) error {
	if err := check(n); err != nil {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return nil
}

// file reads what is not a directory. It returns nil for what a tree does not show,
// or if only objects are wanted.
func (r *reader) file(in *rawInode) (*tree.Node, error) {
	list, err := r.xattrs.read(in)
	if err != nil {
		return nil, err
	}
	var shown []xattrID
	if r.view != nil {
		shown = slices.Clone(list)
	}
	typ := in.mode & tree.TypeMask
	o, rest, err := unescape(list, typ == tree.TypeRegular)
	if err != nil {
		return nil, err
	}
	if r.objects != nil {
		o.collect(r.objects)
		return nil, nil
	}
	n := r.node(in)
	switch typ {
	case tree.TypeRegular:
		if !o.whiteout {
			err = r.regular(n, in, &o)
			break
		}
		if in.size != 0 || o.metacopy || o.redirect {
			return nil, fmt.Errorf("%w: whiteout with content", ErrCorrupt)
		}
		n.Mode = tree.TypeChar | n.Mode&^tree.TypeMask
		rest = slices.DeleteFunc(rest, func(x xattrID) bool { return x.name == userWhiteout })
	case tree.TypeSymlink:
		err = r.symlink(n, in)
	case tree.TypeChar, tree.TypeBlock:
		n.Rdev = uint64(in.data)
		if n.IsWhiteout() && r.Version < 2 {
			return nil, nil // one of those that hide the object store
		}
	}
	if err != nil {
		return nil, err
	}
	n.Xattrs = r.attrs(rest)
	if r.view != nil {
		r.view.add(n, 0, shown)
	}
	return n, r.check(n)
}

func (o *overlay) collect(objects map[fsverity.Digest]bool) {
	if !o.object.IsZero() {
		objects[o.object] = true
	}
	// What overlayfs opens is the path. Digest and path agree in all images but
	// those that were made to confuse garbage collection.
	if d := digestOfPath(o.path); !d.IsZero() {
		objects[d] = true
	}
}

func (r *reader) regular(n *tree.Node, in *rawInode, o *overlay) error {
	if in.size > math.MaxInt64 {
		return fmt.Errorf("%w: size %d", ErrCorrupt, in.size)
	}
	n.File = &tree.File{Size: int64(in.size)}
	if in.layout != layoutChunks {
		if o.metacopy || o.redirect {
			return fmt.Errorf("%w: an object besides content of %d bytes", ErrCorrupt, in.size)
		}
		b, err := r.content(in, MaxInline)
		if len(b) > 0 {
			n.File.Inline = slices.Clone(b)
		}
		return err
	}
	if in.size == 0 || in.size > MaxSize {
		return fmt.Errorf("%w: chunks of %d bytes", ErrCorrupt, in.size)
	}
	n.File.Object = o.object
	switch {
	case !o.redirect && !o.object.IsZero():
		n.File.Payload = tree.NoPayload
	case o.redirect && o.path != o.object.Path():
		n.File.Payload = o.path
	}
	return nil
}

func (r *reader) symlink(n *tree.Node, in *rawInode) error {
	if in.layout == layoutChunks {
		return fmt.Errorf("%w: symbolic link of chunks", ErrUnsupported)
	}
	b, err := r.content(in, tree.MaxTarget)
	if err != nil {
		return err
	}
	n.Target = string(b)
	return nil
}

// node makes a node of what all inodes say.
func (r *reader) node(in *rawInode) *tree.Node {
	if len(r.nodes) == 0 {
		r.nodes = make([]tree.Node, 128)
	}
	n := &r.nodes[0]
	r.nodes = r.nodes[1:]
	n.Mode, n.UID, n.GID, n.MtimeSec, n.MtimeNsec = in.mode, in.uid, in.gid, in.sec, in.nsec
	if r.view != nil || in.mode&tree.TypeMask != tree.TypeDir && in.nlink != 1 {
		n.Nlink = in.nlink
	}
	return n
}

// attrs returns a map of xattrs, the same one for equal lists.
func (r *reader) attrs(list []xattrID) map[string]string {
	if len(list) == 0 {
		return nil
	}
	k := r.attrKey[:0]
	for _, x := range list {
		k = binary.AppendUvarint(k, uint64(len(x.name)))
		k = append(k, x.name...)
		k = binary.AppendUvarint(k, uint64(len(x.value)))
		k = append(k, x.value...)
	}
	r.attrKey = k
	if m, ok := r.attrMaps[string(k)]; ok {
		return m
	}
	m := make(map[string]string, len(list))
	for _, x := range list {
		m[x.name] = x.value
	}
	const maxCached = 4096
	if len(r.attrMaps) < maxCached {
		r.attrMaps[string(k)] = m
	}
	return m
}

// A View is a tree with what composefs-info(1) shows beyond it.
type View struct {
	// Tree has every node's number of links as the image says it, directories'
	// too, and no owners: the first name in byte order is the file.
	Tree  *tree.Tree
	sizes map[*tree.Node]int64
	attrs map[*tree.Node][]xattrID
}

// ReadView is Read with a View.
func ReadView(r io.ReaderAt, size int64) (*View, error) {
	v := &View{sizes: map[*tree.Node]int64{}, attrs: map[*tree.Node][]xattrID{}}
	rd := reader{view: v}
	if err := rd.read(r, size); err != nil {
		return nil, fmt.Errorf("reading image: %w", err)
	}
	v.Tree = &tree.Tree{Root: rd.root}
	return v, nil
}

// WithRoot returns the view of a tree whose root was changed.
func (v *View) WithRoot(root *tree.Node) *View {
	w := &View{Tree: &tree.Tree{Root: root}, sizes: maps.Clone(v.sizes), attrs: maps.Clone(v.attrs)}
	w.sizes[root], w.attrs[root] = v.sizes[v.Tree.Root], v.attrs[v.Tree.Root]
	return w
}

// Size returns the size in bytes that the image gives a directory.
func (v *View) Size(dir *tree.Node) int64 { return v.sizes[dir] }

// Xattrs yields the xattrs that libcomposefs reads, in its order: an inode's own
// ones, then the shared ones. They are those of the node, and also some that mark
// directories with whiteouts.
func (v *View) Xattrs(n *tree.Node) iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		for _, x := range v.attrs[n] {
			if !yield(x.name, x.value) {
				return
			}
		}
	}
}

// add keeps the xattrs of a node as lcfs_build_node_erofs_xattr has them.
func (v *View) add(n *tree.Node, size int64, list []xattrID) {
	if n == nil {
		return
	}
	if n.IsDir() {
		v.sizes[n] = size
	}
	list = slices.DeleteFunc(list, func(x xattrID) bool {
		switch x.name {
		case attrWhiteouts, userWhiteout, userWhiteouts:
			return true
		case attrWhiteout:
			return n.IsWhiteout()
		}
		return strings.HasPrefix(x.name, overlayPrefix) && !strings.HasPrefix(x.name, escapedPrefix)
	})
	for i := range list {
		if suffix, ok := strings.CutPrefix(list[i].name, escapedPrefix); ok {
			list[i].name = overlayPrefix + suffix
		}
	}
	if len(list) > 0 {
		v.attrs[n] = list
	}
}
