package erofs

import (
	"cmp"
	"slices"
	"strings"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

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

// An xattrID is an xattr as it comes from a tree.
type xattrID struct{ name, value string }

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
