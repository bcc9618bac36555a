package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/hostdeploy/bootloader"
)

var (
	efi      = bootloader.Layout{ESP: true}
	grubBIOS = bootloader.Layout{BIOSBoot: true}
	extlinux = bootloader.Layout{Active: true, Ext4Options: []string{"-O", "^64bit,^metadata_csum"}}
)

// need skips where a foreign program is missing; packages are Debian's.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		pkg := packages[p]
		if pkg == "" {
			pkg = map[string]string{
				"sgdisk": "gdisk", "sfdisk": "fdisk", "e2fsck": "e2fsprogs", "tune2fs": "e2fsprogs", "btrfs": "btrfs-progs",
				"xfs_repair": "xfsprogs", "mtype": "mtools", "losetup": "mount", "unshare": "util-linux",
			}[p]
		}
		if _, err := lookPath(p); err != nil {
			t.Skipf("%s is missing (Debian package %s)", p, pkg)
		}
	}
}

// needLoops skips where loop devices and mounts cannot be had, and fails the test if any are left.
func needLoops(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: attaches loop devices and mounts")
	}
	f, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no loop devices here: %v", err)
	}
	f.Close()
	need(t, "wipefs", "partx", "blkid")
	noLeaks(t)
}

// noLeaks compares mounts, loop devices and directories of this package, now and when the
// test ends. Others use the machine as well, so only what is ours counts.
func noLeaks(t *testing.T) {
	t.Helper()
	t.Setenv("TMPDIR", t.TempDir())
	tmp := os.TempDir()
	root := filepath.Dir(tmp) // of all directories of this test
	t.Cleanup(func() {
		var left []string
		if !settle(func() bool {
			left = nil
			entries, err := mountinfo()
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				if strings.HasPrefix(e.Target, root) {
					left = append(left, "mount "+e.Target)
				}
			}
			files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
			for _, f := range files {
				if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), root) {
					left = append(left, f+" "+strings.TrimSpace(string(b)))
				}
			}
			dirs, _ := filepath.Glob(tmp + "/particle-disk-*")
			left = append(left, dirs...)
			return len(left) == 0
		}) {
			t.Errorf("left behind: %q", left)
		}
	})
}

// tool runs a program that has to succeed.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	path, err := lookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func create(t *testing.T, path string, o Options) *Disk {
	t.Helper()
	d, err := Create(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func noise(seed uint64, n int) []byte {
	var key [32]byte
	key[0] = byte(seed)
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return b
}

// attachPart puts a loop device over a partition for the judges, until the function it
// returns, or the test's end.
func attachPart(t *testing.T, path string, p *Partition, sector int) (dev string, detach func()) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, err := attachLoop(f, p.Start, p.Size, sector)
	if err != nil {
		t.Fatal(err)
	}
	detach = sync.OnceFunc(func() {
		if err := l.close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(detach)
	return l.path, detach
}

// judge has foreign programs check a finished disk.
func judge(t *testing.T, d *Disk) {
	t.Helper()
	disk := d.Path
	if d.Sector != 512 {
		// The partitioners take a file's sectors to be 512 bytes.
		dev, detach := attachPart(t, d.Path, &Partition{Size: d.Size}, d.Sector)
		defer detach()
		disk = dev
	}
	if out := tool(t, "sgdisk", "-v", disk); !strings.Contains(out, "No problems found") || strings.Contains(strings.ToLower(out), "caution") {
		t.Errorf("sgdisk -v: %s", out)
	}
	if out := tool(t, "sfdisk", "--verify", disk); !strings.Contains(out, "No errors detected") {
		t.Errorf("sfdisk --verify: %s", out)
	}
	for _, p := range d.Partitions {
		if p.Start%align != 0 || p.Size%align != 0 {
			t.Errorf("partition %d is not aligned: got %d+%d", p.Number, p.Start, p.Size)
		}
		info := tool(t, "sgdisk", "-i", fmt.Sprint(p.Number), disk)
		for _, want := range []string{strings.ToUpper(p.Type), strings.ToUpper(p.UUID), "'" + p.Name + "'",
			fmt.Sprintf("First sector: %d ", p.Start/int64(d.Sector)), fmt.Sprintf("Last sector: %d ", (p.Start+p.Size)/int64(d.Sector)-1),
			map[bool]string{true: "Attribute flags: 0000000000000004", false: "Attribute flags: 0000000000000000"}[p.Active]} {
			if !strings.Contains(info, want) {
				t.Errorf("sgdisk -i %d: want %q in:\n%s", p.Number, want, info)
			}
		}
		if p.FS == "" {
			continue
		}
		dev, detach := attachPart(t, d.Path, &p, d.Sector)
		if got := strings.TrimSpace(tool(t, "blkid", "-p", "-s", "UUID", "-o", "value", dev)); got != p.FSUUID {
			t.Errorf("blkid, partition %d: got UUID %q, want %q", p.Number, got, p.FSUUID)
		}
		if got := strings.TrimSpace(tool(t, "blkid", "-p", "-s", "LABEL", "-o", "value", dev)); got != p.Label {
			t.Errorf("blkid, partition %d: got label %q, want %q", p.Number, got, p.Label)
		}
		switch p.FS {
		case vfat:
			tool(t, "fsck.vfat", "-n", dev)
		case Ext4:
			tool(t, "e2fsck", "-f", "-n", dev)
			features := tool(t, "tune2fs", "-l", dev)
			if got := strings.Contains(features, " verity"); got != (p.Role == RoleRoot) {
				t.Errorf("tune2fs, partition %d: got verity %v:\n%s", p.Number, got, features)
			}
		case Btrfs:
			tool(t, "btrfs", "check", "--readonly", dev)
		case XFS:
			tool(t, "xfs_repair", "-n", dev)
		}
		detach()
	}
}

// TestCreate makes a disk of each layout and each root file system, fills it, and has it
// judged.
func TestCreate(t *testing.T) {
	for name, layout := range map[string]bootloader.Layout{"efi": efi, "grub-bios": grubBIOS, "extlinux": extlinux,
		"both": {ESP: true, BIOSBoot: true, Active: true}} {
		for _, kind := range []FS{Ext4, Btrfs, XFS} {
			for _, sector := range []int{512, 4096} {
				if sector == 4096 && kind != Ext4 {
					continue // sectors matter to the table and the FAT
				}
				t.Run(fmt.Sprintf("%s/%s/%d", name, kind, sector), func(t *testing.T) {
					needLoops(t)
					need(t, "sgdisk", "sfdisk", "e2fsck", "tune2fs", "btrfs", "xfs_repair", "mkfs.btrfs", "mkfs.xfs", "mkfs.vfat", "mcopy", "mtype")
					path := filepath.Join(t.TempDir(), "disk.img")
					d := create(t, path, Options{Layout: layout, FS: kind, Size: 1 << 30, Sector: sector, BootSize: 300 << 20, Arch: "arm64"})
					root, boot := noise(1, 3<<20), noise(2, 5<<20)
					write(t, filepath.Join(d.Root(), "composefs/objects/00/11"), root)
					write(t, filepath.Join(d.Boot(), "particle-"+strings.Repeat("5f", 32), "vmlinuz"), boot)
					checkTarget(t, d)
					if err := d.Finish(t.Context()); err != nil {
						t.Fatal(err)
					}
					checkInspect(t, d)
					judge(t, d)
					checkContents(t, d, root, boot)
				})
			}
		}
	}
}

// checkTarget looks at what a boot loader is given.
func checkTarget(t *testing.T, d *Disk) {
	t.Helper()
	bt := d.BootTarget()
	p := d.Partition(d.bootRole())
	if bt.BootNumber != p.Number || bt.BootUUID != p.FSUUID || bt.Disk != d.Path || bt.Mounted == d.o.Layout.ESP {
		t.Errorf("got %+v for partition %+v", bt, p)
	}
	// A loader's code is written through Device and must be in the file.
	dev, err := os.OpenFile(bt.Device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	code := make([]byte, 512) // a whole sector, as direct I/O wants, kept but for the code
	if _, err := dev.ReadAt(code, 0); err != nil {
		t.Fatal(err)
	}
	copy(code, bytes.Repeat([]byte{0x90}, 440))
	if _, err := dev.WriteAt(code, 0); err != nil {
		t.Fatal(err)
	}
	if d.o.Layout.BIOSBoot {
		if _, err := dev.WriteAt(noise(3, int(bt.BIOSBootSize)), bt.BIOSBootStart); err != nil {
			t.Fatal(err)
		}
	} else if bt.BIOSBootStart != 0 || bt.BIOSBootSize != 0 {
		t.Errorf("got a BIOS boot partition at %d", bt.BIOSBootStart)
	}
	want := "UUID=" + p.FSUUID + " /boot ext4 defaults 0 2\n"
	if d.o.Layout.ESP {
		want = "UUID=" + p.FSUUID + " /boot vfat umask=0077 0 2\n"
	}
	if got := d.Fstab(); got != want {
		t.Errorf("fstab: got %q, want %q", got, want)
	}
}

func checkInspect(t *testing.T, d *Disk) {
	t.Helper()
	c, err := Inspect(t.Context(), d.Path)
	if err != nil {
		t.Fatal(err)
	}
	if c.Table != "gpt" || c.Sector != d.Sector || c.Size != d.Size || c.Empty() || len(c.InUse) > 0 {
		t.Errorf("got %+v", *c)
	}
	if fmt.Sprint(c.Partitions) != fmt.Sprint(d.Partitions) {
		t.Errorf("got  %+v\nwant %+v", c.Partitions, d.Partitions)
	}
}

// checkContents reads back what was written, with the kernel or mtools.
func checkContents(t *testing.T, d *Disk, root, boot []byte) {
	t.Helper()
	read := func(p *Partition, name string) []byte {
		dev, detach := attachPart(t, d.Path, p, d.Sector)
		defer detach()
		if p.FS == vfat {
			out, err := exec.Command("mtype", "-i", dev, "::/"+name).Output()
			if err != nil {
				t.Fatal(err)
			}
			return out
		}
		dir := t.TempDir()
		if err := unix.Mount(dev, dir, string(p.FS), unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(dir, 0)
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if got := read(d.Partition(RoleRoot), "composefs/objects/00/11"); !bytes.Equal(got, root) {
		t.Error("the root's file is not what was written")
	}
	if got := read(d.Partition(d.bootRole()), "particle-"+strings.Repeat("5f", 32)+"/vmlinuz"); !bytes.Equal(got, boot) {
		t.Error("the boot file system's file is not what was written")
	}
	f, err := os.Open(d.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	code := make([]byte, 440)
	if _, err := f.ReadAt(code, 0); err != nil || !bytes.Equal(code, bytes.Repeat([]byte{0x90}, 440)) {
		t.Errorf("the boot code is not in the disk: %v", err)
	}
	if b := d.Partition(RoleBIOS); b != nil {
		got := make([]byte, b.Size)
		if _, err := f.ReadAt(got, b.Start); err != nil || !bytes.Equal(got, noise(3, len(got))) {
			t.Errorf("the core image is not in the disk: %v", err)
		}
	}
}

func TestCancel(t *testing.T) {
	// Wherever the context ends, nothing is left, and no file.
	finished := false
	for delay := time.Duration(0); !finished && delay < 20*time.Second; delay = delay*5/4 + time.Millisecond {
		t.Run(delay.String(), func(t *testing.T) {
			needLoops(t)
			need(t, "mkfs.vfat", "mcopy")
			path := filepath.Join(t.TempDir(), "disk.img")
			ctx, cancel := context.WithTimeout(t.Context(), delay)
			defer cancel()
			d, err := Create(ctx, path, Options{Layout: efi, Size: 1 << 30})
			if err == nil {
				write(t, filepath.Join(d.Boot(), "file"), noise(1, 1<<20))
				err = d.Finish(ctx)
				if cerr := d.Close(); cerr != nil {
					t.Errorf("closing: %v", cerr)
				}
			}
			if finished = err == nil; finished {
				return
			}
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v, want that the deadline is over", err)
			}
			if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the unfinished file: got %v, want that it does not exist", err)
			}
		})
		if t.Failed() {
			return
		}
	}
	if !finished && os.Geteuid() == 0 {
		t.Error("no delay was long enough")
	}
}
