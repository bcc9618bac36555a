package etcmerge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// run runs a shell script in a directory and returns what it prints.
func run(t testing.TB, dir, script string, programs ...string) string {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s (package %s)", p, map[string]string{"setfacl": "acl", "getfacl": "acl", "setfattr": "attr", "getfattr": "attr", "setcap": "libcap2-bin"}[p])
		}
	}
	cmd := exec.Command("sh", "-euc", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

// zoo makes one of each kind.
const zoo = `umask 022
mkdir d d/sub private empty; chmod 700 private; chmod 2775 empty
echo content >d/file; head -c 100000 /dev/urandom >big; : >none
chmod 4755 d/file; chmod 0 none; chown 12:34 none big
printf '\0\001\377' >binary; echo x >"a name with blank
and newline"; echo y >"$(printf '\377\376')"
ln big hard; ln big d/sub/hard; ln -s ../outside d/link; ln -s /etc/passwd d/sub/passwd; chown -h 5:6 d/link
mkfifo -m 640 fifo; mknod -m 666 null c 1 3; mknod -m 660 disk b 259 70000
setfacl -m u:7:r--,g:8:rwx big; setfacl -d -m u:9:rwx,g::r-x d; setfacl -m u:1234:rx private
setfattr -n user.test -v value big; setfattr -n trusted.test -v 0x00ff00 d/sub; setfattr -h -n trusted.link -v x d/link
setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 d/sub/hard
touch -hd '2001-02-03 04:05:06.123456789' d/link big; touch -d '1969-12-31 23:59:58.5' d/file fifo d/sub; touch -d 2010-10-10 d empty private .
`

// listing is what other programs say of a directory: all but the access times.
func listing(t testing.TB, dir string) string {
	return run(t, dir, `find . -printf '%P %y %m %U %G %s %T@ %n %l\n' | sed 's/ d \([0-9]* [0-9]* [0-9]*\) [0-9]* / d \1 /' | sort
find . -type b -o -type c | sort | xargs -d '\n' stat -c '%n %t %T'
getfacl -R -n -p . | cat; find . -print0 | sort -z | xargs -0 getfattr -h -d -m - -e hex
find . -type f -print0 | sort -z | xargs -0 sha256sum
find . -links +1 -type f -printf '%i %P\n' | sort | awk '{ if (!($1 in n)) n[$1] = ++c; print n[$1], $2 }'`, "getfacl", "getfattr")
}

// TestWriteAsOthers carries one of each kind over, as local state, and asks find, stat,
// getfacl, getfattr and sha256sum whether it is the same.
func TestWriteAsOthers(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	current, parent := f.path(), f.path()
	check(t, os.Mkdir(current, 0o755))
	run(t, current, zoo, "setfacl", "setfattr")
	// What the new place would pass on to what is made in it.
	check(t, os.Mkdir(parent, 0o777))
	run(t, parent, "chmod 2777 .; setfacl -d -m u:77:rwx,o::rwx .", "setfacl")
	check(t, os.Chown(parent, 3, 3))

	m, err := Plan(t.Context(), Input{Current: current, Objects: f.objects})
	check(t, err)
	dst := filepath.Join(parent, "etc")
	check(t, m.Write(t.Context(), dst))
	want, got := listing(t, current), listing(t, dst)
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if !strings.Contains(want, "security.capability") || !strings.Contains(want, "user:1234") {
		t.Errorf("the listing shows no capability or ACL:\n%s", want)
	}
	if len(m.Late) != 0 || len(m.Conflicts) != 0 || len(m.Image) != 0 {
		t.Errorf("got late %q, conflicts %v, image %v; want none", m.Late, m.Conflicts, m.Image)
	}

	// The same as an image's: what was read is written again.
	image := f.read(current)
	fresh := filepath.Join(parent, "fresh")
	check(t, Fresh(t.Context(), image, f.objects, fresh))
	if got := listing(t, fresh); got != want {
		t.Errorf("Fresh: got\n%s\nwant\n%s", got, want)
	}
	// And unchanged locally: the image's.
	m, err = Plan(t.Context(), Input{image, image, current, f.objects})
	check(t, err)
	check(t, os.RemoveAll(dst))
	check(t, m.Write(t.Context(), dst))
	if got := listing(t, dst); got != want {
		t.Errorf("unchanged: got\n%s\nwant\n%s", got, want)
	}
}

// TestMetadata merges owners, modes with ACLs and xattrs, each by itself.
func TestMetadata(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	read := func(script string) *tree.Node {
		dir := f.path()
		check(t, os.Mkdir(dir, 0o755))
		run(t, dir, "echo x >f; chmod 644 f; "+script, "setfacl", "setfattr")
		return f.read(dir)
	}
	o := read("setfattr -n user.a -v 1 f; setfattr -n user.b -v 1 f; setfattr -n user.gone -v 1 f")
	n := read("setfattr -n user.a -v 2 f; setfattr -n user.b -v 1 f; setfattr -n user.new -v 1 f; chown 3:4 f; setfacl -m u:5:rw f; setfattr -n security.selinux -v image f")
	l := read("setfattr -n user.a -v 1 f; setfattr -n user.b -v 3 f; setfattr -n user.gone -v 1 f; setfattr -n security.selinux -v local f; echo y >>f")
	m, out := f.merge(o, n, l)
	if len(m.Conflicts) != 0 {
		t.Errorf("conflicts: got %v, want none", m.Conflicts)
	}
	got := out.Dir["f"]
	acl := got.Xattrs[accessACL]
	delete(got.Xattrs, accessACL)
	want := map[string]string{"user.a": "2", "user.b": "3", "user.new": "1", "security.selinux": "local"}
	if acl != n.Dir["f"].Xattrs[accessACL] || acl == "" || !maps.Equal(got.Xattrs, want) || got.UID != 3 || got.GID != 4 || got.Mode != 0o100664 || got.File.Size != 4 {
		t.Errorf("got %+v", got)
	}

	l = read("chown 7:7 f; setfacl -m u:6:rw f; setfattr -n user.a -v 9 f; setfattr -n user.gone -v 2 f")
	m, out = f.merge(o, n, l)
	got = out.Dir["f"]
	if got.UID != 7 || got.Xattrs[accessACL] != l.Dir["f"].Xattrs[accessACL] || got.Xattrs["user.a"] != "9" || got.Xattrs["user.gone"] != "2" || got.Xattrs["user.new"] != "1" {
		t.Errorf("got %+v", got)
	}
	detail := "permissions changed here and by the image (ACL, owner here 7:7, of the image 3:4, xattr user.a, xattr user.gone)"
	if len(m.Conflicts) != 1 || m.Conflicts[0].String() != "/etc/f: "+detail {
		t.Errorf("conflicts: got %v, want %s", m.Conflicts, detail)
	}

	// And what the changes are called.
	dir := f.disk(l)
	changes, err := Changes(t.Context(), o, dir)
	check(t, err)
	if want := "M /etc/f (mode 0644 to 0664+, owner 0:0 to 7:7, xattr user.a, xattr user.b, xattr user.gone)"; len(changes) != 1 || changes[0].String() != want {
		t.Errorf("Changes: got %v, want %s", changes, want)
	}
}

func TestChanges(t *testing.T) {
	f := newFixture(t)
	o := spec{"/same": "1", "/gone": "1", "/d/a": long("1"), "/d/b": "mode=600 1", "/type": "1", "/link": "-> a", "/dir/x/y": "1", "/swap/x": "1"}
	l := spec{"/same": "1", "/new/a": "1", "/d/a": long("2"), "/d/b": "2", "/type": "-> 1", "/link": "-> b", "/dir": "dir=700", "/swap": "1", "/.updated": "1"}
	dir := f.disk(l.tree(t, f.objects))
	// A time alone is no change, and an image that has everything inline neither.
	check(t, os.Chtimes(filepath.Join(dir, "same"), testTime, testTime))
	image := o.tree(t, f.objects)
	image.Dir["d"].Dir["a"].File = &tree.File{Size: int64(len(long("1"))), Inline: []byte(long("1"))}
	changes, err := Changes(t.Context(), image, dir)
	check(t, err)
	var got []string
	for _, c := range changes {
		got = append(got, c.String())
	}
	want := []string{"M /etc/d/a (content)", "M /etc/d/b (content, mode 0600 to 0644)", "M /etc/dir (mode 0755 to 0700)", "D /etc/dir/x", "D /etc/dir/x/y", "D /etc/gone",
		"M /etc/link (content)", "A /etc/new", "A /etc/new/a", "M /etc/swap (type, mode 0755 to 0644)", "D /etc/swap/x", "M /etc/type (type)"}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if _, err := Changes(t.Context(), &tree.Node{Stat: tree.Stat{Mode: tree.TypeRegular}, File: &tree.File{}}, dir); !errors.Is(err, ErrNotDir) {
		t.Errorf("a file as /etc: got %v, want ErrNotDir", err)
	}
}

func TestJSON(t *testing.T) {
	f := newFixture(t)
	m, _ := f.merge(spec{"/a": "1", "/b": "1"}.tree(t, f.objects), spec{"/a": "2", "/b": "2"}.tree(t, f.objects), spec{"/a": "3", "/b": "1"}.tree(t, f.objects))
	got, err := json.Marshal(m)
	check(t, err)
	want := `{"conflicts":[{"path":"/etc/a","reason":"both","kept":"/etc/a.dpkg-dist"}],` +
		`"local":[{"path":"/etc/a","kind":"modified","what":"content"}],` +
		`"image":[{"path":"/etc/a.dpkg-dist","kind":"added"},{"path":"/etc/b","kind":"modified","what":"content"}]}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	m, _ = f.merge(spec{}.tree(t, f.objects), nil, spec{}.tree(t, f.objects))
	if got, err := json.Marshal(m); err != nil || string(got) != `{"conflicts":[],"local":[],"image":[]}` {
		t.Errorf("nothing: got %s, %v", got, err)
	}
}

func TestSummary(t *testing.T) {
	f := newFixture(t)
	m, _ := f.merge(spec{"/a": "1", "/b": "1"}.tree(t, f.objects), spec{"/a": "2", "/b": "2"}.tree(t, f.objects), spec{"/a": "3", "/b": "1"}.tree(t, f.objects))
	if got, want := m.Summary(), "2 changes by the image, 1 local kept, 1 conflict"; got != want {
		t.Errorf("Summary: got %q, want %q", got, want)
	}
}

func TestWriteErrors(t *testing.T) {
	f := newFixture(t)
	n := spec{"/a": long("1"), "/b": "1", "/d/c": long("2")}.tree(t, f.objects)
	current := f.disk(spec{"/x": "1"}.tree(t, f.objects))
	plan := func() *Merge {
		m, err := Plan(t.Context(), Input{nil, n, current, f.objects})
		check(t, err)
		return m
	}
	gone := func(what, dst string) {
		t.Helper()
		if _, err := os.Lstat(dst); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %q is there: %v", what, dst, err)
		}
	}

	dst := f.path()
	check(t, os.Mkdir(dst, 0o755))
	check(t, os.WriteFile(filepath.Join(dst, "mine"), nil, 0o600))
	if err := plan().Write(t.Context(), dst); !errors.Is(err, ErrExists) {
		t.Errorf("got %v, want ErrExists", err)
	}
	if err := Fresh(t.Context(), n, f.objects, dst); !errors.Is(err, ErrExists) {
		t.Errorf("Fresh: got %v, want ErrExists", err)
	}
	check(t, os.Remove(filepath.Join(dst, "mine"))) // it is untouched
	link := f.path()
	check(t, os.Symlink(f.path(), link))
	if err := plan().Write(t.Context(), link); !errors.Is(err, ErrExists) {
		t.Errorf("a dangling link: got %v, want ErrExists", err)
	}

	dst = f.path()
	ctx, cancel := context.WithCancel(t.Context())
	m := plan()
	cancel()
	if err := m.Write(ctx, dst); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want Canceled", err)
	}
	gone("canceled", dst)
	if err := Fresh(ctx, n, f.objects, dst); !errors.Is(err, context.Canceled) {
		t.Errorf("Fresh: got %v, want Canceled", err)
	}
	gone("canceled", dst)

	object := filepath.Join(f.objects.dir, n.Dir["d"].Dir["c"].File.Object.String())
	check(t, os.WriteFile(object, []byte(long("x")), 0o600))
	if err := plan().Write(t.Context(), dst); !errors.Is(err, ErrContent) || !strings.Contains(err.Error(), `"d/c"`) {
		t.Errorf("a damaged object: got %v, want ErrContent with the path", err)
	}
	gone("damaged", dst)
	check(t, os.Remove(object))
	if err := plan().Write(t.Context(), dst); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), `"d/c"`) {
		t.Errorf("a missing object: got %v, want ErrNotExist with the path", err)
	}
	gone("missing", dst)
	if _, err := Plan(t.Context(), Input{nil, n, f.path(), f.objects}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no current directory: got %v, want ErrNotExist", err)
	}
}

// TestLinks has hard links that one side makes or breaks.
func TestLinks(t *testing.T) {
	f := newFixture(t)
	for _, tt := range []struct {
		name    string
		o, n, l spec
		want    [][]string // names of one file each
	}{
		{"linked here to a file of the image", spec{"/a": "1"}, spec{"/a": "1"}, spec{"/a": "1", "/b": "= /a"}, [][]string{{"a", "b"}}},
		{"linked here, changed by the image", spec{"/a": "1"}, spec{"/a": "2"}, spec{"/a": "1", "/b": "= /a"}, [][]string{{"a"}, {"b"}}},
		{"linked by the image", spec{"/a": "1", "/b": "1"}, spec{"/a": "1", "/b": "= /a"}, spec{"/a": "1", "/b": "1"}, [][]string{{"a", "b"}}},
		{"broken by the image", spec{"/a": "1", "/b": "= /a"}, spec{"/a": "1", "/b": "2"}, spec{"/a": "1", "/b": "= /a"}, [][]string{{"a"}, {"b"}}},
		{"changed here", spec{"/a": "1", "/b": "= /a", "/d/c": "= /a"}, spec{"/a": "1", "/b": "= /a", "/d/c": "= /a"}, spec{"/a": "2", "/b": "= /a", "/d/c": "= /a"}, [][]string{{"a", "b", "d/c"}}},
		{"one of three changed here", spec{"/a": "1", "/b": "= /a", "/d/c": "= /a"}, spec{"/a": "2", "/b": "= /a", "/d/c": "= /a"}, spec{"/a": "1", "/b": "3", "/d/c": "= /a"},
			[][]string{{"a", "d/c"}, {"b"}, {"b.dpkg-dist"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f.TB = t
			_, out := f.merge(tt.o.tree(t, f.objects), tt.n.tree(t, f.objects), tt.l.tree(t, f.objects))
			seen := map[*tree.Node]int{}
			var got [][]string
			walk(out, func(p string, n *tree.Node) {
				if n.IsDir() {
					return
				}
				i, ok := seen[n]
				if !ok {
					i = len(got)
					seen[n], got = i, append(got, nil)
				}
				got[i] = append(got[i], p[1:])
			})
			if fmt.Sprint(got) != fmt.Sprint(tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestFreshOfNothing(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	dst := f.path()
	check(t, Fresh(t.Context(), nil, f.objects, dst))
	if got := f.read(dst); len(got.Dir) != 0 || got.Mode != tree.DefaultDirMode {
		t.Errorf("got %+v", got)
	}
}

// TestBeneath opens what is no file where one was.
func TestBeneath(t *testing.T) {
	f := newFixture(t)
	dir := f.disk(spec{"/d/e/file": "1", "/fifo": "fifo", "/empty": "dir"}.tree(t, f.objects))
	for name, target := range map[string]string{"link": "d/e/file", "out": "/etc/passwd", "dir": "d", "up": "..", "d/self": "."} {
		check(t, os.Symlink(target, filepath.Join(dir, name)))
	}
	b, err := openBeneath(dir)
	check(t, err)
	defer b.close()
	for range 2 { // the parent is remembered
		r, err := b.open("/d/e/file")
		check(t, err)
		r.Close()
	}
	for _, p := range []string{"/link", "/out", "/dir/e/file", "/up/x", "/d/self/e/file", "/fifo", "/empty", "/none", "/none/x", "/d/e/file/x"} {
		r, err := b.open(p)
		if !errors.Is(err, ErrChanged) {
			t.Errorf("open %s: got %v, want ErrChanged", p, err)
		}
		if err == nil {
			r.Close()
		}
	}
}

// TestSocket has a socket in use, which is in no merge.
func TestSocket(t *testing.T) {
	f := newFixture(t)
	o := spec{"/a": "1"}.tree(t, f.objects)
	current := f.disk(o)
	l, err := net.Listen("unix", filepath.Join(current, "s"))
	if err != nil {
		t.Skipf("no socket here: %v", err) // the path may be too long
	}
	defer l.Close()
	m, err := Plan(t.Context(), Input{o, o, current, f.objects})
	check(t, err)
	dst := f.path()
	check(t, m.Write(t.Context(), dst))
	if _, err := os.Lstat(filepath.Join(dst, "s")); !errors.Is(err, fs.ErrNotExist) || len(m.Late)+len(m.Local)+len(m.Conflicts) != 0 {
		t.Errorf("got %v, %+v", err, m)
	}
}

// TestOtherAlgorithm merges images of stores that name objects differently.
func TestOtherAlgorithm(t *testing.T) {
	f := newFixture(t)
	o, n := spec{"/a": long("1"), "/b": long("1")}.tree(t, f.objects), spec{"/a": long("2"), "/b": long("1")}.tree(t, f.objects)
	for _, node := range n.Dir {
		r, err := open(f.objects, node.File)
		check(t, err)
		d, _, err := fsverity.Read(fsverity.SHA512, r)
		check(t, err)
		check(t, os.Link(filepath.Join(f.objects.dir, node.File.Object.String()), filepath.Join(f.objects.dir, d.String())))
		node.File = &tree.File{Size: node.File.Size, Object: d}
	}
	m, out := f.merge(o, n, o)
	if got, want := f.text(t, out), (spec{"/a": long("2"), "/b": long("1")}); !maps.Equal(got, want) || len(m.Local)+len(m.Conflicts) != 0 || len(m.Image) != 1 {
		t.Errorf("got %q, %+v", got, m)
	}
}

// killer is a store whose reader dies at its nth file.
type killer struct {
	objects
	n int
}

func (k *killer) OpenObject(d fsverity.Digest) (*os.File, error) {
	if k.n--; k.n < 0 {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	return k.objects.OpenObject(d)
}

// TestKilled kills a merge at each of its files. What the caller renames is whole, and
// the next run succeeds once it has removed what was left.
func TestKilled(t *testing.T) {
	const files = 6
	if env := os.Getenv("ETCMERGE_KILL"); env != "" {
		var at int
		var dir string
		fmt.Sscan(env, &at, &dir)
		k := &killer{objects{filepath.Join(dir, "objects")}, at}
		n := killTree(t, k.objects)
		m, err := Plan(t.Context(), Input{nil, n, filepath.Join(dir, "current"), k})
		check(t, err)
		check(t, m.Write(t.Context(), filepath.Join(dir, "etc.tmp")))
		check(t, os.Rename(filepath.Join(dir, "etc.tmp"), filepath.Join(dir, "etc")))
		return
	}
	f := newFixture(t)
	check(t, os.Rename(f.disk(spec{"/mine": long("mine")}.tree(t, f.objects)), filepath.Join(f.base, "current")))
	want := f.text(t, killTree(t, f.objects))
	want["/mine"] = long("mine")
	for at := range files + 1 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$")
		cmd.Env = append(os.Environ(), fmt.Sprintf("ETCMERGE_KILL=%d %s", at, f.base))
		out, err := cmd.CombinedOutput()
		if _, serr := os.Stat(filepath.Join(f.base, "etc")); at < files && !errors.Is(serr, fs.ErrNotExist) {
			t.Fatalf("killed at file %d: etc is there: %v (%v)\n%s", at, serr, err, out)
		}
		if at < files {
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("at file %d: got %v, want a kill\n%s", at, err, out)
			}
			check(t, os.RemoveAll(filepath.Join(f.base, "etc.tmp")))
			continue
		}
		check(t, err)
		if got := f.text(t, f.read(filepath.Join(f.base, "etc"))); !maps.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func killTree(t testing.TB, o objects) *tree.Node {
	s := spec{}
	for i := range 6 {
		s[fmt.Sprintf("/d%d/f", i%3)+fmt.Sprint(i)] = long(fmt.Sprint("file ", i))
	}
	return s.tree(t, o)
}

// TestDeep has a directory whose path is longer than PATH_MAX.
func TestDeep(t *testing.T) {
	f := newFixture(t)
	current := f.disk(spec{"/a": "1"}.tree(t, f.objects))
	name := strings.Repeat("d", 200)
	fd, err := unix.Open(current, unix.O_DIRECTORY|unix.O_RDONLY, 0)
	check(t, err)
	for range 60 {
		check(t, unix.Mkdirat(fd, name, 0o755))
		next, err := unix.Openat(fd, name, unix.O_DIRECTORY|unix.O_RDONLY, 0)
		check(t, err)
		unix.Close(fd)
		fd = next
	}
	file, err := unix.Openat(fd, "deep", unix.O_CREAT|unix.O_WRONLY, 0o600)
	check(t, err)
	_, err = unix.Write(file, []byte("deep content"))
	check(t, err)
	unix.Close(file)
	unix.Close(fd)

	m, err := Plan(t.Context(), Input{nil, nil, current, f.objects})
	check(t, err)
	dst := f.path()
	check(t, m.Write(t.Context(), dst))
	changes, err := Changes(t.Context(), m.snapshot, dst)
	check(t, err)
	if len(changes) != 0 || len(m.Local) < 62 {
		t.Errorf("got %d local, differences %v", len(m.Local), changes)
	}
}
