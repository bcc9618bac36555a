package podmanext

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
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/store"
)

// requireMounts skips a test where this process may not mount composefs images.
func requireMounts(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	f := mount.Probe(os.TempDir())
	if err := f.Mountable(); err != nil {
		t.Skip(err)
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("no FUSE here: ", err)
	}
}

// A fakeImage is an image of gzip layers in memory.
type fakeImage struct {
	blobs    map[string][]byte
	manifest []byte
	layers   []string // digests
	tars     [][]byte
	opened   atomic.Int32         // layers that were opened
	wait     map[string]chan bool // a layer's blob waits for it
}

func (f *fakeImage) Manifest(context.Context) ([]byte, string, error) { return f.manifest, "", nil }

func (f *fakeImage) Blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	if d.Digest.String() != digestOf(f.config()) {
		f.opened.Add(1)
	}
	if c := f.wait[d.Digest.String()]; c != nil {
		select {
		case <-c:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	return io.NopCloser(bytes.NewReader(f.blobs[d.Digest.String()])), nil
}

func (f *fakeImage) Close() error { return nil }

func (f *fakeImage) config() []byte { return f.blobs["config"] }

func digestOf(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

// image makes an image of layers, each a list of names: "dir/", "file" (whose content
// is its name) or whiteouts. The TOC digest of each is that of its uncompressed tar's
// own digest, which no real one is.
func image(t testing.TB, layers ...[]string) *fakeImage {
	t.Helper()
	f := &fakeImage{blobs: map[string][]byte{}, wait: map[string]chan bool{}}
	var m v1.Manifest
	var diffIDs []string
	for _, names := range layers {
		var raw bytes.Buffer
		w := tar.NewWriter(&raw)
		for _, name := range names {
			h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(name)), ModTime: time.Unix(1e9, 0)}
			if strings.HasSuffix(name, "/") {
				h.Typeflag, h.Mode, h.Size = tar.TypeDir, 0o755, 0
			}
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if h.Size > 0 {
				if _, err := io.WriteString(w, name); err != nil {
					t.Fatal(err)
				}
			}
		}
		w.Close()
		var gz bytes.Buffer
		z := gzip.NewWriter(&gz)
		z.Write(raw.Bytes())
		z.Close()
		digest := digestOf(gz.Bytes())
		f.blobs[digest], f.layers, f.tars = gz.Bytes(), append(f.layers, digest), append(f.tars, raw.Bytes())
		h, err := v1.NewHash(digest)
		if err != nil {
			t.Fatal(err)
		}
		diffIDs = append(diffIDs, digestOf(raw.Bytes()))
		m.Layers = append(m.Layers, v1.Descriptor{Digest: h, Size: int64(gz.Len()), Annotations: map[string]string{
			tocAnnotations[0]: tocOf(digest),
		}})
	}
	config, err := json.Marshal(map[string]any{"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs}, "os": "linux", "architecture": "amd64"})
	if err != nil {
		t.Fatal(err)
	}
	f.blobs["config"], f.blobs[digestOf(config)] = config, config
	h, err := v1.NewHash(digestOf(config))
	if err != nil {
		t.Fatal(err)
	}
	m.SchemaVersion, m.Config = 2, v1.Descriptor{Digest: h, Size: int64(len(config))}
	if f.manifest, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	return f
}

// tocOf is the digest of the table of contents that a test's layer claims to have.
func tocOf(digest string) string { return digestOf([]byte("toc of " + digest)) }

// A fakeSource has images by reference.
type fakeSource struct {
	mu     sync.Mutex
	images map[string]*fakeImage
	opened int
}

func (s *fakeSource) Open(_ context.Context, ref string) (SourceImage, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opened++
	if img := s.images[ref]; img != nil {
		return img, nil
	}
	return nil, errors.New("no such image")
}

// An env is a layer store with all that it needs.
type env struct {
	*LayerStore
	t      *testing.T
	o      LayerStoreOptions
	source *fakeSource
}

func newEnv(t *testing.T) *env {
	requireMounts(t)
	dir := t.TempDir()
	st, err := store.Init(filepath.Join(dir, "store"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	e := &env{t: t, source: &fakeSource{images: map[string]*fakeImage{}}}
	e.o = LayerStoreOptions{
		Dir: filepath.Join(dir, "layers"), Mounts: filepath.Join(dir, "mounts"), Store: st, Source: e.source,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
	e.open()
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
		if left, _ := filepath.Glob(filepath.Join(e.o.Mounts, "[^.]*")); len(left) != 0 {
			t.Errorf("left in the directory of mounts: %q", left)
		}
	})
	return e
}

func (e *env) open() {
	e.t.Helper()
	var err error
	if e.LayerStore, err = OpenLayerStore(e.o); err != nil {
		e.t.Fatal(err)
	}
}

const testRef = "registry.example/app:1"

// content reads a file below the layer's "diff", "" if there is none.
func (e *env) content(key Key, name string) string {
	b, err := os.ReadFile(filepath.Join(e.o.Dir, key.path(), diffName, name))
	if err != nil {
		return ""
	}
	return string(b)
}
