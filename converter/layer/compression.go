package layer

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
)

// Compression is how a layer blob is compressed.
type Compression uint8

const (
	None  Compression = iota
	Gzip              // RFC 1952, one or more members; eStargz is that too
	Zstd              // RFC 8878, one or more frames; zstd:chunked is that too
	Bzip2             // read only: very old Docker layers
)

// String returns "none", "gzip", "zstd" or "bzip2".
func (c Compression) String() string {
	switch c {
	case None:
		return "none"
	case Gzip:
		return "gzip"
	case Zstd:
		return "zstd"
	case Bzip2:
		return "bzip2"
	}
	return fmt.Sprintf("unknown compression %d", uint8(c))
}

// ParseCompression is the inverse of String.
func ParseCompression(s string) (Compression, error) {
	for _, c := range []Compression{None, Gzip, Zstd, Bzip2} {
		if s == c.String() {
			return c, nil
		}
	}
	return 0, fmt.Errorf("%w %q: want none, gzip or zstd", ErrCompression, s)
}

// maxWindow is the largest zstd window in bytes, which is memory that a hostile
// layer could make us take; the zstd tool has the same limit unless it is told
// otherwise (zstd(1), --memory).
const maxWindow = 128 << 20

// sniffLen is the number of bytes that sniff looks at.
const sniffLen = 10

// sniff tells the compression from the first bytes of a blob. Formats that are not
// supported are named in the error. A tar has no magic at its start, so the
// signatures are as long as the formats allow: a file name may begin like one.
func sniff(head []byte) (Compression, error) {
	has := func(magic string) bool { return bytes.HasPrefix(head, []byte(magic)) }
	found := ""
	switch {
	case has("\x1f\x8b\x08"):
		return Gzip, nil
	case has("\x28\xb5\x2f\xfd"), len(head) >= 4 && head[0]&0xf0 == 0x50 && string(head[1:4]) == "\x2a\x4d\x18":
		return Zstd, nil // a frame, or a skippable one
	case len(head) == sniffLen && has("BZh") && (string(head[4:]) == "\x31\x41\x59\x26\x53\x59" || string(head[4:]) == "\x17\x72\x45\x38\x50\x90"):
		return Bzip2, nil
	case has("\xfd7zXZ\x00"):
		found = "xz"
	case has("\x04\x22\x4d\x18"):
		found = "lz4"
	case has("LZIP\x01"):
		found = "lzip"
	case has("\x5d\x00\x00") && len(head) == sniffLen && head[9] == 0xff || has("\x5d\x00\x00\x80\x00\xff"):
		found = "lzma"
	case has("\x1f\x9d"):
		found = "compress (.Z)"
	case has("7z\xbc\xaf\x27\x1c"):
		found = "7z"
	case has("PK\x03\x04"):
		found = "zip"
	default:
		return None, nil
	}
	return 0, fmt.Errorf("%w: found %s, want a tar that is plain or compressed with gzip or zstd", ErrCompression, found)
}

// A decompressor gives the uncompressed bytes of a blob. It reports io.EOF only
// after the blob's own reader has, so that checks made there have passed.
type decompressor struct {
	compression Compression
	blob        blobReader
	src         *bufio.Reader
	r           io.Reader
	close       func()
}

// A blobReader keeps the error of the blob's reader, which may be that its digest
// is wrong, apart from those that decompression has as a consequence.
type blobReader struct {
	r   io.Reader
	err error // other than io.EOF
}

func (b *blobReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if err != nil && err != io.EOF {
		b.err = err
	}
	return n, err
}

func newDecompressor(r io.Reader) (*decompressor, error) {
	d := &decompressor{blob: blobReader{r: r}, close: func() {}}
	d.src = bufio.NewReaderSize(&d.blob, 256<<10)
	head, err := d.src.Peek(sniffLen)
	if err != nil && err != io.EOF {
		return nil, d.explain(err)
	}
	if d.compression, err = sniff(head); err != nil {
		return nil, err
	}
	switch d.compression {
	case None:
		d.r = d.src
	case Gzip:
		z, err := gzip.NewReader(d.src)
		if err != nil {
			return nil, d.explain(err)
		}
		d.r = z
	case Zstd:
		// One goroutine: the stream has its own already, and others would each
		// keep a window.
		z, err := zstd.NewReader(d.src, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, d.explain(err)
		}
		d.r, d.close = z, z.Close
	case Bzip2:
		d.r = bzip2.NewReader(d.src)
	}
	return d, nil
}

func (d *decompressor) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	if err == nil {
		return n, nil
	}
	if err != io.EOF {
		return n, d.explain(err)
	}
	// The formats end where they say so: see that the blob does too.
	if _, err := d.src.ReadByte(); err == nil {
		return n, fmt.Errorf("%w: bytes follow the end of the %s stream", ErrFormat, d.compression)
	} else if err != io.EOF {
		return n, d.explain(err)
	}
	return n, io.EOF
}

// explain puts the errors of decompression into words of this package.
func (d *decompressor) explain(err error) error {
	switch {
	case d.blob.err != nil:
		return fmt.Errorf("reading the blob: %w", d.blob.err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: it ends inside a %s stream", ErrTruncated, d.compression)
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return fmt.Errorf("%w: it needs a zstd window of more than %d MiB: compress it without --ultra or --long: %w", ErrTooLarge, maxWindow>>20, err)
	case errors.Is(err, gzip.ErrHeader), errors.Is(err, zstd.ErrMagicMismatch):
		// Also what podman says of bytes behind the last member or frame.
		return fmt.Errorf("%w: decompressing the layer: %w (garbage behind the end of the compressed data?)", ErrFormat, err)
	}
	return fmt.Errorf("decompressing the layer (%s): %w", d.compression, err)
}

func (d *decompressor) Close() { d.close() }

// CompressorOptions tune NewCompressor. The zero value is ready for use.
type CompressorOptions struct {
	// Level is 1 to 9 for gzip and 1 to 22 for zstd; 0 means 6 and 3.
	Level int
	// Concurrency is the number of goroutines that compress; 0 means one a
	// processor. The bytes do not depend on it.
	Concurrency int
}

// gzipBlock is the number of bytes that one goroutine compresses at a time. It is
// part of what makes the output, so it must not change.
const gzipBlock = 1 << 20

// NewCompressor returns a writer that compresses to w; Close ends the stream and
// leaves w open. Equal input gives equal output on any machine, however it is cut
// into writes: the gzip header carries no name and no time.
func NewCompressor(w io.Writer, c Compression, opts CompressorOptions) (io.WriteCloser, error) {
	n := opts.Concurrency
	if n <= 0 {
		n = Options{}.workers() / 2
	}
	switch c {
	case None:
		return nopCloser{w}, nil
	case Gzip:
		level := opts.Level
		if level == 0 {
			level = 6
		}
		z, err := pgzip.NewWriterLevel(w, level)
		if err == nil {
			err = z.SetConcurrency(gzipBlock, n)
		}
		if err != nil {
			return nil, fmt.Errorf("compressing with gzip: %w", err)
		}
		z.ModTime = time.Unix(0, 0) // 0 is "no time" in RFC 1952
		return z, nil
	case Zstd:
		level := opts.Level
		if level == 0 {
			level = 3
		}
		z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(level)), zstd.WithEncoderConcurrency(n))
		if err != nil {
			return nil, fmt.Errorf("compressing with zstd: %w", err)
		}
		return z, nil
	}
	return nil, fmt.Errorf("%w %q for writing: want none, gzip or zstd", ErrCompression, c)
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }
