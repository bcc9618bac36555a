package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

const blockSize = 512 // of a tar

// A framer follows the bytes that archive/tar reads for one entry, block by block:
// the headers that describe the next one (PAX records, GNU long names), then the
// entry's own header, then a sparse map if there is one. It exists to know two
// things that archive/tar does not tell: where a header began and how many bytes of
// a sparse file the tar holds.
type framer struct {
	skip   int64 // bytes until the next block that matters
	block  [blockSize]byte
	filled int
	offset int64 // of the header in block
	found  bool  // block is the entry's own header
	after  int64 // bytes after it
}

// begin expects headers after skip bytes.
func (f *framer) begin(skip int64) { *f = framer{skip: skip, offset: f.offset} }

// feed takes bytes at an offset of the layer.
func (f *framer) feed(p []byte, offset int64) {
	for len(p) > 0 {
		switch {
		case f.found:
			f.after += int64(len(p))
			return
		case f.skip > 0:
			n := min(f.skip, int64(len(p)))
			f.skip -= n
			p, offset = p[n:], offset+n
			continue
		case f.filled == 0:
			f.offset = offset
		}
		n := copy(f.block[f.filled:], p)
		f.filled += n
		p, offset = p[n:], offset+int64(n)
		if f.filled < blockSize {
			return
		}
		if f.block == [blockSize]byte{} {
			f.filled = 0 // the first of the two that end a tar
			continue
		}
		switch f.block[156] { // typeflag
		case tar.TypeXHeader, tar.TypeGNULongName, tar.TypeGNULongLink:
			size := numeric(f.block[124:136])
			if size < 0 {
				size = 0 // archive/tar refuses it
			}
			f.skip, f.filled = size+padding(size), 0
		default:
			f.found = true
		}
	}
}

// numeric parses a number field of a header: octal, or base-256 when the first bit
// is set (GNU tar manual, "Extensions to the Archive Format"). What archive/tar has
// accepted parses; anything else gives some number.
func numeric(b []byte) int64 {
	if b[0]&0x80 != 0 {
		x := int64(b[0] & 0x3f)
		if b[0]&0x40 != 0 {
			x -= 0x40
		}
		for _, c := range b[1:] {
			x = x<<8 | int64(c)
		}
		return x
	}
	s, _, _ := strings.Cut(strings.Trim(string(b), " \x00"), "\x00")
	x, _ := strconv.ParseInt(s, 8, 64)
	return x
}

// isSparse reports whether archive/tar fills in holes in the body that it gives:
// old GNU sparse files, and PAX sparse files of the versions 0.0, 0.1 and 1.0 (GNU
// tar manual, "Storing Sparse Files").
func isSparse(hdr *tar.Header) bool {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return true
	}
	switch hdr.PAXRecords["GNU.sparse.major"] + "." + hdr.PAXRecords["GNU.sparse.minor"] {
	case "0.0", "0.1", "1.0":
		return true
	case ".":
		return hdr.PAXRecords["GNU.sparse.map"] != ""
	}
	return false
}

// packedSize returns the number of bytes between the sparse map and the padding.
func (r *recording) packedSize(hdr *tar.Header) (int64, error) {
	size := numeric(r.frame.block[124:136])
	if s := hdr.PAXRecords["size"]; s != "" {
		var err error
		if size, err = strconv.ParseInt(s, 10, 64); err != nil {
			return 0, tar.ErrHeader
		}
	}
	// An old map is not counted in the size, one in the body is.
	if hdr.Typeflag != tar.TypeGNUSparse {
		size -= r.frame.after
	}
	if size < 0 {
		return 0, tar.ErrHeader
	}
	return size, nil
}

// sparse handles the body of a sparse file: the stream gets it as the tar has it,
// the tree as it reads.
func (r *recording) sparse(hdr *tar.Header, tr io.Reader, f *tree.File) error {
	if err := r.builder.expand(f.Size); err != nil {
		return err
	}
	packed, err := r.packedSize(hdr)
	if err != nil {
		return err
	}
	r.pad = padding(packed)
	if packed <= tree.InlineSize {
		r.frame.begin(packed)
		if err := putContent(r.ctx, r.objects, tr, f); err != nil {
			return err
		}
		return drained(tr)
	}

	type stored struct {
		digest fsverity.Digest
		err    error
	}
	pr, pw := io.Pipe()
	done := make(chan stored, 1)
	go func() {
		d, err := r.objects.Put(r.ctx, pr, packed)
		pr.CloseWithError(err) // nil leaves io.ErrClosedPipe for what is too much
		done <- stored{d, err}
	}()
	r.inBody, r.packed = true, pw
	err = putContent(r.ctx, r.objects, tr, f)
	if err == nil {
		err = drained(tr)
	}
	r.inBody, r.packed = false, nil
	if err == nil {
		err = io.EOF
	}
	pw.CloseWithError(err)
	s := <-done
	if err != io.EOF {
		return err
	}
	if s.err != nil {
		return fmt.Errorf("storing the content as packed: %w", s.err)
	}
	return r.queue.known(s.digest, packed)
}

// drained returns an error unless r is at its end. archive/tar finds only there
// that a sparse map leaves bytes over.
func drained(r io.Reader) error {
	n, err := fill(r, make([]byte, 1))
	if n > 0 {
		return errors.New("the content goes on behind its end")
	}
	if err == io.EOF {
		return nil
	}
	return err
}
