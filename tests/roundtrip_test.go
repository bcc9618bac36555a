package tests

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
)

// inspected is the part of skopeo inspect --raw, or of a config, that is compared.
type inspected struct {
	Config struct{ Digest string }
	Layers []struct {
		Digest, MediaType string
	}
	RootFS struct {
		DiffIDs []string `json:"diff_ids"`
	}
}

// skopeo asks skopeo, as a stranger, what is in an image.
func skopeo(t testing.TB, ref string) (manifest string, m, config inspected) {
	t.Helper()
	raw := run(t, "skopeo", "inspect", "--raw", ref)
	if err := json.Unmarshal([]byte(raw), &m); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(run(t, "skopeo", "inspect", "--raw", "--config", ref)), &config); err != nil {
		t.Fatal(err)
	}
	return raw, m, config
}

// TestRoundTrip: OCI to composefs and back, for images of all makers.
func TestRoundTrip(t *testing.T) {
	needPodman(t, "skopeo", "umoci")
	dir := dirFor(t)
	at := func(name string) string { return filepath.Join(dir, name) }

	built := tiny.get(t)
	run(t, "skopeo", "copy", "-q", "containers-storage:"+built, "oci:"+at("podman")+":x")
	run(t, "podman", "save", "-q", "--format", "oci-archive", "--uncompressed", "-o", at("uncompressed.tar"), built)
	run(t, "podman", "save", "-q", "--format", "docker-archive", "-o", at("docker.tar"), built)
	makeUmoci(t, at("umoci"))

	for _, c := range []struct {
		name, source string
		keep, same   bool
	}{
		{"podman build", "oci:" + at("podman") + ":x", false, false},
		{"podman build, kept blobs", "oci:" + at("podman") + ":x", true, true},
		{"podman build, uncompressed", "oci-archive:" + at("uncompressed.tar"), false, true},
		{"docker-archive", "docker-archive:" + at("docker.tar"), false, true},
		{"containers-storage", "containers-storage:" + built, false, true},
		{"bootstrap", trixie.get(t), false, true},
		{"umoci", "oci:" + at("umoci") + ":x", false, false},
		{"umoci, kept blobs", "oci:" + at("umoci") + ":x", true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			own := dirFor(t)
			store, out := filepath.Join(own, "store"), "oci:"+filepath.Join(own, "out")+":x"
			var flags []string
			if c.keep {
				flags = []string{"--keep-blobs"}
			}
			in := convert(t, store, c.source, "x", flags...)
			var exported struct {
				Manifest, Config string
				Same             bool
			}
			if err := json.Unmarshal([]byte(run(t, particle, "--store", store, "export", "x", out, "--json")), &exported); err != nil {
				t.Fatal(err)
			}
			if exported.Same != c.same || (exported.Manifest == in.Manifest) != c.same {
				t.Errorf("same manifest: %v (%s and %s), want %v", exported.Same, in.Manifest, exported.Manifest, c.same)
			}

			_, got, config := skopeo(t, out)
			if got.Config.Digest != in.Config {
				t.Errorf("config: got %s, want %s", got.Config.Digest, in.Config)
			}
			if len(config.RootFS.DiffIDs) != len(in.Layers) {
				t.Fatalf("got %d diffIDs, want %d", len(config.RootFS.DiffIDs), len(in.Layers))
			}
			for i, id := range config.RootFS.DiffIDs {
				if id != in.Layers[i].DiffID {
					t.Errorf("layer %d: got diffID %s, want %s", i, id, in.Layers[i].DiffID)
				}
			}
			if !strings.HasPrefix(c.source, "docker-archive:") && !strings.HasPrefix(c.source, "containers-storage:") {
				if raw, want, _ := skopeo(t, c.source); want.Config.Digest != in.Config {
					t.Errorf("skopeo reads config %s from the source, particle %s\n%s", want.Config.Digest, in.Config, raw)
				}
			}
			// podman verifies all digests when it loads the image.
			run(t, "podman", "pull", "-q", out)
			run(t, particle, "--store", store, "store", "scrub")
		})
	}
}

// makeUmoci makes a layout with umoci: two layers, the second of which deletes.
func makeUmoci(t testing.TB, layout string) {
	bundle := filepath.Join(dirFor(t), "bundle")
	run(t, "umoci", "init", "--layout", layout)
	run(t, "umoci", "new", "--image", layout+":x")
	run(t, "umoci", "unpack", "--image", layout+":x", bundle)
	run(t, "sh", "-c", `cd "$1" && mkdir -p usr/bin etc && head -c 100000 /dev/zero | tr '\0' a >usr/bin/a && ln usr/bin/a usr/bin/b &&
		ln -s a usr/bin/c && echo host >etc/hostname && mknod dev c 1 3 && mkfifo fifo && chown 12:34 etc/hostname && chmod 4755 usr/bin/a`, "sh", bundle+"/rootfs")
	run(t, "umoci", "repack", "--image", layout+":x", bundle)
	again := filepath.Join(dirFor(t), "bundle")
	run(t, "umoci", "unpack", "--image", layout+":x", again)
	run(t, "sh", "-c", `cd "$1" && rm etc/hostname && rm -r usr/bin && mkdir usr/bin && echo new >usr/bin/new`, "sh", again+"/rootfs")
	run(t, "umoci", "repack", "--image", layout+":x", again)
}

// TestSaveAndLoad: podman loads both kinds of archive.
func TestSaveAndLoad(t *testing.T) {
	needPodman(t, "skopeo")
	dir := dirFor(t)
	store := filepath.Join(dir, "store")
	in := convert(t, store, trixie.get(t), "x")
	for _, target := range []string{"oci-archive:" + filepath.Join(dir, "o.tar") + ":x", "docker-archive:" + filepath.Join(dir, "d.tar") + ":localhost/d:x"} {
		run(t, particle, "--store", store, "export", "x", target)
		loaded := run(t, "podman", "load", "-q", "-i", strings.Split(target, ":")[1])
		id := run(t, "podman", "image", "inspect", "--format", "{{.RootFS.Layers}}", strings.TrimSpace(strings.TrimPrefix(loaded, "Loaded image:")))
		if !strings.Contains(id, in.Layers[0].DiffID) {
			t.Errorf("%s: podman loaded layers %s, want %s", target, id, in.Layers[0].DiffID)
		}
	}
}
