package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestComplete(t *testing.T) {
	names := func(store string) []string {
		if store == "/other" {
			return []string{"elsewhere:1"}
		}
		return []string{"server:1", "server:2", "localhost/base"}
	}
	for _, c := range []struct {
		words string // blank-separated, the last to complete
		want  []string
		not   []string
	}{
		{"", []string{"convert", "store", "doctor"}, []string{"docs", "help", "--store"}},
		{"con", []string{"convert"}, []string{"export"}},
		{"-", []string{"--store", "--quiet", "--help"}, []string{"--json"}},
		{"--q", []string{"--quiet"}, []string{"--store"}},
		{"--store ", []string{"@dirs"}, []string{"convert"}},
		{"--store /x con", []string{"convert"}, nil},
		{"--store=/x con", []string{"convert"}, nil},
		{"mount --verity ", []string{"off", "try", "require"}, []string{"server:1"}},
		{"mount --verity=r", []string{"--verity=require"}, []string{"--verity=try"}},
		{"mount s", []string{"server:1", "server:2", "@files"}, []string{"localhost/base"}},
		{"mount server:1 ", []string{"@dirs"}, []string{"server:1"}},
		{"mount --json server:1 --k", []string{"--kind"}, []string{"--store=", "--json"}},
		{"--store /other rm ", []string{"elsewhere:1"}, []string{"server:1"}},
		{"rm server:1 ", []string{"server:2"}, nil},
		{"convert ", []string{"oci:", "docker://", "@files"}, []string{"server:1"}},
		{"convert x --basedir ", []string{"@dirs"}, nil},
		{"convert x ", []string{"server:1"}, []string{"oci:"}},
		{"convert x y ", nil, []string{"server:1", "@files"}},
		{"store ", []string{"df", "gc", "fsck", "scrub"}, []string{"server:1"}},
		{"store gc --d", []string{"--dry-run"}, nil},
		{"dump -- --st", []string{"@files"}, []string{"--store"}},
		{"hostdeploy ins", []string{"install"}, []string{"convert"}},
		{"hostdeploy install to-d", []string{"to-disk"}, nil},
		{"hostdeploy install to-disk --image ", []string{"server:1", "oci:", "@files"}, nil},
		{"hostdeploy fin", []string{"@files"}, []string{"finalize"}},
		{"mkcomposefs --", []string{"@files"}, []string{"--store"}},
		{"no-such-verb ", nil, []string{"@files", "server:1"}},
	} {
		var got []string
		for _, line := range complete(newApp(&term{}), strings.Split(c.words, " "), names) {
			word, _, _ := strings.Cut(line, "\t")
			got = append(got, word)
		}
		for _, w := range c.want {
			if !slices.Contains(got, w) {
				t.Errorf("%q: %q is missing of %q", c.words, w, got)
			}
		}
		for _, w := range c.not {
			if slices.Contains(got, w) {
				t.Errorf("%q: %q should not be offered: %q", c.words, w, got)
			}
		}
		if c.want == nil && len(got) > 0 {
			t.Errorf("%q: got %q, want nothing", c.words, got)
		}
	}
}

// FuzzComplete: no command line makes it panic, and no line it returns breaks in two.
func FuzzComplete(f *testing.F) {
	for _, s := range []string{"", "con", "--store", "--store=/x mount --verity ", "store gc --dry-run -", "dump -- -", "mkcomposefs a b", "= - -- ---"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		for _, l := range complete(newApp(&term{}), strings.Split(line, " "), nil) {
			if strings.ContainsAny(l, "\n\x00") && !strings.ContainsAny(line, "\n\x00") || l == "" {
				t.Errorf("%q: line %q", line, l)
			}
		}
	})
}

// TestCompletionShells has the shells complete with the scripts, as a person does.
func TestCompletionShells(t *testing.T) {
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// testscript has made the test binary particle where it is called so.
	if err := os.Symlink(exe, filepath.Join(dir, "particle")); err != nil {
		t.Fatal(err)
	}
	script := func(shell string) string {
		data, err := completionScripts.ReadFile("completion/particle." + shell)
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(dir, "script."+shell)
		if err := os.WriteFile(name, data, 0o644); err != nil {
			t.Fatal(err)
		}
		return name
	}
	shell := func(t *testing.T, argv ...string) string {
		if _, err := exec.LookPath(argv[0]); err != nil {
			t.Skipf("there is no %s here (Debian package %[1]s)", argv[0])
		}
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "HOME="+dir, "TERM=dumb")
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%q: %v\n%s", argv, err, out)
		}
		return string(out)
	}
	cases := []struct{ line, want, not string }{
		{"particle con", "convert", "export"},
		{"particle store ", "scrub", "convert"},
		{"particle mount --verity=re", "require", "try"},
		{"particle --store /nowhere convert --boot", "--bootable", "--link"},
	}
	t.Run("bash", func(t *testing.T) {
		name := script("bash")
		for _, c := range cases {
			// What readline does: it sets the variables and calls the function.
			out := shell(t, "bash", "--norc", "-c", `. "$1"; COMP_LINE=$2; COMP_POINT=${#2}; compopt() { :; }; _particle; printf '%s\n' "${COMPREPLY[@]}"`, "bash", name, c.line)
			words := strings.Fields(out)
			if !slices.Contains(words, c.want) || slices.Contains(words, c.not) {
				t.Errorf("%q: got %q, want %q and not %q", c.line, words, c.want, c.not)
			}
		}
	})
	t.Run("fish", func(t *testing.T) {
		name := script("fish")
		for _, c := range cases {
			out := shell(t, "fish", "--no-config", "-c", "source "+name+`; complete -C "`+c.line+`"`)
			if !strings.Contains(out, c.want) || strings.Contains(out, c.not+"\t") {
				t.Errorf("%q: got %q, want %q and not %q", c.line, out, c.want, c.not)
			}
		}
	})
	t.Run("zsh", func(t *testing.T) {
		name := script("zsh")
		for _, c := range cases {
			// A stand-in for the completion system, which needs a terminal.
			out := shell(t, "zsh", "-f", "-c", `compdef() { :; }; _describe() { print -l -- "${(@P)2}"; }; compadd() { shift 3; print -l -- "$@"; }; _files() { :; }
				. "$1"; words=("${(@s: :)2}"); CURRENT=$#words; _particle`, "zsh", name, c.line)
			if !strings.Contains(out, c.want) || strings.Contains(out, "\n"+c.not+":") {
				t.Errorf("%q: got %q, want %q and not %q", c.line, out, c.want, c.not)
			}
		}
	})
}
