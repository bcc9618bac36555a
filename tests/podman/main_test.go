// Package podman drives podman on top of the layer store, and compares what it shows
// with the same images in podman's own storage, path by path.
//
// The podman of this machine is always tried; PARTICLE_TEST_PODMAN=all also tries those
// of newer Debian releases, in chroots that are made once below PARTICLE_TEST_CACHE.
package podman

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/tests/program"
)

// particle is the command under test, built once.
var particle string

// work is a directory on disk, removed when all tests are done. What lies in shared
// below it chroots see too, also what is mounted there later.
var work, shared string

// buildTime is how long building the command may take.
const buildTime = 10 * time.Minute

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) (status int) {
	dir, err := os.MkdirTemp("/var/tmp", "pp-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	work = dir
	defer func() {
		if err := cleanUp(); err != nil {
			fmt.Fprintln(os.Stderr, "cleaning up:", err)
			status = 1
		}
	}()
	shared = filepath.Join(work, "s")
	if err := shareMount(shared); err != nil {
		fmt.Fprintln(os.Stderr, "mounting the work directory:", err)
		return 1
	}
	particle = filepath.Join(dir, "particle")
	build := exec.Command("go", "build", "-o", particle, "github.com/particle-os/particle/cmd/particle")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if _, errs, err := program.Within(buildTime, build); err != nil {
		fmt.Fprintf(os.Stderr, "building particle: %v\n%s", err, errs)
		return 1
	}
	return m.Run()
}

// shareMount makes a directory whose mounts show in all bind mounts of it.
func shareMount(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil || os.Geteuid() != 0 {
		return err
	}
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	// Not with what it was bound from.
	if err := unix.Mount("", dir, "", unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	return unix.Mount("", dir, "", unix.MS_SHARED, "")
}

// cleanUp takes away what is mounted below the work directory, also in chroots, and
// the directory.
func cleanUp() error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	var targets []string
	err = mount.ParseMountinfo(f, func(e mount.Entry) error {
		if strings.HasPrefix(e.Target+"/", work+"/") {
			targets = append(targets, e.Target)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for i := len(targets) - 1; i >= 0; i-- {
		_ = unix.Unmount(targets[i], unix.MNT_DETACH) // some go with another
	}
	return os.RemoveAll(work)
}

var dirs atomic.Int32

// sharedDir makes a directory on disk that chroots see. Its path is short: conmon's
// sockets lie deep below it, and podman waits 20 s for one whose path is too long.
func sharedDir(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(shared, fmt.Sprint(dirs.Add(1)))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// need skips a test that must be root or lacks a program; packages are Debian's.
func need(t testing.TB, programs ...string) {
	t.Helper()
	if testing.Short() {
		t.Skip("drives podman; not in -short")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	f := mount.Probe(work)
	if err := f.Mountable(); err != nil {
		t.Skip(err)
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("no FUSE here: ", err)
	}
	packages := map[string]string{"busybox": "busybox-static"}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			pkg := packages[p]
			if pkg == "" {
				pkg = p
			}
			t.Skipf("there is no %s here (Debian package %s)", p, pkg)
		}
	}
}

// run runs a program and returns what it printed on stdout; it must succeed.
func run(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	out, errs, err := program.Run(cmd)
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, tail(errs+out))
	}
	return out
}

func tail(s string) string {
	if len(s) > 4000 {
		return "…" + s[len(s)-4000:]
	}
	return s
}
