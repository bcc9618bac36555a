package snapshotter_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/scan"
	"github.com/particle-os/particle/converter/tree"
	"github.com/particle-os/particle/snapshotter"
)

// mounted mounts what a snapshotter returned, for the length of fn.
func mounted(t testing.TB, mounts []cmount.Mount, fn func(dir string)) {
	t.Helper()
	dir := t.TempDir()
	if err := cmount.All(mounts, dir); err != nil {
		t.Fatalf("mounting %+v: %v", mounts, err)
	}
	defer func() {
		if err := cmount.UnmountAll(dir, 0); err != nil {
			t.Fatal(err)
		}
	}()
	fn(dir)
}

// look reads what a mounted snapshot shows.
func look(t testing.TB, mounts []cmount.Mount) (found *tree.Tree) {
	t.Helper()
	mounted(t, mounts, func(dir string) {
		var err error
		if found, err = scan.Dir(t.Context(), dir, scan.Hash(fsverity.SHA256), scan.Options{}); err != nil {
			t.Fatal(err)
		}
	})
	return found
}

// timeless sets all times to 1970, for trees that were made at different times.
func timeless(tr *tree.Tree) *tree.Tree {
	_ = tr.Walk(func(_ string, n *tree.Node) error {
		n.MtimeSec, n.MtimeNsec = 0, 0
		return nil
	})
	return tr
}

// A change is what a container does to its root directory.
type change func(dir string) error

func do(all ...change) change {
	return func(dir string) error {
		for _, c := range all {
			if err := c(dir); err != nil {
				return err
			}
		}
		return nil
	}
}

func file(name, content string, mode os.FileMode) change {
	return func(dir string) error {
		path := filepath.Join(dir, name)
		return errors.Join(os.WriteFile(path, []byte(content), mode), os.Chmod(path, mode))
	}
}

func mkdir(name string, mode os.FileMode) change {
	return func(dir string) error {
		path := filepath.Join(dir, name)
		return errors.Join(os.Mkdir(path, mode), os.Chmod(path, mode))
	}
}

func remove(name string) change {
	return func(dir string) error { return os.RemoveAll(filepath.Join(dir, name)) }
}

func rename(from, to string) change {
	return func(dir string) error { return os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)) }
}

func chown(name string, uid, gid int) change {
	return func(dir string) error { return os.Lchown(filepath.Join(dir, name), uid, gid) }
}

func chmod(name string, mode uint32) change {
	return func(dir string) error { return unix.Chmod(filepath.Join(dir, name), mode) }
}

func link(from, to string) change {
	return func(dir string) error { return os.Link(filepath.Join(dir, from), filepath.Join(dir, to)) }
}

func symlink(target, name string) change {
	return func(dir string) error { return os.Symlink(target, filepath.Join(dir, name)) }
}

func xattr(name, key, value string) change {
	return func(dir string) error { return unix.Lsetxattr(filepath.Join(dir, name), key, []byte(value), 0) }
}

func unxattr(name, key string) change {
	return func(dir string) error { return unix.Lremovexattr(filepath.Join(dir, name), key) }
}

func mknod(name string, mode uint32, dev uint64) change {
	return func(dir string) error { return unix.Mknod(filepath.Join(dir, name), mode, int(dev)) }
}

func truncate(name string, size int64) change {
	return func(dir string) error { return os.Truncate(filepath.Join(dir, name), size) }
}

func refused(c change, want error) change {
	return func(dir string) error {
		if err := c(dir); !errors.Is(err, want) {
			return fmt.Errorf("got %v, want %w", err, want)
		}
		return nil
	}
}

// big is more than fits into an image.
var big = strings.Repeat("big ", 5000)

// base is what the lowest layer of each case has.
var base = do(
	mkdir("etc", 0o755), file("etc/passwd", "root\n", 0o644), file("etc/shadow", "secret\n", 0o600),
	mkdir("dir", 0o750), file("dir/small", "s", 0o640), file("dir/big", big, 0o644), mkdir("dir/sub", 0o700),
	file("dir/sub/deep", big+"deep", 0o644), mkdir("empty", 0o1777), file("none", "", 0o644),
	symlink("dir/big", "link"), symlink("/nowhere", "dangling"), file("one", big+"one", 0o644), link("one", "two"),
	file("suid", big+"suid", 0o755), chmod("suid", 0o4755), xattr("suid", "user.note", "n"),
	mknod("null", unix.S_IFCHR|0o666, unix.Mkdev(1, 3)), mknod("pipe", unix.S_IFIFO|0o600, 0),
	chown("dir", 5, 6), chown("dir/small", 7, 8), chown("link", 9, 9),
	xattr("dir", "user.dir", "d"), xattr("suid", "security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"),
)

// cases are layers on top of base: what a container, or the layer of an image, does.
var cases = map[string][]change{
	"nothing":                      {do()},
	"delete a file":                {remove("etc/passwd")},
	"delete a directory":           {remove("dir")},
	"delete an empty directory":    {remove("empty")},
	"delete a symlink":             {remove("link")},
	"delete a device":              {remove("null")},
	"delete in two layers":         {remove("dir/small"), remove("dir/big")},
	"delete and make again":        {remove("dir/big"), file("dir/big", "new", 0o600)},
	"delete one name of two":       {remove("one")},
	"opaque directory":             {do(remove("dir"), mkdir("dir", 0o711), file("dir/new", big+"new", 0o644))},
	"opaque and empty":             {do(remove("dir"), mkdir("dir", 0o700))},
	"opaque, then more":            {do(remove("dir"), mkdir("dir", 0o711)), file("dir/late", "l", 0o644)},
	"opaque twice":                 {do(remove("dir"), mkdir("dir", 0o711), file("dir/a", "a", 0o644)), do(remove("dir"), mkdir("dir", 0o755), file("dir/b", "b", 0o644))},
	"rename a file":                {rename("etc/passwd", "etc/group")},
	"rename into a directory":      {rename("one", "dir/sub/one")},
	"rename over a file":           {rename("etc/shadow", "etc/passwd")},
	"rename a lower directory":     {refused(rename("dir", "moved"), unix.EXDEV)},
	"rename a new directory":       {do(mkdir("new", 0o755), file("new/f", "f", 0o644), rename("new", "newer"))},
	"rename back":                  {rename("none", "some"), rename("some", "none")},
	"chown a file":                 {chown("dir/small", 1000, 1000)},
	"chown a directory":            {chown("dir", 1000, 1000)},
	"chown the root":               {do(chown(".", 11, 12), chmod(".", 0o751))},
	"chown a symlink":              {chown("dangling", 1, 2)},
	"chown a large file":           {chown("one", 3, 4)},
	"chmod":                        {do(chmod("suid", 0o755), chmod("dir/sub", 0o2770))},
	"xattrs":                       {do(xattr("dir", "user.dir", "other"), xattr("one", "user.x", "y"), unxattr("suid", "user.note"))},
	"capability is lost":           {chown("suid", 1, 1)},
	"file becomes directory":       {do(remove("none"), mkdir("none", 0o755), file("none/f", "f", 0o644))},
	"directory becomes file":       {do(remove("dir"), file("dir", "now a file", 0o644))},
	"directory becomes symlink":    {do(remove("dir"), symlink("etc", "dir"))},
	"symlink becomes directory":    {do(remove("link"), mkdir("link", 0o755), file("link/f", "f", 0o644))},
	"device becomes file":          {do(remove("null"), file("null", "f", 0o644))},
	"file becomes device":          {do(remove("none"), mknod("none", unix.S_IFBLK|0o600, unix.Mkdev(7, 300)))},
	"hard link of a lower file":    {link("etc/passwd", "etc/passwd-")},
	"hard links across":            {do(link("dir/big", "a"), link("dir/big", "dir/sub/b"), remove("dir/big"))},
	"write to a hard link":         {file("two", "changed", 0o644)},
	"truncate":                     {truncate("dir/big", 10)},
	"sparse":                       {do(file("sparse", "x", 0o644), truncate("sparse", 1<<20))},
	"strange names":                {do(file("a\nb", "1", 0o644), file("ä \\ :,=%", "2", 0o644), mkdir(".wh", 0o755), file(".wh/..wh", "3", 0o644))},
	"names of the object store":    {do(mkdir("00", 0o755), file("00/f", "f", 0o644), file("ff", big, 0o644))},
	"a directory full":             {many(300)},
	"half of it deleted":           {many(300), manyGone(300)},
	"overlay's own xattrs":         {do(mkdir("nested", 0o755), xattr("nested", "user.overlay.opaque", "y"), xattr("nested", "trusted.other", "t"))},
	"deep":                         {mkdir("dir/sub/d1", 0o755), mkdir("dir/sub/d1/d2", 0o755), file("dir/sub/d1/d2/f", big, 0o644), remove("dir/sub/d1/d2/f")},
	"whiteout below a new symlink": {do(remove("dir/sub"), symlink("../etc", "dir/sub"))},
}

func many(n int) change {
	return func(dir string) error {
		if err := os.Mkdir(filepath.Join(dir, "many"), 0o755); err != nil {
			return err
		}
		for i := range n {
			if err := os.WriteFile(filepath.Join(dir, "many", fmt.Sprintf("f%03d", i)), []byte(strings.Repeat("x", i)), 0o644); err != nil {
				return err
			}
		}
		return nil
	}
}

func manyGone(n int) change {
	return func(dir string) error {
		for i := 0; i < n; i += 2 {
			if err := os.Remove(filepath.Join(dir, "many", fmt.Sprintf("f%03d", i))); err != nil {
				return err
			}
		}
		return nil
	}
}

// stack commits one snapshot a change, on top of each other, and returns the name of
// the last.
func stack(ctx context.Context, t testing.TB, sn snapshots.Snapshotter, name string, changes ...change) (top string) {
	t.Helper()
	for i, c := range changes {
		key, layer := fmt.Sprintf("%s active %d", name, i), fmt.Sprintf("%s layer %d", name, i)
		mounts, err := sn.Prepare(ctx, key, top)
		if err != nil {
			t.Fatal(err)
		}
		mounted(t, mounts, func(dir string) {
			if err := c(dir); err != nil {
				t.Fatalf("layer %d: %v", i, err)
			}
		})
		if err := sn.Commit(ctx, layer, key); err != nil {
			t.Fatal(err)
		}
		top = layer
	}
	return top
}

// show returns what a view and a writable snapshot of a committed one show.
func show(ctx context.Context, t testing.TB, sn snapshots.Snapshotter, name string) (view, writable *tree.Tree) {
	t.Helper()
	mounts, err := sn.View(ctx, name+" view", name)
	if err != nil {
		t.Fatal(err)
	}
	view = look(t, mounts)
	if mounts, err = sn.Prepare(ctx, name+" run", name); err != nil {
		t.Fatal(err)
	}
	return view, look(t, mounts)
}

func newOverlayfs(t testing.TB) snapshots.Snapshotter {
	t.Helper()
	sn, err := overlay.NewSnapshotter(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sn.Close() })
	return sn
}

// TestCases compares, path by path, what containers see with what they see with
// containerd's overlayfs snapshotter.
func TestCases(t *testing.T) {
	requireMounts(t)
	ctx := t.Context()
	e := mustOpen(t, t.TempDir(), snapshotter.Options{})
	ref := newOverlayfs(t)
	for name, layers := range cases {
		t.Run(name, func(t *testing.T) {
			layers := append([]change{base}, layers...)
			gotView, got := show(ctx, t, e, stack(ctx, t, e, name, layers...))
			wantView, want := show(ctx, t, ref, stack(ctx, t, ref, name, layers...))
			for _, d := range tree.Diff(timeless(wantView), timeless(gotView)) {
				t.Errorf("view: %s", d)
			}
			for _, d := range tree.Diff(timeless(want), timeless(got)) {
				t.Errorf("writable: %s", d)
			}
		})
	}
}
