package store

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"os"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/particle-os/particle/converter/fsverity"
)

// maxInline is the size in bytes of the largest piece that Next returns.
const maxInline = 64 << 10

// A StreamReader reads one split stream. It is for one goroutine. Memory is
// bounded, whatever the stream says.
type StreamReader struct {
	file    io.ReaderAt
	closers []io.Closer
	objects objectSource
	alg     fsverity.Algorithm
	digest  fsverity.Digest
	info    streamInfo
	named   map[string]fsverity.Digest

	dec    *zstd.Decoder
	chunks *bufio.Reader
	left   uint64 // inline bytes of the present chunk still to come
	total  uint64 // bytes returned so far
	empty  int    // empty objects so far
	buf    []byte
	refs   []byte // a window of the object refs
	first  uint64 // index of the first of them

	rest io.Reader // what Read is at
	body *os.File  // the object it comes from
	err  error
}

// An objectSource is where the objects of a stream are: a store.
type objectSource interface {
	objectSize(fsverity.Digest) (int64, error)
	OpenObject(fsverity.Digest) (*os.File, error)
}

// OpenStream opens a split stream by its content id, or by "refs/" and the name of
// a ref. A content type other than the stream's is ErrContentType; 0 means any.
func (s *Store) OpenStream(id string, contentType uint64) (*StreamReader, error) {
	d, err := s.StreamDigest(id)
	if err != nil {
		return nil, fmt.Errorf("opening stream: %w", err)
	}
	r, err := s.OpenStreamDigest(d, contentType)
	if err != nil {
		return nil, fmt.Errorf("opening stream %q: %w", id, err)
	}
	return r, nil
}

// OpenStreamDigest opens the split stream that is the object d.
func (s *Store) OpenStreamDigest(d fsverity.Digest, contentType uint64) (*StreamReader, error) {
	f, err := s.OpenObject(d)
	if err != nil {
		return nil, err
	}
	return openStream(f, d, s, contentType)
}

// OpenStreamDigest opens a split stream of the transaction or the store.
func (t *Txn) OpenStreamDigest(d fsverity.Digest, contentType uint64) (*StreamReader, error) {
	f, err := t.OpenObject(d)
	if err != nil {
		return nil, err
	}
	return openStream(f, d, t, contentType)
}

func openStream(f *os.File, d fsverity.Digest, objects objectSource, contentType uint64) (*StreamReader, error) {
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	r, err := newStreamReader(f, st.Size(), objects, d.Algorithm())
	if err != nil {
		f.Close()
		return nil, err
	}
	r.closers, r.digest = append(r.closers, f), d
	if contentType != 0 && r.info.contentType != contentType {
		r.Close()
		return nil, fmt.Errorf("%w: got %s, want %s", ErrContentType, typeName(r.info.contentType), typeName(contentType))
	}
	return r, nil
}

// typeName returns a content type as the text that it mostly is.
func typeName(t uint64) string {
	return strconv.Quote(string(binary.LittleEndian.AppendUint64(nil, t)))
}

// newStreamReader reads the parts of a stream of size bytes that are read whole.
func newStreamReader(file io.ReaderAt, size int64, objects objectSource, alg fsverity.Algorithm) (*StreamReader, error) {
	var head [headerSize]byte
	if size < headerSize {
		return nil, fmt.Errorf("%w: a split stream of %d bytes", ErrCorrupt, size)
	}
	if _, err := file.ReadAt(head[:], 0); err != nil {
		return nil, fmt.Errorf("reading a split stream's header: %w", err)
	}
	h, err := parseHeader(&head)
	if err != nil {
		return nil, err
	}
	if h.alg != alg {
		return nil, fmt.Errorf("split stream of %s: %w (%s)", h.alg.Name(), ErrAlgorithm, alg.Name())
	}
	section := func(name string, r fileRange, limit uint64) (*io.SectionReader, error) {
		if r.start > r.end || r.end > uint64(size) || r.size() > limit {
			return nil, fmt.Errorf("%w: %s section from %d to %d in a split stream of %d bytes", ErrCorrupt, name, r.start, r.end, size)
		}
		return io.NewSectionReader(file, int64(r.start), int64(r.size())), nil
	}
	// The info section may grow in the future; what follows is not ours to know.
	sec, err := section("info", h.info, math.MaxInt64)
	if err != nil {
		return nil, err
	}
	raw, err := io.ReadAll(io.LimitReader(sec, infoSize))
	if err != nil {
		return nil, fmt.Errorf("reading a split stream's info: %w", err)
	}
	r := &StreamReader{file: file, objects: objects, alg: alg, buf: make([]byte, maxInline)}
	if r.info, err = parseInfo(raw); err != nil {
		return nil, err
	}
	for _, s := range []struct {
		name string
		r    fileRange
	}{{"stream refs", r.info.streamRefs}, {"object refs", r.info.objectRefs}} {
		if _, err := section(s.name, s.r, math.MaxInt64); err != nil {
			return nil, err
		}
		if s.r.size()%uint64(alg.Size()) != 0 {
			return nil, fmt.Errorf("%w: %s section of %d bytes, want a multiple of %d", ErrCorrupt, s.name, s.r.size(), alg.Size())
		}
	}
	if sec, err = section("named refs", r.info.namedRefs, maxNamedRefs); err != nil {
		return nil, err
	}
	if r.named, err = r.readNamed(sec); err != nil {
		return nil, err
	}
	if sec, err = section("stream", r.info.stream, math.MaxInt64); err != nil {
		return nil, err
	}
	if r.dec, err = newDecoder(sec); err != nil {
		return nil, err
	}
	r.chunks = bufio.NewReaderSize(r.dec, 16<<10)
	return r, nil
}

func newDecoder(r io.Reader) (*zstd.Decoder, error) {
	return zstd.NewReader(r,
		zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxWindow),
		zstd.WithDecoderMaxMemory(maxNamedRefs),
	)
}

// readNamed reads the named refs. The last of several of one name counts.
func (r *StreamReader) readNamed(sec *io.SectionReader) (map[string]fsverity.Digest, error) {
	named := map[string]fsverity.Digest{}
	if sec.Size() == 0 {
		return named, nil
	}
	dec, err := newDecoder(sec)
	if err != nil {
		return nil, fmt.Errorf("%w: named refs: %w", ErrCorrupt, err)
	}
	defer dec.Close()
	text := bufio.NewReader(io.LimitReader(dec, maxNamedRefs))
	for {
		rec, err := text.ReadString(0)
		if err == io.EOF && rec == "" {
			return named, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: named refs end within %.80q: %w", ErrCorrupt, rec, err)
		}
		index, name, ok := strings.Cut(rec[:len(rec)-1], ":")
		i, err := strconv.ParseUint(index, 10, 32)
		if !ok || err != nil {
			return nil, fmt.Errorf("%w: named ref %.80q, want index:name", ErrCorrupt, rec)
		}
		n := uint64(r.alg.Size())
		if i >= r.info.streamRefs.size()/n {
			return nil, fmt.Errorf("%w: named ref %.80q: there are %d stream refs", ErrCorrupt, rec, r.info.streamRefs.size()/n)
		}
		raw := make([]byte, n)
		if _, err := r.file.ReadAt(raw, int64(r.info.streamRefs.start+i*n)); err != nil {
			return nil, fmt.Errorf("reading stream refs: %w", err)
		}
		if named[name], err = fsverity.New(r.alg, raw); err != nil {
			return nil, err
		}
	}
}

// Size returns the size in bytes of the file that the stream puts together.
func (r *StreamReader) Size() int64 { return int64(min(r.info.size, math.MaxInt64)) }

// Digest returns the digest of the stream itself.
func (r *StreamReader) Digest() fsverity.Digest { return r.digest }

// ContentType returns the stream's content type.
func (r *StreamReader) ContentType() uint64 { return r.info.contentType }

// NamedRefs returns the references to other streams and images. The map is the
// reader's own.
func (r *StreamReader) NamedRefs() map[string]fsverity.Digest { return r.named }

// ObjectRefs goes through the objects that the stream is made of, each once.
func (r *StreamReader) ObjectRefs() iter.Seq2[fsverity.Digest, error] {
	return func(yield func(fsverity.Digest, error) bool) {
		for i := range r.info.objectRefs.size() / uint64(r.alg.Size()) {
			if d, err := r.objectRef(i); !yield(d, err) || err != nil {
				return
			}
		}
	}
}

// objectRef returns object ref number i, which exists.
func (r *StreamReader) objectRef(i uint64) (fsverity.Digest, error) {
	const window = 512
	n := uint64(r.alg.Size())
	if i < r.first || (i-r.first+1)*n > uint64(len(r.refs)) {
		count := min(window, r.info.objectRefs.size()/n-i)
		r.refs = make([]byte, count*n)
		if _, err := r.file.ReadAt(r.refs, int64(r.info.objectRefs.start+i*n)); err != nil {
			r.refs = nil
			return fsverity.Digest{}, fmt.Errorf("reading object refs: %w", err)
		}
		r.first = i
	}
	at := (i - r.first) * n
	return fsverity.New(r.alg, r.refs[at:at+n])
}

// Next returns the next piece of the file: inline bytes, at most 64 KiB and valid
// until the next call, or an object and its size. A long inline chunk comes in
// several pieces. At the end, when the sizes add up, the error is io.EOF.
func (r *StreamReader) Next() (inline []byte, object fsverity.Digest, size int64, err error) {
	if r.err == nil {
		inline, object, size, r.err = r.next()
	}
	return inline, object, size, r.err
}

func (r *StreamReader) next() (inline []byte, object fsverity.Digest, size int64, err error) {
	for r.left == 0 {
		var raw [8]byte
		if _, err := io.ReadFull(r.chunks, raw[:]); err != nil {
			if err != io.EOF {
				return nil, object, 0, fmt.Errorf("%w: reading a stream at byte %d: %w", ErrCorrupt, r.total, err)
			}
			if r.total != r.info.size {
				return nil, object, 0, fmt.Errorf("%w: the stream gives %d bytes, its header says %d", ErrCorrupt, r.total, r.info.size)
			}
			return nil, object, 0, io.EOF
		}
		n := int64(binary.LittleEndian.Uint64(raw[:]))
		if n >= 0 {
			object, size, err := r.object(uint64(n))
			return nil, object, size, err
		}
		r.left = -uint64(n) // right for the least number, too
		if r.left > r.info.size-r.total {
			return nil, object, 0, fmt.Errorf("%w: %d bytes inline at byte %d of a stream of %d", ErrCorrupt, r.left, r.total, r.info.size)
		}
	}
	inline = r.buf[:min(r.left, maxInline)]
	if _, err := io.ReadFull(r.chunks, inline); err != nil {
		return nil, object, 0, fmt.Errorf("%w: reading a stream at byte %d: %w", ErrCorrupt, r.total, err)
	}
	r.left -= uint64(len(inline))
	r.total += uint64(len(inline))
	return inline, object, 0, nil
}

// object returns what a chunk that is an object says.
func (r *StreamReader) object(i uint64) (fsverity.Digest, int64, error) {
	if count := r.info.objectRefs.size() / uint64(r.alg.Size()); i >= count {
		return fsverity.Digest{}, 0, fmt.Errorf("%w: chunk with object %d at byte %d, there are %d", ErrCorrupt, i, r.total, count)
	}
	d, err := r.objectRef(i)
	if err != nil {
		return d, 0, err
	}
	size, err := r.objects.objectSize(d)
	if err != nil {
		return d, 0, fmt.Errorf("reading a stream at byte %d: %w", r.total, err)
	}
	if uint64(size) > r.info.size-r.total {
		return d, 0, fmt.Errorf("%w: object %s of %d bytes at byte %d of a stream of %d", ErrCorrupt, d, size, r.total, r.info.size)
	}
	if size == 0 {
		// Only these let a small stream have chunks without end.
		if r.empty++; r.empty > maxEmpty {
			return d, 0, fmt.Errorf("%w: more than %d empty objects in a stream", ErrCorrupt, maxEmpty)
		}
	}
	r.total += uint64(size)
	return d, size, nil
}

// Read reads the file that the stream puts together, from where Next is.
func (r *StreamReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if r.rest != nil {
			n, err := r.rest.Read(p)
			if n > 0 {
				return n, nil
			}
			if err != nil && err != io.EOF {
				r.err = err
				return 0, err
			}
			if r.body != nil {
				if err := r.endBody(); err != nil {
					return 0, err
				}
			}
			r.rest = nil
		}
		inline, d, size, err := r.Next()
		if err != nil {
			return 0, err
		}
		if inline != nil {
			r.rest = bytes.NewReader(inline)
			continue
		}
		if r.body, err = r.objects.OpenObject(d); err != nil {
			r.err = err
			return 0, err
		}
		r.rest = io.NewSectionReader(r.body, 0, size)
	}
}

// endBody ends an object and checks that it gave all that Next announced.
func (r *StreamReader) endBody() error {
	sec := r.rest.(*io.SectionReader)
	at, err := sec.Seek(0, io.SeekCurrent)
	if err == nil && at != sec.Size() {
		err = fmt.Errorf("%w: %q gives %d bytes, want %d", ErrCorrupt, r.body.Name(), at, sec.Size())
	}
	r.body.Close()
	r.body = nil
	r.err = err
	return err
}

// WriteTo writes the whole file that the stream puts together, from where Next is,
// and returns its size in bytes.
func (r *StreamReader) WriteTo(w io.Writer) (int64, error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	return io.CopyBuffer(w, struct{ io.Reader }{r}, *buf)
}

// Cat writes the file that a stream puts together, as WriteTo does.
func (s *Store) Cat(id string, contentType uint64, w io.Writer) (int64, error) {
	r, err := s.OpenStream(id, contentType)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	return r.WriteTo(w)
}

// Close frees what the reader has. It does not close objects that it returned.
func (r *StreamReader) Close() error {
	if r.body != nil {
		r.body.Close()
		r.body = nil
	}
	if r.dec != nil {
		r.dec.Close()
	}
	r.err = errors.New("reading a closed stream")
	var err error
	for _, c := range r.closers {
		err = errors.Join(err, c.Close())
	}
	r.closers = nil
	return err
}
