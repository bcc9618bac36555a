package scan

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// testDir is a directory to be scanned.
type testDir struct {
	*testing.T
	root string
}

func newDir(t *testing.T) testDir {
	t.Helper()
	return testDir{t, t.TempDir()}
}

func (d testDir) path(name string) string { return d.root + "/" + name }

func (d testDir) check(err error) {
	d.Helper()
	if err != nil {
		d.Fatal(err)
	}
}

func (d testDir) mkdir(name string) { d.Helper(); d.check(os.Mkdir(d.path(name), 0o755)) }

func (d testDir) write(name, data string) {
	d.Helper()
	d.check(os.WriteFile(d.path(name), []byte(data), 0o644))
}

func (d testDir) scan(opts Options) *tree.Tree {
	d.Helper()
	tr, err := Dir(context.Background(), d.root, Hash(fsverity.SHA256), opts)
	d.check(err)
	return tr
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes devices, owners or mounts")
	}
}

// xattr sets an xattr, and skips the test where the filesystem has none.
func (d testDir) xattr(name, key, value string) {
	d.Helper()
	err := unix.Lsetxattr(d.path(name), key, []byte(value), 0)
	if err == unix.ENOTSUP || err == unix.EPERM {
		d.Skipf("cannot set xattr %s here: %v", key, err)
	}
	d.check(err)
}

func TestTypes(t *testing.T) {
	d := newDir(t)
	d.mkdir("dir")
	d.write("dir/empty", "")
	d.write("dir/small", strings.Repeat("s", 64))
	d.write("dir/large", strings.Repeat("l", 65))
	long := strings.Repeat("t", 4095)
	d.check(os.Symlink(long, d.path("link")))
	d.check(os.Symlink("/", d.path("root"))) // not to be followed
	d.check(unix.Mkfifo(d.path("fifo"), 0o600))
	d.check(unix.Mknod(d.path("socket"), unix.S_IFSOCK|0o600, 0))
	d.check(unix.Chmod(d.path("dir/large"), 0o4711))
	when := time.Unix(-5, 123456789) // before 1970
	d.check(os.Chtimes(d.path("dir/large"), when, when))
	d.check(os.Chtimes(d.path("dir"), when, when))

	tr := d.scan(Options{})
	if n := tr.Lookup("dir/empty"); n.File.Size != 0 || n.File.Inline != nil || !n.File.Object.IsZero() {
		t.Errorf("empty: got %+v", n.File)
	}
	if n := tr.Lookup("dir/small"); string(n.File.Inline) != strings.Repeat("s", 64) || !n.File.Object.IsZero() {
		t.Errorf("small: got %+v", n.File)
	}
	n := tr.Lookup("dir/large")
	if want := fsverity.Sum(fsverity.SHA256, bytes.Repeat([]byte("l"), 65)); n.File.Object != want || n.File.Inline != nil || n.File.Size != 65 {
		t.Errorf("large: got %+v, want object %s", n.File, want)
	}
	if n.Mode != tree.TypeRegular|0o4711 || n.MtimeSec != -5 || n.MtimeNsec != 123456789 || n.UID != uint32(os.Getuid()) {
		t.Errorf("large: got %+v", n.Stat)
	}
	if n := tr.Lookup("dir"); n.MtimeSec != -5 || n.MtimeNsec != 123456789 || n.Mode != tree.TypeDir|0o755 {
		t.Errorf("dir: got %+v", n.Stat)
	}
	if n := tr.Lookup("link"); n.Target != long || n.Type() != tree.TypeSymlink {
		t.Errorf("link: got a target of %d bytes", len(n.Target))
	}
	if n := tr.Lookup("root"); n.Target != "/" || n.Dir != nil {
		t.Errorf("root: got %+v", n)
	}
	for name, want := range map[string]uint32{"fifo": tree.TypeFIFO, "socket": tree.TypeSocket} {
		if n := tr.Lookup(name); n.Mode != want|0o600 {
			t.Errorf("%s: got mode %o", name, n.Mode)
		}
	}

	tr = d.scan(Options{UseEpoch: true, InlineSize: 65})
	if n := tr.Lookup("dir/large"); n.MtimeSec != 0 || n.MtimeNsec != 0 || len(n.File.Inline) != 65 {
		t.Errorf("large: got %+v %+v", n.Stat, n.File)
	}
	tr = d.scan(Options{InlineSize: -1})
	if n := tr.Lookup("dir/small"); n.File.Inline != nil || n.File.Object.IsZero() {
		t.Errorf("small: got %+v", n.File)
	}

	tr, err := Dir(context.Background(), d.root, nil, Options{})
	d.check(err)
	if n := tr.Lookup("dir/large"); n.File.Size != 65 || n.File.Inline != nil || !n.File.Object.IsZero() {
		t.Errorf("without objects: got %+v", n.File)
	}
}

func TestNames(t *testing.T) {
	d := newDir(t)
	names := []string{strings.Repeat("n", 255), "\xff\xfe", "new\nline", "back\\slash", " ", "-rf", "...", ".wh.x", "é", "\x01"}
	for _, name := range names {
		d.write(name, name)
	}
	tr := d.scan(Options{InlineSize: 255})
	if got := len(tr.Root.Dir); got != len(names) {
		t.Errorf("got %d names, want %d", got, len(names))
	}
	for _, name := range names {
		if n := tr.Root.Dir[name]; n == nil || string(n.File.Inline) != name {
			t.Errorf("%q: got %+v", name, n)
		}
	}
}

func TestHardLinks(t *testing.T) {
	d := newDir(t)
	d.mkdir("a")
	d.mkdir("b")
	d.write("a/x", strings.Repeat("x", 100))
	d.check(os.Link(d.path("a/x"), d.path("b/y")))
	d.write("z", strings.Repeat("x", 100))
	d.check(os.Symlink("t", d.path("s1")))
	d.check(os.Link(d.path("s1"), d.path("s2")))

	tr := d.scan(Options{})
	if tr.Lookup("a/x") != tr.Lookup("b/y") {
		t.Error("a/x and b/y are two nodes")
	}
	if tr.Lookup("s1") != tr.Lookup("s2") {
		t.Error("s1 and s2 are two nodes")
	}
	if tr.Lookup("a/x") == tr.Lookup("z") {
		t.Error("a/x and z are one node")
	}

	tr = d.scan(Options{SplitLinks: true})
	if x, y := tr.Lookup("a/x"), tr.Lookup("b/y"); x == y || x.File.Object != y.File.Object {
		t.Errorf("split: got %p %p", x, y)
	}
}

func TestXattrs(t *testing.T) {
	d := newDir(t)
	d.mkdir("dir")
	d.write("large", strings.Repeat("x", 100))
	d.write("empty", "")
	big := strings.Repeat("v", 3000)
	for _, name := range []string{"dir", "large", "empty", ""} {
		d.xattr(name, "user.big", big)
		d.xattr(name, "user.nul", "a\x00b")
		d.xattr(name, "user.empty", "")
	}
	tr := d.scan(Options{})
	for _, name := range []string{"dir", "large", "empty", ""} {
		x := tr.Lookup(name).Xattrs
		if v, ok := x["user.empty"]; x["user.big"] != big || x["user.nul"] != "a\x00b" || v != "" || !ok {
			t.Errorf("%q: got %d xattrs", name, len(x))
		}
	}
	if x := d.scan(Options{SkipXattrs: true}).Lookup("large").Xattrs; x != nil {
		t.Errorf("SkipXattrs: got %q", x)
	}
	_, err := Dir(context.Background(), d.root, nil, Options{SkipXattrs: true, UserXattrs: true})
	if !errors.Is(err, ErrOptions) {
		t.Errorf("got %v, want ErrOptions", err)
	}
}

func TestPrivilegedXattrs(t *testing.T) {
	needRoot(t)
	d := newDir(t)
	d.write("file", "x")
	d.check(os.Symlink("x", d.path("link")))
	d.check(unix.Mknod(d.path("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	d.check(unix.Mkfifo(d.path("fifo"), 0o600)) // opening it would block
	// A version 2 vfs_cap_data with cap_net_raw, permitted and effective.
	capability := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	d.xattr("file", "security.capability", capability)
	d.xattr("file", "trusted.overlay.redirect", "/x")
	d.xattr("file", "user.u", "u")
	// An ACL: version 2; user_obj rw, user 5 r, group_obj r, mask r, other none.
	acl := "\x02\x00\x00\x00" + "\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\x05\x00\x00\x00" +
		"\x04\x00\x04\x00\xff\xff\xff\xff" + "\x10\x00\x04\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"
	d.xattr("file", "system.posix_acl_access", acl)
	for _, name := range []string{"link", "null", "fifo"} {
		d.xattr(name, "trusted.t", name)
	}
	tr := d.scan(Options{})
	want := map[string]string{"security.capability": capability, "trusted.overlay.redirect": "/x", "user.u": "u", "system.posix_acl_access": acl}
	for key, value := range want {
		if got := tr.Lookup("file").Xattrs[key]; got != value {
			t.Errorf("%s: got %q, want %q", key, got, value)
		}
	}
	for _, name := range []string{"link", "null", "fifo"} {
		if got := tr.Lookup(name).Xattrs["trusted.t"]; got != name {
			t.Errorf("%s: got %q", name, got)
		}
	}
	if x := d.scan(Options{UserXattrs: true}).Lookup("file").Xattrs; len(x) != 1 || x["user.u"] != "u" {
		t.Errorf("UserXattrs: got %q", x)
	}
}

func TestDevices(t *testing.T) {
	needRoot(t)
	d := newDir(t)
	d.mkdir("dir")
	// Minor numbers over 255 and majors over 4095 need makedev's long form.
	d.check(unix.Mknod(d.path("dir/block"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 0x12345))))
	d.check(unix.Mknod(d.path("whiteout"), unix.S_IFCHR, 0))
	tr := d.scan(Options{})
	if n := tr.Lookup("dir/block"); tree.Major(n.Rdev) != 259 || tree.Minor(n.Rdev) != 0x12345 || n.Type() != tree.TypeBlock {
		t.Errorf("block: got %d:%d", tree.Major(n.Rdev), tree.Minor(n.Rdev))
	}
	if !tr.Lookup("whiteout").IsWhiteout() {
		t.Error("the whiteout is none")
	}
	tr = d.scan(Options{SkipDevices: true})
	if tr.Lookup("dir/block") != nil || tr.Lookup("whiteout") != nil || tr.Lookup("dir") == nil {
		t.Errorf("SkipDevices: got %v", tr.Root.Names())
	}
}

func TestOverlayUpper(t *testing.T) {
	needRoot(t)
	d := newDir(t)
	d.check(unix.Mknod(d.path("whiteout"), unix.S_IFCHR, 0))
	d.check(unix.Mknod(d.path("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	d.mkdir("opaque")
	d.xattr("opaque", "trusted.overlay.opaque", "y")
	d.xattr("opaque", "trusted.overlay.origin", "x")
	d.xattr("opaque", "user.u", "u")
	d.mkdir("rootless")
	d.xattr("rootless", "user.overlay.opaque", "y")
	d.xattr("", "trusted.overlay.impure", "y")

	for _, opts := range []Options{{}, {SkipDevices: true}, {SkipXattrs: true}, {UserXattrs: true}} {
		opts.OverlayUpper = true
		tr := d.scan(opts)
		if n := tr.Lookup("whiteout"); n == nil || !n.IsWhiteout() {
			t.Errorf("%+v: the whiteout is none", opts)
		}
		if !tr.Lookup("opaque").IsOpaque() || !tr.Lookup("rootless").IsOpaque() {
			t.Errorf("%+v: the opaque directories are none", opts)
		}
		want := 2
		if opts.SkipXattrs {
			want = 1
		}
		if x := tr.Lookup("opaque").Xattrs; len(x) != want {
			t.Errorf("%+v: got %q, want %d xattrs", opts, x, want)
		}
		if x := tr.Root.Xattrs; len(x) != 0 {
			t.Errorf("%+v: got %q", opts, x)
		}
		if got := tr.Lookup("null") == nil; got != opts.SkipDevices {
			t.Errorf("%+v: null left out: %t", opts, got)
		}
	}

	tr := d.scan(Options{OverlayUpper: true, TrustedXattrs: true})
	if n := tr.Lookup("rootless"); n.IsOpaque() || n.Xattrs["user.overlay.opaque"] != "y" {
		t.Errorf("TrustedXattrs: got %q, want the file's own user.overlay.opaque", n.Xattrs)
	}
	if !tr.Lookup("opaque").IsOpaque() {
		t.Error("TrustedXattrs: the opaque directory is none")
	}

	d.mkdir("moved")
	d.xattr("moved", "trusted.overlay.redirect", "/from")
	_, err := Dir(context.Background(), d.root, nil, Options{OverlayUpper: true, SkipXattrs: true})
	if !errors.Is(err, ErrNotLayer) || !strings.Contains(err.Error(), "moved") {
		t.Errorf("redirect: got %v, want ErrNotLayer", err)
	}
}

// TestDeep makes 5000 levels by way of relative names: the path has 20,000 bytes.
func TestDeep(t *testing.T) {
	const levels = 5000
	d := newDir(t)
	fd, err := unix.Open(d.root, dirFlags, 0)
	d.check(err)
	for i := range levels {
		name := "dir"
		d.check(unix.Mkdirat(fd, name, 0o755))
		if i%1000 == 999 {
			f, err := unix.Openat(fd, "file", unix.O_CREAT|unix.O_WRONLY, 0o644)
			d.check(err)
			_, err = unix.Write(f, []byte(fmt.Sprint(i)))
			d.check(err)
			d.check(unix.Close(f))
		}
		next, err := unix.Openat(fd, name, dirFlags, 0)
		d.check(err)
		unix.Close(fd)
		fd = next
	}
	d.check(unix.Close(fd))

	before := openFiles(t)
	tr := d.scan(Options{})
	if after := openFiles(t); after != before {
		t.Errorf("got %d open files, want %d as before", after, before)
	}
	n := tr.Root
	for i := range levels {
		if i%1000 == 999 {
			if got := string(n.Dir["file"].File.Inline); got != fmt.Sprint(i) {
				t.Fatalf("level %d: got %q", i, got)
			}
		}
		if n = n.Dir["dir"]; n == nil {
			t.Fatalf("got %d levels, want %d", i, levels)
		}
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skipf("cannot count open files: %v", err)
	}
	return len(names)
}

func TestOneFileSystem(t *testing.T) {
	needRoot(t)
	d := newDir(t)
	d.mkdir("in")
	d.write("in/file", "x")
	d.mkdir("tmpfs")
	d.mkdir("bind")
	d.write("bound", "under")
	mount := func(source, target, fstype string, flags uintptr) {
		t.Helper()
		if err := unix.Mount(source, d.path(target), fstype, flags, ""); err != nil {
			t.Skipf("cannot mount here: %v", err)
		}
		t.Cleanup(func() { unix.Unmount(d.path(target), unix.MNT_DETACH) })
	}
	mount("tmpfs", "tmpfs", "tmpfs", 0)
	d.write("tmpfs/file", "x")
	mount(d.path("in"), "bind", "", unix.MS_BIND)
	mount(d.path("in/file"), "bound", "", unix.MS_BIND)

	tr := d.scan(Options{OneFileSystem: true})
	for _, name := range []string{"tmpfs", "bind"} {
		if n := tr.Lookup(name); n == nil || !n.IsDir() || n.Dir == nil || len(n.Dir) != 0 {
			t.Errorf("%s: got %+v, want an empty directory", name, n)
		}
	}
	if n := tr.Lookup("bound"); n != nil {
		t.Errorf("bound: got %+v, want it left out", n)
	}
	if tr.Lookup("in/file") == nil {
		t.Error("in/file is missing")
	}

	tr = d.scan(Options{})
	for _, name := range []string{"tmpfs/file", "bind/file", "bound"} {
		if n := tr.Lookup(name); n == nil || string(n.File.Inline) != "x" {
			t.Errorf("%s: got %+v", name, n)
		}
	}
}

func TestNoPermission(t *testing.T) {
	d := newDir(t)
	d.mkdir("closed")
	d.write("closed/file", "x")
	d.check(os.Chmod(d.path("closed"), 0))
	t.Cleanup(func() { os.Chmod(d.path("closed"), 0o755) })
	tr, err := Dir(context.Background(), d.root, Hash(fsverity.SHA256), Options{})
	if os.Geteuid() != 0 {
		if !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "closed") {
			t.Errorf("got %v, want a permission error about closed", err)
		}
		return
	}
	d.check(err)
	if n := tr.Lookup("closed"); n.Mode != tree.TypeDir || string(n.Dir["file"].File.Inline) != "x" {
		t.Errorf("got %+v", n)
	}
}

func TestBadRoot(t *testing.T) {
	d := newDir(t)
	d.write("file", "x")
	d.check(os.Symlink(".", d.path("link")))
	if _, err := Dir(context.Background(), d.path("file"), nil, Options{}); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("file: got %v, want ENOTDIR", err)
	}
	if _, err := Dir(context.Background(), d.path("missing"), nil, Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: got %v, want ErrNotExist", err)
	}
	if tr, err := Dir(context.Background(), d.path("link"), nil, Options{}); err != nil || tr.Lookup("file") == nil {
		t.Errorf("link: got %v", err)
	}
}

func TestSparse(t *testing.T) {
	d := newDir(t)
	d.write("sparse", "")
	const size = 5<<20 + 1
	d.check(os.Truncate(d.path("sparse"), size))
	want, _, err := fsverity.Read(fsverity.SHA512, io.LimitReader(zeros{}, size))
	d.check(err)
	tr, err := Dir(context.Background(), d.root, Hash(fsverity.SHA512), Options{})
	d.check(err)
	if f := tr.Lookup("sparse").File; f.Size != size || f.Object != want {
		t.Errorf("got %+v, want %s", f, want)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
