package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// A source gives the bytes of an uncompressed layer and knows what to do with the
// bodies of files.
type source interface {
	io.Reader
	// header says that a header is read next.
	header()
	// body consumes the body of a regular file, which r gives with its holes
	// filled in, and sets the content of f.
	body(hdr *tar.Header, r io.Reader, f *tree.File) error
	// position returns the offset of the header that was read last, and the error
	// other than io.EOF that ended the layer, if any.
	position() (int64, error)
}

// scan reads the entries of a tar.
func scan(ctx context.Context, src source, b *builder) error {
	tr := tar.NewReader(src)
	body := &bodyReader{tr, src}
	for n := 1; ; n++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		src.header()
		hdr, err := tr.Next()
		if err == io.EOF {
			if _, err := src.position(); err != nil {
				return err
			}
			return nil
		}
		if err != nil {
			return explain(err, src, "")
		}
		f, err := b.add(hdr)
		if err != nil {
			off, _ := src.position()
			return fmt.Errorf("entry %d, %.300q, at byte %d: %w", n, hdr.Name, off, err)
		}
		if f == nil {
			continue
		}
		if err := src.body(hdr, body, f); err != nil {
			return explain(err, src, hdr.Name)
		}
	}
}

// explain says what ended the reading of the tar, in a body if name is not empty.
func explain(err error, src source, name string) error {
	off, cause := src.position()
	where := fmt.Sprintf("at byte %d", off)
	if name != "" {
		where = fmt.Sprintf("in the body of %.300q, whose header is at byte %d", name, off)
	}
	switch {
	case cause != nil:
		return fmt.Errorf("%s: %w", where, cause)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: it ends %s", ErrTruncated, where)
	case errors.Is(err, tar.ErrHeader) && off == 0:
		return fmt.Errorf("%w: it does not begin with a tar header", ErrFormat)
	case name == "":
		return fmt.Errorf("%w: %s: %w", ErrFormat, where, err)
	}
	return fmt.Errorf("%s: %w", where, err)
}

// A bodyReader marks the errors of archive/tar, so that they are known for what
// they are when they come back from where the body was stored.
type bodyReader struct {
	r   io.Reader
	src source
}

func (b *bodyReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		if _, cause := b.src.position(); cause == nil {
			err = fmt.Errorf("%w: %w", ErrFormat, err)
		}
	}
	return n, err
}

// recording is the source of Read: all it gives outside bodies goes to the queue as
// inline bytes.
type recording struct {
	ctx     context.Context
	in      *stream
	objects Objects
	queue   *queue
	builder *builder

	offset int64 // of the next byte of the layer
	frame  framer
	inBody bool
	packed io.Writer // receives the raw body of a sparse file
	pad    int64     // padding behind the last body
	err    error     // sticky, never io.EOF
}

func (r *recording) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	n, err := r.in.Read(p)
	if err != nil && err != io.EOF {
		r.err = err
	}
	p = p[:n]
	switch {
	case !r.inBody:
		r.frame.feed(p, r.offset)
		if e := r.queue.inline(p); e != nil {
			r.err, err = e, e
		}
	case r.packed != nil:
		if _, e := r.packed.Write(p); e != nil {
			r.err, err = e, e
		}
	}
	r.offset += int64(n)
	return n, err
}

func (r *recording) header() {
	r.frame.begin(r.pad)
	r.pad = 0
}

func (r *recording) position() (int64, error) { return r.frame.offset, r.err }

// padding returns the number of bytes that fill up the last block of a body.
func padding(size int64) int64 { return -size & (blockSize - 1) }

func (r *recording) body(hdr *tar.Header, tr io.Reader, f *tree.File) error {
	size := hdr.Size
	if isSparse(hdr) {
		return r.sparse(hdr, tr, f)
	}
	r.pad = padding(size)
	switch {
	case size <= tree.InlineSize:
		// Not in r.inBody: these bytes stay inline.
		r.frame.begin(size)
		return readInline(tr, f)
	case size <= maxBuffered:
		r.inBody = true
		buf, err := r.queue.buffer(int(size))
		if err == nil {
			_, err = io.ReadFull(tr, buf)
		}
		r.inBody = false
		if err != nil {
			return err
		}
		return r.queue.body(hdr.Name, f)
	}
	r.inBody = true
	d, err := r.objects.Put(r.ctx, tr, size)
	r.inBody = false
	if err != nil {
		return fmt.Errorf("storing the content: %w", err)
	}
	f.Object = d
	return r.queue.known(d, size)
}

func readInline(r io.Reader, f *tree.File) error {
	if f.Size == 0 {
		return nil
	}
	f.Inline = make([]byte, f.Size)
	_, err := io.ReadFull(r, f.Inline)
	return err
}

// trailer records what follows the end of the tar.
func (r *recording) trailer() error {
	r.header()
	buf := make([]byte, 32<<10)
	for {
		if _, err := r.Read(buf); err == io.EOF {
			return nil
		} else if err != nil {
			return explain(err, r, "")
		}
	}
}

// putContent stores the content of a file that r gives, or keeps it in the tree,
// and waits for it.
func putContent(ctx context.Context, objects Objects, r io.Reader, f *tree.File) error {
	if f.Size <= tree.InlineSize {
		return readInline(r, f)
	}
	d, err := objects.Put(ctx, r, f.Size)
	if err != nil {
		return fmt.Errorf("storing the content: %w", err)
	}
	f.Object = d
	return nil
}

// Assemble writes the bytes of a recorded layer to w.
func Assemble(ctx context.Context, w io.Writer, c Chunks, open Opener) error {
	buf := make([]byte, 256<<10)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		inline, d, size, err := c.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("assembling the layer: %w", err)
		}
		if d.IsZero() {
			_, err = w.Write(inline)
		} else {
			err = copyObject(w, open, d, size, buf)
		}
		if err != nil {
			return fmt.Errorf("assembling the layer: %w", err)
		}
	}
}

// copyObject writes an object that must have the given size.
func copyObject(w io.Writer, open Opener, d fsverity.Digest, size int64, buf []byte) error {
	r, err := open(d)
	if err != nil {
		return fmt.Errorf("opening object %s: %w", d, err)
	}
	defer r.Close()
	// One byte more shows an object that is too long. The wrappers keep io.Copy
	// from allocating buffers of its own.
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, io.LimitReader(r, size+1), buf)
	if err != nil {
		return fmt.Errorf("copying object %s: %w", d, err)
	}
	if n != size {
		return fmt.Errorf("%w: object %s: got %d bytes or more, want %d", ErrChunks, d, n, size)
	}
	return nil
}
