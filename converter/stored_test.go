package converter

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/store"
)

// TestSharedConfig: two manifests of one config, as a recompressed copy has, and only
// one of them bootable. What becomes of one is no matter to the other.
func TestSharedConfig(t *testing.T) {
	st := newStore(t)
	convert(t, st, imageOf(gz, twoLayers()...), Options{Name: "a"})
	convert(t, st, imageOf(nil, twoLayers()...), Options{Name: "b", Bootable: true})
	if _, err := Remove(st, "b"); err != nil {
		t.Fatal(err)
	}
	if _, err := GC(ctx, st, store.GCOptions{}); err != nil {
		t.Fatal(err)
	}
	wantClean(t, st)
	s, err := Find(st, "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadImage(st, s, Rootfs); err != nil {
		t.Error(err)
	}
	if _, ok := s.Images["bootable"]; ok {
		t.Error("a has an image that nobody asked for")
	}
	if _, err := Export(ctx, st, s, &memTarget{}, ExportOptions{TempDir: t.TempDir()}); err != nil {
		t.Error(err)
	}
	// And a conversion of b again finds the layers, bootable or not.
	res := convert(t, st, imageOf(nil, twoLayers()...), Options{Name: "b", Bootable: true})
	if !res.Layers[0].Present || len(res.Images) != 3 {
		t.Errorf("got %+v", res)
	}
}

// TestDamagedImage: one image that cannot be read leaves the others alone, and fsck
// names it.
func TestDamagedImage(t *testing.T) {
	st := newStore(t)
	good := convert(t, st, imageOf(nil, tarOf(f("a", "1"))), Options{Name: "good"})
	bad := convert(t, st, imageOf(nil, tarOf(f("a", "2"))), Options{Name: "bad"})
	d, err := st.StreamDigest(store.ConfigPrefix + bad.Config.String())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(st.ObjectsDir(), d.Path())); err != nil {
		t.Fatal(err)
	}
	all, err := List(st)
	if err != nil || len(all) != 2 || all[0].Names[0] != "bad" || all[0].Damage == "" || all[1].Damage != "" {
		t.Errorf("List: %+v, %v", all, err)
	}
	if s, err := Find(st, good.Manifest.Hex[:12]); err != nil || s.Manifest != good.Manifest {
		t.Errorf("Find: %v", err)
	}
	if _, err := Find(st, "bad"); err == nil || !strings.Contains(err.Error(), bad.Manifest.Hex) {
		t.Errorf("Find(bad): %v", err)
	}
	if r, err := Fsck(ctx, st, store.FsckOptions{}); err != nil || r.Clean() {
		t.Errorf("fsck found nothing (%v)", err)
	}
}

// TestTwinBlobs: two blobs of the same layer are both kept, or both refused.
func TestTwinBlobs(t *testing.T) {
	l := tarOf(f("a", big(1, 5000)))
	img := imageOf(gz, l, l)
	var m v1.Manifest
	if err := json.Unmarshal(img.raw, &m); err != nil {
		t.Fatal(err)
	}
	twin := append(gz(l[:1000]), gz(l[1000:])...)
	m.Layers[1].Digest, m.Layers[1].Size = sum(twin), int64(len(twin))
	img.raw, _ = json.Marshal(m)
	img.blobs[sum(twin)] = twin

	st := newStore(t)
	convert(t, st, img, Options{Name: "x", KeepBlobs: true})
	s, err := Find(st, "x")
	if err != nil {
		t.Fatal(err)
	}
	if res, err := Export(ctx, st, s, &memTarget{}, ExportOptions{TempDir: t.TempDir()}); err != nil || !res.Same {
		t.Errorf("got %+v, %v; want the same manifest", res, err)
	}
	img.blobs[sum(twin)] = []byte("garbage")
	if _, err := Convert(ctx, img, newStore(t), Options{KeepBlobs: true}); err == nil {
		t.Error("a blob of garbage was kept")
	}
}

// TestDockerManifest becomes an OCI one where the target or the compression needs it.
func TestDockerManifest(t *testing.T) {
	img := imageOf(gz, twoLayers()...)
	raw := string(img.raw)
	for from, to := range map[types.MediaType]types.MediaType{
		types.OCIManifestSchema1: types.DockerManifestSchema2, types.OCIConfigJSON: types.DockerConfigJSON, types.OCILayer: types.DockerLayer,
	} {
		raw = strings.ReplaceAll(raw, string(from), string(to))
	}
	img.raw = []byte(raw)
	st := newStore(t)
	convert(t, st, img, Options{Name: "x", KeepBlobs: true})
	s, err := Find(st, "x")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name      string
		o         ExportOptions
		same, oci bool
		layer     types.MediaType
	}{
		{"as it is", ExportOptions{}, true, false, types.DockerLayer},
		{"OCI", ExportOptions{OCI: true}, false, true, types.OCILayer},
		{"uncompressed", ExportOptions{Compression: "none"}, false, false, types.DockerUncompressedLayer},
		{"zstd", ExportOptions{Compression: "zstd"}, false, true, types.OCILayerZStd},
		{"OCI uncompressed", ExportOptions{Compression: "none", OCI: true}, false, true, types.OCIUncompressedLayer},
	} {
		c.o.TempDir = t.TempDir()
		var target memTarget
		res, err := Export(ctx, st, s, &target, c.o)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		var m v1.Manifest
		if err := json.Unmarshal(target.raw, &m); err != nil {
			t.Fatal(err)
		}
		if res.Same != c.same || (m.MediaType == types.OCIManifestSchema1) != c.oci || (m.Config.MediaType == types.OCIConfigJSON) != c.oci || m.Layers[0].MediaType != c.layer {
			t.Errorf("%s: got %+v and manifest %s", c.name, res, target.raw)
		}
		if m.Config.Digest != s.Config {
			t.Errorf("%s: config %s, want %s", c.name, m.Config.Digest, s.Config)
		}
	}
}

// TestSHA512 runs the whole way in a store of the other algorithm.
func TestSHA512(t *testing.T) {
	st, err := store.Init(filepath.Join(t.TempDir(), "store"), store.Options{Algorithm: fsverity.SHA512})
	if err != nil {
		t.Fatal(err)
	}
	convert(t, st, imageOf(gz, twoLayers()...), Options{Name: "x", Bootable: true})
	s, err := Find(st, "x")
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range Kinds {
		tr, err := ReadImage(st, s, kind)
		if err != nil {
			t.Fatal(err)
		}
		if d := tr.Lookup("usr/bin/sh").File.Object; d.Algorithm() != fsverity.SHA512 {
			t.Errorf("%s: objects have %s digests", kind, d.Algorithm())
		}
	}
	wantClean(t, st)

	// A composefs image of that store goes into one of the other algorithm, unless an
	// object was changed.
	image, err := OpenImage(st, s, Rootfs)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	open := func(path string) (*os.File, error) { return os.Open(filepath.Join(st.ObjectsDir(), path)) }
	other := newStore(t)
	if _, err := ConvertComposefs(ctx, image, open, other, Options{Name: "y"}); err != nil {
		t.Fatal(err)
	}
	wantClean(t, other)
	tr, _ := ReadImage(st, s, Rootfs)
	name := filepath.Join(st.ObjectsDir(), tr.Lookup("usr/bin/sh").File.Object.Path())
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(name, 0o600); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ConvertComposefs(ctx, image, open, newStore(t), Options{}); err == nil || !strings.Contains(err.Error(), "changed") {
		t.Errorf("a changed object was imported: %v", err)
	}
}

// TestConcurrentKinds: conversions of one image side by side forget nothing of each
// other.
func TestConcurrentKinds(t *testing.T) {
	for range 5 {
		st := newStore(t)
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				_, err := Convert(ctx, imageOf(gz, twoLayers()...), st, Options{Name: "x", Bootable: i == 0, KeepBlobs: i == 1})
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if _, err := GC(ctx, st, store.GCOptions{}); err != nil {
			t.Fatal(err)
		}
		s, err := Find(st, "x")
		if err != nil {
			t.Fatal(err)
		}
		if res, err := Export(ctx, st, s, &memTarget{}, ExportOptions{TempDir: t.TempDir()}); len(s.Images) != 3 || err != nil || !res.Same {
			t.Fatalf("images %v, export %+v, %v", s.Images, res, err)
		}
		wantClean(t, st)
	}
}

// TestConvertDirGuards: a directory with the store in it is refused.
func TestConvertDirGuards(t *testing.T) {
	dir := t.TempDir()
	st, err := store.Init(filepath.Join(dir, "var/store"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ConvertDir(ctx, dir, st, Options{}); err == nil || !strings.Contains(err.Error(), "--store") {
		t.Errorf("got %v", err)
	}
	if _, err := ConvertDir(ctx, filepath.Join(dir, "var/store/objects"), st, Options{}); err != nil {
		t.Errorf("a directory in the store: %v", err)
	}
	if _, err := ConvertTar(ctx, strings.NewReader(""), 0, st, Options{Name: strings.Repeat("/", 100)}); err == nil {
		t.Error("a name that no file can have was accepted")
	}
}
