package tests

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// mountImage mounts one of an image's kinds until the test ends.
func mountImage(t testing.TB, store, name, kind string) string {
	t.Helper()
	dir := dirFor(t)
	run(t, particle, "--store", store, "mount", "--kind", kind, name, dir)
	t.Cleanup(func() {
		if _, err := try(particle, "umount", dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// podmanMount mounts an image as podman does until the test ends.
func podmanMount(t testing.TB, name string) string {
	t.Helper()
	dir := strings.TrimSpace(run(t, "podman", "image", "mount", name))
	t.Cleanup(func() {
		if _, err := try("podman", "image", "umount", name); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestOneDigestFromAllSources reads the server example in every way there is. A
// digest that differs between the machine that builds and the one that installs is
// a system that does not boot.
func TestOneDigestFromAllSources(t *testing.T) {
	needPodman(t, "skopeo", "umoci")
	name := server.get(t)
	dir := dirFor(t)
	store := filepath.Join(dir, "store")
	at := func(name string) string { return filepath.Join(dir, name) }

	run(t, "skopeo", "copy", "-q", "containers-storage:"+name, "oci:"+at("layout")+":server")
	run(t, "podman", "save", "-q", "--format", "oci-archive", "-o", at("oci.tar"), name)
	run(t, "podman", "save", "-q", "--format", "docker-archive", "-o", at("docker.tar"), name)
	run(t, "umoci", "unpack", "--image", at("layout")+":server", at("bundle"))

	want := convert(t, store, "oci:"+at("layout")+":server", "layout", "--bootable")
	if len(want.Layers) < 2 {
		t.Errorf("the server example has %d layers, want at least 2", len(want.Layers))
	}
	sources := []struct{ name, source string }{
		{"oci-archive", "oci-archive:" + at("oci.tar")},
		{"docker-archive", "docker-archive:" + at("docker.tar")},
		{"containers-storage", "containers-storage:" + name},
		{"podman's mount", podmanMount(t, name)},
		{"umoci's directory", at("bundle/rootfs")},
		{"mount of rootfs", mountImage(t, store, "layout", "rootfs")},
		{"mount of merged", mountImage(t, store, "layout", "merged")},
	}
	for _, s := range sources {
		own := at("store-" + strings.ReplaceAll(s.name, " ", "-"))
		got := convert(t, own, s.source, "x", "--bootable")
		for _, kind := range []string{"merged", "bootable"} {
			if got.Images[kind] != want.Images[kind] {
				t.Errorf("%s: the %s image has digest %s, want %s", s.name, kind, got.Images[kind], want.Images[kind])
				out, _ := try(particle, "--store", own, "dump", "--kind", kind, "x")
				os.WriteFile(at("got.dump"), []byte(out), 0o600)
				out, _ = try(particle, "--store", store, "dump", "--kind", kind, "layout")
				os.WriteFile(at("want.dump"), []byte(out), 0o600)
				diff, _ := try("diff", at("want.dump"), at("got.dump"))
				t.Logf("want and got:\n%.3000s", diff)
			}
		}
		// Where the layers were read, they are the same layers.
		if strings.Contains(s.source, ":") && got.Config != want.Config {
			t.Errorf("%s: config %s, want %s", s.name, got.Config, want.Config)
		}
		os.RemoveAll(own)
	}
	// A sealed tree is its own source too.
	again := convert(t, at("store-bootable"), mountImage(t, store, "layout", "bootable"), "x", "--bootable")
	if again.Images["bootable"] != want.Images["bootable"] {
		t.Errorf("mount of bootable: got %s, want %s", again.Images["bootable"], want.Images["bootable"])
	}
}
