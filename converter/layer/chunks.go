package layer

import (
	"archive/tar"
	"context"
	"fmt"
	"io"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// FromChunks makes the tree of a layer from its recorded stream. Objects are opened
// only for sparse files, whose content as it reads is another object, which is put
// anew; bodies that the stream has in another form than Read records them (by
// another program, say) are handled too.
func FromChunks(ctx context.Context, c Chunks, open Opener, objects Objects, opts Options) (*tree.Tree, error) {
	b := newBuilder(opts)
	src := &replay{ctx: ctx, chunks: c, open: open, objects: objects, builder: b, left: opts.maxSize()}
	defer src.closeObject()
	err := scan(ctx, src, b)
	if err == nil {
		// What follows the tar must be readable too, but is of no interest.
		src.skip = true
		if _, err = io.Copy(io.Discard, src); err != nil {
			err = explain(err, src, "")
		}
	}
	if err != nil {
		return nil, fmt.Errorf("reading a recorded layer: %w", err)
	}
	t, _ := b.finish()
	return t, nil
}

// replay is the source of FromChunks.
type replay struct {
	ctx     context.Context
	chunks  Chunks
	open    Opener
	objects Objects
	builder *builder

	inline []byte // what is left of the current chunk:
	object fsverity.Digest
	size   int64 // of the object
	rest   int64 // of it, not read yet
	opened io.ReadSeekCloser
	skip   bool // do not read objects: the bytes do not matter

	left   int64 // until MaxSize
	offset int64
	mark   int64 // offset of the last header
	err    error
}

func (r *replay) header() { r.mark = r.offset + padding(r.offset) }

func (r *replay) position() (int64, error) { return r.mark, r.err }

func (r *replay) fail(err error) error {
	r.err = err
	return err
}

// next makes sure that there is a current chunk.
func (r *replay) next() error {
	for len(r.inline) == 0 && r.rest == 0 {
		if r.err != nil {
			return r.err
		}
		r.closeObject()
		inline, d, size, err := r.chunks.Next()
		switch {
		case err == io.EOF:
			return io.EOF
		case err != nil:
			return r.fail(err)
		case d.IsZero():
			r.inline, size = inline, int64(len(inline))
		case d.Algorithm() != r.objects.Algorithm():
			return r.fail(fmt.Errorf("%w: object %s has a %s digest, want %s", ErrChunks, d, d.Algorithm(), r.objects.Algorithm()))
		case size < 0:
			return r.fail(fmt.Errorf("%w: object %s: got a size of %d bytes", ErrChunks, d, size))
		default:
			r.object, r.size, r.rest = d, size, size
		}
		if size > r.left {
			return r.fail(tooLarge(r.builder.maxSize))
		}
		r.left -= size
	}
	return nil
}

func (r *replay) closeObject() {
	if r.opened != nil {
		r.opened.Close() // read only: nothing can be lost
		r.opened = nil
	}
}

func (r *replay) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := r.next(); err != nil {
		return 0, err
	}
	n := copy(p, r.inline)
	if n > 0 {
		r.inline = r.inline[n:]
	} else if n = int(min(int64(len(p)), r.rest)); r.skip {
		r.rest -= int64(n)
	} else {
		var err error
		if n, err = r.readObject(p[:n]); err != nil {
			return 0, r.fail(err)
		}
	}
	r.offset += int64(n)
	return n, nil
}

func (r *replay) readObject(p []byte) (int, error) {
	if r.opened == nil {
		o, err := r.open(r.object)
		if err != nil {
			return 0, fmt.Errorf("opening object %s: %w", r.object, err)
		}
		r.opened = o
		if _, err := o.Seek(r.size-r.rest, io.SeekStart); err != nil {
			return 0, fmt.Errorf("reading object %s: %w", r.object, err)
		}
	}
	n, err := io.ReadAtLeast(r.opened, p, 1)
	if err != nil {
		if err == io.EOF {
			err = fmt.Errorf("%w: it has %d bytes, want %d", ErrChunks, r.size-r.rest, r.size)
		}
		return 0, fmt.Errorf("reading object %s: %w", r.object, err)
	}
	r.rest -= int64(n)
	return n, nil
}

func (r *replay) body(hdr *tar.Header, tr io.Reader, f *tree.File) error {
	if isSparse(hdr) {
		if err := r.builder.expand(f.Size); err != nil {
			return err
		}
		if err := putContent(r.ctx, r.objects, tr, f); err != nil {
			return err
		}
		return drained(tr)
	}
	if f.Size > tree.InlineSize {
		if err := r.next(); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		if len(r.inline) == 0 && r.rest == r.size && r.size == f.Size {
			f.Object = r.object
			r.skip = true
			_, err := io.CopyN(io.Discard, tr, f.Size)
			r.skip = false
			return err
		}
	}
	return putContent(r.ctx, r.objects, tr, f)
}
