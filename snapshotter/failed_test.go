package snapshotter_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/particle-os/particle/snapshotter"
)

// TestFailedRecord fails to record a layer whose files have become the store's. Who goes
// on to write to the snapshot must not write into objects.
func TestFailedRecord(t *testing.T) {
	requireMounts(t)
	ctx, dir := t.Context(), t.TempDir()
	e, err := open(ctx, dir, snapshotter.Options{Log: quiet(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.end(t) })
	const key = "ns/1/extract-1 x"
	mounts, err := e.Prepare(ctx, key, "")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(upperOf(t, mounts), "file")
	if err := os.WriteFile(path, []byte(big), 0o644); err != nil {
		t.Fatal(err)
	}
	before, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	failed, calls := errors.New("no record"), 0
	err = e.Commit(ctx, "layer", key, func(*snapshots.Info) error {
		if calls++; calls > 1 { // the first call only looks at the labels
			return failed
		}
		return nil
	})
	if !errors.Is(err, failed) {
		t.Fatalf("got %v, want the failure", err)
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(int(before.Fd()), &st); err != nil || st.Nlink < 2 {
		t.Fatalf("the file has %d links, %v: it did not become an object", st.Nlink, err)
	}
	for _, restart := range []bool{false, true} {
		if restart {
			if err := e.Close(); err != nil {
				t.Fatal(err)
			}
			if e, err = open(ctx, dir, snapshotter.Options{Log: quiet(t)}); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(path, []byte("changed"), 0o644); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("writing where the snapshot's files were: got %v, want ErrNotExist", err)
		}
		_, err := e.Mounts(ctx, key)
		for what, err := range map[string]error{"Mounts": err, "Commit": e.Commit(ctx, "layer", key)} {
			if !errdefs.IsFailedPrecondition(err) {
				t.Errorf("%s after a restart (%v): got %v, want ErrFailedPrecondition", what, restart, err)
			}
		}
		if _, err := e.Usage(ctx, key); err != nil {
			t.Error(err)
		}
	}
	checkStore(t, e.store)
	if err := e.Remove(ctx, key); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Prepare(ctx, key, ""); err != nil {
		t.Fatal(err)
	}
	if err := e.Commit(ctx, "layer", key); err != nil {
		t.Fatal(err)
	}
	e.removeAll(t)
}
