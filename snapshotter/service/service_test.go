package service_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	probe "github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/snapshotter"
	"github.com/particle-os/particle/snapshotter/service"
	"github.com/particle-os/particle/tests/program"
)

func newSnapshotter(t *testing.T) (*snapshotter.Snapshotter, string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	f := probe.Probe(os.TempDir())
	if err := f.Mountable(); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	st, err := store.Init(filepath.Join(dir, "store"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(dir, "root")
	sn, err := snapshotter.New(t.Context(), snapshotter.Options{Root: root, Store: st, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(sn.Close(), snapshotter.UnmountAll(root)); err != nil {
			t.Error(err)
		}
	})
	return sn, dir
}

func dial(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// notified collects what a process tells systemd.
func notified(t *testing.T) (states func() []string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	var all []string
	return func() []string {
		buf := make([]byte, 1024)
		for {
			conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			n, err := conn.Read(buf)
			if err != nil {
				return all
			}
			all = append(all, string(buf[:n]))
		}
	}
}

// TestServe goes through a server's life: it unpacks a layer from a content service in
// the caller's namespace, shows metrics, and stops.
func TestServe(t *testing.T) {
	sn, dir := newSnapshotter(t)
	states := notified(t)

	// A stand-in for containerd, with the content service alone.
	files, err := local.NewStore(filepath.Join(dir, "content"))
	if err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	cs := metadata.NewDB(db, files, nil).ContentStore()
	var seen []string
	containerd := grpc.NewServer(
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			ns, _ := namespaces.Namespace(ss.Context())
			seen = append(seen, ns)
			return h(srv, ss)
		}))
	contentapi.RegisterContentServer(containerd, contentserver.New(cs))
	csocket := filepath.Join(dir, "containerd.sock")
	cl, err := net.Listen("unix", csocket)
	if err != nil {
		t.Fatal(err)
	}
	go containerd.Serve(cl)
	defer containerd.Stop()

	srv, err := service.New(service.Options{Snapshotter: sn, Containerd: csocket, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "run/sub/particle.sock")
	l, err := service.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(socket); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the socket is %v, %v", fi.Mode(), err)
	}
	if _, err := service.Listen(socket); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("listening twice: got %v, want EADDRINUSE", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, l) }()

	nsctx := namespaces.WithNamespace(t.Context(), "mine")
	out, err := program.Try("tar", "-C", "/", "--mode=0640", "-czf", "-", "etc/hostname")
	if err != nil {
		t.Skip(err)
	}
	blob := []byte(out)
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	if err := content.WriteBlob(nsctx, cs, "ref", bytes.NewReader(blob), desc); err != nil {
		t.Fatal(err)
	}
	conn := dial(t, socket)
	p := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "particle")
	differ := diffproxy.NewDiffApplier(diffapi.NewDiffClient(conn)).(interface {
		diff.Applier
		diff.Comparer
	})
	mounts, err := p.Prepare(nsctx, "mine/1/extract-1 x", "")
	if err != nil {
		t.Fatal(err)
	}
	applied, err := differ.Apply(nsctx, desc, mounts)
	if err != nil {
		t.Fatal(err)
	}
	if applied.MediaType != ocispec.MediaTypeImageLayer || applied.Digest == desc.Digest {
		t.Errorf("got %+v", applied)
	}
	if !slices.Contains(seen, "mine") {
		t.Errorf("the blob was read in the namespaces %q", seen)
	}
	if err := p.Commit(nsctx, "layer", "mine/1/extract-1 x"); err != nil {
		t.Fatal(err)
	}
	// Mounts of others, and other media types, are left to other differs.
	for _, m := range [][]mount.Mount{nil, {{Type: "bind", Source: "/tmp"}}, {{Type: "overlay", Options: []string{"upperdir=/tmp/fs"}}}} {
		if _, err := differ.Apply(nsctx, desc, m); !errdefs.IsNotImplemented(err) {
			t.Errorf("%v: got %v, want ErrNotImplemented", m, err)
		}
	}
	if mounts, err = p.Prepare(nsctx, "mine/2/extract-2 x", "layer"); err != nil {
		t.Fatal(err)
	}
	other := desc
	other.MediaType = "application/x-encrypted"
	if _, err := differ.Apply(nsctx, other, mounts); !errdefs.IsNotImplemented(err) {
		t.Errorf("got %v, want ErrNotImplemented", err)
	}

	// A layer of changes is made under the caller's lease, by containerd.
	if _, err := differ.Compare(nsctx, mounts, mounts); !errdefs.IsNotImplemented(err) {
		t.Errorf("comparing: got %v, want ErrNotImplemented", err)
	}

	if err := p.Walk(nsctx, func(context.Context, snapshots.Info) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := p.Walk(nsctx, func(context.Context, snapshots.Info) error { return nil }, "no filter"); err == nil {
		t.Error("listing with a bad filter gives no error")
	}

	w := httptest.NewRecorder()
	promhttp.HandlerFor(srv.Registry(), promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{
		`particle_snapshotter_snapshots{kind="committed"} 1`,
		`particle_snapshotter_snapshots{kind="active"} 1`,
		`particle_snapshotter_layers_total{way="applied"} 1`,
		`particle_snapshotter_request_duration_seconds_count{code="OK",method="Commit"} 1`,
		`particle_snapshotter_request_duration_seconds_count{code="Unimplemented",method="Apply"} 4`,
		`particle_snapshotter_request_duration_seconds_count{code="OK",method="List"} 1`,
		`particle_snapshotter_request_duration_seconds_count{code="Unknown",method="List"} 1`,
		"particle_snapshotter_mounts 1\n", "go_goroutines", "process_open_fds",
	} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("the metrics lack %q", want)
		}
	}
	if t.Failed() {
		t.Log(w.Body)
	}

	cancel()
	if err := <-done; err != nil {
		t.Errorf("serving ended with %v", err)
	}
	if got, want := states(), []string{"READY=1", "STOPPING=1"}; !slices.Equal(got, want) {
		t.Errorf("systemd was told %q, want %q", got, want)
	}
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket stays: %v", err)
	}
	var info snapshots.Info
	if info, err = sn.Stat(t.Context(), "layer"); err != nil || info.Kind != snapshots.KindCommitted {
		t.Errorf("the snapshotter ended with its server: %v", err)
	}
}

// TestStale replaces a socket that a killed process left.
func TestStale(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	again, err := service.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := service.Listen(path); !errors.Is(err, os.ErrExist) {
		t.Error("a file that is no socket was replaced")
	}
}

// TestActivation takes the socket that systemd passes, in a process of its own.
func TestActivation(t *testing.T) {
	if os.Getenv("PARTICLE_TEST") == t.Name() {
		t.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
		l, err := service.Listen("/nowhere/at/all")
		if err != nil {
			t.Fatal(err)
		}
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, "hello")
		conn.Close()
		return
	}
	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestActivation$", "-test.timeout=1m")
	cmd.Env = append(os.Environ(), "PARTICLE_TEST=TestActivation", "LISTEN_FDS=1")
	cmd.ExtraFiles = []*os.File{f}
	var printed strings.Builder
	cmd.Stdout, cmd.Stderr = &printed, &printed
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	b, err := io.ReadAll(conn)
	if err != nil || string(b) != "hello" {
		t.Errorf("got %q, %v", b, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, &printed)
	}
}
