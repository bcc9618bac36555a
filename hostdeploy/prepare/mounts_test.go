package prepare

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// mountTmpfs mounts an empty file system on a directory of a tree, as RUN --mount does.
func mountTmpfs(t *testing.T, root, dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount")
	}
	plant(t, root, dir+"/")
	target := filepath.Join(root, dir)
	if err := unix.Mount("tmpfs", target, "tmpfs", 0, ""); err != nil {
		t.Skipf("mounting a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// TestMounted: what a build has mounted is not the tree's, wherever it lies.
func TestMounted(t *testing.T) {
	for _, c := range []struct {
		on    string
		files []string
	}{
		{"run", []string{"run/x", "run/d/x"}},
		{"tmp", []string{"tmp/x", "tmp/d/x"}},
		{"var/tmp", []string{"var/tmp/x", "var/tmp/d/x"}},
		{"var/lib/apt", []string{"var/lib/apt/extended_states", "var/lib/apt/lists/x_Packages"}},
		{"var/lib/apt/lists", []string{"var/lib/apt/lists/x_Packages", "var/lib/apt/lists/partial/x"}},
		{"var/cache", []string{"var/cache/apt/x.bin", "var/cache/debconf/config.dat-old"}},
		{"var/cache/apt", []string{"var/cache/apt/x.bin", "var/cache/apt/archives/x.deb"}},
		{"var/log", []string{"var/log/x.log", "var/log/d/x.log"}},
		{"etc/ssh", []string{"etc/ssh/ssh_host_x_key", "etc/ssh/x.dpkg-old"}},
	} {
		t.Run(c.on, func(t *testing.T) {
			root := small(t)
			mountTmpfs(t, root, c.on)
			for _, name := range c.files {
				plant(t, root, name+"=the host's")
			}
			mustRun(t, root)
			for _, name := range c.files {
				if got, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(got) != "the host's" {
					t.Errorf("%s: got %q, %v, want it left alone", name, got, err)
				}
			}
		})
	}
}
