package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"

	"github.com/particle-os/particle/converter/fsverity"
	"golang.org/x/sys/unix"
)

const (
	// wholeMax is the size in bytes up to which an object is read whole and its
	// digest known before anything is written.
	wholeMax = 256 << 10
	// overlapMin is the size from which hashing and writing run side by side.
	overlapMin = 4 << 20
	// writebackStep is after how many bytes of one object the disk is set going.
	writebackStep = 8 << 20
)

// buffers holds buffers of wholeMax bytes. A call takes at most three.
var buffers = sync.Pool{New: func() any { b := make([]byte, wholeMax); return &b }}

// hashers holds one pool for each algorithm.
var hashers [3]sync.Pool

func (t *Txn) hasher() *fsverity.Hasher {
	if h, ok := hashers[t.s.alg].Get().(*fsverity.Hasher); ok {
		h.Reset()
		return h
	}
	return fsverity.NewHasher(t.s.alg)
}

func (t *Txn) sum(data []byte) fsverity.Digest {
	h := t.hasher()
	defer hashers[t.s.alg].Put(h)
	h.Write(data)
	return h.Sum()
}

// SetImmutableSources says whether the files given to PutFile never change any
// more and belong to the store as well as to their present place: then they are
// linked instead of copied, where they lie on the same filesystem. An object made
// so keeps the file's owner, mode and times, which mean nothing in a store; where
// there is fs-verity, the file gets it and cannot be changed any more.
func (t *Txn) SetImmutableSources(yes bool) { t.linkFiles.Store(yes) }

// Put stores the next size bytes of r as an object and returns its digest. It reads
// no more than that. A reader that ends earlier is ErrSize. Memory is bounded,
// whatever the size; blocks of zeros become holes.
func (t *Txn) Put(ctx context.Context, r io.Reader, size int64) (fsverity.Digest, error) {
	leave, err := t.enter()
	if err != nil {
		return fsverity.Digest{}, err
	}
	defer leave()
	if size < 0 {
		return fsverity.Digest{}, fmt.Errorf("storing an object: %w: %d bytes", ErrSize, size)
	}
	if size <= wholeMax {
		buf := buffers.Get().(*[]byte)
		defer buffers.Put(buf)
		data := (*buf)[:size]
		if n, err := io.ReadFull(r, data); err != nil {
			return fsverity.Digest{}, readError(err, int64(n), size)
		}
		return t.putBytes(ctx, data)
	}
	w, err := t.newFile()
	if err != nil {
		return fsverity.Digest{}, err
	}
	defer w.discard()
	d, err := w.fill(ctx, r, size)
	if err != nil {
		return fsverity.Digest{}, err
	}
	return d, w.keep(d)
}

// readError words the failure of a source after n of size bytes.
func readError(err error, n, size int64) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("storing an object: %w: got %d bytes, want %d: %w", ErrSize, n, size, io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("storing an object of %d bytes: %w", size, err)
}

// PutBytes stores data as an object. Nothing is written when the store has it.
func (t *Txn) PutBytes(ctx context.Context, data []byte) (fsverity.Digest, error) {
	leave, err := t.enter()
	if err != nil {
		return fsverity.Digest{}, err
	}
	defer leave()
	return t.putBytes(ctx, data)
}

func (t *Txn) putBytes(ctx context.Context, data []byte) (fsverity.Digest, error) {
	if err := ctx.Err(); err != nil {
		return fsverity.Digest{}, fmt.Errorf("storing an object: %w", context.Cause(ctx))
	}
	d := t.sum(data)
	o, missing, err := t.look(d, int64(len(data)))
	if err != nil || !missing {
		return d, err
	}
	o.staged = t.seq.Add(1)
	if err := t.writeFile(o.staged, data); err != nil {
		return fsverity.Digest{}, t.fail(fmt.Errorf("storing object %s: %w", d, err))
	}
	t.add(d, o)
	return d, nil
}

// look reports whether neither the transaction nor the store has the object d, and
// returns what to record of it then. An object that the store has is recorded.
func (t *Txn) look(d fsverity.Digest, size int64) (o object, missing bool, err error) {
	t.mu.Lock()
	_, ok := t.known[d]
	t.mu.Unlock()
	if ok {
		return object{}, false, nil
	}
	o.size = size
	var st unix.Stat_t
	switch err := unix.Fstatat(t.objects, d.Path(), &st, unix.AT_SYMLINK_NOFOLLOW); {
	case err == unix.ENOENT:
		return o, true, nil
	case err != nil:
		return o, false, t.fail(fmt.Errorf("looking for object %s: %w", d, err))
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return o, false, t.fail(fmt.Errorf("%w: object %s is not a regular file; remove %q", ErrCorrupt, d, t.s.path(objectsDir, d.Path())))
	case st.Size != size:
		o.replace = true
		return o, true, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.known[d]; !ok {
		t.known[d] = o
	}
	return o, false, nil
}

// add records an object whose staged file is complete. When another call was
// faster with the same object, the file is removed.
func (t *Txn) add(d fsverity.Digest, o object) {
	t.mu.Lock()
	_, ok := t.known[d]
	if !ok {
		t.known[d] = o
	}
	t.mu.Unlock()
	if ok {
		t.unlink(o.staged)
	}
}

// unlink removes the staged file number n. What cannot be removed now is removed
// with the staging directory.
func (t *Txn) unlink(n uint64) {
	_ = unix.Unlinkat(int(t.stage.dir.Fd()), strconv.FormatUint(n, 36), 0)
}

// create makes the staged file number n, for writing.
func (t *Txn) create(n uint64) (fd int, err error) {
	name := strconv.FormatUint(n, 36)
	fd, err = unix.Openat(int(t.stage.dir.Fd()), name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, objectMode)
	if err != nil {
		return -1, fmt.Errorf("creating a file in %q: %w", t.stage.path, err)
	}
	if t.s.chmod {
		if err := unix.Fchmod(fd, objectMode); err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("setting the mode of a file in %q: %w", t.stage.path, err)
		}
	}
	return fd, nil
}

// writeFile makes the staged file number n with all of data.
func (t *Txn) writeFile(n uint64, data []byte) error {
	fd, err := t.create(n)
	if err != nil {
		return err
	}
	err = writeSparse(fd, data, 0)
	if err == nil && endsInHole(data) {
		err = unix.Ftruncate(fd, int64(len(data)))
	}
	// Some filesystems tell of a full disk at the end only.
	return errors.Join(err, unix.Close(fd))
}

var zeroBlock [fsverity.BlockSize]byte

// writeSparse writes data at offset off, a multiple of the block size, without the
// blocks that are all zero. A hole at the end is left for the caller to add.
func writeSparse(fd int, data []byte, off int64) error {
	if len(data) < fsverity.BlockSize {
		return pwrite(fd, data, off)
	}
	for len(data) > 0 {
		n := 0 // bytes until the next block of zeros
		for n < len(data) && !zeroBlockAt(data, n) {
			n = min(n+fsverity.BlockSize, len(data))
		}
		if err := pwrite(fd, data[:n], off); err != nil {
			return err
		}
		for n < len(data) && zeroBlockAt(data, n) {
			n += fsverity.BlockSize
		}
		data, off = data[n:], off+int64(n)
	}
	return nil
}

// zeroBlockAt reports whether a whole block of zeros is at data[n:].
func zeroBlockAt(data []byte, n int) bool {
	return n+fsverity.BlockSize <= len(data) && bytes.Equal(data[n:n+fsverity.BlockSize], zeroBlock[:])
}

// endsInHole reports whether writeSparse, given data at a block's start, leaves a
// hole at the end.
func endsInHole(data []byte) bool {
	n := len(data)
	return n >= fsverity.BlockSize && n%fsverity.BlockSize == 0 && zeroBlockAt(data, n-fsverity.BlockSize)
}

func pwrite(fd int, data []byte, off int64) error {
	for len(data) > 0 {
		n, err := unix.Pwrite(fd, data, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("writing %d bytes: %w", len(data), err)
		}
		data, off = data[n:], off+int64(n)
	}
	return nil
}

// A stagedFile is one whose digest is not known yet.
type stagedFile struct {
	t    *Txn
	n    uint64
	fd   int
	size int64
	kept bool
}

func (t *Txn) newFile() (*stagedFile, error) {
	n := t.seq.Add(1)
	fd, err := t.create(n)
	if err != nil {
		return nil, t.fail(err)
	}
	return &stagedFile{t: t, n: n, fd: fd}, nil
}

// keep makes the file the object d, or drops it where there is one already.
func (w *stagedFile) keep(d fsverity.Digest) error {
	err := unix.Ftruncate(w.fd, w.size) // a hole at the end
	err = errors.Join(err, w.close())
	if err != nil {
		return w.t.fail(fmt.Errorf("storing object %s: %w", d, err))
	}
	o, missing, err := w.t.look(d, w.size)
	if err != nil || !missing {
		return err
	}
	o.staged = w.n
	w.kept = true
	w.t.add(d, o)
	return nil
}

func (w *stagedFile) close() error {
	fd := w.fd
	w.fd = -1
	return unix.Close(fd)
}

// discard removes the file unless it was kept.
func (w *stagedFile) discard() {
	if w.fd >= 0 {
		w.close()
	}
	if !w.kept {
		w.t.unlink(w.n)
	}
}

// write appends data, in steps of whole blocks but for the last.
func (w *stagedFile) write(data []byte) error {
	if err := writeSparse(w.fd, data, w.size); err != nil {
		return w.t.fail(fmt.Errorf("storing an object: %w", err))
	}
	before := w.size / writebackStep
	w.size += int64(len(data))
	if w.size/writebackStep != before {
		// Advice only: the disk works while the rest is still being read.
		unix.SyncFileRange(w.fd, before*writebackStep, writebackStep, unix.SYNC_FILE_RANGE_WRITE)
	}
	return nil
}

// fill writes size bytes of r and returns their digest.
func (w *stagedFile) fill(ctx context.Context, r io.Reader, size int64) (fsverity.Digest, error) {
	h := w.t.hasher()
	defer hashers[w.t.s.alg].Put(h)

	// The hashing goroutine gives each buffer back when it has read it. This one
	// takes the next only after it has written its own.
	free := make(chan *[]byte, 2)
	full := make(chan []byte)
	var wg sync.WaitGroup
	overlap := size >= overlapMin
	count := 1
	if overlap {
		count = 2
		wg.Go(func() {
			for data := range full {
				h.Write(data)
				data = data[:wholeMax]
				free <- &data
			}
		})
	}
	for range count {
		free <- buffers.Get().(*[]byte)
	}
	err := func() error {
		defer close(full)
		for left := size; left > 0; {
			if ctx.Err() != nil {
				return fmt.Errorf("storing an object: %w", context.Cause(ctx))
			}
			buf := <-free
			data := (*buf)[:min(left, wholeMax)]
			n, err := io.ReadFull(r, data)
			if err != nil {
				free <- buf
				return readError(err, size-left+int64(n), size)
			}
			if overlap {
				full <- data
			} else {
				h.Write(data)
			}
			err = w.write(data)
			if !overlap {
				free <- buf
			}
			if err != nil {
				return err
			}
			left -= int64(n)
		}
		return nil
	}()
	wg.Wait()
	for range count {
		buffers.Put(<-free)
	}
	if err != nil {
		return fsverity.Digest{}, err
	}
	return h.Sum(), nil
}

// PutImage stores an EROFS image that write produces, and makes it known under
// images/ with Commit, so that it may be mounted. The error of write is returned as
// it is.
func (t *Txn) PutImage(ctx context.Context, write func(io.Writer) error) (fsverity.Digest, error) {
	leave, err := t.enter()
	if err != nil {
		return fsverity.Digest{}, err
	}
	defer leave()
	f, err := t.newFile()
	if err != nil {
		return fsverity.Digest{}, err
	}
	defer f.discard()
	w := &imageWriter{ctx: ctx, f: f, h: t.hasher(), buf: buffers.Get().(*[]byte)}
	defer hashers[t.s.alg].Put(w.h)
	defer buffers.Put(w.buf)
	if err := write(w); err != nil {
		return fsverity.Digest{}, err
	}
	if err := w.flush(); err != nil {
		return fsverity.Digest{}, err
	}
	d := w.h.Sum()
	if err := f.keep(d); err != nil {
		return fsverity.Digest{}, err
	}
	t.addLink(Images, d.String(), d)
	return d, nil
}

// LinkImage makes an object of the transaction or the store, which must be an EROFS
// image, known under images/ with Commit.
func (t *Txn) LinkImage(d fsverity.Digest) error {
	leave, err := t.enter()
	if err != nil {
		return err
	}
	defer leave()
	if _, err := t.objectSize(d); err != nil {
		return err
	}
	t.addLink(Images, d.String(), d)
	return nil
}

func (t *Txn) addLink(kind Kind, name string, d fsverity.Digest) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.links[string(kind)+"/"+name] = d
}

// An imageWriter gathers what is written into whole buffers.
type imageWriter struct {
	ctx context.Context
	f   *stagedFile
	h   *fsverity.Hasher
	buf *[]byte
	n   int
}

func (w *imageWriter) Write(p []byte) (int, error) {
	total := len(p)
	for len(p) > 0 {
		if w.n == wholeMax {
			if err := w.flush(); err != nil {
				return total - len(p), err
			}
		}
		n := copy((*w.buf)[w.n:], p)
		w.n += n
		p = p[n:]
	}
	return total, nil
}

func (w *imageWriter) flush() error {
	if w.ctx.Err() != nil {
		return fmt.Errorf("storing an image: %w", context.Cause(w.ctx))
	}
	data := (*w.buf)[:w.n]
	w.n = 0
	w.h.Write(data)
	return w.f.write(data)
}
