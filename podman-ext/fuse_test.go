package podmanext

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFront speaks the protocol as podman does.
func TestFront(t *testing.T) {
	e := newEnv(t)
	img := image(t, []string{"./", "etc/", "etc/a", strings.Repeat("n", 90)}, []string{"etc/", "etc/.wh.a"})
	e.source.images[testRef] = img
	front, err := e.Serve()
	if err != nil {
		t.Fatal(err)
	}
	defer front.Close()
	key := Key{testRef, img.layers[0]}
	dir := filepath.Join(e.o.Dir, key.path())
	for _, name := range []string{"diff", "info", "blob"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Create(filepath.Join(dir, "use")); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("use gives %v, want ENOENT", err)
	}
	if l := e.List(); len(l) != 1 || l[0].Uses != 1 {
		t.Errorf("after a use the tree has %+v", l)
	}
	var info map[string]any
	raw, err := os.ReadFile(filepath.Join(dir, "info"))
	if err != nil || json.Unmarshal(raw, &info) != nil || info["diff-digest"] != digestOf(img.tars[0]) || info["toc-digest"] != tocOf(img.layers[0]) {
		t.Errorf("info is %s, %v", raw, err)
	}
	blob, err := os.ReadFile(filepath.Join(dir, "blob"))
	if err != nil || !bytes.Equal(blob, img.tars[0]) {
		t.Errorf("blob has %d bytes, want %d: %v", len(blob), len(img.tars[0]), err)
	}
	f, err := os.Open(filepath.Join(dir, "blob"))
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{700, 10, 513, int64(len(blob)) - 3, int64(len(blob)) + 5} { // forth and back
		var b [8]byte
		n, err := f.ReadAt(b[:], off)
		want := blob[min(off, int64(len(blob))):min(off+8, int64(len(blob)))]
		if !bytes.Equal(b[:n], want) || err != nil && err != io.EOF {
			t.Errorf("at %d: %q, want %q: %v", off, b[:n], want, err)
		}
	}
	f.Close()
	if e.content(key, "etc/a") != "etc/a" {
		t.Error("etc/a does not show")
	}
	if err := os.WriteFile(filepath.Join(dir, "other"), nil, 0o600); !errors.Is(err, os.ErrPermission) {
		t.Errorf("writing gives %v", err)
	}
	if err := unix.Rmdir(dir); err != unix.ENOENT {
		t.Errorf("rmdir gives %v, want ENOENT", err)
	}
	if l := e.List(); len(l) != 0 {
		t.Errorf("after the release the tree has %+v", l)
	}
	if err := unix.Rmdir(dir); err != unix.ENOENT {
		t.Errorf("a second rmdir gives %v, want ENOENT", err)
	}
	// One podman has looked for it, and another one released it before the first used it.
	if _, err := os.Create(filepath.Join(dir, "use")); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("use gives %v, want ENOENT", err)
	}
	if l := e.List(); len(l) != 1 || l[0].Uses != 1 {
		t.Errorf("after the use of a layer that was released the tree has %+v", l)
	}
	if err := unix.Rmdir(dir); err != unix.ENOENT {
		t.Errorf("rmdir gives %v, want ENOENT", err)
	}
	for _, name := range []string{"x", encodeRef("noregistry"), encodeRef(testRef) + "/latest", encodeRef(testRef) + "/" + digestOf(nil) + "/diff"} {
		if _, err := os.Stat(filepath.Join(e.o.Dir, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Below lies the plain tree.
	if _, err := os.Stat(filepath.Join(dir, "diff")); err != nil {
		t.Fatal(err)
	}
	if err := front.Close(); err != nil {
		t.Fatal(err)
	}
	if e.content(key, "etc/a") != "etc/a" {
		t.Error("without the front etc/a does not show")
	}
	if _, err := os.Create(filepath.Join(dir, "use")); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("without the front use gives %v, want ENOENT", err)
	}
	if _, err := os.Open(filepath.Join(dir, "blob")); !errors.Is(err, syscall.ENXIO) {
		t.Errorf("without the front blob gives %v, want ENXIO", err)
	}
}
