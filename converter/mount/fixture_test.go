package mount

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/scan"
	"github.com/particle-os/particle/converter/tree"
)

// A fixture is an image, its objects and a directory to mount on.
type fixture struct {
	image, objects, target string
	tree                   *tree.Tree
	digest                 fsverity.Digest
}

// newFixture writes an image below dir, and fails the test if mounts or loop devices
// are left when it ends.
func newFixture(t *testing.T, dir string) fixture {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts images")
	}
	if s := Probe(dir).Privilege; !s.OK {
		t.Skipf("root may not mount here, as in a container that is not privileged: %s", s.Why)
	}
	noLeaks(t)
	f := fixture{image: dir + "/image", objects: dir + "/objects", target: dir + "/target"}
	node := func(mode uint32) *tree.Node {
		n := &tree.Node{Stat: tree.Stat{Mode: mode, UID: 1000, GID: 70000, MtimeSec: 1700000000, MtimeNsec: 5}}
		if n.IsDir() {
			n.Dir = map[string]*tree.Node{}
		}
		return n
	}
	object := func(data []byte) *tree.Node {
		n := node(tree.TypeRegular | 0o644)
		d := fsverity.Sum(fsverity.SHA256, data)
		n.File = &tree.File{Size: int64(len(data)), Object: d}
		path := filepath.Join(f.objects, d.Path())
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
		return n
	}
	root, sub := node(tree.TypeDir|0o755), node(tree.TypeDir|0o700)
	root.Dir["sub"] = sub
	sub.Dir["big"] = object(bytes.Repeat([]byte("big"), 4000))
	root.Dir["link"] = sub.Dir["big"]
	root.Dir["other"] = object(bytes.Repeat([]byte("other"), 50))
	root.Dir["other"].Xattrs = map[string]string{"user.x": "y\x00z"}
	small := node(tree.TypeRegular | 0o4755)
	small.File = &tree.File{Size: 5, Inline: []byte("small")}
	sub.Dir["small"] = small
	symlink := node(tree.TypeSymlink | 0o777)
	symlink.Target = "sub/small"
	root.Dir["symlink"] = symlink
	device := node(tree.TypeChar | 0o600)
	device.Rdev = tree.Makedev(1, 3)
	root.Dir["null"] = device
	root.Dir["fifo"] = node(tree.TypeFIFO | 0o600)
	f.tree = &tree.Tree{Root: root}

	var img bytes.Buffer
	if err := erofs.Write(&img, f.tree, erofs.Options{}); err != nil {
		t.Fatal(err)
	}
	f.digest = fsverity.Sum(fsverity.SHA256, img.Bytes())
	if err := os.WriteFile(f.image, img.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(f.target, 0o755); err != nil {
		t.Fatal(err)
	}
	return f
}

// noLeaks counts mounts and loop devices now and when the test ends.
func noLeaks(t *testing.T) {
	t.Helper()
	mounts, loops := count(t)
	t.Cleanup(func() {
		// The kernel frees a loop device some moments after the unmount.
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			m, l := count(t)
			if m <= mounts && l <= loops {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("left behind: got %d mounts and %d loop devices, want %d and %d", m, l, mounts, loops)
				return
			}
		}
	})
}

// count counts what tests of this package mount: not all there is, since others use
// the machine too.
func count(t *testing.T) (mounts, loops int) {
	t.Helper()
	err := each(func(e Entry) error {
		if strings.HasPrefix(e.Target, os.TempDir()+"/Test") || e.Type == "erofs" {
			mounts++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil && strings.Contains(string(b), os.TempDir()+"/Test") {
			loops++
		}
	}
	return mounts, loops
}

func (f *fixture) options() Options { return Options{Path: f.image, Objects: []string{f.objects}} }

// check compares what is mounted with the tree.
func (f *fixture) check(t *testing.T, target string) {
	t.Helper()
	got, err := scan.Dir(context.Background(), target, scan.Hash(fsverity.SHA256), scan.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range tree.Diff(f.tree, got) {
		t.Error(c)
	}
}

func (f *fixture) mount(t *testing.T, o Options) State {
	t.Helper()
	st, err := Mount(f.target, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(f.target, unix.MNT_DETACH) })
	return st
}
