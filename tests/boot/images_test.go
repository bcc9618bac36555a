package boot

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/particle-os/particle/registry"
)

// repo is the name of the tests' images in podman's storage and, without localhost, in
// the registry.
const repo = "localhost/particle-boot"

// images makes the tests' images: targets of image/Containerfile. podman keeps the
// layers between runs.
type images struct {
	once    sync.Once
	context string
	stamp   string // of the package
	err     error
	built   sync.Map // target -> *sync.Once
}

var theImages images

// prepare makes the directory that podman builds from.
func (i *images) prepare() error {
	i.once.Do(func() {
		i.context = filepath.Join(work, "images")
		i.err = func() error {
			if err := os.CopyFS(i.context, os.DirFS("image")); err != nil {
				return err
			}
			// Go's CopyFS has its own idea of modes.
			for _, script := range []string{"package", "build-broken"} {
				if err := os.Chmod(filepath.Join(i.context, script), 0o755); err != nil {
					return err
				}
			}
			if err := build(interrupted, filepath.Join(i.context, "agent"), "tests/boot/vm/guest/agent"); err != nil {
				return err
			}
			// The version and the time are fixed, so that the package changes only when the
			// programs do.
			cmd := exec.CommandContext(interrupted, "packaging/deb.sh", i.context)
			cmd.Dir = "../.."
			cmd.Env = append(os.Environ(), "VERSION=0~test", "SOURCE_DATE_EPOCH=1700000000")
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("making the package: %w\n%s", err, out)
			}
			debs, err := filepath.Glob(filepath.Join(i.context, "particle_*.deb"))
			if err != nil || len(debs) != 1 {
				return fmt.Errorf("making the package: found %q, %v", debs, err)
			}
			deb, err := os.ReadFile(debs[0])
			if err != nil {
				return err
			}
			i.stamp = fmt.Sprintf("%x", sha256.Sum256(deb))
			return os.Rename(debs[0], filepath.Join(i.context, "particle.deb"))
		}()
	})
	return i.err
}

// image builds a target and returns its reference in podman's storage.
func image(t testing.TB, target string) string {
	t.Helper()
	base := os.Getenv("PARTICLE_TEST_BOOT_IMAGE")
	if base == "" {
		base = "localhost/server"
	}
	if err := exec.CommandContext(interrupted, "podman", "image", "exists", base).Run(); err != nil {
		t.Skipf("podman has no image %s; tests/setup/images.sh builds it", base)
	}
	if err := theImages.prepare(); err != nil {
		t.Fatal(err)
	}
	name := repo + ":" + target
	once, _ := theImages.built.LoadOrStore(target, new(sync.Once))
	once.(*sync.Once).Do(func() {
		run(t, "podman", "build", "-q", "--pull=never", "--target", target, "-t", name,
			"--build-arg", "BASE="+base, "--build-arg", "STAMP="+theImages.stamp, "--build-arg", "APT_OPTS="+os.Getenv("PARTICLE_TEST_APT_OPTS"), theImages.context)
	})
	return name
}

// server is a registry on this machine's loopback interface; the machines have it at
// localhost:5000.
var (
	server     *registry.Server
	serverOnce sync.Once
)

// guestRegistry is the registry's address inside the machines.
const guestRegistry = "localhost:5000"

// push makes an image what the machines get as TAG of the repository "server", and
// returns its reference as they see it.
func push(t testing.TB, target, tag string) string {
	t.Helper()
	name := image(t, target)
	serverOnce.Do(func() {
		s, err := registry.Serve(interrupted, "", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		server = s
	})
	if server == nil {
		t.Fatal("there is no registry")
	}
	run(t, "podman", "push", "-q", "--tls-verify=false", name, "docker://"+server.Addr()+"/server:"+tag)
	return "docker://" + guestRegistry + "/server:" + tag
}
