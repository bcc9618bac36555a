package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/particle-os/particle"
)

// fakeContainerd puts a program first in $PATH that says it is containerd of a version.
func fakeContainerd(t testing.TB, version string) {
	t.Helper()
	bin := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\necho containerd github.com/containerd/containerd/v2 %s 0123abc\n", version)
	if err := os.WriteFile(filepath.Join(bin, "containerd"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
}

// containerdAt makes the bridge of a configuration below a directory, of which the given
// files are there.
func containerdAt(t testing.TB, dir string, files map[string]string) *containerdBridge {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, "DIR", dir)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := newContainerdBridge(bridgeOptions{config: filepath.Join(dir, "etc/config.toml")})
	if err != nil {
		t.Fatal(err)
	}
	b.subst = strings.NewReplacer("${socket}", "SOCKET", "${root}", "ROOT", "${arch}", "amd64")
	return b
}

// treeOf returns all files and directories below a directory.
func treeOf(t testing.TB, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			all[path] = ""
			return err
		}
		b, err := os.ReadFile(path)
		all[path] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

const (
	snapshotProxy = `type = "snapshot"
address = "SOCKET"
`
	// differs is what 2.x is told, up to where it unpacks.
	differs = `[proxy_plugins.particle-diff]
type = "diff"
address = "SOCKET"
capabilities = []
[plugins."io.containerd.service.v1.diff-service"]
default = ["particle-diff", "walking"]
[plugins."io.containerd.transfer.v1.local"]
`
	nativeErofs    = `{ platform = "linux(+erofs)/amd64", snapshotter = "erofs", differ = "erofs", optional = true }`
	walkingOverlay = `{ platform = "linux/amd64", snapshotter = "overlayfs", differ = "walking" }`
	ourUnpacking   = `{ platform = "linux/amd64", snapshotter = "particle", differ = "particle-diff" }`
)

func TestContainerdEnable(t *testing.T) {
	for _, tt := range []struct {
		name, version string
		files         map[string]string
		path          string // of the drop-in, when not the usual one
		want          string // what it says
		missing       string // of what the user has to do
		state         string // after it, when not enabled
	}{
		{
			name: "1.6 has no proxies of differs", version: "1.6.20~ds1",
			files: map[string]string{"etc/config.toml": "version = 2\nimports = ['DIR/etc/conf.d/*.toml']\n"},
			want:  "version = 2\n[proxy_plugins.particle]\n" + snapshotProxy,
		},
		{
			name: "1.7 replaces whole sections: what the user says is kept", version: "1.7.24",
			files: map[string]string{"etc/config.toml": `version = 2
imports = ["/nowhere/*.conf", "DIR/etc/conf.d/*.toml", "DIR/etc/more.toml"]
[plugins."io.containerd.service.v1.diff-service"]
  default = ["lost"]
[plugins."io.containerd.transfer.v1.local"]
  max_concurrent_downloads = 7
`, "etc/more.toml": "[plugins.'io.containerd.service.v1.diff-service']\ndefault = ['erofs', 'walking']\nother = 1\n"},
			want: `version = 2
[proxy_plugins.particle]
capabilities = ["remap-ids"]
exports = { root = "ROOT" }
` + snapshotProxy + `[proxy_plugins.particle-diff]
type = "diff"
address = "SOCKET"
capabilities = ["remap-ids"]
[plugins."io.containerd.service.v1.diff-service"]
default = ["particle-diff", "erofs", "walking"]
other = 1
[plugins."io.containerd.transfer.v1.local"]
max_concurrent_downloads = 7
unpack_config = [` + walkingOverlay + "," + ourUnpacking + `]
`,
			missing: "DIR/etc/more.toml is read later than DIR/etc/conf.d/particle.toml and replaces default of io.containerd.service.v1.diff-service; give it a place before, or ours a later name",
			state:   bridgeOverridden,
		},
		{
			name: "2.1 merges keys; a directory that is imported already", version: "2.1.9",
			files: map[string]string{"etc/config.toml": `version = 3
imports = ["DIR/etc/containerd.d/*"]
[plugins."io.containerd.transfer.v1.local"]
  max_concurrent_downloads = 7
  unpack_config = [{ platform = "linux/amd64", snapshotter = "stargz" }]
`},
			path: "etc/containerd.d/particle.toml",
			want: `version = 3
[proxy_plugins.particle]
capabilities = ["remap-ids"]
exports = { root = "ROOT", enable_remote_snapshot_annotations = "true" }
` + snapshotProxy + differs + `unpack_config = [{ platform = "linux/amd64", snapshotter = "stargz" },` + ourUnpacking + `]
`,
		},
		{
			name: "2.4, where there is no configuration", version: "v2.4.2",
			want: `version = 3
[proxy_plugins.particle]
capabilities = ["remap-ids", "rebase"]
exports = { root = "ROOT", enable_remote_snapshot_annotations = "true" }
` + snapshotProxy + differs + `unpack_config = [` + walkingOverlay + "," + nativeErofs + "," + ourUnpacking + `]
`,
		},
		{
			name: "2.3 does not take staged layers", version: "v2.3.4",
			want: `version = 3
[proxy_plugins.particle]
capabilities = ["remap-ids"]
exports = { root = "ROOT", enable_remote_snapshot_annotations = "true" }
` + snapshotProxy + differs + `unpack_config = [` + walkingOverlay + "," + nativeErofs + "," + ourUnpacking + `]
`,
		},
		{
			name: "no imports", version: "1.6.20",
			files:   map[string]string{"etc/config.toml": "version = 2\n"},
			want:    "version = 2\n[proxy_plugins.particle]\n" + snapshotProxy,
			missing: "DIR/etc/config.toml imports nothing; add this line to it, before the first [table]:\nimports = [\"DIR/etc/conf.d/*.toml\"]",
			state:   bridgeUnused,
		},
		{
			name: "imports of other files", version: "1.6.20",
			files:   map[string]string{"etc/config.toml": "version = 2\nimports = ['relative/*.toml', '/nowhere/*.conf']\n"},
			want:    "version = 2\n[proxy_plugins.particle]\n" + snapshotProxy,
			missing: "DIR/etc/config.toml imports other files; make the line that says so:\nimports = [\"relative/*.toml\", \"/nowhere/*.conf\", \"DIR/etc/conf.d/*.toml\"]",
			state:   bridgeUnused,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fakeContainerd(t, tt.version)
			dir := t.TempDir()
			b := containerdAt(t, dir, tt.files)
			before := treeOf(t, dir)
			p, err := b.enable(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if want := strings.ReplaceAll(tt.missing, "DIR", dir); p.Missing != want {
				t.Errorf("missing: got %q, want %q", p.Missing, want)
			}
			if _, err := p.apply(); err != nil {
				t.Fatal(err)
			}
			path := tt.path
			if path == "" {
				path = "etc/conf.d/particle.toml"
			}
			var got, want map[string]any
			text := treeOf(t, dir)[filepath.Join(dir, path)]
			if err := toml.Unmarshal([]byte(text), &got); err != nil {
				t.Fatal(err)
			}
			if err := toml.Unmarshal([]byte(tt.want), &want); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("%s has\n%s\nwant\n%s", path, text, tt.want)
			}
			for name, text := range before {
				if after, ok := treeOf(t, dir)[name]; !ok || after != text {
					t.Errorf("%s was changed to %q", name, after)
				}
			}

			again, err := b.enable(t.Context())
			if err != nil || len(again.Changes) != 0 || again.Missing != p.Missing {
				t.Errorf("enabled twice: %+v, %v", again, err)
			}
			state := bridgeOn
			if tt.state != "" {
				state = tt.state
			}
			if st, err := b.status(t.Context()); err != nil || st.State != state || !slices.Contains(st.Files, filepath.Join(dir, path)) {
				t.Errorf("status: %+v, %v, want %s", st, err, state)
			}

			undo, err := b.disable(t.Context())
			if err == nil {
				_, err = undo.apply()
			}
			if err != nil {
				t.Fatal(err)
			}
			if after := treeOf(t, dir); !reflect.DeepEqual(after, before) {
				t.Errorf("disabling leaves %q, want %q", after, before)
			}
			if undo, err = b.disable(t.Context()); err != nil || len(undo.Changes) != 0 {
				t.Errorf("disabled twice: %+v, %v", undo, err)
			}
		})
	}
}

// TestContainerdOutdated: what enable wrote for an older containerd, or before the user
// changed his lists, is brought up to date.
func TestContainerdOutdated(t *testing.T) {
	dir := t.TempDir()
	config := map[string]string{"etc/config.toml": "version = 2\nimports = ['DIR/etc/conf.d/*.toml']\n"}
	b := containerdAt(t, dir, config)
	state := func(want string) {
		t.Helper()
		if st, err := b.status(t.Context()); err != nil || st.State != want {
			t.Fatalf("status: %+v, %v, want %s", st, err, want)
		}
	}
	enable := func() {
		t.Helper()
		p, err := b.enable(t.Context())
		if err == nil {
			_, err = p.apply()
		}
		if err != nil {
			t.Fatal(err)
		}
		state(bridgeOn)
	}
	fakeContainerd(t, "1.6.20")
	state(bridgeOff)
	enable()
	fakeContainerd(t, "2.2.0")
	state(bridgeOutdated)
	enable()
	config["etc/config.toml"] += "[plugins.'io.containerd.service.v1.diff-service']\ndefault = ['erofs']\n"
	containerdAt(t, dir, config)
	state(bridgeOutdated)
	enable()
	path := filepath.Join(dir, "etc/conf.d/particle.toml")
	if text := treeOf(t, dir)[path]; strings.Count(text, madeMark) != 1 {
		t.Errorf("what was made with the file is forgotten:\n%s", text)
	}
}

func TestContainerdRefusals(t *testing.T) {
	for _, tt := range []struct {
		name, version string
		files         map[string]string
		want          string
	}{
		{"version 1", "1.6.20", map[string]string{"etc/config.toml": "[plugins.cri]\n"}, "is of version 1"},
		{"no TOML", "1.6.20", map[string]string{"etc/config.toml": "version = \n"}, "unfit configuration of containerd: reading"},
		{"older than any form", "1.5.9", nil, "the oldest that works is 1.6"},
		{"no version", "unknown", nil, `unknown version of containerd: "unknown"`},
		{"somebody else's file", "2.2.0", map[string]string{"etc/conf.d/particle.toml": "version = 3\n"}, "is somebody else's"},
		{"import that is not there", "2.2.0", map[string]string{"etc/config.toml": "version = 2\nimports = ['gone.toml']\n"}, "gone.toml"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fakeContainerd(t, tt.version)
			dir := t.TempDir()
			b := containerdAt(t, dir, tt.files)
			before := treeOf(t, dir)
			if _, err := b.enable(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if after := treeOf(t, dir); !reflect.DeepEqual(after, before) {
				t.Errorf("it left %q", after)
			}
		})
	}
}

// TestPlanIsWhatWasShown: a file that changes between plan and apply is not written over.
func TestPlanIsWhatWasShown(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	old, text := "old\n", "new\n"
	p := &bridgePlan{Changes: []fileChange{{Path: path, Old: &old, New: &text}}}
	for _, now := range []string{"", "other\n"} {
		if now != "" {
			if err := os.WriteFile(path, []byte(now), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := p.apply(); err == nil || !strings.Contains(err.Error(), "changed by somebody else") {
			t.Errorf("with %q there: got %v", now, err)
		}
	}
}

// A plannedBridge has the plan that a test gives it.
type plannedBridge struct {
	bridge
	plan *bridgePlan
	err  error
}

func (b *plannedBridge) name() string                                { return "planned" }
func (b *plannedBridge) enable(context.Context) (*bridgePlan, error) { return b.plan, b.err }

// TestPlansFirst: one bridge that cannot be changed keeps all from being changed, and
// what is changed nevertheless is told.
func TestPlansFirst(t *testing.T) {
	unfit, other := errors.New("unfit"), errors.New("unfit, too")
	bridges := []bridge{&plannedBridge{plan: &bridgePlan{}}, &plannedBridge{err: unfit}, &plannedBridge{err: other}}
	if _, err := planBridges(t.Context(), bridges, bridge.enable); !errors.Is(err, unfit) || !errors.Is(err, other) {
		t.Errorf("got %v", err)
	}

	dir, text := t.TempDir(), "new\n"
	file := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string) fileChange { return fileChange{Path: file(name), New: &text} }
	if err := os.WriteFile(file("taken"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, json := range []bool{false, true} {
		plans := []*bridgePlan{
			{Name: "first", Changes: []fileChange{write("a")}, Missing: "a line"},
			{Name: "second", Changes: []fileChange{write("b"), write("taken"), write("c")}},
			{Name: "third", prepare: func() error { return unfit }},
			{Name: "fourth", Changes: []fileChange{write("d")}},
		}
		var out, stderr bytes.Buffer
		err := applyPlans(&term{out: &out, err: &stderr}, plans, false, json)
		if !errors.Is(err, unfit) || !errors.Is(err, errNotInEffect) || !strings.Contains(err.Error(), "second: "+file("taken")) {
			t.Errorf("got %v", err)
		}
		for name, there := range map[string]bool{"a": true, "b": true, "c": false, "d": true} {
			if _, err := os.Stat(file(name)); (err == nil) != there {
				t.Errorf("file %s: %v", name, err)
			}
			if told := strings.Contains(out.String(), file(name)); told != there {
				t.Errorf("file %s is told: %v in\n%s", name, told, out.String())
			}
			os.Remove(file(name))
		}
		if strings.Contains(out.String(), file("taken")) {
			t.Errorf("what was not done is told:\n%s", out.String())
		}
	}
}

func TestDiffLines(t *testing.T) {
	for _, tt := range []struct{ before, after, want string }{
		{"", "a\nb\n", "+ a|+ b"},
		{"a\nb\nc\n", "a\nx\ny\nc\n", "- b|+ x|+ y"},
		{"a\na\n", "a\n", "- a"},
		{"a\n", "a\n", ""},
	} {
		if got := strings.Join(diffLines(tt.before, tt.after), "|"); got != tt.want {
			t.Errorf("diffLines(%q, %q): got %q, want %q", tt.before, tt.after, got, tt.want)
		}
	}
}

// TestDeclaration: plugins.toml has no key that nobody reads.
func TestDeclaration(t *testing.T) {
	var all struct {
		Containerd containerdDeclaration `toml:"containerd"`
		Podman     map[string]any        `toml:"podman"`
	}
	d := toml.NewDecoder(strings.NewReader(particle.Plugins)).DisallowUnknownFields()
	if err := d.Decode(&all); err != nil {
		t.Fatal(err)
	}
	if len(all.Containerd.Forms) < 4 {
		t.Errorf("there are %d forms for containerd", len(all.Containerd.Forms))
	}
}

// FuzzContainerdConfig: whatever config.toml says, what enable would write is TOML that
// has our proxy.
func FuzzContainerdConfig(f *testing.F) {
	fakeContainerd(f, "1.7.24")
	f.Add("version = 2\nimports = ['/etc/containerd/conf.d/*.toml']\n")
	f.Add("version = 2\nimports = ['*', '[']\n[plugins.'io.containerd.service.v1.diff-service']\ndefault = ['a', 1]\n")
	f.Add("version = 3\n[plugins.'io.containerd.transfer.v1.local']\nunpack_config = [{}]\nx = 1979-05-27\n")
	f.Fuzz(func(t *testing.T, text string) {
		dir := t.TempDir()
		// Not what names files of this machine.
		b := containerdAt(t, dir, map[string]string{"etc/config.toml": strings.ReplaceAll(text, "/", "")})
		user, err := b.readConfig(true)
		if err != nil {
			return
		}
		form, err := b.decl.form("1.7.24")
		if err != nil {
			t.Fatal(err)
		}
		made, err := b.dropIn(form, user)
		if err != nil {
			t.Fatal(err)
		}
		var got struct {
			Proxies map[string]struct{ Address string } `toml:"proxy_plugins"`
		}
		if err := toml.Unmarshal([]byte(made), &got); err != nil || got.Proxies["particle"].Address != "SOCKET" {
			t.Errorf("%v: %q", err, made)
		}
	})
}
