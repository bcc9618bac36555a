package registry_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand"
	"os"
	"path/filepath"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"github.com/particle-os/particle/registry"
)

// An image is test data: a manifest and its blobs.
type image struct {
	raw       []byte
	mediaType types.MediaType
	manifest  v1.Manifest
	blobs     map[v1.Hash][]byte
}

func (m *image) digest() v1.Hash { return describe(m.raw, "").Digest }

func describe(b []byte, mediaType types.MediaType) v1.Descriptor {
	return v1.Descriptor{MediaType: mediaType, Size: int64(len(b)), Digest: v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%x", sha256.Sum256(b))}}
}

// layerTar is a layer with one file of n random bytes.
func layerTar(name string, n int) []byte {
	data := make([]byte, n)
	rand.New(rand.NewSource(int64(n))).Read(data)
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(n)})
	tw.Write(data)
	tw.Close()
	return b.Bytes()
}

func gzipped(b []byte) []byte {
	var out bytes.Buffer
	zw := gzip.NewWriter(&out)
	zw.Write(b)
	zw.Close()
	return out.Bytes()
}

func zstandard(t testing.TB, b []byte) []byte {
	t.Helper()
	zw, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return zw.EncodeAll(b, nil)
}

// newImage makes an image of layers, each with its media type.
func newImage(t testing.TB, docker bool, layers map[string]types.MediaType, order ...string) *image {
	t.Helper()
	m := &image{mediaType: types.OCIManifestSchema1, blobs: make(map[v1.Hash][]byte)}
	configType := types.OCIConfigJSON
	if docker {
		m.mediaType, configType = types.DockerManifestSchema2, types.DockerConfigJSON
	}
	diffIDs := []string{}
	m.manifest = v1.Manifest{SchemaVersion: 2, MediaType: m.mediaType}
	for i, name := range order {
		b := layerTar(name, 100_000*(i+1)+len(name))
		diffIDs = append(diffIDs, describe(b, "").Digest.String())
		switch layers[name] {
		case types.OCILayer, types.DockerLayer:
			b = gzipped(b)
		}
		d := describe(b, layers[name])
		m.blobs[d.Digest] = b
		m.manifest.Layers = append(m.manifest.Layers, d)
	}
	config, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{"Cmd": []string{"/" + string(m.mediaType)}}, "created": "2020-01-01T00:00:00Z",
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	})
	if err != nil {
		t.Fatal(err)
	}
	m.manifest.Config = describe(config, configType)
	m.blobs[m.manifest.Config.Digest] = config
	if m.raw, err = json.Marshal(m.manifest); err != nil {
		t.Fatal(err)
	}
	return m
}

func ociImage(t testing.TB) *image {
	return newImage(t, false, map[string]types.MediaType{"a": types.OCILayer, "b": types.OCIUncompressedLayer}, "a", "b")
}

func dockerImage(t testing.TB) *image {
	return newImage(t, true, map[string]types.MediaType{"a": types.DockerLayer, "b": types.DockerLayer}, "a", "b")
}

func mustRef(t testing.TB, format string, args ...any) registry.Ref {
	t.Helper()
	r, err := registry.ParseRef(fmt.Sprintf(format, args...))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func opener(b []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
}

// write puts an image to a reference.
func write(ref registry.Ref, m *image, opts *registry.Options) (err error) {
	ctx := context.Background()
	target, err := registry.Create(ctx, ref, opts)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, target.Close()) }()
	for _, d := range append([]v1.Descriptor{m.manifest.Config}, m.manifest.Layers...) {
		if err := target.PutBlob(ctx, d, opener(m.blobs[d.Digest])); err != nil {
			return err
		}
	}
	return target.PutManifest(ctx, m.raw, string(m.mediaType))
}

func mustWrite(t testing.TB, ref registry.Ref, m *image, opts *registry.Options) {
	t.Helper()
	if err := write(ref, m, opts); err != nil {
		t.Fatal(err)
	}
}

func mustOpen(t testing.TB, ref registry.Ref, opts *registry.Options) *registry.Image {
	t.Helper()
	img, err := registry.Open(context.Background(), ref, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	})
	return img
}

// readImage reads everything behind a reference.
func readImage(t testing.TB, ref registry.Ref, opts *registry.Options) *image {
	t.Helper()
	ctx := context.Background()
	img := mustOpen(t, ref, opts)
	raw, mediaType, err := img.Manifest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	m := &image{raw: raw, mediaType: types.MediaType(mediaType), blobs: make(map[v1.Hash][]byte)}
	if m.digest() != img.Digest() {
		t.Errorf("%s: Digest is %s, the manifest's is %s", ref, img.Digest(), m.digest())
	}
	if err := json.Unmarshal(raw, &m.manifest); err != nil {
		t.Fatal(err)
	}
	for _, d := range append([]v1.Descriptor{m.manifest.Config}, m.manifest.Layers...) {
		b := readBlob(t, img, d)
		m.blobs[d.Digest] = b
		if d.Size < 100 {
			continue
		}
		rc, err := img.BlobRange(ctx, d, 17, 50)
		if err != nil {
			t.Fatal(err)
		}
		part, err := io.ReadAll(rc)
		if err != nil || !bytes.Equal(part, b[17:67]) {
			t.Errorf("%s: range of %s: got %q, %v, want %q", ref, d.Digest, part, err, b[17:67])
		}
		rc.Close()
	}
	return m
}

func readBlob(t testing.TB, img *registry.Image, d v1.Descriptor) []byte {
	t.Helper()
	rc, err := img.Blob(context.Background(), d)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	b, err := io.ReadAll(rc)
	if err != nil {
		t.Fatal(err)
	}
	if got := describe(b, "").Digest; got != d.Digest {
		t.Errorf("blob %s came with digest %s", d.Digest, got)
	}
	return b
}

// same compares images byte by byte.
func same(t testing.TB, what string, got, want *image) {
	t.Helper()
	if !bytes.Equal(got.raw, want.raw) || got.mediaType != want.mediaType {
		t.Errorf("%s: manifest is %s of type %s, want %s of type %s", what, got.raw, got.mediaType, want.raw, want.mediaType)
	}
	for h, b := range want.blobs {
		if !bytes.Equal(got.blobs[h], b) {
			t.Errorf("%s: blob %s differs", what, h)
		}
	}
}

// listing returns the names below a directory, to see that nothing was left.
func listing(t testing.TB, dir string) []string {
	t.Helper()
	names := []string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && path != dir {
			rel, _ := filepath.Rel(dir, path)
			names = append(names, rel)
		}
		return err
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return names
}

// serve starts a registry for a test.
func serve(t testing.TB, dir string, opts *registry.ServeOptions) *registry.Server {
	t.Helper()
	s, err := registry.Serve(context.Background(), dir, "", opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

var modTime = time.Unix(1_000_000_000, 0)

func jsonOf(t testing.TB, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}
