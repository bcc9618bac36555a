package initramfs

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/store"
)

// hasVerity reports whether the tests' directory can have fs-verity: then a store made
// there promises it.
func hasVerity(t *testing.T) bool {
	return mount.Probe(t.TempDir()).FsVerity.OK
}

func TestSetup(t *testing.T) {
	d := newDisk(t)
	image := d.deploy(t, bootable(nil))
	b := d.mounted(t)
	r, err := b.setup(t, "quiet "+insecure(image))
	if err != nil {
		t.Fatal(err)
	}
	want := mount.Checked
	if hasVerity(t) {
		want = mount.Enforced
	}
	if r.Verification != want || r.Digest != image || r.ImageDigest != image || r.Deployment != image.String() || !r.Insecure || r.Why == "" || r.Kernel == "" {
		t.Errorf("got %+v", r)
	}
	if got, err := readReport(filepath.Join(b.run, reportName)); err != nil || got.Device != r.Device || got.Verification != r.Verification {
		t.Errorf("boot.json: got %+v, %v", got, err)
	}
	if dev, err := deviceOf(b.root); err != nil || dev != r.Device {
		t.Errorf("device: got %s, %v, want %s", r.Device, err, dev)
	}

	wantFile(t, b.path("usr/share/large"), strings.Repeat("large", 5000))
	wantFile(t, b.path("etc/state"), "of the state\n")
	wantFile(t, b.path("var/shared"), "of all\n")
	wantFile(t, b.path("sysroot/state/os/default/var/shared"), "of all\n")
	if _, err := os.Stat(b.path("etc/image")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the image's own /etc shows: %v", err)
	}
	if err := os.WriteFile(b.path("usr/new"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing to /usr: got %v, want EROFS", err)
	}
	for _, name := range []string{"etc/new", "var/new", "sysroot/new"} {
		if err := os.WriteFile(b.path(name), []byte(name), 0o644); err != nil {
			t.Error(err)
		}
	}
	wantFile(t, d.path("state/deploy/"+image.String()+"/etc/new"), "etc/new")
	wantFile(t, d.path("state/os/default/var/new"), "var/new")
	wantFile(t, d.path("new"), "sysroot/new")
	if _, err := os.Stat(filepath.Join(b.run, "transient")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a tmpfs for nothing: %v", err)
	}
}

// TestShared is the initramfs of systemd, where all mounts are shared.
func TestShared(t *testing.T) {
	d := newDisk(t)
	image := d.deploy(t, bootable(nil))
	b := d.mounted(t)
	above := filepath.Dir(b.root)
	if err := unix.Mount(above, above, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		t.Fatal(err)
	}
	defer unmountAll(above)
	if err := unix.Mount("", above, "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := b.setup(t, insecure(image)); err != nil {
		t.Fatal(err)
	}
	wantFile(t, b.path("etc/state"), "of the state\n")
	wantFile(t, b.path("sysroot/state/os/default/var/shared"), "of all\n")
}

func TestTransient(t *testing.T) {
	d := newDisk(t)
	image := d.deploy(t, bootable(nil))
	b := d.mounted(t)
	if err := os.Chmod(d.path("state/deploy/"+image.String()+"/etc"), 0o751); err != nil {
		t.Fatal(err)
	}
	r, err := b.setup(t, insecure(image)+" particle.root=transient particle.etc=transient particle.var=transient")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(r.Transient, []string{"root", "etc", "var"}) {
		t.Errorf("got %q", r.Transient)
	}
	for _, name := range []string{"usr/share/large", "usr/new", "etc/state", "etc/new", "var/shared", "var/new"} {
		if err := os.WriteFile(b.path(name), []byte("changed"), 0o644); err != nil {
			t.Error(err)
		}
		wantFile(t, b.path(name), "changed")
	}
	for name, want := range map[string]string{
		"state/deploy/" + image.String() + "/etc/state": "of the state\n",
		"state/os/default/var/shared":                   "of all\n",
		object(strings.Repeat("large", 5000)):           strings.Repeat("large", 5000),
	} {
		wantFile(t, d.path(name), want)
	}
	if files, err := os.ReadDir(d.path("state/os/default/var")); err != nil || len(files) != 1 {
		t.Errorf("the state was written to: got %v, %v", files, err)
	}
	if info, err := os.Stat(b.path("etc")); err != nil || info.Mode().Perm() != 0o751 {
		t.Errorf("/etc: got %v, %v, want mode 751", info, err)
	}
	if _, err := os.Stat(filepath.Join(b.run, "transient")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the tmpfs can be seen: %v", err)
	}
}

// TestReadOnlyDisk is what initramfs-tools leaves without "rw" on the command line.
func TestReadOnlyDisk(t *testing.T) {
	d := newDisk(t)
	image := d.deploy(t, bootable(nil))
	base := t.TempDir()
	needMounts(t)
	b := boot{filepath.Join(base, "root"), filepath.Join(base, "run")}
	if err := os.Mkdir(b.root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", b.root, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		for isMount(b.root) && unmountAll(b.root) == nil {
		}
	}()
	if err := os.CopyFS(b.root, os.DirFS(d.dir)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", b.root, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := b.setup(t, insecure(image)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"etc/new", "var/new", "sysroot/new"} {
		if err := os.WriteFile(b.path(name), nil, 0o644); err != nil {
			t.Error(err)
		}
	}
}

// TestDevices has /dev below the physical root already, where the script of udev in
// initramfs-tools moves it.
func TestDevices(t *testing.T) {
	d := newDisk(t)
	image := d.deploy(t, bootable(nil))
	d.mkdir(t, "dev")
	b := d.mounted(t)
	if err := unix.Mount("tmpfs", b.path("dev"), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.path("dev/here"), []byte("yes"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := b.setup(t, insecure(image)); err != nil {
		t.Fatal(err)
	}
	wantFile(t, b.path("dev/here"), "yes")
	if isMount(b.path("sysroot/dev")) {
		t.Error("/sysroot/dev is still mounted")
	}
}

func TestChoice(t *testing.T) {
	d := newDisk(t)
	image := d.deploy(t, bootable(nil))
	d.state(t, image.String()+".2")
	d.write(t, "state/deploy/"+image.String()+".2/etc/state", "second")
	other := fsverity.Sum(fsverity.SHA256, []byte("other"))

	b := d.mounted(t)
	r, err := b.setup(t, insecure(other)+" composefs=?"+image.String()+" particle.deployment="+image.String()+".2")
	if err != nil {
		t.Fatal(err)
	}
	if r.Digest != image || r.Deployment != image.String()+".2" {
		t.Errorf("got %+v", r)
	}
	wantFile(t, b.path("etc/state"), "second")

	b = d.mounted(t)
	if _, err := b.setup(t, insecure(other)); !errors.Is(err, ErrImage) || !strings.Contains(err.Error(), other.String()) {
		t.Errorf("got %v, want ErrImage with the digest", err)
	}
}

// TestDamagedLink: the link of an image that is no link of a store's does not keep the next
// image from booting, and is told of in any case.
func TestDamagedLink(t *testing.T) {
	d := newDisk(t)
	image := d.deploy(t, bootable(nil))
	bad := fsverity.Sum(fsverity.SHA256, []byte("bad"))
	if err := os.Symlink("../elsewhere", d.path(storeDir+"/images/"+bad.String())); err != nil {
		t.Fatal(err)
	}
	b := d.mounted(t)
	r, err := b.setup(t, insecure(bad)+" composefs=?"+image.String())
	if err != nil {
		t.Fatal(err)
	}
	if r.Digest != image || !strings.Contains(strings.Join(r.Warnings, "\n"), bad.String()) {
		t.Errorf("got %+v, want image %s and a warning of %s", r, image, bad)
	}

	b = d.mounted(t)
	_, err = b.setup(t, insecure(bad))
	if !errors.Is(err, ErrImage) || !errors.Is(err, store.ErrCorrupt) || !strings.Contains(err.Error(), "../elsewhere") {
		t.Errorf("got %v, want ErrImage and ErrCorrupt with the link", err)
	}
}

// TestRefused has systems that must not be booted: the physical root stays where it is.
func TestRefused(t *testing.T) {
	for name, c := range map[string]struct {
		system system
		break_ func(t *testing.T, d disk, image fsverity.Digest)
		args   func(image fsverity.Digest) string
		want   error
		text   string
	}{
		"no arguments":  {args: func(fsverity.Digest) string { return "quiet" }, want: ErrNotDeployed},
		"bad arguments": {args: func(fsverity.Digest) string { return "composefs.digest=x" }, want: ErrArgs},
		"no store": {
			break_: func(t *testing.T, d disk, _ fsverity.Digest) { remove(t, d, storeDir) },
			want:   ErrRoot, text: "did not install",
		},
		// The name of an object is not enough to have it mounted.
		"unknown under images/": {
			break_: func(t *testing.T, d disk, image fsverity.Digest) { remove(t, d, storeDir+"/images/"+image.String()) },
			want:   ErrImage,
		},
		"image's object is gone": {
			break_: func(t *testing.T, d disk, image fsverity.Digest) { remove(t, d, storeDir+"/objects/"+image.Path()) },
			want:   ErrImage,
		},
		"image changed": {
			break_: func(t *testing.T, d disk, image fsverity.Digest) { d.tamper(t, storeDir+"/objects/"+image.Path()) },
			want:   mount.ErrWrongDigest, text: "fsck",
		},
		"image swapped": {
			break_: func(t *testing.T, d disk, image fsverity.Digest) {
				other := d.deploy(t, bootable(system{"other": "other"}))
				link := d.path(storeDir + "/images/" + image.String())
				if err := errors.Join(os.Remove(link), os.Symlink("../objects/"+other.Path(), link)); err != nil {
					t.Fatal(err)
				}
			},
			want: mount.ErrWrongDigest,
		},
		"no state": {
			break_: func(t *testing.T, d disk, _ fsverity.Digest) { remove(t, d, "state") },
			want:   ErrState,
		},
		"no deployment": {
			break_: func(t *testing.T, d disk, image fsverity.Digest) { remove(t, d, "state/deploy/"+image.String()) },
			want:   ErrState, text: "/etc of deployment",
		},
		"no var": {
			break_: func(t *testing.T, d disk, _ fsverity.Digest) { remove(t, d, "state/os/default/var") },
			want:   ErrState, text: "/var of deployment",
		},
		"etc is a link": {
			break_: func(t *testing.T, d disk, image fsverity.Digest) {
				relink(t, d, "state/deploy/"+image.String()+"/etc", "../../os/default/var")
			},
			want: ErrState, text: "symbolic link",
		},
		"var leads out": {
			break_: func(t *testing.T, d disk, image fsverity.Digest) {
				relink(t, d, "state/deploy/"+image.String()+"/var", "../../../composefs")
			},
			want: ErrState, text: "leads out of the state",
		},
		"var is absolute": {
			break_: func(t *testing.T, d disk, image fsverity.Digest) {
				relink(t, d, "state/deploy/"+image.String()+"/var", "/var")
			},
			want: ErrState, text: "leads out of the state",
		},
		"no sysroot":       {system: system{"sysroot": ""}, want: ErrSystem, text: "/sysroot"},
		"no etc":           {system: system{"etc": "", "etc/image": ""}, want: ErrSystem, text: "/etc"},
		"var links away":   {system: system{"var": "", "var2/": "x", "usr/var/": "x"}, want: ErrSystem, text: "/var"},
		"no init":          {system: system{"usr/sbin/init": ""}, want: ErrSystem, text: "no init"},
		"a shell only":     {system: system{"usr/sbin/init": "", "bin/sh": "*#!/bin/true"}, want: ErrSystem, text: "no init"},
		"init is no file":  {system: system{"usr/sbin/init": "", "usr/sbin/init/": "x"}, want: ErrSystem, text: "no init"},
		"other init":       {args: func(d fsverity.Digest) string { return insecure(d) + " init=/usr/bin/other" }, want: ErrSystem, text: "/usr/bin/other"},
		"init not allowed": {system: system{"usr/sbin/init": "not executable"}, want: ErrSystem, text: "no init"},
		"verity wanted": {
			args: secure, want: ErrVerity, text: "put a ? before the digest",
			break_: func(t *testing.T, d disk, _ fsverity.Digest) {
				if hasVerity(t) {
					t.Skip("there is fs-verity here")
				}
			},
		},
		"verity asked for": {
			args: secure, want: ErrVerity, text: "tune2fs",
			break_: func(t *testing.T, d disk, _ fsverity.Digest) {
				if hasVerity(t) {
					t.Skip("there is fs-verity here")
				}
				d.write(t, verityMark, "")
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			needMounts(t)
			d := newDisk(t)
			image := d.deploy(t, bootable(c.system))
			d.write(t, "physical", "root")
			if c.break_ != nil {
				c.break_(t, d, image)
			}
			args := insecure(image)
			if c.args != nil {
				args = c.args(image)
			}
			b := d.mounted(t)
			r, err := b.setup(t, args)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, %v, want %v with %q", r, err, c.want, c.text)
			}
			wantFile(t, b.path("physical"), "root")
			if files, _ := os.ReadDir(b.run); len(files) > 0 {
				t.Errorf("left in the run directory: %v", files)
			}
		})
	}
	t.Run("nothing mounted", func(t *testing.T) {
		dir := t.TempDir()
		_, err := Setup(t.Context(), Options{Root: dir, Cmdline: "composefs=" + hexA, Run: dir})
		if !errors.Is(err, ErrRoot) || !strings.Contains(err.Error(), "nothing is mounted") {
			t.Errorf("got %v, want ErrRoot", err)
		}
		if _, err := Setup(t.Context(), Options{Root: dir + "/missing", Cmdline: "composefs=" + hexA, Run: dir}); !errors.Is(err, ErrRoot) {
			t.Errorf("got %v, want ErrRoot", err)
		}
	})
}

func remove(t *testing.T, d disk, name string) {
	t.Helper()
	if _, err := os.Lstat(d.path(name)); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(d.path(name)); err != nil {
		t.Fatal(err)
	}
}

func relink(t *testing.T, d disk, name, target string) {
	t.Helper()
	remove(t, d, name)
	if err := os.Symlink(target, d.path(name)); err != nil {
		t.Fatal(err)
	}
}

// TestMarkWithoutVerity boots from a store that waits for fs-verity on a machine that
// has none: the next machine may.
func TestMarkWithoutVerity(t *testing.T) {
	needMounts(t)
	if hasVerity(t) {
		t.Skip("there is fs-verity here")
	}
	d := newDisk(t)
	image := d.deploy(t, bootable(nil))
	d.write(t, verityMark, "")
	r, err := d.mounted(t).setup(t, insecure(image))
	if err != nil {
		t.Fatal(err)
	}
	if r.Verification != mount.Checked || r.Enabled != nil || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "fs-verity") {
		t.Errorf("got %+v", r)
	}
	if _, err := os.Stat(d.path(verityMark)); err != nil {
		t.Errorf("the mark is gone: %v", err)
	}
}

func TestPrepareNext(t *testing.T) {
	d := newDisk(t)
	image := d.deploy(t, bootable(nil))
	second := d.deploy(t, bootable(system{"usr/share/version": "2"}))
	d.write(t, "state/deploy/"+second.String()+"/etc/state", "second")
	b := d.mounted(t)
	if _, err := b.setup(t, insecure(image)); err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(t.TempDir(), "nextroot")
	defer CancelNext(target)
	o := Options{Root: b.path("sysroot"), Cmdline: insecure(second), Run: b.run}
	for range 2 { // the second time in the place of the first
		r, err := PrepareNext(t.Context(), o, target)
		if err != nil {
			t.Fatal(err)
		}
		if r.Digest != second {
			t.Errorf("got %+v", r)
		}
		wantFile(t, filepath.Join(target, "usr/share/version"), "2")
		wantFile(t, filepath.Join(target, "etc/state"), "second")
		wantFile(t, filepath.Join(target, "var/shared"), "of all\n")
		wantFile(t, filepath.Join(target, "sysroot/state/os/default/var/shared"), "of all\n")
	}
	// The running system is as it was, and the report of each root is its own.
	wantFile(t, b.path("etc/state"), "of the state\n")
	for root, want := range map[string]fsverity.Digest{b.root: image, target: second} {
		if r, err := readFor(b.run, root); err != nil || r.Digest != want {
			t.Errorf("report of %s: got %+v, %v, want %s", root, r, err, want)
		}
	}
	o.Cmdline = insecure(fsverity.Sum(fsverity.SHA256, nil))
	if _, err := PrepareNext(t.Context(), o, target); !errors.Is(err, ErrImage) {
		t.Errorf("got %v, want ErrImage", err)
	}
	if err := CancelNext(target); err != nil || isMount(target) {
		t.Errorf("CancelNext: got %v", err)
	}
	if err := CancelNext(target); err != nil {
		t.Errorf("CancelNext without anything: got %v", err)
	}
}
