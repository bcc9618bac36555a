package main

import (
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/fsverity"
)

const (
	infoHex  = "5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a"
	infoPath = "5a/5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a"
)

func makeImage(t *testing.T, text string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	mustRun(t, mkcomposefsMain, text, "--from-file", "-", image)
	return image
}

func TestComposefsInfo(t *testing.T) {
	const text = "/ 0 40755 3 0 0 0 7.0 - - - user.a=1 user.b=2\n" +
		"/a\\x20dir 0 40755 2 0 0 0 7.5 - - -\n" +
		"/a\\x20dir/file 100 100644 2 0 0 0 7.0 " + infoPath + " - " + infoHex + " user.a=1\n" +
		"/a\\x20dir/l=nk 5 120777 1 0 0 0 7.0 t\\x20a=\\n - -\n" +
		"/again 100 @100644 2 0 0 0 7.0 /a\\x20dir/file - -\n" +
		"/inline 5 100644 1 0 0 0 7.0 - in\\x3dl\\t -\n" +
		"/other 100 100644 1 0 0 0 7.0 not/there - -\n"
	image := makeImage(t, text)

	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"ls", image}, "/a dir/\t\n/a dir/file\t@ " + infoPath + "\n/a dir/l=nk\t-> t\\x20a=\\n\n/again\n/inline\n/other\t@ not/there\n"},
		{[]string{"objects", image, image}, infoPath + "\nnot/there\n"},
		{[]string{"missing-objects", image}, infoPath + "\nnot/there\n"},
		// user.a is shared with another file, so it comes behind user.b. The
		// directories have the size of their entries, the root with its 256 more.
		{[]string{"dump", image}, "/ 4096 40755 3 0 0 0 7.0 - - - user.b=2 user.a=1\n" +
			"/a\\x20dir 59 40755 2 0 0 0 7.5 - - -\n" +
			"/a\\x20dir/file 100 100644 2 0 0 0 7.0 " + infoPath + " - " + infoHex + " user.a=1\n" +
			"/a\\x20dir/l=nk 5 120777 1 0 0 0 7.0 t\\x20a=\\n - -\n" +
			"/again 100 @100644 2 0 0 0 7.0 /a\\x20dir/file - " + infoHex + " user.a=1\n" +
			"/inline 5 100644 1 0 0 0 7.0 - in=l\\t -\n" +
			"/other 100 100644 1 0 0 0 7.0 not/there - -\n"},
		// What is left keeps its number of links; the first name left is the file.
		{[]string{"--filter=again", "dump", image}, "/ 4096 40755 3 0 0 0 7.0 - - - user.b=2 user.a=1\n" +
			"/again 100 100644 2 0 0 0 7.0 " + infoPath + " - " + infoHex + " user.a=1\n"},
		{[]string{"ls", image, "--filter", "inline", "--filter=nothing"}, "/inline\n"},
	} {
		if got := mustRun(t, composefsInfoMain, "", c.args...); got != c.want {
			t.Errorf("%q:\n got %q\nwant %q", c.args[:1], got, c.want)
		}
	}

	base := t.TempDir()
	writeFile(t, "", base, infoPath)
	if got := mustRun(t, composefsInfoMain, "", "--basedir="+base, "missing-objects", image); got != "not/there\n" {
		t.Errorf("missing-objects: got %q", got)
	}
	file := writeFile(t, "hello world\n", base, "file")
	want := fsverity.Sum(fsverity.SHA256, []byte("hello world\n")).String() + "\n"
	if got := mustRun(t, composefsInfoMain, "", "measure-file", file, file); got != want+want {
		t.Errorf("measure-file: got %q, want %q twice", got, want)
	}
}

func TestComposefsInfoFailures(t *testing.T) {
	image := makeImage(t, "/ 0 40755 2 0 0 0 0.0 - - -\n")
	text := writeFile(t, strings.Repeat("no image ", 1000), t.TempDir(), "text")
	for _, c := range []struct {
		args  []string
		want  string
		usage bool
	}{
		{nil, "no COMMAND given", true},
		{[]string{"ls"}, "no image given", true},
		{[]string{"nonsense", image}, `unknown command "nonsense"`, true},
		{[]string{"measure-file"}, "no FILE given", true},
		{[]string{"--filter=a/b", "ls", image}, `--filter "a/b" is not the name of one file`, true},
		{[]string{"ls", image + "x"}, "no such file or directory", false},
		{[]string{"ls", text}, "not a composefs image", false},
		{[]string{"measure-file", image + "x"}, "no such file or directory", false},
		{[]string{"--basedir=" + image, "missing-objects", image}, "not a directory", false},
	} {
		r := runTool(composefsInfoMain, "", c.args...)
		if r.status != 1 || !strings.Contains(r.stderr, c.want) || strings.Contains(r.stderr, "usage:") != c.usage {
			t.Errorf("%q: got status %d, %q, want 1 and %q", c.args, r.status, r.stderr, c.want)
		}
	}
}

// TestOracleInfo compares all that composefs-info prints with the C program.
func TestOracleInfo(t *testing.T) {
	tmp, inside := oracleTemp(t)
	makeCorners(t, filepath.Join(tmp, "src"))
	mustRun(t, mkcomposefsMain, "", "--digest-store="+tmp+"/objects", tmp+"/src", tmp+"/corners")
	for _, name := range []string{"special.dump", "special_v1.dump", "config-with-hard-link.dump.gz", "cs9-x86_64-developer.dump.gz", "honggfuzz-bigfile-with-acl.dump"} {
		f, err := os.Open(filepath.Join(conformanceDir, name))
		if err != nil {
			t.Fatal(err)
		}
		var r io.Reader = f
		if strings.HasSuffix(name, ".gz") {
			if r, err = gzip.NewReader(f); err != nil {
				t.Fatal(err)
			}
		}
		text, err := io.ReadAll(r)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		mustRun(t, mkcomposefsMain, string(text), "--from-file", "-", filepath.Join(tmp, name))
	}
	images, err := filepath.Glob(tmp + "/*")
	if err != nil {
		t.Fatal(err)
	}
	compared := 0
	for _, image := range images {
		if fi, err := os.Stat(image); err != nil || fi.IsDir() {
			continue
		}
		for _, args := range [][]string{
			{"ls"}, {"objects"}, {"missing-objects"}, {"dump"}, {"measure-file"},
			{"--basedir=TMP/objects", "missing-objects"}, {"--filter=usr", "dump"}, {"--filter=d", "--filter=00", "ls"},
			{"--filter=hard", "dump"},
		} {
			run := func(dir string) []string {
				a := append([]string{}, args...)
				for i := range a {
					a[i] = strings.Replace(a[i], "TMP", dir, 1)
				}
				return append(a, dir+"/"+filepath.Base(image))
			}
			c := chrootTool(t, "", append([]string{"composefs-info"}, run(inside)...)...)
			got := runTool(composefsInfoMain, "", run(tmp)...)
			if got.status != c.status || got.stdout != c.stdout {
				t.Errorf("%s %q: got status %d and %d bytes, want %d and %d", filepath.Base(image), args, got.status, len(got.stdout), c.status, len(c.stdout))
			}
			compared++
		}
	}
	if compared < 40 {
		t.Errorf("compared %d outputs only", compared)
	}
}
