package store

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/fsverity"
)

// TestVerity runs where the temporary directory's filesystem has fs-verity (as ext4
// made with mkfs.ext4 -O verity has; TMPDIR chooses it).
func TestVerity(t *testing.T) {
	for _, alg := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
		s := newStore(t, alg)
		if !s.Verity() {
			t.Skip("the filesystem of the temporary directory has no fs-verity; set TMPDIR to one that has")
		}
		txn := begin(t, s)
		var all []fsverity.Digest
		for _, size := range []int{0, 1, 4096, 100000, 5 << 20} {
			d, err := txn.Put(context.Background(), io.LimitReader(zeros{}, int64(size)), int64(size))
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, d, put(t, txn, randomBytes(1, size)))
		}
		stream := txn.NewStream(LayerStream)
		if err := stream.Object(all[0], 0); err != nil {
			t.Fatal(err)
		}
		if d, err := stream.Close("s"); err != nil {
			t.Fatal(err)
		} else {
			all = append(all, d)
		}
		commit(t, txn)
		for _, d := range all {
			name := s.path(objectsDir, d.Path())
			f, err := os.Open(name)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := fsverity.Measure(f); err != nil || got != d {
				t.Errorf("the kernel measures %v, %v; want %v", got, err, d)
			}
			f.Close()
			if f, err := os.OpenFile(name, os.O_WRONLY, 0); err == nil {
				t.Error("an object can be written")
				f.Close()
			}
		}
		wantClean(t, s, nil)

		// The same content without fs-verity, and other content with it.
		plain, other := all[3], all[5]
		content := readObject(t, s, plain)
		for d, data := range map[fsverity.Digest][]byte{plain: content, other: []byte("other")} {
			name := s.path(objectsDir, d.Path())
			os.Remove(name)
			if err := os.WriteFile(name, data, 0o444); err != nil {
				t.Fatal(err)
			}
			if d == other {
				f, err := os.Open(name)
				if err != nil {
					t.Fatal(err)
				}
				if err := enableVerity(f, alg); err != nil {
					t.Fatal(err)
				}
				f.Close()
			}
			if _, err := s.OpenObject(d); !errors.Is(err, ErrVerity) {
				t.Errorf("opening it: got %v, want ErrVerity", err)
			}
		}
		r, err := s.Fsck(context.Background(), FsckOptions{})
		if err != nil || len(r.Problems) != 2 || !strings.Contains(r.Problems[0].Problem, ErrVerity.Error()) {
			t.Errorf("fsck: %v, %v; want two problems with fs-verity", r, err)
		}
	}
}

// TestVerityPromised has a store that promises fs-verity where there is none.
func TestVerityPromised(t *testing.T) {
	s := memStore(t, 0)
	if s.Verity() {
		t.Skip("this filesystem has fs-verity")
	}
	before := listing(t, s)
	s.verity = true
	txn := begin(t, s)
	put(t, txn, []byte("x"))
	if err := txn.Commit(); !errors.Is(err, ErrVerity) || !errors.Is(err, fsverity.ErrUnsupported) {
		t.Errorf("got %v, want ErrVerity", err)
	}
	wantListing(t, s, before)
}
