package converter

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"github.com/particle-os/particle/converter/store"
)

// An ent is one entry of a layer; ents are made by the functions below.
type ent struct {
	tar.Header
	body string
}

func d(name string) ent {
	return ent{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}}
}

func f(name, body string) ent {
	return ent{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(body))}, body: body}
}

func link(name, target string) ent {
	return ent{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}}
}

func symlink(name, target string) ent {
	return ent{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

// tarOf writes a layer, dated so that one layer's bytes are always the same.
func tarOf(ents ...ent) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range ents {
		h := e.Header
		h.ModTime = time.Unix(1_700_000_000, 0)
		if err := w.WriteHeader(&h); err != nil {
			panic(fmt.Sprintf("%s: %v", h.Name, err))
		}
		io.WriteString(w, e.body)
	}
	w.Close()
	return b.Bytes()
}

func gz(b []byte) []byte {
	var out bytes.Buffer
	w, _ := gzip.NewWriterLevel(&out, 5) // not the level that Particle uses
	w.Write(b)
	w.Close()
	return out.Bytes()
}

func zst(b []byte) []byte {
	w, _ := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest))
	return w.EncodeAll(b, nil)
}

func sum(b []byte) v1.Hash {
	s := sha256.Sum256(b)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(s[:])}
}

// A memImage is an Image in memory. Its blobs are given as they are: what checks
// digests for a real one is package registry.
type memImage struct {
	raw   []byte
	blobs map[v1.Hash][]byte
	// opened counts how often each blob was read.
	mu     sync.Mutex
	opened map[v1.Hash]int
}

// imageOf makes an image of layers; compress may be nil.
func imageOf(compress func([]byte) []byte, layers ...[]byte) *memImage {
	mediaType := types.OCIUncompressedLayer
	if compress != nil {
		mediaType = types.OCILayer
	}
	img := &memImage{blobs: map[v1.Hash][]byte{}, opened: map[v1.Hash]int{}}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1}
	c := v1.ConfigFile{Architecture: "amd64", OS: "linux", RootFS: v1.RootFS{Type: "layers"}}
	for _, l := range layers {
		blob := l
		if compress != nil {
			blob = compress(l)
		}
		if len(blob) > 4 && bytes.Equal(blob[:4], []byte{0x28, 0xb5, 0x2f, 0xfd}) {
			mediaType = types.OCILayerZStd
		}
		img.blobs[sum(blob)] = blob
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: mediaType, Digest: sum(blob), Size: int64(len(blob))})
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, sum(l))
	}
	config, _ := json.Marshal(c)
	img.blobs[sum(config)] = config
	m.Config = v1.Descriptor{MediaType: types.OCIConfigJSON, Digest: sum(config), Size: int64(len(config))}
	img.raw, _ = json.MarshalIndent(m, "", "   ") // as no encoder of ours writes it
	return img
}

func (m *memImage) Manifest(context.Context) ([]byte, string, error) {
	return m.raw, string(types.OCIManifestSchema1), nil
}

func (m *memImage) Blob(_ context.Context, desc v1.Descriptor) (io.ReadCloser, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.opened[desc.Digest]++
	b, ok := m.blobs[desc.Digest]
	if !ok {
		return nil, fmt.Errorf("no blob %s: %w", desc.Digest, os.ErrNotExist)
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

// A memTarget is a Target in memory.
type memTarget struct {
	mu    sync.Mutex
	blobs map[v1.Hash][]byte
	raw   []byte
}

func (m *memTarget) PutBlob(_ context.Context, desc v1.Descriptor, open func() (io.ReadCloser, error)) error {
	r, err := open()
	if err != nil {
		return err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if got := sum(b); got != desc.Digest || int64(len(b)) != desc.Size {
		return fmt.Errorf("blob has %s and %d bytes, want %s and %d", got, len(b), desc.Digest, desc.Size)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.blobs == nil {
		m.blobs = map[v1.Hash][]byte{}
	}
	m.blobs[desc.Digest] = b
	return nil
}

func (m *memTarget) PutManifest(_ context.Context, raw []byte, _ string) error {
	m.raw = raw
	return nil
}

// image returns what was put as an image.
func (m *memTarget) image() *memImage {
	return &memImage{raw: m.raw, blobs: m.blobs, opened: map[v1.Hash]int{}}
}

func newStore(t testing.TB) *store.Store {
	t.Helper()
	st, err := store.Init(filepath.Join(t.TempDir(), "store"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// files lists all files of a directory with their sizes.
func files(t testing.TB, dir string) map[string]int64 {
	t.Helper()
	all := map[string]int64{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		if e.IsDir() {
			all[rel+"/"] = 0
		} else {
			all[rel] = fi.Size()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// wantClean fails unless fsck, reading everything, finds nothing.
func wantClean(t testing.TB, st *store.Store) {
	t.Helper()
	report, err := Fsck(context.Background(), st, store.FsckOptions{Scrub: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range report.Problems {
		t.Errorf("fsck: %+v", p)
	}
}

// big is a body that becomes an object.
func big(seed byte, n int) string {
	b := make([]byte, n)
	x := uint32(seed) + 1
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return string(b)
}
