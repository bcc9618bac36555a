package dpkg

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/scan"
	"github.com/particle-os/particle/converter/tree"
)

// recorder remembers which file an object was made of.
type recorder struct {
	scan.Objects
	mu    sync.Mutex
	files map[fsverity.Digest]string
}

func (r *recorder) PutFile(ctx context.Context, f *os.File, size int64) (fsverity.Digest, error) {
	d, err := r.Objects.PutFile(ctx, f, size)
	name, lerr := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	r.mu.Lock()
	defer r.mu.Unlock()
	r.files[d] = name
	return d, errors.Join(err, lerr)
}

func (r *recorder) OpenObject(d fsverity.Digest) (*os.File, error) { return os.Open(r.files[d]) }

// hostTree is what concerns dpkg of the file system at root: the links and directories at
// the top, its database and more directories.
func hostTree(t testing.TB, root string, more ...string) (*tree.Tree, *recorder) {
	t.Helper()
	if _, err := exec.LookPath("dpkg-query"); err != nil {
		t.Skip("needs dpkg-query (package dpkg)")
	}
	if _, err := os.Stat(filepath.Join(root, "var/lib/dpkg/status")); err != nil {
		t.Skipf("%q has no dpkg database", root)
	}
	r := &recorder{Objects: scan.Hash(fsverity.SHA256), files: map[fsverity.Digest]string{}}
	tr := tree.New()
	entries, err := os.ReadDir(root)
	check(t, err)
	for _, e := range entries {
		n := tree.NewImplied()
		if e.Type()&fs.ModeSymlink != 0 {
			target, err := os.Readlink(filepath.Join(root, e.Name()))
			check(t, err)
			n = &tree.Node{Stat: tree.Stat{Mode: tree.TypeSymlink | 0o777}, Target: target}
		} else if !e.IsDir() {
			continue
		}
		tr.Root.Dir[e.Name()] = n
	}
	for _, dir := range append(more, "var/lib/dpkg") {
		if _, err := os.Stat(filepath.Join(root, dir)); err != nil {
			continue
		}
		sub, err := scan.Dir(context.Background(), filepath.Join(root, dir), r, scan.Options{SkipDevices: true, Live: true})
		check(t, err)
		at := tr.Root
		for e := range strings.SplitSeq(filepath.Dir(dir), "/") {
			if at.Dir[e] == nil {
				at.Dir[e] = tree.NewImplied()
			}
			at = at.Dir[e]
		}
		at.Dir[filepath.Base(dir)] = sub.Root
	}
	return tr, r
}

// hostRoot is where a file system with a real dpkg database is: this machine's, or that
// of PARTICLE_TEST_ROOTFS.
func hostRoot() string {
	if root := os.Getenv("PARTICLE_TEST_ROOTFS"); root != "" {
		return root
	}
	return "/"
}

func query(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command("dpkg-query", append([]string{"--admindir=" + filepath.Join(hostRoot(), "var/lib/dpkg")}, args...)...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("dpkg-query %q: %v\n%s", args, err, exit.Stderr)
		}
		t.Fatal(err)
	}
	return string(out)
}

// TestDpkgQuery compares with what dpkg-query says of a real database.
func TestDpkgQuery(t *testing.T) {
	tr, objects := hostTree(t, hostRoot())
	d, err := Read(tr, objects)
	check(t, err)
	if len(d.Packages) < 20 {
		t.Fatalf("got %d packages only", len(d.Packages))
	}

	format := `${Package}|${Architecture}|${Version}|${Status}|${source:Package}|${source:Version}|${Section}|${Priority}|` +
		`${Maintainer}|${Homepage}|${Installed-Size}|${Essential}|${binary:Synopsis}|${Depends}|${Conffiles}\n===\n`
	var got []string
	for i := range d.Packages {
		p := &d.Packages[i]
		if p.State == "not-installed" {
			continue // which dpkg-query leaves out
		}
		size := ""
		if p.InstalledSize != 0 {
			size = fmt.Sprint(p.InstalledSize)
		}
		essential := "no"
		if p.Essential {
			essential = "yes"
		}
		files := ""
		for _, c := range p.Conffiles {
			files += "\n " + c.Path + " " + c.MD5
			if c.Obsolete {
				files += " obsolete"
			}
			if c.RemoveOnUpgrade {
				files += " remove-on-upgrade"
			}
		}
		got = append(got, strings.Join([]string{p.Name, p.Arch, p.Version, p.Want + " " + p.Flag + " " + p.State, p.Source, p.SourceVersion,
			p.Section, p.Priority, p.Maintainer, p.Homepage, size, essential, p.Synopsis, p.Fields.Field("depends"), strings.TrimPrefix(files, "\n")}, "|"))
	}
	want := strings.Split(strings.TrimSuffix(query(t, "-W", "-f", format), "\n===\n"), "\n===\n")
	slices.Sort(got)
	slices.Sort(want)
	if len(got) != len(want) {
		t.Errorf("got %d packages, dpkg-query has %d", len(got), len(want))
	}
	for i := range min(len(got), len(want)) {
		// Installed-Size 0 is a size as well as none.
		if g, w := got[i], strings.Replace(want[i], "|0|", "||", 1); g != w {
			t.Fatalf("got  %q\nwant %q", g, w)
		}
	}
}

// TestDpkgQueryFiles compares each package's list with dpkg-query's, and finds the owner
// of each of its files.
func TestDpkgQueryFiles(t *testing.T) {
	tr, objects := hostTree(t, hostRoot())
	d, err := Read(tr, objects)
	check(t, err)
	var names []string
	for i := range d.Packages {
		if d.Packages[i].Installed() {
			names = append(names, d.Packages[i].String())
		}
	}
	diverted, err := d.diversions()
	check(t, err)

	lists := strings.Split(query(t, append([]string{"-L"}, names...)...), "\n\n")
	if len(lists) != len(names) {
		t.Fatalf("got %d lists of %d packages", len(lists), len(names))
	}
	files, moved, aliased := 0, 0, 0
	for i, name := range names {
		p := d.Package(name)
		got, err := d.Files(p)
		check(t, err)
		var want []string
		for line := range strings.Lines(lists[i]) {
			line = strings.TrimSuffix(line, "\n")
			// "diverted by X to: Y" and the like, and "package X does not contain any files"
			if !strings.HasPrefix(line, "/") {
				continue
			}
			if line == "/." {
				line = "/"
			}
			want = append(want, line)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %d paths, dpkg-query has %d", name, len(got), len(want))
		}
		for _, f := range got {
			files++
			if v, ok := diverted[f]; ok && v.by != p.Name {
				moved++
				if owners, err := d.Owner(f); err != nil || slices.Contains(owners, p) {
					t.Errorf("%s is diverted by %s, got %v, %v", f, v.by, owners, err)
				}
				f = v.to
			}
			for _, alias := range []string{f, d.paths.canonical(f)} {
				if owners, err := d.Owner(alias); err != nil || !slices.Contains(owners, p) {
					t.Fatalf("owners of %s: got %v, %v; want %s among them", alias, owners, err, name)
				}
			}
			if d.paths.canonical(f) != f {
				aliased++
			}
		}
		if _, err := d.MD5Sums(p); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	t.Logf("%d packages, %d paths, %d diverted, %d by another name", len(names), files, moved, aliased)
	if owners, err := d.Owner("/no/such/file"); err != nil || owners != nil {
		t.Errorf("a path of no package: got %v, %v", owners, err)
	}
}

// TestHostChangelogs reads all changelogs that there are.
func TestHostChangelogs(t *testing.T) {
	tr, objects := hostTree(t, hostRoot(), "usr/share/doc")
	d, err := Read(tr, objects)
	check(t, err)
	dated := 0
	for i := range d.Packages {
		date, err := d.Changelog(&d.Packages[i])
		if err != nil {
			t.Errorf("%s: %v", d.Packages[i].Name, err)
		}
		if !date.IsZero() {
			dated++
			if date.Year() < 1996 || date.After(time.Now().AddDate(5, 0, 0)) {
				t.Errorf("%s: got %v", d.Packages[i].Name, date)
			}
		}
	}
	t.Logf("%d of %d packages have a date", dated, len(d.Packages))
	if dated == 0 {
		t.Skip("no package has a changelog here")
	}
}

// TestCompareVersions asks dpkg about all pairs of versions.
func TestCompareVersions(t *testing.T) {
	if _, err := exec.LookPath("dpkg"); err != nil {
		t.Skip("needs dpkg")
	}
	versions := []string{"0", "1", "1.0", "1.0-1", "1.0-1~bpo12+1", "1.0~rc1", "1.0~~", "1.0~", "1.0+b1", "1.0-1+b1", "1:0.9", "2:0", "0:1.0",
		"1.00", "01.0", "1.a", "1.A", "1.+", "1.-1", "1.0.0", "1.0-0", "1.0-", "10", "9", "1.10", "1.9", "1.0a", "1.0a1", "1.0a~", "1.2.3-4ubuntu5.6",
		"20260825221802", "1-1-1", "1.2-3.4", "123456789012345678", "1.0+dfsg-1", "1.0+dfsg~1-1"}
	for _, a := range versions {
		for _, b := range versions {
			if strings.HasSuffix(a, "-") || strings.HasSuffix(b, "-") {
				continue // which dpkg refuses
			}
			got, ok := CompareVersions(a, b)
			if !ok {
				t.Fatalf("CompareVersions(%q, %q): not ok", a, b)
			}
			op := map[int]string{-1: "lt", 0: "eq", 1: "gt"}[got]
			if err := exec.Command("dpkg", "--compare-versions", a, op, b).Run(); err != nil {
				t.Errorf("%q %s %q: dpkg says no (%v)", a, op, b, err)
			}
		}
	}
	for _, v := range []string{"", "x", "1.0 2", "1:", "1:2:x y", "99999999999999999999", "-1"} {
		if _, ok := CompareVersions(v, "1"); ok {
			t.Errorf("CompareVersions(%q): got ok", v)
		}
	}
}

func BenchmarkRead(b *testing.B) {
	tr, objects := hostTree(b, hostRoot())
	for b.Loop() {
		if _, err := Read(tr, objects); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOwner(b *testing.B) {
	tr, objects := hostTree(b, hostRoot())
	for b.Loop() {
		d, err := Read(tr, objects)
		check(b, err)
		if _, err := d.Owner("/bin/sh"); err != nil {
			b.Fatal(err)
		}
	}
}
