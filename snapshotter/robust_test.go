package snapshotter_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/snapshotter"
)

// upperOf returns the upper directory in mounts, which may be written to as long as
// nobody has mounted them: containerd's differ does so.
func upperOf(t testing.TB, mounts []cmount.Mount) string {
	t.Helper()
	for _, o := range mounts[0].Options {
		if upper, ok := strings.CutPrefix(o, "upperdir="); ok {
			return upper
		}
	}
	if mounts[0].Type != "bind" {
		t.Fatalf("no upper directory in %+v", mounts)
	}
	return mounts[0].Source
}

// removeAll removes all snapshots, children first, and lets the store be collected.
// Nothing may be left then.
func (e *env) removeAll(t testing.TB) {
	t.Helper()
	ctx := t.Context()
	for {
		var names []string
		parents := map[string]bool{}
		err := e.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			names = append(names, info.Name)
			parents[info.Parent] = true
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if len(names) == 0 {
			break
		}
		for _, name := range names {
			if !parents[name] {
				if err := e.Remove(ctx, name); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if err := e.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	e.nothingLeft(t)
}

// nothingLeft checks that there are no mounts, loop devices, directories and objects.
func (e *env) nothingLeft(t testing.TB) {
	t.Helper()
	if st := e.Stats(); st.Mounts != 0 || st.LoopMounts != 0 {
		t.Errorf("counted as mounted: %+v", st)
	}
	if left := mountsBelow(t, e.dir); len(left) > 0 {
		t.Errorf("mounts are left: %q", left)
	}
	for end := time.Now().Add(5 * time.Second); len(loopsOn(t, e.dir)) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) { // the kernel frees them soon after the last use
			t.Errorf("loop devices are left: %q", loopsOn(t, e.dir))
			break
		}
	}
	usage, err := converter.DF(t.Context(), e.store)
	if err != nil {
		t.Fatal(err)
	}
	if usage.Total.Objects != 0 || usage.ImageRefs != 0 || usage.StreamRefs != 0 {
		t.Errorf("the store still has %+v", usage)
	}
	if err := e.Close(); err != nil { // waits for what is removed in the background
		t.Fatal(err)
	}
	for _, dir := range []string{"snapshots", "mounts"} {
		left, err := os.ReadDir(filepath.Join(e.root, dir))
		if err != nil || len(left) > 0 {
			t.Errorf("%s: %v is left (%v)", dir, left, err)
		}
	}
}

// TestConcurrent makes, commits, looks at and removes snapshots in 32 goroutines.
func TestConcurrent(t *testing.T) {
	requireMounts(t)
	e := mustOpen(t, t.TempDir(), snapshotter.Options{})
	ctx := t.Context()
	base := stack(ctx, t, e, "base", base)
	// The database is committed 1,200 times, one commit after the other, and each waits for
	// the disk: 16 s in all on a disk of its own, minutes beside others that write.
	const goroutines = 32
	rounds := 6
	if testing.Short() {
		rounds = 2
	}
	var group sync.WaitGroup
	for g := range goroutines {
		group.Go(func() {
			parent := base
			if g%4 == 0 {
				parent = ""
			}
			for r := range rounds {
				name := fmt.Sprintf("%d-%d", g, r)
				if err := cycle(ctx, t, e, name, parent, g%3 == 0); err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				if r%3 == 1 {
					parent = name
				}
				if g == 1 {
					if err := e.Cleanup(ctx); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	// All at once want the same key and the same name: one of each gets it.
	var won [2]int
	var mu sync.Mutex
	for range goroutines {
		group.Go(func() {
			for i, err := range []error{prepare(ctx, e, "wanted", base), commitAs(ctx, e, "wanted name", base)} {
				mu.Lock()
				if err == nil {
					won[i]++
				}
				mu.Unlock()
			}
		})
	}
	group.Wait()
	if won != [2]int{1, 1} {
		t.Errorf("%v got the key and the name, want one of each", won)
	}
	if t.Failed() {
		return
	}
	e.removeAll(t)
}

func prepare(ctx context.Context, e *env, key, parent string) error {
	_, err := e.Prepare(ctx, key, parent)
	return err
}

func commitAs(ctx context.Context, e *env, name, parent string) error {
	key := fmt.Sprint("for ", name, rand.Uint64())
	if err := prepare(ctx, e, key, parent); err != nil {
		return err
	}
	err := e.Commit(ctx, name, key)
	if err != nil {
		return errors.Join(err, e.Remove(ctx, key))
	}
	return nil
}

// cycle commits a snapshot, and makes a view and an active one on it, which it removes.
func cycle(ctx context.Context, t testing.TB, e *env, name, parent string, extract bool) error {
	key := name + " active"
	if extract {
		key = "extract-" + name
	}
	mounts, err := e.Prepare(ctx, key, parent)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(upperOf(t, mounts), "own"), []byte(name+big), 0o644); err != nil {
		return err
	}
	if _, err := e.Usage(ctx, key); err != nil {
		return err
	}
	if err := e.Commit(ctx, name, key); err != nil {
		return err
	}
	mounts, err = e.View(ctx, name+" view", name)
	if err != nil {
		return err
	}
	if b, err := os.ReadFile(filepath.Join(mounts[0].Source, "own")); err != nil || string(b) != name+big {
		return fmt.Errorf("the view has %.20q: %v", b, err)
	}
	if _, err := e.Prepare(ctx, name+" run", name); err != nil {
		return err
	}
	if _, err := e.Mounts(ctx, name+" run"); err != nil {
		return err
	}
	return errors.Join(e.Remove(ctx, name+" run"), e.Remove(ctx, name+" view"))
}

// TestKill kills a process that works on snapshots, again and again, anywhere in what
// it does. What it was told to be committed must be there each time, all of it must be
// usable, and nothing may be left in the end.
func TestKill(t *testing.T) {
	if isChild(t) {
		killed(t)
		return
	}
	requireMounts(t)
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "work"), 0o700); err != nil {
		t.Fatal(err)
	}
	rounds := 24
	if testing.Short() {
		rounds = 6
	}
	committed := map[string]bool{}
	for round := range rounds {
		run(t, dir, round, committed)
		unmountBelow(t, filepath.Join(dir, "work"))
		after(t, dir, committed)
	}
	if len(committed) == 0 {
		t.Error("nothing was ever committed")
	}
	t.Logf("%d kills, %d snapshots", rounds, len(committed))
	e := mustOpen(t, dir, snapshotter.Options{})
	e.removeAll(t)
}

// run starts a process and kills it some time after it has begun its nth operation.
func run(t *testing.T, dir string, round int, committed map[string]bool) {
	// One that does not come to where it is to be killed tells where it hangs.
	cmd := exec.Command(os.Args[0], "-test.run=^TestKill$", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), "PARTICLE_TEST=TestKill", "PARTICLE_DIR="+dir, fmt.Sprint("PARTICLE_ROUND=", round))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	var last []string
	for n := 0; lines.Scan(); {
		line := lines.Text()
		last = append(last, line)
		op, name, _ := strings.Cut(line, " ")
		switch op {
		case "committed":
			committed[name] = true
		case "removing":
			delete(committed, name) // it may be gone from now on
		case "begin":
			if n++; n == 2+round {
				time.AfterFunc(time.Duration(rand.IntN(25))*time.Millisecond, func() { cmd.Process.Kill() })
			}
		}
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(interface{ Signaled() bool }).Signaled() == false {
		t.Fatalf("the process ended by itself: %v\n%s", err, strings.Join(last, "\n"))
	}
}

// killed works until it is killed.
func killed(t *testing.T) {
	dir, ctx := os.Getenv("PARTICLE_DIR"), t.Context()
	e, err := open(ctx, dir, snapshotter.Options{Log: quiet(t)})
	if err != nil {
		t.Fatal(err)
	}
	work := filepath.Join(dir, "work")
	begin := func(what string) { fmt.Println("begin", what) }
	parent := ""
	for i := 0; ; i++ {
		name := fmt.Sprintf("%s.%d.%d", os.Getenv("PARTICLE_ROUND"), os.Getpid(), i)
		key := name + "-active"
		if i%2 == 0 {
			key = "extract-" + name
		}
		begin("prepare")
		mounts, err := e.Prepare(ctx, key, parent)
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			err = write(upperOf(t, mounts), name)
		} else if err = cmount.All(mounts, work); err == nil {
			err = errors.Join(write(work, name), cmount.Unmount(work, 0))
		}
		if err != nil {
			t.Fatal(err)
		}
		begin("commit")
		if err := e.Commit(ctx, name, key); err != nil {
			t.Fatal(err)
		}
		fmt.Println("committed", name)
		begin("view")
		if _, err := e.View(ctx, name+"-view", name); err != nil {
			t.Fatal(err)
		}
		begin("run")
		if _, err := e.Prepare(ctx, name+"-run", name); err != nil {
			t.Fatal(err)
		}
		begin("remove")
		if err := e.Remove(ctx, name+"-view"); err != nil {
			t.Fatal(err)
		}
		if i%3 == 2 {
			fmt.Println("removing", name)
			begin("remove")
			if err := errors.Join(e.Remove(ctx, name+"-run"), e.Remove(ctx, name)); err != nil {
				t.Fatal(err)
			}
			begin("cleanup")
			if err := e.Cleanup(ctx); err != nil {
				t.Fatal(err)
			}
			continue
		}
		parent = name
	}
}

func write(dir, name string) error {
	for _, n := range []string{"own", "file " + name} {
		if err := os.WriteFile(filepath.Join(dir, n), []byte(name+big), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func unmountBelow(t *testing.T, dir string) {
	for {
		err := unix.Unmount(dir, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// after looks at what a killed process left.
func after(t *testing.T, dir string, committed map[string]bool) {
	e, err := open(t.Context(), dir, snapshotter.Options{Log: quiet(t)})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	seen := map[string]bool{}
	var actives []string
	err = e.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Kind == snapshots.KindCommitted {
			seen[info.Name] = true
		} else {
			actives = append(actives, info.Name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range committed {
		if !seen[name] {
			t.Errorf("snapshot %s was committed and is gone", name)
		}
	}
	for name := range seen {
		mounts, err := e.View(ctx, "check", name)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(mounts[0].Source, "own")); err != nil || string(b) != name+big {
			t.Errorf("snapshot %s has %.20q: %v", name, b, err)
		}
		if err := e.Remove(ctx, "check"); err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range actives {
		mounts, err := e.Mounts(ctx, key)
		if strings.HasPrefix(key, "extract-") && errdefs.IsFailedPrecondition(err) {
			continue // killed in Commit: it can only be removed
		}
		if err != nil {
			t.Fatal(err)
		}
		work := filepath.Join(dir, "work")
		if err := cmount.All(mounts, work); err != nil {
			t.Errorf("%s: %v", key, err)
			continue
		}
		if err := cmount.Unmount(work, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	report, err := converter.Fsck(ctx, e.store, store.FsckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range report.Problems {
		t.Error(p)
	}
}
