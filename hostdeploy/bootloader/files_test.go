package bootloader

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// fakeFAT has every directory on FAT, where a file begins at the block of its inode's
// number: hard links are the two names that a crash in a rename leaves there.
func fakeFAT(t *testing.T) {
	oldFAT, oldBlock := isFAT, firstBlock
	t.Cleanup(func() { isFAT, firstBlock = oldFAT, oldBlock })
	isFAT = func(string) bool { return true }
	firstBlock = func(name string) (uint32, error) {
		fi, err := os.Lstat(name)
		if err != nil {
			return 0, err
		}
		return uint32(fi.Sys().(*syscall.Stat_t).Ino), nil
	}
}

// TestFATSharedClusters: none of two names with the same clusters is removed.
func TestFATSharedClusters(t *testing.T) {
	fakeFAT(t)
	l, boot := hosts[0].open(t)
	add(t, l, entry(11, nil), entry(12, &Counter{Left: 3}))
	dir := filepath.Join(boot, "loader/entries")
	link := func(from, to string) {
		t.Helper()
		if err := os.Link(filepath.Join(dir, from), filepath.Join(dir, to)); err != nil {
			t.Fatal(err)
		}
	}
	link("particle-11.conf", ".particle-particle-11.conf-0.tmp") // our rename
	link("particle-12+3.conf", "particle-12+2-1.conf")           // systemd-boot's
	if err := os.WriteFile(filepath.Join(dir, ".particle-x-0.tmp"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range list {
		fi, err := f.Info()
		if err != nil {
			t.Fatal(err)
		}
		if n := fi.Sys().(*syscall.Stat_t).Nlink; n != 2 {
			t.Errorf("%s has %d names, want 2: one was removed", f.Name(), n)
		}
		names = append(names, f.Name())
	}
	if got, want := strings.Join(names, " "), ".particle-lost-0.tmp .particle-particle-11.conf-0.tmp particle-11.conf particle-12+3.conf"; got != want {
		t.Errorf("got files %q, want %q", got, want)
	}
	wantIDs(t, l, "particle-12", "particle-11")
	if err := l.Remove("particle-11"); err != nil {
		t.Fatal(err)
	}
	wantIDs(t, l, "particle-12")
	if _, err := os.Stat(filepath.Join(dir, ".particle-lost-1.tmp")); err != nil {
		t.Error("the removed name is not kept for fsck.fat")
	}
	// Where nothing can be known, nothing is removed.
	firstBlock = func(string) (uint32, error) { return 0, errors.New("not permitted") }
	if err := l.Remove("particle-12"); err != nil {
		t.Fatal(err)
	}
	wantIDs(t, l)
}

// TestUpperCase: FAT has names in any case.
func TestUpperCase(t *testing.T) {
	l, boot := hosts[0].open(t)
	add(t, l, entry(11, nil))
	dir := filepath.Join(boot, "loader/entries")
	if err := os.Rename(filepath.Join(dir, "particle-11.conf"), filepath.Join(dir, "PARTICLE-11+1.CONF")); err != nil {
		t.Fatal(err)
	}
	if err := l.Good("particle-11"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "particle-11.conf")); err != nil {
		t.Error(err)
	}
	if err := l.Remove("particle-11"); err != nil {
		t.Fatal(err)
	}
}

// TestLoaderConf: nothing in loader.conf may choose another entry.
func TestLoaderConf(t *testing.T) {
	l, boot := hosts[0].open(t)
	name := filepath.Join(boot, "loader/loader.conf")
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte("default @saved\ntimeout 7\n# mine\neditor no\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for n := range 2 {
		add(t, l, entry(1, nil))
		if got := nextBLS(t, boot); got != "particle-1" {
			t.Errorf("systemd-boot would boot %q", got)
		}
		if n > 0 {
			if err := l.Sync(); err != nil {
				t.Fatal(err)
			}
		}
		const want = "# default @saved (Particle: the first entry is the default)\ntimeout    7\n# mine\neditor     no\n"
		if got := readMenu(t, boot, "loader/loader.conf"); got != want {
			t.Errorf("got\n%swant\n%s", got, want)
		}
	}
	s, err := Paths{Boot: boot}.settings()
	if err != nil || s != (settings{timeout: 7}) {
		t.Errorf("got %+v, %v", s, err)
	}
	if err := os.WriteFile(filepath.Join(boot, "loader/particle.conf"), []byte("serial 115200; reboot\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := (Paths{Boot: boot}).settings(); !errors.Is(err, ErrMenu) {
		t.Errorf("got error %v, want %v", err, ErrMenu)
	}
}

// TestSettle looks at a file system as a loader does that cannot read its journal: on the
// disk, while it is mounted.
func TestSettle(t *testing.T) {
	needRoot(t)
	img := filepath.Join(t.TempDir(), "ext4")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, 16*mib); err != nil {
		t.Fatal(err)
	}
	command(t, "mkfs.ext4", "e2fsprogs", append([]string{"-q", "-F", img}, plainExt4...)...)
	out, err := exec.Command(program(t, "losetup", "mount"), "--find", "--show", img).Output()
	if err != nil {
		t.Skipf("no loop device: %v", err)
	}
	loop := strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command("losetup", "--detach", loop).Run() })
	boot := t.TempDir()
	if err := unix.Mount(loop, boot, "ext4", 0, "commit=600"); err != nil {
		t.Skipf("no ext4 mount here: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(boot, 0) })
	var version unix.Utsname
	unix.Uname(&version)
	l := uboot{entryDir{Paths{Boot: boot}}}
	for n := range 3 {
		add(t, l, entry(n+1, nil))
		seen := command(t, "debugfs", "e2fsprogs", "-R", "cat /extlinux/extlinux.conf", img)
		if !strings.Contains(seen, readMenu(t, boot, "extlinux/extlinux.conf")) {
			t.Fatalf("Linux %s: on the disk is\n%s", unix.ByteSliceToString(version.Release[:]), seen)
		}
	}
}
