package initramfs

import (
	"io/fs"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestFiles(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range Files() {
		if !filepath.IsAbs(f.Path) || seen[f.Path] || (f.Data == nil) != (f.Path == Program) {
			t.Errorf("got %q with %d bytes", f.Path, len(f.Data))
		}
		seen[f.Path] = true
	}
	if !seen[Program] {
		t.Errorf("%q is not among them", Program)
	}
	// Each carrier that is embedded goes somewhere.
	sources := map[string]bool{}
	for _, p := range places {
		sources[p.source] = true
	}
	err := fs.WalkDir(carriers, ".", func(name string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() && !sources[name] {
			t.Errorf("%q is installed nowhere", name)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestSyntax has the shells read the scripts.
func TestSyntax(t *testing.T) {
	lint, lintErr := exec.LookPath("shellcheck")
	if lintErr != nil {
		t.Log("shellcheck is missing (apt install shellcheck): the scripts are parsed only")
	}
	for _, p := range places {
		if p.mode != 0o755 || p.source == "" {
			continue
		}
		for _, f := range Files() {
			if f.Path != p.path {
				continue
			}
			shell, _, _ := strings.Cut(string(f.Data), "\n")
			shell, ok := strings.CutPrefix(shell, "#!/bin/")
			if !ok {
				t.Errorf("%s does not name its shell", p.source)
				continue
			}
			cmd := exec.Command(shell, "-n")
			cmd.Stdin = strings.NewReader(string(f.Data))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", p.source, err, out)
			}
			if lintErr == nil {
				cmd := exec.Command(lint, "--severity=warning", "--exclude=SC1091", "-s", shell, "-")
				cmd.Stdin = strings.NewReader(string(f.Data))
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("%s: %v\n%s", p.source, err, out)
				}
			}
		}
	}
}

// TestMarkers compares what the carriers and the program know each other by.
func TestMarkers(t *testing.T) {
	for _, p := range places {
		if p.source == "" {
			continue
		}
		data, err := carriers.ReadFile(p.source)
		if err != nil {
			t.Fatal(err)
		}
		text := string(data)
		want := map[string][]string{
			"initramfs-tools/hook":               {Program, ShellMark},
			"initramfs-tools/init-top":           {ShellMark, "particle.shell", "composefs.digest="},
			"initramfs-tools/init-bottom":        {Program},
			"dracut/module-setup.sh":             {Program, ShellMark},
			"dracut/particle-root-setup.service": {Program, "SuccessExitStatus=3"},
			"dracut/particle-cmdline.sh":         {ShellMark, "particle.shell"},
			"dracut/particle-pre-pivot.sh":       {Program},
		}[p.source]
		for _, w := range want {
			if !strings.Contains(text, w) {
				t.Errorf("%s lacks %q", p.source, w)
			}
		}
	}
}
