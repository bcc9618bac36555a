package erofs_test

import (
	"encoding/binary"
	"testing"

	"github.com/particle-os/particle/converter/tree"
)

// An assembler lays out images by hand: those of other writers, and bad ones.
type assembler struct{ b []byte }

var le = binary.LittleEndian

const rootNid = 36

// newImage returns an image with nothing but a header.
func newImage(version, blocks int) *assembler {
	a := &assembler{make([]byte, blocks*4096)}
	le.PutUint32(a.b, 0xd078629a)
	le.PutUint32(a.b[4:], 1)
	le.PutUint32(a.b[12:], uint32(version))
	le.PutUint32(a.b[1024:], 0xe0f5e1e2)
	le.PutUint32(a.b[1032:], 6)
	a.b[1036] = 12
	le.PutUint16(a.b[1038:], rootNid)
	le.PutUint32(a.b[1060:], uint32(blocks))
	return a
}

const (
	plain  = 0
	inline = 2
	chunks = 4
)

// inode writes an extended inode with what follows it: xattrs and the end of data.
func (a *assembler) inode(nid int, layout, mode, size, data int, xattrs, tail string) {
	b := a.b[nid*32:]
	le.PutUint16(b, uint16(layout<<1|1))
	if xattrs != "" {
		le.PutUint16(b[2:], uint16((len(xattrs)-12)/4+1))
	}
	le.PutUint16(b[4:], uint16(mode))
	le.PutUint64(b[8:], uint64(size))
	le.PutUint32(b[16:], uint32(data))
	le.PutUint32(b[20:], uint32(nid))
	le.PutUint32(b[44:], 1)
	if mode&tree.TypeMask == tree.TypeDir {
		le.PutUint32(b[44:], 2)
	}
	copy(b[64:], xattrs+tail)
}

// dir writes a directory whose entries follow the inode.
func (a *assembler) dir(nid, mode int, xattrs string, entries ...ent) {
	tail := dirents(entries...)
	a.inode(nid, inline, mode, len(tail), 0, xattrs, tail)
}

// An ent is an entry of a directory.
type ent struct {
	name string
	nid  int
	typ  byte
}

const (
	isReg, isDir, isChr, isBlk, isFifo, isSock, isLnk = 1, 2, 3, 4, 5, 6, 7
)

func dirents(entries ...ent) string {
	var b, names []byte
	for _, e := range entries {
		b = le.AppendUint64(b, uint64(e.nid))
		b = le.AppendUint16(b, uint16(12*len(entries)+len(names)))
		b = append(b, e.typ, 0)
		names = append(names, e.name...)
	}
	return string(b) + string(names)
}

// xattrs returns the xattrs of an inode that shares none.
func xattrs(filter uint32, pairs ...xattr) string { return sharingXattrs(filter, nil, pairs...) }

type xattr struct {
	index       byte
	name, value string
}

func sharingXattrs(filter uint32, refs []uint32, pairs ...xattr) string {
	b := le.AppendUint32(nil, filter)
	b = append(b, byte(len(refs)), 0, 0, 0, 0, 0, 0, 0)
	for _, r := range refs {
		b = le.AppendUint32(b, r)
	}
	for _, p := range pairs {
		b = append(b, byte(len(p.name)), p.index)
		b = le.AppendUint16(b, uint16(len(p.value)))
		b = append(append(b, p.name...), p.value...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return string(b)
}

const (
	objectHex  = "5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a"
	objectPath = "5a/5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a"
	objectMeta = "\x00\x24\x00\x01ZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZ"
	nullChunk  = "\xff\xff\xff\xff"
)

// simpleV2 is the image of composefs-rs' test case of that name in format V2, laid out
// as crates/composefs/tests/snapshots/mkfs__simple.snap shows it. TestPinned
// compares its digest with the one that composefs-rs has pinned.
func simpleV2() []byte {
	a := newImage(2, 1)
	le.PutUint64(a.b[1040:], 8)
	a.dir(36, 0o40755, "",
		ent{".", 36, isDir}, ent{"..", 36, isDir}, ent{"blkdev", 44, isBlk}, ent{"chrdev", 46, isChr},
		ent{"fifo", 48, isFifo}, ent{"regular-external", 50, isReg}, ent{"regular-inline", 57, isReg},
		ent{"socket", 60, isSock}, ent{"symlink", 62, isLnk})
	a.inode(44, plain, 0o60000, 0, 123, "", "")
	a.inode(46, plain, 0o20000, 0, 123, "", "")
	a.inode(48, plain, 0o10000, 0, 0, "", "")
	a.inode(50, chunks, 0o100000, 1234, 31, xattrs(2147352575,
		xattr{4, "overlay.metacopy", objectMeta}, xattr{4, "overlay.redirect", "/" + objectPath}), nullChunk)
	a.inode(57, inline, 0o100000, 4, 0, "", "hihi")
	a.inode(60, plain, 0o140000, 0, 0, "", "")
	a.inode(62, inline, 0o120000, 7, 0, "", "/target")
	return a.b
}

// emptyV2 is the same for the case "empty".
func emptyV2() []byte {
	a := newImage(2, 1)
	le.PutUint64(a.b[1040:], 1)
	a.dir(36, 0o40755, "", ent{".", 36, isDir}, ent{"..", 36, isDir})
	return a.b
}

// small returns an image whose root has the entries given, at nids from 64 on.
func small(tb testing.TB, entries ...ent) *assembler {
	tb.Helper()
	a := newImage(1, 4)
	a.dir(rootNid, 0o40755, "", append([]ent{{".", rootNid, isDir}, {"..", rootNid, isDir}}, entries...)...)
	return a
}
