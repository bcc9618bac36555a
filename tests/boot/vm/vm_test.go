package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/ulikunitz/xz"

	"github.com/particle-os/particle/tests/boot/writelog"
)

// small is a system that is nothing but a shell for tests.
type small struct{ kernel, initrd string }

const smallInit = `#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for m in /modules/*; do insmod $m; done
echo "small system is up"
exec /agent
`

// newSmall makes the system from a Debian kernel: that of the image localhost/server
// (docs/examples/server), or one that PARTICLE_TEST_ROOT has, a directory.
func newSmall(t *testing.T) *small {
	t.Helper()
	if testing.Short() {
		t.Skip("boots virtual machines; not in -short")
	}
	for program, pkg := range map[string]string{Qemu: "qemu-system-x86", "qemu-img": "qemu-utils", "busybox": "busybox-static"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("there is no %s here (Debian package %s)", program, pkg)
		}
	}
	root := os.Getenv("PARTICLE_TEST_ROOT")
	if root == "" {
		out, err := exec.Command("podman", "image", "mount", "localhost/server").Output()
		if err != nil {
			t.Skip("podman has no image localhost/server; tests/setup/images.sh builds it")
		}
		root = strings.TrimSpace(string(out))
		t.Cleanup(func() { exec.Command("podman", "image", "unmount", "localhost/server").Run() })
	}
	kernels, _ := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if len(kernels) == 0 {
		t.Skipf("there is no kernel below %s/boot", root)
	}
	kernel := kernels[len(kernels)-1]
	version := strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-")

	agent := filepath.Join(t.TempDir(), "agent")
	build := exec.Command("go", "build", "-o", agent, "./guest/agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the agent: %v\n%s", err, out)
	}
	busybox, _ := exec.LookPath("busybox")
	var archive bytes.Buffer
	w := cpio.NewWriter(&archive)
	add := func(name string, mode cpio.FileMode, data []byte) {
		t.Helper()
		if err := w.WriteHeader(&cpio.Header{Name: name, Mode: mode, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) []byte {
		t.Helper()
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	for _, dir := range []string{"bin", "modules"} {
		add(dir, cpio.TypeDir|0o755, nil)
	}
	add("init", cpio.TypeReg|0o755, []byte(smallInit))
	add("agent", cpio.TypeReg|0o755, read(agent))
	add("bin/busybox", cpio.TypeReg|0o755, read(busybox))
	for i, file := range moduleOrder(t, filepath.Join(root, "usr/lib/modules", version), "virtio_pci", "virtio_blk", "virtio_console") {
		data := read(file)
		if strings.HasSuffix(file, ".xz") {
			r, err := xz.NewReader(bytes.NewReader(data))
			if err == nil {
				data, err = io.ReadAll(r)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		add(fmt.Sprintf("modules/%02d.ko", i), cpio.TypeReg|0o644, data)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	initrd := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(initrd, archive.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return &small{kernel, initrd}
}

// moduleOrder returns the files of modules, each behind those it depends on
// (modules.dep(5)). What is built into the kernel has none.
func moduleOrder(t *testing.T, dir string, names ...string) []string {
	t.Helper()
	dep, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if errors.Is(err, fs.ErrNotExist) {
		t.Skipf("there is no modules.dep in %s", dir)
	} else if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, name := range names {
		for line := range strings.Lines(string(dep)) {
			file, deps, _ := strings.Cut(strings.TrimSpace(line), ":")
			base, _, _ := strings.Cut(filepath.Base(file), ".")
			if base != name {
				continue
			}
			all := strings.Fields(deps)
			slices.Reverse(all)
			for _, f := range append(all, file) {
				if f = filepath.Join(dir, f); !slices.Contains(files, f) {
					files = append(files, f)
				}
			}
		}
	}
	return files
}

func (s *small) config(t *testing.T, disks ...Disk) Config {
	// Sockets need short paths, which t.TempDir does not promise.
	dir, err := os.MkdirTemp("/var/tmp", "vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return Config{Dir: dir, Firmware: Direct, Kernel: s.kernel, Initrd: s.initrd,
		Append: "console=ttyS0 panic=1", Memory: 256, Disks: disks}
}

// TestMachine does with a machine what tests do.
func TestMachine(t *testing.T) {
	s := newSmall(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	v, err := Start(ctx, s.config(t))
	if err != nil {
		t.Fatal(err)
	}
	defer v.Kill()
	up := regexp.MustCompile(`small (system) is up`)
	which, groups, err := v.Console.Wait(ctx, regexp.MustCompile("never printed"), up)
	if err != nil || which != 1 || len(groups) != 2 || groups[1] != "system" {
		t.Fatalf("got %d, %q, %v", which, groups, err)
	}
	sh := func(command string, stdin []byte) Result {
		t.Helper()
		r, err := v.ShInput(ctx, command, stdin)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	// Much output, every byte, and more than one command at a time.
	all := bytes.Repeat([]byte("\x00\n\r\x11\x13\xff{}\"boot\""), 20000)
	slow := make(chan error, 1)
	go func() {
		r, err := v.Sh(ctx, "sleep 2; exit 7")
		if err == nil && r.Status != 7 {
			err = fmt.Errorf("status %d", r.Status)
		}
		slow <- err
	}()
	if r := sh("cat; echo done >&2", all); r.Stdout != string(all) || r.Stderr != "done\n" || r.Status != 0 {
		t.Errorf("%d bytes came back as %d, %q, status %d", len(all), len(r.Stdout), r.Stderr, r.Status)
	}
	if err := <-slow; err != nil {
		t.Errorf("the slow command: %v", err)
	}
	// A command that hangs does not hang the test, nor the next command.
	short, stop := context.WithTimeout(ctx, time.Second)
	defer stop()
	if _, err := v.Sh(short, "sleep 1000"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "small system is up") {
		t.Errorf("after the deadline the error is %v", err)
	}
	if r := sh("for i in $(seq 100); do pidof sleep >/dev/null || exit 0; usleep 100000; done; exit 1", nil); r.Status != 0 {
		t.Errorf("the command that hung still runs")
	}
	// What is written to the console can be waited for, once.
	sh("echo on the console >/dev/console", nil)
	if _, _, err := v.Console.WaitWithin(ctx, time.Minute, regexp.MustCompile("on the console")); err != nil {
		t.Error(err)
	}
	if _, _, err := v.Console.WaitWithin(ctx, 100*time.Millisecond, regexp.MustCompile("on the console")); err == nil {
		t.Error("the same line was found twice")
	}
	// A reset, while a command runs.
	boot, err := v.Boot(ctx)
	if err != nil {
		t.Fatal(err)
	}
	running := make(chan error, 1)
	go func() {
		_, err := v.Sh(ctx, "sleep 1000")
		running <- err
	}()
	sh("until pidof sleep; do true; done", nil)
	if err := v.Reset(ctx); err != nil {
		t.Fatal(err)
	}
	next, err := v.NextBoot(ctx, boot)
	if err != nil || next == boot {
		t.Fatalf("boot %s after %s: %v", next, boot, err)
	}
	if err := <-running; !errors.Is(err, errRebooted) {
		t.Errorf("the command that the reset ended: %v", err)
	}
	if r := sh("echo again", nil); r.Stdout != "again\n" {
		t.Errorf("after the reset: %q", r.Stdout)
	}
	if err := v.Monitor(ctx, "no-such-command", nil); err == nil || !strings.Contains(err.Error(), "CommandNotFound") {
		t.Errorf("an unknown monitor command: %v", err)
	}
	_, _ = v.Sh(ctx, "poweroff -f") // which does not answer
	if err := v.WaitEnd(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Sh(ctx, "true"); !errors.Is(err, ErrEnded) {
		t.Errorf("a command for a machine that has ended: %v", err)
	}
	if _, _, err := v.Console.Wait(ctx, regexp.MustCompile("never printed")); !errors.Is(err, ErrEnded) {
		t.Errorf("waiting for a machine that has ended: %v", err)
	}
}

func TestStartRefuses(t *testing.T) {
	s := newSmall(t)
	c := s.config(t, Disk{File: "/no/such/disk"})
	if _, err := Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "/no/such/disk") {
		t.Errorf("the error is %v", err)
	}
}

// TestWriteLog has a guest write numbered blocks, each made durable before the next, cuts
// its power, and makes the disk of every moment: it must have a first part of the blocks,
// and all that were durable.
func TestWriteLog(t *testing.T) {
	s := newSmall(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	const blocks, block = 40, 4096
	dir := t.TempDir()
	base, disk, logFile := filepath.Join(dir, "base"), filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "log")
	if err := os.WriteFile(base, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := Overlay(ctx, disk, base, "raw"); err != nil {
		t.Fatal(err)
	}
	v, err := Start(ctx, s.config(t, Disk{File: disk, WriteLog: logFile}))
	if err != nil {
		t.Fatal(err)
	}
	defer v.Kill()
	r, err := v.Sh(ctx, fmt.Sprintf(`set -e
		for i in $(seq 1 %d); do
			yes "block $i" | head -c %d | dd of=/dev/vda bs=%d seek=$i conv=fsync,notrunc 2>/dev/null
		done
		# And one that is not made durable.
		yes lost | head -c %d | dd of=/dev/vda bs=%d seek=100 conv=notrunc 2>/dev/null`, blocks, block, block, block, block))
	if err != nil || r.Status != 0 {
		t.Fatalf("%v, %+v", err, r)
	}
	v.Kill()

	f, err := os.Open(logFile)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	l, err := writelog.Read(f, fi.Size())
	if err != nil {
		t.Fatal(err)
	}
	replayed, err := os.OpenFile(base, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer replayed.Close()
	// count returns how many blocks are whole, from the first on; another that is not
	// empty fails the test.
	count := func() int {
		t.Helper()
		n, end := 0, false
		for i := 1; i <= blocks; i++ {
			b := make([]byte, block)
			if _, err := replayed.ReadAt(b, int64(i*block)); err != nil {
				t.Fatal(err)
			}
			text := fmt.Sprintf("block %d\n", i)
			want := []byte(strings.Repeat(text, block/len(text)+1)[:block])
			switch {
			case bytes.Equal(b, want) && !end:
				n++
			case bytes.Equal(b, make([]byte, block)):
				end = true
			default:
				t.Fatalf("block %d is neither empty nor what was written", i)
			}
		}
		return n
	}
	last := 0
	for i := range l.Entries {
		if err := l.Apply(replayed, i, i+1, nil); err != nil {
			t.Fatal(err)
		}
		n := count()
		if n < last || n > last+1 {
			t.Fatalf("after entry %d there are %d blocks, before it %d", i, n, last)
		}
		last = n
		if l.Entries[i].Flags&writelog.Flush != 0 && l.Durable(i+1) != i+1 {
			t.Errorf("entry %d is a flush and not durable", i)
		}
	}
	if last != blocks {
		t.Errorf("%d blocks at the end, want %d", last, blocks)
	}
	if b := make([]byte, 4); true {
		if _, err := replayed.ReadAt(b, 100*block); err != nil || !bytes.Equal(b, make([]byte, 4)) {
			t.Errorf("what was not made durable is on the disk: %q, %v", b, err)
		}
	}
}
