package initramfs

import (
	"bufio"
	"errors"
	"io"
)

// A zstdFrame reads the bytes of one zstd frame (RFC 8878, 3.1.1) and then ends, so that
// what follows can be read as what it is. Decoders of streams expect a frame after a frame.
type zstdFrame struct {
	r        *bufio.Reader
	left     int64 // bytes until the next header
	last     bool  // no block follows
	checksum bool
	err      error
}

// newZstdFrame begins at a frame's magic number.
func newZstdFrame(r *bufio.Reader) (*zstdFrame, error) {
	head, err := r.Peek(5)
	if err != nil {
		return nil, unexpected(err)
	}
	descriptor := head[4]
	single := descriptor>>5&1 == 1
	left := int64(5) + []int64{0, 1, 2, 4}[descriptor&3] // the dictionary's ID
	if !single {
		left++ // the window
	}
	switch size := descriptor >> 6; {
	case size > 0:
		left += 1 << size
	case single:
		left++
	}
	return &zstdFrame{r: r, left: left, checksum: descriptor>>2&1 == 1}, nil
}

func (z *zstdFrame) Read(p []byte) (int, error) {
	if z.err == nil && z.left == 0 {
		z.err = z.block()
	}
	if z.err != nil {
		return 0, z.err
	}
	n, err := z.r.Read(p[:min(int64(len(p)), z.left)])
	z.left -= int64(n)
	if n == 0 && err != nil {
		z.err = unexpected(err)
		return 0, z.err
	}
	return n, nil
}

// block looks at the header of the next block; it is read with the block.
func (z *zstdFrame) block() error {
	if z.last {
		if !z.checksum {
			return io.EOF
		}
		z.checksum, z.left = false, 4
		return nil
	}
	head, err := z.r.Peek(3)
	if err != nil {
		return unexpected(err)
	}
	header := int64(head[0]) | int64(head[1])<<8 | int64(head[2])<<16
	z.last, z.left = header&1 == 1, 3+header>>3
	switch header >> 1 & 3 {
	case 1: // one byte, repeated
		z.left = 3 + 1
	case 3:
		return errors.New("got a block of the reserved type")
	}
	return nil
}

// unexpected makes of the end of input what it is inside of something.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
