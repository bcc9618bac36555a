package snapshotter_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/snapshotter"
	"github.com/particle-os/particle/tests/program"
)

// TestQuota limits a snapshot on a filesystem with project quotas, and asks in vain for
// a limit on one without.
func TestQuota(t *testing.T) {
	requireMounts(t)
	sized := func(size string) snapshots.Opt {
		return snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotMaxSize: size})
	}
	t.Run("without", func(t *testing.T) {
		e := mustOpen(t, t.TempDir(), snapshotter.Options{})
		if _, err := e.Prepare(t.Context(), "limited", "", sized("1048576")); err != nil {
			t.Error(err)
		}
		for _, bad := range []string{"", "x", "-1", "0", "1.5"} {
			if _, err := e.Prepare(t.Context(), "bad", "", sized(bad)); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%q: got %v, want ErrInvalidArgument", bad, err)
			}
		}
		e.removeAll(t)
	})
	t.Run("with", func(t *testing.T) {
		if _, err := exec.LookPath("mkfs.ext4"); err != nil {
			t.Skipf("%v: install the package e2fsprogs", err)
		}
		img, dir := filepath.Join(t.TempDir(), "img"), t.TempDir()
		if err := errors.Join(os.WriteFile(img, nil, 0o600), os.Truncate(img, 64<<20)); err != nil {
			t.Fatal(err)
		}
		if _, err := program.Try("mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota", img); err != nil {
			t.Fatal(err)
		}
		m := cmount.Mount{Type: "ext4", Source: img, Options: []string{"loop", "prjquota"}}
		if err := m.Mount(dir); err != nil {
			t.Skipf("this kernel has no project quotas: %v", err)
		}
		t.Cleanup(func() {
			if err := cmount.UnmountAll(dir, 0); err != nil {
				t.Error(err)
			}
		})
		e := mustOpen(t, dir, snapshotter.Options{})
		top := stack(t.Context(), t, e, "image", base)
		mounts, err := e.Prepare(t.Context(), "limited", top, sized("1048576"))
		if err != nil {
			t.Fatal(err)
		}
		mounted(t, mounts, func(root string) {
			err := os.WriteFile(filepath.Join(root, "fits"), make([]byte, 500_000), 0o600)
			if err != nil {
				t.Error(err)
			}
			err = os.WriteFile(filepath.Join(root, "does not"), make([]byte, 1_000_000), 0o600)
			if !errors.Is(err, syscall.EDQUOT) && !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("got %v, want an error about the quota", err)
			}
		})

		// A removed snapshot gives back its limit, and a project that somebody still has is
		// not given out: here one that has the next snapshot's.
		upper := upperOf(t, mounts)
		project, limit, err := snapshotter.Limit(upper)
		if err != nil || project == 0 || limit != 1<<20 {
			t.Fatalf("got project %d with the limit %d, %v", project, limit, err)
		}
		old := filepath.Join(dir, "old")
		if err := errors.Join(os.Mkdir(old, 0o700), snapshotter.SetProject(old, project+1)); err != nil {
			t.Fatal(err)
		}
		if err := e.Remove(t.Context(), "limited"); err != nil {
			t.Fatal(err)
		}
		if limit, err := snapshotter.LimitOf(dir, project); err != nil || limit != 0 {
			t.Errorf("project %d still has the limit %d, %v", project, limit, err)
		}
		if mounts, err = e.Prepare(t.Context(), "next", top, sized("2097152")); err != nil {
			t.Fatal(err)
		}
		next, limit, err := snapshotter.Limit(upperOf(t, mounts))
		if err != nil || next != project+2 || limit != 2<<20 {
			t.Errorf("got project %d with the limit %d, %v, want project %d", next, limit, err, project+2)
		}
		if limit, err := snapshotter.LimitOf(dir, project+1); err != nil || limit != 0 {
			t.Errorf("another's project %d has the limit %d, %v", project+1, limit, err)
		}
		e.removeAll(t)
	})
}

// TestFullDisk runs out of space in each operation and then has it again.
func TestFullDisk(t *testing.T) {
	requireMounts(t)
	dir := t.TempDir()
	// Overlays want xattrs, so a filesystem of files: tmpfs has trusted.* since ever.
	m := cmount.Mount{Type: "tmpfs", Source: "tmpfs", Options: []string{"size=8m"}}
	if err := m.Mount(dir); err != nil {
		t.Fatal(err)
	}
	defer cmount.UnmountAll(dir, 0)
	ctx := t.Context()
	e, err := open(ctx, dir, snapshotter.Options{Log: quiet(t)})
	if err != nil {
		t.Fatal(err)
	}
	parent := stack(ctx, t, e, "image", base)
	failed := 0
	for i := range 40 {
		name := fmt.Sprint("n", i)
		mounts, err := e.Prepare(ctx, name+"-active", parent)
		if err == nil {
			_ = os.WriteFile(filepath.Join(upperOf(t, mounts), name), bytes.Repeat([]byte(name), 200_000), 0o644)
			if err = e.Commit(ctx, name, name+"-active"); err == nil {
				_, err = e.View(ctx, name+"-view", name)
				parent = name
			}
		}
		if err != nil {
			if failed++; failed > 5 {
				break
			}
			if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, store.ErrNoSpace) {
				t.Fatalf("got %v, want an error about space", err)
			}
		}
	}
	if failed == 0 {
		t.Fatal("the disk did not fill up")
	}
	checkStore(t, e.store)
	if err := cmount.All([]cmount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: []string{"remount", "size=64m"}}}, dir); err != nil {
		t.Fatal(err)
	}
	view, err := e.View(ctx, "after", parent)
	if err != nil {
		t.Fatal(err)
	}
	look(t, view)
	e.removeAll(t)
	if err := snapshotter.UnmountAll(e.root); err != nil {
		t.Error(err)
	}
}
