package dpkg

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"os"
	"path"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// none is an opener for trees whose files are inline.
type none struct{}

func (none) OpenObject(d fsverity.Digest) (*os.File, error) {
	return nil, fmt.Errorf("object %s: %w", d, os.ErrNotExist)
}

// newTree makes a tree of paths and contents; "-> x" is a symbolic link.
func newTree(files map[string]string) *tree.Tree {
	t := tree.New()
	for name, text := range files {
		at := t.Root
		dir, base := path.Split(name)
		for e := range strings.SplitSeq(strings.Trim(dir, "/"), "/") {
			if e == "" {
				continue
			}
			if at.Dir[e] == nil {
				at.Dir[e] = tree.NewImplied()
			}
			at = at.Dir[e]
		}
		n := &tree.Node{Stat: tree.Stat{Mode: tree.TypeRegular | 0o644}, File: &tree.File{Size: int64(len(text)), Inline: []byte(text)}}
		if target, ok := strings.CutPrefix(text, "-> "); ok {
			n = &tree.Node{Stat: tree.Stat{Mode: tree.TypeSymlink | 0o777}, Target: target}
		}
		at.Dir[base] = n
	}
	return t
}

func stanza(name, version string, more ...string) string {
	return "Package: " + name + "\nStatus: install ok installed\nArchitecture: amd64\nVersion: " + version + "\n" +
		strings.Join(append(more, ""), "\n") + "\n"
}

func TestRead(t *testing.T) {
	status := stanza("libc6", "2.41-12", "Multi-Arch: same", "Source: glibc (2.41-11)", "Installed-Size: 13000", "Essential: yes", "Section: libs",
		"Conffiles:", " /etc/ld.so.conf.d/a b.conf d4e7a7b88a71b5ffd9e2644e71a0cfab", " /etc/gone abc obsolete",
		"Description: GNU C Library", " long", " .", " longer") +
		"package: gone\nSTATUS: deinstall ok config-files\narchitecture: all\nversion: 1\n"
	for name, files := range map[string]map[string]string{
		"var":      {"/var/lib/dpkg/status": status},
		"sysimage": {"/usr/lib/sysimage/dpkg/status": status},
		"linked":   {"/usr/lib/sysimage/dpkg/status": status, "/var/lib/dpkg": "-> ../../usr/lib/sysimage/dpkg"},
		"absolute": {"/usr/lib/sysimage/dpkg/status": status, "/var/lib": "-> /usr/share/../lib/sysimage", "/usr/share/x": ""},
		"updates":  {"/var/lib/dpkg/status": stanza("libc6", "2.36-1"), "/var/lib/dpkg/updates/0001": stanza("libc6", "2.40"), "/var/lib/dpkg/updates/0002": status, "/var/lib/dpkg/updates/tmp.i": "x"},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := Read(newTree(files), none{})
			check(t, err)
			if len(d.Packages) != 2 || d.Packages[0].Name != "gone" || d.Packages[0].Installed() || !d.Packages[1].Installed() {
				t.Fatalf("got %+v, want gone and libc6", d.Packages)
			}
			p := d.Packages[1]
			if got := p.Fields.Field("DESCRIPTION"); got != "GNU C Library\n long\n .\n longer" {
				t.Errorf("description: got %q", got)
			}
			p.Fields = nil
			want := Package{
				Name: "libc6", Arch: "amd64", Version: "2.41-12", Want: "install", Flag: "ok", State: "installed",
				Source: "glibc", SourceVersion: "2.41-11", Section: "libs", Synopsis: "GNU C Library", MultiArch: "same", InstalledSize: 13000, Essential: true,
				Conffiles: []Conffile{
					{Path: "/etc/ld.so.conf.d/a b.conf", MD5: "d4e7a7b88a71b5ffd9e2644e71a0cfab"}, {Path: "/etc/gone", MD5: "abc", Obsolete: true},
				},
			}
			if !reflect.DeepEqual(p, want) {
				t.Errorf("got  %+v\nwant %+v", p, want)
			}
		})
	}
}

func TestReadErrors(t *testing.T) {
	big := newTree(map[string]string{"/var/lib/dpkg/status": ""})
	big.Lookup("/var/lib/dpkg/status").File.Size = maxStatus + 1
	for name, tt := range map[string]struct {
		tree *tree.Tree
		want error
	}{
		"empty tree":        {tree.New(), ErrNoDatabase},
		"empty directory":   {newTree(map[string]string{"/var/lib/dpkg/info/x": ""}), ErrNoDatabase},
		"link loop":         {newTree(map[string]string{"/var/lib/dpkg": "-> dpkg"}), ErrNoDatabase},
		"link out":          {newTree(map[string]string{"/var/lib/dpkg": "-> ../../../../../../../../var/lib/dpkg"}), ErrNoDatabase},
		"status a link out": {newTree(map[string]string{"/var/lib/dpkg/status": "-> /etc/passwd"}), ErrNoDatabase},
		"large":             {big, ErrTooLarge},
		"no name":           {newTree(map[string]string{"/var/lib/dpkg/status": "Version: 1\n"}), ErrFormat},
		"path as name":      {newTree(map[string]string{"/var/lib/dpkg/status": "Package: ../../x\n"}), ErrFormat},
		"path as arch":      {newTree(map[string]string{"/var/lib/dpkg/status": "Package: x\nArchitecture: ../x\n"}), ErrFormat},
		"status words":      {newTree(map[string]string{"/var/lib/dpkg/status": "Package: x\nStatus: installed\n"}), ErrFormat},
		"twice":             {newTree(map[string]string{"/var/lib/dpkg/status": "Package: x\nPackage: y\n"}), ErrFormat},
		"no colon":          {newTree(map[string]string{"/var/lib/dpkg/status": "Package x\n"}), ErrFormat},
		"continues nothing": {newTree(map[string]string{"/var/lib/dpkg/status": " x\n"}), ErrFormat},
		"conffile":          {newTree(map[string]string{"/var/lib/dpkg/status": "Package: x\nConffiles: /etc/x\n"}), ErrFormat},
		"relative conffile": {newTree(map[string]string{"/var/lib/dpkg/status": "Package: x\nConffiles: etc/x 1\n"}), ErrFormat},
	} {
		if _, err := Read(tt.tree, none{}); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", name, err, tt.want)
		}
	}
}

// usrmerged has packages made before and after the merge, and diversions.
func usrmerged() *tree.Tree {
	info := "/usr/lib/sysimage/dpkg/info/"
	return newTree(map[string]string{
		"/var/lib/dpkg": "-> ../../usr/lib/sysimage/dpkg",
		"/lib":          "-> usr/lib", "/bin": "-> /usr/bin",
		"/usr/bin/x":                    "",
		"/usr/lib/sysimage/dpkg/status": stanza("libc6", "1", "Multi-Arch: same") + stanza("old", "1") + stanza("new", "1") + stanza("bare", "1"),
		"/usr/lib/sysimage/dpkg/diversions": "/bin/sh\n/bin/sh.distrib\nnew\n" +
			"/usr/bin/local\n/usr/bin/local.real\n:\n",
		info + "libc6:amd64.list":    "/.\n/lib\n/lib/x86_64-linux-gnu\n/lib/x86_64-linux-gnu/libc.so.6\n",
		info + "old.list":            "/.\n/bin\n/bin/sh\n/usr\n/usr/bin\n/usr/bin/local\n",
		info + "new.list":            "/.\n/bin/sh\n/usr\n/usr/lib/x86_64-linux-gnu\n",
		info + "old.md5sums":         "d41d8cd98f00b204e9800998ecf8427e  bin/sh\nD41D8CD98F00B204E9800998ECF8427E  usr/bin/with blank\n",
		info + "libc6:amd64.md5sums": "d41d8cd98f00b204e9800998ecf8427e lib\n",
	})
}

func TestOwner(t *testing.T) {
	d, err := Read(usrmerged(), none{})
	check(t, err)
	if d.Dir != "/usr/lib/sysimage/dpkg" {
		t.Errorf("Dir: got %q", d.Dir)
	}
	for path, want := range map[string][]string{
		"/lib/x86_64-linux-gnu/libc.so.6":     {"libc6:amd64"},
		"/usr/lib/x86_64-linux-gnu/libc.so.6": {"libc6:amd64"},
		"/usr/lib/x86_64-linux-gnu":           {"libc6:amd64", "new"},
		"/lib":                                {"libc6:amd64"},
		"/bin/sh":                             {"new"}, // which diverted old's
		"/usr/bin/sh":                         {"new"},
		"/usr/bin/sh.distrib":                 {"old"},
		"/bin/sh.distrib":                     {"old"},
		"/usr/bin/local":                      nil, // the administrator's
		"/usr/bin/local.real":                 {"old"},
		"/usr/bin":                            {"old"},
		"/usr/":                               {"new", "old"},
		"/":                                   {"libc6:amd64", "new", "old"},
		"":                                    {"libc6:amd64", "new", "old"},
		"/nothing":                            nil,
	} {
		got, err := d.Owner(path)
		check(t, err)
		var names []string
		for _, p := range got {
			names = append(names, p.String())
		}
		if !slices.Equal(names, want) {
			t.Errorf("Owner(%q): got %q, want %q", path, names, want)
		}
	}
	if files, err := d.Files(d.Package("bare")); err != nil || files != nil {
		t.Errorf("a package without a list: got %q, %v", files, err)
	}
	sums, err := d.MD5Sums(d.Package("old"))
	want := []Sum{{"/bin/sh", "d41d8cd98f00b204e9800998ecf8427e"}, {"/usr/bin/with blank", "d41d8cd98f00b204e9800998ecf8427e"}}
	if err != nil || !slices.Equal(sums, want) {
		t.Errorf("MD5Sums: got %v, %v; want %v", sums, err, want)
	}
}

// TestSideBySide asks from several goroutines, for the race detector.
func TestSideBySide(t *testing.T) {
	d, err := Read(usrmerged(), none{})
	check(t, err)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for range 20 {
				if owners, err := d.Owner("/usr/bin/sh"); err != nil || len(owners) != 1 {
					t.Errorf("Owner: got %v, %v", owners, err)
				}
				p := &d.Packages[i%len(d.Packages)]
				if _, err := d.Files(p); err != nil {
					t.Error(err)
				}
				if _, err := d.Changelog(p); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestListErrors(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"relative":           {"info/x.list": "usr\n"},
		"empty line":         {"info/x.list": "/usr\n\n"},
		"diversions":         {"info/x.list": "/usr\n", "diversions": "/a\n/b\n"},
		"relative diversion": {"info/x.list": "/usr\n", "diversions": "a\n/b\nx\n"},
	} {
		all := map[string]string{"/var/lib/dpkg/status": stanza("x", "1")}
		for n, text := range files {
			all["/var/lib/dpkg/"+n] = text
		}
		d, err := Read(newTree(all), none{})
		check(t, err)
		if _, err := d.Owner("/usr"); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: got %v, want ErrFormat", name, err)
		}
	}
	for _, text := range []string{"x", "d41d8cd98f00b204e9800998ecf8427e", "d41d8cd98f00b204e9800998ecf8427e  ", "zz1d8cd98f00b204e9800998ecf8427e  x", "\n"} {
		if _, err := parseSums(text); !errors.Is(err, ErrFormat) {
			t.Errorf("parseSums(%q): got %v, want ErrFormat", text, err)
		}
	}
}

// TestStatusD reads an image without dpkg.
func TestStatusD(t *testing.T) {
	d, err := Read(newTree(map[string]string{
		"/var/lib/dpkg/status.d/base":         "Package: base-files\nVersion: 13\nArchitecture: amd64\n",
		"/var/lib/dpkg/status.d/base.md5sums": "d41d8cd98f00b204e9800998ecf8427e  etc/x\n",
		"/var/lib/dpkg/status.d/tz":           "Package: tz\nVersion: 1\nArchitecture: all\n",
		"/var/lib/dpkg/status.d/tz.md5sums":   "d41d8cd98f00b204e9800998ecf8427e  usr/share/zoneinfo/UTC\n",
	}), none{})
	check(t, err)
	if len(d.Packages) != 2 || !d.Packages[0].Installed() {
		t.Fatalf("got %+v", d.Packages)
	}
	owners, err := d.Owner("/usr/share/zoneinfo/UTC")
	if err != nil || len(owners) != 1 || owners[0].Name != "tz" {
		t.Errorf("got %v, %v; want tz", owners, err)
	}
}

func TestPackage(t *testing.T) {
	arch := func(name, arch, state string) string {
		return fmt.Sprintf("Package: %s\nArchitecture: %s\nStatus: install ok %s\nVersion: 1\n\n", name, arch, state)
	}
	d, err := Read(newTree(map[string]string{"/var/lib/dpkg/status": arch("a", "amd64", "config-files") + arch("a", "i386", "installed") + arch("b", "all", "unpacked")}), none{})
	check(t, err)
	for name, want := range map[string]string{"a": "i386", "a:amd64": "amd64", "a:arm64": "", "b": "all", "c": "", "": ""} {
		got := ""
		if p := d.Package(name); p != nil {
			got = p.Arch
		}
		if got != want {
			t.Errorf("Package(%q): got %q, want %q", name, got, want)
		}
	}
}

func TestDiff(t *testing.T) {
	db := func(list ...string) *Database {
		var status strings.Builder
		for _, s := range list {
			f := strings.Fields(s)
			state := "installed"
			if len(f) == 4 {
				state = f[3]
			}
			fmt.Fprintf(&status, "Package: %s\nArchitecture: %s\nVersion: %s\nStatus: install ok %s\n\n", f[0], f[1], f[2], state)
		}
		d, err := Read(newTree(map[string]string{"/var/lib/dpkg/status": status.String()}), none{})
		check(t, err)
		return d
	}
	a := db("same all 1", "up amd64 1.9-1", "down amd64 1:1", "gone all 1", "moved all 1", "multi amd64 1", "multi i386 1", "odd all x1", "purged all 1 config-files", "zero all 1.0", "arch all 1")
	b := db("same all 1", "up amd64 1.10-1", "down amd64 2", "new all 3", "moved amd64 2", "multi amd64 2", "odd all x2", "purged all 1", "zero all 1.00", "arch amd64 1")
	want := []string{
		"changed arch:amd64 1 -> 1", "downgraded down:amd64 1:1 -> 2", "removed gone:all 1", "upgraded moved:amd64 1 -> 2", "upgraded multi:amd64 1 -> 2",
		"removed multi:i386 1", "added new:all 3", "changed odd:all x1 -> x2", "added purged:all 1", "upgraded up:amd64 1.9-1 -> 1.10-1", "changed zero:all 1.0 -> 1.00",
	}
	var got []string
	for _, c := range Diff(a, b) {
		got = append(got, c.String())
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if c := Diff(a, a); c == nil || len(c) != 0 {
		t.Errorf("with itself: got %v, want none", c)
	}
}

func gzipped(s string) string {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	z.Write([]byte(s))
	z.Close()
	return b.String()
}

func TestChangelog(t *testing.T) {
	entry := func(date string) string {
		return gzipped("x (1) unstable; urgency=low\n\n  * change\n\n -- A B <a@b>  " + date + "\n\nx (0) ...\n -- A B <a@b>  Mon, 01 Jan 2035 00:00:00 +0000\n")
	}
	doc := "/usr/share/doc/"
	d, err := Read(newTree(map[string]string{
		"/var/lib/dpkg/status":              stanza("x", "1") + stanza("native", "1") + stanza("linked", "1") + stanza("none", "1") + stanza("old", "1") + stanza("bad", "1"),
		doc + "x/changelog.Debian.gz":       entry("Sat, 05 Apr 2025 12:00:00 +0200"),
		doc + "x/changelog.Debian.amd64.gz": entry("Sun, 6 Apr 2025 12:00:00 +0200"),
		doc + "x/changelog.gz":              "the program's own",
		doc + "native/changelog.gz":         entry("Sat, 05 Apr 2025 12:00:00 -0000"),
		doc + "linked":                      "-> x",
		doc + "old/changelog.gz":            gzipped("no entry at all"),
		doc + "bad/changelog.Debian.gz":     "not compressed",
	}), none{})
	check(t, err)
	for name, want := range map[string]time.Time{
		"x": time.Date(2025, 4, 6, 10, 0, 0, 0, time.UTC), "linked": time.Date(2025, 4, 6, 10, 0, 0, 0, time.UTC),
		"native": time.Date(2025, 4, 5, 12, 0, 0, 0, time.UTC), "none": {}, "old": {},
	} {
		got, err := d.Changelog(d.Package(name))
		if err != nil || !got.Equal(want) {
			t.Errorf("%s: got %v, %v; want %v", name, got, err, want)
		}
	}
	if _, err := d.Changelog(d.Package("bad")); !errors.Is(err, ErrFormat) {
		t.Errorf("bad: got %v, want ErrFormat", err)
	}
}
