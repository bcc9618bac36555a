package snapshotter_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/tree"
	"github.com/particle-os/particle/snapshotter"
)

// TestRestart closes and opens a snapshotter while a container runs: its mounts go on,
// and are the same after that and after a loss of all mounts (a reboot).
func TestRestart(t *testing.T) {
	requireMounts(t)
	ctx, dir := t.Context(), t.TempDir()
	e, err := open(ctx, dir, snapshotter.Options{Log: quiet(t)})
	if err != nil {
		t.Fatal(err)
	}
	top := stack(ctx, t, e, "image", base, do(remove("dir/big"), file("new", big, 0o644)))
	snapshotter.EndRetiring(e.Snapshotter)
	mounts, err := e.Prepare(ctx, "run", top)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.View(ctx, "view", top); err != nil {
		t.Fatal(err)
	}
	mounted(t, mounts, func(running string) {
		container, err := os.Open(filepath.Join(running, "suid"))
		if err != nil {
			t.Fatal(err)
		}
		defer container.Close()
		for _, lost := range []bool{false, true} {
			if err := e.Close(); err != nil {
				t.Fatal(err)
			}
			if lost {
				if err := snapshotter.UnmountAll(e.root); err != nil {
					t.Fatal(err)
				}
			}
			before := mountsBelow(t, dir)
			if e, err = open(ctx, dir, snapshotter.Options{Log: quiet(t)}); err != nil {
				t.Fatal(err)
			}
			if after := mountsBelow(t, dir); !lost && !slices.Equal(before, after) {
				t.Errorf("a restart changed the mounts from %q to %q", before, after)
			}
			for _, key := range []string{"run", "view"} {
				again, err := e.Mounts(ctx, key)
				if err != nil {
					t.Fatal(err)
				}
				if key == "run" && fmt.Sprint(again) != fmt.Sprint(mounts) {
					t.Errorf("got the mounts %v, want %v as before", again, mounts)
				}
				info, err := e.Stat(ctx, key)
				if err != nil {
					t.Fatal(err)
				}
				if got := info.Labels[snapshotter.LabelVerification]; got != string(mount.Checked) && got != string(mount.Enforced) {
					t.Errorf("%s: got verification %q", key, got)
				}
			}
			// The container goes on, on its own mount.
			if b, err := io.ReadAll(io.NewSectionReader(container, 0, 1<<20)); err != nil || string(b) != big+"suid" {
				t.Errorf("the container reads %.20q: %v", b, err)
			}
			if err := os.WriteFile(filepath.Join(running, fmt.Sprint("written ", lost)), nil, 0o644); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(filepath.Join(running, "dir/big")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the deleted file: %v", err)
			}
		}
	})
	t.Cleanup(func() { e.end(t) })
	e.removeAll(t)
}

// TestOneProcess opens a root that is in use.
func TestOneProcess(t *testing.T) {
	requireMounts(t)
	dir := t.TempDir()
	mustOpen(t, dir, snapshotter.Options{})
	if _, err := open(t.Context(), dir, snapshotter.Options{Log: quiet(t)}); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("got %v, want an error about another process", err)
	}
}

func TestBadRoot(t *testing.T) {
	requireMounts(t)
	for _, name := range []string{"a:b", "a,b", strings.Repeat("long/", 300)} {
		if _, err := open(t.Context(), filepath.Join(t.TempDir(), name), snapshotter.Options{}); !errors.Is(err, snapshotter.ErrRoot) {
			t.Errorf("%.20q: got %v, want ErrRoot", name, err)
		}
	}
}

// TestMountAfterCommit mounts what an active snapshot's mounts were after its commit, to
// read it, as BuildKit does. It stays while it is mounted.
func TestMountAfterCommit(t *testing.T) {
	requireMounts(t)
	ctx := t.Context()
	e := mustOpen(t, t.TempDir(), snapshotter.Options{})
	top := stack(ctx, t, e, "image", base)
	mounts, err := e.Prepare(ctx, "step", top)
	if err != nil {
		t.Fatal(err)
	}
	mounted(t, mounts, func(dir string) { err = os.WriteFile(filepath.Join(dir, "made"), []byte("made"), 0o644) })
	if err == nil {
		err = e.Commit(ctx, "result", "step")
	}
	if err != nil {
		t.Fatal(err)
	}
	var upper, lower string
	for _, o := range mounts[0].Options {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			upper = dir
		}
		if dir, ok := strings.CutPrefix(o, "lowerdir="); ok {
			lower = dir
		}
	}
	mounted(t, []mountT{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + upper + ":" + lower}}}, func(dir string) {
		snapshotter.EndRetiring(e.Snapshotter)
		if err := e.Cleanup(ctx); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"made", "suid"} {
			if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
				t.Error(err)
			}
		}
	})
	if err := e.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(upper); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the upper directory is left: %v", err)
	}
	e.removeAll(t)
}

// TestLoop stacks a container on images that are on loop devices.
func TestLoop(t *testing.T) {
	requireMounts(t)
	e := mustOpen(t, t.TempDir(), snapshotter.Options{})
	snapshotter.ForceLoop(e.Snapshotter)
	ctx := t.Context()
	top := stack(ctx, t, e, "image", base, do(remove("dir")))
	snapshotter.EndRetiring(e.Snapshotter)
	view, writable := show(ctx, t, e, top)
	if d := tree.Diff(timeless(view), timeless(writable)); len(d) > 0 {
		t.Errorf("view and writable differ: %v", d)
	}
	if n := len(loopsOn(t, e.dir)); n != 1 {
		t.Errorf("%d loop devices are in use, want 1", n)
	}
	if st := e.Stats(); st.LoopMounts != 1 || st.Mounts != 1 {
		t.Errorf("got %+v, want one mount, on a loop device", st)
	}
	e.removeAll(t)
}

// TestSameImage compares the image of a chain with the one that converting the same
// layers makes.
func TestSameImage(t *testing.T) {
	requireMounts(t)
	ctx := inNamespace(t.Context())
	i := testImage(t)
	e := mustOpen(t, t.TempDir(), snapshotter.Options{})
	c := newClient(t, e, ours(e), false)
	if _, err := c.pull(ctx, i); err != nil {
		t.Fatal(err)
	}
	res, err := converter.Convert(ctx, i, e.store, converter.Options{Name: "converted"})
	if err != nil {
		t.Fatal(err)
	}
	for n, l := range res.Layers {
		if !l.Present {
			t.Errorf("layer %d was read again", n)
		}
	}
	top := ""
	err = e.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if strings.HasSuffix(info.Name, i.chains()[len(i.layers)-1].String()) {
			top = info.Name
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	got, err := e.Image(ctx, top)
	if err != nil {
		t.Fatal(err)
	}
	if want := res.Images[converter.Rootfs.String()]; got != want {
		t.Errorf("the image is %s, converted %s", got, want)
	}
}

// source serves the layers of an image in memory.
type source struct {
	*image
	asked []string
	bad   bool
}

func (s *source) Layer(_ context.Context, ref, d string) (io.ReadCloser, error) {
	s.asked = append(s.asked, ref+" "+d)
	if s.bad {
		return io.NopCloser(bytes.NewReader(s.blobs[s.layers[0].Digest])), nil
	}
	blob, ok := s.blobs[digest.Digest(d)]
	if !ok {
		return nil, os.ErrNotExist
	}
	return io.NopCloser(bytes.NewReader(blob)), nil
}

// TestSource fetches layers for Prepare.
func TestSource(t *testing.T) {
	requireMounts(t)
	ctx := t.Context()
	src := &source{image: testImage(t)}
	e := mustOpen(t, t.TempDir(), snapshotter.Options{Source: src})
	ask := func(key string, n int, parent string) error {
		labels := map[string]string{
			snapshots.LabelSnapshotRef:                   src.chains()[n].String(),
			"containerd.io/snapshot/cri.image-ref":       "example.com/image:1",
			"containerd.io/snapshot/cri.layer-digest":    src.layers[n].Digest.String(),
			"containerd.io/snapshot/cri.manifest-digest": src.manifest.Digest.String(),
		}
		_, err := e.Prepare(ctx, key, parent, snapshots.WithLabels(labels))
		return err
	}
	parent := ""
	for n := range 2 {
		if err := ask(fmt.Sprintf("extract-%d x", n), n, parent); !errdefs.IsAlreadyExists(err) {
			t.Fatalf("layer %d: got %v, want ErrAlreadyExists", n, err)
		}
		parent = src.chains()[n].String()
		info, err := e.Stat(ctx, parent)
		if err != nil || info.Kind != snapshots.KindCommitted {
			t.Fatalf("layer %d: got %v, %v", n, info, err)
		}
	}
	usage, err := e.Usage(ctx, src.chains()[0].String())
	if err != nil || usage.Size < int64(2*len(big)) || usage.Inodes < 10 {
		t.Errorf("got usage %+v, %v", usage, err)
	}
	if len(src.asked) != 2 || src.asked[0] != "example.com/image:1 "+src.layers[0].Digest.String() {
		t.Errorf("asked for %q", src.asked)
	}
	// A wrong layer is refused, and containerd goes on to fetch the right one.
	src.bad = true
	if err := ask("extract-2 x", 2, parent); err != nil {
		t.Errorf("got %v, want mounts to unpack into", err)
	}
	if st := e.Stats(); st.LayersGot != 2 {
		t.Errorf("got %d layers", st.LayersGot)
	}
	e.removeAll(t)
}

// Manifest and Blob make an image one that can be converted.
func (i *image) Manifest(context.Context) ([]byte, string, error) {
	return i.blobs[i.manifest.Digest], i.manifest.MediaType, nil
}

func TestCommitOfRunning(t *testing.T) {
	requireMounts(t)
	ctx := t.Context()
	e := mustOpen(t, t.TempDir(), snapshotter.Options{})
	top := stack(ctx, t, e, "image", base)
	mounts, err := e.Prepare(ctx, "run", top)
	if err != nil {
		t.Fatal(err)
	}
	mounted(t, mounts, func(running string) {
		name := filepath.Join(running, "log")
		if err := os.WriteFile(name, []byte(big+"1"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := e.Commit(ctx, "taken", "run"); err != nil {
			t.Fatal(err)
		}
		// It goes on, and what it writes does not reach the snapshot.
		if err := os.WriteFile(name, []byte(big+"2"), 0o644); err != nil {
			t.Error(err)
		}
		if err := os.WriteFile(filepath.Join(running, "later"), nil, 0o644); err != nil {
			t.Error(err)
		}
		if err := e.Cleanup(ctx); err != nil {
			t.Error(err)
		}
		if b, err := os.ReadFile(name); err != nil || string(b) != big+"2" {
			t.Errorf("the container reads %.20q: %v", b, err)
		}
		view, err := e.View(ctx, "view", "taken")
		if err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(view[0].Source, "log")); err != nil || string(b) != big+"1" {
			t.Errorf("the snapshot has %d bytes: %v", len(b), err)
		}
	})
	e.removeAll(t)
}

// TestUserNamespace prepares a snapshot for a user namespace and commits it.
func TestUserNamespace(t *testing.T) {
	requireMounts(t)
	ctx := t.Context()
	e := mustOpen(t, t.TempDir(), snapshotter.Options{})
	top := stack(ctx, t, e, "image", base)
	labels := snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotUIDMapping: "0:100000:65536",
		snapshots.LabelSnapshotGIDMapping: "0:200000:65536",
	})
	mounts, err := e.Prepare(ctx, "run", top, labels)
	if err != nil {
		t.Fatal(err)
	}
	owner := func(path string) string {
		st, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		sys := st.Sys().(*syscall.Stat_t)
		return fmt.Sprint(sys.Uid, ":", sys.Gid)
	}
	mounted(t, mounts, func(dir string) {
		for name, want := range map[string]string{".": "100000:200000", "dir": "100005:200006", "dir/small": "100007:200008"} {
			if got := owner(filepath.Join(dir, name)); got != want {
				t.Errorf("%s: got owner %s, want %s", name, got, want)
			}
		}
		if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // for the namespace's root
			t.Fatal(err)
		}
		// Root of the namespace writes, and chowns to its user 1000.
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "/bin/sh", "-c", "echo x >dir/made && chown 1000:1000 dir/made && rm dir/small && cat dir/big >/dev/null")
		cmd.Dir = dir
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 200000, Size: 65536}},
			Credential:  &syscall.Credential{},
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if got := owner(filepath.Join(dir, "dir/made")); got != "101000:201000" {
			t.Errorf("made: got owner %s", got)
		}
	})
	if err := e.Commit(ctx, "committed", "run"); err != nil {
		t.Fatal(err)
	}
	view, err := e.View(ctx, "view", "committed")
	if err != nil {
		t.Fatal(err)
	}
	tr := look(t, view)
	for path, want := range map[string]uint32{"/": 0, "/dir": 5, "/dir/made": 1000} {
		if n := tr.Lookup(path); n == nil || n.UID != want {
			t.Errorf("%s: got %+v, want uid %d", path, n, want)
		}
	}
	if tr.Lookup("/dir/small") != nil {
		t.Error("the deleted file is there")
	}
	for _, bad := range []string{"x", "0:1", "0:0:0", "1:2:3", "0:4294967295:2"} {
		bad := map[string]string{snapshots.LabelSnapshotUIDMapping: bad, snapshots.LabelSnapshotGIDMapping: "0:0:1"}
		if _, err := e.Prepare(ctx, "bad", top, snapshots.WithLabels(bad)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: got %v, want ErrInvalidArgument", bad, err)
		}
	}
	e.removeAll(t)
}

// TestUnpackedOwners: the author of an image does not decide by annotations whose files a
// layer has, which others may have below theirs.
func TestUnpackedOwners(t *testing.T) {
	requireMounts(t)
	ctx := t.Context()
	e := mustOpen(t, t.TempDir(), snapshotter.Options{})
	labels := snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotUIDMapping: "0:100000:65536",
		snapshots.LabelSnapshotGIDMapping: "0:200000:65536",
		snapshots.LabelSnapshotMaxSize:    "none",
	})
	mounts, err := e.Prepare(ctx, snapshots.UnpackKeyPrefix+"-1 layer", "", labels)
	if err != nil {
		t.Fatal(err)
	}
	upper := upperOf(t, mounts)
	if err := os.WriteFile(filepath.Join(upper, "file"), []byte("x"), 0o4755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(filepath.Join(upper, "file"), 100000, 200000); err != nil {
		t.Fatal(err)
	}
	if err := e.Commit(ctx, "layer", snapshots.UnpackKeyPrefix+"-1 layer"); err != nil {
		t.Fatal(err)
	}
	view, err := e.View(ctx, "view", "layer")
	if err != nil {
		t.Fatal(err)
	}
	tr := look(t, view)
	if n := tr.Lookup("/file"); n == nil || n.UID != 100000 || n.GID != 200000 {
		t.Errorf("the file is %+v, want the owner 100000:200000 that it was unpacked with", n)
	}
	if tr.Root.UID != 0 || tr.Root.GID != 0 {
		t.Errorf("the root is of %d:%d, want 0:0", tr.Root.UID, tr.Root.GID)
	}
}
