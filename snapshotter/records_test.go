package snapshotter_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/particle-os/particle/snapshotter"
)

// TestMappingStays: what an active snapshot's mounts are follows from its mapping, so
// that no update may change that, and one that replaces all labels leaves it.
func TestMappingStays(t *testing.T) {
	requireMounts(t)
	ctx := t.Context()
	e := mustOpen(t, t.TempDir(), snapshotter.Options{})
	top := stack(ctx, t, e, "image", base)
	const uid, gid = snapshots.LabelSnapshotUIDMapping, snapshots.LabelSnapshotGIDMapping
	mapping := map[string]string{uid: "0:100000:65536", gid: "0:200000:65536"}
	before := map[string]string{} // mounts by key
	for key, labels := range map[string]map[string]string{"plain": nil, "mapped": mapping} {
		mounts, err := e.Prepare(ctx, key, top, snapshots.WithLabels(maps.Clone(labels)))
		if err != nil {
			t.Fatal(err)
		}
		before[key] = fmt.Sprint(mounts)
	}
	for _, tc := range []struct {
		key    string
		labels map[string]string
		paths  []string
		want   bool
	}{
		{"plain", map[string]string{uid: "bad"}, []string{"labels." + uid}, false},
		{"plain", map[string]string{uid: "bad"}, nil, false},
		{"plain", mapping, []string{"labels"}, false},
		{"mapped", map[string]string{uid: "0:1:1"}, []string{"labels.x", "labels." + uid}, false},
		{"mapped", nil, []string{"labels." + gid}, false},
		{"mapped", map[string]string{"x": "1"}, nil, true},
		{"mapped", map[string]string{"x": "2"}, []string{"labels"}, true},
		{"mapped", map[string]string{"x": "3"}, []string{"labels.x"}, true},
		{"mapped", map[string]string{"x": "4", uid: mapping[uid], gid: mapping[gid]}, nil, true},
		{"mapped", mapping, []string{"labels." + uid, "labels." + gid}, true},
		{"plain", map[string]string{"x": "5"}, nil, true},
		{top, mapping, nil, true}, // says nothing of a committed one
	} {
		_, err := e.Update(ctx, snapshots.Info{Name: tc.key, Labels: tc.labels}, tc.paths...)
		if got := err == nil; got != tc.want || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s, labels %v, paths %q: got %v", tc.key, tc.labels, tc.paths, err)
		}
	}
	if info, err := e.Stat(ctx, "mapped"); err != nil || info.Labels[uid] != mapping[uid] || info.Labels[gid] != mapping[gid] || info.Labels["x"] != "4" {
		t.Errorf("got %v, %v", info.Labels, err)
	}
	for key, want := range before {
		if mounts, err := e.Mounts(ctx, key); err != nil || fmt.Sprint(mounts) != want {
			t.Errorf("%s: got %v, %v, want %s", key, mounts, err, want)
		}
	}
	e.removeAll(t)
}

// TestBadRecord opens a root with a snapshot that cannot be mounted: the others work, and
// it can be removed.
func TestBadRecord(t *testing.T) {
	requireMounts(t)
	ctx, dir := t.Context(), t.TempDir()
	e, err := open(ctx, dir, snapshotter.Options{Log: quiet(t)})
	if err != nil {
		t.Fatal(err)
	}
	top := stack(ctx, t, e, "image", base)
	for _, key := range []string{"a bad label", "an unfit upper", "good"} {
		if _, err := e.Prepare(ctx, key, top); err != nil {
			t.Fatal(err)
		}
	}
	mounts, err := e.Mounts(ctx, "an unfit upper")
	if err != nil {
		t.Fatal(err)
	}
	unfit := filepath.Dir(upperOf(t, mounts))
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	// Earlier versions let clients do it.
	ms, err := storage.NewMetaStore(filepath.Join(e.root, "metadata.db"))
	if err != nil {
		t.Fatal(err)
	}
	err = ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		info := snapshots.Info{Name: "a bad label", Labels: map[string]string{snapshots.LabelSnapshotUIDMapping: "bad"}}
		_, err := storage.UpdateInfo(ctx, info)
		return err
	})
	err = errors.Join(err, ms.Close(), os.RemoveAll(unfit), os.WriteFile(unfit, nil, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	if e, err = open(ctx, dir, snapshotter.Options{Log: quiet(t)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.end(t) })
	if mounts, err = e.Mounts(ctx, "good"); err != nil {
		t.Fatal(err)
	}
	mounted(t, mounts, func(root string) {
		if _, err := os.Stat(filepath.Join(root, "suid")); err != nil {
			t.Error(err)
		}
	})
	if _, err := e.Mounts(ctx, "a bad label"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v, want ErrInvalidArgument", err)
	}
	if err := os.Remove(unfit); err != nil {
		t.Fatal(err)
	}
	e.removeAll(t)
}

// TestWalkChanges changes snapshots while it walks them: bolt's database would wait for
// the end of the walk where it must grow.
func TestWalkChanges(t *testing.T) {
	requireMounts(t)
	e := mustOpen(t, t.TempDir(), snapshotter.Options{})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := e.Prepare(ctx, "first", ""); err != nil {
		t.Fatal(err)
	}
	const more = 8 // so large that the file must be mapped anew
	done := make(chan error, 1)
	go func() {
		done <- e.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
			for i := range more {
				label := snapshots.WithLabels(map[string]string{"x": strings.Repeat("x", 50_000)})
				if _, err := e.Prepare(ctx, fmt.Sprint("more ", i), "", label); err != nil {
					return err
				}
			}
			return e.Remove(ctx, info.Name)
		})
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-ctx.Done():
		t.Fatal("the walk does not end")
	}
	n := 0
	if err := e.Walk(ctx, func(context.Context, snapshots.Info) error { n++; return nil }); err != nil || n != more {
		t.Errorf("there are %d snapshots, %v, want %d", n, err, more)
	}
	stop := errors.New("stop")
	if err := e.Walk(ctx, func(context.Context, snapshots.Info) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("got %v, want the callback's error", err)
	}
	e.removeAll(t)
}
