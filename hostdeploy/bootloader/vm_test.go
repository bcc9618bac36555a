package bootloader

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"golang.org/x/sys/unix"
)

// The loaders themselves are the judges here: each is installed on a tiny disk with two
// entries, and a virtual machine boots until the second one's tries are used up. The
// kernel's initramfs prints its command line and restarts, or ends the machine.

// loadersDir returns a Debian tree that has the loaders' packages and a kernel; the test
// is skipped without it: whole systems are booted by tests/boot.
func loadersDir(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("PARTICLE_LOADERS")
	if dir == "" {
		t.Skip("PARTICLE_LOADERS is not set: a Debian tree with grub-pc-bin grub-efi-amd64-bin grub-efi-amd64-signed " +
			"shim-signed grub2-common systemd-boot-efi extlinux syslinux-common busybox-static and a kernel")
	}
	return dir
}

// program skips the test where a program of this system is missing.
func program(t *testing.T, name, pkg string) string {
	t.Helper()
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin") {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p
		}
	}
	t.Skipf("no %s (Debian package %s)", name, pkg)
	return ""
}

func command(t *testing.T, name, pkg string, args ...string) string {
	t.Helper()
	out, err := exec.Command(program(t, name, pkg), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// initScript is the whole system.
const initScript = `#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
echo "PARTICLE-BOOTED $(/bin/busybox cat /proc/cmdline) $(/bin/busybox dmesg | /bin/busybox grep -o 'Secure boot enabled')"
case " $(/bin/busybox cat /proc/cmdline) " in
*" again "*) /bin/busybox reboot -f ;;
esac
/bin/busybox poweroff -f
`

// putSystem makes kernel and initramfs in a boot file system.
func putSystem(t *testing.T, loaders, boot string) {
	t.Helper()
	kernels, err := filepath.Glob(filepath.Join(loaders, "boot/vmlinuz-*"))
	if err != nil || len(kernels) == 0 {
		t.Skipf("no kernel in %s/boot (Debian package linux-image-cloud-amd64)", loaders)
	}
	kernel, err := os.ReadFile(kernels[0])
	if err != nil {
		t.Fatal(err)
	}
	busybox, err := os.ReadFile(filepath.Join(loaders, "usr/bin/busybox"))
	if err != nil {
		t.Skipf("no static busybox in %s (Debian package busybox-static): %v", loaders, err)
	}
	var initrd bytes.Buffer
	w := cpio.NewWriter(&initrd)
	for _, f := range []struct {
		name string
		mode cpio.FileMode
		data []byte
	}{
		{"bin", cpio.TypeDir | 0o755, nil}, {"proc", cpio.TypeDir | 0o755, nil}, {"dev", cpio.TypeDir | 0o755, nil},
		{"bin/busybox", cpio.TypeReg | 0o755, busybox}, {"init", cpio.TypeReg | 0o755, []byte(initScript)},
	} {
		if err := w.WriteHeader(&cpio.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	// The console: without it init says nothing.
	if err := w.WriteHeader(&cpio.Header{Name: "dev/console", Mode: cpio.TypeChar | 0o600, DeviceID: 5<<8 | 1}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(boot, "particle-k")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"vmlinuz": kernel, "initrd": initrd.Bytes()} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// vmEntry is an entry of that kernel. One that boots "again" restarts the machine.
func vmEntry(n int, options string) Entry {
	return Entry{
		ID: fmt.Sprintf("particle-%d", n), Generation: n, Title: fmt.Sprintf("A 'title' with \"$x\" \\ {%d};", n),
		Linux: "/particle-k/vmlinuz", Initrd: []string{"/particle-k/initrd"},
		Options: fmt.Sprintf("console=ttyS0 quiet panic=-1 n=%d %s", n, options),
	}
}

const mib = 1 << 20

// vmDisk is a disk image with one boot partition.
type vmDisk struct {
	file string
	// start and size are those of the boot partition in bytes.
	start, size int64
	number      int
}

// newDisk partitions a file: a BIOS boot partition of 1 MiB where one is wanted, then the
// boot partition.
func newDisk(t *testing.T, l Layout) vmDisk {
	t.Helper()
	d := vmDisk{file: filepath.Join(t.TempDir(), "disk.img"), start: 2 * mib, size: 64 * mib, number: 1}
	f, err := os.Create(d.file)
	if err == nil {
		err = f.Truncate(d.start + d.size + mib)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	var args []string
	if l.BIOSBoot {
		d.number = 2
		args = append(args, "--new=1:2048:4095", "--typecode=1:ef02")
	}
	kind := "8300"
	if l.ESP {
		kind = "ef00"
	}
	args = append(args, fmt.Sprintf("--new=%d:%d:%d", d.number, d.start/512, (d.start+d.size)/512-1), fmt.Sprintf("--typecode=%d:%s", d.number, kind))
	if l.Active {
		args = append(args, fmt.Sprintf("--attributes=%d:set:2", d.number))
	}
	command(t, "sgdisk", "gdisk", append(args, d.file)...)
	return d
}

// fill makes the boot partition's file system of a directory.
func (d vmDisk) fill(t *testing.T, l Layout, dir string) {
	t.Helper()
	part := d.file + ".part"
	f, err := os.Create(part)
	if err == nil {
		err = f.Truncate(d.size)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	if l.ESP {
		command(t, "mkfs.vfat", "dosfstools", "-n", "BOOT", part)
		list, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		command(t, "mcopy", "mtools", append(append([]string{"-i", part, "-s"}, list...), "::")...)
	} else {
		command(t, "mkfs.ext4", "e2fsprogs", append(append([]string{"-q", "-d", dir}, l.Ext4Options...), part)...)
	}
	copyAt(t, part, 0, d.file, d.start, d.size)
}

// read copies the boot partition's files to a new directory.
func (d vmDisk) read(t *testing.T, l Layout) (dir string) {
	t.Helper()
	part := d.file + ".part"
	copyAt(t, d.file, d.start, part, 0, d.size)
	dir = t.TempDir()
	if l.ESP {
		command(t, "mcopy", "mtools", "-i", part, "-s", "-n", "::", dir)
		if fsck := command(t, "fsck.vfat", "dosfstools", "-n", part); strings.Contains(fsck, "Differences") {
			t.Logf("fsck.vfat:\n%s", fsck)
		}
	} else {
		command(t, "debugfs", "e2fsprogs", "-R", "rdump / "+dir, part)
	}
	return dir
}

func copyAt(t *testing.T, from string, fromOff int64, to string, toOff, size int64) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.Copy(io.NewOffsetWriter(out, toOff), io.NewSectionReader(in, fromOff, size)); err != nil {
		t.Fatal(err)
	}
}

var bootedLine = regexp.MustCompile(`PARTICLE-BOOTED ([^\r\n]*)`)

// run boots the disk until the machine ends itself and returns the kernels' command lines.
func (d vmDisk) run(t *testing.T, firmware ...string) (cmdlines []string) {
	t.Helper()
	qemu := program(t, "qemu-system-x86_64", "qemu-system-x86")
	serial := filepath.Join(t.TempDir(), "serial")
	args := append([]string{
		"-accel", "tcg,thread=multi", "-cpu", "max", "-m", "512", "-display", "none", "-vga", "std", "-net", "none",
		"-monitor", "none", "-serial", "file:" + serial, "-drive", "file=" + d.file + ",format=raw,if=virtio",
	}, firmware...)
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	start := time.Now()
	out, err := exec.CommandContext(ctx, qemu, args...).CombinedOutput()
	log, rerr := os.ReadFile(serial)
	if rerr != nil {
		t.Fatalf("%v: %s", rerr, out)
	}
	for _, m := range bootedLine.FindAllStringSubmatch(string(log), -1) {
		cmdlines = append(cmdlines, m[1])
	}
	if err != nil {
		t.Fatalf("qemu: %v\n%s\n%q\nserial line:\n%s", err, out, cmdlines, tail(log))
	}
	t.Logf("%d boots in %s", len(cmdlines), time.Since(start).Round(time.Second))
	if testing.Verbose() && len(cmdlines) == 0 {
		t.Logf("serial line:\n%s", tail(log))
	}
	return cmdlines
}

func tail(log []byte) []byte { return log[max(0, len(log)-3000):] }

func seaBIOS(t *testing.T) []string { return []string{"-machine", "pc"} }

func ovmf(t *testing.T) []string {
	t.Helper()
	return append(ovmfFiles(t, "4M.fd"), "-machine", "q35")
}

// secureOVMF has Microsoft's keys and Secure Boot turned on.
func secureOVMF(t *testing.T) []string {
	t.Helper()
	return append(ovmfFiles(t, "4M.ms.fd"), "-machine", "q35,smm=on", "-global", "driver=cfi.pflash01,property=secure,value=on")
}

func ovmfFiles(t *testing.T, kind string) []string {
	t.Helper()
	code, vars := "/usr/share/OVMF/OVMF_CODE_"+kind, "/usr/share/OVMF/OVMF_VARS_"+kind
	data, err := os.ReadFile(vars)
	if err != nil {
		t.Skipf("no OVMF (Debian package ovmf): %v", err)
	}
	mine := filepath.Join(t.TempDir(), "vars.fd")
	if err := os.WriteFile(mine, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"-drive", "if=pflash,format=raw,unit=0,readonly=on,file=" + code, "-drive", "if=pflash,format=raw,unit=1,file=" + mine}
}

// needRoot skips a test that runs programs of the loaders' tree in it.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("chroot(2) and loop devices need root")
	}
}

func numbers(cmdlines []string) (n []string) {
	for _, line := range cmdlines {
		for _, arg := range strings.Fields(line) {
			if v, ok := strings.CutPrefix(arg, "n="); ok {
				n = append(n, v)
			}
		}
	}
	return n
}

// fast has no menu: the machine shall not wait.
func fast(t *testing.T, boot string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(boot, "loader/loader.conf"), []byte("timeout 0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}

// bootTwice is the test of a loader whose boot file system is made of a directory.
func bootTwice(t *testing.T, name, loaders string, firmware func(*testing.T) []string) (cmdlines []string) {
	t.Helper()
	needRoot(t)
	in, err := InstallerByName(name)
	if err != nil {
		t.Fatal(err)
	}
	l := in.Layout()
	d := newDisk(t, l)
	boot := t.TempDir()
	target := Target{Root: loaders, Boot: boot, Disk: d.file, BootNumber: d.number, Serial: "115200"}
	if l.BIOSBoot {
		target.BIOSBootStart, target.BIOSBootSize = mib, mib
	}
	if err := in.Install(t.Context(), target); errors.Is(err, ErrMissing) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	fast(t, boot)
	putSystem(t, loaders, boot)
	loader, err := ByName(name, Paths{Boot: boot})
	if err != nil {
		t.Fatal(err)
	}
	const odd = `x={a;b} y=$root z=*?[!] v="a b" w=#c`
	failing := vmEntry(12, "again")
	failing.Counter = &Counter{Left: 2}
	add(t, loader, vmEntry(10, ""), vmEntry(11, odd), failing)
	// The system that was there before, as kernel-install(8) writes it.
	putPrevious(t, boot, "loader/entries/0123456789abcdef0123456789abcdef-6.12.0.conf", "title Debian\nversion 6.12.0\n"+
		"machine-id 0123456789abcdef0123456789abcdef\nsort-key debian\noptions console=ttyS0 quiet panic=-1 n=50\nlinux /particle-k/vmlinuz\ninitrd /particle-k/initrd\n")
	d.fill(t, l, boot)
	cmdlines = d.run(t, firmware(t)...)
	if got, want := numbers(cmdlines), []string{"12", "12", "11"}; !slices.Equal(got, want) {
		t.Fatalf("booted %q, want %q: %q", got, want, cmdlines)
	}
	last := cmdlines[2]
	for _, arg := range []string{"x={a;b}", "y=$root", "z=*?[!]", "w=#c"} {
		if !strings.Contains(last+" ", " "+arg+" ") {
			t.Errorf("kernel argument %q is not in %q", arg, last)
		}
	}
	if !strings.Contains(last, `v="a b"`) && !strings.Contains(last, `"v=a b"`) {
		t.Errorf("kernel argument %q is not in %q", `v="a b"`, last)
	}
	after, err := ByName(name, Paths{Boot: d.read(t, l)})
	if err != nil {
		t.Fatal(err)
	}
	wantIDs(t, after, "particle-11", "particle-10", "particle-12")
	if e := entries(t, after)[2]; e.Counter == nil || *e.Counter != (Counter{Left: 0, Done: 2}) {
		t.Errorf("after two boots that failed: got %+v, want 0 tries left and 2 done", e.Counter)
	}
	return cmdlines
}

func TestBootSystemdBoot(t *testing.T) { bootTwice(t, "systemd-boot", loadersDir(t), ovmf) }

func TestBootGrubBIOS(t *testing.T) { bootTwice(t, "grub-bios", loadersDir(t), seaBIOS) }

// TestBootGrubSigned has firmware that refuses what Microsoft has not signed.
func TestBootGrubSigned(t *testing.T) {
	cmdlines := bootTwice(t, "grub-efi", loadersDir(t), secureOVMF)
	if len(cmdlines) > 0 && !strings.Contains(cmdlines[0], "Secure boot enabled") {
		t.Errorf("Secure Boot is off: %q", cmdlines[0])
	}
}

// TestBootGrubUnsigned is an image without shim: grub-mkimage makes the EFI program.
func TestBootGrubUnsigned(t *testing.T) {
	loaders := loadersDir(t)
	needRoot(t)
	top := t.TempDir()
	for _, dir := range []string{"upper/usr/lib", "root"} {
		if err := os.MkdirAll(filepath.Join(top, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// A whiteout (Linux Documentation/filesystems/overlayfs.rst) hides shim.
	if err := unix.Mknod(filepath.Join(top, "upper/usr/lib/shim"), unix.S_IFCHR, 0); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(top, "root")
	if err := unix.Mount("overlay", root, "overlay", unix.MS_RDONLY, fmt.Sprintf("lowerdir=%s/upper:%s", top, loaders)); err != nil {
		t.Skipf("no overlay mount here: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(root, 0) })
	bootTwice(t, "grub-efi", root, ovmf)
}

func syncDisk(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		t.Error(err)
	}
}

// A mounted boot partition and its block device.
type mounted struct{ dir, device string }

// mountedDisk makes a disk with a mounted boot partition; finish unmounts it.
func mountedDisk(t *testing.T, l Layout) (d vmDisk, m mounted, finish func()) {
	t.Helper()
	d = newDisk(t, l)
	losetup := program(t, "losetup", "mount")
	out, err := exec.Command(losetup, "--find", "--show", "--offset", fmt.Sprint(d.start), "--sizelimit", fmt.Sprint(d.size), d.file).Output()
	if err != nil {
		t.Skipf("no loop device: %v", err)
	}
	m.device = strings.TrimSpace(string(out))
	detach := func() { exec.Command(losetup, "--detach", m.device).Run() }
	t.Cleanup(detach)
	command(t, "mkfs.ext4", "e2fsprogs", append(append([]string{"-q"}, l.Ext4Options...), m.device)...)
	m.dir = t.TempDir()
	if err := unix.Mount(m.device, m.dir, "ext4", 0, ""); err != nil {
		t.Skipf("no ext4 mount here: %v", err)
	}
	here := true
	unmount := func() {
		if here {
			// Another mount namespace of this machine may have the file system, too.
			syncDisk(t, m.dir)
			if err := unix.Unmount(m.dir, 0); err != nil {
				t.Error(err)
			}
			here = false
		}
	}
	t.Cleanup(unmount)
	return d, m, func() { unmount(); detach() }
}

// TestBootExtlinux installs to a mounted partition and falls back by "once".
func TestBootExtlinux(t *testing.T) {
	loaders := loadersDir(t)
	needRoot(t)
	in := extlinuxInstaller{}
	l := in.Layout()
	d, m, finish := mountedDisk(t, l)
	boot := m.dir
	target := Target{Root: loaders, Boot: boot, Mounted: true, Disk: d.file, BootDevice: m.device, BootNumber: d.number, Serial: "115200"}
	if err := in.Install(t.Context(), target); errors.Is(err, ErrMissing) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	fast(t, boot)
	putSystem(t, loaders, boot)
	loader := newExtlinux(Paths{Boot: boot})
	const odd = `x={a;b} y=$root z=*?[!] v="a b" w=#c q='"'"'`
	failing := vmEntry(12, "again")
	failing.Counter = &Counter{Left: 1}
	add(t, loader, vmEntry(10, ""), vmEntry(11, odd), failing)
	if got := nextExtlinux(t, boot); got != "particle-12" {
		t.Errorf("to be booted once is %q", got)
	}
	finish()
	cmdlines := d.run(t, seaBIOS(t)...)
	if got, want := numbers(cmdlines), []string{"12", "11"}; !slices.Equal(got, want) {
		t.Fatalf("booted %q, want %q: %q", got, want, cmdlines)
	}
	if !strings.Contains(cmdlines[1], odd) {
		t.Errorf("kernel arguments %q are not in %q", odd, cmdlines[1])
	}
	after := newExtlinux(Paths{Boot: d.read(t, l)})
	wantIDs(t, after, "particle-11", "particle-10", "particle-12")
	if e := entries(t, after)[2]; e.Counter == nil || *e.Counter != (Counter{Left: 0, Done: 1}) {
		t.Errorf("after one boot that failed: got %+v, want 0 tries left and 1 done", e.Counter)
	}
}
