package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/scan"
)

const conformanceDir = "../../converter/erofs/testdata/conformance"

// A toolResult is what a run of one of composefs' programs left.
type toolResult struct {
	status         int
	stdout, stderr string
}

func runTool(main toolMain, stdin string, args ...string) toolResult {
	var stdout, stderr bytes.Buffer
	status := main(context.Background(), args, strings.NewReader(stdin), &stdout, &stderr)
	return toolResult{status, stdout.String(), stderr.String()}
}

func mustRun(t *testing.T, main toolMain, stdin string, args ...string) string {
	t.Helper()
	r := runTool(main, stdin, args...)
	if r.status != 0 {
		t.Fatalf("%q: status %d: %s", args, r.status, r.stderr)
	}
	return r.stdout
}

func readFile(t *testing.T, elem ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(elem...))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func writeFile(t *testing.T, content string, elem ...string) string {
	t.Helper()
	name := filepath.Join(elem...)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// The digests are of the images of libcomposefs; TestConformance of package erofs has
// their SHA-256.
func TestMkcomposefsFromFile(t *testing.T) {
	dump := filepath.Join(conformanceDir, "special.dump")
	text := readFile(t, dump)
	dir := t.TempDir()
	image := filepath.Join(dir, "image")

	digest := mustRun(t, mkcomposefsMain, "", "--from-file", "--print-digest", dump, image)
	want := fsverity.Sum(fsverity.SHA256, []byte(readFile(t, image))).String() + "\n"
	if digest != want {
		t.Errorf("digest of the image: got %q, want %q", digest, want)
	}
	if got := mustRun(t, mkcomposefsMain, text, "--print-digest-only", "--from-file", "-"); got != digest {
		t.Errorf("only the digest: got %q, want %q", got, digest)
	}
	if got := mustRun(t, mkcomposefsMain, text, "--from-file", "-", "-"); got != readFile(t, image) {
		t.Error("the image on standard output differs")
	}
	if got := mustRun(t, mkcomposefsMain, text, "--print-digest", "--from-file", "-", "-"); got != readFile(t, image)+digest {
		t.Error("image and digest on standard output differ")
	}
	// Options may be cut short and stand anywhere.
	if got := mustRun(t, mkcomposefsMain, "", dump, "--from", "--print-digest-o"); got != digest {
		t.Errorf("other order: got %q, want %q", got, digest)
	}
}

func TestMkcomposefsVersions(t *testing.T) {
	const plain = "/ 0 40755 2 0 0 0 0.0 - - -\n"
	const whiteout = plain + "/w 0 20644 1 0 0 0 0.0 - - -\n"
	for _, c := range []struct {
		text string
		args []string
		want byte
	}{
		{plain, nil, 0},
		{whiteout, nil, 1},
		{plain, []string{"--min-version=1"}, 1},
		{plain, []string{"--max-version", "1"}, 0},
		{whiteout, []string{"--max-version", "1"}, 1},
		{whiteout, []string{"--min-version=0"}, 0},
		{whiteout, []string{"--min-version=0", "--max-version=0"}, 0},
		{plain, []string{"--min-version=1", "--max-version=0"}, 1},
	} {
		image := mustRun(t, mkcomposefsMain, c.text, append(c.args, "--from-file", "-", "-")...)
		if image[12] != c.want { // composefs_version
			t.Errorf("%q: got version %d, want %d", c.args, image[12], c.want)
		}
	}
}

func TestMkcomposefsFailures(t *testing.T) {
	dir := t.TempDir()
	old := writeFile(t, "old image", dir, "old")
	bad := writeFile(t, "/ 0 40755 2 0 0 0 0.0 - - -\n/a x\n", dir, "bad")
	for _, c := range []struct {
		args  []string
		want  string
		usage bool
	}{
		{nil, "no SOURCE given", true},
		{[]string{"src"}, "no IMAGE given", true},
		{[]string{"src", "img", "x"}, "too many arguments", true},
		{[]string{"--print-digest-only", "src", "img"}, "writes no IMAGE", true},
		{[]string{"--unknown", "src", "img"}, `unknown option "--unknown"`, true},
		{[]string{"-x", "src", "img"}, `unknown option "-x"`, true},
		{[]string{"--skip", "src", "img"}, `option "--skip" is ambiguous`, true},
		{[]string{"--from-file=yes", "src", "img"}, "option --from-file takes no value", true},
		{[]string{"--threads"}, "option --threads needs a value", true},
		{[]string{"--threads=0", "src", "img"}, `--threads "0" is not a positive number`, true},
		{[]string{"--min-version=x", "src", "img"}, `--min-version "x" is not a number`, true},
		{[]string{"--min-version=2", "src", "img"}, "want 0 or 1", false},
		{[]string{"", "img"}, "SOURCE is empty", false},
		{[]string{filepath.Join(dir, "nothing"), old}, "no such file or directory", false},
		{[]string{"--from-file", filepath.Join(dir, "nothing"), old}, "no such file or directory", false},
		{[]string{"--from-file", bad, old}, `line 2: mode is missing`, false},
		{[]string{"--user-xattrs", "--skip-xattrs", dir, old}, "exclude each other", false},
		{[]string{"--from-file", filepath.Join(conformanceDir, "special.dump"), filepath.Join(dir, "no", "image")}, "no such file or directory", false},
	} {
		r := runTool(mkcomposefsMain, "", c.args...)
		if r.status != 1 || !strings.Contains(r.stderr, c.want) || strings.Contains(r.stderr, "usage:") != c.usage || r.stdout != "" {
			t.Errorf("%q: got status %d, %q, want 1 and %q", c.args, r.status, r.stderr, c.want)
		}
		if !strings.HasPrefix(r.stderr, "mkcomposefs: ") {
			t.Errorf("%q: message %q does not name the program", c.args, r.stderr)
		}
	}
	if got := readFile(t, old); got != "old image" {
		t.Errorf("a failure changed the old image to %q", got)
	}
	t.Setenv("CFS_PARSE_STRICT", "")
	if r := runTool(mkcomposefsMain, strings.TrimSuffix("/ 0 40755 2 0 0 0 0.0 - - -\n", "\n"), "--from-file", "-", "-"); r.status != 1 || !strings.Contains(r.stderr, "does not end in a newline") {
		t.Errorf("strict: got status %d, %q", r.status, r.stderr)
	}
}

// TestDigestStore checks what mkcomposefs puts into a store, and that it keeps what
// is there.
func TestDigestStore(t *testing.T) {
	src, store := t.TempDir(), filepath.Join(t.TempDir(), "deep", "store")
	large, other := strings.Repeat("large", 1000), strings.Repeat("o", 65)
	writeFile(t, strings.Repeat("s", 64), src, "small")
	writeFile(t, large, src, "a")
	writeFile(t, large, src, "b")
	writeFile(t, other, src, "c")
	writeFile(t, "", src, "empty")
	image := filepath.Join(t.TempDir(), "image")
	mustRun(t, mkcomposefsMain, "", "--digest-store="+store, src, image)

	want := []string{}
	for _, content := range []string{large, other} {
		path := fsverity.Sum(fsverity.SHA256, []byte(content)).Path()
		want = append(want, path)
		if got := readFile(t, store, path); got != content {
			t.Errorf("object %s has %d bytes, want %d", path, len(got), len(content))
		}
		if fi, err := os.Stat(filepath.Join(store, path)); err != nil || fi.Mode().Perm() != 0o644 {
			t.Errorf("object %s: got %v, %v, want mode 0644", path, fi.Mode(), err)
		}
	}
	if got := filesBelow(t, store); !slices.Equal(got, sorted(want)) {
		t.Errorf("store: got %q, want %q", got, want)
	}
	if got := mustRun(t, composefsInfoMain, "", "objects", image); got != strings.Join(sorted(want), "\n")+"\n" {
		t.Errorf("the image's objects: got %q, want %q", got, want)
	}

	// An object is kept as it is, even if it is not what its name says.
	kept := filepath.Join(store, want[1])
	writeFile(t, "kept", kept)
	mustRun(t, mkcomposefsMain, "", "--digest-store", store, src, image)
	if got := readFile(t, kept); got != "kept" {
		t.Errorf("the object was replaced by %d bytes", len(got))
	}
	if got := filesBelow(t, store); len(got) != 2 {
		t.Errorf("temporary files are left: %q", got)
	}
}

func sorted(s []string) []string { return slices.Sorted(slices.Values(s)) }

func filesBelow(t *testing.T, dir string) (files []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			rel, _ := filepath.Rel(dir, path)
			files = append(files, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return sorted(files)
}

// TestDigestStoreChanged gives the store a file that changes after it was hashed.
func TestDigestStoreChanged(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Open(writeFile(t, "new content", dir, "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	store := newDigestStore(dir)
	digest := fsverity.Sum(fsverity.SHA256, []byte("old content"))
	object := filepath.Join(dir, digest.Path())
	if err := store.store(f, object, digest); !errors.Is(err, scan.ErrChanged) {
		t.Errorf("got %v, want %v", err, scan.ErrChanged)
	}
	if err := store.close(nil); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(object); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the object is there: %v", err)
	}
	if got := filesBelow(t, dir); !slices.Equal(got, []string{"f"}) {
		t.Errorf("left behind: %q", got)
	}
}

// TestDigestStoreFailure checks that a failed scan leaves no temporary file.
func TestDigestStoreFailure(t *testing.T) {
	src, dir := t.TempDir(), t.TempDir()
	writeFile(t, strings.Repeat("a", 100), src, "a")
	store := newDigestStore(dir)
	f, err := os.Open(filepath.Join(src, "a"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := store.PutFile(context.Background(), f, 100); err != nil {
		t.Fatal(err)
	}
	if got := filesBelow(t, dir); len(got) != 1 || !strings.HasPrefix(got[0], ".tmp") {
		t.Errorf("before the end: got %q, want one temporary file", got)
	}
	want := errors.New("scan failed")
	if err := store.close(want); !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
	if got := filesBelow(t, dir); len(got) > 0 {
		t.Errorf("left behind: %q", got)
	}
}

// TestDigestStoreMany stores more objects than are made durable at a time.
func TestDigestStoreMany(t *testing.T) {
	src, dir := t.TempDir(), t.TempDir()
	const count = maxPending + 10
	for i := range count {
		writeFile(t, fmt.Sprint(strings.Repeat("x", 100), i), src, fmt.Sprint(i))
	}
	mustRun(t, mkcomposefsMain, "", "--digest-store="+dir, "--print-digest-only", src)
	objects := filesBelow(t, dir)
	if len(objects) != count {
		t.Errorf("got %d objects, want %d", len(objects), count)
	}
	for _, o := range objects {
		if got := fsverity.Sum(fsverity.SHA256, []byte(readFile(t, dir, o))).Path(); got != o {
			t.Errorf("object %s has the digest %s", o, got)
		}
	}
}

// chrootTool runs a program of the Debian system that PARTICLE_ORACLE names, with
// /proc in a mount namespace of its own: without it mkcomposefs cannot read xattrs.
func chrootTool(t *testing.T, stdin string, args ...string) toolResult {
	t.Helper()
	script := `mount -t proc proc "$1/proc" && exec chroot "$@"`
	cmd := exec.Command("unshare", append([]string{"-m", "sh", "-c", script, "sh", oracleDir(t)}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return toolResult{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

func oracleDir(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("PARTICLE_ORACLE")
	switch {
	case dir == "":
		t.Skip("PARTICLE_ORACLE names no directory with a Debian sid that has the package composefs")
	case os.Geteuid() != 0:
		t.Skip("chroot needs root")
	}
	if _, err := exec.LookPath("unshare"); err != nil {
		t.Skip("no unshare here (Debian package util-linux)")
	}
	return filepath.Clean(dir)
}

// oracleTemp returns a directory with its names outside and inside of the oracle.
func oracleTemp(t *testing.T) (outside, inside string) {
	t.Helper()
	dir := oracleDir(t)
	tmp, err := os.MkdirTemp(filepath.Join(dir, "tmp"), "particle")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tmp) })
	return tmp, strings.TrimPrefix(tmp, dir)
}

// makeCorners makes a directory with all that mkcomposefs treats in some special way.
func makeCorners(t *testing.T, dir string) {
	t.Helper()
	for _, size := range []int{0, 1, 63, 64, 65, 4096, 5001, 100_000} {
		writeFile(t, strings.Repeat("x", size), dir, fmt.Sprintf("size%d", size))
	}
	writeFile(t, "nested", dir, "d", "e", "f")
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.Link(filepath.Join(dir, "size4096"), filepath.Join(dir, "hard")))
	check(os.Symlink("target", filepath.Join(dir, "link")))
	check(unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	check(unix.Mknod(filepath.Join(dir, "disk"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 300))))
	check(unix.Mknod(filepath.Join(dir, "d", "whiteout"), unix.S_IFCHR, 0))
	check(unix.Mkfifo(filepath.Join(dir, "fifo"), 0o644))
	check(unix.Mknod(filepath.Join(dir, "socket"), unix.S_IFSOCK|0o644, 0))
	check(os.Mkdir(filepath.Join(dir, "00"), 0o700))
	check(os.Chown(filepath.Join(dir, "size1"), 70000, 5))
	check(os.Chmod(filepath.Join(dir, "size65"), 0o4755|os.ModeSetuid))
	for name, attr := range map[string]string{"size63": "user.note", "d": "trusted.overlay.opaque", "size65": "security.other", "link": "trusted.link"} {
		if err := unix.Lsetxattr(filepath.Join(dir, name), attr, []byte("y"), 0); err != nil {
			t.Logf("no %s here: %v", attr, err)
		}
	}
	for i, name := range []string{"size0", "link", "d/e", "d", "."} {
		times := []unix.Timespec{{Sec: int64(i)*1e9 - 5, Nsec: int64(i)}, {Sec: int64(i)*1e9 - 5, Nsec: int64(i)}}
		check(unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, name), times, unix.AT_SYMLINK_NOFOLLOW))
	}
}

// TestOracleDirectory compares images and stores of directories with the C program.
func TestOracleDirectory(t *testing.T) {
	tmp, inside := oracleTemp(t)
	makeCorners(t, filepath.Join(tmp, "src"))
	for _, src := range []string{inside + "/src", "/usr", "/etc"} {
		for i, opts := range [][]string{
			nil, {"--use-epoch"}, {"--skip-xattrs"}, {"--user-xattrs"}, {"--skip-devices"},
			{"--min-version=1"}, {"--max-version=0"}, {"--threads=1"},
		} {
			if src == "/usr" && testing.Short() {
				continue
			}
			name := fmt.Sprint(strings.ReplaceAll(src, "/", "_"), i)
			c := chrootTool(t, "", slices.Concat([]string{"mkcomposefs", "--print-digest", "--digest-store=" + inside + "/c"}, opts, []string{src, inside + "/" + name})...)
			if c.status != 0 {
				t.Fatalf("mkcomposefs %q: %s", opts, c.stderr)
			}
			mine := filepath.Join(t.TempDir(), "image")
			got := mustRun(t, mkcomposefsMain, "", slices.Concat([]string{"--print-digest", "--digest-store=" + tmp + "/go"}, opts, []string{oracleDir(t) + src, mine})...)
			if got != c.stdout || readFile(t, mine) != readFile(t, tmp, name) {
				t.Errorf("%s %q: got digest %q, want %q", src, opts, got, c.stdout)
			}
		}
	}
	objects := filesBelow(t, tmp+"/c")
	if got := filesBelow(t, tmp+"/go"); len(got) == 0 || !slices.Equal(got, objects) {
		t.Fatalf("store: got %d objects, want %d", len(got), len(objects))
	}
	for _, o := range objects {
		if readFile(t, tmp, "c", o) != readFile(t, tmp, "go", o) {
			t.Errorf("object %s differs", o)
		}
	}
}

// TestOracleStatus compares exit statuses and standard output where things go wrong.
func TestOracleStatus(t *testing.T) {
	tmp, inside := oracleTemp(t)
	for _, name := range []string{"should-fail-dot-name.dump", "should-fail-big-inline.dump", "no-newline.dump"} {
		writeFile(t, readFile(t, conformanceDir, name), tmp, name)
	}
	for _, args := range [][]string{
		nil, {"x"}, {"x", "y", "z"}, {"--nonsense"}, {"--print-digest-only", "a", "b"},
		{"--threads=0", "a", "b"}, {"--min-version=7", "--from-file", "TMP/no-newline.dump", "TMP/i"},
		{"TMP/nothing", "TMP/i"}, {"--from-file", "TMP/nothing", "TMP/i"},
		{"--from-file", "TMP/should-fail-dot-name.dump", "TMP/i"},
		{"--from-file", "TMP/should-fail-big-inline.dump", "TMP/i"},
		{"--from-file", "TMP/no-newline.dump", "TMP/i"},
		{"--from-file", "--print-digest", "TMP/no-newline.dump", "TMP/i"},
		{"--from-file", "TMP/no-newline.dump", "-"},
	} {
		in, out := slices.Clone(args), slices.Clone(args)
		for i := range args {
			in[i] = strings.Replace(args[i], "TMP", inside, 1)
			out[i] = strings.Replace(args[i], "TMP", tmp, 1)
		}
		c := chrootTool(t, "", append([]string{"mkcomposefs"}, in...)...)
		if got := runTool(mkcomposefsMain, "", out...); got.status != c.status || got.stdout != c.stdout {
			t.Errorf("%q: got %d %s, want %d %s", args, got.status, hex.EncodeToString([]byte(got.stdout)), c.status, hex.EncodeToString([]byte(c.stdout)))
		}
	}
}
