package snapshotter_test

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/particle-os/particle/snapshotter"
	"github.com/particle-os/particle/snapshotter/service"
)

// suiteName is the name of containerd's overlayfs snapshotter, because the suite
// spares that rename(2) of a lower directory, which overlayfs does not do without
// redirect_dir.
const suiteName = "overlayfs"

// suiteTests is the number of subtests of the suite in containerd 2.4.
const suiteTests = 21

// runSuite runs a suite in a child process and fails where a subtest was skipped.
func runSuite(t *testing.T, suite func(t *testing.T)) {
	if isChild(t) {
		suite(t)
		return
	}
	requireMounts(t)
	out, err := child(t, t.Name(), "-test.root")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	passed := strings.Count(out, "    --- PASS: "+t.Name()+"/")
	if passed < suiteTests || strings.Contains(out, "--- SKIP") || strings.Contains(out, "--- FAIL") {
		t.Errorf("%d subtests passed, want %d and none skipped:\n%s", passed, suiteTests, out)
	}
}

func TestSuite(t *testing.T) {
	runSuite(t, func(t *testing.T) {
		testsuite.SnapshotterSuite(t, suiteName, func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
			e, err := open(ctx, root, snapshotter.Options{Log: quiet(t)})
			if err != nil {
				return nil, nil, err
			}
			return e, func() error { return errors.Join(e.Close(), snapshotter.UnmountAll(e.root)) }, nil
		})
	})
}

// TestSuiteProxy runs the suite as containerd talks to a proxy plugin.
func TestSuiteProxy(t *testing.T) {
	runSuite(t, func(t *testing.T) {
		testsuite.SnapshotterSuite(t, suiteName, func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
			e, err := open(ctx, root, snapshotter.Options{Log: quiet(t)})
			if err != nil {
				return nil, nil, err
			}
			p, stop, err := serve(e, filepath.Join(root, "socket"), "")
			if err != nil {
				return nil, nil, err
			}
			return p, func() error { return errors.Join(stop(), e.Close(), snapshotter.UnmountAll(e.root)) }, nil
		})
	})
}

// serve serves a snapshotter on a socket and returns a client's view of it.
func serve(e *env, socket, containerd string) (_ snapshots.Snapshotter, stop func() error, err error) {
	srv, err := service.New(service.Options{Snapshotter: e.Snapshotter, Containerd: containerd, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, nil, err
	}
	l, err := service.Listen(socket)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, l) }()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		cancel()
		return nil, nil, errors.Join(err, <-done)
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "particle"), func() error {
		err := conn.Close()
		cancel()
		return errors.Join(err, <-done)
	}, nil
}
