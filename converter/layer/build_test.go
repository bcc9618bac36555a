package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// show prints a tree as one word a path.
func show(t *tree.Tree) string {
	var s []string
	_ = t.Walk(func(path string, n *tree.Node) error {
		w := path
		switch n.Type() {
		case tree.TypeRegular:
			w += "=" + string(n.File.Inline)
			if !n.File.Object.IsZero() {
				w += fmt.Sprintf("<%d>", n.File.Size)
			}
		case tree.TypeSymlink:
			w += "->" + n.Target
		case tree.TypeChar:
			if n.IsWhiteout() {
				w += "(whiteout)"
			}
		}
		if n.IsOpaque() {
			w += "(opaque)"
		}
		if n.Implied {
			w += "(implied)"
		}
		s = append(s, w)
		return nil
	})
	return strings.Join(s, " ")
}

func TestTree(t *testing.T) {
	for _, c := range []struct {
		name string
		in   []byte
		want string
		warn string // the only warning, as a part of it
	}{
		{"nothing", nil, "/(implied)", ""},
		{"end blocks alone", tarOf(), "/(implied)", ""},
		{"root", tarOf(dir("./"), file("./a", "1")), "/ /a=1", ""},
		{"root as a slash", tarOf(dir("/")), "/", ""},
		{"root as slashes and dots", tarOf(dir("/.//./")), "/", ""},
		{"empty and dot elements", tarOf(dir("a"), file("a//./b", "1")), "/(implied) /a /a/b=1", ""},
		{"contiguous file", tarOf(typed(tar.TypeCont, "a", "")), "/(implied) /a=", ""},
		{"trailing slash of a file", tarOf(file("a", "1"), symlink("b/", "a")), "/(implied) /a=1 /b->a", ""},
		{"inline limit", tarOf(file("a", strings.Repeat("x", 64)), file("b", strings.Repeat("x", 65))), "/(implied) /a=" + strings.Repeat("x", 64) + " /b=<65>", ""},

		{"implied parents", tarOf(file("a/b/c", "1"), file("a/d/e", "1")), "/(implied) /a(implied) /a/b(implied) /a/b/c=1 /a/d(implied) /a/d/e=1", `parent directories that the layer does not list: 3, first "/a"`},
		{"late parents", tarOf(file("a/b", "1"), dir("a")), "/(implied) /a /a/b=1", ""},
		{"links out of the tree", tarOf(symlink("a", "../../../etc/passwd"), symlink("b", "/etc/passwd")), "/(implied) /a->../../../etc/passwd /b->/etc/passwd", ""},

		{"last file wins", tarOf(file("a", "1"), file("a", "2")), "/(implied) /a=2", ""},
		{"dir on dir", tarOf(dir("a"), file("a/b", "1"), dir("a")), "/(implied) /a /a/b=1", ""},
		{"file on dir", tarOf(dir("a"), file("a/b", "1"), file("a", "2")), "/(implied) /a=2", ""},
		{"dir on file", tarOf(file("a", "1"), dir("a"), file("a/b", "2")), "/(implied) /a /a/b=2", ""},
		{"dir on link", tarOf(symlink("a", "b"), dir("a"), file("a/b", "2")), "/(implied) /a /a/b=2", ""},
		{"file on dir, and dir again", tarOf(dir("a"), file("a/b", "1"), file("a", "2"), dir("a"), file("a/c", "3")), "/(implied) /a /a/c=3", ""},
		{"replaced name of a link", tarOf(file("a", "1"), link("b", "a"), file("a", "2")), "/(implied) /a=2 /b=1", ""},

		{"whiteout", tarOf(file(".wh.a", "")), "/(implied) /a(whiteout)", ""},
		{"whiteout with a body", tarOf(file(".wh.a", "x"), file(".wh.b", strings.Repeat("x", 100)), file("c", "1")), "/(implied) /a(whiteout) /b(whiteout) /c=1", ""},
		{"whiteout as a link or directory", tarOf(file("x", "1"), link(".wh.a", "x"), dir(".wh.b/")), "/(implied) /a(whiteout) /b(whiteout) /x=1", ""},
		{"whiteout below", tarOf(dir("a"), file("a/.wh.b", "")), "/(implied) /a /a/b(whiteout)", ""},
		{"whiteout before its file", tarOf(file(".wh.a", ""), file("a", "1")), "/(implied) /a=1", ""},
		{"whiteout after its file", tarOf(file("a", "1"), file(".wh.a", "")), "/(implied) /a=1", ""},
		{"whiteout before its directory", tarOf(file(".wh.a", ""), dir("a"), file("a/b", "1")), "/(implied) /a(opaque) /a/b=1", ""},
		{"whiteout after its directory", tarOf(dir("a"), file("a/b", "1"), file(".wh.a", "")), "/(implied) /a(opaque) /a/b=1", ""},
		{"whiteout of a directory that is not listed", tarOf(file(".wh.a", ""), file("a/b", "1")), "/(implied) /a(opaque) /a/b=1", ""},
		{"opaque first", tarOf(dir("a"), file("a/.wh..wh..opq", ""), file("a/b", "1")), "/(implied) /a(opaque) /a/b=1", ""},
		{"opaque last", tarOf(file("a/b", "1"), file("a/.wh..wh..opq", ""), dir("a")), "/(implied) /a(opaque) /a/b=1", ""},
		{"opaque root", tarOf(file(".wh..wh..opq", ""), file("b", "1")), "/(opaque)(implied) /b=1", ""},
		{"opaque and whiteout", tarOf(dir("a"), file("a/.wh.b", ""), file("a/.wh..wh..opq", "")), "/(implied) /a(opaque) /a/b(whiteout)", ""},
		{"AUFS bookkeeping", tarOf(file(".wh..wh.aufs", "x"), dir(".wh..wh.plnk/"), file(".wh..wh.plnk/1.2", "data"), link("a", ".wh..wh.plnk/1.2"), file("b/.wh..wh.x/.wh.y", "")), "/(implied) /a=data /b(implied)", `parent directories that the layer does not list: 1, first "/b"`},
		{"device 0:0", tarOf(xattr(char("a", 0, 0), "user.a", "1"), link("b", "a")), "/(implied) /a(whiteout) /b(whiteout)", `character devices 0:0: 1, first "/a"`},

		{"overlay xattrs", tarOf(xattr(xattr(xattr(dir("a"), "trusted.overlay.opaque", "y"), "user.overlay.redirect", "/x"), "user.overlayfs", "kept")), "/(implied) /a", `xattrs of overlayfs dropped: 2, first "trusted.overlay.opaque" of "/a"`},
		{"global header", tarOf(global(map[string]string{"comment": "c"}), file("a", "1")), "/(implied) /a=1", ""},
		{"global header with a meaning", tarOf(global(map[string]string{"path": "b"}), file("a", "1")), "/(implied) /a=1", "PAX global headers ignored: 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			res, _ := readAll(t, c.in, c.in)
			if got := show(res.Tree); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
			if got := strings.Join(res.Warnings, "\n"); (c.warn == "") != (got == "") || !strings.Contains(got, c.warn) || len(res.Warnings) > 1 {
				t.Errorf("got warnings %q, want %q", got, c.warn)
			}
		})
	}
}

func global(records map[string]string) entry {
	return func(h *tar.Header) string {
		*h = tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "global", PAXRecords: records}
		return ""
	}
}

// failing returns the error of reading a layer, and checks that a layer which is
// refused is refused again when it comes from a recorded stream.
func failing(t *testing.T, in []byte, opts Options) error {
	t.Helper()
	res, err := Read(context.Background(), bytes.NewReader(in), newMemory(), &recorded{}, opts)
	if err == nil {
		t.Fatalf("accepted: %s", show(res.Tree))
	}
	if res.Tree != nil {
		t.Error("a tree besides the error")
	}
	return err
}

func TestRefused(t *testing.T) {
	long := strings.Repeat("n", 256)
	deep := strings.Repeat("d/", 2048)
	for _, c := range []struct {
		name string
		in   []byte
		is   error
		want string // a part of the error
	}{
		{"dotdot", tarOf(file("../a", "1")), ErrName, `"../a"`},
		{"dotdot inside", tarOf(file("a/../b", "1")), ErrName, `".." element`},
		{"dotdot as a directory", tarOf(dir("a/..")), ErrName, `".." element`},
		{"absolute", tarOf(file("/etc/passwd", "1")), ErrName, "is absolute"},
		{"empty", tarOf(file("", "1")), ErrName, "empty"},
		{"long name", tarOf(file(long, "1")), ErrName, "got 256 bytes, want at most 255"},
		{"long path", tarOf(file(deep+"f", "1")), ErrName, "got 4097 bytes, want at most 4095"},
		{"root as a file", tarOf(file(".", "1")), ErrType, "root"},
		{"root as a link", tarOf(file("a", ""), link("./", "a")), ErrType, "root"},
		{"below a symbolic link", tarOf(symlink("a", "/etc"), file("a/passwd", "1")), ErrName, `below "a", which is a symbolic link`},
		{"below a file", tarOf(file("a", "1"), dir("a/b")), ErrName, `below "a", which is a regular file`},
		{"below a device", tarOf(char("a", 1, 3), file("a/b/c", "1")), ErrName, `below "a", which is a device`},
		{"below a FIFO", tarOf(typed(tar.TypeFifo, "a", ""), file("a/b", "1")), ErrName, "FIFO"},
		{"whiteout below a symbolic link", tarOf(symlink("a", "/etc"), file("a/.wh.passwd", "")), ErrName, "symbolic link"},

		{"whiteout of the root", tarOf(file(".wh.", "")), ErrName, "whiteout must name"},
		{"whiteout of its directory", tarOf(file("a/.wh..", "")), ErrName, "whiteout must name"},
		{"whiteout of its parent", tarOf(file("a/.wh...", "")), ErrName, "whiteout must name"},
		{"below a whiteout", tarOf(file(".wh.a/b", "")), ErrName, "below the whiteout"},
		{"below an opaque marker", tarOf(file(".wh..wh..opq/b", "")), ErrName, "below the whiteout"},

		{"link to nothing", tarOf(link("a", "b")), ErrLink, "does not have before it"},
		{"link to what comes later", tarOf(link("a", "b"), file("b", "1")), ErrLink, "does not have before it"},
		{"link to itself", tarOf(file("a", "1"), link("./a", "a")), ErrLink, "itself"},
		{"link to a directory", tarOf(dir("a"), link("b", "a")), ErrLink, "a directory"},
		{"link to the root", tarOf(dir("./"), link("b", "./")), ErrLink, "a directory"},
		{"link to outside", tarOf(link("a", "../b")), ErrLink, `".." element`},
		{"absolute link", tarOf(file("a", "1"), link("b", "/a")), ErrLink, "is absolute"},
		{"link through a link", tarOf(dir("d"), file("d/f", "1"), symlink("s", "d"), link("b", "s/f")), ErrLink, "does not have before it"},
		{"link over its target", tarOf(dir("d"), file("d/f", "1"), link("d", "d/f")), ErrLink, "would replace"},
		{"link without a target", tarOf(symlink("a", "")), ErrLink, "without a target"},
		{"long target", tarOf(symlink("a", strings.Repeat("t", 4096))), ErrLink, "got 4096 bytes, want at most 4095"},

		{"unknown type", tarOf(typed('Z', "a", "")), ErrType, "'Z'"},
		{"volume header", tarOf(typed('V', "a", "")), ErrType, "'V'"},
		{"large uid", tarOf(with(file("a", ""), func(h *tar.Header) { h.Uid = 1 << 32 })), ErrValue, "uid: got 4294967296"},
		{"negative gid", tarOf(with(file("a", ""), func(h *tar.Header) { h.Gid, h.Format = -1, tar.FormatGNU })), ErrValue, "gid: got -1"},
		{"large device", tarOf(char("a", 4096, 0)), ErrValue, "got 4096:0, want at most 4095:1048575"},
		{"long xattr name", tarOf(xattr(file("a", ""), "user."+long, "v")), ErrValue, "got 261 bytes"},
		{"long xattr", tarOf(xattr(file("a", ""), "user.a", strings.Repeat("v", 70000))), ErrValue, "got 70000 bytes"},
		{"nameless xattr", tarOf(xattr(file("a", ""), "", "v")), ErrValue, "without a name"},
		{"too many xattrs together", tarOf(xattr(dir("a"), "user.a", strings.Repeat("v", 20000)), xattr(dir("a"), "user.b", strings.Repeat("v", 20000))), ErrValue, "earlier entry"},
		{"bad libarchive xattr", tarOf(with(file("a", ""), func(h *tar.Header) { h.PAXRecords = map[string]string{"LIBARCHIVE.xattr.user.a": "?"} })), ErrValue, "LIBARCHIVE"},
		{"bad libarchive name", tarOf(with(file("a", ""), func(h *tar.Header) { h.PAXRecords = map[string]string{"LIBARCHIVE.xattr.user.%00": ""} })), ErrValue, "LIBARCHIVE"},

		{"no tar", []byte(strings.Repeat("not a tar ", 100)), ErrFormat, "does not begin with a tar header"},
		{"bad second header", slices.Concat(tarOf(file("a", "1"))[:1024], bytes.Repeat([]byte("x"), 512)), ErrFormat, "at byte 1024"},
		{"one zero block and more", slices.Concat(make([]byte, 512), tarOf(file("a", "1"))), ErrFormat, "byte 512"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := failing(t, c.in, Options{})
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q of the kind %q", err, c.want, c.is)
			}
			// The same from a recorded stream.
			_, err = FromChunks(context.Background(), &chunkList{[]part{{inline: c.in}}}, newMemory().open, newMemory(), Options{})
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), "recorded layer") {
				t.Errorf("from chunks: got %v, want the kind %q", err, c.is)
			}
		})
	}
}

func TestRefusedNamesEntry(t *testing.T) {
	err := failing(t, tarOf(file("a", "1"), file("b/../c", "1")), Options{})
	if want := `entry 2, "b/../c", at byte 1024: unsafe name`; !strings.HasPrefix(err.Error(), want) {
		t.Errorf("got %q, want it to begin with %q", err, want)
	}
}

func TestMetadata(t *testing.T) {
	long := strings.Repeat("n", 255)
	target := strings.Repeat("t", 4095)
	old := time.Unix(-1, 500_000_000)
	in := tarOf(
		with(dir("./"), func(h *tar.Header) { h.Mode, h.Uid, h.Gid = 0o1700, 1, 2 }),
		with(mode(file("suid", ""), 0o104755), func(h *tar.Header) { h.Uid, h.Gid = math.MaxUint32, math.MaxUint32 }),
		mode(symlink("link", target), 0o4644),
		with(file("old", ""), func(h *tar.Header) { h.ModTime, h.Format = old, tar.FormatPAX }),
		with(file("future", ""), func(h *tar.Header) { h.ModTime, h.Format = time.Unix(1<<40, 999_999_999), tar.FormatPAX }),
		with(file("end", ""), func(h *tar.Header) { h.ModTime, h.Format = time.Unix(math.MaxInt64, 0), tar.FormatPAX }),
		with(file("last", ""), func(h *tar.Header) { h.ModTime, h.Format = time.Unix(lastMtime, 999_999_999), tar.FormatPAX }),
		with(symlink("oldlink", "x"), func(h *tar.Header) { h.ModTime, h.Format = old, tar.FormatPAX }),
		file(long, ""),
		file("\xff\xfe/\xe4", ""),
		char("null", 1, 3),
		with(char("sda", 8, 300), func(h *tar.Header) { h.Typeflag = tar.TypeBlock }),
		typed(tar.TypeFifo, "fifo", ""),
		xattr(xattr(file("x", ""), "security.capability", "\x01\x00\x00\x02\x00"), "user.empty", ""),
		xattr(dir("d"), "user.a", "1"),
		xattr(dir("d"), "user.b", "2"),
		with(xattr(file("both", ""), "user.a", "schily"), func(h *tar.Header) {
			h.PAXRecords["LIBARCHIVE.xattr.user.a"] = base64.StdEncoding.EncodeToString([]byte("libarchive"))
			h.PAXRecords["LIBARCHIVE.xattr.user.b%3D"] = base64.RawStdEncoding.EncodeToString([]byte("v"))
		}),
	)
	res, _ := readAll(t, in, in)
	root := res.Tree.Root
	if root.Mode != tree.TypeDir|0o1700 || root.UID != 1 || root.GID != 2 || root.Implied || root.MtimeSec != 1700000000 {
		t.Errorf("root: %+v", root.Stat)
	}
	if n := root.Dir["suid"]; n.Mode != tree.TypeRegular|0o4755 || n.UID != math.MaxUint32 || n.GID != math.MaxUint32 {
		t.Errorf("suid: %+v", n.Stat)
	}
	if n := root.Dir["link"]; n.Mode != tree.TypeSymlink|0o777 || n.Target != target {
		t.Errorf("link: %+v", n.Stat)
	}
	for name, want := range map[string]time.Time{"old": time.Unix(0, 0), "future": time.Unix(0, 0), "end": time.Unix(0, 0), "last": time.Unix(lastMtime, 999_999_999), "oldlink": old} {
		if n := root.Dir[name]; n.MtimeSec != want.Unix() || int(n.MtimeNsec) != want.Nanosecond() {
			t.Errorf("%s: got %d.%09d, want %d.%09d", name, n.MtimeSec, n.MtimeNsec, want.Unix(), want.Nanosecond())
		}
	}
	if root.Dir[long] == nil || res.Tree.Lookup("\xff\xfe/\xe4") == nil {
		t.Error("long or non-UTF-8 name is missing")
	}
	if n := root.Dir["null"]; n.Mode != tree.TypeChar|0o644 || n.Rdev != tree.Makedev(1, 3) || n.IsWhiteout() {
		t.Errorf("null: %+v", n)
	}
	if n := root.Dir["sda"]; n.Type() != tree.TypeBlock || tree.Major(n.Rdev) != 8 || tree.Minor(n.Rdev) != 300 {
		t.Errorf("sda: %+v", n)
	}
	if n := root.Dir["fifo"]; n.Type() != tree.TypeFIFO {
		t.Errorf("fifo: %+v", n)
	}
	for name, want := range map[string]map[string]string{
		"x":    {"security.capability": "\x01\x00\x00\x02\x00"},
		"d":    {"user.a": "1", "user.b": "2"},
		"both": {"user.a": "schily", "user.b=": "v"},
	} {
		if got := root.Dir[name].Xattrs; fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: got xattrs %q, want %q", name, got, want)
		}
	}
}

// TestDirOnDir checks that the later entry's metadata counts.
func TestDirOnDir(t *testing.T) {
	in := tarOf(mode(dir("a"), 0o700), file("a/b", "1"), mode(dir("a"), 0o711))
	res, _ := readAll(t, in, in)
	if n := res.Tree.Lookup("a"); n.Mode != tree.TypeDir|0o711 || len(n.Dir) != 1 {
		t.Errorf("got %+v", n)
	}
}

func TestHardLinks(t *testing.T) {
	big := strings.Repeat("x", 1000)
	in := tarOf(file("a", big), link("b", "a"), dir("d"), link("d/c", "./b"), symlink("s", "a"), link("t", "s"), link("b", "a"))
	res, _ := readAll(t, in, in)
	a := res.Tree.Lookup("a")
	if res.Tree.Lookup("b") != a || res.Tree.Lookup("d/c") != a || a.File.Object != fsverity.Sum(fsverity.SHA256, []byte(big)) {
		t.Error("a, b and d/c are not one file")
	}
	if res.Tree.Lookup("s") != res.Tree.Lookup("t") || res.Tree.Lookup("t").Target != "a" {
		t.Error("s and t are not one link")
	}
}

// TestMerged checks, in the words of the specification (layer.md, "Whiteouts"),
// that whiteouts hold for lower layers only.
func TestMerged(t *testing.T) {
	lower := tarOf(dir("a/"), dir("a/b/"), dir("a/b/c/"), file("a/b/c/bar", "1"), file("a/x", "1"))
	for _, c := range []struct {
		name  string
		upper []byte
		want  string
	}{
		{"opaque", tarOf(dir("a/"), file("a/.wh..wh..opq", ""), dir("a/b/"), dir("a/b/c/"), file("a/b/c/foo", "2")), "/(implied) /a /a/b /a/b/c /a/b/c/foo=2"},
		{"opaque, listed last", tarOf(dir("a/"), dir("a/b/"), dir("a/b/c/"), file("a/b/c/foo", "2"), file("a/.wh..wh..opq", "")), "/(implied) /a /a/b /a/b/c /a/b/c/foo=2"},
		{"explicit", tarOf(dir("a/"), file("a/.wh.b", ""), dir("a/b/"), dir("a/b/c/"), file("a/b/c/foo", "2")), "/(implied) /a /a/b /a/b/c /a/b/c/foo=2 /a/x=1"},
		{"of a file", tarOf(file("a/.wh.x", "")), "/(implied) /a /a/b /a/b/c /a/b/c/bar=1"},
		{"of a file that is new", tarOf(file("a/x", "2"), file("a/.wh.x", "")), "/(implied) /a /a/b /a/b/c /a/b/c/bar=1 /a/x=2"},
		{"of a tree", tarOf(file(".wh.a", "")), "/(implied)"},
	} {
		lo, _ := readAll(t, lower, lower)
		up, _ := readAll(t, c.upper, c.upper)
		got := show(tree.Merge(tree.Merge(tree.New(), lo.Tree), up.Tree))
		if got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
	}
}
