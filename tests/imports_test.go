// Package tests holds what concerns the project as a whole: who may import whom,
// and scripts that drive the command against foreign programs.
package tests

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/particle-os/particle/"

// allowed tells for each package which of ours it may import. A trailing slash and
// asterisk stand for all below. docs/architecture.md has the same table in prose.
var allowed = map[string][]string{
	"github.com/particle-os/particle": nil, // plugins.toml
	"converter/fsverity":              nil,
	"converter/tree":                  {"converter/fsverity"},
	"converter/store":                 {"converter/fsverity"},
	"converter/mount":                 {"converter/fsverity"},
	"converter/layer":                 {"converter/tree", "converter/fsverity"},
	"converter/dump":                  {"converter/tree", "converter/fsverity"},
	"converter/erofs":                 {"converter/tree", "converter/fsverity"},
	"converter/scan":                  {"converter/tree", "converter/fsverity"},
	"converter/dpkg":                  {"converter/tree", "converter/fsverity"},
	"converter/chunk":                 {"converter/tree", "converter/fsverity"},
	"converter":                       {"converter/*"},
	"registry":                        {"converter/fsverity"},
	"hostdeploy/bootloader/bls":       nil,
	"hostdeploy":                      {"converter", "converter/*", "hostdeploy/*"},
	"hostdeploy/*":                    {"converter/*", "hostdeploy/*"},
	"snapshotter":                     {"converter", "converter/*"},
	"snapshotter/*":                   {"converter", "converter/*", "snapshotter"},
	"podman-ext":                      {"converter", "converter/*"},
	"cmd/particle":                    {"*"},
	"cmd/particle-init-root":          {"converter/*", "hostdeploy/*"},
	"packaging":                       nil,
	"tests":                           {"*"},
	"tests/*":                         {"*"},
}

// homes tells which packages may import modules that would otherwise spread.
var homes = map[string]string{
	"github.com/containerd/containerd/": "snapshotter",
	"github.com/containers/podman/":     "podman-ext",
}

type pkg struct {
	ImportPath string
	Imports    []string
}

func listPackages(t *testing.T) []pkg {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports", module+"...")
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("listing packages: %v\n%s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	var pkgs []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

// matches reports whether a pattern of the table covers a package.
func matches(pattern, name string) bool {
	prefix, wild := strings.CutSuffix(pattern, "*")
	return pattern == name || wild && strings.HasPrefix(name, prefix)
}

// rule returns the entry of the table for a package, the exact one first.
func rule(name string) (imports []string, ok bool) {
	if imports, ok = allowed[name]; ok {
		return imports, true
	}
	for pattern, imports := range allowed {
		if strings.HasSuffix(pattern, "*") && matches(pattern, name) {
			return imports, true
		}
	}
	return nil, false
}

func TestImports(t *testing.T) {
	pkgs := listPackages(t)
	if len(pkgs) < 10 {
		t.Fatalf("go list found %d packages only", len(pkgs))
	}
	for _, p := range pkgs {
		name := strings.TrimPrefix(p.ImportPath, module)
		may, ok := rule(name)
		if !ok {
			t.Errorf("package %s is not in the table of this test and of docs/architecture.md", name)
			continue
		}
		for _, imp := range p.Imports {
			if ours, ok := strings.CutPrefix(imp, module); ok {
				if !slices.ContainsFunc(may, func(pattern string) bool { return matches(pattern, ours) }) {
					t.Errorf("%s imports %s; it may import %q", name, ours, may)
				}
			}
			for prefix, home := range homes {
				if strings.HasPrefix(imp, prefix) && name != home && !strings.HasPrefix(name, home+"/") {
					t.Errorf("%s imports %s, which only %s may", name, imp, home)
				}
			}
		}
	}
}

// TestRule keeps the table's patterns honest.
func TestRule(t *testing.T) {
	for name, want := range map[string]bool{
		"converter/tree": true, "hostdeploy/bootloader": true, "hostdeploy/bootloader/bls": true,
		"util": false, "converter/other": false,
	} {
		if _, ok := rule(name); ok != want {
			t.Errorf("rule(%q): got %v, want %v", name, ok, want)
		}
	}
	if imports, _ := rule("hostdeploy/bootloader/bls"); imports != nil {
		t.Errorf("bls may import %q, want nothing: the exact entry wins", imports)
	}
}
