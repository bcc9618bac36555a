package boot

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/particle-os/particle/tests/boot/vm"
)

// classicDisk makes a disk as installers of Debian leave it: one ext4 with everything, and
// room for GRUB. It returns the disk, and the kernel and initramfs to start it with as
// long as it has no boot loader.
func classicDisk(t testing.TB) (disk, kernel, initrd string) {
	t.Helper()
	name := image(t, "server")
	root := strings.TrimSpace(run(t, "podman", "image", "mount", name))
	t.Cleanup(func() { run(t, "podman", "image", "umount", name) })
	dir := dirFor(t)
	disk = filepath.Join(dir, "classic.raw")
	const start, size = 4096 * 512, 5 << 30
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, size); err != nil {
		t.Fatal(err)
	}
	run(t, "sgdisk", "-n", "1:2048:4095", "-t", "1:ef02", "-n", "2:4096:0", "-t", "2:8304", disk)
	run(t, "mkfs.ext4", "-q", "-O", "verity", "-E", fmt.Sprintf("offset=%d", start), "-d", root, disk, fmt.Sprintf("%dk", (size-start)/1024-1024))
	for _, f := range []struct {
		to      *string
		pattern string
	}{{&kernel, "vmlinuz"}, {&initrd, "initramfs.img"}} {
		found, err := filepath.Glob(filepath.Join(root, "usr/lib/modules/*", f.pattern))
		if err != nil || len(found) != 1 {
			t.Fatalf("looking for %s: %q, %v", f.pattern, found, err)
		}
		*f.to = filepath.Join(dir, f.pattern)
		run(t, "cp", found[0], *f.to)
	}
	return disk, kernel, initrd
}

// "install to-existing-root (turn a running Debian into an image-booted one)": with the
// boot loader that it has, and a way back to it.
func TestExistingRoot(t *testing.T) {
	need(t, all, "sgdisk", "mkfs.ext4")
	t.Parallel()
	disk, kernel, initrd := classicDisk(t)
	l := loader{name: "grub-bios", firmware: vm.BIOS}

	// GRUB comes from the system itself, as grub-pc's installation has it.
	m := startConfig(t, vm.Config{
		Firmware: vm.Direct, Kernel: kernel, Initrd: initrd, Append: "root=/dev/vda2 rw console=ttyS0 " + deviceTimeout,
		Disks: []vm.Disk{{File: disk}}, Unsafe: true,
	})
	m.login()
	m.sh(`set -e
		grub-install --target=i386-pc /dev/vda
		printf 'GRUB_CMDLINE_LINUX="console=ttyS0 %s"\nGRUB_TIMEOUT=1\nGRUB_TERMINAL=serial\n' >/etc/default/grub
		update-grub
		echo '/dev/vda2 / ext4 defaults 0 1' >/etc/fstab
		echo old >/home/old-file`, deviceTimeout)
	m.off()

	m = start(t, l, vm.Disk{File: disk})
	m.login()
	m.fails("particle hostdeploy status", "not a system that Particle deployed")
	reference := push(t, "server", "existing")
	m.registry()
	// All of an image is pulled and stored.
	if r := m.tryWithin(3*bootLimit, "particle hostdeploy install to-existing-root --image %s --karg console=ttyS0 --karg %s", reference, deviceTimeout); r.Status != 0 {
		t.Fatalf("install to-existing-root: status %d\n%s%s", r.Status, r.Stdout, r.Stderr)
	}
	m.reboot()
	m.good()
	s := m.status()
	if s.Boot == nil || s.Boot.Verification != "enforced" {
		t.Errorf("the root is not enforced: %+v", s.Boot)
	}
	if d := s.booted(t); d.Reference != reference {
		t.Errorf("updates come from %q, want %q", d.Reference, reference)
	}
	m.readOnly()
	m.equal("cat /sysroot/home/old-file", "old")
	m.packages("1.0")
	m.clean()

	push(t, "next", "existing")
	m.registry()
	m.sh("particle hostdeploy upgrade")
	m.reboot()
	m.equal("cat /usr/share/particle-test/version", "2")
	m.good()

	// The system that was there is the last choice of the menu.
	m.sh("grub-editenv /boot/grub/grubenv list")
	if menu := m.sh("cat /boot/grub/grub.cfg"); !strings.Contains(menu, "configfile") {
		t.Errorf("the menu does not lead to the earlier one:\n%s", menu)
	}
}
