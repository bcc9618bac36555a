package registry

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// A compression is told by the first bytes of a stream.
type compression uint8

const (
	plain compression = iota
	gzipped
	zstandard
	xz
	bzip2
)

// magicLen is how many bytes detect needs.
const magicLen = 6

// detect tells the compression of a stream from its start. The magic numbers are
// those of RFC 1952 section 2.3.1, RFC 8878 sections 3.1.1 (frame) and 3.1.2
// (skippable frame, which may come first), the .xz file format section 2.1.1.1, and
// the bzip2 manual.
func detect(b []byte) compression {
	at := func(i int, magic string) bool { return len(b) >= i+len(magic) && string(b[i:i+len(magic)]) == magic }
	switch {
	case at(0, "\x1f\x8b"):
		return gzipped
	case at(0, "\x28\xb5\x2f\xfd"), at(1, "\x2a\x4d\x18") && b[0]>>4 == 5:
		return zstandard
	case at(0, "\xfd7zXZ\x00"):
		return xz
	case at(0, "BZh"):
		return bzip2
	}
	return plain
}

// decompress returns the content of a stream. Closing it leaves r open.
func decompress(r io.Reader) (io.ReadCloser, compression, error) {
	br := bufio.NewReaderSize(r, 1<<16)
	head, err := br.Peek(magicLen)
	if err != nil && err != io.EOF {
		return nil, plain, err
	}
	switch c := detect(head); c {
	case gzipped:
		zr, err := gzip.NewReader(br)
		if err != nil {
			return nil, c, fmt.Errorf("%w: %v", ErrInvalid, err)
		}
		return zr, c, nil
	case zstandard:
		// The window bounds the memory that a hostile frame can ask for; 128 MiB is
		// what zstd --long=27 needs, the most that the zstd program takes by default.
		zr, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, c, fmt.Errorf("%w: %v", ErrInvalid, err)
		}
		return zr.IOReadCloser(), c, nil
	case xz:
		return nil, c, fmt.Errorf("%w: xz compression; unpack it with xz -d first", ErrUnsupported)
	case bzip2:
		return nil, c, fmt.Errorf("%w: bzip2 compression; unpack it with bzip2 -d first", ErrUnsupported)
	default:
		return io.NopCloser(br), c, nil
	}
}

// openArchive opens a tar for reading in place. A compressed one, and one that is
// no regular file (a pipe), is copied to a temporary file without a name first.
func openArchive(ctx context.Context, name string, opts *Options) (*tarFiles, error) {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: file %q", ErrNotFound, name)
	}
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if fi.IsDir() {
		f.Close()
		return nil, fmt.Errorf("%w: %q is a directory, want an archive; is it an oci: layout?", ErrInvalid, name)
	}
	if fi.Mode().IsRegular() {
		var head [magicLen]byte
		n, err := f.ReadAt(head[:], 0)
		if err != nil && err != io.EOF {
			return nil, errors.Join(err, f.Close())
		}
		if detect(head[:n]) == plain {
			return indexTar(ctx, name, f)
		}
	}
	defer f.Close()
	spool, err := spoolArchive(ctx, f, opts)
	if err != nil {
		return nil, fmt.Errorf("reading archive %q: %w", name, err)
	}
	return indexTar(ctx, name, spool)
}

// spoolArchive unpacks an archive into a temporary file that vanishes when closed.
func spoolArchive(ctx context.Context, r io.Reader, opts *Options) (_ *os.File, err error) {
	zr, _, err := decompress(r)
	if err != nil {
		return nil, err
	}
	defer zr.Close()
	spool, err := os.CreateTemp(opts.tempDir(), "particle-archive-")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			spool.Close()
		}
	}()
	if err := os.Remove(spool.Name()); err != nil {
		return nil, err
	}
	if _, err := copyLimited(spool, &contextReader{ctx, zr}, opts.maxUnpacked()); err != nil {
		return nil, fmt.Errorf("unpacking into %q: %w", opts.tempDir(), err)
	}
	_, err = spool.Seek(0, io.SeekStart)
	return spool, err
}

// copyLimited refuses to copy more than limit bytes.
func copyLimited(w io.Writer, r io.Reader, limit int64) (int64, error) {
	n, err := io.Copy(w, io.LimitReader(r, limit))
	if err != nil || n < limit {
		return n, err
	}
	if more, err := io.CopyN(io.Discard, r, 1); err != io.EOF || more > 0 {
		return n, fmt.Errorf("%w: it unpacks to more than %d bytes; raise the limit if it is to be trusted", ErrInvalid, limit)
	}
	return n, nil
}

// contextReader stops a long copy when its context ends.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
