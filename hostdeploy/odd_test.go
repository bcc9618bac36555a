package hostdeploy

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
	if _, err := h.Prune(false); err != nil {
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
	if _, err := h.Prune(false); err != nil {
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
	if _, err := h.Prune(false); err != nil {
		t.Fatal(err)
	}
	wantRoles(t, h, "three default counting, two booted, one")
}

// The /var before a reset goes with the last deployment that has it.
func TestVarBeforeReset(t *testing.T) {
	h, _ := newHost(t)
	bootInto(t, h, deployNow(t, h, Request{Manifest: runningOf(t, h).Manifest, Base: h.Booted, FreshEtc: true, FreshVar: true}).ID)
	if _, err := h.Prune(false); err != nil {
		t.Fatal(err)
	}
	wantFile(t, h.path(osDir, defaultOS, "var/lib/state"), "made by one\n")
	bootInto(t, h, upgrade(t, h, system(t, "two")).ID)
	if _, err := h.Prune(false); err != nil {
		t.Fatal(err)
	}
	if have, err := exists(h.path(osDir, defaultOS)); have || err != nil {
		t.Errorf("the first /var is there: %v, %v", have, err)
	}
	wantSound(t, h)
}

// An installation that failed, or was cut off, can be made again; what runs is safe.
func TestInstallAgain(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"boot", "state/mine"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	loader := &memLoader{}
	install := func(stop string) error {
		n := &NewHost{Root: root, Paths: bootloader.Paths{Boot: filepath.Join(root, "boot")}, Loader: "systemd-boot", Args: Args{"rw"}}
		p, err := n.Prepare(ctx, func(_ context.Context, st *store.Store) (string, error) { return put(t, st, system(t, "one")), nil })
		if err != nil {
			return err
		}
		p.h.Loader = loader
		loader.fail = nil
		switch stop {
		case "loader":
			loader.fail = errors.New("no room")
		case "power":
			// As if nobody had been there to clean up.
			p.Steps = p.Steps[:len(p.Steps)-1]
			return n.install(ctx, p)
		}
		return n.Install(ctx, p)
	}
	if err := install("loader"); !errors.Is(err, loader.fail) {
		t.Fatalf("got %v, want %v", err, loader.fail)
	}
	for _, name := range []string{storeDir, deployDir, osDir, installMark} {
		if have, err := exists(filepath.Join(root, name)); have || err != nil {
			t.Errorf("after a failure there is %s, %v", name, err)
		}
	}
	if err := install("power"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, installMark), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := install(""); err != nil {
		t.Fatal(err)
	}
	if have, err := exists(filepath.Join(root, "state/mine")); !have || err != nil {
		t.Error("what was there before is gone")
	}
	if err := install(""); err == nil || !strings.Contains(err.Error(), "there are deployments already") {
		t.Errorf("installing over what is installed: %v", err)
	}
	if have, err := exists(filepath.Join(root, deployDir)); !have || err != nil {
		t.Error("a refusal removed the deployments")
	}
}
