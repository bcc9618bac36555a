package initramfs

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
)

// install writes the carriers and the program where a package would install them.
func install(t *testing.T, root string, more system) {
	t.Helper()
	write := func(name string, data []byte, mode os.FileMode) {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, data, mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range Files() {
		data := f.Data
		if data == nil {
			data = buildProgram(t)
		}
		write(f.Path, data, f.Mode)
	}
	for name, content := range more {
		write(name, []byte(content), 0o644)
	}
}

// makeInitramfs runs a generator of a container image, after the carriers were put into
// it, and returns a kernel and what the generator made for it. command writes /out/initrd
// for the kernel of version $version.
func makeInitramfs(t *testing.T, image, command string, more system) (kernel, initrd string) {
	t.Helper()
	if testing.Short() {
		t.Skip("runs containers and virtual machines")
	}
	for program, pkg := range map[string]string{"qemu-system-x86_64": "qemu-system-x86", "podman": "podman", "mkfs.ext4": "e2fsprogs", "busybox": "busybox-static"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is missing (apt install %s)", program, pkg)
		}
	}
	needMounts(t)
	if err := exec.Command("podman", "image", "exists", image).Run(); err != nil {
		t.Skipf("there is no image %s: build docs/examples/server, for dracut with PACKAGES=dracut on top", image)
	}
	dir := t.TempDir()
	for _, d := range []string{"carriers", "out"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	install(t, filepath.Join(dir, "carriers"), more)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	script := "set -e; cp -a /carriers/. /; kernel=$(echo /boot/vmlinuz-*); version=${kernel#/boot/vmlinuz-}; " + command + "; cp $kernel /out/kernel"
	cmd := exec.CommandContext(ctx, "podman", "run", "--rm", "-v", dir+"/carriers:/carriers:ro", "-v", dir+"/out:/out", image, "sh", "-c", script)
	out, err := cmd.CombinedOutput()
	t.Logf("%s: %s", image, out)
	if err != nil {
		t.Fatalf("making an initramfs: %v", err)
	}
	return filepath.Join(dir, "out/kernel"), filepath.Join(dir, "out/initrd")
}

// bootCarriers boots a disk with a real initramfs: at first to enforce fs-verity, then
// with what must be refused.
func bootCarriers(t *testing.T, kernel, initrd, by string) {
	t.Helper()
	f, err := os.Open(initrd)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	start := time.Now()
	c, err := Inspect(f)
	if err != nil || !c.Program || c.Starter != by || len(c.Missing()) > 0 {
		t.Fatalf("got %+v, missing %q, %v", c, c.Missing(), err)
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d MiB, %d modules, read in %s", info.Size()>>20, len(c.Modules), time.Since(start).Round(time.Millisecond))

	d := newDisk(t)
	image := d.deploy(t, vmSystemTree(t, nil))
	d.write(t, verityMark, "")
	disk := ext4(t, d.dir, "64M", "-O", "verity")
	out := qemu(t, kernel, initrd, disk, "root=/dev/vda "+secure(image))
	want(t, out, "VM-SYSTEM started", "VM-STATE of the state", "VM-ROOT overlay", "verity=require", "VM-READ large good")
	wantNot(t, out, "VM-USR writable", "VM-MARK", "VM-READ large bad")

	out = qemu(t, kernel, initrd, disk, "root=/dev/vda "+secure(fsverity.Sum(fsverity.SHA256, nil)))
	want(t, out, "the system cannot be booted: image is not in the store", "restarting in 10 seconds", "reboot: Restarting system")
	wantNot(t, out, "VM-SYSTEM", "(initramfs)", "Entering emergency mode")
}

// needSlow skips what takes minutes: dracut packs for one, and systemd starts twice.
func needSlow(t *testing.T) {
	t.Helper()
	if os.Getenv("PARTICLE_TEST_SLOW") == "" {
		t.Skip("takes minutes: set PARTICLE_TEST_SLOW=1")
	}
}

func TestInitramfsTools(t *testing.T) {
	kernel, initrd := makeInitramfs(t, "localhost/server", "mkinitramfs -o /out/initrd $version", nil)
	bootCarriers(t, kernel, initrd, "initramfs-tools")
}

func TestDracut(t *testing.T) {
	needSlow(t)
	kernel, initrd := makeInitramfs(t, "localhost/server-dracut", "dracut --no-hostonly --force /out/initrd $version", nil)
	bootCarriers(t, kernel, initrd, "dracut")
}

func TestDracutWithoutSystemd(t *testing.T) {
	needSlow(t)
	kernel, initrd := makeInitramfs(t, "localhost/server-dracut",
		"dracut --no-hostonly --force --omit 'systemd systemd-initrd dracut-systemd' /out/initrd $version", nil)
	bootCarriers(t, kernel, initrd, "dracut")
}
