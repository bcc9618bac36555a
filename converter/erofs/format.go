package erofs

import (
	"encoding/binary"
	"math/bits"
	"strings"
)

// The layout of an image. Numbers are little-endian and blocks have 4096 bytes.
//
//	   0  composefs header, zeros
//	1024  superblock
//	1152  inodes: each with its xattrs and the end of its data
//	      xattrs that several inodes share
//	      full blocks of data
const (
	blockBits = 12
	blockSize = 1 << blockBits
	slotBits  = 5 // inodes begin at multiples of 32 bytes, and are numbered so
	slotSize  = 1 << slotBits

	superOffset = 1024
	superSize   = 128
	inodesStart = superOffset + superSize

	compactSize  = 32
	extendedSize = 64
	direntSize   = 12
	entrySize    = 4  // head of an xattr
	bodySize     = 12 // head of the xattrs of an inode
)

// The composefs header (struct lcfs_erofs_header_s in lcfs-erofs.h).
const (
	headerMagic   = 0xd078629a
	headerVersion = 1
	flagACL       = 1 << 0 // some file has an ACL
)

// The superblock (struct erofs_super_block in fs/erofs/erofs_fs.h of Linux).
const (
	superMagic = 0xe0f5e1e2
	// Compact inodes have the time of the superblock; filters of xattr names are
	// stored.
	featureMtime  = 1 << 1
	featureFilter = 1 << 2
)

// Data layouts of inodes (enum in erofs_fs.h).
const (
	layoutPlain  = 0 // full blocks
	layoutInline = 2 // full blocks, then the rest behind the inode
	layoutChunks = 4 // a table of chunks
)

// Chunk tables (struct erofs_inode_chunk_info). Composefs has chunks of zeros only.
const (
	maxChunks    = 1024 // LCFS_MAX_NONINLINE_CHUNKS: the table must fit a block
	chunkMask    = 31
	maxChunkBits = blockBits + chunkMask
	nullChunk    = 0xffffffff
)

const maxShared = 128 // references that libcomposefs writes for one inode

var le = binary.LittleEndian

// An inodeHead is what the two forms of inodes (struct erofs_inode_compact and
// erofs_inode_extended) say.
type inodeHead struct {
	layout  uint16
	compact bool
	xattrs  uint16 // i_xattr_icount: see xattrCount
	mode    uint32
	nlink   uint32
	size    uint64
	data    uint32 // i_u: the first block, the device or the form of chunks
	ino     uint32
	uid     uint32
	gid     uint32
	sec     int64 // not in compact inodes
	nsec    uint32
}

func (h *inodeHead) append(b []byte) []byte {
	if h.compact {
		b = le.AppendUint16(b, h.layout<<1)
		b = le.AppendUint16(b, h.xattrs)
		b = le.AppendUint16(b, uint16(h.mode))
		b = le.AppendUint16(b, uint16(h.nlink))
		b = le.AppendUint32(b, uint32(h.size))
		b = le.AppendUint32(b, 0)
		b = le.AppendUint32(b, h.data)
		b = le.AppendUint32(b, h.ino)
		b = le.AppendUint16(b, uint16(h.uid))
		b = le.AppendUint16(b, uint16(h.gid))
		return le.AppendUint32(b, 0)
	}
	b = le.AppendUint16(b, h.layout<<1|1)
	b = le.AppendUint16(b, h.xattrs)
	b = le.AppendUint16(b, uint16(h.mode))
	b = le.AppendUint16(b, 0)
	b = le.AppendUint64(b, h.size)
	b = le.AppendUint32(b, h.data)
	b = le.AppendUint32(b, h.ino)
	b = le.AppendUint32(b, h.uid)
	b = le.AppendUint32(b, h.gid)
	b = le.AppendUint64(b, uint64(h.sec))
	b = le.AppendUint32(b, h.nsec)
	b = le.AppendUint32(b, h.nlink)
	return append(b, make([]byte, 16)...)
}

// headSize returns the size of the head of an inode that begins with i_format.
func headSize(format uint16) int {
	if format&1 == 0 {
		return compactSize
	}
	return extendedSize
}

// parseInode reads what append wrote; b has headSize bytes.
func parseInode(b []byte) inodeHead {
	format := le.Uint16(b)
	h := inodeHead{
		layout:  format >> 1,
		compact: format&1 == 0,
		xattrs:  le.Uint16(b[2:]),
		mode:    uint32(le.Uint16(b[4:])),
	}
	if h.compact {
		h.nlink = uint32(le.Uint16(b[6:]))
		h.size = uint64(le.Uint32(b[8:]))
		h.data = le.Uint32(b[16:])
		h.ino = le.Uint32(b[20:])
		h.uid = uint32(le.Uint16(b[24:]))
		h.gid = uint32(le.Uint16(b[26:]))
		return h
	}
	h.size = le.Uint64(b[8:])
	h.data = le.Uint32(b[16:])
	h.ino = le.Uint32(b[20:])
	h.uid = le.Uint32(b[24:])
	h.gid = le.Uint32(b[28:])
	h.sec = int64(le.Uint64(b[32:]))
	h.nsec = le.Uint32(b[40:])
	h.nlink = le.Uint32(b[44:])
	return h
}

// chunkForm returns the log2 of the size of chunks for a file and how many it has.
func chunkForm(size uint64) (chunkBits uint16, count uint64) {
	chunkBits = uint16(min(max(bits.Len64(size-1), blockBits), maxChunkBits))
	return chunkBits, (size-1)>>chunkBits + 1
}

// xattrCount returns i_xattr_icount for xattrs that take size bytes.
func xattrCount(size int) int {
	if size == 0 {
		return 0
	}
	return (size-bodySize)/4 + 1
}

// xattrSize is the inverse of xattrCount.
func xattrSize(count uint16) int {
	if count == 0 {
		return 0
	}
	return bodySize + 4*(int(count)-1)
}

// xattrPrefixes are what e_name_index stands for (EROFS_XATTR_INDEX_*).
var xattrPrefixes = [...]string{
	0: "",
	1: "user.",
	2: "system.posix_acl_access",
	3: "system.posix_acl_default",
	4: "trusted.",
	5: "lustre.", // is read, but libcomposefs does not write it
	6: "security.",
}

const lustreIndex = 5

// splitXattr returns the index of the prefix of an xattr's name, and the rest.
func splitXattr(name string) (index uint8, suffix string) {
	for i := 1; i < len(xattrPrefixes); i++ {
		if i != lustreIndex && strings.HasPrefix(name, xattrPrefixes[i]) {
			return uint8(i), name[len(xattrPrefixes[i]):]
		}
	}
	return 0, name
}

// filterBit returns the bit that is cleared in the filter of an inode that has the
// xattr (EROFS_XATTR_FILTER_SEED in erofs_fs.h).
func filterBit(index uint8, suffix string) uint32 {
	return 1 << (xxh32(suffix, 0x25bbe08f+uint32(index)) & 31)
}

// Types of directory entries (EROFS_FT_*), by the type bits of st_mode.
var direntTypes = [16]byte{0o10: 1, 0o4: 2, 0o2: 3, 0o6: 4, 0o1: 5, 0o14: 6, 0o12: 7}

func direntType(mode uint32) byte { return direntTypes[mode>>12&15] }

func roundUp[T int | int64](n, to T) T { return (n + to - 1) / to * to }
