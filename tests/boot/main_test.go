// Package boot proves, in virtual machines, that hosts which Particle has installed
// boot, change and fall back as docs/boot.md says. The machines run without hardware
// acceleration, so a boot takes half a minute and these tests run only when asked for:
//
//	PARTICLE_TEST_BOOT=essential go test -timeout 60m ./tests/boot
//	PARTICLE_TEST_BOOT=all go test -timeout 4h ./tests/boot
//
// What the images are is in image/Containerfile. PARTICLE_TEST_BOOT_LOADER names the boot
// loader that tests take which need only one; PARTICLE_TEST_BOOT_KEEP is a directory that
// gets the consoles' logs.
package boot

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/particle-os/particle/tests/boot/vm"
)

// A level says how much a run of the tests wants.
type level int

const (
	none      level = iota
	essential       // what every change must pass
	all
)

var (
	wanted   level
	work     string // a directory on disk, removed when all tests are done
	particle string // the command under test
	// interrupted ends when somebody stops the tests: machines and programs end with it.
	interrupted context.Context
)

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	var stop context.CancelFunc
	interrupted, stop = signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch v := os.Getenv("PARTICLE_TEST_BOOT"); v {
	case "":
		return m.Run()
	case "essential":
		wanted = essential
	case "all":
		wanted = all
	default:
		fmt.Fprintf(os.Stderr, "PARTICLE_TEST_BOOT is %q; it must be essential or all\n", v)
		return 1
	}
	dir, err := os.MkdirTemp("/var/tmp", "particle-boot-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	work = dir
	particle = filepath.Join(dir, "particle")
	if err := build(interrupted, particle, "cmd/particle"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	status := m.Run()
	if server != nil {
		server.Close()
	}
	return status
}

// build builds one of the project's programs, statically and the same each time.
func build(ctx context.Context, to, pkg string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w -buildid=", "-o", to, "github.com/particle-os/particle/"+pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w\n%s", pkg, err, out)
	}
	return nil
}

// packages of the programs that have another name.
var packages = map[string]string{
	vm.Qemu: "qemu-system-x86", "qemu-img": "qemu-utils", "mcopy": "mtools", "mdir": "mtools",
	"debugfs": "e2fsprogs", "mkfs.ext4": "e2fsprogs", "sgdisk": "gdisk", "losetup": "mount",
}

// need skips a test that is not wanted, must be root or lacks a program.
func need(t testing.TB, l level, programs ...string) {
	t.Helper()
	if wanted < l {
		t.Skipf("boots virtual machines; PARTICLE_TEST_BOOT=%s runs it", [...]string{essential: "essential", all: "all"}[l])
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, p := range append(programs, vm.Qemu, "qemu-img", "podman") {
		if _, err := exec.LookPath(p); err != nil {
			pkg := packages[p]
			if pkg == "" {
				pkg = p
			}
			t.Skipf("there is no %s here (Debian package %s)", p, pkg)
		}
	}
}

// run runs a program of this machine and returns what it prints, failing the test
// when it fails.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, stderr, err := try(t, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", filepath.Base(name), strings.Join(args, " "), err, stderr)
	}
	return out
}

// try is run for what may fail.
func try(t testing.TB, name string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errs strings.Builder
	cmd := exec.CommandContext(interrupted, name, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// dirFor makes a directory on disk that goes with the test. Its name is short: sockets
// lie in it.
func dirFor(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(work, "t")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
