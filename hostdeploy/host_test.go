package hostdeploy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/hostdeploy/bootloader"
)

func TestInstall(t *testing.T) {
	h, loader := newHost(t)
	wantRoles(t, h, "one booted default")
	wantSound(t, h)
	e := loader.entries[0]
	if e.ID != "particle-1" || e.Counter != nil || !strings.HasPrefix(e.Linux, "/boot/particle-") || len(e.Initrd) != 1 {
		t.Errorf("entry: %+v", e)
	}
	if want := "root=UUID=1 rw composefs.digest=v1-sha256-12:" + h.Booted + " console=ttyS0 panic=10"; e.Options != want {
		t.Errorf("options:\n got %s\nwant %s", e.Options, want)
	}
	state := h.stateDir(h.Booted)
	wantFile(t, filepath.Join(state, "etc/fstab"), "# none\nUUID=2 /boot ext4 defaults 0 2\n")
	wantFile(t, filepath.Join(state, "var/lib/state"), "made by one\n")
	if link, err := os.Readlink(filepath.Join(state, "var")); err != nil || link != "../../os/default/var" {
		t.Errorf("var: %q, %v", link, err)
	}
	if _, err := os.Stat(h.path(verityMark)); h.Store.Verity() != errors.Is(err, fs.ErrNotExist) {
		t.Errorf("fs-verity %v, but the mark for the first boot: %v", h.Store.Verity(), err)
	}
	// Nobody installs over a host.
	again := &NewHost{Root: h.Root, Paths: h.Paths, Loader: "systemd-boot"}
	if _, err := again.Prepare(ctx, nil); err == nil {
		t.Error("installing twice did not fail")
	}
}

// TestUpgradeAndBack walks through a host's life.
func TestUpgradeAndBack(t *testing.T) {
	h, loader := newHost(t)
	first := h.Booted
	etc := filepath.Join(h.stateDir(first), "etc")
	for name, content := range map[string]string{"conf": "mine\n", "added": "by hand\n"} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	req := Request{Manifest: put(t, h.Store, system(t, "two")), Base: h.Booted}
	p, err := NewPlan(ctx, h, req, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Apply(ctx, nil); err != nil {
		t.Fatal(err)
	}
	wantRoles(t, h, "two staged default, one booted")
	wantSound(t, h)
	// What happens to /etc between staging and the shutdown counts.
	if err := os.WriteFile(filepath.Join(etc, "late"), []byte("late\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Finalize(ctx, nil); err != nil {
		t.Fatal(err)
	}
	wantRoles(t, h, "two default counting, one booted")
	wantSound(t, h)
	if n, err := h.Finalize(ctx, nil); n != nil || err != nil {
		t.Errorf("finalizing nothing: %v, %v", n, err)
	}
	state := h.stateDir(p.ID)
	wantFile(t, filepath.Join(state, "etc/version"), "two\n")
	wantFile(t, filepath.Join(state, "etc/conf"), "mine\n")
	wantFile(t, filepath.Join(state, "etc/conf.dpkg-dist"), "default of two\n")
	wantFile(t, filepath.Join(state, "etc/added"), "by hand\n")
	wantFile(t, filepath.Join(state, "etc/late"), "late\n")
	wantFile(t, filepath.Join(state, "var/lib/state"), "made by one\n") // /var is the machine's
	wantFile(t, filepath.Join(etc, "version"), "one\n")

	// It boots.
	h.Booted = p.ID
	s, err := h.Status(ctx)
	if err != nil || len(s.Conflicts) != 1 || s.Conflicts[0].Path != "/etc/conf" || s.Conflicts[0].Kept != "/etc/conf.dpkg-dist" {
		t.Errorf("conflicts: %+v, %v", s.Conflicts, err)
	}
	if err := os.Remove(filepath.Join(state, "etc/conf.dpkg-dist")); err != nil {
		t.Fatal(err)
	}
	if s, err = h.Status(ctx); err != nil || len(s.Conflicts) != 0 {
		t.Errorf("conflicts that were settled: %+v, %v", s.Conflicts, err)
	}
	loader.entries[1].Counter = &bootloader.Counter{Left: 2, Done: 1}
	if d, err := h.Good(); err != nil || d.ID != p.ID {
		t.Fatalf("Good: %v, %v", d, err)
	}
	wantRoles(t, h, "two booted default, one")

	// And back: the old /etc as it was.
	if d, err := h.Rollback(""); err != nil || d.ID != first {
		t.Fatalf("Rollback: %v, %v", d, err)
	}
	wantRoles(t, h, "one default, two booted")
	wantSound(t, h)
	wantFile(t, filepath.Join(etc, "conf"), "mine\n")
	// Once more: the running one boots next again.
	if _, err := h.Rollback(""); err != nil {
		t.Fatal(err)
	}
	wantRoles(t, h, "two booted default, one")

	// The third image pushes the first out, unless it is pinned.
	p = upgrade(t, h, system(t, "three"))
	h.Booted = p.ID
	if _, err := h.Good(); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Pin(first[:8], true); err != nil {
		t.Fatal(err)
	}
	if c, err := h.Collect(ctx, false, nil); err != nil || len(c.Deployments) != 0 {
		t.Errorf("collected %+v, %v", c, err)
	}
	wantRoles(t, h, "three booted default, two, one pinned")
	if _, err := h.Pin(first[:8], false); err != nil {
		t.Fatal(err)
	}
	dry, err := h.Collect(ctx, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	wantRoles(t, h, "three booted default, two, one")
	c, err := h.Collect(ctx, false, nil)
	if err != nil || !slices.Equal(c.Deployments, []string{first}) || !slices.Equal(dry.Deployments, c.Deployments) || c.Store.ObjectsRemoved == 0 {
		t.Errorf("collected %+v, %v; announced %+v", c, err, dry)
	}
	wantRoles(t, h, "three booted default, two")
	wantSound(t, h)
	if _, err := os.Stat(h.stateDir(first)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the state of a removed deployment: %v", err)
	}
	events, err := h.History()
	var what []string
	for _, e := range events {
		what = append(what, e.What)
	}
	if want := "deployed, deployed, booted, rolled back from, rolled back to, rolled back from, rolled back to, deployed, booted, removed"; err != nil || strings.Join(what, ", ") != want {
		t.Errorf("history: %s, %v, want %s", strings.Join(what, ", "), err, want)
	}
}

// TestFallback: what the loader gave up comes last, and is not what a rollback means.
func TestFallback(t *testing.T) {
	h, loader := newHost(t)
	bad := upgrade(t, h, system(t, "bad"))
	loader.entries[1].Counter = &bootloader.Counter{Left: 0, Done: 3}
	wantRoles(t, h, "one booted default, bad failed counting")
	if d, err := h.Rollback(""); !errors.Is(err, ErrNoDeployment) {
		t.Errorf("rolled back to %v, %v", d, err)
	}
	if c, err := h.Prune(); err != nil || !slices.Equal(c.Deployments, []string{bad.ID}) {
		t.Errorf("pruned %+v, %v", c, err)
	}
	wantRoles(t, h, "one booted default")
	wantSound(t, h)
	// It may be deployed again, and gets its tries.
	again := upgrade(t, h, system(t, "bad"))
	if again.ID != bad.ID {
		t.Errorf("got id %s, want %s", again.ID, bad.ID)
	}
	wantRoles(t, h, "bad default counting, one booted")
}

// TestSameImageTwice: other arguments for the running image make a second deployment
// of it.
func TestSameImageTwice(t *testing.T) {
	h, loader := newHost(t)
	all, err := h.Deployments()
	if err != nil {
		t.Fatal(err)
	}
	req := Request{Manifest: all[0].Manifest, Base: h.Booted, Edits: []Edit{{Append: Args{"debug"}}, {Delete: Args{"console"}}}}
	p, err := NewPlan(ctx, h, req, false)
	if err != nil {
		t.Fatal(err)
	}
	if p.Same(all[0]) {
		t.Error("it is said to be the same")
	}
	if err := p.Apply(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if want := h.Booted + ".1"; p.ID != want {
		t.Errorf("id: got %s, want %s", p.ID, want)
	}
	if want := "root=UUID=1 rw composefs.digest=v1-sha256-12:" + h.Booted + " particle.deployment=" + p.ID + " panic=10 debug"; loader.entries[1].Options != want {
		t.Errorf("options:\n got %s\nwant %s", loader.entries[1].Options, want)
	}
	if loader.entries[0].Linux != loader.entries[1].Linux {
		t.Error("the kernel is not shared")
	}
	wantSound(t, h)
	// The id is free again once the first of the two is gone.
	h.Booted = p.ID
	if _, err := h.Good(); err != nil {
		t.Fatal(err)
	}
	upgrade(t, h, system(t, "two"))
	wantSound(t, h)
	same, err := NewPlan(ctx, h, Request{Manifest: all[0].Manifest, Base: h.Booted}, true)
	if err != nil {
		t.Fatal(err)
	}
	if want := h.Booted[:64] + ".2"; same.ID != want {
		t.Errorf("id: got %s, want %s", same.ID, want)
	}
	now, err := h.Deployments()
	if err != nil {
		t.Fatal(err)
	}
	if !same.Same(booted(now)) {
		t.Error("the running image with its arguments is said to be another")
	}
}

// TestRefused: one clear error each, and nothing is changed.
func TestRefused(t *testing.T) {
	h, _ := newHost(t)
	without := func(name string) map[string]string {
		files := system(t, "bad")
		delete(files, name)
		return files
	}
	noSetup := system(t, "bad")
	noSetup["boot/initrd.img-1"] = initrd(t, "init")
	noBoot := without("boot/vmlinuz-1")
	for _, test := range []struct {
		name  string
		files map[string]string
		want  error
	}{
		{"no kernel", noBoot, ErrNoKernel},
		{"no initramfs", without("boot/initrd.img-1"), ErrNoInitrd},
		{"no set-up", noSetup, ErrNoSetup},
	} {
		manifest := put(t, h.Store, test.files)
		before := snapshot(t, h)
		_, err := NewPlan(ctx, h, Request{Manifest: manifest, Base: h.Booted}, true)
		if !errors.Is(err, test.want) {
			t.Errorf("%s: got %v, want %v", test.name, err, test.want)
		}
		if after := snapshot(t, h); after != before {
			t.Errorf("%s: the host was changed:\n%s\nbefore:\n%s", test.name, after, before)
		}
		_, err = NewPlan(ctx, h, Request{Manifest: manifest, Base: h.Booted, Force: true}, true)
		if wantErr := test.want == ErrNoKernel; (err != nil) != wantErr {
			t.Errorf("%s, forced: %v", test.name, err)
		}
	}
	if _, err := NewPlan(ctx, h, Request{Manifest: "sha256:" + strings.Repeat("0", 64)}, true); !errors.Is(err, converter.ErrNotFound) {
		t.Errorf("an unknown image: %v", err)
	}
	unlock, err := h.Lock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Lock(); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("locking twice: %v", err)
	}
	unlock()
	if unlock, err = h.Lock(); err != nil {
		t.Errorf("the lock stays: %v", err)
	} else {
		unlock()
	}
}

// snapshot lists all paths of a host but the store's.
func snapshot(t *testing.T, h *Host) string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(h.Root, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() && e.Name() == storeDir {
			return fs.SkipDir
		}
		if err != nil {
			return err
		}
		fi, err := e.Info()
		names = append(names, fmt.Sprintf("%s %d", path, fi.Size()))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(names, "\n")
}

func TestStatus(t *testing.T) {
	h, _ := newHost(t)
	first := h.Booted
	if err := os.WriteFile(filepath.Join(h.stateDir(first), "etc/added"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Pin("booted", true); err != nil {
		t.Fatal(err)
	}
	upgrade(t, h, system(t, "two"))
	s, err := h.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Deployments) != 2 || s.Deployments[0].Kept != "boots next" || s.Deployments[1].Kept != "booted" {
		t.Errorf("deployments: %+v", s.Deployments)
	}
	// fstab got the machine's lines at the installation.
	var changes []string
	for _, c := range s.EtcChanges {
		changes = append(changes, string(c.Kind)+" "+c.Path)
	}
	if want := "added /etc/added, modified /etc/fstab"; strings.Join(changes, ", ") != want {
		t.Errorf("changes of /etc: %q, want %q", changes, want)
	}
	if s.Loader != "memory" || s.Fallback == "" || s.BootSize <= 0 {
		t.Errorf("%+v", s)
	}
	for name, want := range map[string]string{
		first: first, first[:4]: first, "booted": first, "default": s.Deployments[0].ID, "rollback": s.Deployments[0].ID,
		"zzzz": "", first[:2]: "", "staged": "",
	} {
		all, err := h.Deployments()
		if err != nil {
			t.Fatal(err)
		}
		d, err := find(all, name)
		if want == "" && !errors.Is(err, ErrNoDeployment) || want != "" && (err != nil || d.ID != want) {
			t.Errorf("find(%q): got %v, %v", name, d, err)
		}
	}
}

func TestSoftReboot(t *testing.T) {
	h, _ := newHost(t)
	plan := func(files map[string]string, edits ...Edit) *Plan {
		p, err := NewPlan(ctx, h, Request{Manifest: put(t, h.Store, files), Base: h.Booted, Edits: edits}, false)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	if err := h.CanSoftReboot(plan(system(t, "two"))); err != nil {
		t.Errorf("the same kernel: %v", err)
	}
	other := system(t, "two")
	other["boot/vmlinuz-1"] = "another kernel"
	if err := h.CanSoftReboot(plan(other)); !errors.Is(err, ErrReboot) {
		t.Errorf("another kernel: got %v, want ErrReboot", err)
	}
	if err := h.CanSoftReboot(plan(system(t, "two"), Edit{Append: Args{"debug"}})); !errors.Is(err, ErrReboot) {
		t.Errorf("another argument: got %v, want ErrReboot", err)
	}
}

// TestReset: /etc and /var are those of the image again, but for the machine's fstab.
func TestReset(t *testing.T) {
	h, _ := newHost(t)
	old := h.stateDir(h.Booted)
	for _, name := range []string{"etc/conf", "var/lib/state"} {
		if err := os.WriteFile(filepath.Join(old, name), []byte("mine\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	all, err := h.Deployments()
	if err != nil {
		t.Fatal(err)
	}
	p, err := NewPlan(ctx, h, Request{Manifest: all[0].Manifest, Base: h.Booted, FreshEtc: true, FreshVar: true, NoUserArgs: true}, true)
	if err == nil {
		err = p.Apply(ctx, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Finalize(ctx, nil); err != nil {
		t.Fatal(err)
	}
	state := h.stateDir(p.ID)
	wantFile(t, filepath.Join(state, "etc/conf"), "default of one\n")
	wantFile(t, filepath.Join(state, "etc/fstab"), "# none\nUUID=2 /boot ext4 defaults 0 2\n")
	wantFile(t, filepath.Join(state, "var/lib/state"), "made by one\n")
	wantFile(t, filepath.Join(old, "var/lib/state"), "mine\n")
	wantSound(t, h)
	// Its own /var goes after it.
	h.Booted = all[0].ID
	if _, err := h.Rollback(all[0].ID); err != nil {
		t.Fatal(err)
	}
	upgrade(t, h, system(t, "two"))
	if _, err := h.Collect(ctx, false, nil); err != nil {
		t.Fatal(err)
	}
	if left := snapshot(t, h); strings.Contains(left, p.ID) {
		t.Errorf("something of %s is left:\n%s", p.ID, left)
	}
}

// TestInterrupted stops a deployment before each of its steps, as a signal or an error
// would: the host stays as it is, and the next run succeeds and leaves nothing over.
func TestInterrupted(t *testing.T) {
	for stop := 0; ; stop++ {
		h, loader := newHost(t)
		files := system(t, "two")
		files["boot/vmlinuz-1"] = "another kernel"
		req := Request{Manifest: put(t, h.Store, files), Base: h.Booted}
		p, err := NewPlan(ctx, h, req, false)
		if err != nil {
			t.Fatal(err)
		}
		if stop == len(p.Steps) {
			return
		}
		stopped := errors.New("stopped")
		p.Steps[stop].run = func(context.Context) error { return stopped }
		if err := p.Apply(ctx, nil); !errors.Is(err, stopped) || !strings.Contains(err.Error(), p.Steps[stop].Text) {
			t.Fatalf("step %d: %v", stop, err)
		}
		wantRoles(t, h, "one booted default")
		wantSound(t, h)
		if _, err := h.Collect(ctx, false, nil); err != nil {
			t.Fatal(err)
		}
		left := snapshot(t, h)
		for _, name := range []string{p.ID, p.BootDigest, tempSuffix} {
			if strings.Contains(left, name) {
				t.Errorf("step %d: after collecting there is something of %s:\n%s", stop, name, left)
			}
		}
		upgrade(t, h, files)
		wantRoles(t, h, "two default counting, one booted")
		wantSound(t, h)
		_ = loader
	}
}
