package registry

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	fuzzManifest = `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","size":2,"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"},"layers":[]}`
	fuzzIndex    = `{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":2,"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","platform":{"os":"linux","architecture":"arm","variant":"v7"},"annotations":{"org.opencontainers.image.ref.name":"a"}}]}`
)

func FuzzDocument(f *testing.F) {
	for _, s := range []string{fuzzManifest, fuzzIndex, `{"schemaVersion":1,"fsLayers":[]}`, `{"schemaVersion":2,"config":{},"manifests":[]}`} {
		f.Add([]byte(s), string(types.OCIManifestSchema1))
		f.Add([]byte(s), "")
	}
	f.Fuzz(func(t *testing.T, raw []byte, mediaType string) {
		doc, err := parseDocument(raw, mediaType)
		if err != nil {
			return
		}
		if (doc.manifest == nil) == (doc.index == nil) {
			t.Fatalf("%q is %+v, want one of manifest and index", raw, doc)
		}
		var list []v1.Descriptor
		if doc.manifest != nil {
			list = append(doc.manifest.Layers, doc.manifest.Config)
		} else {
			list = doc.index.Manifests
			for _, p := range []string{"", "linux/arm/v7", "linux/arm64"} {
				want, err := parsePlatform(p)
				if err != nil {
					t.Fatal(err)
				}
				if d, err := choosePlatform(list, want); err == nil && (d.Platform == nil || d.Platform.Architecture != want.Architecture) {
					t.Errorf("chose %+v for %s", d, want)
				}
			}
		}
		for _, d := range list {
			checkDescriptorSafe(t, d)
		}
	})
}

// checkDescriptorSafe sees that a digest from outside makes a harmless name.
func checkDescriptorSafe(t *testing.T, d v1.Descriptor) {
	t.Helper()
	name := blobName(d.Digest)
	if d.Size < 0 || strings.Contains(name, "..") || strings.Count(name, "/") != 2 {
		t.Errorf("descriptor %+v passed, its blob is %q", d, name)
	}
}

func FuzzIndex(f *testing.F) {
	f.Add([]byte(fuzzIndex), "a")
	f.Add([]byte(fuzzIndex), "@0")
	f.Add([]byte(`{"schemaVersion":2,"manifests":[]}`), "")
	f.Fuzz(func(t *testing.T, raw []byte, tag string) {
		index, err := parseIndex(raw)
		if err != nil {
			return
		}
		if d, err := findTag(index, tag); err == nil {
			checkDescriptorSafe(t, d)
		}
		if tag == "" || !refNameRE.MatchString(tag) {
			return
		}
		desc := describe(raw, types.OCIManifestSchema1)
		addToIndex(index, desc, tag)
		if d, err := findTag(index, tag); err != nil || d.Digest != desc.Digest {
			t.Errorf("tag %q just added is %v, %v, want %v", tag, d, err, desc)
		}
	})
}

func FuzzDockerManifest(f *testing.F) {
	f.Add([]byte(`[{"Config":"c","RepoTags":["debian:12"],"Layers":["l/layer.tar"]}]`), "docker.io/library/debian:12")
	f.Add([]byte(`[{"Config":"../c"}]`), "")
	f.Add([]byte(`[null,{}]`), "@1")
	f.Fuzz(func(t *testing.T, raw []byte, tag string) {
		images, err := parseDockerManifest(raw)
		if err != nil {
			return
		}
		img, err := findDockerImage(images, tag)
		if err != nil {
			return
		}
		for _, name := range append(img.Layers, img.Config) {
			if !filepath.IsLocal(name) {
				t.Errorf("%q leads outside", name)
			}
		}
	})
}

// FuzzDockerArchive opens whole archives. What opens must also end when it is read.
func FuzzDockerArchive(f *testing.F) {
	archive := func(members map[string]string) []byte {
		var b bytes.Buffer
		m := make(map[string]member)
		for name, content := range members {
			m[name] = member{bytes: []byte(content)}
		}
		if err := writeTar(context.Background(), &b, m); err != nil {
			f.Fatal(err)
		}
		return b.Bytes()
	}
	layer := "layer"
	config := `{"rootfs":{"type":"layers","diff_ids":["` + describe([]byte(layer), "").Digest.String() + `"]}}`
	f.Add(archive(map[string]string{"c": config, "l": layer, dockerManifest: `[{"Config":"c","Layers":["l"]}]`}))
	f.Add(archive(map[string]string{"c": config, "l": "\x1f\x8bxxxx", dockerManifest: `[{"Config":"c","Layers":["l"]}]`}))
	f.Add(archive(map[string]string{layoutFile: layoutContent, indexFile: fuzzIndex}))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, raw []byte) {
		file, err := os.CreateTemp(dir, "")
		if err != nil {
			t.Fatal(err)
		}
		defer os.Remove(file.Name())
		if _, err := file.Write(raw); err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
		for _, transport := range []Transport{DockerArchive, OCIArchive} {
			img, err := Open(t.Context(), Ref{Transport: transport, Path: file.Name()}, &Options{TempDir: dir, MaxUnpacked: 1 << 20})
			if err != nil {
				continue
			}
			doc, err := parseDocument(img.raw, img.mediaType)
			if err != nil || doc.manifest == nil {
				t.Errorf("opened an image with the manifest %q: %v", img.raw, err)
				continue
			}
			for _, d := range append(doc.manifest.Layers, doc.manifest.Config) {
				rc, err := img.Blob(t.Context(), d)
				if err != nil {
					continue
				}
				n, err := io.Copy(io.Discard, rc)
				if err == nil && n != d.Size {
					t.Errorf("blob %s of %d bytes ended without an error after %d", d.Digest, d.Size, n)
				}
				rc.Close()
			}
			img.Close()
		}
	})
}
