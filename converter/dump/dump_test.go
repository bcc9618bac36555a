package dump

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/tree"
)

const conformance = "../erofs/testdata/conformance"

func parse(tb testing.TB, text string) *tree.Tree {
	tb.Helper()
	t, err := Parse(strings.NewReader(text), Options{})
	if err != nil {
		tb.Fatalf("%v in\n%.500s", err, text)
	}
	return t
}

func print(tb testing.TB, t *tree.Tree) string {
	tb.Helper()
	var b bytes.Buffer
	if err := Print(&b, t); err != nil {
		tb.Fatal(err)
	}
	return b.String()
}

// TestShouldFail has what composefs says that every reader must refuse.
func TestShouldFail(t *testing.T) {
	want := map[string]string{
		"big-inline":           "line 2: content is too long: got 5004 bytes, want at most 5000",
		"dir-hardlink":         `line 2: "/rootlink": a directory cannot be a hard link`,
		"dot-name":             `line 2: path "/.": name "." is reserved`,
		"dotdot-name":          `line 2: path "/..": name ".." is reserved`,
		"empty-link-name":      "line 2: symbolic link without a target",
		"empty-name":           `line 2: path "//": empty name`,
		"empty-xattr-key":      "line 2: xattr without a name",
		"honggfuzz-long-xattr": "line 1: xattrs are too large",
		"long-link":            "line 2: payload is too long: got 7248 bytes, want at most 4095",
		"long-xattr-key":       "line 2: xattrs are too long: got 123219 bytes, want at most 65535",
		"long-xattr-value":     "line 2: mode 644 names no file type",
		"no-ftype":             "line 2: mode 0 names no file type",
		"self-hardlink":        `line 2: hard link "/037blockdev" to itself`,
		"too-big":              "line 2: size 9500000000000000 is too large: want at most 9007199254740992",
	}
	files, err := filepath.Glob(conformance + "/should-fail-*.dump")
	if err != nil || len(files) != len(want) {
		t.Fatalf("got %d dumps, want %d (%v)", len(files), len(want), err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(file), "should-fail-"), ".dump")
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		_, err = Parse(f, Options{})
		f.Close()
		if err == nil || want[name] == "" || !strings.HasPrefix(err.Error(), want[name]) {
			t.Errorf("%s: got %.200v, want %q", name, err, want[name])
		}
	}
}

// Parts of the dumps below.
const (
	root = "/ 0 40755 2 0 0 0 0.0 - - -\n"
	sum  = "5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a"
	path = "5a/5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a"
)

func TestRefused(t *testing.T) {
	for _, c := range []struct {
		text, want string
		kind       error
	}{
		{"", "not a composefs dump: it has no lines", ErrSyntax},
		{"\n", "line 1: empty path", ErrSyntax},
		{"/ 0 100644 1 0 0 0 0.0 - - -\n", "line 1: the root is not a directory", ErrTree},
		{root + root, "line 2: a second root", ErrTree},
		{"/a 0 40755 2 0 0 0 0.0 - - -\n", `line 1: "/a" comes before the root`, ErrTree},
		{root + "/a/b 0 100644 1 0 0 0 0.0 - - -\n", `line 2: the directory of "/a/b" is missing`, ErrTree},
		{root + "/a 0 100644 1 0 0 0 0.0 - - -\n/a/b 0 100644 1 0 0 0 0.0 - - -\n", `line 3: "/a" is not a directory, but "/a/b" is to be in it`, ErrTree},
		{root + "/a 0 100644 1 0 0 0 0.0 - - -\n//a 0 100644 1 0 0 0 0.0 - - -\n", `line 3: "/a" is there already`, ErrTree},
		{root + "/a\x00 0 100644 1 0 0 0 0.0 - - -\n", "line 2: NUL at byte 2", ErrSyntax},
		{root + `/a\x00 0 100644 1 0 0 0 0.0 - - -`, `line 2: path "/a\x00" contains NUL`, ErrSyntax},
		{root + `/a\q 0 100644 1 0 0 0 0.0 - - -`, `line 2: unknown escape "\\q"`, ErrSyntax},
		{root + `/a\ 0 100644 1 0 0 0 0.0 - - -`, `line 2: nothing follows a backslash`, ErrSyntax},
		{root + `/a\x1 0 100644 1 0 0 0 0.0 - - -`, `line 2: escape "\\x1" lacks digits`, ErrSyntax},
		{root + `/a\x1g 0 100644 1 0 0 0 0.0 - - -`, `line 2: escape "\\x1g" is not hexadecimal`, ErrSyntax},
		{root + "/" + strings.Repeat("a", 256) + " 0 100644 1 0 0 0 0.0 - - -\n", `line 2: path "/aaa`, ErrLimit},
		{root + "/a x 100644 1 0 0 0 0.0 - - -\n", `line 2: size "x" is not a number in base 10`, ErrSyntax},
		{root + "/a 0 108644 1 0 0 0 0.0 - - -\n", `line 2: mode "108644" is not a number in base 8`, ErrSyntax},
		{root + "/a 0 100644 -1 0 0 0 0.0 - - -\n", `line 2: nlink "-1" is not a number in base 10`, ErrSyntax},
		{root + "/a 0 100644 1 4294967296 0 0 0.0 - - -\n", `line 2: uid "4294967296" is too large: want at most 4294967295`, ErrLimit},
		{root + "/a 0 100644 1 0 x 0 0.0 - - -\n", `line 2: gid "x" is not a number in base 10`, ErrSyntax},
		{root + "/a 0 20644 1 0 0 4294967296 0.0 - - -\n", `line 2: rdev 4294967296 is too large: EROFS stores 32 bits`, ErrLimit},
		{root + "/a 0 100644 1 0 0 0 0 - - -\n", `line 2: mtime "0" has no nanoseconds: want seconds.nanoseconds`, ErrSyntax},
		{root + "/a 0 100644 1 0 0 0 0.1000000000 - - -\n", `line 2: mtime "1000000000" is too large: want at most 999999999`, ErrLimit},
		{root + "/a 0 100644\n", `line 2: nlink is missing`, ErrSyntax},
		{root + "/a 3 100644 1 0 0 0 0.0 - ab -\n", `line 2: content has 2 bytes, but size says 3`, ErrSyntax},
		{root + "/a 3 100644 1 0 0 0 0.0 - - xyz\n", `line 2: digest "xyz" has 3 digits, want 64 or 128`, ErrSyntax},
		{root + "/a 3 100644 1 0 0 0 0.0 - - " + strings.Repeat("z", 64) + "\n", `line 2: digest "zzz`, ErrSyntax},
		{root + "/a 0 100644 1 0 0 0 0.0 - - - x\n", `line 2: xattr "x" has no "="`, ErrSyntax},
		{root + "/a 0 @100644 1 0 0 0 0.0 - - -\n", `line 2: "/a": hard link without a target`, ErrSyntax},
		{root + "/a 0 @100644 1 0 0 0 0.0 /b - -\n", `line 2: hard link "/a" to "/b", which does not exist`, ErrTree},
		{root + "/a 0 @100644 1 0 0 0 0.0 /b - -\n/b 0 @100644 1 0 0 0 0.0 /a - -\n", `line 2: hard link "/a" to itself`, ErrTree},
		{root + "/a 0 @100644 1 0 0 0 0.0 /c - -\n/c 0 40755 1 0 0 0 0.0 - - -\n", `line 2: hard link "/a" to a directory, "/c"`, ErrTree},
		{root + "/" + strings.Repeat("a", MaxLine), "line 2: line is too long", ErrLimit},
	} {
		_, err := Parse(strings.NewReader(c.text), Options{})
		if err == nil || !strings.HasPrefix(err.Error(), c.want) || !errors.Is(err, c.kind) {
			t.Errorf("%.100q:\n got %.200v,\nwant %q (%v)", c.text, err, c.want, c.kind)
		}
		if c.text == "" {
			continue
		}
		if line := new(LineError); !errors.As(err, &line) || line.Line == 0 {
			t.Errorf("%.100q: %.200v names no line", c.text, err)
		}
	}
}

func TestStrict(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{strings.TrimSuffix(root, "\n"), "line 1: the last line does not end in a newline"},
		{"/ 0 40755 2 0 0 10 0.0 - - -\n", "line 1: rdev 10 of something that is no device"},
		{root + "/l 5 120777 1 0 0 0 0.0 target - -\n", "line 2: target has 6 bytes, but size says 5"},
		{root + "/l 1 120777 1 0 0 0 0.0 t c -\n", "line 2: symbolic link with content"},
		{root + "/f 0 20100644 1 0 0 0 0.0 - - -\n", "line 2: mode 20100644 has more bits than st_mode"},
	} {
		parse(t, c.text)
		if _, err := Parse(strings.NewReader(c.text), Options{Strict: true}); err == nil || err.Error() != c.want {
			t.Errorf("%q: got %v, want %q", c.text, err, c.want)
		}
	}
}

// TestPrint has dumps with what Print makes of them, "" if the same.
func TestPrint(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{root, ""},
		{strings.TrimSuffix(root, "\n"), root},
		{"/ 4096 40755 77 1 2 3 -5.7 - - - b=2 a=1 b=\\x3d\\n\\\\\n", "/ 0 40755 2 1 2 0 -5.7 - - - a=1 b=\\x3d\\n\\\\\n"},
		{"/ 0 40755 3 0 0 0 0.0 - - -\n/d 0 40755 2 0 0 0 0.0 - - -\n/d/\\x80\\x20\\t 0 100644 1 0 0 0 0.0 - - -\n", ""},
		// Names need no leading slash and may have more.
		{"/ 0 40755 3 0 0 0 0.0 - - -\nd 0 40755 2 0 0 0 0.0 - - -\n//d//f 0 100644 1 0 0 0 0.0 - - -\n", "/ 0 40755 3 0 0 0 0.0 - - -\n/d 0 40755 2 0 0 0 0.0 - - -\n/d/f 0 100644 1 0 0 0 0.0 - - -\n"},
		{root + "/c 0 20644 1 0 0 259 0.0 - - -\n/l 1 120777 1 0 0 0 0.0 \\x2d - -\n/p 0 10644 1 0 0 0 0.0 - - -\n/s 0 140644 1 0 0 0 0.0 - - -\n", ""},
		{root + "/f 2 100644 1 0 0 0 0.0 - \\x00= -\n/g 1 100644 1 0 0 0 0.0 - \\x2d -\n", ""},
		// Objects: the usual path, none, another, no digest, nothing.
		{root + "/f 100 100644 1 0 0 0 0.0 " + path + " - " + sum + "\n", ""},
		{root + "/f 100 100644 1 0 0 0 0.0 - - " + sum + "\n", ""},
		{root + "/f 100 100644 1 0 0 0 0.0 some/where - " + sum + "\n", ""},
		{root + "/f 100 100644 1 0 0 0 0.0 " + path + " - -\n", ""},
		{root + "/f 100 100644 1 0 0 0 0.0 - - -\n", ""},
		{root + "/f 100 100644 1 0 0 0 0.0 - - " + sum + sum + "\n", ""},
		{root + "/f 100 100644 1 0 0 0 0.0 " + strings.ToUpper(path) + " - " + strings.ToUpper(sum) + "\n", root + "/f 100 100644 1 0 0 0 0.0 " + strings.ToUpper(path) + " - " + sum + "\n"},
		// Lines that end early.
		{root + "/l 0 120777 1 0 0 0 0.0 target", root + "/l 6 120777 1 0 0 0 0.0 target - -\n"},
		// Links: counted, miscounted, before their file, to a link.
		{root + "/a 0 100644 2 0 0 0 0.0 - - -\n/b 0 @100644 2 0 0 0 0.0 /a - -\n", ""},
		{root + "/a 0 100644 1 0 0 0 0.0 - - -\n/b 0 @100644 1 0 0 0 0.0 /a - -\n", ""},
		{root + "/a 0 100644 7 0 0 0 0.0 - - -\n", ""},
		{root + "/a 0 @100644 2 0 0 0 0.0 /b - -\n/b 0 100644 2 0 0 0 0.0 - - -\n", ""},
		{root + "/a 0 @120000 - - - - 0.0 b/ - -\n/b 0 @100000 /c - - - - /c\n/c 0 100644 3 0 0 0 0.0 - - -\n",
			root + "/a 0 @100644 3 0 0 0 0.0 /c - -\n/b 0 @100644 3 0 0 0 0.0 /c - -\n/c 0 100644 3 0 0 0 0.0 - - -\n"},
		{root + "/c 5000000000 20644 1 0 0 0 0.0 - - -\n", ""},
		{root + "/c 50 20644 1 0 0 0 0.0 - - -\n", root + "/c 0 20644 1 0 0 0 0.0 - - -\n"},
	} {
		if c.want == "" {
			c.want = c.text
		}
		if got := print(t, parse(t, c.text)); got != c.want {
			t.Errorf("%q:\n got %q\nwant %q", c.text, got, c.want)
		}
		if got := print(t, parse(t, c.want)); got != c.want {
			t.Errorf("%q printed again:\n got %q", c.want, got)
		}
	}
}

// TestOwnersOrder checks that paths compare by their elements, not their bytes.
func TestOwnersOrder(t *testing.T) {
	const text = "/ 0 40755 3 0 0 0 0.0 - - -\n" +
		"/a 0 40755 2 0 0 0 0.0 - - -\n" +
		"/a/f 0 100644 2 0 0 0 0.0 - - -\n" +
		"/a! 0 @100644 2 0 0 0 0.0 /a/f - -\n"
	if tr := parse(t, text); tr.Owners != nil {
		t.Errorf("owners: got %v, want none: the file comes first", tr.Owners)
	} else if got := print(t, tr); got != text {
		t.Errorf("got\n%swant\n%s", got, text)
	}
}

// TestLongChains checks that links to links take linear time.
func TestLongChains(t *testing.T) {
	var b strings.Builder
	b.WriteString(root)
	const n = 100_000
	for i := range n {
		b.WriteString("/i" + strconv.Itoa(i) + " 0 @100644 - - - - - /i" + strconv.Itoa(i+1) + " - -\n")
	}
	b.WriteString("/i" + strconv.Itoa(n) + " 0 100644 1 0 0 0 0.0 - - -\n")
	tr := parse(t, b.String())
	if got := len(tr.Root.Dir); got != n+1 {
		t.Fatalf("got %d names, want %d", got, n+1)
	}
	for name, node := range tr.Root.Dir {
		if node != tr.Root.Dir["i0"] {
			t.Fatalf("%s is another file", name)
		}
	}
}

// TestChunks parses with every line of a large dump in several positions relative
// to the borders of chunks, and through readers that give little at a time.
func TestChunks(t *testing.T) {
	f, err := os.Open(conformance + "/cs9-x86_64-minimal.dump.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	want := print(t, parse(t, string(text)))
	for _, shift := range []int{1, 100, 70_000} {
		// xattrs of the root move what follows.
		head := "/ 0 40755 2 0 0 0 0.0 - - - user.x=" + strings.Repeat("x", shift%32000)
		_, rest, _ := strings.Cut(string(text), "\n")
		got := print(t, parse(t, head+"\n"+rest))
		_, got, _ = strings.Cut(got, "\n")
		if _, want, _ := strings.Cut(want, "\n"); got != want {
			t.Errorf("shifted by %d: the tree differs", shift)
		}
	}
	tr, err := Parse(&slowReader{text}, Options{})
	if err != nil || print(t, tr) != want {
		t.Errorf("read slowly: the tree differs (%v)", err)
	}
}

type slowReader struct{ b []byte }

func (r *slowReader) Read(p []byte) (int, error) {
	if len(r.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), 4099)], r.b)
	r.b = r.b[n:]
	return n, nil
}

// TestReadError checks that an error of the reader is not taken for the end.
func TestReadError(t *testing.T) {
	want := errors.New("no more")
	_, err := Parse(io.MultiReader(strings.NewReader(root), errReader{want}), Options{})
	if !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

// FuzzParse checks that what Parse takes can be printed and parsed again.
func FuzzParse(f *testing.F) {
	files, err := filepath.Glob(conformance + "/*.dump")
	if err != nil || len(files) == 0 {
		f.Fatal("no seeds", err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		if len(b) < 10_000 {
			f.Add(b, false)
			f.Add(b, true)
		}
	}
	f.Add([]byte(root+"/a 0 @120000 - - - - 0.0 b/ - -\n/b 0 100644 3 0 0 0 0.0 - - - user.x=1\n"), true)
	f.Add([]byte(root+"/f 100 100644 1 0 0 0 0.0 "+path+" - "+sum+"\n"), true)
	f.Fuzz(func(t *testing.T, text []byte, strict bool) {
		tr, err := Parse(bytes.NewReader(text), Options{Strict: strict})
		if err != nil {
			return
		}
		once := print(t, tr)
		again, err := Parse(strings.NewReader(once), Options{Strict: true})
		if err != nil {
			t.Fatalf("%v in\n%s", err, once)
		}
		if twice := print(t, again); twice != once {
			t.Fatalf("printed\n%sthen\n%s", once, twice)
		}
		if changes := tree.Diff(tr, again); len(changes) > 0 {
			t.Fatalf("%v", changes)
		}
	})
}

func BenchmarkParse(b *testing.B) {
	f, err := os.Open(conformance + "/cs9-x86_64-developer.dump.gz")
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		b.Fatal(err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(bytes.NewReader(text), Options{}); err != nil {
			b.Fatal(err)
		}
	}
}
