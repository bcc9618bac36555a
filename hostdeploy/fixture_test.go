package hostdeploy

import (
	"bytes"
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/hostdeploy/bootloader"
)

var ctx = context.Background()

// A memLoader keeps entries in memory, in the order of systemd-boot.
type memLoader struct {
	entries []bootloader.Entry
	max     int
	fail    error // of the next change
}

func (l *memLoader) Name() string { return "memory" }

func (l *memLoader) Entries(func(string, ...any)) ([]bootloader.Entry, error) {
	all := slices.Clone(l.entries)
	for i := range all {
		if c := all[i].Counter; c != nil {
			copied := *c
			all[i].Counter = &copied
		}
	}
	slices.SortStableFunc(all, func(a, b bootloader.Entry) int {
		if a.Bad() != b.Bad() {
			if a.Bad() {
				return 1
			}
			return -1
		}
		return b.Generation - a.Generation
	})
	return all, nil
}

func (l *memLoader) index(id string) int {
	return slices.IndexFunc(l.entries, func(e bootloader.Entry) bool { return e.ID == id })
}

func (l *memLoader) Add(e bootloader.Entry) error {
	if l.fail != nil {
		return l.fail
	}
	if i := l.index(e.ID); i >= 0 {
		l.entries[i] = e
		return nil
	}
	l.entries = append(l.entries, e)
	return nil
}

func (l *memLoader) Remove(id string) error {
	i := l.index(id)
	if i < 0 {
		return bootloader.ErrNoEntry
	}
	l.entries = slices.Delete(l.entries, i, i+1)
	return nil
}

func (l *memLoader) Good(id string) error {
	i := l.index(id)
	if i < 0 {
		return bootloader.ErrNoEntry
	}
	l.entries[i].Counter = nil
	return nil
}

func (l *memLoader) Check(bootloader.Entry) error { return nil }

func (l *memLoader) Sync() error             { return nil }
func (l *memLoader) Tries() bootloader.Tries { return bootloader.Tries{Max: l.max, How: "in memory"} }

// initrd returns an initramfs with the given files.
func initrd(t *testing.T, names ...string) string {
	t.Helper()
	var b bytes.Buffer
	w := cpio.NewWriter(&b)
	for _, name := range names {
		if err := w.WriteHeader(&cpio.Header{Name: name, Mode: cpio.TypeReg | 0o755, Size: 1}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// system returns the files of an image that boots, in one version.
func system(t *testing.T, version string) map[string]string {
	return map[string]string{
		"usr/lib/os-release":            "ID=test\nPRETTY_NAME=Test\nIMAGE_VERSION=" + version + "\n",
		"usr/lib/modules/1/modules":     "",
		"usr/lib/particle/kargs.d/a":    "not read",
		"boot/vmlinuz-1":                "kernel " + strings.Repeat("k", 100),
		"boot/initrd.img-1":             initrd(t, "init", "usr/lib/particle/particle-init-root", "scripts/init-bottom/particle", "usr/lib/modules/1/kernel/fs/erofs/erofs.ko", "usr/lib/modules/1/kernel/fs/overlayfs/overlay.ko"),
		"etc/fstab":                     "# none\n",
		"etc/version":                   version + "\n",
		"etc/conf":                      "default of " + version + "\n",
		"var/lib/state":                 "made by " + version + "\n",
		"usr/share/" + version + ".txt": strings.Repeat(version, 100),
	}
}

// put brings an image of files into the store and returns the digest of its manifest.
func put(t *testing.T, st *store.Store, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// The same files are the same image, whenever they were written.
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(path, time.Unix(1e9, 0), time.Unix(1e9, 0))
	})
	if err != nil {
		t.Fatal(err)
	}
	res, err := converter.ConvertDir(ctx, dir, st, converter.Options{Bootable: true})
	if err != nil {
		t.Fatal(err)
	}
	return res.Manifest.String()
}

// newHost installs a first image and returns the host as if it had booted it.
func newHost(t *testing.T) (*Host, *memLoader) {
	t.Helper()
	root := t.TempDir()
	boot := filepath.Join(root, "boot")
	if err := os.Mkdir(boot, 0o755); err != nil {
		t.Fatal(err)
	}
	loader := &memLoader{max: 3}
	n := &NewHost{
		Root: root, Paths: bootloader.Paths{Boot: boot, Prefix: "/boot"}, Loader: "systemd-boot",
		Args: Args{"root=UUID=1", "rw"}, Machine: Args{"console=ttyS0"}, Fstab: "UUID=2 /boot ext4 defaults 0 2\n",
		Reference: "docker://registry.example/test:1",
	}
	plan, err := n.Prepare(ctx, func(_ context.Context, st *store.Store) (string, error) { return put(t, st, system(t, "one")), nil })
	if err != nil {
		t.Fatal(err)
	}
	plan.h.Loader = loader
	if err := n.Install(ctx, plan); err != nil {
		t.Fatal(err)
	}
	h := plan.h
	h.Run, h.Booted, h.Warn = filepath.Join(root, "run"), plan.ID, t.Logf
	return h, loader
}

// upgrade stages an image and finalizes it, and boots it where it says so.
func upgrade(t *testing.T, h *Host, files map[string]string) *Plan {
	t.Helper()
	req := Request{Manifest: put(t, h.Store, files), Base: h.Booted, Reference: "docker://registry.example/test:1"}
	p, err := NewPlan(ctx, h, req, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Apply(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if p, err = h.Finalize(ctx, nil); err != nil {
		t.Fatal(err)
	}
	return p
}

// roles describes the deployments, in the order in which they boot.
func roles(t *testing.T, h *Host) string {
	t.Helper()
	all, err := h.Deployments()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, d := range all {
		s := d.Version
		for _, r := range []struct {
			is   bool
			name string
		}{{d.Booted, "booted"}, {d.Staged, "staged"}, {d.Default, "default"}, {d.Pinned, "pinned"}, {d.Failed, "failed"}, {d.Tries != nil, "counting"}} {
			if r.is {
				s += " " + r.name
			}
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}

func wantRoles(t *testing.T, h *Host, want string) {
	t.Helper()
	if got := roles(t, h); got != want {
		t.Errorf("deployments:\n got %s\nwant %s", got, want)
	}
}

func wantFile(t *testing.T, name, want string) {
	t.Helper()
	got, err := os.ReadFile(name)
	if err != nil || string(got) != want {
		t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
	}
}

// wantSound checks what must hold at every moment: every entry has its kernel, its
// state and its image, and the store is clean.
func wantSound(t *testing.T, h *Host) {
	t.Helper()
	all, err := h.Deployments()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 {
		t.Fatal("nothing can be booted")
	}
	for _, d := range all {
		if d.Staged {
			continue
		}
		if ok, err := h.bootable(d.Entry); !ok || err != nil {
			t.Errorf("deployment %s: its kernel is missing (%v)", d.Name(), err)
		}
		for _, name := range []string{"etc/fstab", "var/lib/state", d.ID + ".origin"} {
			if _, err := os.Stat(filepath.Join(h.stateDir(d.ID), name)); err != nil {
				t.Errorf("deployment %s: %v", d.Name(), err)
			}
		}
		if _, err := h.tree(d.Digest); err != nil {
			t.Errorf("deployment %s: %v", d.Name(), err)
		}
	}
	r, err := converter.Fsck(ctx, h.Store, store.FsckOptions{Scrub: true})
	if err != nil || !r.Clean() {
		t.Errorf("the store: %v %+v", err, r)
	}
}
