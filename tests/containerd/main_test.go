// Package containerd runs the daemon that is released and real containerds against each
// other: images are pulled, imported, run, committed, exported and removed, with what
// "particle plugins enable" writes as containerd's configuration and nothing else.
//
//	go test ./tests/containerd                                  with the containerd in $PATH
//	PARTICLE_TEST_CONTAINERD=all go test -timeout 30m ./tests/containerd
//
// The latter also takes the releases in $PARTICLE_CONTAINERDS, a directory a release with
// containerd, ctr and containerd-shim-runc-v2; containerds.sh builds them there.
//
// The snapshotter's own tests drive each way and each failure in one process; what is
// here is what only whole programs show.
package containerd

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/tests/program"
)

var (
	work     string // a directory on disk, removed when all tests are done
	particle string // the command under test
)

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // everything skips
	}
	// A short name: sockets lie in it.
	dir, err := os.MkdirTemp("/var/tmp", "particle-ctd-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() {
		if err := errors.Join(unmountBelow(dir), os.RemoveAll(dir)); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}()
	work = dir
	particle = filepath.Join(dir, "particle")
	_, err = program.TryEnv([]string{"CGO_ENABLED=0"}, "go", "build", "-o", particle, "github.com/particle-os/particle/cmd/particle")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// A release is a containerd to test with.
type release struct {
	version string
	bin     string // directory of its programs
}

// since reports whether a release is not older than a version.
func (r release) since(major, minor int) bool {
	var v [2]int
	fmt.Sscanf(r.version, "%d.%d", &v[0], &v[1])
	return v[0] > major || v[0] == major && v[1] >= minor
}

func (r release) program(name string) string { return filepath.Join(r.bin, name) }

// all reports whether everything is to be tested, not what is essential only.
func all() bool { return os.Getenv("PARTICLE_TEST_CONTAINERD") == "all" }

// releases returns those to test with: the first is this machine's own.
func releases(t *testing.T) (found []release) {
	t.Helper()
	if testing.Short() {
		t.Skip("drives foreign programs; not in -short")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	f := mount.Probe(work)
	if err := f.Mountable(); err != nil {
		t.Skip(err)
	}
	for program, pkg := range map[string]string{"runc": "runc", "busybox": "busybox-static"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%v (Debian package %s)", err, pkg)
		}
	}
	var bins []string
	if path, err := exec.LookPath("containerd"); err == nil {
		bins = append(bins, filepath.Dir(path))
	}
	if dir := os.Getenv("PARTICLE_CONTAINERDS"); dir != "" && all() {
		more, err := filepath.Glob(filepath.Join(dir, "*/containerd"))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range more {
			bins = append(bins, filepath.Dir(path))
		}
	}
	if len(bins) == 0 {
		t.Skip("there is no containerd here (Debian package containerd)")
	}
	for _, bin := range bins {
		out := run(t, filepath.Join(bin, "containerd"), "--version")
		f := strings.Fields(out)
		if len(f) < 3 {
			t.Fatalf("%s/containerd --version prints %q", bin, out)
		}
		found = append(found, release{strings.TrimPrefix(f[2], "v"), bin})
	}
	return found
}

// forReleases runs a test with each release.
func forReleases(t *testing.T, test func(t *testing.T, r release)) {
	for _, r := range releases(t) {
		name, _, _ := strings.Cut(r.version, "~")
		t.Run(name, func(t *testing.T) { test(t, r) })
	}
}

// run runs a program and returns what it prints; it must succeed.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := program.Try(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// eventually waits until something holds.
func eventually(t testing.TB, what string, within time.Duration, holds func() error) {
	t.Helper()
	for end := time.Now().Add(within); ; time.Sleep(100 * time.Millisecond) {
		err := holds()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: not after %v: %v", what, within, err)
		}
	}
}

// mountsBelow returns the mount points below a directory, the innermost first.
func mountsBelow(dir string) (targets []string, err error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	err = mount.ParseMountinfo(f, func(e mount.Entry) error {
		if strings.HasPrefix(e.Target, dir+"/") {
			targets = append([]string{e.Target}, targets...)
		}
		return nil
	})
	return targets, err
}

func unmountBelow(dir string) error {
	targets, err := mountsBelow(dir)
	for _, target := range targets {
		_, uerr := program.Try("umount", "--lazy", target)
		err = errors.Join(err, uerr)
	}
	return err
}

// loopsBelow returns the loop devices whose files lie below a directory.
func loopsBelow(t testing.TB, dir string) (devices []string) {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), dir+"/") {
			devices = append(devices, f)
		}
	}
	return devices
}
