package prepare

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestResolve(t *testing.T) {
	root := small(t)
	plant(t, root, "a/b/f=", "up->../../../a", "abs->/a/b", "a/rel->b/../b", "a/chain->/abs/none/x", "loop->/loop", "top->/")
	r, err := os.OpenRoot(root)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	e := &editor{root: r}
	for name, want := range map[string]string{
		".": ".", "a/b/f": "a/b/f", "abs/f": "a/b/f", "up/b": "a/b", "a/rel/f": "a/b/f", "a/chain/y": "a/b/none/x/y",
		"top": ".", "top/abs/../rel": "a/b", "missing/x": "missing/x",
	} {
		if got, err := e.resolve(name); err != nil || got != want {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
		}
	}
	if got, err := e.resolve("loop/x"); !errors.Is(err, syscall.ELOOP) {
		t.Errorf("a loop: got %q, %v, want %v", got, err, syscall.ELOOP)
	}
}

// TestAbsoluteLinks: an author's links may begin at the tree's root.
func TestAbsoluteLinks(t *testing.T) {
	for _, there := range []bool{true, false} {
		root := small(t)
		if err := os.RemoveAll(filepath.Join(root, "usr/local")); err != nil {
			t.Fatal(err)
		}
		plant(t, root, "usr/local->/var/usrlocal")
		if there {
			plant(t, root, "var/usrlocal/lib/tmpfiles.d/x.conf=d /var/lib/app 0755 root root\n")
		}
		mustRun(t, root)
		conf, err := os.ReadFile(filepath.Join(root, tmpfilesConf))
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(string(conf), "d /var/lib/app "); got == there {
			t.Errorf("declared in /usr/local: %v; a line of ours for it: %v", there, got)
		}
	}
}
