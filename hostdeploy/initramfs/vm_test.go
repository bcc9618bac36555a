package initramfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/ulikunitz/xz"

	"github.com/particle-os/particle/tests/program"
)

// A vm boots a Debian kernel with a small initramfs of its own, which runs the program
// as the scripts of real ones do.
type vm struct {
	kernel string
	initrd []byte
}

// vmTime limits a boot: without KVM one takes from a few seconds to a minute, and
// longer on a busy machine.
const vmTime = 5 * time.Minute

// vmModules are loaded in this order, each behind what it depends on.
var vmModules = []string{"crc32c_generic", "virtio_blk", "ext4", "loop", "erofs", "overlay", "squashfs"}

// newVM looks for what a VM needs and skips the test where something is missing.
func newVM(t *testing.T) *vm {
	t.Helper()
	if testing.Short() {
		t.Skip("boots virtual machines")
	}
	for program, pkg := range map[string]string{"qemu-system-x86_64": "qemu-system-x86", "busybox": "busybox-static", "mkfs.ext4": "e2fsprogs"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is missing (apt install %s)", program, pkg)
		}
	}
	kernel, modules := findKernel(t)
	files := []vmFile{
		{"bin/busybox", 0o755, program.Busybox(t)},
		{"init", 0o755, []byte(vmInit)},
		{Program[1:], 0o755, buildProgram(t)},
	}
	var order []string
	for _, m := range vmModules {
		order = append(order, loadOrder(t, modules, m)...)
	}
	var seen []string
	for _, rel := range order {
		if slices.Contains(seen, rel) {
			continue
		}
		seen = append(seen, rel)
		files = append(files, vmFile{fmt.Sprintf("modules/%02d.ko", len(seen)), 0o644, readModule(t, filepath.Join(modules, rel))})
	}
	return &vm{kernel, newc(t, files...)}
}

// findKernel returns a Debian kernel with fs-verity, and its modules: those named by
// PARTICLE_TEST_VMLINUZ and PARTICLE_TEST_MODULES, those of the image
// localhost/server (docs/examples/server), or the machine's own.
func findKernel(t *testing.T) (kernel, modules string) {
	t.Helper()
	kernel, modules = os.Getenv("PARTICLE_TEST_VMLINUZ"), os.Getenv("PARTICLE_TEST_MODULES")
	if kernel != "" && modules != "" {
		return kernel, modules
	}
	roots := []string{"/"}
	if out, err := exec.Command("podman", "image", "mount", "localhost/server").Output(); err == nil {
		roots = append([]string{strings.TrimSpace(string(out))}, roots...)
		t.Cleanup(func() {
			if out, err := exec.Command("podman", "image", "umount", "localhost/server").CombinedOutput(); err != nil {
				t.Errorf("unmounting localhost/server: %v\n%s", err, out)
			}
		})
	}
	for _, root := range roots {
		kernels, _ := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
		for _, k := range kernels {
			version := strings.TrimPrefix(filepath.Base(k), "vmlinuz-")
			dir := filepath.Join(root, "usr/lib/modules", version)
			if _, err := os.Stat(filepath.Join(dir, "modules.dep")); err == nil {
				return k, dir
			}
		}
	}
	t.Skip("there is no kernel for a VM: set PARTICLE_TEST_VMLINUZ and PARTICLE_TEST_MODULES, build the image localhost/server (docs/examples/server), or apt install linux-image-amd64")
	return "", ""
}

// loadOrder returns a module's file behind those that it depends on (modules.dep(5)).
func loadOrder(t *testing.T, dir, name string) []string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		file, deps, _ := strings.Cut(strings.TrimSpace(line), ":")
		base, _, _ := strings.Cut(filepath.Base(file), ".")
		if strings.ReplaceAll(base, "-", "_") != name {
			continue
		}
		order := strings.Fields(deps)
		slices.Reverse(order)
		return append(order, file)
	}
	return nil // built in
}

func readModule(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	switch filepath.Ext(name) {
	case ".ko":
		return data
	case ".xz":
		r, err := xz.NewReader(bytes.NewReader(data))
		if err == nil {
			data, err = io.ReadAll(r)
		}
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	t.Skipf("modules like %s are not unpacked here", name)
	return nil
}

// buildProgram builds the program as it is installed.
func buildProgram(t *testing.T) []byte {
	t.Helper()
	name := filepath.Join(t.TempDir(), "particle-init-root")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", name, "github.com/particle-os/particle/cmd/particle-init-root")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the program: %v\n%s", err, out)
	}
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if len(data) > 8<<20 {
		t.Errorf("the program has %d bytes, want at most 8 MiB", len(data))
	}
	return data
}

type vmFile struct {
	name string
	mode cpio.FileMode
	data []byte
}

// newc makes a cpio archive with the directories that the files need.
func newc(t *testing.T, files ...vmFile) []byte {
	t.Helper()
	var b bytes.Buffer
	w := cpio.NewWriter(&b)
	made := map[string]bool{}
	for _, f := range files {
		for i, c := range f.name {
			if dir := f.name[:i]; c == '/' && !made[dir] {
				made[dir] = true
				if err := w.WriteHeader(&cpio.Header{Name: dir, Mode: cpio.TypeDir | 0o755}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := w.WriteHeader(&cpio.Header{Name: f.name, Mode: cpio.TypeReg | f.mode, Size: int64(len(f.data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// vmInit does what an initramfs does before the program is its turn, runs the boot's
// own script and then the program.
const vmInit = `#!/bin/busybox sh
export PATH=/bin
busybox mkdir -p /proc /sys /dev /run /root /tmp /usr/lib/particle
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
for m in /modules/*; do insmod $m; done
mount -t ext4 -o ro /dev/vda /root || poweroff -f
# as VM-CASE NAME ARGUMENTS..., tries other kernel arguments: the program reads
# /proc/cmdline.
try() {
	name=$1
	shift
	echo "$* particle.shell" >/tmp/cmdline
	mount --bind /tmp/cmdline /proc/cmdline
	$PROGRAM /usr/lib/particle/particle-init-root /root
	echo "VM-CASE $name: status $?"
	umount /proc/cmdline
}
[ ! -e /before.sh ] || . /before.sh
/usr/lib/particle/particle-init-root /root
status=$?
echo 1 >/proc/sys/kernel/printk
echo "VM-STATUS $status"
cat /run/particle/boot.json
[ $status = 0 ] || poweroff -f
umount /proc
umount /sys
exec switch_root /root /sbin/init
`

// vmSystem is the init of the images: it tells what the system is like.
const vmSystem = `#!/usr/bin/busybox sh
export PATH=/usr/bin
b=busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
# The kernel tells of bad files in the middle of our lines.
echo 1 >/proc/sys/kernel/printk
echo "VM-SYSTEM started"
$b cat /etc/state /var/shared | $b sed 's/^/VM-STATE /'
$b grep -q ' / overlay ' /proc/mounts && $b sed -n 's/^[^ ]* \/ overlay/VM-ROOT overlay/p' /proc/mounts
$b touch /usr/new 2>/dev/null && echo "VM-USR writable"
for f in large second-file; do
	if $b cat /usr/share/$f >/dev/null; then echo "VM-READ $f good"; else echo "VM-READ $f bad"; fi
done
[ -e /etc/booted ] && echo "VM-AGAIN etc"
[ -e /var/booted ] && echo "VM-AGAIN var"
echo yes >/etc/booted
echo yes >/var/booted
[ -e /sysroot/state/enable-verity ] && echo "VM-MARK still there"
[ -e /usr/share/after.sh ] && . /usr/share/after.sh
$b sync
$b poweroff -f
`

func vmSystemTree(t *testing.T, more system) system {
	s := bootable(system{"usr/sbin/init": "*" + vmSystem, "usr/bin/busybox": "*" + string(program.Busybox(t))})
	for name, content := range more {
		s[name] = content
	}
	return s
}

// ext4 makes a file system of a directory, in a file.
func ext4(t *testing.T, dir, size string, options ...string) string {
	t.Helper()
	img := filepath.Join(t.TempDir(), "disk.img")
	args := append([]string{"-q", "-d", dir, "-E", "root_owner=0:0", "-b", "4096"}, options...)
	if out, err := exec.Command("mkfs.ext4", append(args, img, size)...).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	return img
}

// boot runs the machine until it goes off and returns what it said. before is a shell
// script that runs in front of the program.
func (v *vm) boot(t *testing.T, disk, cmdline, before string) string {
	t.Helper()
	dir := t.TempDir()
	initrd := v.initrd
	if before != "" {
		initrd = append(slices.Clip(initrd), newc(t, vmFile{"before.sh", 0o644, []byte(before)})...)
	}
	if err := os.WriteFile(filepath.Join(dir, "initrd"), initrd, 0o600); err != nil {
		t.Fatal(err)
	}
	return qemu(t, v.kernel, filepath.Join(dir, "initrd"), disk, cmdline)
}

// qemu boots a kernel with an initramfs and a disk.
func qemu(t *testing.T, kernel, initrd, disk, cmdline string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), vmTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "1024", "-smp", "2",
		"-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot",
		"-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 panic=-1 quiet "+cmdline,
		"-drive", "file="+disk+",if=virtio,format=raw")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	text := strings.ReplaceAll(out.String(), "\r", "")
	if ctx.Err() != nil && !errors.Is(ctx.Err(), context.Canceled) {
		t.Fatalf("the machine did not go off within %s:\n%s", vmTime, text)
	}
	if err != nil {
		t.Fatalf("qemu: %v\n%s", err, text)
	}
	return text
}

// want checks that a machine has said all of it.
func want(t *testing.T, out string, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if !strings.Contains(out, line) {
			t.Errorf("the machine did not say %q:\n%s", line, out)
			return
		}
	}
}

func wantNot(t *testing.T, out string, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if strings.Contains(out, line) {
			t.Errorf("the machine said %q:\n%s", line, out)
			return
		}
	}
}
