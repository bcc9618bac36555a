package hostdeploy

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/hostdeploy/bootloader"
)

// What one verb leaves must suit the next one, in whatever order they come.

// deployNow makes a deployment without staging.
func deployNow(t *testing.T, h *Host, req Request) *Plan {
	t.Helper()
	p, err := NewPlan(ctx, h, req, false)
	if err == nil {
		err = p.Apply(ctx, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// stageOnly leaves a deployment staged.
func stageOnly(t *testing.T, h *Host, req Request) *Plan {
	t.Helper()
	p, err := NewPlan(ctx, h, req, true)
	if err == nil {
		err = p.Apply(ctx, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// runningOf returns what runs.
func runningOf(t *testing.T, h *Host) *Deployment {
	t.Helper()
	all, err := h.Deployments()
	if err != nil {
		t.Fatal(err)
	}
	return booted(all)
}

// bootInto makes a deployment the running one, and good.
func bootInto(t *testing.T, h *Host, id string) {
	t.Helper()
	h.Booted = id
	if _, err := h.Good(); err != nil {
		t.Fatal(err)
	}
}

// A /var that a reset made stays the machine's, for as long as something is based on it.
func TestVarAfterReset(t *testing.T) {
	h, _ := newHost(t)
	reset := deployNow(t, h, Request{Manifest: runningOf(t, h).Manifest, Base: h.Booted, FreshEtc: true, FreshVar: true})
	bootInto(t, h, reset.ID)
	mine := filepath.Join(h.stateDir(reset.ID), "var/lib/state")
	if err := os.WriteFile(mine, []byte("mine\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, version := range []string{"two", "three", "four"} {
		p := upgrade(t, h, system(t, version))
		bootInto(t, h, p.ID)
		if _, err := h.Prune(); err != nil {
			t.Fatal(err)
		}
		wantFile(t, filepath.Join(h.stateDir(p.ID), "var/lib/state"), "mine\n")
		wantSound(t, h)
	}
	// Another reset makes another one, although the id of the first is free again.
	again := deployNow(t, h, Request{Manifest: put(t, h.Store, system(t, "one")), Base: h.Booted, FreshEtc: true, FreshVar: true})
	wantFile(t, filepath.Join(h.stateDir(again.ID), "var/lib/state"), "made by one\n")
	bootInto(t, h, again.ID)
	wantFile(t, filepath.Join(h.path(osDir, reset.ID), "var/lib/state"), "mine\n")
	for _, version := range []string{"five", "six"} {
		bootInto(t, h, upgrade(t, h, system(t, version)).ID)
		if _, err := h.Prune(); err != nil {
			t.Fatal(err)
		}
	}
	wantFile(t, filepath.Join(h.path(osDir, reset.ID), "var/lib/state"), "mine\n") // nobody has asked yet
	if _, err := h.Collect(ctx, false, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(h.path(osDir, reset.ID)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a /var that nothing uses: %v", err)
	}
	wantSound(t, h)
}

// What is based on a deployment that boots without fs-verity boots without it, too.
func TestInsecureStays(t *testing.T) {
	h, loader := newHost(t)
	p := deployNow(t, h, Request{Manifest: put(t, h.Store, system(t, "two")), Base: h.Booted, Insecure: true})
	bootInto(t, h, p.ID)
	upgrade(t, h, system(t, "three"))
	if o := loader.entries[2].Options; !strings.Contains(o, "composefs.digest=?v1-") {
		t.Errorf("options: %s", o)
	}
	same, err := NewPlan(ctx, h, Request{Manifest: p.Manifest, Base: h.Booted}, true)
	if err != nil || !same.Same(runningOf(t, h)) {
		t.Errorf("the running image is said to be another, %v", err)
	}
}

// What is done at once supersedes what was staged before.
func TestNowForgetsStaged(t *testing.T) {
	h, _ := newHost(t)
	manifest := put(t, h.Store, system(t, "two"))
	staged := stageOnly(t, h, Request{Manifest: manifest, Base: h.Booted})
	now := deployNow(t, h, Request{Manifest: manifest, Base: h.Booted, Edits: []Edit{{Append: Args{"mine"}}}})
	if now.ID != staged.ID {
		t.Errorf("id: got %s, want that of what it replaces, %s", now.ID, staged.ID)
	}
	if p, err := h.Finalize(ctx, nil); p != nil || err != nil {
		t.Errorf("finalized %+v, %v", p, err)
	}
	all, err := h.Deployments()
	if err != nil || len(all) != 2 || all[0].KArgs.User.String() != "mine" {
		t.Errorf("deployments: %s, %v", roles(t, h), err)
	}
	// The state of one that has an entry is never replaced.
	req := Request{Manifest: manifest, Base: h.Booted, ID: now.ID}
	p, err := NewPlan(ctx, h, req, false)
	if err == nil {
		err = p.Apply(ctx, nil)
	}
	if !errors.Is(err, ErrInUse) {
		t.Errorf("deploying over %s: got %v, want ErrInUse", ShortID(now.ID), err)
	}
	wantSound(t, h)
}

// Forgetting what is staged is enough of a rollback where the running system boots next.
func TestRollbackOfStaged(t *testing.T) {
	h, loader := newHost(t)
	stageOnly(t, h, Request{Manifest: put(t, h.Store, system(t, "two")), Base: h.Booted})
	if d, err := h.Rollback(""); err != nil || d.ID != h.Booted {
		t.Fatalf("rolled back to %+v, %v", d, err)
	}
	wantRoles(t, h, "one booted default")
	if e := loader.entries[0]; e.Generation != 1 {
		t.Errorf("the entry was written again: %+v", e)
	}
}

// A deployment that never was good says so where no boot entry can be read.
func TestOnTrial(t *testing.T) {
	h, _ := newHost(t)
	onTrial := func(id string) bool {
		t.Helper()
		yes, err := OnTrial(HostOptions{Root: h.Root, Run: t.TempDir(), Cmdline: "composefs.digest=v1-sha256-12:" + id})
		if err != nil {
			t.Fatal(err)
		}
		return yes
	}
	if onTrial(h.Booted) {
		t.Error("the first deployment is on trial: there is none to fall back to")
	}
	p := upgrade(t, h, system(t, "two"))
	if !onTrial(p.ID) {
		t.Error("a new deployment is not on trial")
	}
	bootInto(t, h, p.ID)
	if onTrial(p.ID) {
		t.Error("a good deployment is on trial")
	}
}

// What failed is remembered when its entry is gone, until it boots after all.
func TestFailures(t *testing.T) {
	h, loader := newHost(t)
	first := h.Booted
	bad := upgrade(t, h, system(t, "bad"))
	loader.entries[1].Counter = &bootloader.Counter{Left: 0, Done: 3}
	for range 2 {
		bootInto(t, h, first)
		if _, err := h.Prune(); err != nil {
			t.Fatal(err)
		}
	}
	wantRoles(t, h, "one booted default")
	failed, err := h.Failures()
	if err != nil || len(failed) != 1 || failed[0].ID != bad.ID || failed[0].Manifest != bad.Manifest {
		t.Errorf("failures: %+v, %v", failed, err)
	}
	if s, err := h.Status(ctx); err != nil || len(s.Failures) != 1 {
		t.Errorf("status: %+v, %v", s.Failures, err)
	}
	bootInto(t, h, upgrade(t, h, system(t, "bad")).ID)
	if failed, err := h.Failures(); err != nil || len(failed) != 0 {
		t.Errorf("failures after it has booted: %+v, %v", failed, err)
	}
}

// What cannot be read may be what somebody needs.
func TestPruneKeepsUnreadable(t *testing.T) {
	h, _ := newHost(t)
	first := h.Booted
	if _, err := h.Pin("booted", true); err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(h.stateDir(first), first+".origin")
	good, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	for _, version := range []string{"two", "three"} {
		bootInto(t, h, upgrade(t, h, system(t, version)).ID)
	}
	if err := os.WriteFile(record, []byte("[of a later version\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c, err := h.Prune()
	if err != nil || len(c.Deployments)+len(c.States) != 0 {
		t.Errorf("pruned %+v, %v", c, err)
	}
	if err := os.WriteFile(record, good, 0o644); err != nil {
		t.Fatal(err)
	}
	wantRoles(t, h, "three booted default, two, one pinned")
	wantSound(t, h)
}

func TestReservedArguments(t *testing.T) {
	h, _ := newHost(t)
	manifest := runningOf(t, h).Manifest
	for _, e := range []Edit{
		{Append: Args{"particle.deployment=" + h.Booted}}, {Replace: Args{"composefs=?1"}}, {Append: Args{`"composefs.digest=x"`}},
	} {
		if _, err := NewPlan(ctx, h, Request{Manifest: manifest, Base: h.Booted, Edits: []Edit{e}}, true); !errors.Is(err, ErrReserved) {
			t.Errorf("%+v: got %v, want ErrReserved", e, err)
		}
	}
	files := system(t, "two")
	files["usr/lib/particle/kargs.d/b.toml"] = "kargs = [\"particle.deployment=x\"]\n"
	if _, err := NewPlan(ctx, h, Request{Manifest: put(t, h.Store, files), Base: h.Booted}, true); !errors.Is(err, ErrReserved) {
		t.Errorf("of the image: got %v, want ErrReserved", err)
	}
}

// A file without an end to its last line keeps both lines whole.
func TestAppendFstab(t *testing.T) {
	name := filepath.Join(t.TempDir(), "fstab")
	for _, c := range []struct{ have, want string }{{"", "line\n"}, {"# none", "# none\nline\n"}, {"# none\n", "# none\nline\n"}} {
		if err := os.WriteFile(name, []byte(c.have), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := appendFstab(name, "line\n"); err != nil {
			t.Fatal(err)
		}
		wantFile(t, name, c.want)
	}
}

// What is not to be installed leaves nothing behind; a store that was there stays.
func TestDiscard(t *testing.T) {
	for _, have := range []bool{false, true} {
		root := t.TempDir()
		if err := os.Mkdir(filepath.Join(root, "boot"), 0o755); err != nil {
			t.Fatal(err)
		}
		if have {
			if _, err := store.Init(filepath.Join(root, storeDir), store.Options{}); err != nil {
				t.Fatal(err)
			}
		}
		files := system(t, "bad")
		delete(files, "boot/vmlinuz-1")
		n := &NewHost{Root: root, Paths: bootloader.Paths{Boot: filepath.Join(root, "boot")}, Loader: "systemd-boot"}
		_, err := n.Prepare(ctx, func(_ context.Context, st *store.Store) (string, error) { return put(t, st, files), nil })
		if !errors.Is(err, ErrNoKernel) {
			t.Errorf("got %v, want ErrNoKernel", err)
		}
		if there, err := exists(filepath.Join(root, storeDir)); err != nil || there != have {
			t.Errorf("a store that was there %v: %v, %v", have, there, err)
		}
	}
}
