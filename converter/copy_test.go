package converter

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/store"
)

// TestCopy: what a copy has is the whole image, and nothing of the others.
func TestCopy(t *testing.T) {
	from, to := newStore(t), newStore(t)
	convert(t, from, imageOf(gz, twoLayers()...), Options{Name: "a", Bootable: true, KeepBlobs: true})
	convert(t, from, imageOf(nil, tarOf(f("other", "not wanted"))), Options{Name: "b"})
	s, err := Find(from, "a")
	if err != nil {
		t.Fatal(err)
	}
	res, err := Copy(ctx, from, s, to, Options{Name: "copied"})
	if err != nil {
		t.Fatal(err)
	}
	if res.NewObjects == 0 {
		t.Error("nothing was copied")
	}
	wantClean(t, to)
	got, err := Find(to, "copied")
	if err != nil {
		t.Fatal(err)
	}
	if got.Manifest != s.Manifest || len(got.Images) != 3 || got.Images["bootable"] != s.Images["bootable"] || !slices.Equal(got.streams, s.streams) || len(got.blobs) != len(s.blobs) {
		t.Errorf("got %+v, want %+v", got, s)
	}
	// The same manifest comes out: the kept blobs are there, too.
	if e, err := Export(ctx, to, got, &memTarget{}, ExportOptions{TempDir: t.TempDir()}); err != nil || !e.Same {
		t.Errorf("exporting the copy: %+v, %v", e, err)
	}
	if _, err := GC(ctx, to, store.GCOptions{}); err != nil {
		t.Fatal(err)
	}
	wantClean(t, to)
	if all, err := List(to); err != nil || len(all) != 1 {
		t.Errorf("the copy's store has %d images (%v), want 1", len(all), err)
	}
	again, err := Copy(ctx, from, s, to, Options{Name: "again"})
	if err != nil || again.NewObjects != 0 {
		t.Errorf("copying again: %+v, %v; want nothing new", again, err)
	}
}

// TestCopyDamaged: an object that is not what it should be is not passed on.
func TestCopyDamaged(t *testing.T) {
	from, to := newStore(t), newStore(t)
	convert(t, from, imageOf(nil, tarOf(f("a", string(make([]byte, 300))+"x"))), Options{Name: "a"})
	s, err := Find(from, "a")
	if err != nil {
		t.Fatal(err)
	}
	d := fsverity.Sum(fsverity.SHA256, append(make([]byte, 300), 'x'))
	name := filepath.Join(from.ObjectsDir(), d.Path())
	if err := os.Chmod(name, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, append(make([]byte, 300), 'y'), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Copy(ctx, from, s, to, Options{Name: "a"}); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("got %v, want ErrCorrupt", err)
	}
	if all, err := List(to); err != nil || len(all) != 0 {
		t.Errorf("a failed copy left %d images (%v)", len(all), err)
	}
	other, err := store.Init(t.TempDir(), store.Options{Algorithm: fsverity.SHA512})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Copy(ctx, from, s, other, Options{}); !errors.Is(err, store.ErrAlgorithm) {
		t.Errorf("got %v, want ErrAlgorithm", err)
	}
}

// TestMakeBootable: adding the image later gives what converting with it gives.
func TestMakeBootable(t *testing.T) {
	layers := [][]byte{tarOf(d("usr"), d("boot"), f("boot/vmlinuz-1", "kernel"), f("usr/x", "1"))}
	a, b := newStore(t), newStore(t)
	convert(t, a, imageOf(nil, layers...), Options{Name: "a"})
	want := convert(t, b, imageOf(nil, layers...), Options{Name: "a", Bootable: true})
	s, err := Find(a, "a")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time there is nothing to do
		if s, err = MakeBootable(ctx, a, s); err != nil {
			t.Fatal(err)
		}
		if got := s.Images["bootable"]; got != want.Images["bootable"] {
			t.Errorf("got %s, want %s", got, want.Images["bootable"])
		}
	}
	if _, err := GC(ctx, a, store.GCOptions{}); err != nil {
		t.Fatal(err)
	}
	wantClean(t, a)
	if s, err = Find(a, "a"); err != nil || len(s.Images) != 3 {
		t.Errorf("found %+v, %v", s, err)
	}
}
