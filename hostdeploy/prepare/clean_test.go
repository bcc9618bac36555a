package prepare

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestCaches: what only packages' scripts make is no cache, wherever it lies.
func TestCaches(t *testing.T) {
	root := small(t)
	kept := []string{"var/cache/cracklib/cracklib_dict.pwd", "var/cache/cracklib/src-dicts", "var/cache/debconf/config.dat"}
	removed := []string{"var/cache/man/index.db", "var/cache/apt/pkgcache.bin", "var/cache/debconf/config.dat-old"}
	for _, name := range append(kept, removed...) {
		plant(t, root, name+"=x")
	}
	mustRun(t, root)
	for _, name := range kept {
		if _, err := os.Lstat(filepath.Join(root, name)); err != nil {
			t.Errorf("%v, want it kept", err)
		}
	}
	for _, name := range removed {
		if _, err := os.Lstat(filepath.Join(root, name)); err == nil {
			t.Errorf("%s is there, want it removed", name)
		}
	}
	// A machine whose /var is older than the package gets it, too.
	if _, err := os.Lstat(filepath.Join(root, factory, kept[0])); err != nil {
		t.Error(err)
	}
}

// TestShared: keys and ids that nothing makes anew stay, and are reported.
func TestShared(t *testing.T) {
	names := []string{
		"etc/dropbear/dropbear_rsa_host_key", "etc/dropbear/initramfs/dropbear_ed25519_host_key",
		"etc/nvme/hostid", "etc/nvme/hostnqn", "etc/ssl/private/ssl-cert-snakeoil.key",
	}
	root := small(t)
	for _, name := range names {
		plant(t, root, name+"=x")
	}
	said := strings.Join(mustRun(t, root).Warnings, "\n") + "\n"
	for _, name := range names {
		if !strings.Contains(said, "all machines will share: /"+name+"\n") {
			t.Errorf("no word about %s in %q", name, said)
		}
		if _, err := os.Lstat(filepath.Join(root, name)); err != nil {
			t.Error(err)
		}
	}
}
