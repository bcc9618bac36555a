package erofs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"

	"github.com/particle-os/particle/converter/tree"
)

// Write writes t as an image. It does not change t, and writes the same bytes for
// equal trees. The error is ErrTree (wrapped) if t has no form as an image, or w's.
//
// Names of the root that consist of two hexadecimal digits are taken by the format:
// Write adds a whiteout for each that t does not have, which no mount shows.
func Write(w io.Writer, t *tree.Tree, o Options) error {
	table, err := newInodeTable(t, o)
	if err != nil {
		return fmt.Errorf("writing image: %w", err)
	}
	e := emitter{inodeTable: table}
	// The first run finds where everything comes to lie, the second one writes
	// that down. Where things lie does not depend on what is written.
	e.run()
	size := e.pos
	if size>>blockBits > math.MaxUint32 {
		return fmt.Errorf("writing image: %w: an image of %d bytes has too many blocks", ErrTree, size)
	}
	e.w = bufio.NewWriterSize(w, 128<<10)
	e.run()
	if e.err == nil {
		e.err = e.w.Flush()
	}
	if e.err == nil && e.pos != size {
		e.err = errors.New("internal error: the layout has changed") // never: see above
	}
	if e.err != nil {
		return fmt.Errorf("writing image: %w", e.err)
	}
	return nil
}

// An emitter produces the bytes of an image, or only counts them.
type emitter struct {
	*inodeTable
	w   *bufio.Writer // nil when counting
	pos int64         // in the image
	err error

	body    []byte // scratch: an inode with its xattrs
	tail    []byte // scratch: what follows an inode
	inodesE int64  // the end of the inodes
	dataPos int64  // the first block of data
}

// run produces the image from its first byte to its last.
func (e *emitter) run() {
	end := e.pos // of the last run
	e.pos = 0
	e.super(end)
	for i, in := range e.inodes {
		e.inode(uint32(i), in)
	}
	e.align(slotSize)
	e.inodesE = e.pos
	for _, x := range e.shared {
		x.ref = uint32((e.pos - e.inodesE>>blockBits<<blockBits) / 4)
		e.body = x.append(e.body[:0])
		e.write(e.body)
	}
	e.align(blockSize)
	e.dataPos = e.pos
	for _, in := range e.inodes {
		in.block = uint32(e.pos >> blockBits)
		e.blocks(in)
	}
}

func (e *emitter) write(b []byte) {
	e.pos += int64(len(b))
	if e.w != nil && e.err == nil {
		_, e.err = e.w.Write(b)
	}
}

var zeros [blockSize]byte

func (e *emitter) pad(n int64) { e.write(zeros[:n]) }

func (e *emitter) align(to int64) { e.pad(roundUp(e.pos, to) - e.pos) }

// super writes all that comes before the inodes; end is the size of the image.
func (e *emitter) super(end int64) {
	b := make([]byte, inodesStart)
	le.PutUint32(b, headerMagic)
	le.PutUint32(b[4:], headerVersion)
	if e.hasACL {
		le.PutUint32(b[8:], flagACL)
	}
	le.PutUint32(b[12:], e.version)

	s := b[superOffset:]
	le.PutUint32(s, superMagic)
	le.PutUint32(s[8:], featureMtime|featureFilter)
	s[12] = blockBits
	le.PutUint16(s[14:], uint16(e.inodes[0].nid))
	le.PutUint64(s[16:], uint64(len(e.inodes)))
	le.PutUint64(s[24:], uint64(e.minSec))
	le.PutUint32(s[32:], e.minNsec)
	le.PutUint32(s[36:], uint32(end>>blockBits))
	le.PutUint32(s[40:], 0) // inodes are numbered from the first block
	le.PutUint32(s[44:], uint32(e.inodesE>>blockBits))
	e.write(b)
}

// inode writes an inode, its xattrs and the end of its data.
func (e *emitter) inode(ino uint32, in *inode) {
	n := in.node
	isChunks := false
	var size uint64
	e.tail, in.blocks = e.tail[:0], 0
	switch in.mode & tree.TypeMask {
	case tree.TypeDir:
		full := 0
		for entries := in.entries; len(entries) > 0; {
			k, length := blockOf(entries)
			// No more than half a block goes behind an inode.
			if k < len(entries) || length > blockSize/2 {
				full++
			} else {
				e.tail = appendDirents(e.tail, entries)
			}
			entries = entries[k:]
		}
		in.blocks = uint32(full)
		size = uint64(full*blockSize + len(e.tail))
	case tree.TypeSymlink:
		e.tail = append(e.tail, n.Target...)
		size = uint64(len(n.Target))
	case tree.TypeRegular:
		if n.IsWhiteout() {
			break
		}
		size = uint64(n.File.Size)
		switch inline := n.File.Inline; {
		case len(inline) > 0:
			in.blocks = uint32(len(inline) / blockSize)
			if rest := inline[in.blocks*blockSize:]; len(rest) > blockSize/2 {
				in.blocks++
			} else {
				e.tail = append(e.tail, rest...)
			}
		case size > 0:
			isChunks = true
			_, count := chunkForm(size)
			for range count {
				e.tail = le.AppendUint32(e.tail, nullChunk)
			}
		}
	}

	in.compact = n.MtimeSec == e.minSec && n.MtimeNsec == e.minNsec &&
		in.nlink <= math.MaxUint16 && n.UID <= math.MaxUint16 && n.GID <= math.MaxUint16 &&
		size <= math.MaxUint32 && !hasHugeSize(in)
	h := inodeHead{
		compact: in.compact, mode: in.mode, nlink: in.nlink, size: size, ino: ino,
		uid: n.UID, gid: n.GID, sec: n.MtimeSec, nsec: n.MtimeNsec,
	}
	// The body is complete but for the head's numbers of xattrs and blocks, which
	// are put in when they are known.
	e.body = h.append(e.body[:0])
	bare := len(e.body)
	e.body = e.appendXattrs(e.body, in)
	h.xattrs = uint16(xattrCount(len(e.body) - bare))

	e.align(slotSize)
	e.place(in)
	in.nid = uint64(e.pos >> slotBits)
	if in.mode&tree.TypeMask == tree.TypeDir {
		h.size = uint64(in.blocks)*blockSize + uint64(len(e.tail))
	}
	switch t := in.mode & tree.TypeMask; {
	case t == tree.TypeChar || t == tree.TypeBlock:
		h.data = uint32(n.Rdev)
	case in.blocks > 0:
		h.data = in.block
	}
	switch {
	case isChunks:
		h.layout = layoutChunks
		chunkBits, _ := chunkForm(size)
		h.data = h.data&^0xffff | uint32(chunkBits-blockBits)
	case len(e.tail) > 0:
		h.layout = layoutInline
	default:
		h.layout = layoutPlain
	}
	h.append(e.body[:0])
	e.write(e.body)
	e.write(e.tail)
}

// hasHugeSize reports whether something without data has a size that only the
// larger form of inode could hold: libcomposefs chooses by it and then writes 0.
func hasHugeSize(in *inode) bool {
	switch in.mode & tree.TypeMask {
	case tree.TypeChar, tree.TypeBlock, tree.TypeFIFO, tree.TypeSocket:
		return in.node.File != nil && in.node.File.Size > math.MaxUint32
	}
	return false
}

// place moves on to where the inode in e.body and e.tail can lie: the tail must not
// cross the border of a block. If it cannot be had otherwise, the tail goes into a
// block of its own (compute_erofs_inode_padding_for_tail).
func (e *emitter) place(in *inode) {
	body, tail := int64(len(e.body)), int64(len(e.tail))
	toBlock := roundUp(e.pos, blockSize) - e.pos
	if in.mode&tree.TypeMask == tree.TypeSymlink {
		// All of a symbolic link lies in one block.
		crosses := e.pos>>blockBits != (e.pos+body+tail-1)>>blockBits
		if body+tail >= blockSize {
			in.blocks, e.tail = in.blocks+1, e.tail[:0]
		}
		if crosses {
			e.pad(toBlock)
		}
		return
	}
	room := func(pos int64) int64 { return blockSize - (pos+body)%blockSize }
	if room(e.pos) >= tail {
		return
	}
	if skip := roundUp(room(e.pos), slotSize); room(e.pos+skip) >= tail {
		e.pad(skip)
		return
	}
	in.blocks, e.tail = in.blocks+1, e.tail[:0]
	e.pad(toBlock)
}

// appendXattrs appends the xattrs of an inode: first references to shared ones, then
// its own. Names of an inode are in byte order within each.
func (e *emitter) appendXattrs(b []byte, in *inode) []byte {
	if len(in.xattrs) == 0 {
		return b
	}
	start := len(b)
	b = append(b, zeros[:bodySize]...)
	var filter uint32
	shared := 0
	for _, x := range in.xattrs {
		filter |= x.filter
		if x.shared() && shared < maxShared {
			shared++
			b = le.AppendUint32(b, x.ref)
		}
	}
	le.PutUint32(b[start:], ^filter)
	b[start+4] = uint8(shared)
	for _, x := range in.xattrs {
		if x.shared() && shared > 0 {
			shared--
			continue
		}
		b = x.append(b)
	}
	return b
}

// blocks writes the full blocks of an inode's data.
func (e *emitter) blocks(in *inode) {
	if in.blocks == 0 {
		return
	}
	switch in.mode & tree.TypeMask {
	case tree.TypeDir:
		entries := in.entries
		for range in.blocks {
			k, _ := blockOf(entries)
			e.body = appendDirents(e.body[:0], entries[:k])
			e.write(e.body)
			e.align(blockSize)
			entries = entries[k:]
		}
	case tree.TypeSymlink:
		e.write([]byte(in.node.Target))
		e.align(blockSize)
	case tree.TypeRegular:
		if inline := in.node.File.Inline; len(inline) > 0 {
			e.write(inline[:min(len(inline), int(in.blocks)*blockSize)])
			e.align(blockSize)
			return
		}
		e.body = slices.Grow(e.body[:0], blockSize)
		for range maxChunks {
			e.body = le.AppendUint32(e.body, nullChunk)
		}
		e.write(e.body)
	}
}

// blockOf returns how many of the entries go into one block, and their size.
func blockOf(entries []dirent) (n, length int) {
	for ; n < len(entries); n++ {
		size := direntSize + len(entries[n].name)
		if length+size > blockSize {
			break
		}
		length += size
	}
	return n, length
}

// appendDirents appends a block of a directory.
func appendDirents(b []byte, entries []dirent) []byte {
	offset := len(entries) * direntSize
	for i := range entries {
		d := &entries[i]
		b = le.AppendUint64(b, d.child.nid)
		b = le.AppendUint16(b, uint16(offset))
		b = append(b, direntType(d.child.mode), 0)
		offset += len(d.name)
	}
	for i := range entries {
		b = append(b, entries[i].name...)
	}
	return b
}
