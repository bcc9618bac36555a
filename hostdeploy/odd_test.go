package hostdeploy

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/hostdeploy/bootloader"
)

// Hosts that are not as they should be: on trial, with a lost boot entry, with files that
// cannot be removed, installed halfway.

// Who rolls back from a system that does not work does not get its next try.
func TestRollbackOnLastTry(t *testing.T) {
	h, loader := newHost(t)
	first := h.Booted
	bad := upgrade(t, h, system(t, "bad"))
	loader.entries[1].Counter = &bootloader.Counter{Left: 0, Done: 3}
	h.Booted = bad.ID
	if s, err := h.Status(ctx); err != nil || len(s.Failures) != 0 {
		t.Errorf("what runs has failed: %+v, %v", s, err)
	}
	if d, err := h.Rollback(""); err != nil || d.ID != first {
		t.Fatalf("rolled back to %+v, %v, want %s", d, err, first)
	}
	wantRoles(t, h, "one default, bad booted failed counting")
}

// What was rolled back from is known as that until it boots again.
func TestLeft(t *testing.T) {
	h, _ := newHost(t)
	first := h.Booted
	second := upgrade(t, h, system(t, "two"))
	wantLeft := func(want ...string) {
		t.Helper()
		events, err := h.Left()
		var got []string
		for _, e := range events {
			got = append(got, e.Manifest)
		}
		if err != nil || strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("left: got %q, %v, want %q", got, err, want)
		}
	}
	bootInto(t, h, second.ID)
	wantLeft()
	if _, err := h.Rollback(""); err != nil {
		t.Fatal(err)
	}
	wantLeft(second.Manifest)
	bootInto(t, h, first)
	wantLeft(second.Manifest)
	if _, err := h.Rollback(""); err != nil { // and back
		t.Fatal(err)
	}
	wantLeft(runningOf(t, h).Manifest)
	bootInto(t, h, second.ID)
	// What was staged and is not wanted is left, too.
	third := stageOnly(t, h, Request{Manifest: put(t, h.Store, system(t, "three")), Base: h.Booted})
	if _, err := h.Rollback("booted"); err != nil {
		t.Fatal(err)
	}
	wantLeft(manifestOf(t, h, first), third.Manifest)
	bootInto(t, h, upgrade(t, h, system(t, "three")).ID)
	wantLeft(manifestOf(t, h, first))
}

// manifestOf returns the manifest of a deployment.
func manifestOf(t *testing.T, h *Host, id string) string {
	t.Helper()
	o, err := h.origin(id)
	if err != nil {
		t.Fatal(err)
	}
	return o.Manifest
}

// A running system whose boot entry is lost goes on from its own /etc.
func TestLostEntry(t *testing.T) {
	h, loader := newHost(t)
	second := upgrade(t, h, system(t, "two"))
	bootInto(t, h, second.ID)
	mine := filepath.Join(h.stateDir(second.ID), "etc/mine")
	if err := os.WriteFile(mine, []byte("mine\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, lost := range []string{"particle-2", "particle-1"} { // the running one's, then all
		if err := loader.Remove(lost); err != nil {
			t.Fatal(err)
		}
		all, err := h.Deployments()
		if err != nil {
			t.Fatal(err)
		}
		from, err := h.Base(all)
		if err != nil || from.ID != second.ID {
			t.Fatalf("without %s going on from %+v, %v", lost, from, err)
		}
	}
	third := deployNow(t, h, Request{Manifest: put(t, h.Store, system(t, "three")), Base: second.ID})
	wantFile(t, filepath.Join(h.stateDir(third.ID), "etc/mine"), "mine\n")
	bootInto(t, h, third.ID)
	if _, err := h.Prune(); err != nil {
		t.Fatal(err)
	}
	wantRoles(t, h, "three booted default")
	wantSound(t, h)
}

// A file that somebody made immutable does not keep its deployment.
func TestPruneImmutable(t *testing.T) {
	h, _ := newHost(t)
	first := h.Booted
	for _, name := range []string{"etc/conf", "etc"} {
		f, err := os.Open(filepath.Join(h.stateDir(first), name))
		if err != nil {
			t.Fatal(err)
		}
		err = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, 0x10)
		f.Close()
		if err != nil {
			t.Skip("files cannot be made immutable here: ", err)
		}
	}
	t.Cleanup(func() { _ = removeAll(h.Root) })
	for _, version := range []string{"two", "three"} {
		bootInto(t, h, upgrade(t, h, system(t, version)).ID)
	}
	if _, err := h.Prune(); err != nil {
		t.Fatal(err)
	}
	if left := snapshot(t, h); strings.Contains(left, first) {
		t.Errorf("something is left of %s:\n%s", first, left)
	}
}

// Kernels of what was staged and never booted do not fill the boot file system.
func TestStagedKernels(t *testing.T) {
	h, _ := newHost(t)
	for _, version := range []string{"two", "three", "four"} {
		files := system(t, version)
		files["boot/vmlinuz-1"] = "kernel of " + version
		stageOnly(t, h, Request{Manifest: put(t, h.Store, files), Base: h.Booted})
	}
	if dirs, err := bootDirs(h.Paths); err != nil || len(dirs) != 2 {
		t.Errorf("kernels: %q, %v, want that of what runs and of what is staged", dirs, err)
	}
	if _, err := h.Finalize(ctx, nil); err != nil {
		t.Fatal(err)
	}
	wantRoles(t, h, "four default counting, one booted")
	wantSound(t, h)
}

// Beside what is on trial stays what proved good before.
func TestKeepGood(t *testing.T) {
	h, _ := newHost(t)
	bootInto(t, h, upgrade(t, h, system(t, "two")).ID)
	deployNow(t, h, Request{Manifest: put(t, h.Store, system(t, "three")), Base: h.Booted})
	if _, err := h.Prune(); err != nil {
		t.Fatal(err)
	}
	wantRoles(t, h, "three default counting, two booted, one")
}

// The /var before a reset goes with gc, once no deployment has it.
func TestVarBeforeReset(t *testing.T) {
	h, _ := newHost(t)
	bootInto(t, h, deployNow(t, h, Request{Manifest: runningOf(t, h).Manifest, Base: h.Booted, FreshEtc: true, FreshVar: true}).ID)
	if _, err := h.Collect(ctx, false, nil); err != nil {
		t.Fatal(err)
	}
	first := h.path(osDir, defaultOS)
	wantFile(t, filepath.Join(first, "var/lib/state"), "made by one\n")
	bootInto(t, h, upgrade(t, h, system(t, "two")).ID)
	if _, err := h.Prune(); err != nil {
		t.Fatal(err)
	}
	for _, dry := range []bool{true, false} {
		wantFile(t, filepath.Join(first, "var/lib/state"), "made by one\n")
		if c, err := h.Collect(ctx, dry, nil); err != nil || !slices.Equal(c.Vars, []string{first}) {
			t.Errorf("dry %v: %+v, %v", dry, c, err)
		}
	}
	if have, err := exists(first); have || err != nil {
		t.Errorf("the first /var is there: %v, %v", have, err)
	}
	wantSound(t, h)
}

// What is pinned keeps its /etc and /var without an entry, too.
func TestPinnedLostEntry(t *testing.T) {
	h, loader := newHost(t)
	first := h.Booted
	if _, err := h.Pin("booted", true); err != nil {
		t.Fatal(err)
	}
	bootInto(t, h, deployNow(t, h, Request{Manifest: runningOf(t, h).Manifest, Base: h.Booted, FreshEtc: true, FreshVar: true}).ID)
	if err := loader.Remove("particle-1"); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Collect(ctx, false, nil); err != nil {
		t.Fatal(err)
	}
	wantFile(t, filepath.Join(h.stateDir(first), "etc/version"), "one\n")
	wantFile(t, filepath.Join(h.stateDir(first), "var/lib/state"), "made by one\n")
}

// A kernel that is copied takes the place of none that somebody may start by hand.
func TestKernelOfLostEntry(t *testing.T) {
	h, loader := newHost(t)
	running := filepath.Join(h.Paths.Boot, bootPrefix+runningOf(t, h).BootDigest, "vmlinuz")
	if err := loader.Remove("particle-1"); err != nil {
		t.Fatal(err)
	}
	files := system(t, "two")
	files["boot/vmlinuz-1"] = "another kernel"
	stageOnly(t, h, Request{Manifest: put(t, h.Store, files), Base: h.Booted})
	wantFile(t, running, system(t, "one")["boot/vmlinuz-1"])
}

// An installation that failed, or was cut off, can be made again; what runs is safe.
func TestInstallAgain(t *testing.T) {
	root := t.TempDir()
	boot := filepath.Join(root, "boot")
	for _, dir := range []string{"boot", "state/mine"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	noRoom, noPower := errors.New("no room"), errors.New("no power")
	loader := &memLoader{}
	install := func(stop error) (*NewHost, error) {
		n := &NewHost{Root: root, Paths: bootloader.Paths{Boot: boot}, Loader: "systemd-boot", Args: Args{"rw"}}
		p, err := n.Prepare(ctx, func(_ context.Context, st *store.Store) (string, error) { return put(t, st, system(t, "one")), nil })
		if err != nil {
			return nil, err
		}
		p.h.Loader = loader
		if loader.fail = stop; stop == noPower {
			// As if nobody had been there to clean up.
			p.Steps[len(p.Steps)-2].run = func(context.Context) error { return stop }
			return n, n.install(ctx, p)
		}
		return n, n.Install(ctx, p)
	}
	if _, err := install(noRoom); !errors.Is(err, noRoom) {
		t.Fatalf("got %v, want %v", err, noRoom)
	}
	for _, name := range []string{storeDir, deployDir, osDir, installMark, lockFile} {
		if have, err := exists(filepath.Join(root, name)); have || err != nil {
			t.Errorf("after a failure there is %s, %v", name, err)
		}
	}
	if dirs, err := bootDirs(bootloader.Paths{Boot: boot}); err != nil || len(dirs) != 0 {
		t.Errorf("after a failure there are the kernels %q, %v", dirs, err)
	}
	if _, err := install(noPower); !errors.Is(err, noPower) {
		t.Fatalf("got %v, want %v", err, noPower)
	}
	if have, err := exists(filepath.Join(root, installMark)); !have || err != nil {
		t.Fatalf("no mark of what is not over, %v", err)
	}
	if _, err := install(nil); err != nil {
		t.Fatal(err)
	}
	if have, err := exists(filepath.Join(root, installMark)); have || err != nil {
		t.Errorf("the mark of an installation that is over: %v", err)
	}
	// From here on nothing may be touched.
	mine := filepath.Join(root, osDir, defaultOS, "var/mine")
	if err := os.WriteFile(mine, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := install(nil); err == nil || !strings.Contains(err.Error(), "there are deployments already") {
		t.Errorf("installing over what is installed: %v", err)
	}
	if err := os.RemoveAll(filepath.Join(root, deployDir)); err != nil {
		t.Fatal(err)
	}
	if _, err := install(nil); err == nil || !strings.Contains(err.Error(), osDir) {
		t.Errorf("installing over a /var: %v", err)
	}
	for _, name := range []string{"state/mine", osDir + "/" + defaultOS + "/var/mine"} {
		if have, err := exists(filepath.Join(root, name)); !have || err != nil {
			t.Errorf("what was there before is gone: %s, %v", name, err)
		}
	}
}

// What failed after the mark was taken away is cleaned up all the same; what has an entry
// stays.
func TestInstallEntry(t *testing.T) {
	for _, written := range []bool{false, true} {
		root := t.TempDir()
		n := &NewHost{Root: root, Paths: bootloader.Paths{Boot: filepath.Join(root, "boot")}, Loader: "systemd-boot", Args: Args{"rw"}}
		if err := os.Mkdir(n.Paths.Boot, 0o755); err != nil {
			t.Fatal(err)
		}
		p, err := n.Prepare(ctx, func(_ context.Context, st *store.Store) (string, error) { return put(t, st, system(t, "one")), nil })
		if err != nil {
			t.Fatal(err)
		}
		loader := &memLoader{}
		p.h.Loader = loader
		failed := errors.New("failed")
		last := &p.Steps[len(p.Steps)-1]
		add := last.run
		last.run = func(ctx context.Context) error {
			if have, err := exists(filepath.Join(root, installMark)); have || err != nil {
				t.Errorf("the mark is there when the entry is written: %v, %v", have, err)
			}
			if !written {
				return failed
			}
			return errors.Join(add(ctx), failed)
		}
		if err := n.Install(ctx, p); !errors.Is(err, failed) {
			t.Fatalf("got %v, want %v", err, failed)
		}
		if have, err := exists(filepath.Join(root, deployDir)); have != written || err != nil {
			t.Errorf("an entry was written %v; there are deployments: %v, %v", written, have, err)
		}
	}
}

// Who must have the lock waits for it; others are told who has it.
func TestWaitLock(t *testing.T) {
	h, _ := newHost(t)
	release, err := h.Lock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Lock(); !errors.Is(err, ErrBusy) {
		t.Errorf("got %v, want ErrBusy", err)
	}
	ended, end := context.WithCancel(ctx)
	end()
	if _, err := h.WaitLock(ended); !errors.Is(err, ErrBusy) {
		t.Errorf("waiting no longer: got %v, want ErrBusy", err)
	}
	time.AfterFunc(50*time.Millisecond, release)
	if release, err = h.WaitLock(ctx); err != nil {
		t.Fatal(err)
	}
	release()
}
