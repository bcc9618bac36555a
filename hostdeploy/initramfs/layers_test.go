package initramfs

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/mount"
)

// squash makes a squashfs of files on a disk and returns its SHA-256.
func (d disk) squash(t *testing.T, name string, s system) string {
	t.Helper()
	mksquashfs, err := exec.LookPath("mksquashfs")
	if err != nil {
		t.Skip("mksquashfs is missing (apt install squashfs-tools)")
	}
	dir := t.TempDir()
	for file, content := range s {
		path := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(file, "/") {
			err = os.MkdirAll(path, 0o755)
		} else if target, link := strings.CutPrefix(content, "-> "); link {
			err = os.Symlink(target, path)
		} else if body, exec := strings.CutPrefix(content, "*"); exec {
			err = os.WriteFile(path, []byte(body), 0o755)
		} else {
			err = os.WriteFile(path, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	d.mkdir(t, filepath.Dir(name))
	if out, err := exec.Command(mksquashfs, dir, d.path(name), "-quiet", "-no-progress", "-root-mode", "755").CombinedOutput(); err != nil {
		t.Fatalf("mksquashfs: %v\n%s", err, out)
	}
	data, err := os.ReadFile(d.path(name))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func TestLayers(t *testing.T) {
	needMounts(t)
	if types, err := os.ReadFile("/proc/filesystems"); err != nil || !strings.Contains(string(types), "squashfs") {
		t.Skip("this kernel has no squashfs")
	}
	d := disk{t.TempDir()}
	base := bootable(system{"sysroot/": "", "usr/share/layer": "base", "usr/share/base": "base"})
	delete(base, "sysroot/") // as earlier layers have none
	sum := d.squash(t, "particle/base.squashfs", base)
	top := d.squash(t, "particle/app.squashfs", system{"usr/share/layer": "app"})
	manifest := func(layers ...any) string {
		data, err := json.Marshal(map[string]any{"layers": layers})
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	d.write(t, "particle/manifest.json", manifest(
		map[string]string{"file": "base.squashfs", "digest": "sha256:" + sum}, map[string]string{"path": "/particle/app.squashfs", "digest": top}))
	b := d.mounted(t)
	r, err := b.setup(t, "particle.manifest=particle/manifest.json")
	if err != nil {
		t.Fatal(err)
	}
	if r.Verification != mount.None || r.Why == "" || len(r.Layers) != 2 || r.Layers[0] != "/particle/base.squashfs" || r.Manifest != "/particle/manifest.json" {
		t.Errorf("got %+v", r)
	}
	wantFile(t, b.path("usr/share/layer"), "app")
	wantFile(t, b.path("usr/share/base"), "base")
	for _, name := range []string{"etc/new", "usr/new", "var/new"} {
		if err := os.WriteFile(b.path(name), []byte(name), 0o644); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(b.path("sysroot/particle/manifest.json")); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(filepath.Join(b.run, "layers")); err != nil || len(left) > 0 {
		t.Errorf("left in the run directory: %v, %v", left, err)
	}

	for name, c := range map[string]struct{ manifest, text string }{
		"changed layer": {manifest(map[string]string{"file": "base.squashfs", "digest": "sha256:" + hexA}), "want sha256:" + hexA},
		"missing layer": {manifest("base.squashfs", "gone.squashfs"), `layer 2, "/particle/gone.squashfs"`},
		"no squashfs":   {manifest("manifest.json"), "mounting it as squashfs"},
		"directory":     {manifest("../particle"), "not a regular file"},
		"not JSON":      {"layers", "invalid character"},
	} {
		t.Run(name, func(t *testing.T) {
			d.write(t, "particle/manifest.json", c.manifest)
			b := d.mounted(t)
			_, err := b.setup(t, "particle.manifest=/particle/manifest.json")
			if !errors.Is(err, ErrManifest) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want ErrManifest with %q", err, c.text)
			}
			if _, err := os.Stat(b.path("particle/manifest.json")); err != nil {
				t.Errorf("the physical root is not where it was: %v", err)
			}
		})
	}
	b = d.mounted(t)
	if _, err := b.setup(t, "particle.manifest=/none.json"); !errors.Is(err, ErrManifest) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want ErrManifest and ErrNotExist", err)
	}
}
