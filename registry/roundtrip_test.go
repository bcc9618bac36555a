package registry_test

import (
	"io"
	"os"
	"path/filepath"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

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

// BenchmarkTransfer pushes a layer of 64 MiB and reads it back.
func BenchmarkTransfer(b *testing.B) {
	layer := layerTar("x", 64<<20)
	desc := describe(layer, types.OCIUncompressedLayer)
	for _, form := range []string{"docker", "oci", "oci-archive", "docker-archive"} {
		b.Run(form, func(b *testing.B) {
			dir := b.TempDir()
			config := []byte(`{"rootfs":{"type":"layers","diff_ids":["` + desc.Digest.String() + `"]}}`)
			m := &image{mediaType: types.OCIManifestSchema1, blobs: map[v1.Hash][]byte{desc.Digest: layer}}
			m.manifest = v1.Manifest{SchemaVersion: 2, MediaType: m.mediaType, Config: describe(config, types.OCIConfigJSON), Layers: []v1.Descriptor{desc}}
			m.blobs[m.manifest.Config.Digest] = config
			m.raw = jsonOf(b, m.manifest)
			text := form + ":" + dir + "/x"
			if form == "docker" {
				text = "docker://" + serve(b, dir, nil).Addr() + "/x"
			}
			ref := mustRef(b, "%s", text)
			b.SetBytes(2 * int64(len(layer)))
			b.ReportAllocs()
			for b.Loop() {
				mustWrite(b, ref, m, nil)
				img := mustOpen(b, ref, nil)
				rc, err := img.Blob(b.Context(), desc)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, rc); err != nil {
					b.Fatal(err)
				}
				rc.Close()
				b.StopTimer()
				os.RemoveAll(ref.Path)
				os.RemoveAll(filepath.Join(dir, "sha256"))
				b.StartTimer()
			}
		})
	}
}
