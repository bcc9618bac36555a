package registry_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/particle-os/particle/registry"
)

// TestAborted: whatever goes wrong before the end of PutManifest leaves the place as
// it was, byte for byte.
func TestAborted(t *testing.T) {
	m, before := ociImage(t), plainImage(t, "before")
	for _, form := range []string{"oci:%s/new", "oci:%s/old:1", "oci-archive:%s/new.tar:1", "oci-archive:%s/old.tar:1", "docker-archive:%s/new.tar:x", "docker-archive:%s/old.tar:x"} {
		for name, step := range map[string]func(target registry.Target) error{
			"nothing put": func(registry.Target) error { return nil },
			"no manifest": func(target registry.Target) error {
				for _, b := range m.blobs {
					if err := target.PutBlob(t.Context(), describe(b, ""), opener(b)); err != nil {
						return err
					}
				}
				return nil
			},
			"bad blob": func(target registry.Target) error {
				d := m.manifest.Layers[0]
				err := target.PutBlob(t.Context(), d, opener(m.blobs[d.Digest][1:]))
				if !errors.Is(err, registry.ErrDigest) {
					return fmt.Errorf("got %v, want ErrDigest", err)
				}
				return nil
			},
			"blob missing": func(target registry.Target) error {
				d := m.manifest.Config
				if err := target.PutBlob(t.Context(), d, opener(m.blobs[d.Digest])); err != nil {
					return err
				}
				if err := target.PutManifest(t.Context(), m.raw, string(m.mediaType)); !errors.Is(err, registry.ErrNotFound) {
					return fmt.Errorf("got %v, want ErrNotFound", err)
				}
				return nil
			},
			"no image": func(target registry.Target) error {
				if err := target.PutManifest(t.Context(), []byte(`{"schemaVersion":2,"manifests":[]}`), ""); !errors.Is(err, registry.ErrUnsupported) {
					return fmt.Errorf("got %v, want ErrUnsupported", err)
				}
				return nil
			},
			"source fails": func(target registry.Target) error {
				wrong := errors.New("tape torn")
				err := target.PutBlob(t.Context(), m.manifest.Layers[0], func() (io.ReadCloser, error) { return nil, wrong })
				if !errors.Is(err, wrong) {
					return fmt.Errorf("got %v, want the source's error", err)
				}
				return nil
			},
		} {
			dir := t.TempDir()
			ref := mustRef(t, form, dir)
			if strings.HasPrefix(filepath.Base(ref.Path), "old") {
				mustWrite(t, ref, before, nil)
			}
			want := listing(t, dir)
			target, err := registry.Create(t.Context(), ref, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := step(target); err != nil {
				t.Errorf("%s, %s: %v", form, name, err)
			}
			if err := target.Close(); err != nil {
				t.Errorf("%s, %s: %v", form, name, err)
			}
			if got := listing(t, dir); !slices.Equal(got, want) {
				t.Errorf("%s, %s: files are %q, before %q", form, name, got, want)
			}
			if strings.HasPrefix(filepath.Base(ref.Path), "old") {
				if got := readImage(t, ref, nil); got.manifest.Config.Digest != before.manifest.Config.Digest {
					t.Errorf("%s, %s: the old image is gone", form, name)
				}
			}
			if err := target.PutBlob(t.Context(), m.manifest.Config, opener(m.blobs[m.manifest.Config.Digest])); err == nil {
				t.Errorf("%s, %s: a blob was put after Close", form, name)
			}
		}
	}
}

func TestLayoutTags(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "l")
	one, two := plainImage(t, "one"), plainImage(t, "two2")
	mustWrite(t, mustRef(t, "oci:%s:a", dir), one, nil)
	mustWrite(t, mustRef(t, "oci:%s:b", dir), two, nil)
	mustWrite(t, mustRef(t, "oci:%s:a", dir), two, nil)
	mustWrite(t, mustRef(t, "oci:%s", dir), one, nil)
	mustWrite(t, mustRef(t, "oci:%s", dir), one, nil)
	same(t, "replaced", readImage(t, mustRef(t, "oci:%s:a", dir), nil), two)
	raw, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var index v1.IndexManifest
	if err := json.Unmarshal(raw, &index); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range index.Manifests {
		got = append(got, d.Annotations["org.opencontainers.image.ref.name"]+" "+d.Digest.String())
	}
	want := []string{"a " + two.digest().String(), "b " + two.digest().String(), " " + one.digest().String()}
	if !slices.Equal(got, want) {
		t.Errorf("index.json has %q, want %q", got, want)
	}
}

// TestLayoutPlaces: only layouts, empty and new directories are written to.
func TestLayoutPlaces(t *testing.T) {
	m := ociImage(t)
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "home/letter"), "dear", 0o600)
	writeFile(t, filepath.Join(dir, "v2/oci-layout"), `{"imageLayoutVersion":"2.0.0"}`, 0o600)
	for path, want := range map[string]error{"home": registry.ErrInvalid, "v2": registry.ErrUnsupported} {
		before := listing(t, dir)
		if err := write(mustRef(t, "oci:%s/%s", dir, path), m, nil); !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", path, err, want)
		}
		if got := listing(t, dir); !slices.Equal(got, before) {
			t.Errorf("%s: files are %q, before %q", path, got, before)
		}
	}
	if err := write(mustRef(t, "oci:%s/home/letter/x", dir), m, nil); err == nil {
		t.Error("a layout below a file")
	}
	if err := os.Mkdir(filepath.Join(dir, "empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, mustRef(t, "oci:%s/empty", dir), m, nil)
	for _, bad := range []string{"oci:%s/empty:@0", "docker-archive:%s/a.tar:@0"} {
		if err := write(mustRef(t, bad, dir), m, nil); !errors.Is(err, registry.ErrReference) {
			t.Errorf("%s: got %v, want ErrReference", bad, err)
		}
	}
}

// TestSideBySide: writers of one layout lose nothing of each other, and blobs of one
// target may be put at the same time, also the same blob.
func TestSideBySide(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "l")
	m := ociImage(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			target, err := registry.Create(t.Context(), mustRef(t, "oci:%s:t%d", dir, i), nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer target.Close()
			var blobs sync.WaitGroup
			for range 3 {
				for _, b := range m.blobs {
					blobs.Go(func() {
						if err := target.PutBlob(t.Context(), describe(b, ""), opener(b)); err != nil {
							t.Error(err)
						}
					})
				}
			}
			blobs.Wait()
			if err := target.PutManifest(t.Context(), m.raw, string(m.mediaType)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for i := range 8 {
		same(t, fmt.Sprint(i), readImage(t, mustRef(t, "oci:%s:t%d", dir, i), nil), m)
	}
	want := []string{"blobs", "blobs/sha256", "index.json", "oci-layout"}
	for h := range m.blobs {
		want = append(want, "blobs/sha256/"+h.Hex)
	}
	want = append(want, "blobs/sha256/"+m.digest().Hex)
	slices.Sort(want)
	got := listing(t, dir)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("files are %q, want %q", got, want)
	}
}

// TestArchiveBytes: an OCI archive has sorted names, no times, and only the image.
func TestArchiveBytes(t *testing.T) {
	m := ociImage(t)
	dir := t.TempDir()
	var files [2][]byte
	for i := range files {
		ref := mustRef(t, "oci-archive:%s/%d.tar:1", dir, i)
		target, err := registry.Create(t.Context(), ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer target.Close()
		stray := []byte(fmt.Sprint("not of this image ", i))
		m.blobs[describe(stray, "").Digest] = stray
		for _, b := range m.blobs { // in another order each time
			if err := target.PutBlob(t.Context(), describe(b, ""), opener(b)); err != nil {
				t.Fatal(err)
			}
		}
		if err := target.PutManifest(t.Context(), m.raw, string(m.mediaType)); err != nil {
			t.Fatal(err)
		}
		if files[i], err = os.ReadFile(ref.Path); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(files[0], files[1]) {
		t.Error("two archives of one image differ")
	}
	if bytes.Contains(files[0], []byte("not of this image")) {
		t.Error("the archive holds a blob that is not the image's")
	}
}

// TestUnpackLimit: a layer that unpacks without end stops at the limit, one that just
// reaches it does not.
func TestUnpackLimit(t *testing.T) {
	m := ociImage(t)
	size := int64(len(layerTar("a", 100_001)))
	dir := t.TempDir()
	for limit, want := range map[int64]error{size - 1: registry.ErrInvalid, 1 << 20: nil} {
		err := write(mustRef(t, "docker-archive:%s/a.tar", dir), m, &registry.Options{MaxUnpacked: limit})
		if !errors.Is(err, want) {
			t.Errorf("limit %d: got %v, want %v", limit, err, want)
		}
	}
}

// TestDockerArchiveRefuses: what the form cannot hold.
func TestDockerArchiveRefuses(t *testing.T) {
	m := ociImage(t)
	// A config that does not fit the layers.
	forged := *m
	config := bytes.Clone(m.blobs[m.manifest.Config.Digest])
	i := bytes.Index(config, []byte("sha256:")) + len("sha256:")
	if config[i]++; config[i] == '9'+1 || config[i] == 'f'+1 {
		config[i] = '0'
	}
	forged.manifest.Config = describe(config, m.manifest.Config.MediaType)
	forged.blobs = map[v1.Hash][]byte{forged.manifest.Config.Digest: config}
	for _, l := range m.manifest.Layers {
		forged.blobs[l.Digest] = m.blobs[l.Digest]
	}
	forged.raw = jsonOf(t, forged.manifest)
	dir := t.TempDir()
	if err := write(mustRef(t, "docker-archive:%s/a.tar", dir), &forged, nil); !errors.Is(err, registry.ErrDigest) {
		t.Errorf("wrong diffID: got %v, want ErrDigest", err)
	}
	artifact := *m
	artifact.manifest.Config.MediaType = "application/vnd.oci.empty.v1+json"
	artifact.raw = jsonOf(t, artifact.manifest)
	if err := write(mustRef(t, "docker-archive:%s/a.tar", dir), &artifact, nil); !errors.Is(err, registry.ErrUnsupported) {
		t.Errorf("artifact: got %v, want ErrUnsupported", err)
	}
	if got := listing(t, dir); len(got) > 0 {
		t.Errorf("%q is left", got)
	}
}
