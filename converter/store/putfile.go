package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/particle-os/particle/converter/fsverity"
	"golang.org/x/sys/unix"
)

// PutFile stores the content of f, a regular file of size bytes, as an object,
// whatever its offset is; the offset may be moved. Where the filesystem can share blocks
// (FICLONE), large files are cloned; otherwise the bytes are copied while they are
// hashed, which copy_file_range could not do, and holes stay holes. A file of
// another size is ErrSize.
func (t *Txn) PutFile(ctx context.Context, f *os.File, size int64) (fsverity.Digest, error) {
	leave, err := t.enter()
	if err != nil {
		return fsverity.Digest{}, err
	}
	defer leave()
	d, err := t.putFile(ctx, f, size)
	if err != nil {
		return fsverity.Digest{}, fmt.Errorf("storing file %q: %w", f.Name(), err)
	}
	return d, nil
}

func (t *Txn) putFile(ctx context.Context, f *os.File, size int64) (fsverity.Digest, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fsverity.Digest{}, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fsverity.Digest{}, errors.New("not a regular file")
	}
	if st.Size != size {
		return fsverity.Digest{}, fmt.Errorf("%w: got %d bytes, want %d: it changes while it is read", ErrSize, st.Size, size)
	}
	if t.linkFiles.Load() {
		if d, ok, err := t.linkFile(ctx, f, size); ok || err != nil {
			return d, err
		}
	}
	if size <= wholeMax {
		buf := buffers.Get().(*[]byte)
		defer buffers.Put(buf)
		data := (*buf)[:size]
		if n, err := io.ReadFull(io.NewSectionReader(f, 0, size), data); err != nil {
			return fsverity.Digest{}, readError(err, int64(n), size)
		}
		return t.putBytes(ctx, data)
	}
	w, err := t.newFile()
	if err != nil {
		return fsverity.Digest{}, err
	}
	defer w.discard()
	if d, ok, err := w.clone(ctx, f, size); ok || err != nil {
		return d, err
	}
	d, err := w.fill(ctx, &sparseReader{f: f, size: size}, size)
	if err != nil {
		return fsverity.Digest{}, err
	}
	return d, w.keep(d)
}

// clone shares the blocks of f. It reports ok=false where that cannot be done. The
// digest is that of the clone, which nobody can change any more.
func (w *stagedFile) clone(ctx context.Context, f *os.File, size int64) (d fsverity.Digest, ok bool, err error) {
	if w.t.noReflink.Load() {
		return d, false, nil
	}
	switch err := unix.IoctlFileClone(w.fd, int(f.Fd())); err {
	case nil:
	case unix.EOPNOTSUPP, unix.ENOTTY, unix.ENOSYS:
		w.t.noReflink.Store(true)
		return d, false, nil
	case unix.ENOSPC, unix.EDQUOT:
		return d, false, w.t.fail(err)
	default: // EXDEV, EINVAL, ETXTBSY…: not this file
		return d, false, nil
	}
	w.size = size
	got, err := os.Open(w.t.stagedName(w.n))
	if err != nil {
		return d, false, w.t.fail(err)
	}
	defer got.Close()
	if d, err = w.t.digestOf(ctx, got, size); err != nil {
		return d, false, err
	}
	return d, true, w.keep(d)
}

// linkFile links f itself into the staging directory. It reports ok=false where
// that cannot be done.
func (t *Txn) linkFile(ctx context.Context, f *os.File, size int64) (d fsverity.Digest, ok bool, err error) {
	if d, err = t.digestOf(ctx, f, size); err != nil {
		return d, false, err
	}
	n := t.seq.Add(1)
	name := strconv.FormatUint(n, 36)
	stage := int(t.stage.dir.Fd())
	err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), stage, name, unix.AT_SYMLINK_FOLLOW)
	if err == unix.EXDEV {
		err = t.linkAcross(f, name)
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return d, false, t.fail(err)
	}
	if err != nil { // EXDEV, EMLINK, EPERM…: copy it
		return d, false, nil
	}
	o, missing, err := t.look(d, size)
	if err != nil || !missing {
		t.unlink(n)
		return d, true, err
	}
	o.staged = n
	t.add(d, o)
	return d, true, nil
}

// digestOf reads size bytes of f.
func (t *Txn) digestOf(ctx context.Context, f *os.File, size int64) (fsverity.Digest, error) {
	h := t.hasher()
	defer hashers[t.s.alg].Put(h)
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	r := &sparseReader{f: f, size: size}
	for left := size; left > 0; {
		if ctx.Err() != nil {
			return fsverity.Digest{}, context.Cause(ctx)
		}
		data := (*buf)[:min(left, wholeMax)]
		if n, err := io.ReadFull(r, data); err != nil {
			return fsverity.Digest{}, readError(err, size-left+int64(n), size)
		}
		h.Write(data)
		left -= int64(len(data))
	}
	return h.Sum(), nil
}

// A sparseReader reads a file from its start and does not ask the disk for holes.
type sparseReader struct {
	f       *os.File
	size    int64
	off     int64
	dataEnd int64 // the file has data from off to here
	holeEnd int64 // and a hole from off to here
	noHoles bool  // the filesystem does not tell
}

func (r *sparseReader) Read(p []byte) (int, error) {
	if r.off >= r.size {
		return 0, io.EOF
	}
	if !r.noHoles && r.off >= r.dataEnd && r.off >= r.holeEnd {
		fd := int(r.f.Fd())
		switch data, err := unix.Seek(fd, r.off, unix.SEEK_DATA); {
		case err == unix.ENXIO:
			r.holeEnd = r.size
		case err != nil:
			r.noHoles = true
		case data > r.off:
			r.holeEnd = data
		default:
			if r.dataEnd, err = unix.Seek(fd, r.off, unix.SEEK_HOLE); err != nil || r.dataEnd <= r.off {
				r.noHoles = true
			}
		}
	}
	p = p[:min(int64(len(p)), r.size-r.off)]
	if !r.noHoles && r.off < r.holeEnd {
		p = p[:min(int64(len(p)), r.holeEnd-r.off)]
		clear(p)
		r.off += int64(len(p))
		return len(p), nil
	}
	if !r.noHoles {
		p = p[:min(int64(len(p)), r.dataEnd-r.off)]
	}
	n, err := r.f.ReadAt(p, r.off)
	r.off += int64(n)
	if n > 0 {
		err = nil
	}
	return n, err
}
