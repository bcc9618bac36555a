package registry_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/particle-os/particle/registry"
)

// putManifest stores any manifest at all in a registry.
func putManifest(t *testing.T, addr, repo, id, mediaType string, raw []byte) v1.Descriptor {
	t.Helper()
	req, err := http.NewRequest(http.MethodPut, "http://"+addr+"/v2/"+repo+"/manifests/"+id, bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		t.Fatalf("putting manifest %s: %s", id, resp.Status)
	}
	return describe(raw, types.MediaType(mediaType))
}

func TestIndex(t *testing.T) {
	s := serve(t, "", nil)
	images := map[string]*image{}
	index := func(mediaType types.MediaType, list ...v1.Descriptor) []byte {
		return jsonOf(t, v1.IndexManifest{SchemaVersion: 2, MediaType: mediaType, Manifests: list})
	}
	entry := func(platform string) v1.Descriptor {
		m := newImage(t, false, map[string]types.MediaType{platform: types.OCILayer}, platform)
		images[platform] = m
		mustWrite(t, mustRef(t, "docker://%s/x@%s", s.Addr(), m.digest()), m, nil)
		d := describe(m.raw, m.mediaType)
		p, err := v1.ParsePlatform(platform)
		if err != nil {
			t.Fatal(err)
		}
		d.Platform = p
		return d
	}
	amd64, amd64v3, armv6, armv7, arm64, att := entry("linux/amd64"), entry("linux/amd64/v3"), entry("linux/arm/v6"), entry("linux/arm/v7"), entry("linux/arm64/v8"), entry("unknown/unknown")
	putManifest(t, s.Addr(), "x", "all", string(types.OCIImageIndex), index(types.OCIImageIndex, att, amd64v3, amd64, armv6, armv7, arm64))
	putManifest(t, s.Addr(), "x", "docker", string(types.DockerManifestList), index(types.DockerManifestList, amd64, arm64))
	inner := putManifest(t, s.Addr(), "x", "inner", string(types.OCIImageIndex), index(types.OCIImageIndex, amd64, arm64))
	putManifest(t, s.Addr(), "x", "nested", string(types.OCIImageIndex), index(types.OCIImageIndex, inner))
	inner.Platform = &v1.Platform{OS: "linux", Architecture: "riscv64"}
	putManifest(t, s.Addr(), "x", "nestedplatform", string(types.OCIImageIndex), index(types.OCIImageIndex, amd64, inner))
	deep := putManifest(t, s.Addr(), "x", "d0", string(types.OCIImageIndex), index(types.OCIImageIndex, amd64))
	for i := range 9 {
		deep = putManifest(t, s.Addr(), "x", fmt.Sprint("d", i+1), string(types.OCIImageIndex), index(types.OCIImageIndex, deep))
	}
	for _, c := range []struct{ tag, platform, want string }{
		{"all", "linux/amd64", "linux/amd64"},
		{"all", "linux/amd64/v2", "linux/amd64"},
		{"all", "linux/amd64/v3", "linux/amd64/v3"},
		{"all", "linux/amd64/v4", "linux/amd64/v3"},
		{"all", "linux/arm", "linux/arm/v7"},
		{"all", "linux/arm/v6", "linux/arm/v6"},
		{"all", "linux/arm/v8", "linux/arm/v7"},
		{"all", "linux/arm64", "linux/arm64/v8"},
		{"docker", "linux/arm64/v8", "linux/arm64/v8"},
		{"nested", "linux/amd64", "linux/amd64"},
		{"d5", "linux/amd64", "linux/amd64"},
	} {
		img := mustOpen(t, mustRef(t, "docker://%s/x:%s", s.Addr(), c.tag), &registry.Options{Platform: c.platform})
		if want := images[c.want].digest(); img.Digest() != want {
			t.Errorf("%s for %s: got %s, want %s", c.tag, c.platform, img.Digest(), want)
		}
	}
	for _, c := range []struct {
		tag, platform string
		want          error
		text          string
	}{
		{"all", "linux/s390x", registry.ErrPlatform, "linux/amd64/v3, linux/amd64, linux/arm/v6"},
		{"all", "linux/arm/v5", registry.ErrPlatform, "linux/arm/v7"},
		{"docker", "windows/amd64", registry.ErrPlatform, "there are linux/amd64, linux/arm64/v8;"},
		{"nestedplatform", "linux/riscv64", registry.ErrPlatform, "linux/arm64/v8"},
		{"all", "amd64", registry.ErrPlatform, "OS/ARCH"},
		{"all", "linux//v7", registry.ErrPlatform, "OS/ARCH"},
		{"d9", "linux/amd64", registry.ErrInvalid, "nested"},
		{"missing", "", registry.ErrNotFound, "missing"},
	} {
		_, err := registry.Open(t.Context(), mustRef(t, "docker://%s/x:%s", s.Addr(), c.tag), &registry.Options{Platform: c.platform})
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s for %s: got %v, want %v with %q", c.tag, c.platform, err, c.want, c.text)
		}
		if strings.Contains(fmt.Sprint(err), "unknown/unknown") {
			t.Errorf("%s: %v offers what is no image", c.tag, err)
		}
	}
}

// TestLayoutIndex: an index behind a tag of a layout, and an index.json that is itself
// the choice of platforms, in a directory and in archives of all compressions.
func TestLayoutIndex(t *testing.T) {
	dir := t.TempDir()
	layout := filepath.Join(dir, "l")
	var list []v1.Descriptor
	images := map[string]*image{}
	for _, arch := range []string{"amd64", "arm64"} {
		m := plainImage(t, arch)
		mustWrite(t, mustRef(t, "oci:%s:%s", layout, arch), m, nil)
		d := describe(m.raw, m.mediaType)
		d.Platform = &v1.Platform{OS: "linux", Architecture: arch}
		images[arch], list = m, append(list, d)
	}
	index := jsonOf(t, v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: list})
	desc := describe(index, types.OCIImageIndex)
	writeFile(t, filepath.Join(layout, "blobs/sha256", desc.Digest.Hex), string(index), 0o600)
	desc.Annotations = map[string]string{"org.opencontainers.image.ref.name": "all"}
	check := func(what string, ref registry.Ref) {
		t.Helper()
		for arch, m := range images {
			same(t, what, readImage(t, ref, &registry.Options{Platform: "linux/" + arch}), m)
		}
		if _, err := registry.Open(t.Context(), ref, &registry.Options{Platform: "linux/s390x"}); !errors.Is(err, registry.ErrPlatform) {
			t.Errorf("%s: got %v, want ErrPlatform", what, err)
		}
	}
	writeFile(t, filepath.Join(layout, "index.json"), string(jsonOf(t, v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{desc}})), 0o600)
	check("index behind a tag", mustRef(t, "oci:%s:all", layout))
	check("the only index", mustRef(t, "oci:%s", layout))

	writeFile(t, filepath.Join(layout, "index.json"), string(index), 0o600)
	check("index.json", mustRef(t, "oci:%s", layout))
	var entries []entry
	for _, name := range listing(t, layout) {
		if b, err := os.ReadFile(filepath.Join(layout, name)); err == nil {
			entries = append(entries, regular("./"+name, b))
		}
	}
	raw := makeTar(t, entries...)
	for name, b := range map[string][]byte{"tar": raw, "gzip": gzipped(raw), "zstd": zstandard(t, raw)} {
		file := filepath.Join(dir, name)
		writeFile(t, file, string(b), 0o600)
		check(name, mustRef(t, "oci-archive:%s", file))
	}
	list[1].Digest = describe([]byte("gone"), "").Digest
	writeFile(t, filepath.Join(layout, "index.json"), string(jsonOf(t, v1.IndexManifest{SchemaVersion: 2, Manifests: list})), 0o600)
	if _, err := registry.Open(t.Context(), mustRef(t, "oci:%s", layout), &registry.Options{Platform: "linux/arm64"}); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("a manifest that is gone: got %v, want ErrNotFound", err)
	}
}

// TestBadManifests: what is no manifest, or several things at once.
func TestBadManifests(t *testing.T) {
	s := serve(t, "", nil)
	m := ociImage(t)
	mustWrite(t, mustRef(t, "docker://%s/x:1", s.Addr()), m, nil)
	oci, index := string(types.OCIManifestSchema1), string(types.OCIImageIndex)
	config := string(jsonOf(t, m.manifest.Config))
	for name, c := range map[string]struct {
		mediaType, raw string
		want           error
	}{
		"schema 1":       {string(types.DockerManifestSchema1Signed), `{"schemaVersion":1,"fsLayers":[]}`, registry.ErrUnsupported},
		"schema 1 plain": {"text/plain", `{"schemaVersion":1,"name":"x","fsLayers":[{"blobSum":"x"}]}`, registry.ErrUnsupported},
		"no JSON":        {oci, `hello`, registry.ErrInvalid},
		"both":           {oci, `{"schemaVersion":2,"config":` + config + `,"layers":[],"manifests":[]}`, registry.ErrInvalid},
		"type differs":   {oci, `{"schemaVersion":2,"mediaType":"` + index + `","manifests":[]}`, registry.ErrInvalid},
		"no config":      {oci, `{"schemaVersion":2,"layers":[]}`, registry.ErrInvalid},
		"no digest":      {oci, `{"schemaVersion":2,"config":{"size":1},"layers":[]}`, registry.ErrInvalid},
		"negative size":  {oci, `{"schemaVersion":2,"config":` + strings.Replace(config, `"size":`, `"size":-`, 1) + `,"layers":[]}`, registry.ErrInvalid},
		"bad digest":     {oci, `{"schemaVersion":2,"config":{"size":1,"digest":"sha256:../../etc/passwd"},"layers":[]}`, registry.ErrInvalid},
		"empty index":    {index, `{"schemaVersion":2,"manifests":[]}`, registry.ErrPlatform},
		"artifact":       {"application/json", `{"schemaVersion":2,"mediaType":"application/vnd.example","layers":[]}`, registry.ErrUnsupported},
		"huge":           {oci, `{"schemaVersion":2,"x":"` + strings.Repeat("x", 5<<20) + `"}`, registry.ErrInvalid},
	} {
		putManifest(t, s.Addr(), "x", "bad", c.mediaType, []byte(c.raw))
		if _, err := registry.Open(t.Context(), mustRef(t, "docker://%s/x:bad", s.Addr()), nil); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
	// Old registries do not say what it is.
	putManifest(t, s.Addr(), "x", "plain", "application/json; charset=utf-8", m.raw)
	if img := mustOpen(t, mustRef(t, "docker://%s/x:plain", s.Addr()), nil); img.Digest() != m.digest() {
		t.Errorf("got %s, want %s", img.Digest(), m.digest())
	}
}

// TestForgedManifest: the digest in a reference and the one that the registry says.
func TestForgedManifest(t *testing.T) {
	m, other := ociImage(t), dockerImage(t)
	s := serve(t, "", &registry.ServeOptions{Wrap: func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/manifests/") {
				w.Header().Set("Docker-Content-Digest", m.digest().String())
				w.Write(other.raw)
				return
			}
			h.ServeHTTP(w, req)
		})
	}})
	for _, id := range []string{":1", "@" + m.digest().String()} {
		if _, err := registry.Open(t.Context(), mustRef(t, "docker://%s/x%s", s.Addr(), id), nil); !errors.Is(err, registry.ErrDigest) {
			t.Errorf("%s: got %v, want ErrDigest", id, err)
		}
	}
	ref := mustRef(t, "docker://%s/x:1@%s", s.Addr(), m.digest())
	if err := write(ref, other, nil); !errors.Is(err, registry.ErrReference) {
		t.Errorf("pushing another manifest than the reference's digest: got %v, want ErrReference", err)
	}
}
