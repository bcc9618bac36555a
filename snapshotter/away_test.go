package snapshotter_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	cmount "github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/snapshotter"
)

// TestUnmountAll takes mounts away: of a snapshotter that runs never, of one that has
// ended all, with the mount points.
func TestUnmountAll(t *testing.T) {
	requireMounts(t)
	dir := t.TempDir()
	if err := snapshotter.UnmountAll(filepath.Join(dir, "root")); err != nil {
		t.Errorf("where there is nothing: %v", err)
	}
	ctx := t.Context()
	e, err := open(ctx, dir, snapshotter.Options{Log: quiet(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.end(t) })
	top := stack(ctx, t, e, "image", base)
	mounts, err := e.View(ctx, "view", top)
	if err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{"unmounting": snapshotter.UnmountAll(e.root), "purging": snapshotter.Purge(e.root, e.store)} {
		if !errors.Is(err, snapshotter.ErrInUse) {
			t.Errorf("%s beside a snapshotter that runs: got %v, want ErrInUse", what, err)
		}
	}
	look(t, mounts)
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if err := snapshotter.UnmountAll(e.root); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(e.root, "mounts")); err != nil || len(left) > 0 {
		t.Errorf("mount points are left: %v, %v", left, err)
	}
	if e, err = open(ctx, dir, snapshotter.Options{Log: quiet(t)}); err != nil {
		t.Fatal(err)
	}
	look(t, mounts)
	e.removeAll(t)
}

// TestUnmounted unmounts beside a snapshotter, as an administrator may: nobody may be
// given the empty directory below.
func TestUnmounted(t *testing.T) {
	requireMounts(t)
	ctx := t.Context()
	e := mustOpen(t, t.TempDir(), snapshotter.Options{})
	top := stack(ctx, t, e, "image", base)
	view, err := e.View(ctx, "first", top)
	if err != nil {
		t.Fatal(err)
	}
	unmount := func() {
		t.Helper()
		if err := unix.Unmount(view[0].Source, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
	}
	for name, mounts := range map[string]func() ([]cmount.Mount, error){
		"Mounts":  func() ([]cmount.Mount, error) { return e.Mounts(ctx, "first") },
		"View":    func() ([]cmount.Mount, error) { return e.View(ctx, "second", top) },
		"Prepare": func() ([]cmount.Mount, error) { return e.Prepare(ctx, "third", top) },
	} {
		unmount()
		got, err := mounts()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if look(t, got).Lookup("/dir/big") == nil {
			t.Errorf("%s: the image's files are not there", name)
		}
		if n := e.Stats().Mounts; n != 1 {
			t.Errorf("%s: %d mounts are counted, want 1", name, n)
		}
	}
	unmount()
	e.removeAll(t) // all users of the mounts that were made anew are known
}

// TestPurge removes all that a snapshotter has, and nothing else.
func TestPurge(t *testing.T) {
	requireMounts(t)
	ctx, dir := t.Context(), t.TempDir()
	e, err := open(ctx, dir, snapshotter.Options{Log: quiet(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.end(t) })
	other, err := open(ctx, t.TempDir(), snapshotter.Options{Store: e.store, Log: quiet(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.end(t) })
	kept := stack(ctx, t, other, "other", base)
	top := stack(ctx, t, e, "image", base, file("more", big, 0o644))
	mounts, err := e.Prepare(ctx, "run", top)
	if err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(e.root, "lost+found")
	if err := os.Mkdir(foreign, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	mounted(t, mounts, func(root string) {
		if err := snapshotter.Purge(e.root, e.store); !errors.Is(err, snapshotter.ErrInUse) {
			t.Errorf("while a container runs: got %v, want ErrInUse", err)
		}
		if err := os.WriteFile(filepath.Join(root, "still"), nil, 0o600); err != nil {
			t.Error(err)
		}
	})
	another, err := store.Init(filepath.Join(t.TempDir(), "store"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, st := range []*store.Store{nil, another} {
		if err := snapshotter.Purge(e.root, st); !errors.Is(err, snapshotter.ErrStore) || !strings.Contains(err.Error(), e.store.Dir()) {
			t.Errorf("without the store: got %v, want ErrStore", err)
		}
	}
	for range 2 {
		if err := snapshotter.Purge(e.root, e.store); err != nil {
			t.Fatal(err)
		}
	}
	left, err := os.ReadDir(e.root)
	if err != nil || len(left) != 1 || left[0].Name() != "lost+found" {
		t.Errorf("got %v, %v, want the foreign directory alone", left, err)
	}
	if _, err := converter.GC(ctx, e.store, store.GCOptions{}); err != nil {
		t.Fatal(err)
	}
	view, err := other.View(ctx, "view", kept)
	if err != nil {
		t.Fatal(err)
	}
	look(t, view)
	if err := errors.Join(other.Remove(ctx, "view"), other.Remove(ctx, kept), other.Cleanup(ctx)); err != nil {
		t.Fatal(err)
	}
	if usage, err := converter.DF(ctx, e.store); err != nil || usage.Total.Objects != 0 || usage.ImageRefs+usage.StreamRefs != 0 {
		t.Errorf("the store still has %+v, %v", usage, err)
	}

	// What is no snapshotter's stays, and needs no store.
	strange := t.TempDir()
	if err := os.Mkdir(filepath.Join(strange, "snapshots"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(snapshotter.Purge(strange, nil), snapshotter.Purge(filepath.Join(strange, "none"), nil)); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(strange, "snapshots")); err != nil {
		t.Error(err)
	}
}
