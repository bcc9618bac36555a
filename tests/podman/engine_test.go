package podman

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/tests/program"
)

// A release is a podman to test with.
type release struct {
	name   string
	chroot string // "" for this machine's
	major  int
	minor  int
}

// since reports whether a podman is not older than a version.
func (r release) since(major, minor int) bool {
	return r.major > major || r.major == major && r.minor >= minor
}

// sharesStorage reports whether several of it may pull into one storage at once when
// layers come from a layer store (4.4, c/storage 1.45). In an older one, the podman that
// has taken over a layer waits for storage.lock while it has layers.lock
// (additionalLayer.PutAs calls ROLayerStores), and one that reads the storage anew waits
// for layers.lock while it has storage.lock (store.LayerStore calls newLayerStore).
func (r release) sharesStorage() bool { return r.since(4, 4) }

// toc reports whether it asks for layers by the digest of their table of contents.
func (r release) toc() bool { return r.since(5, 1) }

// takesImages reports whether it mounts the layers of an image store.
func (r release) takesImages() bool { return r.since(5, 4) }

// forgets reports whether it loses layers of a layer store.
func (r release) forgets() bool { return r.since(5, 5) }

// format is the compression that layers must have for a layer store to be asked.
func (r release) format() string {
	if r.toc() {
		return "zstd:chunked"
	}
	return "gzip"
}

// releases are the ones to test with.
func releases(t *testing.T) []release {
	need(t, "podman", "runc", "busybox")
	all := []release{{name: "host"}}
	if os.Getenv("PARTICLE_TEST_PODMAN") == "all" {
		for _, suite := range []string{"trixie", "sid"} {
			all = append(all, release{name: suite, chroot: chroot(t, suite)})
		}
	}
	for i := range all {
		r := &all[i]
		cmd := exec.Command("podman", "--version")
		if r.chroot != "" {
			cmd = exec.Command("chroot", r.chroot, "podman", "--version")
		}
		// The settings that $CONTAINERS_* names are this machine's.
		cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
		version := run(t, cmd)
		if _, err := fmt.Sscanf(version, "podman version %d.%d", &r.major, &r.minor); err != nil {
			t.Fatalf("podman --version printed %q: %v", version, err)
		}
	}
	return all
}

// cacheDir is where chroots are kept.
func cacheDir() string {
	if dir := os.Getenv("PARTICLE_TEST_CACHE"); dir != "" {
		return dir
	}
	return "/var/cache/particle-test"
}

// chroot makes a Debian with podman, once, and mounts there what podman needs.
func chroot(t *testing.T, suite string) string {
	t.Helper()
	cache := cacheDir()
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(filepath.Join(cache, "podman-chroots.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cache, "podman-"+suite)
	if _, err := os.Stat(filepath.Join(dir, "usr/bin/podman")); err != nil {
		need(t, "mmdebstrap")
		temp := dir + ".new"
		if err := os.RemoveAll(temp); err != nil {
			t.Fatal(err)
		}
		args := []string{"--quiet", "--variant=minbase", "--include=podman,runc,netavark,skopeo,ca-certificates"}
		if opt := os.Getenv("PARTICLE_TEST_APTOPT"); opt != "" {
			args = append(args, "--aptopt="+opt)
		}
		args = append(args, suite, temp)
		if mirror := os.Getenv("PARTICLE_TEST_MIRROR"); mirror != "" {
			args = append(args, mirror)
		}
		if out, errs, err := program.Within(buildTime, exec.Command("mmdebstrap", args...)); err != nil {
			t.Skipf("making a chroot of %s: %v\n%s", suite, err, tail(errs+out))
		}
		if err := os.Rename(temp, dir); err != nil {
			t.Fatal(err)
		}
	}
	// A view of the chroot of this test's own, below the work directory.
	view := filepath.Join(work, "chroot-"+suite)
	if _, err := os.Stat(view); err == nil {
		return view
	}
	if err := os.Mkdir(view, 0o755); err != nil {
		t.Fatal(err)
	}
	bind := func(source, target string) {
		if err := os.MkdirAll(target, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(source, target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			t.Fatalf("binding %s on %s: %v", source, target, err)
		}
	}
	bind(dir, view)
	// A mount below itself would go round in circles.
	if err := unix.Mount("", view, "", unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"proc", "sys", "dev"} {
		bind("/"+d, filepath.Join(view, d))
		if err := unix.Mount("", filepath.Join(view, d), "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
			t.Fatal(err)
		}
	}
	bind(shared, filepath.Join(view, shared))
	if err := unix.Mount("tmpfs", filepath.Join(view, "run"), "tmpfs", 0, "mode=755"); err != nil {
		t.Fatal(err)
	}
	return view
}

// An engine is podman with a storage of its own.
type engine struct {
	t     testing.TB
	dir   string
	rel   release
	conf  string // storage.conf
	graph string
	path  string // a directory that comes first in $PATH; "" for none
}

// newEngine makes an empty storage, which looks for layers in the directory layers
// unless that is "".
func newEngine(t testing.TB, rel release, layers string) *engine {
	t.Helper()
	return newEngineIn(t, rel, layers, sharedDir(t))
}

// newEngineIn makes an engine with all of its files below a directory.
func newEngineIn(t testing.TB, rel release, layers, dir string) *engine {
	t.Helper()
	e := &engine{t: t, dir: dir, rel: rel, conf: filepath.Join(dir, "storage.conf"), graph: filepath.Join(dir, "graph")}
	text := fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = %q\n", e.graph, filepath.Join(dir, "run"))
	if layers != "" {
		text += fmt.Sprintf("[storage.options]\nadditionallayerstores = [%q]\n", layers+":ref")
	}
	write(t, e.conf, text)
	write(t, filepath.Join(dir, "containers.conf"), fmt.Sprintf(`[containers]
netns = "host"
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
tmp_dir = %q
[network]
network_backend = "netavark"
network_config_dir = %q
`, filepath.Join(dir, "tmp"), filepath.Join(dir, "net")))
	write(t, filepath.Join(dir, "auth.json"), "{}")
	write(t, filepath.Join(dir, "registries.conf"), "[[registry]]\nlocation = \"127.0.0.1\"\ninsecure = true\n")
	write(t, filepath.Join(dir, "policy.json"), `{"default":[{"type":"insecureAcceptAnything"}]}`)
	t.Cleanup(func() {
		for _, args := range [][]string{{"rm", "--all", "--force", "--time=0"}, {"image", "umount", "--all"}} {
			if _, errs, err := program.Run(e.command(args...)); err != nil {
				t.Logf("podman %s: %v\n%s", strings.Join(args, " "), err, tail(errs))
			}
		}
		// podman bind-mounts its overlay directory on itself.
		_ = unix.Unmount(filepath.Join(e.graph, "overlay"), unix.MNT_DETACH)
	})
	return e
}

// command makes a command of podman's.
func (e *engine) command(args ...string) *exec.Cmd {
	cmd := exec.Command("podman", args...)
	if e.rel.chroot != "" {
		cmd = exec.Command("chroot", append([]string{e.rel.chroot, "podman"}, args...)...)
	}
	cmd.Dir = "/"
	cmd.Env = []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + e.dir, "LC_ALL=C",
		"TMPDIR=" + e.dir, "PODMAN_IGNORE_CGROUPSV1_WARNING=1",
		"CONTAINERS_STORAGE_CONF=" + e.conf,
		"CONTAINERS_CONF=" + filepath.Join(e.dir, "containers.conf"),
		"CONTAINERS_REGISTRIES_CONF=" + filepath.Join(e.dir, "registries.conf"),
		"REGISTRY_AUTH_FILE=" + filepath.Join(e.dir, "auth.json"),
	}
	if e.path != "" {
		cmd.Env = append(cmd.Env, "PATH="+e.path+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
	return cmd
}

// podman runs podman, which must succeed, and returns what it printed.
func (e *engine) podman(args ...string) string {
	e.t.Helper()
	began := time.Now()
	defer func() { e.t.Logf("podman %s: %s", strings.Join(args, " "), time.Since(began).Round(time.Millisecond)) }()
	return strings.TrimSpace(run(e.t, e.command(args...)))
}

// quietly runs podman, which must succeed and print no warning.
func (e *engine) quietly(args ...string) string {
	e.t.Helper()
	cmd := e.command(args...)
	out, errs, err := program.Run(cmd)
	if err != nil || strings.Contains(errs, "level=warning") || strings.Contains(errs, "level=error") {
		e.t.Fatalf("podman %s: %v\n%s", strings.Join(args, " "), err, tail(errs+out))
	}
	return strings.TrimSpace(out)
}

// mounted calls fn with the directory where podman shows an image.
func (e *engine) mounted(image string, fn func(dir string)) {
	e.t.Helper()
	dir := e.podman("image", "mount", image)
	defer e.podman("image", "umount", "--force", image)
	fn(filepath.Join(e.rel.chroot, dir))
}

// layerBytes returns the bytes of regular files that podman keeps for layers in its
// own storage, and their number. (Not in it: the records of a layer, which are links
// and a few names.)
func (e *engine) layerBytes() (bytes int64, files []string) {
	e.t.Helper()
	overlay := filepath.Join(e.graph, "overlay")
	dirs, err := filepath.Glob(filepath.Join(overlay, "*", "diff"))
	if err != nil {
		e.t.Fatal(err)
	}
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			fi, err := d.Info()
			if err != nil {
				return err
			}
			bytes += fi.Size()
			files = append(files, path)
			return nil
		})
		if err != nil {
			e.t.Fatal(err)
		}
	}
	return bytes, files
}

// layers returns how many layers podman's storage has, and how many of them are of a
// layer store.
func (e *engine) layers() (all, additional int) {
	e.t.Helper()
	links, err := filepath.Glob(filepath.Join(e.graph, "overlay", "*", "link"))
	if err != nil {
		e.t.Fatal(err)
	}
	for _, l := range links {
		all++
		if _, err := os.Stat(filepath.Join(filepath.Dir(l), "additionallayer")); err == nil {
			additional++
		}
	}
	return all, additional
}

func write(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
