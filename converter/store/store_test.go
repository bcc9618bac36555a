package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/fsverity"
)

func newStore(t testing.TB, alg fsverity.Algorithm) *Store {
	t.Helper()
	s, err := Init(filepath.Join(t.TempDir(), "store"), Options{Algorithm: alg})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// memStore makes a store in memory where that can be, for tests to which the disk
// makes no difference but in speed.
func memStore(t testing.TB, alg fsverity.Algorithm) *Store {
	t.Helper()
	s, err := Init(filepath.Join(memDir(t), "store"), Options{Algorithm: alg})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func memDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "particle-store")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func begin(t testing.TB, s *Store) *Txn {
	t.Helper()
	txn, err := s.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { txn.Rollback() })
	return txn
}

func commit(t testing.TB, txn *Txn) {
	t.Helper()
	if err := txn.Commit(); err != nil {
		t.Fatal(err)
	}
}

func put(t testing.TB, txn *Txn, data []byte) fsverity.Digest {
	t.Helper()
	d, err := txn.PutBytes(context.Background(), data)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func randomBytes(seed int64, n int) []byte {
	b := make([]byte, n)
	rand.New(rand.NewSource(seed)).Read(b)
	return b
}

// listing maps each path of the store to its link target, or to its size.
func listing(t testing.TB, s *Store) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(s.Dir(), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name, _ := filepath.Rel(s.Dir(), path)
		if e.Type()&fs.ModeSymlink != 0 {
			all[name], err = os.Readlink(path)
			return err
		}
		st, err := e.Info()
		if err != nil {
			return err
		}
		all[name] = fmt.Sprint(st.Size())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func wantListing(t *testing.T, s *Store, want map[string]string) {
	t.Helper()
	got := listing(t, s)
	for name := range maps.Keys(want) {
		if got[name] != want[name] {
			t.Errorf("%s: got %q, want %q", name, got[name], want[name])
		}
	}
	for name := range maps.Keys(got) {
		if _, ok := want[name]; !ok {
			t.Errorf("unexpected %s: %q", name, got[name])
		}
	}
}

func readObject(t testing.TB, s *Store, d fsverity.Digest) []byte {
	t.Helper()
	f, err := s.OpenObject(d)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestLayout(t *testing.T) {
	for _, alg := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
		t.Run(alg.String(), func(t *testing.T) {
			ctx := context.Background()
			s := newStore(t, alg)
			txn := begin(t, s)
			body := randomBytes(1, 100)
			d := put(t, txn, body)
			w := txn.NewStream(LayerStream)
			if err := errors.Join(w.Inline([]byte("head")), w.Object(d, 100), w.Inline([]byte("tail"))); err != nil {
				t.Fatal(err)
			}
			layer, err := w.Close("oci-layer-sha256:aa")
			if err != nil {
				t.Fatal(err)
			}
			image, err := txn.PutImage(ctx, func(w io.Writer) error {
				_, err := w.Write(randomBytes(2, 5000))
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(
				txn.SetRef(Streams, "oci/"+EncodeTag("library/debian:13"), "oci-layer-sha256:aa"),
				txn.SetRef(Images, "a/b/c", image.String()),
				txn.SetRef(Images, "top", image.String()),
			); err != nil {
				t.Fatal(err)
			}
			if names := listing(t, s); len(names) != 1+len(txn.known) {
				t.Errorf("before Commit the store has %v, want meta.json and %d staged files", names, len(txn.known))
			}
			commit(t, txn)

			st, err := os.Stat(s.path(objectsDir, layer.Path()))
			if err != nil {
				t.Fatal(err)
			}
			wantListing(t, s, map[string]string{
				"meta.json":                            listing(t, s)["meta.json"],
				"objects/" + d.Path():                  "100",
				"objects/" + layer.Path():              fmt.Sprint(st.Size()),
				"objects/" + image.Path():              "5000",
				"images/" + image.String():             "../objects/" + image.Path(),
				"images/refs/a/b/c":                    "../../../" + image.String(),
				"images/refs/top":                      "../" + image.String(),
				"streams/oci-layer-sha256:aa":          "../objects/" + layer.Path(),
				"streams/refs/oci/library%2Fdebian:13": "../../oci-layer-sha256:aa",
			})
			if st.Mode() != objectMode {
				t.Errorf("an object has mode %v, want %v", st.Mode(), fs.FileMode(objectMode))
			}
			for name, mode := range map[string]fs.FileMode{
				"": rootMode, "objects": dirMode, "images": dirMode, "images/refs": dirMode,
				"streams": dirMode, "streams/refs": dirMode, "objects/" + d.Path()[:2]: dirMode,
			} {
				if st, err := os.Stat(s.path(name)); err != nil || st.Mode().Perm() != mode {
					t.Errorf("%q has mode %v (%v), want %v", name, st.Mode().Perm(), err, mode)
				}
			}
			if got := readObject(t, s, d); !bytes.Equal(got, body) {
				t.Error("an object has other content than was put")
			}

			var cat bytes.Buffer
			for _, id := range []string{"oci-layer-sha256:aa", "refs/oci/library%2Fdebian:13", "oci/library%2Fdebian:13"} {
				cat.Reset()
				if n, err := s.Cat(id, LayerStream, &cat); err != nil || n != 108 || cat.String() != "head"+string(body)+"tail" {
					t.Errorf("Cat(%q) gave %d bytes, %v", id, n, err)
				}
			}
			refs, err := s.StreamRefs(TagPrefix)
			want := []Ref{{Name: "oci/library%2Fdebian:13", Target: "oci-layer-sha256:aa", Digest: layer}}
			if err != nil || !slices.Equal(refs, want) {
				t.Errorf("StreamRefs = %v, %v; want %v", refs, err, want)
			}
			for _, name := range []string{image.String(), "a/b/c", "refs/top", "top"} {
				f, got, err := s.OpenImage(name)
				if err != nil || got != image {
					t.Errorf("OpenImage(%q) = %v, %v", name, got, err)
					continue
				}
				f.Close()
			}
			if _, _, err := s.OpenImage(d.String()); !errors.Is(err, ErrNotFound) {
				t.Errorf("opening an object that is no image: got %v, want ErrNotFound", err)
			}
			if _, err := s.OpenStream("oci-layer-sha256:aa", ConfigStream); !errors.Is(err, ErrContentType) || !strings.Contains(err.Error(), `"ocilayer"`) {
				t.Errorf("opening a layer as config: got %v, want ErrContentType", err)
			}
			if err := errors.Join(s.RemoveRef(Images, "a/b/c"), s.RemoveRef(Images, "top")); err != nil {
				t.Error(err)
			}
			if left, _ := os.ReadDir(s.path("images/refs")); len(left) != 0 {
				t.Errorf("removing refs leaves %v", left)
			}
			if err := s.RemoveRef(Images, "top"); !errors.Is(err, ErrNotFound) {
				t.Errorf("removing a ref twice: got %v, want ErrNotFound", err)
			}
		})
	}
}

func TestRollbackLeavesNothing(t *testing.T) {
	s := newStore(t, 0)
	before := listing(t, s)
	txn := begin(t, s)
	ctx := context.Background()
	put(t, txn, []byte("x"))
	if _, err := txn.Put(ctx, bytes.NewReader(randomBytes(1, 3<<20)), 3<<20); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{11, wholeMax + 1, 5 << 20} {
		if _, err := txn.Put(ctx, strings.NewReader("0123456789"), size); !errors.Is(err, ErrSize) || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("a source of 10 bytes for %d: got %v, want ErrSize", size, err)
		}
	}
	w := txn.NewStream(LayerStream)
	w.Inline(randomBytes(2, 4<<20))
	if err := txn.Rollback(); err != nil {
		t.Fatal(err)
	}
	wantListing(t, s, before)
	if left, _ := os.ReadDir(s.path(stagingDir)); len(left) > 0 {
		t.Errorf("staging directories are left: %v", left)
	}
	if left, _ := os.ReadDir(s.path(objectsDir)); len(left) > 0 {
		t.Errorf("object directories are left: %v", left)
	}
	if _, err := txn.PutBytes(ctx, nil); !errors.Is(err, ErrDone) {
		t.Errorf("PutBytes afterwards: got %v, want ErrDone", err)
	}
	if err := w.Inline([]byte("x")); !errors.Is(err, ErrDone) {
		t.Errorf("Inline afterwards: got %v, want ErrDone", err)
	}
	if err := txn.Commit(); !errors.Is(err, ErrDone) {
		t.Errorf("Commit afterwards: got %v, want ErrDone", err)
	}
}
