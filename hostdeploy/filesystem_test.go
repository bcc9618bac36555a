package hostdeploy

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCanVerity(t *testing.T) {
	if err := (&FileSystem{Type: "btrfs"}).CanVerity(); err != nil {
		t.Errorf("btrfs: %v", err)
	}
	if err := (&FileSystem{Type: "xfs"}).CanVerity(); !errors.Is(err, ErrNoVerity) {
		t.Errorf("xfs: got %v, want ErrNoVerity", err)
	}
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		t.Skip("there is no mkfs.ext4 here (Debian package e2fsprogs)")
	}
	for features, want := range map[string]bool{"verity": true, "^verity": false} {
		name := filepath.Join(t.TempDir(), "fs")
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(name, 8<<20); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(mkfs, "-q", "-O", features, name).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		err := (&FileSystem{Type: "ext4", Device: name}).CanVerity()
		if (err == nil) != want || err != nil && !strings.Contains(err.Error(), "tune2fs -O verity "+name) {
			t.Errorf("%s: got %v", features, err)
		}
	}
}

func TestFileSystemLines(t *testing.T) {
	fs := &FileSystem{Device: "/dev/vda2", Type: "btrfs", UUID: "1-2", Subvolume: "/@root"}
	if got, want := fs.RootArgs().String(), "root=UUID=1-2 rootfstype=btrfs rw rootflags=subvol=/@root"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := fs.Fstab("/boot"), "UUID=1-2 /boot btrfs subvol=/@root 0 2\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	esp := &FileSystem{Type: "vfat", UUID: "AB-CD"}
	if got, want := esp.Fstab("/boot"), "UUID=AB-CD /boot vfat umask=0077 0 2\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestBootPaths: a loader sees files by their path in their file system, wherever that is
// mounted.
func TestBootPaths(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	disk, boot, esp := filepath.Join(dir, "disk"), filepath.Join(dir, "boot"), filepath.Join(dir, "disk/efi")
	mounted := func(source, target, fstype string, flags uintptr) {
		t.Helper()
		if err := os.MkdirAll(target, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(source, target, fstype, flags, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(target, 0); err != nil {
				t.Errorf("unmounting %q: %v", target, err)
			}
		})
	}
	mounted("tmpfs", disk, "tmpfs", 0)
	if err := os.Mkdir(filepath.Join(disk, "boot"), 0o755); err != nil {
		t.Fatal(err)
	}
	mounted(filepath.Join(disk, "boot"), boot, "", unix.MS_BIND)
	mounted("tmpfs", esp, "tmpfs", 0)
	for name, want := range map[string]string{filepath.Join(disk, "boot"): "/boot", boot: "/boot", esp: ""} {
		p, err := BootPaths(name)
		if err != nil || p.Boot != name || p.Prefix != want {
			t.Errorf("%s: got %+v, %v; want the prefix %q", name, p, err, want)
		}
	}
	if _, err := BootPaths(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a directory that is not there: got %v", err)
	}
}
