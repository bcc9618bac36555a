package mount

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"os"
)

// The composefs header is at the start of an image, and the EROFS superblock at
// its usual place behind it (libcomposefs/lcfs-erofs.h, struct lcfs_erofs_header_s;
// Linux fs/erofs/erofs_fs.h, struct erofs_super_block).
const (
	headerMagic   = 0xd078629a
	headerVersion = 1
	flagACL       = 1 << 0 // an inode has a POSIX ACL

	superOffset = 1024 // bytes
	superSize   = 128
	superMagic  = 0xe0f5e1e2
	blockBits   = 12 // log2 of the block size that composefs images have
)

// A header is what is needed to know of an image before the kernel sees it.
type header struct {
	hasACL bool
	blocks uint32 // length of the image in blocks of 4096 bytes
}

// parseHeader reads the first superOffset+superSize bytes of an image.
func parseHeader(b []byte) (header, error) {
	if len(b) < superOffset+superSize {
		return header{}, fmt.Errorf("%w: it has %d bytes, the headers alone have %d", ErrNotImage, len(b), superOffset+superSize)
	}
	le := binary.LittleEndian
	if got := le.Uint32(b); got != headerMagic {
		return header{}, fmt.Errorf("%w: got magic number %#x, want %#x", ErrNotImage, got, uint32(headerMagic))
	}
	if got := le.Uint32(b[4:]); got != headerVersion {
		return header{}, fmt.Errorf("%w: got header version %d, want %d", ErrNotImage, got, headerVersion)
	}
	super := b[superOffset:]
	if got := le.Uint32(super); got != superMagic {
		return header{}, fmt.Errorf("%w: got EROFS magic number %#x, want %#x", ErrNotImage, got, uint32(superMagic))
	}
	if got := super[12]; got != blockBits {
		return header{}, fmt.Errorf("%w: got blocks of 2^%d bytes, want 2^%d", ErrNotImage, got, blockBits)
	}
	return header{
		hasACL: le.Uint32(b[8:])&flagACL != 0,
		blocks: le.Uint32(super[36:]),
	}, nil
}

// readHeader checks that a file is a whole composefs image.
func readHeader(f *os.File) (header, error) {
	fi, err := f.Stat()
	if err != nil {
		return header{}, err
	}
	if !fi.Mode().IsRegular() {
		return header{}, fmt.Errorf("%w: it is not a regular file", ErrNotImage)
	}
	buf := make([]byte, superOffset+superSize)
	n, err := f.ReadAt(buf, 0)
	if err != nil && err != io.EOF {
		return header{}, err
	}
	h, err := parseHeader(buf[:n])
	if err != nil {
		return header{}, err
	}
	// The kernel would find out only when somebody reads what is missing.
	if want := int64(h.blocks) << blockBits; fi.Size() < want {
		return header{}, fmt.Errorf("%w: it is cut short: got %d bytes, want %d", ErrNotImage, fi.Size(), want)
	}
	return h, nil
}

// newReader reads a file from its start, wherever it is positioned.
func newReader(f *os.File) io.Reader { return io.NewSectionReader(f, 0, math.MaxInt64) }
