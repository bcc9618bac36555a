package registry_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/particle-os/particle/registry"
)

// TestRoundTrip writes OCI and Docker images to each transport that keeps them as
// they are, and reads the same bytes back.
func TestRoundTrip(t *testing.T) {
	for kind, m := range map[string]*image{"oci": ociImage(t), "docker": dockerImage(t)} {
		dir := t.TempDir()
		for what, ref := range map[string]registry.Ref{
			"memory":  mustRef(t, "docker://%s/a/b:c", serve(t, "", nil).Addr()),
			"disk":    mustRef(t, "docker://%s/x:y", serve(t, t.TempDir(), nil).Addr()),
			"digest":  mustRef(t, "docker://%s/x@%s", serve(t, "", nil).Addr(), m.digest()),
			"layout":  mustRef(t, "oci:%s/new/layout:1.0", dir),
			"untag":   mustRef(t, "oci:%s/untag", dir),
			"archive": mustRef(t, "oci-archive:%s/a.tar:docker.io/library/x:1", dir),
		} {
			t.Run(kind+"/"+what, func(t *testing.T) {
				mustWrite(t, ref, m, nil)
				same(t, "first", readImage(t, ref, nil), m)
				mustWrite(t, ref, m, nil) // everything is there already
				same(t, "second", readImage(t, ref, nil), m)
			})
		}
	}
}

// TestDockerArchive: an archive keeps the config and the layers' content, not the
// manifest, and is the same bytes every time.
func TestDockerArchive(t *testing.T) {
	for kind, m := range map[string]*image{"oci": ociImage(t), "docker": dockerImage(t)} {
		dir := t.TempDir()
		var files [2][]byte
		for i := range files {
			name := filepath.Join(dir, []string{"a.tar", "b.tar"}[i])
			ref := mustRef(t, "docker-archive:%s:x:1", name)
			mustWrite(t, ref, m, nil)
			got := readImage(t, ref, nil)
			if got.manifest.Config.Digest != m.manifest.Config.Digest {
				t.Errorf("%s: config digest is %s, want %s", kind, got.manifest.Config.Digest, m.manifest.Config.Digest)
			}
			if len(got.manifest.Layers) != len(m.manifest.Layers) {
				t.Errorf("%s: %d layers, want %d", kind, len(got.manifest.Layers), len(m.manifest.Layers))
			}
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			files[i] = b
		}
		if string(files[0]) != string(files[1]) {
			t.Errorf("%s: two archives of one image differ", kind)
		}
	}
}
