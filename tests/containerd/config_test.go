package containerd

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/containerd/v2/plugins/content/local"
	_ "github.com/containerd/containerd/v2/plugins/transfer"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/pelletier/go-toml/v2"
	bolt "go.etcd.io/bbolt"

	"github.com/particle-os/particle/tests/program"
)

// A config is what containerd's configuration says of what the bridge is about.
type config struct {
	Proxies map[string]struct{ Address string } `toml:"proxy_plugins"`
	Plugins struct {
		Diff struct {
			Default []string `toml:"default"`
		} `toml:"io.containerd.service.v1.diff-service"`
		Transfer struct {
			Unpack []unpacking `toml:"unpack_config"`
		} `toml:"io.containerd.transfer.v1.local"`
	} `toml:"plugins"`
}

type unpacking struct {
	Platform    string `toml:"platform"`
	Snapshotter string `toml:"snapshotter"`
	Differ      string `toml:"differ"`
	Optional    bool   `toml:"optional"`
}

func parseConfig(t *testing.T, text string) (c config) {
	t.Helper()
	if err := toml.Unmarshal([]byte(text), &c); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return c
}

// pluginsWith runs particle plugins for a containerd and a configuration that nothing
// runs with.
func pluginsWith(bin, file, verb string) (string, error) {
	return program.TryEnv([]string{"PATH=" + bin + ":" + os.Getenv("PATH")}, particle, "plugins", verb, "containerd",
		"--config="+file, "--socket=/nowhere/particle.sock", "--root=/nowhere/root")
}

// enabledConfig returns what the drop-in says where nobody has configured anything, and
// the parts of it that are not about the snapshotter.
func enabledConfig(t *testing.T, bin string) (differs []string, unpack []unpacking) {
	t.Helper()
	dir := t.TempDir()
	if _, err := pluginsWith(bin, filepath.Join(dir, "config.toml"), "enable"); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "conf.d/particle.toml"))
	if err != nil {
		t.Fatal(err)
	}
	c := parseConfig(t, string(text))
	differs = slices.DeleteFunc(c.Plugins.Diff.Default, func(d string) bool { return d == "particle-diff" })
	return differs, slices.DeleteFunc(c.Plugins.Transfer.Unpack, func(u unpacking) bool { return u.Snapshotter == "particle" })
}

// TestDefaults: a list of the drop-in takes the place of containerd's default, so that it
// has to have what is in there.
func TestDefaults(t *testing.T) {
	forReleases(t, func(t *testing.T, r release) {
		differs, unpack := enabledConfig(t, r.bin)
		if !r.since(1, 7) {
			if differs != nil || unpack != nil {
				t.Errorf("1.6 is told of %q and %v", differs, unpack)
			}
			return
		}
		theirs := parseConfig(t, run(t, r.program("containerd"), "config", "default"))
		if want := theirs.Plugins.Diff.Default; !slices.Equal(differs, want) {
			t.Errorf("differs: got %q, want %q", differs, want)
		}
		// Newer ones do not print it.
		if want := theirs.Plugins.Transfer.Unpack; want != nil && !samePlaces(unpack, want) {
			t.Errorf("unpack_config: got %v, want %v", unpack, want)
		}
	})
}

// samePlaces compares all but the differ, which 1.7 names none by default.
func samePlaces(a, b []unpacking) bool {
	return slices.EqualFunc(a, b, func(a, b unpacking) bool {
		a.Differ, b.Differ = "", ""
		return a == b
	})
}

// TestUnpackDefault compares with the default that the containerd of go.mod puts into
// its configuration when it starts.
func TestUnpackDefault(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	bin := t.TempDir()
	script := "#!/bin/sh\necho containerd github.com/containerd/containerd/v2 v2.4.2 0123abc\n"
	if err := os.WriteFile(filepath.Join(bin, "containerd"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	_, got := enabledConfig(t, bin)
	if want := unpackDefault(t); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// unpackDefault starts the transfer plugin, as far as it gets without snapshotters.
func unpackDefault(t *testing.T) (unpack []unpacking) {
	t.Helper()
	dir := t.TempDir()
	db, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	cs, err := local.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	mdb := metadata.NewDB(db, cs, nil)
	set := plugin.NewPluginSet()
	for typ, instance := range map[plugin.Type]any{plugins.MetadataPlugin: mdb, plugins.LeasePlugin: metadata.NewLeaseManager(mdb)} {
		p := plugin.Registration{Type: typ, ID: "test", InitFn: func(*plugin.InitContext) (any, error) { return instance, nil }}.
			Init(plugin.NewContext(context.Background(), set, nil))
		if err := set.Add(p); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range registry.Graph(func(*plugin.Registration) bool { return false }) {
		if r.URI() != "io.containerd.transfer.v1.local" {
			continue
		}
		ic := plugin.NewContext(t.Context(), set, nil)
		ic.Config = r.Config
		if _, err := r.InitFn(ic); err == nil || !strings.Contains(err.Error(), "snapshotter") {
			t.Fatalf("starting the transfer plugin without snapshotters: got %v", err)
		}
		list := reflect.ValueOf(ic.Config).Elem().FieldByName("UnpackConfiguration")
		for i := range list.Len() {
			u := list.Index(i)
			text := func(field string) string { return u.FieldByName(field).String() }
			unpack = append(unpack, unpacking{text("Platform"), text("Snapshotter"), text("Differ"), u.FieldByName("Optional").Bool()})
		}
		return unpack
	}
	t.Fatal("there is no transfer plugin")
	return nil
}

// TestLaterFiles: status says enabled if, and only if, containerd goes by the drop-in.
func TestLaterFiles(t *testing.T) {
	const section = "[plugins.'io.containerd.service.v1.diff-service']\n"
	forReleases(t, func(t *testing.T, r release) {
		for name, later := range map[string]string{
			"nothing of ours":    "oom_score = -1\n",
			"another key":        section + "sync_fs = true\n",
			"our key":            section + "default = ['walking']\n",
			"our key as we have": section + "default = ['particle-diff', 'walking']\n",
			"our proxy":          "[proxy_plugins.particle]\ntype = 'snapshot'\naddress = '/nowhere/other.sock'\n",
		} {
			dir := t.TempDir()
			file := filepath.Join(dir, "config.toml")
			if err := os.Mkdir(filepath.Join(dir, "conf.d"), 0o755); err != nil {
				t.Fatal(err)
			}
			for path, text := range map[string]string{
				file:                                fmt.Sprintf("version = 2\nimports = [%q]\n", filepath.Join(dir, "conf.d/*.toml")),
				filepath.Join(dir, "conf.d/z.toml"): "version = 2\n" + later,
			} {
				if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			_, enableErr := pluginsWith(r.bin, file, "enable")
			status, err := pluginsWith(r.bin, file, "status")
			if err != nil {
				t.Fatal(err)
			}
			c := parseConfig(t, run(t, r.program("containerd"), "--config", file, "config", "dump"))
			holds := c.Proxies["particle"].Address == "/nowhere/particle.sock" &&
				(!r.since(1, 7) || slices.Contains(c.Plugins.Diff.Default, "particle-diff"))
			if says := strings.Contains(status, " enabled "); says != holds || (enableErr == nil) != holds {
				t.Errorf("%s: containerd goes by the drop-in: %v; enable: %v; status:\n%s", name, holds, enableErr, status)
			}
		}
	})
}
