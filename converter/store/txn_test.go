package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
	"golang.org/x/sys/unix"
)

// TestPutSizes stores objects around every limit in both ways and reads them back.
func TestPutSizes(t *testing.T) {
	ctx := context.Background()
	s := newStore(t, 0)
	sizes := []int{0, 1, 4095, 4096, 4097, 8192, wholeMax - 1, wholeMax, wholeMax + 1, 2*wholeMax + 4096, overlapMin, overlapMin + wholeMax + 7, writebackStep*2 + 1}
	fills := map[string]func(n int) []byte{
		"random": func(n int) []byte { return randomBytes(int64(n), n) },
		"zeros":  func(n int) []byte { return make([]byte, n) },
		"holes": func(n int) []byte {
			b := make([]byte, n)
			for i := 10000; i < n; i += 50000 {
				b[i] = 1
			}
			return b
		},
		"hole at the end": func(n int) []byte {
			b := make([]byte, n)
			copy(b, "x")
			return b
		},
		"data at the end": func(n int) []byte {
			b := make([]byte, n)
			if n > 0 {
				b[n-1] = 'x'
			}
			return b
		},
	}
	txn := begin(t, s)
	want := map[fsverity.Digest][]byte{}
	file := filepath.Join(t.TempDir(), "file")
	for _, size := range sizes {
		for name, fill := range fills {
			data := fill(size)
			d := fsverity.Sum(fsverity.SHA256, data)
			want[d] = data
			more := io.MultiReader(bytes.NewReader(data), strings.NewReader("more"))
			got, err := txn.Put(ctx, more, int64(size))
			if err != nil || got != d {
				t.Errorf("Put %d %s: %v, %v; want %v", size, name, got, err, d)
			}
			if rest, _ := io.ReadAll(more); string(rest) != "more" {
				t.Errorf("Put %d %s reads beyond the size: %q is left", size, name, rest)
			}
			if got, err := txn.PutBytes(ctx, data); err != nil || got != d {
				t.Errorf("PutBytes %d %s: %v, %v", size, name, got, err)
			}
			sub := begin(t, s) // so that it is written once more
			if err := os.WriteFile(file, data, 0o600); err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, link := range []bool{false, true} {
				sub.SetImmutableSources(link)
				if got, err := sub.PutFile(ctx, f, int64(size)); err != nil || got != d {
					t.Errorf("PutFile %d %s: %v, %v", size, name, got, err)
				}
			}
			if _, err := sub.PutFile(ctx, f, int64(size)+1); !errors.Is(err, ErrSize) {
				t.Errorf("PutFile with a wrong size: got %v, want ErrSize", err)
			}
			of, err := sub.OpenObject(d)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(of); err != nil || !bytes.Equal(got, data) {
				t.Errorf("staged object of %d %s: other content (%v)", size, name, err)
			}
			of.Close()
			f.Close()
			sub.Rollback()
		}
	}
	if n, _ := txn.Added(); n != len(want) {
		t.Errorf("the transaction has %d objects, want %d", n, len(want))
	}
	commit(t, txn)
	for d, data := range want {
		if !bytes.Equal(readObject(t, s, d), data) {
			t.Errorf("object of %d bytes has other content", len(data))
		}
	}
}

func blocks(t *testing.T, name string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestHoles(t *testing.T) {
	s := newStore(t, 0)
	txn := begin(t, s)
	const size = 64 << 20
	d, err := txn.Put(context.Background(), io.LimitReader(zeros{}, size), size)
	if err != nil {
		t.Fatal(err)
	}
	commit(t, txn)
	if got := blocks(t, s.path(objectsDir, d.Path())); got > 64<<10 {
		t.Errorf("an object of zeros takes %d bytes", got)
	}
	if got, _, err := fsverity.Read(fsverity.SHA256, io.LimitReader(zeros{}, size)); err != nil || got != d {
		t.Errorf("digest %s, want %s", d, got)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestPutFileLinks(t *testing.T) {
	ctx := context.Background()
	s := newStore(t, 0)
	name := filepath.Join(filepath.Dir(s.Dir()), "source")
	if err := os.WriteFile(name, randomBytes(1, 100000), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	txn := begin(t, s)
	txn.SetImmutableSources(true)
	d, err := txn.PutFile(ctx, f, 100000)
	if err != nil {
		t.Fatal(err)
	}
	commit(t, txn)
	a, _ := os.Stat(name)
	b, err := os.Stat(s.path(objectsDir, d.Path()))
	if err != nil || !os.SameFile(a, b) {
		t.Errorf("the object is not the source itself (%v)", err)
	}
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	txn = begin(t, s)
	if _, err := txn.PutFile(ctx, dir, 4096); err == nil {
		t.Error("a directory was stored")
	}
}

// TestWriters has eight writers of overlapping objects, each with several
// goroutines, while the garbage is collected.
func TestWriters(t *testing.T) {
	s := newStore(t, 0)
	const writers, common, own = 8, 60, 10
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var gc, wg sync.WaitGroup
	gc.Go(func() {
		for ctx.Err() == nil {
			if _, err := s.GC(ctx, GCOptions{}); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
	body := func(seed int) []byte { return randomBytes(int64(seed), 100+seed*1000) }
	for w := range writers {
		wg.Go(func() {
			for round := range 3 {
				txn, err := s.Begin(context.Background())
				if err != nil {
					t.Error(err)
					return
				}
				var inner sync.WaitGroup
				digests := make([]fsverity.Digest, common+own)
				for part := range 3 {
					inner.Go(func() {
						for i := part; i < len(digests); i += 2 { // some twice
							seed := i
							if i >= common {
								seed += 1000 + w*own
							}
							seed %= 1200
							d, err := txn.Put(context.Background(), bytes.NewReader(body(seed)), int64(len(body(seed))))
							if err != nil {
								t.Error(err)
							}
							if part < 2 {
								digests[i] = d
							}
						}
					})
				}
				inner.Wait()
				stream := txn.NewStream(LayerStream)
				for i, d := range digests {
					seed := i
					if i >= common {
						seed += 1000 + w*own
					}
					if err := stream.Object(d, int64(len(body(seed%1200)))); err != nil {
						t.Error(err)
					}
				}
				id := fmt.Sprintf("w%d", w)
				if _, err := stream.Close(id); err != nil {
					t.Error(err)
				}
				if err := txn.SetRef(Streams, fmt.Sprintf("dir/%d/%d", w%2, w), id); err != nil {
					t.Error(err)
				}
				if err := txn.Commit(); err != nil {
					t.Error(err)
				}
				if round == 1 && w%2 == 1 { // names and their directories come and go
					if err := s.RemoveRef(Streams, fmt.Sprintf("dir/%d/%d", w%2, w)); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	stop()
	gc.Wait()

	wantClean(t, s, nil)
	st, err := s.GC(context.Background(), GCOptions{})
	if err != nil {
		t.Fatal(err)
	}
	u, err := s.DF(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	// Each object once, and a stream a writer.
	if want := common + writers*own + writers; st.ObjectsKept != want || u.Total.Objects != want || u.Unreferenced.Objects != 0 {
		t.Errorf("%d objects, of them unreferenced %d; want %d and 0", u.Total.Objects, u.Unreferenced.Objects, want)
	}
}

func wantClean(t *testing.T, s *Store, list ImageObjects) {
	t.Helper()
	r, err := s.Fsck(context.Background(), FsckOptions{Scrub: true, ImageObjects: list})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.Problems {
		t.Errorf("fsck: %v", p)
	}
}

func TestRefConflict(t *testing.T) {
	s := memStore(t, 0)
	set := func(names ...string) error {
		txn := begin(t, s)
		w := txn.NewStream(BlobStream)
		if _, err := w.Close("x"); err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			if err := txn.SetRef(Streams, n, "x"); err != nil {
				txn.Rollback()
				return err
			}
		}
		return txn.Commit()
	}
	if err := set("a", "b/c"); err != nil {
		t.Fatal(err)
	}
	before := listing(t, s)
	for _, names := range [][]string{{"a/b"}, {"a/b/c"}, {"b"}, {"new", "new/x"}, {""}, {"."}, {"x/.."}, {"/x"}, {"x/"}, {"x//y"}, {"x\x00"}, {strings.Repeat("x", 256)}} {
		if err := set(names...); !errors.Is(err, ErrBadName) {
			t.Errorf("%q: got %v, want ErrBadName", names, err)
		}
		wantListing(t, s, before)
	}
	txn := begin(t, s)
	if err := txn.SetRef(Streams, "y", "missing"); !errors.Is(err, ErrNotFound) {
		t.Errorf("naming nothing: got %v, want ErrNotFound", err)
	}
	if err := txn.SetRef("other", "y", "x"); !errors.Is(err, ErrBadName) {
		t.Errorf("another kind: got %v, want ErrBadName", err)
	}
	if err := txn.SetRef(Images, "y", "x"); !errors.Is(err, ErrBadName) {
		t.Errorf("an image that is no digest: got %v, want ErrBadName", err)
	}
}

// TestHeal puts an object that the store has with another size.
func TestHeal(t *testing.T) {
	s := memStore(t, 0)
	txn := begin(t, s)
	d := put(t, txn, []byte("whole"))
	commit(t, txn)
	name := s.path(objectsDir, d.Path())
	os.Remove(name)
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	txn = begin(t, s)
	put(t, txn, []byte("whole"))
	commit(t, txn)
	if got := readObject(t, s, d); string(got) != "whole" {
		t.Errorf("got %q", got)
	}
}

func TestCancel(t *testing.T) {
	s := memStore(t, 0)
	ctx, cancel := context.WithCancel(context.Background())
	txn := begin(t, s)
	cancel()
	if _, err := txn.PutBytes(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("PutBytes: got %v", err)
	}
	if _, err := txn.Put(ctx, zeros{}, 1<<30); !errors.Is(err, context.Canceled) {
		t.Errorf("Put: got %v", err)
	}
	if _, err := txn.PutImage(ctx, func(w io.Writer) error { _, err := io.CopyN(w, zeros{}, 1<<20); return err }); !errors.Is(err, context.Canceled) {
		t.Errorf("PutImage: got %v", err)
	}
	put(t, txn, []byte("goes on"))
	commit(t, txn)
}

func TestReaderErrors(t *testing.T) {
	s := memStore(t, 0)
	txn := begin(t, s)
	bad := errors.New("bad digest")
	for _, size := range []int64{100, 1 << 20, 5 << 20} {
		r := io.MultiReader(io.LimitReader(zeros{}, size/2), iotestErr{bad})
		if _, err := txn.Put(context.Background(), r, size); !errors.Is(err, bad) {
			t.Errorf("got %v, want the reader's error", err)
		}
	}
	if _, err := txn.PutImage(context.Background(), func(io.Writer) error { return bad }); err != bad {
		t.Errorf("PutImage: got %v, want the very error", err)
	}
	if _, err := txn.Put(context.Background(), zeros{}, -1); !errors.Is(err, ErrSize) {
		t.Errorf("size -1: got %v, want ErrSize", err)
	}
	if left, _ := os.ReadDir(txn.stage.path); len(left) != 0 {
		t.Errorf("files are left: %v", left)
	}
}

type iotestErr struct{ err error }

func (e iotestErr) Read([]byte) (int, error) { return 0, e.err }
