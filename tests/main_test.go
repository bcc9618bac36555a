package tests

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// particle is the command under test, built once.
var particle string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("/var/tmp", "particle-tests-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	work = dir
	particle = filepath.Join(dir, "particle")
	build := exec.Command("go", "build", "-o", particle, module+"cmd/particle")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building particle: %v\n%s", err, out)
		return 1
	}
	for _, tool := range []string{"mkcomposefs", "composefs-info", "mount.composefs"} {
		if err := os.Symlink("particle", filepath.Join(dir, tool)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	defer cleanPodman()
	return m.Run()
}

// work is a directory on disk, removed when all tests are done. (Temporary
// directories of tests may lie in memory, and images are large.)
var work string

// dirFor makes a directory on disk that goes with the test.
func dirFor(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(work, "t-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// need skips a test that must be root or lacks a program; packages are Debian's.
func need(t testing.TB, programs ...string) {
	t.Helper()
	if testing.Short() {
		t.Skip("drives foreign programs; not in -short")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	packages := map[string]string{"mkfs.erofs": "erofs-utils", "fsck.erofs": "erofs-utils", "dpkg-deb": "dpkg"}
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
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := try(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// try runs a program; the error has what it printed on stderr.
func try(name string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Env = append(os.Environ(), "TMPDIR="+work)
	if podmanEnv != nil {
		cmd.Env = append(cmd.Env, podmanEnv...)
	}
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %s: %v\n%s", filepath.Base(name), strings.Join(args, " "), err, tail(stderr.String()+stdout.String()))
	}
	return stdout.String(), nil
}

func tail(s string) string {
	if len(s) > 4000 {
		return "…" + s[len(s)-4000:]
	}
	return s
}

// podmanEnv keeps podman away from the images of this machine: its storage lies in
// the work directory. Settings that the machine needs come from CONTAINERS_CONF.
var (
	podmanEnv  []string
	podmanOnce sync.Once
)

func needPodman(t testing.TB, programs ...string) {
	t.Helper()
	need(t, append(programs, "podman")...)
	podmanOnce.Do(func() {
		conf := filepath.Join(work, "storage.conf")
		text := fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = %q\n", filepath.Join(work, "podman"), filepath.Join(work, "podman-run"))
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		podmanEnv = []string{"CONTAINERS_STORAGE_CONF=" + conf}
	})
}

// cleanPodman frees what podman keeps mounted.
func cleanPodman() {
	if podmanEnv == nil {
		return
	}
	if _, err := try("podman", "image", "umount", "--all"); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	// podman bind-mounts its overlay directory on itself.
	_ = exec.Command("umount", filepath.Join(work, "podman", "overlay")).Run()
}

// A fixture is made by the first test that needs it.
type fixture struct {
	once sync.Once
	make func(t testing.TB) string
	path string
}

func (f *fixture) get(t testing.TB) string {
	t.Helper()
	f.once.Do(func() { f.path = f.make(t) })
	if f.path == "" {
		t.Skip("a fixture of this test could not be made; the first test that needs it says why")
	}
	return f.path
}

// bootstrap returns the reference of an OCI layout with a base image.
func bootstrap(suite string) *fixture {
	return &fixture{make: func(t testing.TB) string {
		need(t, "mmdebstrap")
		args := []string{"bootstrap", suite, "oci:" + filepath.Join(work, "base-"+suite) + ":" + suite}
		if opt := os.Getenv("PARTICLE_TEST_APTOPT"); opt != "" {
			args = append(args, "--aptopt="+opt)
		}
		if mirror := os.Getenv("PARTICLE_TEST_MIRROR"); mirror != "" {
			args = append(args, "--mirror="+mirror)
		}
		run(t, particle, args...)
		return args[2]
	}}
}

var (
	trixie   = bootstrap("trixie")
	bookworm = bootstrap("bookworm")
	// server is podman's name of the server example.
	server = &fixture{make: func(t testing.TB) string { return buildExample(t, "server") }}
	tiny   = &fixture{make: func(t testing.TB) string { return buildExample(t, "tiny") }}
	// deb is a directory with the package particle, which the server example installs.
	deb = &fixture{make: func(t testing.TB) string {
		need(t, "dpkg-deb", "make")
		dir := filepath.Join(work, "deb")
		run(t, "env", "VERSION=0.0.1", "SOURCE_DATE_EPOCH=1700000000", "../packaging/deb.sh", dir)
		return dir
	}}
)

// buildExample builds an example over the trixie base with podman.
func buildExample(t testing.TB, name string) string {
	needPodman(t)
	run(t, "podman", "pull", "-q", trixie.get(t))
	base := imageID(t, trixie.get(t))
	run(t, "podman", "tag", base, "localhost/base")
	args := []string{"build", "-q", "-t", "localhost/" + name, "--build-arg", "BASE=localhost/base"}
	if opts := os.Getenv("PARTICLE_TEST_APT_OPTS"); opts != "" {
		args = append(args, "--build-arg", "APT_OPTS="+opts)
	}
	if name == "server" {
		args = append(args, "--build-context", "deb="+deb.get(t))
	}
	run(t, "podman", append(args, "../docs/examples/"+name)...)
	return "localhost/" + name
}

// imageID returns the config digest of an image in a layout, which is podman's ID.
func imageID(t testing.TB, ref string) string {
	t.Helper()
	dir, _, _ := strings.Cut(strings.TrimPrefix(ref, "oci:"), ":")
	var index struct {
		Manifests []struct{ Digest string }
	}
	readJSON(t, filepath.Join(dir, "index.json"), &index)
	var m struct{ Config struct{ Digest string } }
	readJSON(t, filepath.Join(dir, "blobs/sha256", strings.TrimPrefix(index.Manifests[0].Digest, "sha256:")), &m)
	return strings.TrimPrefix(m.Config.Digest, "sha256:")
}

func readJSON(t testing.TB, name string, v any) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

// A converted is what particle convert --json prints.
type converted struct {
	Manifest, Config string
	Images           map[string]string
	Layers           []struct {
		DiffID  string
		Size    int64
		Present bool
	}
	NewObjects int
	NewBytes   int64
}

// convert brings a source into a store.
func convert(t testing.TB, store, source, name string, flags ...string) converted {
	t.Helper()
	out := run(t, particle, append([]string{"--store", store, "--quiet", "convert", source, name, "--json"}, flags...)...)
	var c converted
	if err := json.Unmarshal([]byte(out), &c); err != nil {
		t.Fatalf("particle convert printed %q: %v", out, err)
	}
	return c
}
