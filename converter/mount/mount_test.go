package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
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

func TestMount(t *testing.T) {
	for _, loop := range []bool{false, true} {
		t.Run(fmt.Sprintf("loop=%t", loop), func(t *testing.T) {
			f := newFixture(t, t.TempDir())
			o := f.options()
			o.Loop, o.Name = loop, "a name, with: odd\\ things\n"
			st := f.mount(t, o)
			if loop && !st.Loop {
				t.Errorf("got %+v", st)
			}
			f.check(t, f.target)
			if err := os.WriteFile(f.target+"/new", nil, 0o644); !errors.Is(err, unix.EROFS) {
				t.Errorf("writing: got %v, want EROFS", err)
			}

			list, err := List()
			if err != nil {
				t.Fatal(err)
			}
			found := false
			for _, m := range list {
				if m.Target == f.target {
					found = true
					if m.Name != o.Name || !m.ReadOnly || m.Verity || len(m.Objects) != 1 || m.Objects[0] != f.objects {
						t.Errorf("List: got %+v", m)
					}
				}
			}
			if !found {
				t.Errorf("List lacks %q: got %+v", f.target, list)
			}
			// The overlay is all there is to see.
			each(func(e Entry) error {
				if e.Type == "erofs" {
					t.Errorf("an EROFS is visible at %q", e.Target)
				}
				return nil
			})

			file, err := os.Open(f.target + "/other")
			if err != nil {
				t.Fatal(err)
			}
			if err := Unmount(f.target); !errors.Is(err, unix.EBUSY) {
				t.Errorf("unmounting with an open file: got %v, want EBUSY", err)
			}
			file.Close()
			if err := Unmount(f.target); err != nil {
				t.Error(err)
			}
			if err := Unmount(f.target); !errors.Is(err, ErrNotMounted) {
				t.Errorf("unmounting again: got %v, want ErrNotMounted", err)
			}
		})
	}
}

// TestWays makes the overlay in each way that this kernel has, also those that Mount
// would not choose here.
func TestWays(t *testing.T) {
	long := "/" + strings.Repeat("l", 200) + "/" + strings.Repeat("m", 200)
	for _, dir := range []string{"", "/with,comma:colon\\backslash", long} {
		for _, loop := range []bool{false, true} {
			for how, name := range map[layering]string{byFd: "byFd", byString: "byString", byColons: "byColons", byColon: "byColon"} {
				t.Run(fmt.Sprintf("%s,loop=%t,%.6s", name, loop, dir), func(t *testing.T) {
					tmp := t.TempDir() + dir
					if err := os.MkdirAll(tmp, 0o755); err != nil {
						t.Fatal(err)
					}
					f := newFixture(t, tmp)
					image, err := os.Open(f.image)
					if err != nil {
						t.Fatal(err)
					}
					defer image.Close()
					source := fdPath(image)
					if loop {
						dev, err := openLoop(image)
						if err != nil {
							t.Fatal(err)
						}
						defer dev.Close()
						source = dev.Name()
					}
					meta, err := mountErofs(source, false)
					if errors.Is(err, unix.ENOTBLK) {
						t.Skipf("no EROFS on a file here: %v", err)
					}
					if err != nil {
						t.Fatal(err)
					}
					defer meta.Close()
					m := mounter{opts: f.options()}
					var root *os.File
					run := func() (err error) { root, err = m.overlay(meta, how); return err }
					if how == byFd {
						err = run()
					} else {
						err = inPrivate(run)
					}
					if err != nil && retry(err) && how != byColon {
						t.Skipf("this kernel has no such way: %v", err)
					}
					if err != nil {
						t.Fatal(err)
					}
					defer root.Close()
					if err := Attach(root, f.target); err != nil {
						t.Fatal(err)
					}
					defer unix.Unmount(f.target, unix.MNT_DETACH)
					if how == byColon {
						if len(m.warnings) != 1 {
							t.Errorf("got warnings %q, want one", m.warnings)
						}
					}
					f.check(t, f.target)
				})
			}
		}
	}
}

// TestNoMountPoint is an initramfs that has none of the usual directories.
func TestNoMountPoint(t *testing.T) {
	f := newFixture(t, t.TempDir())
	defer func(old []string) { mountPoints = old }(mountPoints)
	mountPoints = []string{"/missing", "/"}
	image, err := os.Open(f.image)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	dev, err := openLoop(image)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	meta, err := mountErofs(dev.Name(), false)
	if err != nil {
		t.Fatal(err)
	}
	defer meta.Close()
	m := mounter{opts: f.options()}
	var root *os.File
	err = inPrivate(func() (err error) { root, err = m.overlay(meta, byString, byColons, byColon); return err })
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := Attach(root, f.target); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(f.target, unix.MNT_DETACH)
	f.check(t, f.target)
}

func TestWritable(t *testing.T) {
	f := newFixture(t, t.TempDir())
	dir := filepath.Dir(f.image)
	o := f.options()
	o.Upper, o.Work = dir+"/upper", dir+"/work"
	for _, d := range []string{o.Upper, o.Work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	f.mount(t, o)
	if err := os.WriteFile(f.target+"/other", []byte("new"), 0o644); err != nil {
		t.Error(err)
	}
	if err := os.Remove(f.target + "/sub/big"); err != nil {
		t.Error(err)
	}
	if err := Unmount(f.target); err != nil {
		t.Fatal(err)
	}
	upper, err := scan.Dir(context.Background(), o.Upper, scan.Hash(fsverity.SHA256), scan.Options{OverlayUpper: true})
	if err != nil {
		t.Fatal(err)
	}
	if n := upper.Lookup("sub/big"); n == nil || !n.IsWhiteout() {
		t.Errorf("sub/big: got %+v, want a whiteout", n)
	}
	if n := upper.Lookup("other"); n == nil || string(n.File.Inline) != "new" {
		t.Errorf("other: got %+v", n)
	}

	o.ReadOnly = true
	f.mount(t, o)
	if err := os.WriteFile(f.target+"/other", nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("ReadOnly: got %v, want EROFS", err)
	}
	if b, err := os.ReadFile(f.target + "/other"); string(b) != "new" {
		t.Errorf("other: got %q, %v", b, err)
	}
}

// TestSeveralObjectDirs looks for each file in one of two directories.
func TestSeveralObjectDirs(t *testing.T) {
	f := newFixture(t, t.TempDir())
	second := f.objects + "2"
	rel := f.tree.Lookup("other").File.Path()
	if err := os.MkdirAll(filepath.Join(second, filepath.Dir(rel)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(f.objects, rel), filepath.Join(second, rel)); err != nil {
		t.Fatal(err)
	}
	o := f.options()
	o.Objects = append(o.Objects, second)
	f.mount(t, o)
	f.check(t, f.target)
}

func TestDigest(t *testing.T) {
	f := newFixture(t, t.TempDir())
	o := f.options()
	o.Digest = fsverity.Sum(fsverity.SHA256, []byte("another"))
	_, err := Mount(f.target, o)
	if !errors.Is(err, ErrWrongDigest) || !strings.Contains(err.Error(), f.digest.String()) || !strings.Contains(err.Error(), o.Digest.String()) {
		t.Errorf("got %v, want ErrWrongDigest with both digests", err)
	}
	o.Digest = f.digest
	o.Verity = VerityRequire
	if _, err := Mount(f.target, o); !errors.Is(err, ErrNoVerity) {
		t.Errorf("got %v, want ErrNoVerity", err)
	}
	// No object has fs-verity: requiring it would make all files unreadable.
	o.Verity, o.ObjectsChecked = VerityTry, true
	if st := f.mount(t, o); st.Verity || st.Digest != f.digest || st.Measured || st.Verification != Checked {
		t.Errorf("got %+v, want the digest, checked", st)
	}
	f.check(t, f.target)
}

// TestVerity mounts on a filesystem with fs-verity, where there is one, and
// changes an object: below fs-verity it is the kernel that notices.
func TestVerity(t *testing.T) {
	dir := t.TempDir()
	f := newFixture(t, dir)
	if err := tryVerity(dir); err != nil {
		t.Skipf("no fs-verity in the temporary directory: %v", err)
	}
	if s := Probe(dir).VerityOpt; !s.OK {
		t.Skipf("this kernel's overlayfs has no verity=require: %s", s.Why)
	}
	enable := func(path string) {
		t.Helper()
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if err := fsverity.Enable(file, fsverity.SHA256); err != nil {
			t.Fatal(err)
		}
	}
	enable(f.image)
	big := filepath.Join(f.objects, f.tree.Lookup("sub/big").File.Path())
	enable(big)
	enable(filepath.Join(f.objects, f.tree.Lookup("other").File.Path()))
	if !veritySupported([]string{f.objects}) {
		t.Error("objects with fs-verity are taken for objects without")
	}

	o := f.options()
	o.Digest, o.Verity = f.digest, VerityRequire
	if st := f.mount(t, o); st.Verification != Enforced || !st.Measured || !st.Verity {
		t.Errorf("got %+v, want enforced", st)
	}
	f.check(t, f.target)
	list, err := List()
	if err != nil || len(list) == 0 || !list[len(list)-1].Verity {
		t.Errorf("List: got %+v, %v", list, err)
	}
	if err := Unmount(f.target); err != nil {
		t.Fatal(err)
	}

	if err := os.Remove(big); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(big, bytes.Repeat([]byte("bad"), 4000), 0o644); err != nil {
		t.Fatal(err)
	}
	enable(big)
	o.Verity = VerityTry
	if st := f.mount(t, o); st.Verification != Enforced {
		t.Errorf("got %+v, want enforced", st)
	}
	if _, err := os.ReadFile(f.target + "/sub/big"); !errors.Is(err, unix.EIO) {
		t.Errorf("reading a changed file: got %v, want EIO", err)
	}
	if _, err := os.ReadFile(f.target + "/other"); err != nil {
		t.Errorf("reading another file: %v", err)
	}
	other := fsverity.Sum(fsverity.SHA256, []byte("another"))
	o.Digest = other
	if _, err := Mount(f.target, o); !errors.Is(err, ErrWrongDigest) {
		t.Errorf("got %v, want ErrWrongDigest", err)
	}
}

func TestJudge(t *testing.T) {
	digest := fsverity.Sum(fsverity.SHA256, nil)
	for _, c := range []struct {
		digest, stored   bool // what the caller knows
		measured, verity bool // what the kernel does
		want             Verification
	}{
		{true, false, true, true, Enforced},
		{true, true, true, true, Enforced},
		{true, true, true, false, Checked},
		{true, true, false, true, Checked},
		{true, true, false, false, Checked},
		{true, false, false, true, Checked}, // files against the image, the image against the digest
		{true, false, true, false, None},
		{true, false, false, false, None},
		{false, true, true, true, None}, // any image at all would do
		{false, false, true, true, None},
		{false, true, false, false, None},
	} {
		o := Options{ObjectsChecked: c.stored}
		if c.digest {
			o.Digest = digest
		}
		st := State{Measured: c.measured, Verity: c.verity}
		o.judge(&st)
		if st.Verification != c.want || st.Why == "" {
			t.Errorf("%+v: got %s (%s)", c, st.Verification, st.Why)
		}
	}
}

func TestBadOptions(t *testing.T) {
	for name, o := range map[string]Options{
		"no image":   {Objects: []string{"/"}},
		"two images": {Path: "x", Image: os.Stdin, Objects: []string{"/"}},
		"no objects": {Path: "x"},
		"no work":    {Path: "x", Objects: []string{"/"}, Upper: "/"},
		"NUL":        {Path: "x", Objects: []string{"a\x00b"}},
	} {
		if _, err := Mount(t.TempDir(), o); !errors.Is(err, ErrOptions) {
			t.Errorf("%s: got %v, want ErrOptions", name, err)
		}
	}
	if _, err := Mount(t.TempDir(), Options{Path: t.TempDir() + "/missing", Objects: []string{"/"}}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: got %v, want ErrNotExist", err)
	}
}

func TestFailuresLeaveNothing(t *testing.T) {
	f := newFixture(t, t.TempDir())
	for _, loop := range []bool{false, true} {
		o := f.options()
		o.Loop = loop
		o.Objects = []string{f.objects + "/missing"}
		if _, err := Mount(f.target, o); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), o.Objects[0]) {
			t.Errorf("objects: got %v, want ErrNotExist", err)
		}
		o.Objects = []string{f.image}
		if _, err := Mount(f.target, o); !errors.Is(err, unix.ENOTDIR) {
			t.Errorf("objects: got %v, want ENOTDIR", err)
		}
		o = f.options()
		o.Loop = loop
		if _, err := Mount(f.target+"/missing", o); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("target: got %v, want ErrNotExist", err)
		}
		// The same directory twice is refused by the kernel, in every way to say it.
		o.Objects = []string{f.objects, f.objects}
		if _, err := Mount(f.target, o); err == nil {
			t.Error("the same objects twice: got no error")
			Unmount(f.target)
		}
	}
	if err := unix.Mount("tmpfs", f.target, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(f.target, 0)
	if err := Unmount(f.target); !errors.Is(err, ErrNotMounted) {
		t.Errorf("unmounting a tmpfs: got %v, want ErrNotMounted", err)
	}
}

func TestDetach(t *testing.T) {
	f := newFixture(t, t.TempDir())
	f.mount(t, f.options())
	file, err := os.Open(f.target + "/other")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := Detach(f.target); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(f.target + "/other"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	if b := make([]byte, 5); true {
		if _, err := file.Read(b); err != nil || string(b) != "other" {
			t.Errorf("the open file: got %q, %v", b, err)
		}
	}
}

func TestSymlinkTarget(t *testing.T) {
	f := newFixture(t, t.TempDir())
	link := f.target + "-link"
	if err := os.Symlink(filepath.Base(f.target), link); err != nil {
		t.Fatal(err)
	}
	if _, err := Mount(link, f.options()); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(f.target, unix.MNT_DETACH)
	f.check(t, f.target)
	if err := Unmount(link); err != nil {
		t.Error(err)
	}
}

func TestIDMap(t *testing.T) {
	f := newFixture(t, t.TempDir())
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 200000, Size: 80000}},
	}
	if err := cmd.Start(); err != nil {
		t.Skipf("no user namespaces here: %v", err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	o := f.options()
	o.UserNS = ns
	f.mount(t, o)
	var st unix.Stat_t
	if err := unix.Stat(f.target+"/other", &st); err != nil {
		t.Fatal(err)
	}
	if st.Uid != 101000 || st.Gid != 270000 {
		t.Errorf("got owner %d:%d, want 101000:270000", st.Uid, st.Gid)
	}
}

// TestStack lays two overlays on an image, as podman does with an additional layer.
func TestStack(t *testing.T) {
	f := newFixture(t, t.TempDir())
	features := Probe(f.objects)
	o := f.options()
	o.Loop = !features.FileStacks.OK
	f.mount(t, o)
	above := f.target + "2"
	if err := os.Mkdir(above, 0o755); err != nil {
		t.Fatal(err)
	}
	err := unix.Mount("overlay", above, "overlay", unix.MS_RDONLY, "lowerdir="+f.target+":"+filepath.Dir(f.image))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(above, 0)
	if b, err := os.ReadFile(above + "/sub/small"); string(b) != "small" {
		t.Errorf("got %q, %v", b, err)
	}
}

func TestSideBySide(t *testing.T) {
	f := newFixture(t, t.TempDir())
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			target := fmt.Sprint(f.target, i)
			o := f.options()
			o.Loop = i%2 == 0 // they race for free devices
			if err := os.Mkdir(target, 0o755); err != nil {
				t.Error(err)
				return
			}
			if _, err := Mount(target, o); err != nil {
				t.Error(err)
				return
			}
			if b, err := os.ReadFile(target + "/sub/small"); string(b) != "small" {
				t.Errorf("got %q, %v", b, err)
			}
			if err := Unmount(target); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}
