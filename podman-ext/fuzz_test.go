package podmanext

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzKey: names in the layer store are podman's or refused, and never lead elsewhere.
func FuzzKey(f *testing.F) {
	f.Add(encodeRef("docker.io/library/debian:13"), digestOf(nil))
	f.Add(encodeRef("localhost:5000/a/b@"+digestOf(nil)), digestOf(nil))
	f.Add("Li4vLi4v", "sha256:..")
	f.Add("ZG9ja2VyLmlvL3g6MQ=", "sha256:ABC")
	f.Fuzz(func(t *testing.T, name, digest string) {
		ref, err := decodeRef(name)
		if err != nil || checkDigest(digest) != nil {
			return
		}
		p := Key{ref, digest}.path()
		if !filepath.IsLocal(p) || p != name+"/"+digest || strings.Count(p, "/") != 1 || len(name) > 255 {
			t.Errorf("%q and %q give the path %q", name, digest, p)
		}
		if !IsReference(ref) {
			t.Errorf("%q is no reference", ref)
		}
	})
}

// FuzzDescribe: manifests and configs of registries.
func FuzzDescribe(f *testing.F) {
	img := image(f, []string{"a"}, []string{"b"})
	f.Add(img.manifest, img.config())
	f.Add([]byte(`{"schemaVersion":2,"layers":[{"digest":"sha256:x","size":-1}]}`), []byte(`{"rootfs":{"diff_ids":[""]}}`))
	f.Add([]byte("null"), []byte("[]"))
	f.Fuzz(func(t *testing.T, manifest, config []byte) {
		layers, err := describe(manifest, config)
		if err != nil {
			return
		}
		r := &resolved{layers: layers}
		for i, l := range layers {
			if checkDigest(l.digest) != nil || checkDigest(l.diffID) != nil || l.size < 0 || l.toc != "" && checkDigest(l.toc) != nil {
				t.Errorf("layer %d: %+v", i, l)
			}
			if k := r.find(l.digest); k < i {
				t.Errorf("layer %d is found as %d", i, k)
			}
			_ = r.chain(i)
		}
		if r.find("") >= 0 {
			t.Error("no digest is the digest of a layer")
		}
	})
}

// FuzzInfo: files that lie in the layer store's directory.
func FuzzInfo(f *testing.F) {
	f.Add(encodeLayerInfo(LayerInfo{DiffID: digestOf(nil), Size: 3, UIDs: []uint32{0, 1 << 31}}))
	f.Add([]byte(`{"diff-digest":"sha256:","diff-size":-1}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		info, err := parseLayerInfo(raw)
		if err != nil {
			return
		}
		again, err := parseLayerInfo(encodeLayerInfo(info))
		if err != nil || fmt.Sprint(again) != fmt.Sprint(info) {
			t.Errorf("%+v becomes %+v: %v", info, again, err)
		}
	})
}
