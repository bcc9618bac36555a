package initramfs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOpenBesideRenames: the link of a deployment to its /var is followed whatever else
// happens on the machine.
func TestOpenBesideRenames(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "deploy/1"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "os/default/var"), 0o755); err != nil {
		t.Fatal(err)
	}
	// Each ".." is an occasion.
	if err := os.Symlink(strings.Repeat("../../deploy/1/", 50)+"../../os/default/var", filepath.Join(dir, "deploy/1/var")); err != nil {
		t.Fatal(err)
	}
	a, b := filepath.Join(elsewhere, "a"), filepath.Join(elsewhere, "b")
	if err := os.Mkdir(a, 0o755); err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan bool), make(chan bool)
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				_ = os.Rename(a, b)
				_ = os.Rename(b, a)
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	top, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	for i := range 20000 {
		f, err := openat(top, "deploy/1/var", unix.RESOLVE_BENEATH|unix.RESOLVE_NO_MAGICLINKS)
		if err != nil {
			t.Fatalf("the %d. time: %v", i, err)
		}
		f.Close()
	}
}
