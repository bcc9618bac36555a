package dump

import (
	"bytes"
	"encoding/hex"
	"math"
	"strings"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// The fields of a line, before the xattrs.
const (
	fieldPath = iota
	fieldSize
	fieldMode
	fieldNlink
	fieldUID
	fieldGID
	fieldRdev
	fieldMtime
	fieldPayload
	fieldContent
	fieldDigest
	numFields
)

var fieldNames = [numFields]string{
	"path", "size", "mode", "nlink", "uid", "gid", "rdev", "mtime", "payload", "content", "digest",
}

// An entry is a line that has been read but has no place in a tree yet.
type entry struct {
	path   []byte // canonical: one slash before each element, "/" for the root
	name   string // its last element
	node   *tree.Node
	target string // of a hard link, whose node stands for it until then
	isLink bool

	// The name, and what the node has as Target or Payload, in the text that the
	// parser keeps of a chunk. The strings are made when all of it has been read.
	keptName, keptText span
}

// A span is a part of a text.
type span struct{ start, end int32 }

// finish makes the strings of an entry from the text that was kept.
func (e *entry) finish(kept string) {
	e.name = kept[e.keptName.start:e.keptName.end]
	text := kept[e.keptText.start:e.keptText.end]
	switch {
	case text == "":
	case e.node.Type() == tree.TypeSymlink:
		e.node.Target = text
	case text != e.node.File.Object.Path():
		e.node.File.Payload = text
	}
}

// dir returns the path of the directory that the entry belongs to.
func (e *entry) dir() []byte {
	i := bytes.LastIndexByte(e.path, '/')
	if i == 0 {
		return e.path[:1]
	}
	return e.path[:i]
}

// A lineParser reads lines one after another; it keeps what many lines share.
type lineParser struct {
	strict bool
	kept   []byte // of the present chunk
	buf    []byte

	// Files of an image have few different sets of xattrs: by the text of a line's
	// end, the map that all of them share.
	xattrs map[string]map[string]string

	nodes []tree.Node // allocated ahead
	files []tree.File
}

const (
	maxCachedXattrs = 4096
	slab            = 256
)

// keep adds to the text that is kept.
func (p *lineParser) keep(s []byte) span {
	start := len(p.kept)
	p.kept = append(p.kept, s...)
	return span{int32(start), int32(len(p.kept))}
}

func (p *lineParser) newNode() *tree.Node {
	if len(p.nodes) == 0 {
		p.nodes = make([]tree.Node, slab)
	}
	n := &p.nodes[0]
	p.nodes = p.nodes[1:]
	return n
}

func (p *lineParser) newFile() *tree.File {
	if len(p.files) == 0 {
		p.files = make([]tree.File, slab)
	}
	f := &p.files[0]
	p.files = p.files[1:]
	return f
}

// parse reads a line, without its newline. The entry's path may share the line's
// memory; nothing else does.
func (p *lineParser) parse(line []byte, e *entry) *LineError {
	if i := bytes.IndexByte(line, 0); i >= 0 {
		return fail(ErrSyntax, "NUL at byte %d", i)
	}
	var f [numFields][]byte
	rest := line
	for i := range f {
		// A line that ends early has empty fields: mkcomposefs takes them where
		// the file's type has no use for them.
		f[i], rest = cut(rest)
	}

	if err := p.path(f[fieldPath], e); err != nil {
		return err
	}
	modeText := f[fieldMode]
	if len(modeText) > 0 && modeText[0] == '@' {
		e.isLink = true
		modeText = modeText[1:]
	}
	mode, err := number(modeText, fieldMode, 8, math.MaxUint32)
	if err != nil {
		return err
	}
	if p.strict && mode > 0o177777 {
		return fail(ErrSyntax, "mode %o has more bits than st_mode", mode)
	}
	n := p.newNode()
	e.node = n
	n.Mode = uint32(mode) & 0o177777 // what an inode stores
	switch n.Type() {
	case tree.TypeFIFO, tree.TypeChar, tree.TypeDir, tree.TypeBlock, tree.TypeRegular, tree.TypeSymlink, tree.TypeSocket:
	default:
		return fail(ErrSyntax, "mode %o names no file type", mode)
	}
	if e.isLink {
		return p.link(f[fieldPayload], e)
	}
	if err := p.stat(&f, n); err != nil {
		return err
	}
	if err := p.body(&f, e); err != nil {
		return err
	}
	return p.parseXattrs(rest, n)
}

// cut splits s at the first space.
func cut(s []byte) (field, rest []byte) {
	if i := bytes.IndexByte(s, ' '); i >= 0 {
		return s[:i], s[i+1:]
	}
	return s, nil
}

// path sets the entry's path and, but for the root, its name.
func (p *lineParser) path(field []byte, e *entry) *LineError {
	path, err := p.unescape(field)
	if err != nil {
		return err
	}
	switch {
	case len(path) == 0:
		return fail(ErrSyntax, "empty path")
	case bytes.IndexByte(path, 0) >= 0:
		return fail(ErrSyntax, "path %q contains NUL", path)
	}
	e.path = canonical(path)
	if bytes.IndexByte(field, '\\') >= 0 {
		e.path = bytes.Clone(e.path) // it lies in p.buf
	}
	if len(path) == 1 && path[0] == '/' {
		return nil
	}
	name := path[bytes.LastIndexByte(path, '/')+1:]
	if err := tree.CheckName(string(name)); err != nil {
		kind := ErrSyntax
		if len(name) > tree.MaxName {
			kind = ErrLimit
		}
		return fail(kind, "path %.300q: %v", path, err)
	}
	e.keptName = p.keep(name)
	return nil
}

// canonical returns path with one slash before each element. A path need not begin
// with a slash, and several in a row count as one.
func canonical(path []byte) []byte {
	if path[0] == '/' && !bytes.Contains(path, []byte("//")) {
		return path
	}
	var c []byte
	for element := range bytes.SplitSeq(path, []byte("/")) {
		if len(element) > 0 {
			c = append(append(c, '/'), element...)
		}
	}
	if c == nil {
		return []byte("/")
	}
	return c
}

func (p *lineParser) link(payload []byte, e *entry) *LineError {
	if e.node.IsDir() {
		return fail(ErrTree, "%q: a directory cannot be a hard link", e.path)
	}
	target, ok, err := p.optional(payload)
	switch {
	case err != nil:
		return err
	case !ok:
		return fail(ErrSyntax, "%q: hard link without a target", e.path)
	case bytes.IndexByte(target, 0) >= 0:
		return fail(ErrSyntax, "hard link target %q contains NUL", target)
	case len(target) == 0:
		e.target = "/"
	default:
		e.target = string(bytes.TrimRight(canonical(target), "/"))
	}
	return nil
}

// stat reads the fields that files of all types have.
func (p *lineParser) stat(f *[numFields][]byte, n *tree.Node) *LineError {
	nlink, err := number(f[fieldNlink], fieldNlink, 10, math.MaxUint32)
	if err != nil {
		return err
	}
	if !n.IsDir() && nlink != 1 { // 1 is what counting gives, unless there are links
		n.Nlink = uint32(nlink)
	}
	uid, err := number(f[fieldUID], fieldUID, 10, math.MaxUint32)
	if err != nil {
		return err
	}
	gid, err := number(f[fieldGID], fieldGID, 10, math.MaxUint32)
	if err != nil {
		return err
	}
	n.UID, n.GID = uint32(uid), uint32(gid)
	rdev, err := number(f[fieldRdev], fieldRdev, 10, math.MaxUint64)
	if err != nil {
		return err
	}
	switch t := n.Type(); {
	case t == tree.TypeChar || t == tree.TypeBlock:
		if rdev > math.MaxUint32 {
			return fail(ErrLimit, "rdev %d is too large: EROFS stores 32 bits", rdev)
		}
		n.Rdev = rdev
	case p.strict && rdev != 0:
		return fail(ErrSyntax, "rdev %d of something that is no device", rdev)
	}

	// "1.5" are one second and five nanoseconds.
	sec, nsec, found := bytes.Cut(f[fieldMtime], []byte("."))
	negative := len(sec) > 0 && sec[0] == '-'
	if negative {
		sec = sec[1:]
	}
	s, err := number(sec, fieldMtime, 10, math.MaxInt64)
	if err != nil {
		return err
	}
	if !found {
		return fail(ErrSyntax, "mtime %q has no nanoseconds: want seconds.nanoseconds", f[fieldMtime])
	}
	ns, err := number(nsec, fieldMtime, 10, 999_999_999)
	if err != nil {
		return err
	}
	n.MtimeSec, n.MtimeNsec = int64(s), uint32(ns)
	if negative {
		n.MtimeSec = -n.MtimeSec
	}
	return nil
}

// body reads the fields whose meaning depends on the type.
func (p *lineParser) body(f *[numFields][]byte, e *entry) *LineError {
	n := e.node
	size, err := number(f[fieldSize], fieldSize, 10, math.MaxUint64)
	if err != nil {
		return err
	}
	// Payload and content are used one after the other: both may lie in p.buf.
	payload, _, err := p.optional(f[fieldPayload])
	if err != nil {
		return err
	}
	payloadLen := len(payload)
	switch {
	case payloadLen > tree.MaxTarget:
		return fail(ErrLimit, "payload is too long: got %d bytes, want at most %d", payloadLen, tree.MaxTarget)
	case bytes.IndexByte(payload, 0) >= 0:
		return fail(ErrSyntax, "payload %q contains NUL", payload)
	}
	switch n.Type() {
	case tree.TypeSymlink:
		if payloadLen == 0 {
			return fail(ErrSyntax, "symbolic link without a target")
		}
		e.keptText = p.keep(payload)
	case tree.TypeRegular:
		if !isPathOf(payload, f[fieldDigest]) {
			e.keptText = p.keep(payload)
		}
	}

	content, hasContent, err := p.optional(f[fieldContent])
	switch {
	case err != nil:
		return err
	case hasContent && uint64(len(content)) != size:
		return fail(ErrSyntax, "content has %d bytes, but size says %d", len(content), size)
	case p.strict && n.Type() == tree.TypeSymlink && size != uint64(payloadLen):
		return fail(ErrSyntax, "target has %d bytes, but size says %d", payloadLen, size)
	case p.strict && n.Type() == tree.TypeSymlink && len(content) > 0:
		return fail(ErrSyntax, "symbolic link with content")
	case len(content) > MaxInline && n.Type() != tree.TypeSymlink:
		return fail(ErrLimit, "content is too long: got %d bytes, want at most %d", len(content), MaxInline)
	}

	switch n.Type() {
	case tree.TypeDir:
		n.Dir = map[string]*tree.Node{}
	case tree.TypeSymlink:
	case tree.TypeRegular:
		n.File = p.newFile()
		if len(content) > 0 || size == 0 { // no image says more of such files
			n.File.Inline, n.File.Size = bytes.Clone(content), int64(size)
			e.keptText = span{}
			return nil
		}
		return p.object(n.File, size, f[fieldDigest], payloadLen > 0)
	default:
		if size > math.MaxInt64 {
			return fail(ErrLimit, "size %d is too large", size)
		}
		if size > math.MaxUint32 { // see tree.Node.File
			n.File = p.newFile()
			n.File.Size = int64(size)
		}
	}
	return nil
}

// object fills in a regular file whose content is not in the dump.
func (p *lineParser) object(file *tree.File, size uint64, digest []byte, hasPayload bool) *LineError {
	if size > MaxSize {
		return fail(ErrLimit, "size %d is too large: want at most %d", size, int64(MaxSize))
	}
	file.Size = int64(size)
	raw, hasDigest, err := p.optional(digest)
	if err != nil {
		return err
	}
	if hasDigest {
		var sum [64]byte
		alg := fsverity.SHA256
		if len(raw) == 2*fsverity.SHA512.Size() {
			alg = fsverity.SHA512
		}
		if len(raw) != 2*alg.Size() {
			return fail(ErrSyntax, "digest %.130q has %d digits, want 64 or 128", raw, len(raw))
		}
		if _, err := hex.Decode(sum[:], raw); err != nil {
			return fail(ErrSyntax, "digest %q is not hexadecimal", raw)
		}
		d, err := fsverity.New(alg, sum[:alg.Size()])
		if err != nil {
			return fail(ErrSyntax, "%v", err)
		}
		file.Object = d
		if !hasPayload {
			file.Payload = tree.NoPayload
		}
	}
	return nil
}

// isPathOf reports whether payload is the text of digest with a slash after the
// first two digits. It saves the copy of nearly all payloads.
func isPathOf(payload, digest []byte) bool {
	return len(payload) > 2 && len(payload) == len(digest)+1 && payload[2] == '/' && isLowerHex(digest) &&
		bytes.Equal(payload[:2], digest[:2]) && bytes.Equal(payload[3:], digest[2:])
}

func isLowerHex(b []byte) bool {
	for _, c := range b {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

func (p *lineParser) parseXattrs(text []byte, n *tree.Node) *LineError {
	if len(text) == 0 {
		return nil
	}
	if m, ok := p.xattrs[string(text)]; ok {
		n.Xattrs = m
		return nil
	}
	if len(text) > maxXattrText {
		return fail(ErrLimit, "xattrs are too long: got %d bytes, want at most %d", len(text), maxXattrText)
	}
	m := map[string]string{}
	total := xattrsHead
	for rest := text; len(rest) > 0; {
		var field []byte
		field, rest = cut(rest)
		k, v, found := bytes.Cut(field, []byte("="))
		if !found {
			return fail(ErrSyntax, "xattr %.100q has no \"=\"", field)
		}
		raw, err := p.unescape(k)
		if err != nil {
			return err
		}
		key := string(raw)
		raw, err = p.unescape(v)
		if err != nil {
			return err
		}
		value := string(raw)
		switch {
		case key == "":
			return fail(ErrSyntax, "xattr without a name")
		case strings.IndexByte(key, 0) >= 0:
			return fail(ErrSyntax, "xattr name %q contains NUL", key)
		case len(key) > tree.MaxXattr:
			return fail(ErrLimit, "xattr name %.40q… is too long: got %d bytes, want at most %d", key, len(key), tree.MaxXattr)
		}
		if old, ok := m[key]; ok { // the last one counts
			total -= xattrHead + len(key) + len(old)
		}
		if total += xattrHead + len(key) + len(value); total > maxXattrs {
			return fail(ErrLimit, "xattrs are too large at %q: want at most %d bytes for all", key, maxXattrs)
		}
		m[key] = value
	}
	n.Xattrs = m
	if p.xattrs == nil {
		p.xattrs = map[string]map[string]string{}
	}
	if len(p.xattrs) < maxCachedXattrs {
		p.xattrs[string(text)] = m
	}
	return nil
}

// number reads an unsigned number that fills a field.
func number(s []byte, field, base int, limit uint64) (uint64, *LineError) {
	if len(s) == 0 {
		return 0, fail(ErrSyntax, "%s is missing", fieldNames[field])
	}
	var v uint64
	for _, c := range s {
		d := uint64(c - '0') // a byte below '0' wraps to a large one
		if c < '0' || d >= uint64(base) {
			return 0, fail(ErrSyntax, "%s %.40q is not a number in base %d", fieldNames[field], s, base)
		}
		if v > (limit-d)/uint64(base) {
			return 0, fail(ErrLimit, "%s %.40q is too large: want at most %d", fieldNames[field], s, limit)
		}
		v = v*uint64(base) + d
	}
	return v, nil
}
