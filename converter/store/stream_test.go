package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/particle-os/particle/converter/fsverity"
)

// A piece of a stream: inline text, or an object.
type piece struct {
	inline string
	object fsverity.Digest
	size   int64
}

// pieces reads all of a stream, with neighbouring inline pieces joined.
func pieces(r *StreamReader) ([]piece, error) {
	var all []piece
	for {
		inline, d, size, err := r.Next()
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		if inline == nil {
			all = append(all, piece{object: d, size: size})
			continue
		}
		if len(inline) > maxInline {
			return all, fmt.Errorf("an inline piece of %d bytes", len(inline))
		}
		if n := len(all); n > 0 && all[n-1].object.IsZero() {
			all[n-1].inline += string(inline)
		} else {
			all = append(all, piece{inline: string(inline)})
		}
	}
}

func TestStream(t *testing.T) {
	big := string(randomBytes(3, 3*spillMax+12345)) // inline, and not compressible
	for _, alg := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
		for name, c := range map[string]struct {
			write []piece // objects by their content, in inline, when size > 0
			want  []piece
		}{
			"empty":        {nil, nil},
			"inline":       {[]piece{{inline: "a"}, {inline: ""}, {inline: "b"}}, []piece{{inline: "ab"}}},
			"object":       {[]piece{{inline: "obj", size: 3}}, []piece{{inline: "obj", size: 3}}},
			"object twice": {[]piece{{inline: "obj", size: 3}, {inline: "x"}, {inline: "obj", size: 3}}, []piece{{inline: "obj", size: 3}, {inline: "x"}, {inline: "obj", size: 3}}},
			"long inline":  {[]piece{{inline: big}, {inline: "obj", size: 3}, {inline: big[1:]}, {inline: big[2:]}}, []piece{{inline: big}, {inline: "obj", size: 3}, {inline: big[1:] + big[2:]}}},
		} {
			t.Run(alg.String()+" "+name, func(t *testing.T) {
				s := memStore(t, alg)
				var digests []fsverity.Digest
				var total int64
				for range 2 {
					txn := begin(t, s)
					w := txn.NewStream(LayerStream)
					total = 0
					for _, p := range c.write {
						total += int64(len(p.inline))
						if p.size == 0 {
							if err := w.Inline([]byte(p.inline)); err != nil {
								t.Fatal(err)
							}
						} else if err := w.Object(put(t, txn, []byte(p.inline)), p.size); err != nil {
							t.Fatal(err)
						}
					}
					d, err := w.Close("s")
					if err != nil {
						t.Fatal(err)
					}
					digests = append(digests, d)
					commit(t, txn)
				}
				if digests[0] != digests[1] {
					t.Error("the same calls gave two streams")
				}
				r, err := s.OpenStream("s", LayerStream)
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				want := append([]piece(nil), c.want...)
				var whole strings.Builder
				for i, p := range want {
					whole.WriteString(p.inline)
					if p.size > 0 {
						want[i] = piece{object: fsverity.Sum(alg, []byte(p.inline)), size: p.size}
					}
				}
				got, err := pieces(r)
				if err != nil || !reflect.DeepEqual(got, want) {
					t.Errorf("got %d pieces (%v), want %d", len(got), err, len(want))
				}
				if r.Size() != total || r.ContentType() != LayerStream || r.Digest() != digests[0] {
					t.Errorf("size %d, type %x, digest %s; want %d, %x, %s", r.Size(), r.ContentType(), r.Digest(), total, LayerStream, digests[0])
				}
				var cat bytes.Buffer
				if n, err := s.Cat("s", 0, &cat); err != nil || n != total || cat.String() != whole.String() {
					t.Errorf("Cat gave %d bytes (%v), want %d", n, err, total)
				}
			})
		}
	}
}

func TestStreamRefs(t *testing.T) {
	s := memStore(t, 0)
	txn := begin(t, s)
	a, b := put(t, txn, []byte("a")), put(t, txn, []byte("b"))
	write := func(names ...string) fsverity.Digest {
		w := txn.NewStream(ConfigStream)
		for _, n := range names {
			w.NamedRef(n, map[byte]fsverity.Digest{'a': a, 'b': b}[n[0]])
		}
		d, err := w.Close("")
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	d := write("a:1", "b", "a2")
	if d != write("b", "a2", "a:1") {
		t.Error("the order of NamedRef calls changes the stream")
	}
	r, err := txn.OpenStreamDigest(d, ConfigStream)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if want := map[string]fsverity.Digest{"a:1": a, "b": b, "a2": a}; !reflect.DeepEqual(r.NamedRefs(), want) {
		t.Errorf("got %v, want %v", r.NamedRefs(), want)
	}
	if n := r.info.streamRefs.size() / 32; n != 2 {
		t.Errorf("two digests take %d stream refs", n)
	}

	missing := fsverity.Sum(fsverity.SHA256, []byte("missing"))
	for name, try := range map[string]struct {
		do   func(w *StreamWriter) error
		want error
	}{
		"missing object": {func(w *StreamWriter) error { return w.Object(missing, 7) }, ErrNotFound},
		"wrong size":     {func(w *StreamWriter) error { return w.Object(a, 2) }, ErrSize},
		"missing ref":    {func(w *StreamWriter) error { w.NamedRef("x", missing); _, err := w.Close("x"); return err }, ErrNotFound},
		"foreign ref": {func(w *StreamWriter) error {
			w.NamedRef("x", fsverity.Sum(fsverity.SHA512, nil))
			_, err := w.Close("x")
			return err
		}, ErrAlgorithm},
		"zero byte":   {func(w *StreamWriter) error { w.NamedRef("x\x00", a); _, err := w.Close("x"); return err }, ErrBadName},
		"bad id":      {func(w *StreamWriter) error { _, err := w.Close("x/y"); return err }, ErrBadName},
		"refs as id":  {func(w *StreamWriter) error { _, err := w.Close("refs"); return err }, ErrBadName},
		"twice":       {func(w *StreamWriter) error { w.Close("x"); _, err := w.Close("x"); return err }, ErrDone},
		"after abort": {func(w *StreamWriter) error { w.Abort(); return w.Inline(nil) }, ErrDone},
	} {
		w := txn.NewStream(ConfigStream)
		if err := try.do(w); !errors.Is(err, try.want) {
			t.Errorf("%s: got %v, want %v", name, err, try.want)
		}
		w.Abort()
	}
}

// rawFrame is a zstd frame of one raw block, made by hand from RFC 8878: magic,
// a header with a 4-byte content size and a single segment, a block header.
func rawFrame(data []byte) []byte {
	b := []byte{0x28, 0xB5, 0x2F, 0xFD, 0b10_1_00000}
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	head := uint32(len(data))<<3 | 1 // last block, raw
	b = append(b, byte(head), byte(head>>8), byte(head>>16))
	return append(b, data...)
}

// foreign is a stream as another program would write it: put together here byte by
// byte after splitstream_format.rs, sections in another order, with a longer info.
type foreign struct {
	oldHeader   bool
	version     byte
	alg, log    byte
	streamRefs  []byte
	objectRefs  []byte
	named       string
	chunks      []byte
	contentType uint64
	size        uint64
	mangle      func(file, info []byte) // called before the info is put in
}

func (f foreign) bytes() []byte {
	le := binary.LittleEndian
	file := make([]byte, 32)
	section := func(b []byte) (start, end uint64) {
		start = uint64(len(file))
		file = append(file, b...)
		return start, uint64(len(file))
	}
	info := make([]byte, 96) // 16 more than known
	set := func(at int, b []byte) {
		start, end := section(b)
		le.PutUint64(info[at:], start)
		le.PutUint64(info[at+8:], end)
	}
	set(32, rawFrame(f.chunks))
	set(48, rawFrame([]byte(f.named)))
	set(16, f.objectRefs)
	set(0, f.streamRefs)
	le.PutUint64(info[64:], f.contentType)
	le.PutUint64(info[72:], f.size)
	start, end := section(info)
	if f.oldHeader {
		le.PutUint64(file, start)
		le.PutUint64(file[8:], end)
		copy(file[18:], "SplitStream")
		copy(file[29:], []byte{f.version, f.alg, f.log})
	} else {
		copy(file, "SplitStream")
		file[11], file[14], file[15] = f.version, f.alg, f.log
		le.PutUint64(file[16:], start)
		le.PutUint64(file[24:], end)
	}
	if f.mangle != nil {
		f.mangle(file, file[start:end])
	}
	return file
}

// fixedObjects is a store for readers: every object has the size of its first byte.
type fixedObjects struct{ dir string }

func (f fixedObjects) objectSize(d fsverity.Digest) (int64, error) {
	return int64(d.AppendTo(nil)[0]), nil
}

func (f fixedObjects) OpenObject(d fsverity.Digest) (*os.File, error) {
	size, _ := f.objectSize(d)
	name := filepath.Join(f.dir, d.String())
	if err := os.WriteFile(name, bytes.Repeat([]byte{'o'}, int(size)), 0o600); err != nil {
		return nil, err
	}
	return os.Open(name)
}

func chunks(list ...any) []byte {
	var b []byte
	for _, c := range list {
		switch c := c.(type) {
		case string:
			b = binary.LittleEndian.AppendUint64(b, uint64(-int64(len(c))))
			b = append(b, c...)
		case int:
			b = binary.LittleEndian.AppendUint64(b, uint64(c))
		}
	}
	return b
}

func digestOfSize(size byte) []byte {
	b := bytes.Repeat([]byte{0xaa}, 32)
	b[0] = size
	return b
}

func goodForeign() foreign {
	return foreign{
		alg: 1, log: 12,
		streamRefs:  append(digestOfSize(9), digestOfSize(8)...),
		objectRefs:  append(digestOfSize(5), digestOfSize(0)...),
		named:       "1:second\x000:first:with colon\x00",
		chunks:      chunks("he", 0, "ad", "er", 1),
		contentType: LayerStream,
		size:        11,
	}
}

func TestForeignStream(t *testing.T) {
	for _, old := range []bool{false, true} {
		f := goodForeign()
		f.oldHeader = old
		data := f.bytes()
		r, err := newStreamReader(bytes.NewReader(data), int64(len(data)), fixedObjects{t.TempDir()}, fsverity.SHA256)
		if err != nil {
			t.Fatalf("old header %v: %v", old, err)
		}
		defer r.Close()
		var ids []fsverity.Digest
		for d, err := range r.ObjectRefs() {
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, d)
		}
		if len(ids) != 2 || !bytes.Equal(ids[0].Bytes(), digestOfSize(5)) || !bytes.Equal(ids[1].Bytes(), digestOfSize(0)) {
			t.Errorf("object refs %v", ids)
		}
		if n := r.NamedRefs(); len(n) != 2 || !bytes.Equal(n["second"].Bytes(), digestOfSize(8)) || !bytes.Equal(n["first:with colon"].Bytes(), digestOfSize(9)) {
			t.Errorf("named refs %v", n)
		}
		if r.ContentType() != LayerStream {
			t.Errorf("content type %x", r.ContentType())
		}
		got, err := io.ReadAll(r)
		if err != nil || string(got) != "heoooooader" {
			t.Errorf("got %q, %v", got, err)
		}
	}
}

func TestBadStreams(t *testing.T) {
	le := binary.LittleEndian
	bomb := func() []byte { // 8 GiB of chunks without bytes
		var b bytes.Buffer
		w, _ := zstd.NewWriter(&b)
		zero := make([]byte, 1<<20)
		for range 64 {
			w.Write(zero)
		}
		w.Close()
		return b.Bytes()
	}()
	for name, change := range map[string]func(f *foreign){
		"version":            func(f *foreign) { f.version = 1 },
		"algorithm":          func(f *foreign) { f.alg = 3 },
		"block size":         func(f *foreign) { f.log = 16 },
		"magic":              func(f *foreign) { f.mangle = func(file, _ []byte) { file[0] = 'X' } },
		"info beyond end":    func(f *foreign) { f.mangle = func(file, _ []byte) { le.PutUint64(file[24:], 1<<40) } },
		"info backwards":     func(f *foreign) { f.mangle = func(file, _ []byte) { le.PutUint64(file[16:], 1<<40) } },
		"info short":         func(f *foreign) { f.mangle = func(file, _ []byte) { le.PutUint64(file[24:], le.Uint64(file[16:])+79) } },
		"refs uneven":        func(f *foreign) { f.objectRefs = f.objectRefs[:33] },
		"refs beyond end":    func(f *foreign) { f.mangle = func(_, info []byte) { le.PutUint64(info[24:], math.MaxUint64) } },
		"stream backwards":   func(f *foreign) { f.mangle = func(_, info []byte) { le.PutUint64(info[32:], math.MaxInt64) } },
		"stream not zstd":    func(f *foreign) { f.mangle = func(file, _ []byte) { file[32] = 0 } },
		"names not zstd":     func(f *foreign) { f.mangle = func(file, info []byte) { file[le.Uint64(info[48:])] = 0 } },
		"name without end":   func(f *foreign) { f.named = "0:x" },
		"name without index": func(f *foreign) { f.named = "x\x00" },
		"name, odd index":    func(f *foreign) { f.named = "-1:x\x00" },
		"name, big index":    func(f *foreign) { f.named = "2:x\x00" },
		"object index":       func(f *foreign) { f.chunks = chunks("heoooooader"[:6], 2) },
		"chunk cut":          func(f *foreign) { f.chunks = append(chunks("heoooooader"), 1, 2, 3) },
		"inline cut":         func(f *foreign) { f.chunks = chunks("he", 0, "ader")[:28] },
		"inline too long":    func(f *foreign) { f.chunks = chunks("he", 0, "ader!") },
		"inline too short":   func(f *foreign) { f.chunks = chunks("he", 0, "ade") },
		"inline immense":     func(f *foreign) { f.chunks = le.AppendUint64(nil, 1<<63) },
		"object too long":    func(f *foreign) { f.chunks = chunks("heooooo", 0) },
		"empty objects": func(f *foreign) {
			f.objectRefs = digestOfSize(0)
			f.mangle = nil
			f.chunks = nil
			for range maxEmpty + 1 {
				f.chunks = append(f.chunks, 0, 0, 0, 0, 0, 0, 0, 0)
			}
		},
	} {
		f := goodForeign()
		change(&f)
		data := f.bytes()
		if err := readAllOf(data, t.TempDir()); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: got %v, want ErrCorrupt", name, err)
		}
	}
	// The raw frames of foreign are too small for a bomb: put one in by hand.
	f := goodForeign()
	f.objectRefs = digestOfSize(0)
	f.mangle = func(file, info []byte) {}
	data := f.bytes()
	at := uint64(len(data))
	data = append(data, bomb...)
	info := data[le.Uint64(data[16:]):]
	le.PutUint64(info[32:], at)
	le.PutUint64(info[40:], uint64(len(data)))
	if err := readAllOf(data, t.TempDir()); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "empty objects") {
		t.Errorf("bomb: got %v, want ErrCorrupt for its empty objects", err)
	}
	if err := readAllOf(goodForeign().bytes()[:31], t.TempDir()); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a file of 31 bytes: got %v, want ErrCorrupt", err)
	}
	g := goodForeign()
	g.alg = 2
	if err := readAllOf(g.bytes(), t.TempDir()); !errors.Is(err, ErrAlgorithm) {
		t.Errorf("a stream of sha512: got %v, want ErrAlgorithm", err)
	}
}

func readAllOf(data []byte, dir string) error {
	r, err := newStreamReader(bytes.NewReader(data), int64(len(data)), fixedObjects{dir}, fsverity.SHA256)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(io.Discard, struct{ io.Reader }{r})
	return err
}

// FuzzStream reads anything as a stream. What is read without an error has the size
// that the stream says, whichever way it is read.
func FuzzStream(f *testing.F) {
	good := goodForeign()
	f.Add(good.bytes())
	good.oldHeader = true
	f.Add(good.bytes())
	good.alg = 2
	good.streamRefs, good.objectRefs, good.named, good.chunks, good.size = nil, nil, "", nil, 0
	f.Add(good.bytes())
	s, err := Init(filepath.Join(f.TempDir(), "store"), Options{})
	if err != nil {
		f.Fatal(err)
	}
	txn := begin(f, s)
	w := txn.NewStream(LayerStream)
	if err := errors.Join(w.Inline(bytes.Repeat([]byte("inline"), 1000)), w.Object(put(f, txn, []byte("object")), 6)); err != nil {
		f.Fatal(err)
	}
	w.NamedRef("name", put(f, txn, []byte("other")))
	d, err := w.Close("x")
	if err != nil {
		f.Fatal(err)
	}
	commit(f, txn)
	data, err := os.ReadFile(s.path(objectsDir, d.Path()))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	dir := f.TempDir()

	f.Fuzz(func(t *testing.T, data []byte) {
		for _, alg := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
			open := func() *StreamReader {
				r, err := newStreamReader(bytes.NewReader(data), int64(len(data)), fixedObjects{dir}, alg)
				if err != nil {
					return nil
				}
				return r
			}
			r := open()
			if r == nil {
				continue
			}
			var total int64
			var err error
			for err == nil {
				var inline []byte
				var size int64
				inline, _, size, err = r.Next()
				if len(inline) > maxInline {
					t.Fatalf("an inline piece of %d bytes", len(inline))
				}
				total += int64(len(inline)) + size
			}
			for _, err := range r.ObjectRefs() {
				if err != nil {
					t.Fatal(err)
				}
			}
			if err == io.EOF && total != r.Size() {
				t.Fatalf("got %d bytes, the stream says %d", total, r.Size())
			}
			r.Close()
			if err != io.EOF || total > 1<<16 {
				continue
			}
			r = open()
			n, err := r.WriteTo(io.Discard)
			if err != nil || n != total {
				t.Fatalf("WriteTo gave %d bytes, %v; Next %d", n, err, total)
			}
			r.Close()
		}
	})
}

func BenchmarkStreamWrite(b *testing.B) {
	s := newStore(b, 0)
	txn := begin(b, s)
	d := put(b, txn, []byte("object"))
	header := make([]byte, 512)
	copy(header, "usr/share/doc/package/copyright")
	b.SetBytes(1000 * 1024)
	for b.Loop() {
		w := txn.NewStream(LayerStream)
		for range 1000 {
			w.Inline(header)
			w.Object(d, 6)
			w.Inline(header)
		}
		if _, err := w.Close(""); err != nil {
			b.Fatal(err)
		}
	}
}
