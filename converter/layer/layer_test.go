package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// memory is Objects in memory.
type memory struct {
	mu      sync.Mutex
	objects map[fsverity.Digest][]byte
	opened  int
}

func newMemory() *memory { return &memory{objects: map[fsverity.Digest][]byte{}} }

func (m *memory) Algorithm() fsverity.Algorithm { return fsverity.SHA256 }

func (m *memory) Put(ctx context.Context, r io.Reader, size int64) (fsverity.Digest, error) {
	var buf bytes.Buffer
	if _, err := io.CopyN(&buf, r, size); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return fsverity.Digest{}, fmt.Errorf("putting: %w", err)
	}
	return m.PutBytes(ctx, buf.Bytes())
}

func (m *memory) PutBytes(ctx context.Context, data []byte) (fsverity.Digest, error) {
	if err := ctx.Err(); err != nil {
		return fsverity.Digest{}, err
	}
	d := fsverity.Sum(m.Algorithm(), data)
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.objects[d]; !ok {
		m.objects[d] = bytes.Clone(data)
	}
	return d, nil
}

func (m *memory) open(d fsverity.Digest) (io.ReadSeekCloser, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.opened++
	data, ok := m.objects[d]
	if !ok {
		return nil, fmt.Errorf("no object %s", d)
	}
	return nopSeekCloser{bytes.NewReader(data)}, nil
}

type nopSeekCloser struct{ *bytes.Reader }

func (nopSeekCloser) Close() error { return nil }

// recorded is a Recorder and the stream that it recorded.
type recorded struct{ parts []part }

type part struct {
	inline []byte
	object fsverity.Digest
	size   int64
}

func (r *recorded) Inline(p []byte) error {
	if len(p) == 0 {
		return errors.New("empty inline part")
	}
	r.parts = append(r.parts, part{inline: bytes.Clone(p)})
	return nil
}

func (r *recorded) Object(d fsverity.Digest, size int64) error {
	r.parts = append(r.parts, part{object: d, size: size})
	return nil
}

func (r *recorded) chunks() Chunks { return &chunkList{r.parts} }

type chunkList struct{ parts []part }

func (c *chunkList) Next() ([]byte, fsverity.Digest, int64, error) {
	if len(c.parts) == 0 {
		return nil, fsverity.Digest{}, 0, io.EOF
	}
	p := c.parts[0]
	c.parts = c.parts[1:]
	return p.inline, p.object, p.size, nil
}

// The combinators below make tars: tarOf(dir("a/"), file("a/b", "content")).
type entry func(*tar.Header) (body string)

func tarOf(entries ...entry) []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		hdr := &tar.Header{Mode: 0o644, ModTime: time.Unix(1700000000, 0)}
		body := e(hdr)
		if hdr.Typeflag == tar.TypeReg || hdr.Typeflag == tar.TypeCont {
			hdr.Size = int64(len(body))
		}
		if err := w.WriteHeader(hdr); err != nil {
			panic(fmt.Sprintf("%q: %v", hdr.Name, err))
		}
		if _, err := io.WriteString(w, body); err != nil {
			panic(fmt.Sprintf("%q: %v", hdr.Name, err))
		}
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return buf.Bytes()
}

func file(name, content string) entry {
	return func(h *tar.Header) string {
		h.Name, h.Typeflag = name, tar.TypeReg
		return content
	}
}

func dir(name string) entry { return typed(tar.TypeDir, name, "") }

func symlink(name, target string) entry { return typed(tar.TypeSymlink, name, target) }

func link(name, target string) entry { return typed(tar.TypeLink, name, target) }

func char(name string, major, minor int64) entry {
	return func(h *tar.Header) string {
		h.Name, h.Typeflag, h.Devmajor, h.Devminor = name, tar.TypeChar, major, minor
		return ""
	}
}

func typed(typ byte, name, target string) entry {
	return func(h *tar.Header) string {
		h.Name, h.Typeflag, h.Linkname = name, typ, target
		if typ == tar.TypeDir {
			h.Mode = 0o755
		}
		return ""
	}
}

// with changes the header that e makes.
func with(e entry, change func(*tar.Header)) entry {
	return func(h *tar.Header) string {
		body := e(h)
		change(h)
		return body
	}
}

func xattr(e entry, key, value string) entry {
	return with(e, func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+key] = value
	})
}

func mode(e entry, m int64) entry { return with(e, func(h *tar.Header) { h.Mode = m }) }

// readAll reads a blob and checks what holds for all: the recorded stream and the
// objects give the uncompressed bytes again, Result describes those, and the
// recorded stream gives the same tree without a look at the objects.
func readAll(t testing.TB, blob, plain []byte) (Result, *memory) {
	t.Helper()
	m, rec := newMemory(), &recorded{}
	res, err := Read(context.Background(), bytes.NewReader(blob), m, rec, Options{})
	if err != nil {
		t.Fatal(err)
	}
	checkRead(t, res, m, rec, plain)
	return res, m
}

func checkRead(t testing.TB, res Result, m *memory, rec *recorded, plain []byte) {
	t.Helper()
	if want := fmt.Sprintf("sha256:%x", sha256.Sum256(plain)); res.DiffID != want {
		t.Errorf("diffID: got %s, want %s", res.DiffID, want)
	}
	if res.Size != int64(len(plain)) {
		t.Errorf("size: got %d, want %d", res.Size, len(plain))
	}
	var again bytes.Buffer
	if err := Assemble(context.Background(), &again, rec.chunks(), m.open); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(again.Bytes(), plain) {
		t.Errorf("assembled layer differs: %d bytes, want %d", again.Len(), len(plain))
	}
	m.opened = 0
	tr, err := FromChunks(context.Background(), rec.chunks(), m.open, m, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if d := tree.Diff(res.Tree, tr); len(d) > 0 {
		t.Errorf("tree of the recorded stream differs: %v", d)
	}
}

func TestRead(t *testing.T) {
	big := string(bytes.Repeat([]byte("0123456789abcdef"), 200_000))
	plain := tarOf(dir("./"), dir("a/"), file("a/small", "x"), file("a/medium", big[:1000]), file("a/large", big), symlink("l", "a"), link("h", "a/large"))
	res, m := readAll(t, plain, plain)
	if res.Entries != 7 || len(m.objects) != 2 || m.opened != 0 {
		t.Errorf("got %d entries, %d objects, %d opened", res.Entries, len(m.objects), m.opened)
	}
	if n := res.Tree.Lookup("a/large"); n != res.Tree.Lookup("h") || n.File.Object != fsverity.Sum(fsverity.SHA256, []byte(big)) {
		t.Errorf("large: %+v", n)
	}
}
