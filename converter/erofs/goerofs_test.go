package erofs_test

import (
	"bytes"
	"errors"
	"io/fs"
	"maps"
	"path"
	"strings"
	"testing"

	goerofs "github.com/erofs/go-erofs"

	"github.com/particle-os/particle/converter/dump"
	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/tree"
)

// TestGoEROFS lets another implementation of EROFS read what Write writes and
// compares names, metadata, xattrs and contents.
func TestGoEROFS(t *testing.T) {
	for _, v := range vectors(t) {
		t.Run(v.name, func(t *testing.T) {
			tr := parse(t, v.text, dump.Options{})
			compareWithGoEROFS(t, tr, write(t, tr, v.format))
		})
	}
	t.Run("random", func(t *testing.T) {
		for seed := range uint64(20) {
			tr := randomTree(seed)
			compareWithGoEROFS(t, tr, write(t, tr, erofs.V1))
		}
	})
}

func compareWithGoEROFS(t *testing.T, tr *tree.Tree, image []byte) {
	t.Helper()
	img, err := goerofs.Open(bytes.NewReader(image))
	if err != nil {
		t.Fatal(err)
	}
	links := tr.Links()
	seen := 0
	err = tr.Walk(func(p string, n *tree.Node) error {
		name := strings.TrimPrefix(p, "/")
		if p == "/" {
			name = "."
		}
		if !fs.ValidPath(name) || strings.ContainsAny(name, "\x00") {
			return nil
		}
		fi, err := fs.Lstat(img, name)
		if err != nil {
			t.Errorf("%q: %v", p, err)
			return nil
		}
		seen++
		st, ok := fi.Sys().(*goerofs.Stat)
		if !ok {
			t.Fatalf("%q: Sys is %T", p, fi.Sys())
		}
		if st.UID != n.UID || st.GID != n.GID || int64(st.Mtime) != n.MtimeSec || st.MtimeNs != n.MtimeNsec {
			t.Errorf("%q: got %d:%d %d.%d, want %d:%d %d.%d", p, st.UID, st.GID, st.Mtime, st.MtimeNs, n.UID, n.GID, n.MtimeSec, n.MtimeNsec)
		}
		if got, want := uint32(fi.Mode().Perm()), n.Mode&0o777; got != want {
			t.Errorf("%q: permissions %o, want %o", p, got, want)
		}
		if n.IsRegular() && fi.Size() != n.File.Size {
			t.Errorf("%q: size %d, want %d", p, fi.Size(), n.File.Size)
		}
		if !n.IsDir() && n.Nlink == 0 && st.Nlink != links[n] {
			t.Errorf("%q: %d links, want %d", p, st.Nlink, links[n])
		}
		want := storedXattrs(n)
		got := map[string]string{}
		for k, v := range st.Xattrs {
			// go-erofs puts a dot behind these prefixes, which are whole names.
			for _, acl := range []string{"system.posix_acl_access", "system.posix_acl_default"} {
				if rest, ok := strings.CutPrefix(k, acl+"."); ok {
					k = acl + rest
				}
			}
			got[k] = v
		}
		maps.DeleteFunc(got, func(k, _ string) bool { return isAdded(k) && want[k] == "" })
		maps.DeleteFunc(want, func(k, v string) bool { return isAdded(k) && v == "" })
		if n.IsDir() || n.IsWhiteout() { // what marks whiteouts may replace these
			for _, k := range []string{"trusted.overlay.overlay.opaque", "user.overlay.opaque"} {
				delete(got, k)
				delete(want, k)
			}
		}
		if !maps.Equal(got, want) {
			t.Errorf("%q: xattrs\n got %.300q\nwant %.300q", p, got, want)
		}
		if n.IsRegular() && len(n.File.Inline) > 0 {
			b, err := fs.ReadFile(img, name)
			if err != nil || !bytes.Equal(b, n.File.Inline) {
				t.Errorf("%q: content differs (%v)", p, err)
			}
		}
		if n.Type() == tree.TypeSymlink {
			l, ok := img.(fs.ReadLinkFS)
			if !ok {
				return errors.New("go-erofs reads no links")
			}
			if target, err := l.ReadLink(name); err != nil || target != path.Clean(n.Target) && target != n.Target {
				t.Errorf("%q: target %.80q, want %.80q (%v)", p, target, n.Target, err)
			}
		}
		return nil
	})
	if err != nil || seen == 0 {
		t.Errorf("walked %d names: %v", seen, err)
	}
}

// storedXattrs returns the xattrs that EROFS has for a node of a tree.
func storedXattrs(n *tree.Node) map[string]string {
	m := map[string]string{}
	for k, v := range n.Xattrs {
		if suffix, ok := strings.CutPrefix(k, "trusted.overlay."); ok {
			k = "trusted.overlay.overlay." + suffix
		}
		m[k] = v
	}
	return m
}

// isAdded reports whether an xattr is one that Write adds.
func isAdded(k string) bool {
	switch k {
	case "trusted.overlay.metacopy", "trusted.overlay.redirect", "trusted.overlay.opaque",
		"trusted.overlay.overlay.whiteout", "trusted.overlay.overlay.whiteouts",
		"user.overlay.whiteout", "user.overlay.whiteouts":
		return true
	}
	return false
}
