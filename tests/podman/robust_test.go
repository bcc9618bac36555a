package podman

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/registry"
	"github.com/particle-os/particle/tests/program"
)

// TestConcurrent pulls 16 images side by side that share layers, half of them into one
// storage where podman can do that: each layer is fetched once, and each image is whole.
func TestConcurrent(t *testing.T) {
	rel := host(t)
	addr, blobs, _ := serve(t, registry.ServeOptions{})
	const images = 16
	base := baseLayer(t)
	var shared []v1.Layer
	for i := range 4 {
		shared = append(shared, layerOf(t, dir("usr", 0o755), dir("usr/shared", 0o755),
			file(fmt.Sprintf("usr/shared/%d", i), noise(fmt.Sprint("shared", i), 300_000))))
	}
	refs := make([]string, images)
	for i := range refs {
		own := layerOf(t, dir("etc", 0o755), file("etc/name", fmt.Sprint(i)), file("etc/.wh.empty", ""))
		refs[i] = fmt.Sprintf("%s/image%d:1", addr, i)
		put(t, imageOf(t, base, shared[i%4], shared[(i+1)%4], own), refs[i])
	}
	l := newLayerStore(t)
	l.start()
	engines := make([]*engine, images)
	for i := range engines {
		engines[i] = newEngine(t, rel, l.dir)
	}
	if rel.sharesStorage() {
		for i := range images / 2 {
			engines[i] = engines[0]
		}
	}
	var wg sync.WaitGroup
	for i, ref := range refs {
		wg.Go(func() {
			if _, errs, err := program.Run(engines[i].command("pull", "-q", ref)); err != nil {
				t.Errorf("podman pull %s: %v\n%s", ref, err, tail(errs))
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	// 1 + 4 shared and 16 own layers once, and a config for podman and one for us each.
	if got, most := blobs.requests.Load(), int64(5+images+2*images); got > most {
		t.Errorf("the registry sent %d blobs, want at most %d", got, most)
	}
	for i, ref := range refs {
		if i%3 != 0 { // some of either kind will do: starting takes longest
			continue
		}
		got := engines[i].podman("run", "--rm", ref, "sh", "-c", "cat /etc/name; ls /etc/empty 2>&1; ls /usr/shared")
		want := []string{fmt.Sprint(i), fmt.Sprint(i % 4), fmt.Sprint((i + 1) % 4)}
		for _, w := range want {
			if !strings.Contains(got, w) {
				t.Errorf("%s: %q lacks %q", ref, got, w)
			}
		}
		if !strings.Contains(got, "No such file") {
			t.Errorf("%s: a deleted file shows: %q", ref, got)
		}
	}
	for _, e := range engines {
		if n, files := e.layerBytes(); n != 0 {
			t.Errorf("podman keeps %d bytes of layers itself: %q", n, files)
		}
	}
}

// host is the podman of this machine, for tests of the layer store itself.
func host(t *testing.T) release {
	t.Helper()
	rel := releases(t)[0]
	if rel.toc() {
		t.Skip("this podman asks for layers by table of contents; TestPull has that")
	}
	return rel
}

// TestKill: the service is killed under a running container, and comes back.
func TestKill(t *testing.T) {
	rel := host(t)
	addr, _, _ := serve(t, registry.ServeOptions{})
	ref := addr + "/three:1"
	put(t, threeLayers(t), ref)
	l := newLayerStore(t)
	l.start()
	e := newEngine(t, rel, l.dir)
	e.quietly("pull", "-q", ref)
	e.podman("run", "-d", "--name", "c", ref, "sleep", "1000")
	l.end(syscall.SIGKILL)

	// The container goes on, with files that it has not read before.
	if got := e.rawExec("c", "cat", "/usr/share/gone/again"); got != "back, but empty" {
		t.Errorf("after a kill the container reads %q", got)
	}
	// What systemd does (ExecStopPost): without a front there is the plain tree.
	if err := unix.Unmount(l.dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if got := e.podman("run", "--rm", ref, "cat", "/usr/share/gone/again"); got != "back, but empty" {
		t.Errorf("without a service podman run reads %q", got)
	}
	mounts := len(l.mountedLayers())

	l.start()
	if got := len(l.mountedLayers()); got != mounts {
		t.Errorf("%d layers are mounted after the restart, %d were before", got, mounts)
	}
	if got := e.podman("exec", "c", "cat", "/usr/share/kept/f2"); got != "again" {
		t.Errorf("after the restart the container reads %q", got)
	}
	// A kill leaves a dead front; a start takes it away by itself.
	l.end(syscall.SIGKILL)
	l.start()
	e.quietly("run", "--rm", ref, "true")
	e.podman("rm", "-f", "-t", "0", "c")
	e.quietly("rmi", ref)
	if names := l.mountedLayers(); len(names) != 0 {
		t.Errorf("after podman rmi %d layers are still mounted: users were not counted over the restarts", len(names))
	}
}

// rawExec runs a program in a container without podman, which fails while the layer
// store's front is dead.
func (e *engine) rawExec(name string, args ...string) string {
	e.t.Helper()
	ids, err := filepath.Glob(filepath.Join(e.graph, "overlay-containers", "*", "userdata"))
	if err != nil || len(ids) != 1 {
		e.t.Fatalf("containers of podman: %q, %v", ids, err)
	}
	path, err := exec.LookPath("runc")
	if err != nil {
		e.t.Fatal(err)
	}
	cmd := exec.Command(path, append([]string{"exec", filepath.Base(filepath.Dir(ids[0]))}, args...)...)
	return strings.TrimSpace(run(e.t, cmd))
}

// TestFallback: what cannot be had, podman pulls itself, or says why it cannot.
func TestFallback(t *testing.T) {
	rel := host(t)
	var denied atomic.Bool
	addr, _, stop := serve(t, registry.ServeOptions{Wrap: func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if denied.Load() && !strings.Contains(r.UserAgent(), "containers") { // all but podman
				w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			next.ServeHTTP(w, r)
		})
	}})
	ref := addr + "/three:1"
	put(t, threeLayers(t), ref)
	l := newLayerStore(t)
	own := func(e *engine) {
		t.Helper()
		if all, additional := e.layers(); all != 3 || additional != 0 {
			t.Errorf("podman has %d layers, %d of the layer store; want 3 of its own", all, additional)
		}
		if got := e.podman("run", "--rm", ref, "cat", "/usr/share/gone/again"); got != "back, but empty" {
			t.Errorf("podman run reads %q", got)
		}
	}

	// The service is down and the directory empty.
	e := newEngine(t, rel, l.dir)
	e.quietly("pull", "-q", ref)
	own(e)

	// The registry does not let the service in.
	denied.Store(true)
	l.start()
	e = newEngine(t, rel, l.dir)
	e.quietly("pull", "-q", ref)
	own(e)
	if !l.log.contains("access denied") {
		t.Error("the service does not say that access was denied")
	}
	denied.Store(false)
	l.stop()
	l.start()

	// A layer is evicted from the store: it is fetched again when it is needed.
	e = newEngine(t, rel, l.dir)
	e.quietly("pull", "-q", ref)
	l.evict()
	l.start()
	if got := e.podman("run", "--rm", ref, "cat", "/usr/share/gone/again"); got != "back, but empty" {
		t.Errorf("after the eviction podman run reads %q", got)
	}

	// And with the registry down podman says so.
	l.evict()
	stop()
	l.start()
	_, errs, err := program.Run(e.command("run", "--rm", ref, "true"))
	if err == nil || !strings.Contains(errs, "host is down") {
		t.Errorf("without layer and registry podman run says %v\n%s", err, errs)
	}
	if !l.log.contains("connection refused") {
		t.Error("the service does not say that the registry is down")
	}
}

// evict stops the service and empties the store.
func (l *layerStore) evict() {
	l.t.Helper()
	l.stop()
	if err := os.RemoveAll(l.store); err != nil {
		l.t.Fatal(err)
	}
}

// TestTree: a tree without a service gives podman what the store has.
func TestTree(t *testing.T) {
	rel := host(t)
	addr, blobs, _ := serve(t, registry.ServeOptions{})
	ref := addr + "/three:1"
	put(t, threeLayers(t), ref)
	l := newLayerStore(t)
	run(t, l.particle("pull", ref))
	out := run(t, l.particle("layer-store", "tree", "--dir", l.dir, "--mounts", l.mounts))
	if n := strings.Count(out, ref); n != 3 {
		t.Errorf("particle layer-store tree prints %d layers, want 3:\n%s", n, out)
	}
	blobs.requests.Store(0)
	plain, e := newEngine(t, rel, ""), newEngine(t, rel, l.dir)
	e.podman("pull", "-q", ref)
	if got := blobs.requests.Load(); got != 1 {
		t.Errorf("podman pull fetched %d blobs, want the config alone", got)
	}
	if all, additional := e.layers(); all != 3 || additional != 3 {
		t.Errorf("podman has %d layers, %d of the tree; want 3 of 3", all, additional)
	}
	plain.podman("pull", "-q", ref)
	sameFiles(t, plain, e, ref)

	// The bytes are there when asked for only.
	save := func() error {
		_, errs, err := program.Run(e.command("save", "-q", "--format", "oci-archive", "-o", filepath.Join(e.dir, "saved.tar"), ref))
		if err != nil {
			err = fmt.Errorf("%w: %s", err, errs)
		}
		return err
	}
	if err := save(); err == nil || !strings.Contains(err.Error(), "blob: no such device or address") {
		t.Errorf("podman save without blobs says %v", err)
	}
	run(t, l.particle("layer-store", "tree", "--blobs", "--dir", l.dir, "--mounts", l.mounts, ref))
	if err := save(); err != nil {
		t.Errorf("podman save with blobs: %v", err)
	}

	// After a boot nothing is mounted: podman must not take empty directories for layers.
	run(t, l.particle("layer-store", "stop", "--dir", l.dir, "--mounts", l.mounts))
	if _, errs, err := program.Run(e.command("run", "--rm", ref, "true")); err == nil || !strings.Contains(errs, "no such file or directory") {
		t.Errorf("without mounts podman run says %v\n%s", err, errs)
	}
	run(t, l.particle("layer-store", "tree", "--dir", l.dir, "--mounts", l.mounts))
	e.podman("run", "--rm", ref, "true")
}
