package snapshotter_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/log"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/snapshotter"
)

func TestMain(m *testing.M) {
	if err := log.SetLevel("error"); err != nil { // of containerd's packages
		panic(err)
	}
	os.Exit(m.Run())
}

// requireMounts skips a test where this process may not mount composefs images.
func requireMounts(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	f := mount.Probe(os.TempDir())
	if err := f.Mountable(); err != nil {
		t.Skip(err)
	}
}

// quiet is a log that only shows what went wrong.
func quiet(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSuffix(string(p), "\n"))
	return len(p), nil
}

// An env is a snapshotter with its store, in a directory of a test.
type env struct {
	*snapshotter.Snapshotter
	dir   string
	root  string
	store *store.Store
}

// open makes or opens the snapshotter in a directory, with a store there if the
// options have none.
func open(ctx context.Context, dir string, o snapshotter.Options) (_ *env, err error) {
	if o.Store == nil {
		if o.Store, err = store.Init(filepath.Join(dir, "store"), store.Options{}); err != nil {
			return nil, err
		}
	}
	o.Root = filepath.Join(dir, "root")
	s, err := snapshotter.New(ctx, o)
	if err != nil {
		return nil, err
	}
	return &env{s, dir, o.Root, o.Store}, nil
}

// mustOpen is open for the length of a test, whose end takes all mounts away, checks
// the store, and counts what is left in it once all snapshots are removed.
func mustOpen(t testing.TB, dir string, o snapshotter.Options) *env {
	t.Helper()
	o.Log = quiet(t)
	e, err := open(t.Context(), dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.end(t) })
	return e
}

func (e *env) end(t testing.TB) {
	t.Helper()
	if err := errors.Join(e.Close(), snapshotter.UnmountAll(e.root)); err != nil {
		t.Error(err)
	}
	if left := mountsBelow(t, e.dir); len(left) > 0 {
		t.Errorf("mounts are left: %q", left)
	}
	checkStore(t, e.store)
}

func checkStore(t testing.TB, st *store.Store) {
	t.Helper()
	report, err := converter.Fsck(context.Background(), st, store.FsckOptions{Scrub: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range report.Problems {
		t.Error(p)
	}
}

// mountsBelow returns the mount points below a directory.
func mountsBelow(t testing.TB, dir string) (targets []string) {
	t.Helper()
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = mount.ParseMountinfo(f, func(e mount.Entry) error {
		if strings.HasPrefix(e.Target, dir+"/") {
			targets = append(targets, e.Target)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return targets
}

// loopsOn returns the loop devices whose backing file lies below a directory.
func loopsOn(t testing.TB, dir string) (devices []string) {
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

// child runs one test of this binary in a process of its own, which $PARTICLE_TEST
// tells that it is one, and returns what it prints.
func child(t testing.TB, test string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], append([]string{"-test.run=^" + test + "$", "-test.v", "-test.timeout=4m"}, args...)...)
	cmd.Env = append(os.Environ(), "PARTICLE_TEST="+test)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// isChild reports whether the process was started by child for this test.
func isChild(t testing.TB) bool { return os.Getenv("PARTICLE_TEST") == t.Name() }
