package store

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestPutFileAcrossMounts: a file is linked although a bind mount lies between it and
// the store, as podman's own has; one of another file system is copied.
func TestPutFileAcrossMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	bound := filepath.Join(dir, "a space", "bound")
	if err := os.MkdirAll(bound, 0o755); err != nil {
		t.Fatal(err)
	}
	bind := func(source, target, typ string, flags uintptr) {
		if err := unix.Mount(source, target, typ, flags, ""); err != nil {
			t.Skip("mounting: ", err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	}
	bind(bound, bound, "", unix.MS_BIND)
	other := filepath.Join(dir, "other")
	if err := os.Mkdir(other, 0o755); err != nil {
		t.Fatal(err)
	}
	bind("tmpfs", other, "tmpfs", 0)

	s, err := Init(filepath.Join(dir, "store"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path   string
		linked bool
	}{{filepath.Join(bound, "f"), true}, {filepath.Join(other, "f"), false}} {
		data := bytes.Repeat([]byte(c.path), 1000)
		if err := os.WriteFile(c.path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		txn, err := s.Begin(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		txn.SetImmutableSources(true)
		f, err := os.Open(c.path)
		if err != nil {
			t.Fatal(err)
		}
		d, err := txn.PutFile(context.Background(), f, int64(len(data)))
		if err == nil {
			err = txn.Commit()
		}
		if err != nil {
			t.Fatal(err)
		}
		object, err := os.Stat(filepath.Join(s.ObjectsDir(), d.Path()))
		if err != nil {
			t.Fatal(err)
		}
		fi, err := f.Stat()
		f.Close()
		if err != nil || os.SameFile(fi, object) != c.linked {
			t.Errorf("%s: linked %v, %v, want %v", c.path, os.SameFile(fi, object), err, c.linked)
		}
		if got, err := os.ReadFile(filepath.Join(s.ObjectsDir(), d.Path())); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: the object is another, %v", c.path, err)
		}
	}
}

func TestUnescapeMount(t *testing.T) {
	for in, want := range map[string]string{`/a\040b\134`: `/a b\`, "/a": "/a", `\04`: `\04`, `\999`: `\999`} {
		if got := unescapeMount(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}
