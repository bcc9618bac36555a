package mount

import (
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

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/scan"
)

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
