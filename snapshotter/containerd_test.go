package snapshotter_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/snapshotter"
	"github.com/particle-os/particle/tests/program"
)

// A realDaemon is a containerd that runs on directories of a test, with our snapshotter
// as proxy plugin.
type realDaemon struct {
	t       testing.TB
	dir     string
	socket  string
	version string
	process *program.Process
}

// containerdVersion returns the version of the containerd in $PATH, or skips the test
// where that or what it needs is missing.
func containerdVersion(t testing.TB) string {
	t.Helper()
	for prog, pkg := range map[string]string{"containerd": "containerd", "ctr": "containerd", "runc": "runc"} {
		if _, err := exec.LookPath(prog); err != nil {
			t.Skipf("%v: install the package %s", err, pkg)
		}
	}
	out, err := program.Try("containerd", "--version")
	f := strings.Fields(out)
	if err != nil || len(f) < 3 {
		t.Fatalf("containerd --version: %q, %v", out, err)
	}
	return strings.TrimPrefix(f[2], "v")
}

// hasDiffProxy reports whether a release of containerd has proxies of differs.
func hasDiffProxy(version string) bool { return !strings.HasPrefix(version, "1.6.") }

// startContainerd starts containerd. The snapshotter must be served at plugin.
func startContainerd(t testing.TB, dir, plugin string) *realDaemon {
	t.Helper()
	d := &realDaemon{t: t, dir: dir, socket: filepath.Join(dir, "containerd.sock"), version: containerdVersion(t)}
	config := fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
  address = %q
[proxy_plugins.particle]
  type = "snapshot"
  address = %q
`, filepath.Join(dir, "croot"), filepath.Join(dir, "cstate"), d.socket, plugin)
	if hasDiffProxy(d.version) {
		config += fmt.Sprintf(`  capabilities = ["rebase"]
[proxy_plugins.particle-diff]
  type = "diff"
  address = %q
[plugins."io.containerd.service.v1.diff-service"]
  default = ["particle-diff", "walking"]
[plugins."io.containerd.transfer.v1.local"]
  max_concurrent_unpacks = 3
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/%s"
  snapshotter = "particle"
  differ = "particle-diff"
`, plugin, runtime.GOARCH)
	}
	path := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	d.process = program.Start(t, "containerd", "--config", path)
	t.Cleanup(func() {
		d.stop()
		if t.Failed() {
			t.Logf("containerd's log:\n%s", d.process.Log())
		}
	})
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		if _, err := d.tryCtr("version"); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("containerd does not answer:\n%s", d.process.Log())
		}
	}
	return d
}

func (d *realDaemon) stop() { d.process.Stop(syscall.SIGTERM) }

func (d *realDaemon) tryCtr(args ...string) (string, error) {
	return program.Try("ctr", append([]string{"--address", d.socket, "--namespace", program.Namespace}, args...)...)
}

func (d *realDaemon) ctr(args ...string) string {
	d.t.Helper()
	out, err := d.tryCtr(args...)
	if err != nil {
		d.t.Fatal(err)
	}
	return out
}

// printed runs the program of buildTool in a new container and returns what it prints.
func (d *realDaemon) printed(image string, args ...string) string {
	d.t.Helper()
	n := 0
	out, err := program.Whole(func() (string, error) {
		n++
		return d.tryCtr(append([]string{"run", "--rm", "--snapshotter", "particle", "--net-host", image, fmt.Sprint("c", n), "/tool"}, args...)...)
	})
	if err != nil {
		d.t.Fatal(err)
	}
	return out
}

// buildTool compiles a static program that prints the files it is told and can write.
func buildTool(t testing.TB) []byte {
	t.Helper()
	dir := t.TempDir()
	src := `package main

import (
	"fmt"
	"os"
)

func main() {
	for i := 2; i < len(os.Args); i++ {
		var err error
		switch os.Args[1] {
		case "cat":
			var b []byte
			b, err = os.ReadFile(os.Args[i])
			fmt.Printf("%d:%.20s\n", len(b), b)
		case "write":
			err = os.WriteFile(os.Args[i], []byte("written"), 0o600)
		case "rm":
			err = os.RemoveAll(os.Args[i])
		case "wait":
			_, err = os.Stdin.Read(make([]byte, 1))
		}
		if err != nil {
			fmt.Println(err)
		}
	}
	fmt.Print(end)
}

const end = ` + strconv.Quote(program.End) + "\n"
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(src), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := program.TryEnv([]string{"CGO_ENABLED=0", "GOFLAGS="}, "go", "build", "-o", filepath.Join(dir, "tool"), filepath.Join(dir, "main.go"))
	if err != nil {
		t.Skipf("building a program for the container: %v", err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "tool"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// runnable is testImage with a program in it.
func runnable(t testing.TB) *image {
	tool := string(buildTool(t))
	i := testImage(t)
	return newImage(t, append([][]byte{tarOf(t, f("tool", tool, 0o755), d("proc", 0o555), d("dev", 0o755), d("sys", 0o555), d("run", 0o755), d("tmp", 0o1777))}, plainLayers(t, i)...)...)
}

// plainLayers returns the layers of an image as tars.
func plainLayers(t testing.TB, i *image) (layers [][]byte) {
	t.Helper()
	for _, l := range i.layers {
		layers = append(layers, gunzip(t, i.blobs[l.Digest]))
	}
	return layers
}

// archive writes an image as an OCI archive.
func (i *image) archive(t testing.TB, path, name string) {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	add := func(name string, b []byte) {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(b))}); err != nil {
			t.Fatal(err)
		}
		w.Write(b)
	}
	m := i.manifest
	m.Annotations = map[string]string{"io.containerd.image.name": name}
	index, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{m}, Versioned: specs.Versioned{SchemaVersion: 2}})
	if err != nil {
		t.Fatal(err)
	}
	add("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	add("index.json", index)
	for d, b := range i.blobs {
		add("blobs/sha256/"+d.Encoded(), b)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, buf.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
}

// plugin serves a snapshotter to a containerd that runs on dir.
func plugin(t testing.TB, dir string, o snapshotter.Options) (*env, string) {
	t.Helper()
	e := mustOpen(t, dir, o)
	socket := filepath.Join(dir, "particle.sock")
	_, stop, err := serve(e, socket, filepath.Join(dir, "containerd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return e, socket
}

// TestContainerd imports, runs, commits, exports and removes with the containerd of
// this machine.
func TestContainerd(t *testing.T) {
	requireMounts(t)
	dir := t.TempDir()
	e, socket := plugin(t, dir, snapshotter.Options{})
	d := startContainerd(t, dir, socket)
	t.Logf("containerd %s", d.version)
	i := runnable(t)
	const name = "example.com/test:1"
	i.archive(t, filepath.Join(dir, "image.tar"), name)

	d.ctr("images", "import", "--snapshotter", "particle", filepath.Join(dir, "image.tar"))
	wantRead := 0
	if hasDiffProxy(d.version) {
		wantRead = len(i.layers)
	}
	if n := e.Stats().LayersRead; int(n) != wantRead {
		t.Errorf("our differ read %d layers, want %d", n, wantRead)
	}
	got := d.printed(name, "cat", "/etc/passwd", "/etc/shadow", "/dir/a", "/dir/new", "/var/lib/y", "/bin/again")
	want := "8:changed\n\n0:\nopen /etc/shadow: no such file or directory\n0:\nopen /dir/a: no such file or directory\n3:new\n" +
		fmt.Sprintf("%d:%.20s\n%d:%.20s\n", len(big)+1, big, len(big)+4, big)
	if got != want {
		t.Errorf("the container prints %q, want %q", got, want)
	}

	// A container that stays changes something; its snapshot is committed and run.
	d.ctr("containers", "create", "--snapshotter", "particle", "--net-host", name, "stays", "/tool", "write", "/dir/written")
	if out, err := d.tryCtr("tasks", "start", "stays"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	d.tryCtr("tasks", "rm", "stays") // ctr has done so, unless it saw the end late
	d.ctr("snapshots", "--snapshotter", "particle", "commit", "committed", "stays")
	// ctr of 1.6 labels what it commits, but no views: containerd would collect this one
	// as garbage whenever it comes to that.
	client, err := containerd.New(d.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	_, err = client.SnapshotService("particle").View(namespaces.WithNamespace(t.Context(), program.Namespace), "look", "committed",
		snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "test"}))
	if err != nil {
		t.Fatal(err)
	}
	view := d.ctr("snapshots", "--snapshotter", "particle", "mounts", t.TempDir(), "look")
	if !strings.Contains(view, filepath.Join(e.root, "mounts")) {
		t.Errorf("the mounts are %q", view)
	}
	info := d.ctr("snapshots", "--snapshotter", "particle", "info", "look")
	if !strings.Contains(info, snapshotter.LabelVerification) {
		t.Errorf("no verification in %s", info)
	}
	written := false
	for _, m := range mountsBelow(t, dir) {
		if b, err := os.ReadFile(filepath.Join(m, "dir/written")); err == nil && string(b) == "written" {
			written = true
		}
	}
	if !written {
		t.Error("the committed snapshot lacks what the container wrote")
	}
	d.ctr("snapshots", "--snapshotter", "particle", "rm", "look")
	d.ctr("snapshots", "--snapshotter", "particle", "rm", "committed")
	d.ctr("containers", "rm", "stays")

	d.ctr("images", "export", filepath.Join(dir, "export.tar"), name)
	if fi, err := os.Stat(filepath.Join(dir, "export.tar")); err != nil || fi.Size() < 1<<20 {
		t.Errorf("exported: %v, %v", fi, err)
	}
	d.ctr("images", "rm", "--sync", name)
	if out := d.ctr("snapshots", "--snapshotter", "particle", "ls"); strings.Count(out, "\n") != 1 {
		t.Errorf("snapshots are left: %s", out)
	}
	d.stop()
	if err := e.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	e.nothingLeft(t)
}

// TestContainerdPull pulls with the containerd of this machine: an image of 100 layers,
// and one whose layers the store has, of which nothing may be fetched.
func TestContainerdPull(t *testing.T) {
	requireMounts(t)
	dir := t.TempDir()
	e, socket := plugin(t, dir, snapshotter.Options{})
	d := startContainerd(t, dir, socket)
	reg := newRegistry(t)
	host := strings.TrimPrefix(reg.URL, "http://")
	client, err := containerd.New(d.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(t.Context(), program.Namespace), 5*time.Minute)
	defer cancel()
	pull := func(ref string) containerd.Image {
		t.Helper()
		img, err := client.Pull(ctx, ref, containerd.WithPullUnpack, containerd.WithPullSnapshotter("particle"),
			containerd.WithResolver(docker.NewResolver(docker.ResolverOptions{
				Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost)),
			})))
		if err != nil {
			t.Fatal(err)
		}
		return img
	}

	layers := 100
	if testing.Short() {
		layers = 20 // each waits for the disk some ten times
	}
	hundred := manyLayers(t, layers)
	hundred.push(t, reg.URL, "hundred")
	began := time.Now()
	pull(host + "/hundred:1")
	t.Logf("%d layers took %v", layers, time.Since(began))
	if n := reg.layersGot(hundred); n != layers {
		t.Errorf("%d layers were fetched, want %d", n, layers)
	}
	sn := client.SnapshotService("particle")
	mounts, err := sn.Prepare(ctx, "hundred", hundred.chains()[layers-1].String(),
		snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "test"}))
	if err != nil {
		t.Fatal(err)
	}
	mounted(t, mounts, func(root string) {
		names, err := os.ReadDir(filepath.Join(root, "all"))
		if err != nil || len(names) != 2 {
			t.Errorf("got %v, %v, want two files", names, err)
		}
		if b, err := os.ReadFile(filepath.Join(root, "last")); err != nil || string(b) != fmt.Sprint(layers-1) {
			t.Errorf("last has %q: %v", b, err)
		}
	})

	i := runnable(t)
	i.push(t, reg.URL, "present")
	if _, err := converter.Convert(ctx, i, e.store, converter.Options{Name: "the host's image"}); err != nil {
		t.Fatal(err)
	}
	ref := host + "/present:1"
	pull(ref)
	if n := reg.layersGot(i); n != 0 {
		t.Errorf("%d layers were fetched of an image whose layers are in the store", n)
	}
	out := d.printed(ref, "cat", "/dir/new")
	if out != "3:new\n" {
		t.Errorf("the container prints %q", out)
	}

	// What containerd 2 pulls itself it unpacks in parallel.
	own := newImage(t, append(plainLayers(t, i), tarOf(t, f("etc/own", "own", 0o644)), tarOf(t, f("dir/.wh.new", "", 0)))...)
	own.push(t, reg.URL, "own")
	d.ctr("images", "pull", "--plain-http", "--snapshotter", "particle", host+"/own:1")
	out = d.printed(host+"/own:1", "cat", "/etc/own", "/dir/new", "/etc/passwd")
	if want := "3:own\n0:\nopen /dir/new: no such file or directory\n8:changed\n\n"; out != want {
		t.Errorf("the container prints %q, want %q", out, want)
	}

	if err := sn.Remove(ctx, "hundred"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{ref, host + "/hundred:1", host + "/own:1"} {
		d.ctr("images", "rm", "--sync", name)
	}
	left := 0
	if err := e.Walk(ctx, func(_ context.Context, info snapshots.Info) error { left++; return nil }); err != nil || left > 0 {
		t.Errorf("%d snapshots are left, %v", left, err)
	}
	if _, err := converter.Remove(e.store, "the host's image"); err != nil {
		t.Fatal(err)
	}
	d.stop()
	if _, err := converter.GC(ctx, e.store, store.GCOptions{}); err != nil {
		t.Fatal(err)
	}
	e.nothingLeft(t)
}

func gunzip(t testing.TB, b []byte) []byte {
	t.Helper()
	r, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return plain
}
