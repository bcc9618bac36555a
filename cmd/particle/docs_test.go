package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/urfave/cli/v2"
)

func testPages() map[string][]byte {
	return manPages(newApp(&term{}), "1.2.3", time.Unix(1_000_000_000, 0).UTC())
}

// TestManPages checks what every page must have, and that there is one for each verb
// that people see.
func TestManPages(t *testing.T) {
	pages := testPages()
	want := []string{"particle.8"}
	for _, cmd := range newApp(&term{}).Commands {
		if !cmd.Hidden {
			want = append(want, "particle-"+cmd.Name+".8")
		}
	}
	slices.Sort(want)
	var got []string
	for name, page := range pages {
		got = append(got, name)
		text := string(page)
		for _, s := range []string{"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SEE ALSO"} {
			if !strings.Contains(text, ".SH \""+s+"\"\n") {
				t.Errorf("%s has no section %s", name, s)
			}
		}
		if !strings.HasPrefix(text, ".TH ") || !strings.Contains(text, " 8 2001-09-09 \"particle 1.2.3\"") {
			t.Errorf("%s begins with %q", name, text[:min(80, len(text))])
		}
		if i := bytes.IndexFunc(page, func(r rune) bool { return r > '~' || r < ' ' && r != '\n' }); i >= 0 {
			t.Errorf("%s is not ASCII at byte %d: %q", name, i, text[max(0, i-20):min(i+20, len(text))])
		}
		for line := range strings.Lines(text) {
			if strings.HasPrefix(line, "'") || strings.HasPrefix(line, "\\&.") && !strings.HasPrefix(line, "\\&..") {
				continue
			}
			if strings.HasPrefix(line, ".") && !requests.MatchString(line) {
				t.Errorf("%s: a line of text became a request: %q", name, line)
			}
		}
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("pages: got %q, want %q", got, want)
	}
	for name, again := range testPages() {
		if !bytes.Equal(again, pages[name]) {
			t.Errorf("%s differs from run to run", name)
		}
	}
}

var requests = regexp.MustCompile(`^\.(TH|SH|SS|PP|TP|RS|RE|nf|fi|br|nh|ad)( |\n)`)

// TestManPagesOfThisMachine: nothing of the machine that builds them gets into them.
func TestManPagesOfThisMachine(t *testing.T) {
	before := testPages()
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_DATA_HOME", home)
	t.Setenv("PARTICLE_STORE", filepath.Join(home, "store"))
	t.Setenv("REGISTRY_AUTH_FILE", filepath.Join(home, "auth"))
	out := t.TempDir()
	var stderr bytes.Buffer
	if status := run([]string{"particle", "--store", "/elsewhere", "docs", "man", "--release", "1.2.3", "--epoch", "1000000000", out}, strings.NewReader(""), &bytes.Buffer{}, &stderr); status != exitOK {
		t.Fatalf("particle docs man: status %d, %s", status, stderr.String())
	}
	for name, want := range before {
		got, err := os.ReadFile(filepath.Join(out, name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s depends on the environment", name)
		}
	}
}

// TestManPagesRender has the programs that show manual pages judge them.
func TestManPagesRender(t *testing.T) {
	dir := t.TempDir()
	var files []string
	for name, page := range testPages() {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, page, 0o644); err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	slices.Sort(files)
	for _, judge := range []struct {
		pkg  string
		argv []string
	}{
		{"groff-base", []string{"groff", "-man", "-Tutf8", "-ww", "-z"}},
		{"mandoc", []string{"mandoc", "-Tlint", "-Wwarning"}},
	} {
		t.Run(judge.argv[0], func(t *testing.T) {
			if _, err := exec.LookPath(judge.argv[0]); err != nil {
				t.Skipf("there is no %s here (Debian package %s)", judge.argv[0], judge.pkg)
			}
			for _, file := range files {
				out, err := exec.Command(judge.argv[0], append(judge.argv[1:], file)...).CombinedOutput()
				if err != nil || len(out) > 0 {
					t.Errorf("%s: %v\n%s", filepath.Base(file), err, out)
				}
			}
		})
	}
}

func TestManText(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"one\ntwo", ".PP\none\ntwo\n"},
		{"one\n\ntwo", ".PP\none\n.PP\ntwo\n"},
		{"so:\n\n  a\n    b\n\n  c\nend", ".PP\nso:\n.PP\n.RS 4\n.nf\na\n  b\n\\&\nc\n.fi\n.RE\n.PP\nend\n"},
		{".TH is no request", ".PP\n\\&.TH is no request\n"},
		{"'quoted' \\ `word`", ".PP\n\\(aqquoted\\(aq \\e \\(gaword\\(ga\n"},
		{"take --json of DIR, not re-run or XDIR", ".PP\ntake \\fB\\-\\-json\\fR of \\fIDIR\\fR, not re\\-run or XDIR\n"},
	} {
		p := &manPage{}
		p.text(c.in, []string{"DIR"})
		if p.String() != c.want {
			t.Errorf("text(%q): got %q, want %q", c.in, p.String(), c.want)
		}
	}
	p := &manPage{}
	p.fill(strings.Repeat("word ", 40) + ".dot")
	for line := range strings.Lines(p.String()) {
		if len(line) > 81 || line[0] == '.' {
			t.Errorf("fill wrote %q", line)
		}
	}
}

// TestExamples runs the example commands up to the point where verbs act: verbs,
// options and the number of arguments must be right.
func TestExamples(t *testing.T) {
	for verb, all := range examples {
		app := newApp(&term{})
		if verb != "" && findCommand(app.Commands, verb) == nil {
			t.Errorf("there are examples of %q, which is no verb", verb)
		}
		for _, e := range all {
			for command := range strings.SplitSeq(e.commands, "\n") {
				words := strings.Fields(command)
				if words[0] != "particle" {
					continue
				}
				if i := slices.Index(words, "|"); i > 0 {
					words = words[:i]
				}
				checkExample(t, words)
			}
		}
	}
	for _, cmd := range newApp(&term{}).Commands {
		if !cmd.Hidden && len(examples[cmd.Name]) == 0 {
			t.Errorf("the verb %s has no example in examples.go", cmd.Name)
		}
	}
}

func checkExample(t *testing.T, words []string) {
	t.Helper()
	app := newApp(&term{})
	ran := false
	var replace func([]*cli.Command)
	replace = func(cmds []*cli.Command) {
		for _, cmd := range cmds {
			cmd.Action = func(c *cli.Context) error {
				ran = true
				if want := len(strings.Fields(c.Command.ArgsUsage)); !cmd.SkipFlagParsing && c.NArg() > want {
					t.Errorf("%q: %d arguments, %s takes %d", words, c.NArg(), c.Command.Name, want)
				}
				return nil
			}
			replace(cmd.Subcommands)
		}
	}
	replace(app.Commands)
	args, err := arrange(app, words)
	if err == nil {
		err = app.Run(args)
	}
	if err != nil || !ran {
		t.Errorf("%q: %v (verb reached: %v)", words, err, ran)
	}
}
