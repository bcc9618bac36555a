package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// WriteOptions tune Write and WriteTar. The zero value is ready for use.
type WriteOptions struct {
	// Warn is told what a tar cannot hold and is left out: sockets. They exist
	// only while a program listens; podman leaves them out too.
	Warn func(string)
}

// Write makes a tar of a tree that has no recorded stream, and gives it to rec with
// file bodies as objects. It writes PAX, names in byte order and parents first; the
// second and later names of a file are hard links to the first; whiteouts and
// opaque directories take the form that the OCI specification gives them and come
// first in their directory. Implied directories are not written unless they are
// empty, so that Read gives the same tree again.
//
// It fails for names that begin with ".wh.", which a layer cannot hold.
func Write(ctx context.Context, t *tree.Tree, rec Recorder, opts WriteOptions) error {
	w := &writer{ctx: ctx, rec: rec, opts: opts, first: map[*tree.Node]string{}}
	err := w.dir("", t.Root)
	if err == nil {
		// Two zero blocks end a tar. No padding to a multiple of 10 KiB: it means
		// nothing on disks.
		err = rec.Inline(make([]byte, 2*blockSize))
	}
	if err != nil {
		return fmt.Errorf("writing a layer: %w", err)
	}
	return nil
}

// WriteTar is Write to a plain tar.
func WriteTar(ctx context.Context, w io.Writer, t *tree.Tree, open Opener, opts WriteOptions) error {
	return Write(ctx, t, &assembler{w: w, open: open, buf: make([]byte, 256<<10)}, opts)
}

// An assembler is a Recorder that writes out at once.
type assembler struct {
	w    io.Writer
	open Opener
	buf  []byte
}

func (a *assembler) Inline(p []byte) error {
	_, err := a.w.Write(p)
	return err
}

func (a *assembler) Object(d fsverity.Digest, size int64) error {
	return copyObject(a.w, a.open, d, size, a.buf)
}

type writer struct {
	ctx   context.Context
	rec   Recorder
	opts  WriteOptions
	first map[*tree.Node]string // path of the first name of a file
	buf   bytes.Buffer
}

// dir writes a directory and all below it. Its path is "" or ends with a slash.
func (w *writer) dir(path string, n *tree.Node) error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	if !n.Implied || len(n.Dir) == 0 && path != "" {
		name := path
		if name == "" {
			name = "./"
		}
		if err := w.header(name, n, tar.Header{Typeflag: tar.TypeDir}); err != nil {
			return err
		}
	}
	if n.IsOpaque() {
		if err := w.marker(path + opaqueName); err != nil {
			return err
		}
	}
	names := n.Names()
	for _, name := range names {
		// A layer with such a name would delete something.
		if strings.HasPrefix(name, whiteoutPrefix) {
			return fmt.Errorf("%w: %.300q: names that begin with %q mean whiteouts in a layer", ErrName, "/"+path+name, whiteoutPrefix)
		}
		if n.Dir[name].IsWhiteout() {
			if err := w.marker(path + whiteoutPrefix + name); err != nil {
				return err
			}
		}
	}
	for _, name := range names {
		child := n.Dir[name]
		var err error
		switch {
		case child.IsWhiteout():
		case child.IsDir():
			err = w.dir(path+name+"/", child)
		default:
			err = w.leaf(path+name, child)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// marker writes the empty file that a whiteout is, without an owner or a time.
func (w *writer) marker(path string) error {
	return w.header(path, &tree.Node{Stat: tree.Stat{Mode: tree.TypeRegular}}, tar.Header{Typeflag: tar.TypeReg})
}

// leaf writes anything but a directory.
func (w *writer) leaf(path string, n *tree.Node) error {
	if first, ok := w.first[n]; ok {
		return w.header(path, n, tar.Header{Typeflag: tar.TypeLink, Linkname: first})
	}
	w.first[n] = path
	hdr := tar.Header{Devmajor: int64(tree.Major(n.Rdev)), Devminor: int64(tree.Minor(n.Rdev))}
	switch n.Type() {
	case tree.TypeRegular:
		hdr = tar.Header{Typeflag: tar.TypeReg, Size: n.File.Size}
		if err := w.header(path, n, hdr); err != nil {
			return err
		}
		if err := w.body(n.File); err != nil {
			return fmt.Errorf("%.300q: %w", "/"+path, err)
		}
		return nil
	case tree.TypeSymlink:
		hdr = tar.Header{Typeflag: tar.TypeSymlink, Linkname: n.Target}
	case tree.TypeChar:
		hdr.Typeflag = tar.TypeChar
	case tree.TypeBlock:
		hdr.Typeflag = tar.TypeBlock
	case tree.TypeFIFO:
		hdr = tar.Header{Typeflag: tar.TypeFifo}
	case tree.TypeSocket:
		delete(w.first, n)
		if w.opts.Warn != nil {
			w.opts.Warn(fmt.Sprintf("socket %q left out: a tar cannot hold it", "/"+path))
		}
		return nil
	default:
		return fmt.Errorf("%w: %.300q has mode %#o", ErrType, "/"+path, n.Mode)
	}
	return w.header(path, n, hdr)
}

// header writes the header of a node, with its PAX records where it needs any.
func (w *writer) header(path string, n *tree.Node, hdr tar.Header) error {
	hdr.Name, hdr.Format = path, tar.FormatPAX
	hdr.Mode, hdr.Uid, hdr.Gid = int64(n.Mode&0o7777), int(n.UID), int(n.GID)
	hdr.ModTime = time.Unix(n.MtimeSec, int64(n.MtimeNsec))
	if hdr.ModTime.IsZero() {
		// archive/tar takes the first moment of the year 1 for no time and would
		// write 1970. A nanosecond later is as close as it can come.
		hdr.ModTime = hdr.ModTime.Add(1)
	}
	if hdr.Typeflag != tar.TypeLink {
		for key, value := range n.Xattrs {
			if key == tree.OpaqueAttr {
				continue
			}
			if hdr.PAXRecords == nil {
				hdr.PAXRecords = make(map[string]string, len(n.Xattrs))
			}
			k, v := xattrRecord(key, value)
			hdr.PAXRecords[k] = v
		}
	}
	// A tar.Writer would insist on the body next; the header alone is what its
	// first bytes are.
	w.buf.Reset()
	if err := tar.NewWriter(&w.buf).WriteHeader(&hdr); err != nil {
		return fmt.Errorf("%.300q: %w", "/"+path, err)
	}
	return w.rec.Inline(w.buf.Bytes())
}

func (w *writer) body(f *tree.File) error {
	var err error
	switch {
	case f.Size == 0:
		return nil
	case !f.Object.IsZero():
		err = w.rec.Object(f.Object, f.Size)
	case int64(len(f.Inline)) == f.Size:
		err = w.rec.Inline(f.Inline)
	case len(f.Inline) == 0 && f.Payload == "":
		err = w.zeros(f.Size)
	default:
		return fmt.Errorf("its content is in no object that is known: got %d bytes, want %d", len(f.Inline), f.Size)
	}
	if err != nil {
		return err
	}
	return w.zeros(padding(f.Size))
}

func (w *writer) zeros(n int64) error {
	zeros := make([]byte, min(n, inlineRun))
	for ; n > 0; n -= int64(len(zeros)) {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		zeros = zeros[:min(n, int64(len(zeros)))]
		if err := w.rec.Inline(zeros); err != nil {
			return err
		}
	}
	return nil
}
