package layer

import (
	"archive/tar"
	"fmt"
	"maps"
	"math"
	"strings"
	"time"

	"github.com/particle-os/particle/converter/tree"
)

// Names with a meaning (OCI image-spec layer.md, "Whiteouts"). Podman and Docker
// skip what else begins with metaPrefix: bookkeeping of AUFS, which old Docker
// versions exported.
const (
	whiteoutPrefix = ".wh."
	metaPrefix     = ".wh..wh."
	opaqueName     = ".wh..wh..opq"
)

// entryCost is about what a node takes in memory, in bytes.
const entryCost = 400

// A builder makes a tree of the entries of one layer.
type builder struct {
	root    *tree.Node
	entries int

	// Whiteouts and the like take effect at the end, so that their place in the tar
	// does not matter.
	whiteouts, meta []mark
	opaque          []*tree.Node

	// The directory of the last entry; most entries are in the same one.
	lastPath string
	lastDir  *tree.Node
	lastMeta bool

	maxSize, expanded   int64
	maxMetadata, memory int64

	implied                  bool
	overlay, devices, global first
}

// A mark is a name in a directory.
type mark struct {
	dir  *tree.Node
	name string
}

// first counts what there is a warning about and keeps the first case.
type first struct {
	n    int
	what string
}

func (f *first) add(what string) {
	if f.n++; f.n == 1 {
		f.what = what
	}
}

func newBuilder(opts Options) *builder {
	return &builder{root: tree.New().Root, maxSize: opts.maxSize(), maxMetadata: opts.maxMetadata()}
}

// charge counts memory that the tree keeps.
func (b *builder) charge(n int) error {
	if b.memory += int64(n); b.memory > b.maxMetadata {
		return fmt.Errorf("%w: names, xattrs and small files take more than %d bytes of memory: split the layer", ErrTooLarge, b.maxMetadata)
	}
	return nil
}

// expand counts the bytes of a sparse file: a header is enough to ask for exabytes
// of zeros.
func (b *builder) expand(n int64) error {
	if n > b.maxSize-b.expanded {
		return tooLarge(b.maxSize)
	}
	b.expanded += n
	return nil
}

// add adds an entry. If it has a body, add returns the file whose content that is,
// although perhaps one that is in no tree.
func (b *builder) add(hdr *tar.Header) (*tree.File, error) {
	b.entries++
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		for key := range hdr.PAXRecords {
			if key != "comment" {
				b.global.add(fmt.Sprintf("%q", hdr.Name))
				break
			}
		}
		return nil, nil
	}
	path, err := cleanPath(hdr.Name)
	if err != nil {
		return nil, err
	}
	n, err := b.node(hdr, path)
	if err != nil {
		return nil, err
	}
	if path == "" {
		if n == nil || !n.IsDir() {
			return nil, fmt.Errorf("%w: the root can be nothing but a directory", ErrType)
		}
		return nil, b.update(b.root, n)
	}

	dir, base := "", path
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		dir, base = path[:i], path[i+1:]
	}
	parent, meta, err := b.parent(dir)
	if err != nil {
		return nil, err
	}
	if !meta && strings.HasPrefix(base, whiteoutPrefix) {
		switch {
		case base == opaqueName:
			b.opaque = append(b.opaque, parent)
			return body(n), b.charge(8)
		case strings.HasPrefix(base, metaPrefix):
			// Hard links may point into it: it goes at the end only.
			b.meta = append(b.meta, mark{parent, base})
		default:
			name := strings.Clone(base[len(whiteoutPrefix):])
			// ".wh." alone and ".wh.." would delete the directory itself, ".wh..."
			// its parent.
			if err := tree.CheckName(name); err != nil {
				return nil, fmt.Errorf("%w: a whiteout must name something in its directory: %w", ErrName, err)
			}
			b.whiteouts = append(b.whiteouts, mark{parent, name})
			return body(n), b.charge(entryCost + len(name))
		}
	}
	if hdr.Typeflag == tar.TypeLink {
		if n, err = b.target(hdr.Linkname, path); err != nil {
			return nil, err
		}
		return nil, b.put(parent, base, n)
	}
	return n.File, b.put(parent, base, n)
}

func body(n *tree.Node) *tree.File {
	if n == nil {
		return nil // a hard link
	}
	return n.File
}

// put places n in a directory. The last of several entries with one name wins;
// directories keep what is in them.
func (b *builder) put(parent *tree.Node, name string, n *tree.Node) error {
	old := parent.Dir[name]
	switch {
	case old == nil:
		name = strings.Clone(name) // without the path before it
		if err := b.charge(entryCost + len(name)); err != nil {
			return err
		}
	case old.IsDir() && n.IsDir():
		return b.update(old, n)
	case old.IsDir():
		b.lastDir = nil // it may be in there
	}
	parent.Dir[name] = n
	return nil
}

// update gives a directory the metadata of a later entry. Its xattrs are added, as
// an unpacking setxattr would.
func (b *builder) update(dir, n *tree.Node) error {
	if len(dir.Xattrs) > 0 {
		xattrs := maps.Clone(dir.Xattrs)
		maps.Copy(xattrs, n.Xattrs)
		n.Xattrs = xattrs
		if err := tree.CheckXattrs(xattrs); err != nil {
			return fmt.Errorf("%w: together with an earlier entry of that name: %w", ErrValue, err)
		}
	}
	dir.Stat, dir.Implied = n.Stat, false
	return nil
}

// parent returns the directory with the given clean path, which it makes where the
// layer has not listed it, and whether it is one of AUFS bookkeeping. Links are
// never followed: what they point to is known only in the merged tree, and a
// hostile layer would use them to write elsewhere.
func (b *builder) parent(path string) (dir *tree.Node, meta bool, err error) {
	if b.lastDir != nil && path == b.lastPath {
		return b.lastDir, b.lastMeta, nil
	}
	dir = b.root
	if path != "" {
		for name := range strings.SplitSeq(path, "/") {
			if !meta && strings.HasPrefix(name, whiteoutPrefix) {
				if !strings.HasPrefix(name, metaPrefix) || name == opaqueName {
					return nil, false, fmt.Errorf("%w: it lies below the whiteout %q", ErrName, name)
				}
				meta = true
				b.meta = append(b.meta, mark{dir, strings.Clone(name)})
			}
			child := dir.Dir[name]
			switch {
			case child == nil:
				child = tree.NewImplied()
				b.implied = true
				if err := b.put(dir, name, child); err != nil {
					return nil, false, err
				}
			case !child.IsDir():
				return nil, false, fmt.Errorf("%w: it lies below %q, which is %s in the same layer", ErrName, name, typeName(child.Mode))
			}
			dir = child
		}
	}
	b.lastPath, b.lastDir, b.lastMeta = path, dir, meta
	return dir, meta, nil
}

// target returns the node that a hard link with the given path leads to. Only
// earlier entries of the same layer count, as for everyone who unpacks one.
func (b *builder) target(link, path string) (*tree.Node, error) {
	target, err := cleanPath(link)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: target of the hard link: %w", ErrLink, err)
	case target == path:
		return nil, fmt.Errorf("%w: a hard link to itself", ErrLink)
	case strings.HasPrefix(target, path+"/"):
		return nil, fmt.Errorf("%w: a hard link to %.300q, which it would replace", ErrLink, link)
	}
	// The path that Lookup takes needs no links followed: those have no children.
	n := (&tree.Tree{Root: b.root}).Lookup(target)
	switch {
	case n == nil:
		return nil, fmt.Errorf("%w: a hard link to %.300q, which the layer does not have before it", ErrLink, link)
	case n.IsDir():
		return nil, fmt.Errorf("%w: a hard link to %.300q, a directory", ErrLink, link)
	case n.IsWhiteout():
		return tree.NewWhiteout(), nil // deletes, so it is no file with two names
	}
	return n, nil
}

// finish returns the tree and the warnings.
func (b *builder) finish() (*tree.Tree, []string) {
	for _, m := range b.meta {
		delete(m.dir.Dir, m.name)
	}
	for _, m := range b.whiteouts {
		// A name that is both deleted and listed is new: neither content nor
		// metadata shines through from below.
		switch n := m.dir.Dir[m.name]; {
		case n == nil:
			m.dir.Dir[m.name] = tree.NewWhiteout()
		case n.IsDir():
			b.opaque = append(b.opaque, n)
			n.Implied = false
		}
	}
	for _, dir := range b.opaque {
		if dir.Xattrs == nil {
			dir.Xattrs = make(map[string]string, 1)
		}
		dir.Xattrs[tree.OpaqueAttr] = "y"
	}

	t := &tree.Tree{Root: b.root}
	var warnings []string
	if b.implied {
		var dirs first
		_ = t.Walk(func(path string, n *tree.Node) error {
			if n.Implied && n != b.root {
				dirs.add(path)
			}
			return nil
		})
		if dirs.n > 0 {
			warnings = append(warnings, fmt.Sprintf("parent directories that the layer does not list: %d, first %q; made root:root 0755 where no lower layer has them", dirs.n, dirs.what))
		}
	}
	if b.overlay.n > 0 {
		warnings = append(warnings, fmt.Sprintf("xattrs of overlayfs dropped: %d, first %s; a layer may not steer overlayfs", b.overlay.n, b.overlay.what))
	}
	if b.devices.n > 0 {
		warnings = append(warnings, fmt.Sprintf("character devices 0:0: %d, first %q; they delete what has their names in lower layers, as overlayfs sees them", b.devices.n, b.devices.what))
	}
	if b.global.n > 0 {
		warnings = append(warnings, fmt.Sprintf("PAX global headers ignored: %d, first %s", b.global.n, b.global.what))
	}
	return t, warnings
}

// cleanPath returns a name relative to the root without "." and empty elements, ""
// for the root itself.
func cleanPath(name string) (string, error) {
	if name == "" {
		return "", fmt.Errorf("%w: it is empty", ErrName)
	}
	clean := make([]byte, 0, 256)
	for elem := range strings.SplitSeq(name, "/") {
		switch elem {
		case "", ".":
			continue
		case "..":
			return "", fmt.Errorf("%w: %.300q has a \"..\" element", ErrName, name)
		}
		if err := tree.CheckName(elem); err != nil {
			return "", fmt.Errorf("%w: %w", ErrName, err)
		}
		if len(clean) > 0 {
			clean = append(clean, '/')
		}
		clean = append(clean, elem...)
	}
	if name[0] == '/' && len(clean) > 0 {
		return "", fmt.Errorf("%w: %.300q is absolute", ErrName, name)
	}
	if len(clean) > maxPath {
		return "", fmt.Errorf("%w: the path is too long: got %d bytes, want at most %d", ErrName, len(clean), maxPath)
	}
	return string(clean), nil
}

// node makes the node of an entry, nil for a hard link.
func (b *builder) node(hdr *tar.Header, path string) (*tree.Node, error) {
	n := &tree.Node{}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		n.Mode = tree.TypeRegular
		n.File = &tree.File{Size: hdr.Size}
		if hdr.Size <= tree.InlineSize {
			if err := b.charge(int(hdr.Size)); err != nil {
				return nil, err
			}
		}
	case tar.TypeDir:
		n.Mode = tree.TypeDir
		n.Dir = map[string]*tree.Node{}
	case tar.TypeSymlink:
		n.Mode = tree.TypeSymlink
		switch l := len(hdr.Linkname); {
		case l == 0:
			return nil, fmt.Errorf("%w: a symbolic link without a target", ErrLink)
		case l > tree.MaxTarget:
			return nil, fmt.Errorf("%w: the target of a symbolic link is too long: got %d bytes, want at most %d", ErrLink, l, tree.MaxTarget)
		case strings.Contains(hdr.Linkname, "\x00"):
			return nil, fmt.Errorf("%w: the target of a symbolic link contains NUL", ErrLink)
		}
		n.Target = strings.Clone(hdr.Linkname)
		if err := b.charge(len(n.Target)); err != nil {
			return nil, err
		}
	case tar.TypeChar, tar.TypeBlock:
		n.Mode = tree.TypeChar
		if hdr.Typeflag == tar.TypeBlock {
			n.Mode = tree.TypeBlock
		}
		// Linux has 12 bits for a major and 20 for a minor number.
		if uint64(hdr.Devmajor) >= 1<<12 || uint64(hdr.Devminor) >= 1<<20 {
			return nil, fmt.Errorf("%w: device number: got %d:%d, want at most %d:%d", ErrValue, hdr.Devmajor, hdr.Devminor, 1<<12-1, 1<<20-1)
		}
		n.Rdev = tree.Makedev(uint32(hdr.Devmajor), uint32(hdr.Devminor))
		if n.IsWhiteout() {
			// What overlayfs takes for a whiteout, be it from a tar or not, has no
			// metadata that anybody could see.
			b.devices.add("/" + path)
			return tree.NewWhiteout(), nil
		}
	case tar.TypeFifo:
		n.Mode = tree.TypeFIFO
	case tar.TypeLink:
		return nil, nil
	default:
		return nil, fmt.Errorf("%w: %q", ErrType, hdr.Typeflag)
	}
	return n, b.stat(n, hdr, path)
}

// lastMtime is the last second that podman sets a file to: 2^63-1 ns after 1970.
const lastMtime = 9223372036

// mtime returns a time as an inode has it after podman extracted the layer: times
// before 1970 or after 2262 become 1970, but not those of symbolic links (Chtimes and
// LUtimesNano in containers/storage).
func mtime(n *tree.Node, t time.Time) (sec int64, nsec uint32) {
	if sec := t.Unix(); n.Type() != tree.TypeSymlink && (sec < 0 || sec > lastMtime) {
		return 0, 0
	}
	return t.Unix(), uint32(t.Nanosecond())
}

// stat sets all of n.Stat but the type.
func (b *builder) stat(n *tree.Node, hdr *tar.Header, path string) error {
	// Some writers put the type into the mode field too; the typeflag counts.
	n.Mode |= uint32(hdr.Mode) & 0o7777
	if n.Type() == tree.TypeSymlink {
		n.Mode |= 0o777
		n.Mode &^= 0o7000
	}
	for _, id := range []struct {
		what string
		got  int
		to   *uint32
	}{{"uid", hdr.Uid, &n.UID}, {"gid", hdr.Gid, &n.GID}} {
		if id.got < 0 || int64(id.got) > math.MaxUint32 {
			return fmt.Errorf("%w: %s: got %d, want 0 to %d", ErrValue, id.what, id.got, uint32(math.MaxUint32))
		}
		*id.to = uint32(id.got)
	}
	n.MtimeSec, n.MtimeNsec = mtime(n, hdr.ModTime)

	xattrs, err := xattrsOf(hdr.PAXRecords)
	if err != nil {
		return err
	}
	// These steer overlayfs: a redirect or metacopy xattr would make it show any
	// other file of any layer, or of the object store, under this name. Whoever
	// makes layers from an overlay mount turns them into whiteouts or leaves them
	// out, so nothing honest is lost.
	for _, key := range sorted(xattrs) {
		if strings.HasPrefix(key, "trusted.overlay.") || strings.HasPrefix(key, "user.overlay.") {
			delete(xattrs, key)
			b.overlay.add(fmt.Sprintf("%q of %q", key, "/"+path))
			continue
		}
		if err := b.charge(128 + len(key) + len(xattrs[key])); err != nil {
			return err
		}
	}
	if err := tree.CheckXattrs(xattrs); err != nil {
		return fmt.Errorf("%w: %w", ErrValue, err)
	}
	if len(xattrs) > 0 {
		n.Xattrs = xattrs
	}
	return nil
}

// typeName returns a noun for the type in a mode.
func typeName(mode uint32) string {
	switch mode & tree.TypeMask {
	case tree.TypeDir:
		return "a directory"
	case tree.TypeSymlink:
		return "a symbolic link"
	case tree.TypeRegular:
		return "a regular file"
	case tree.TypeFIFO:
		return "a FIFO"
	}
	return "a device"
}
