package initramfs

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/mount"
)

// TestOverlayOnRoot stacks an overlay on a directory of the root, as
// particle-overlay@.service does.
func TestOverlayOnRoot(t *testing.T) {
	for _, more := range []string{"", " particle.root=transient"} {
		d := newDisk(t)
		image := d.deploy(t, bootable(nil))
		b := d.mounted(t)
		r, err := b.setup(t, insecure(image)+more)
		if err != nil {
			t.Fatal(err)
		}
		if s := mount.Probe(d.dir).FileStacks; !r.Loop && !s.OK {
			t.Skipf("this kernel stacks one overlay on an image without a loop device: %s", s.Why)
		}
		dir := b.path("var/lib/particle/overlay")
		for _, name := range []string{"upper", "work"} {
			if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		share := b.path("usr/share")
		err = unix.Mount("particle-overlay", share, "overlay", 0, "lowerdir="+share+",upperdir="+dir+"/upper,workdir="+dir+"/work")
		if err != nil {
			t.Fatalf("%q: %v", more, err)
		}
		if err := os.WriteFile(filepath.Join(share, "large"), []byte("changed"), 0o644); err != nil {
			t.Error(err)
		}
		wantFile(t, filepath.Join(dir, "upper/large"), "changed")
	}
}
