package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/particle-os/particle/converter/fsverity"
)

// spillMax is how much of a stream's parts is kept in memory each.
const spillMax = 1 << 20

// A StreamWriter writes one split stream. It is for one goroutine; several may
// write side by side. The bytes are those of the same calls, always.
type StreamWriter struct {
	t           *Txn
	contentType uint64
	inline      *spill // the chunk that grows
	out         *spill // the compressed chunks
	enc         *zstd.Encoder
	objects     []byte // raw digests
	index       map[fsverity.Digest]uint64
	named       map[string]fsverity.Digest
	size        uint64
	err         error
	done        bool
}

// encoders holds idle encoders, whose tables are large.
var encoders sync.Pool

// NewStream begins a split stream of the given content type. It ends with Close or
// Abort.
func (t *Txn) NewStream(contentType uint64) *StreamWriter {
	w := &StreamWriter{
		t:           t,
		contentType: contentType,
		inline:      &spill{t: t},
		out:         &spill{t: t},
		index:       map[fsverity.Digest]uint64{},
		named:       map[string]fsverity.Digest{},
	}
	if enc, ok := encoders.Get().(*zstd.Encoder); ok {
		enc.Reset(w.out)
		w.enc = enc
	} else {
		w.enc, w.err = newEncoder(w.out)
	}
	return w
}

// Inline appends bytes to the stream. They are copied.
func (w *StreamWriter) Inline(p []byte) error {
	leave, err := w.enter()
	if err != nil {
		return err
	}
	defer leave()
	w.size += uint64(len(p))
	_, w.err = w.inline.Write(p)
	return w.err
}

// Object appends the content of an object, of size bytes, which the transaction or
// the store must have (ErrNotFound, ErrSize).
func (w *StreamWriter) Object(d fsverity.Digest, size int64) error {
	leave, err := w.enter()
	if err != nil {
		return err
	}
	defer leave()
	w.err = w.object(d, size)
	return w.err
}

func (w *StreamWriter) object(d fsverity.Digest, size int64) error {
	i, ok := w.index[d]
	if !ok || size == 0 {
		switch got, err := w.t.objectSize(d); {
		case err != nil:
			return fmt.Errorf("adding an object to a stream: %w", err)
		case got != size:
			return fmt.Errorf("adding object %s to a stream: %w: got %d bytes, want %d", d, ErrSize, got, size)
		}
	}
	if !ok {
		i = uint64(len(w.index))
		w.index[d] = i
		w.objects = d.AppendTo(w.objects)
	}
	if err := w.flush(); err != nil {
		return err
	}
	w.size += uint64(size)
	return w.chunk(int64(i))
}

func (w *StreamWriter) chunk(n int64) error {
	_, err := w.enc.Write(binary.LittleEndian.AppendUint64(nil, uint64(n)))
	return err
}

// flush ends the inline chunk.
func (w *StreamWriter) flush() error {
	if w.inline.n == 0 {
		return nil
	}
	if err := w.chunk(-w.inline.n); err != nil {
		return err
	}
	if _, err := io.Copy(w.enc, w.inline.reader()); err != nil {
		return err
	}
	return w.inline.reset()
}

// NamedRef adds a reference to another stream, or to an EROFS image, which keeps it
// from being collected as long as this stream is kept. The name means something to
// this stream's readers only; it may not contain a zero byte.
func (w *StreamWriter) NamedRef(name string, d fsverity.Digest) {
	if strings.IndexByte(name, 0) >= 0 {
		w.err = errors.Join(w.err, fmt.Errorf("adding a reference to a stream: %w: %q", ErrBadName, name))
	}
	w.named[name] = d
}

func (w *StreamWriter) enter() (leave func(), err error) {
	if w.done {
		return nil, fmt.Errorf("writing a stream: %w", ErrDone)
	}
	if w.err != nil {
		return nil, w.err
	}
	return w.t.enter()
}

// Abort drops the stream. After Close it does nothing.
func (w *StreamWriter) Abort() {
	if w.done {
		return
	}
	w.done = true
	w.inline.close()
	w.out.close()
	if w.enc != nil {
		w.enc.Reset(nil)
		encoders.Put(w.enc)
		w.enc = nil
	}
}

// Close stores the stream as an object and makes it known by its content id with
// the transaction's Commit; a stream that has that id already loses it. With id ""
// the object is stored only.
func (w *StreamWriter) Close(id string) (fsverity.Digest, error) {
	leave, err := w.enter()
	if err != nil {
		w.Abort()
		return fsverity.Digest{}, err
	}
	leave() // Put enters again
	defer w.Abort()
	if id != "" {
		if err := checkEntryName(Streams, id); err != nil {
			return fsverity.Digest{}, fmt.Errorf("closing a stream: %w", err)
		}
	}
	d, err := w.store()
	if err != nil {
		return d, fmt.Errorf("closing stream %q: %w", id, err)
	}
	if id != "" {
		w.t.addLink(Streams, id, d)
	}
	return d, nil
}

func (w *StreamWriter) store() (fsverity.Digest, error) {
	if err := w.flush(); err != nil {
		return fsverity.Digest{}, err
	}
	if err := w.enc.Close(); err != nil {
		return fsverity.Digest{}, err
	}
	if w.size > math.MaxInt64 {
		return fsverity.Digest{}, fmt.Errorf("%w: %d bytes", ErrSize, w.size)
	}
	head, err := w.head()
	if err != nil {
		return fsverity.Digest{}, err
	}
	return w.t.Put(context.Background(), io.MultiReader(bytes.NewReader(head), w.out.reader()), int64(len(head))+w.out.n)
}

// head returns all that comes before the compressed chunks.
func (w *StreamWriter) head() ([]byte, error) {
	var refs []byte
	var text []byte
	index := map[fsverity.Digest]int{}
	for _, name := range slices.Sorted(maps.Keys(w.named)) {
		d := w.named[name]
		if d.Algorithm() != w.t.s.alg {
			return nil, fmt.Errorf("reference %q: %w", name, ErrAlgorithm)
		}
		if _, err := w.t.objectSize(d); err != nil {
			return nil, fmt.Errorf("reference %q: %w", name, err)
		}
		i, ok := index[d]
		if !ok {
			i = len(index)
			index[d] = i
			refs = d.AppendTo(refs)
		}
		text = strconv.AppendInt(text, int64(i), 10)
		text = append(append(append(text, ':'), name...), 0)
	}
	named := &spill{t: w.t}
	defer named.close()
	enc, err := newEncoder(named)
	if err != nil {
		return nil, err
	}
	if _, err := enc.Write(text); err != nil {
		return nil, err
	}
	if err := enc.Close(); err != nil {
		return nil, err
	}
	packed, err := io.ReadAll(named.reader())
	if err != nil {
		return nil, err
	}

	at := uint64(headerSize)
	next := func(size int) fileRange {
		r := fileRange{at, at + uint64(size)}
		at = r.end
		return r
	}
	h := streamHeader{alg: w.t.s.alg, info: next(infoSize)}
	info := streamInfo{contentType: w.contentType, size: w.size}
	info.streamRefs = next(len(refs))
	info.objectRefs = next(len(w.objects))
	info.namedRefs = next(len(packed))
	info.stream = next(int(w.out.n))

	b := info.append(h.append(nil))
	b = append(b, refs...)
	b = append(b, w.objects...)
	return append(b, packed...), nil
}

// A spill holds bytes in memory, and in a file of the staging directory when there
// are many.
type spill struct {
	t    *Txn
	mem  []byte
	f    *os.File
	name uint64
	n    int64 // bytes in all
}

func (s *spill) Write(p []byte) (int, error) {
	if s.f == nil && len(s.mem)+len(p) > spillMax {
		s.name = s.t.seq.Add(1)
		f, err := os.OpenFile(s.t.stagedName(s.name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return 0, s.t.fail(fmt.Errorf("writing a stream: %w", err))
		}
		s.f = f
	}
	// With a file, mem holds what is not written yet.
	if s.f != nil && len(s.mem)+len(p) > spillMax {
		if err := s.write(s.mem); err != nil {
			return 0, err
		}
		s.mem = s.mem[:0]
		if len(p) > spillMax {
			s.n += int64(len(p))
			return len(p), s.write(p)
		}
	}
	s.mem = append(s.mem, p...)
	s.n += int64(len(p))
	return len(p), nil
}

func (s *spill) write(p []byte) error {
	if _, err := s.f.Write(p); err != nil {
		return s.t.fail(fmt.Errorf("writing a stream: %w", err))
	}
	return nil
}

// reader returns all bytes written so far, once.
func (s *spill) reader() io.Reader {
	mem := bytes.NewReader(s.mem)
	if s.f == nil {
		return mem
	}
	return io.MultiReader(io.NewSectionReader(s.f, 0, s.n-int64(len(s.mem))), mem)
}

// reset empties the spill.
func (s *spill) reset() error {
	s.mem, s.n = s.mem[:0], 0
	if s.f == nil {
		return nil
	}
	if err := s.f.Truncate(0); err != nil {
		return s.t.fail(fmt.Errorf("writing a stream: %w", err))
	}
	if _, err := s.f.Seek(0, io.SeekStart); err != nil {
		return s.t.fail(fmt.Errorf("writing a stream: %w", err))
	}
	return nil
}

func (s *spill) close() {
	if s.f != nil {
		s.f.Close()
		s.t.unlink(s.name)
		s.f = nil
	}
	s.mem = nil
}
