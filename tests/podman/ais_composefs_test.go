package podman

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/tree"
	"github.com/particle-os/particle/registry"
)

// TestMkcomposefs: podman's own use_composefs works with particle as its mkcomposefs,
// as far as it works at all: what upper layers delete it shows, and the whiteouts as
// files. That is podman's doing, with the C program as well; when this test fails
// there, docs/podman.md is out of date.
func TestMkcomposefs(t *testing.T) {
	withEach(t, func(t *testing.T, rel release) {
		if !rel.takesImages() {
			t.Skip("podman before 5.0 has no use_composefs")
		}
		addr := serveOn(t, registry.ServeOptions{})
		put(t, imageOf(t, baseLayer(t)), addr+"/one:1")
		put(t, threeLayers(t), addr+"/three:1")
		bin := sharedDir(t)
		raw, err := os.ReadFile(particle)
		if err == nil {
			err = os.WriteFile(filepath.Join(bin, "mkcomposefs"), raw, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		e, plain := newEngine(t, rel, ""), newEngine(t, rel, "")
		conf, err := os.ReadFile(e.conf)
		if err != nil {
			t.Fatal(err)
		}
		write(t, e.conf, string(conf)+"[storage.options]\npull_options = {enable_partial_images = \"true\", convert_images = \"true\"}\n[storage.options.overlay]\nuse_composefs = \"true\"\n")
		e.path = bin // first in $PATH
		for _, ref := range []string{addr + "/one:1", addr + "/three:1"} {
			e.podman("pull", "-q", ref)
			plain.podman("pull", "-q", ref)
		}
		blobs, err := filepath.Glob(filepath.Join(e.graph, "overlay/*/composefs-data/composefs.blob"))
		if err != nil || len(blobs) != 3 { // the base is one layer of both
			t.Fatalf("podman has %d composefs layers, %v, want 3", len(blobs), err)
		}

		want, got := plain.shows(addr+"/one:1"), e.shows(addr+"/one:1")
		want.Root.Mode = got.Root.Mode
		for _, c := range tree.Diff(want, got) {
			// podman's dump has whole seconds.
			if !strings.Contains(c.What, "mtime") {
				t.Errorf("one layer: %s: %s (plain podman first)", c.Path, c.What)
			}
		}
		got = e.shows(addr + "/three:1")
		if got.Lookup("/usr/share/.wh.renamed") == nil || got.Lookup("/usr/share/renamed/f0") == nil {
			t.Error("podman's use_composefs has learnt to delete: docs/podman.md says it has not")
		}
	})
}
