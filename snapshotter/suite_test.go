package snapshotter_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"github.com/particle-os/particle/snapshotter"
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
