package main

import (
	"context"
	"maps"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// changed applies what enable or disable plans.
func changed(t testing.TB, p *bridgePlan, err error) *bridgePlan {
	t.Helper()
	if err == nil {
		_, err = p.apply()
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func wantState(t testing.TB, b *containerdBridge, want, note string) {
	t.Helper()
	st, err := b.status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if notes := strings.Join(st.Notes, "\n"); st.State != want || !strings.Contains(notes, note) {
		t.Errorf("status: got %s with notes %q, want %s with %q", st.State, notes, want, note)
	}
}

// TestContainerdOwnConfig: a config.toml that enable made is removed as long as nobody
// has written into it.
func TestContainerdOwnConfig(t *testing.T) {
	const theirs = "\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"registry.example/pause\"\n"
	for _, added := range []string{"", theirs} {
		fakeContainerd(t, "1.7.24")
		dir := t.TempDir()
		b := containerdAt(t, dir, nil)
		p, err := b.enable(t.Context())
		changed(t, p, err)
		main, err := os.ReadFile(b.config)
		if err != nil {
			t.Fatal(err)
		}
		if added != "" {
			if err := os.WriteFile(b.config, append(main, added...), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		// containerd may be another one by then.
		fakeContainerd(t, "2.4.2")
		p, err = b.disable(t.Context())
		changed(t, p, err)
		got, want := treeOf(t, dir), map[string]string{dir: ""}
		if added != "" {
			want[filepath.Dir(b.config)], want[b.config] = "", string(main)+added
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("with %q added, disable leaves %q, want %q", added, got, want)
		}
		if notes := strings.Join(p.Notes, "\n"); strings.Contains(notes, b.config+" stays") != (added != "") {
			t.Errorf("with %q added, disable says %q", added, notes)
		}
	}
}

// TestContainerdLaterFiles: the last file that containerd reads decides, in 1.x over a
// plugin's section, in 2.x over a key, over a proxy as a whole in both.
func TestContainerdLaterFiles(t *testing.T) {
	const section = "[plugins.'io.containerd.service.v1.diff-service']\n"
	for _, tt := range []struct{ name, later, state1, state2, note string }{
		{"nothing of ours", "[plugins.x]\ny = 1\n", bridgeOn, bridgeOn, ""},
		{"another key", section + "sync_fs = true\n", bridgeOverridden, bridgeOn, "default of io.containerd.service.v1.diff-service"},
		{"our key", section + "default = ['walking']\n", bridgeOverridden, bridgeOverridden, "default of io.containerd.service.v1.diff-service"},
		{"our key as we say it", section + "default = ['particle-diff', 'walking']\n", bridgeOn, bridgeOn, ""},
		{"our proxy", "[proxy_plugins.particle]\ntype = 'snapshot'\naddress = '/other'\n", bridgeOverridden, bridgeOverridden, "proxy_plugins.particle;"},
	} {
		for version, state := range map[string]string{"1.7.24": tt.state1, "2.4.2": tt.state2} {
			t.Run(tt.name+", "+version, func(t *testing.T) {
				fakeContainerd(t, version)
				dir := t.TempDir()
				b := containerdAt(t, dir, map[string]string{
					"etc/config.toml":    "version = 2\nimports = ['DIR/etc/conf.d/*.toml']\n",
					"etc/conf.d/zz.toml": "version = 2\n" + tt.later,
				})
				p, err := b.enable(t.Context())
				changed(t, p, err)
				if (p.Missing != "") != (state != bridgeOn) {
					t.Errorf("enable says that this is missing: %q", p.Missing)
				}
				note := ""
				if state != bridgeOn {
					note = tt.note
				}
				wantState(t, b, state, note)
				// What the note advises helps.
				if err := os.Rename(filepath.Join(dir, "etc/conf.d/particle.toml"), filepath.Join(dir, "etc/conf.d/zzz.toml")); err != nil {
					t.Fatal(err)
				}
				if p, err = b.enable(t.Context()); err != nil || p.Missing != "" || len(p.Changes) > 0 && tt.name != "our proxy" {
					t.Errorf("renamed: %+v, %v", p, err)
				}
				wantState(t, b, bridgeOn, "")
			})
		}
	}
}

// TestContainerdPlaces: what enable wrote is known wherever containerd reads it.
func TestContainerdPlaces(t *testing.T) {
	fakeContainerd(t, "2.4.2")
	dir := t.TempDir()
	old := "version = 3\nimports = ['DIR/etc/config.d/*.toml']\n"
	both := "version = 3\nimports = ['DIR/etc/config.d/*.toml', 'DIR/etc/conf.d/*.toml']\n"
	b := containerdAt(t, dir, map[string]string{"etc/config.toml": old})
	before := treeOf(t, dir)
	p, err := b.enable(t.Context())
	changed(t, p, err)
	first := filepath.Join(dir, "etc/config.d/particle.toml")
	containerdAt(t, dir, map[string]string{"etc/config.toml": both})
	wantState(t, b, bridgeOn, "")
	if p, err = b.enable(t.Context()); err != nil || len(p.Changes) > 0 {
		t.Errorf("enabled where another directory is imported, too: %+v, %v", p, err)
	}

	// Two of them: the last one decides, the other goes.
	second := filepath.Join(dir, "etc/conf.d/particle.toml")
	containerdAt(t, dir, map[string]string{"etc/conf.d/particle.toml": dropInMark + madeMark + "DIR/etc/conf.d\n"})
	p, err = b.enable(t.Context())
	changed(t, p, err)
	if got := treeOf(t, dir); got[first] != "" || !strings.Contains(got[second], "proxy_plugins.particle") {
		t.Errorf("enable of two leaves %q", slices.Sorted(maps.Keys(got)))
	}
	p, err = b.disable(t.Context())
	changed(t, p, err)
	containerdAt(t, dir, map[string]string{"etc/config.toml": old})
	if after := treeOf(t, dir); !reflect.DeepEqual(after, before) {
		t.Errorf("disable leaves %q, want %q", after, before)
	}
}

// TestContainerdNamedImport: containerd does not start where an import without a pattern
// names no file.
func TestContainerdNamedImport(t *testing.T) {
	fakeContainerd(t, "2.4.2")
	dir := t.TempDir()
	b := containerdAt(t, dir, map[string]string{"etc/config.toml": "version = 3\nimports = ['DIR/etc/conf.d/particle.toml']\n"})
	p, err := b.enable(t.Context())
	changed(t, p, err)
	wantState(t, b, bridgeOn, "")
	p, err = b.disable(t.Context())
	changed(t, p, err)
	want := "out of the imports of " + b.config
	if notes := strings.Join(p.Notes, "\n"); !strings.Contains(notes, want) {
		t.Errorf("disable says %q, want %q", notes, want)
	}
	wantState(t, b, bridgeOff, "")
}

// TestDaemonState: status advises what helps.
func TestDaemonState(t *testing.T) {
	dial := func(err error) error {
		return &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("connect", err)}
	}
	for _, tt := range []struct {
		err         error
		state, note string
	}{
		{nil, "answers", ""},
		{dial(syscall.EACCES), "not asked", "only root may ask"},
		{dial(syscall.ENOENT), "does not answer", "enable --now particle-snapshotter.socket"},
		{dial(syscall.ECONNREFUSED), "does not answer", "enable --now particle-snapshotter.socket"},
		{context.DeadlineExceeded, "does not answer", "journalctl"},
	} {
		if state, note := daemonState(tt.err); state != tt.state || !strings.Contains(note, tt.note) || (note == "") != (tt.note == "") {
			t.Errorf("%v: got %q, %q", tt.err, state, note)
		}
	}
}

// TestContainerdDaemon: a socket at which nobody serves is no daemon that answers.
func TestContainerdDaemon(t *testing.T) {
	fakeContainerd(t, "2.4.2")
	b := containerdAt(t, t.TempDir(), nil)
	p, err := b.enable(t.Context())
	changed(t, p, err)
	b.socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", b.socket)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	defer l.Close()
	if st, err := b.status(t.Context()); err != nil || st.Daemon != "does not answer" {
		t.Errorf("got %+v, %v", st, err)
	}
}
