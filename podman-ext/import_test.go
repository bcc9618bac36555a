package podmanext

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/layer"
	"github.com/particle-os/particle/converter/store"
)

// memImage is an image whose layers are uncompressed tars in memory.
type memImage struct {
	manifest []byte
	blobs    map[string][]byte
	diffIDs  []string
}

func (m *memImage) Manifest(context.Context) ([]byte, string, error) { return m.manifest, "", nil }

func (m *memImage) Blob(_ context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(m.blobs[d.Digest.String()])), nil
}

func sha(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func hashed(t testing.TB, b []byte) v1.Hash {
	h, err := v1.NewHash(sha(b))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// newMemImage makes an image of tars.
func newMemImage(t testing.TB, layers ...[]byte) *memImage {
	m := &memImage{blobs: map[string][]byte{}}
	config := v1.ConfigFile{Architecture: "amd64", OS: "linux", RootFS: v1.RootFS{Type: "layers"}}
	manifest := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1}
	for _, l := range layers {
		h := hashed(t, l)
		m.blobs[h.String()] = l
		m.diffIDs = append(m.diffIDs, h.String())
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, h)
		manifest.Layers = append(manifest.Layers, v1.Descriptor{MediaType: types.OCIUncompressedLayer, Digest: h, Size: int64(len(l))})
	}
	raw, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	h := hashed(t, raw)
	m.blobs[h.String()] = raw
	manifest.Config = v1.Descriptor{MediaType: types.OCIConfigJSON, Digest: h, Size: int64(len(raw))}
	if m.manifest, err = json.Marshal(manifest); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *memImage) id() string {
	var manifest v1.Manifest
	if err := json.Unmarshal(m.manifest, &manifest); err != nil {
		panic(err)
	}
	return manifest.Config.Digest.Hex
}

type tarFile struct {
	h    tar.Header
	body string
}

func tarOf(t testing.TB, files ...tarFile) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		f.h.Size = int64(len(f.body))
		if f.h.Typeflag == 0 {
			f.h.Typeflag = tar.TypeReg
		}
		if f.h.Mode == 0 {
			f.h.Mode = 0o644
		}
		if err := w.WriteHeader(&f.h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	b.Write(make([]byte, 5*512)) // what follows the end belongs to the layer, too
	return b.Bytes()
}

func testLayers(t testing.TB) [][]byte {
	big := strings.Repeat("0123456789abcdef", 20000)
	return [][]byte{
		tarOf(t,
			tarFile{tar.Header{Name: "usr/", Typeflag: tar.TypeDir, Mode: 0o755}, ""},
			tarFile{tar.Header{Name: "./usr/big", Mode: 0o4755, Uid: 7, PAXRecords: map[string]string{"SCHILY.xattr.user.x": "y"}}, big},
			tarFile{tar.Header{Name: "usr/small"}, "sixty-four bytes or less"},
			tarFile{tar.Header{Name: "usr/empty"}, ""},
			tarFile{tar.Header{Name: "usr/hard", Typeflag: tar.TypeLink, Linkname: "./usr/big"}, ""},
			tarFile{tar.Header{Name: "usr/sym", Typeflag: tar.TypeSymlink, Linkname: "../etc/passwd"}, ""},
			tarFile{tar.Header{Name: "fifo", Typeflag: tar.TypeFifo}, ""},
			tarFile{tar.Header{Name: "usr/\xffname"}, "a name that is no UTF-8, and a body over 64 bytes: 0123456789012345678901234567890123456789"},
		),
		tarOf(t,
			tarFile{tar.Header{Name: "usr/.wh.small"}, ""},
			tarFile{tar.Header{Name: "usr/new"}, strings.Repeat("n", 65)},
			tarFile{tar.Header{Name: "etc/passwd"}, strings.Repeat("p", 5000)},
		),
	}
}

// podmanStorage lays an image out as podman's overlay driver does, and returns the
// graph root.
func podmanStorage(t testing.TB, m *memImage) string {
	root := t.TempDir()
	mkdir := func(elem ...string) string {
		dir := filepath.Join(append([]string{root}, elem...)...)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	put := func(path string, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var layers []layerRecord
	parent := ""
	for i, diffID := range m.diffIDs {
		id := fmt.Sprintf("%064x", i+1)
		layers = append(layers, layerRecord{ID: id, Parent: parent, DiffDigest: diffID})
		parent = id
		diff := mkdir("overlay", id, "diff")
		extract(t, m.blobs[diffID], diff)
		var split bytes.Buffer
		z := gzip.NewWriter(&split)
		if err := errors.Join(splitTar(bytes.NewReader(m.blobs[diffID]), z), z.Close()); err != nil {
			t.Fatal(err)
		}
		put(filepath.Join(mkdir("overlay-layers"), id+".tar-split.gz"), split.Bytes())
	}
	table, err := json.Marshal(layers)
	if err != nil {
		t.Fatal(err)
	}
	put(filepath.Join(root, "overlay-layers", "layers.json"), table)
	if table, err = json.Marshal([]imageRecord{{ID: m.id(), Layer: parent}}); err != nil {
		t.Fatal(err)
	}
	data := mkdir("overlay-images", m.id())
	put(filepath.Join(root, "overlay-images", "images.json"), table)
	put(filepath.Join(data, "manifest"), m.manifest)
	put(filepath.Join(data, dataName("sha256:"+m.id())), m.blobs["sha256:"+m.id()])
	return root
}

// extract unpacks regular files and links; of the rest podman's files say nothing
// that an import reads.
func extract(t testing.TB, data []byte, dir string) {
	r := tar.NewReader(bytes.NewReader(data))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, h.Name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		switch h.Typeflag {
		case tar.TypeReg:
			body, err := io.ReadAll(r)
			if err == nil {
				err = os.WriteFile(path, body, 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		case tar.TypeSymlink:
			if err := os.Symlink(h.Linkname, path); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func newStore(t testing.TB) *store.Store {
	st, err := store.Init(filepath.Join(t.TempDir(), "store"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// entriesOf lists streams and images of a store with their digests.
func entriesOf(t testing.TB, st *store.Store) map[string]string {
	all := map[string]string{}
	for _, list := range []func() ([]store.Entry, error){st.Streams, st.Images} {
		entries, err := list()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			all[e.ID] = e.Digest.String()
		}
	}
	return all
}

// TestLocalImage: what podman has unpacked becomes the very streams and images that
// the image's tars become.
func TestLocalImage(t *testing.T) {
	m := newMemImage(t, testLayers(t)...)
	want, got := newStore(t), newStore(t)
	if _, err := converter.Convert(t.Context(), m, want, converter.Options{Name: "x"}); err != nil {
		t.Fatal(err)
	}
	root := podmanStorage(t, m)
	for _, link := range []bool{false, true} {
		img, err := OpenLocal(root, m.id())
		if err != nil {
			t.Fatal(err)
		}
		img.Link = link
		if link {
			got = newStore(t)
		}
		res, err := converter.Convert(t.Context(), img, got, converter.Options{Name: "x"})
		if err != nil {
			t.Fatal(err)
		}
		if a, b := entriesOf(t, want), entriesOf(t, got); !maps.Equal(a, b) || len(a) != 6 {
			t.Errorf("link=%v: got %v, want %v", link, b, a)
		}
		if len(res.Layers) != 2 || res.Layers[0].Present || res.NewObjects == 0 {
			t.Errorf("link=%v: got %+v, want two new layers", link, res)
		}
		if linked := linkedTo(t, got, filepath.Join(root, "overlay", fmt.Sprintf("%064x", 1), "diff", "usr", "big")); linked != link {
			t.Errorf("link=%v: the file is hard-linked: %v", link, linked)
		}
	}
	// A second time nothing is read.
	if err := os.RemoveAll(filepath.Join(root, "overlay")); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenLocal(root, m.id()); !errors.Is(err, ErrUnreadable) {
		t.Errorf("without layers: got %v, want ErrUnreadable", err)
	}
}

// linkedTo reports whether an object of a store is the file.
func linkedTo(t *testing.T, st *store.Store, path string) bool {
	want, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	found := false
	err = filepath.WalkDir(st.ObjectsDir(), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		found = found || err == nil && os.SameFile(want, fi)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestLocalImageLinkPrivate: no files are linked into a store that others may enter,
// where a setuid program would be theirs to run.
func TestLocalImageLinkPrivate(t *testing.T) {
	m := newMemImage(t, testLayers(t)...)
	root, st := podmanStorage(t, m), newStore(t)
	if err := os.Chmod(st.Dir(), 0o711); err != nil {
		t.Fatal(err)
	}
	img, err := OpenLocal(root, m.id())
	if err != nil {
		t.Fatal(err)
	}
	img.Link = true
	if _, err := converter.Convert(t.Context(), img, st, converter.Options{}); err != nil {
		t.Fatal(err)
	}
	if linkedTo(t, st, filepath.Join(root, "overlay", fmt.Sprintf("%064x", 1), "diff", "usr", "big")) {
		t.Error("a file of podman's was linked into a store that is open to others")
	}
}

// TestLocalImageRefused: a storage that is not what its tables say ends in an error
// that says so, and leaves nothing in the store.
func TestLocalImageRefused(t *testing.T) {
	first := fmt.Sprintf("%064x", 1)
	for name, c := range map[string]struct {
		change func(root string) error
		want   error
	}{
		"a changed file": {func(root string) error {
			return os.WriteFile(filepath.Join(root, "overlay", first, "diff/usr/big"), bytes.Repeat([]byte("x"), 320000), 0o600)
		}, layer.ErrDiffID},
		"a changed small file": {func(root string) error {
			return os.WriteFile(filepath.Join(root, "overlay", first, "diff/usr/small"), bytes.Repeat([]byte("x"), 24), 0o600)
		}, layer.ErrDiffID},
		"a shorter file": {func(root string) error {
			return os.Truncate(filepath.Join(root, "overlay", first, "diff/usr/big"), 70)
		}, ErrUnreadable},
		"a missing file": {func(root string) error {
			return os.Remove(filepath.Join(root, "overlay", first, "diff/usr/big"))
		}, ErrUnreadable},
		"a link out of the layer": {func(root string) error {
			path := filepath.Join(root, "overlay", first, "diff/usr/big")
			return errors.Join(os.Remove(path), os.Symlink("/etc/passwd", path))
		}, ErrUnreadable},
		"no headers": {func(root string) error {
			return os.Remove(filepath.Join(root, "overlay-layers", first+".tar-split.gz"))
		}, ErrUnreadable},
		"cut headers": {func(root string) error {
			return os.Truncate(filepath.Join(root, "overlay-layers", first+".tar-split.gz"), 200)
		}, ErrUnreadable},
		"a layer of a layer store": {func(root string) error {
			path := filepath.Join(root, "overlay", first, "diff")
			return errors.Join(os.Rename(path, path+"x"), os.Symlink(path+"x", path))
		}, ErrUnreadable},
		"a composefs layer": {func(root string) error {
			return os.Mkdir(filepath.Join(root, "overlay", first, "composefs-data"), 0o700)
		}, ErrUnreadable},
		"a circle of layers": {func(root string) error {
			path := filepath.Join(root, "overlay-layers/layers.json")
			raw, err := os.ReadFile(path)
			return errors.Join(err, os.WriteFile(path, bytes.Replace(raw, []byte(`"id":"`+first+`"`), []byte(`"id":"`+first+`","parent":"`+first+`"`), 1), 0o600))
		}, ErrUnreadable},
		"a table that is none": {func(root string) error {
			return os.WriteFile(filepath.Join(root, "overlay-images/images.json"), []byte("{"), 0o600)
		}, ErrUnreadable},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMemImage(t, testLayers(t)...)
			root, st := podmanStorage(t, m), newStore(t)
			if err := c.change(root); err != nil {
				t.Fatal(err)
			}
			img, err := OpenLocal(root, m.id())
			if err == nil {
				_, err = converter.Convert(t.Context(), img, st, converter.Options{})
			}
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if got := entriesOf(t, st); len(got) != 0 {
				t.Errorf("the store has %v", got)
			}
		})
	}
}

// TestLocalImageCancel: a cancelled import ends and leaves nothing.
func TestLocalImageCancel(t *testing.T) {
	m := newMemImage(t, testLayers(t)...)
	root, st := podmanStorage(t, m), newStore(t)
	img, err := OpenLocal(root, m.id())
	if err != nil {
		t.Fatal(err)
	}
	why := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	_, err = converter.Convert(ctx, img, st, converter.Options{Progress: onEvent(func(e converter.Event) {
		if e.State == converter.LayerStarted {
			cancel(why)
		}
	})})
	if !errors.Is(err, why) {
		t.Errorf("got %v, want %v", err, why)
	}
	if got := entriesOf(t, st); len(got) != 0 {
		t.Errorf("the store has %v", got)
	}
}

type onEvent func(converter.Event)

func (f onEvent) Progress(e converter.Event) { f(e) }

func TestParseInfo(t *testing.T) {
	for text, want := range map[string]error{
		`{"store":{"graphRoot":"/g","graphDriverName":"overlay"}}`:                                 nil,
		`{"store":{"graphRoot":"/g","graphDriverName":"vfs"}}`:                                     ErrUnreadable,
		`{"host":{"serviceIsRemote":true},"store":{"graphRoot":"/g","graphDriverName":"overlay"}}`: ErrUnreadable,
	} {
		got, err := parseInfo([]byte(text), true)
		if !errors.Is(err, want) || err == nil && got.GraphRoot != "/g" {
			t.Errorf("%s: got %+v, %v, want %v", text, got, err, want)
		}
	}
}

// FuzzTarSplit: whatever a layer's headers say, reading them ends, and asks for no
// file outside of the layer.
func FuzzTarSplit(f *testing.F) {
	for _, l := range testLayers(f) {
		var split bytes.Buffer
		if err := splitTar(bytes.NewReader(l), &split); err != nil {
			f.Fatal(err)
		}
		f.Add(split.Bytes())
	}
	f.Add([]byte(`{"type":1,"name":"../../etc/shadow","size":5}{"type":1,"name":"/","size":1}{"type":1,"name":"x","size":-1}{"type":3}`))
	f.Fuzz(func(t *testing.T, doc []byte) {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		if _, err := w.Write(doc); err != nil {
			t.Fatal(err)
		}
		w.Close()
		_ = parseTarSplit(&z, func(p *piece) error {
			if p.file != "" && (!filepath.IsLocal(p.file) || p.size <= 0) {
				t.Errorf("file %q of %d bytes", p.file, p.size)
			}
			return nil
		})
	})
}
