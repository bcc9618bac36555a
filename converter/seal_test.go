package converter

import (
	"errors"
	"maps"
	"testing"

	"github.com/particle-os/particle/converter/tree"
)

func dirNode(mtime int64, nsec uint32, children map[string]*tree.Node) *tree.Node {
	if children == nil {
		children = map[string]*tree.Node{}
	}
	return &tree.Node{Stat: tree.Stat{Mode: tree.DefaultDirMode, MtimeSec: mtime, MtimeNsec: nsec}, Dir: children}
}

func fileNode(xattrs map[string]string) *tree.Node {
	return &tree.Node{Stat: tree.Stat{Mode: tree.TypeRegular | 0o644, Xattrs: xattrs}, File: &tree.File{Inline: []byte("x"), Size: 1}}
}

// sample is an operating system's tree as builds leave it.
func sample() *tree.Tree {
	linked := fileNode(map[string]string{"security.capability": "cap", "security.selinux": "label"})
	t := tree.New()
	t.Root.Dir = map[string]*tree.Node{
		"usr":  dirNode(100, 5, map[string]*tree.Node{"ping": linked, "ping2": linked, "plain": fileNode(nil)}),
		"run":  dirNode(900, 9, map[string]*tree.Node{"secret": fileNode(nil)}),
		"boot": dirNode(901, 9, map[string]*tree.Node{"vmlinuz": fileNode(nil)}),
		"srv":  dirNode(902, 9, map[string]*tree.Node{"data": fileNode(map[string]string{"user.x": "1"})}),
	}
	t.Root.Dir["usr"].Mode = tree.TypeDir | 0o751
	return t
}

func TestSeal(t *testing.T) {
	in := sample()
	for _, kind := range Kinds {
		out, err := Seal(in, kind)
		if err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		if d := tree.Diff(in, sample()); len(d) != 0 {
			t.Fatalf("%s: Seal changed its argument: %v", kind, d)
		}
		if r := out.Root; r.Mode != tree.TypeDir|0o751 || r.MtimeSec != 100 || r.MtimeNsec != 5 || r.Implied {
			t.Errorf("%s: root has %+v, want the Stat of /usr", kind, r.Stat)
		}
		ping := out.Lookup("usr/ping")
		if ping != out.Lookup("usr/ping2") {
			t.Errorf("%s: /usr/ping and /usr/ping2 are no longer linked", kind)
		}
		wantXattrs := map[string]string{"security.capability": "cap"}
		if kind == Rootfs {
			wantXattrs["security.selinux"] = "label"
		}
		if !maps.Equal(ping.Xattrs, wantXattrs) {
			t.Errorf("%s: /usr/ping has xattrs %v, want %v", kind, ping.Xattrs, wantXattrs)
		}
		if got := out.Lookup("srv/data").Xattrs["user.x"] != ""; got != (kind == Rootfs) {
			t.Errorf("%s: user.x kept: %v", kind, got)
		}
		if got := out.Lookup("run/secret") != nil; got != (kind == Rootfs) {
			t.Errorf("%s: /run/secret kept: %v", kind, got)
		}
		if run := out.Lookup("run"); kind != Rootfs && (run.MtimeSec != 100 || run.MtimeNsec != 5) {
			t.Errorf("%s: /run is dated %d.%d, want 100.5", kind, run.MtimeSec, run.MtimeNsec)
		}
		if got := out.Lookup("boot/vmlinuz") != nil; got != (kind != Bootable) {
			t.Errorf("%s: /boot/vmlinuz kept: %v", kind, got)
		}
		sysroot := out.Lookup("sysroot")
		if got := sysroot != nil; got != (kind == Bootable) {
			t.Errorf("%s: /sysroot there: %v", kind, got)
		}
		if kind == Bootable && (out.Lookup("boot").MtimeSec != 100 || out.Lookup("boot").MtimeNsec != 9 || sysroot.MtimeSec != 100) {
			t.Errorf("%s: /boot or /sysroot is not dated as /usr", kind)
		}
	}
}

// TestSealIdempotent: a mounted sealed image, read again, seals to the same.
func TestSealIdempotent(t *testing.T) {
	for _, kind := range Kinds {
		once, err := Seal(sample(), kind)
		if err != nil {
			t.Fatal(err)
		}
		twice, err := Seal(once, kind)
		if err != nil {
			t.Fatal(err)
		}
		if d := tree.Diff(once, twice); len(d) != 0 {
			t.Errorf("%s: sealed twice differs: %v", kind, d)
		}
	}
}

func TestSealWithoutUsr(t *testing.T) {
	in := tree.New()
	in.Root.Implied, in.Root.Mode = false, tree.TypeDir|0o700
	in.Root.Dir["hello"] = fileNode(nil)
	for _, kind := range []Kind{Rootfs, Merged} {
		out, err := Seal(in, kind)
		if err != nil {
			t.Fatal(err)
		}
		want := uint32(tree.DefaultDirMode)
		if kind == Rootfs {
			want = tree.TypeDir | 0o700
		}
		if out.Root.Mode != want {
			t.Errorf("%s: root has mode %o, want %o", kind, out.Root.Mode, want)
		}
	}
	if _, err := Seal(in, Bootable); !errors.Is(err, ErrNotBootable) {
		t.Errorf("bootable: got %v, want ErrNotBootable", err)
	}
}
