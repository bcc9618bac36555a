package converter

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/particle-os/particle/converter/tree"
)

// A largeImage makes its layers anew each time they are read.
type largeImage struct {
	config []byte
	raw    []byte
	layers map[v1.Hash]func(io.Writer) error
}

func newGenerated(layers ...func(io.Writer) error) *largeImage {
	img := &largeImage{layers: map[v1.Hash]func(io.Writer) error{}}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1}
	c := v1.ConfigFile{Architecture: "amd64", OS: "linux", RootFS: v1.RootFS{Type: "layers"}}
	for _, write := range layers {
		n, h := new(count), sha256.New()
		if err := write(io.MultiWriter(n, h)); err != nil {
			panic(err)
		}
		digest := v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(h.Sum(nil))}
		img.layers[digest] = write
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: types.OCIUncompressedLayer, Digest: digest, Size: int64(*n)})
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, digest)
	}
	img.config, _ = json.Marshal(c)
	m.Config = v1.Descriptor{MediaType: types.OCIConfigJSON, Digest: sum(img.config), Size: int64(len(img.config))}
	img.raw, _ = json.Marshal(m)
	return img
}

type count int64

func (c *count) Write(p []byte) (int, error) { *c += count(len(p)); return len(p), nil }

func (l *largeImage) Manifest(context.Context) ([]byte, string, error) {
	return l.raw, string(types.OCIManifestSchema1), nil
}

func (l *largeImage) Blob(_ context.Context, desc v1.Descriptor) (io.ReadCloser, error) {
	write, ok := l.layers[desc.Digest]
	if !ok {
		return io.NopCloser(bytes.NewReader(l.config)), nil
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(write(w)) }()
	return r, nil
}

// noise writes n random bytes, the same for the same seed.
func noise(w io.Writer, seed uint64, n int64) error {
	_, err := io.Copy(w, io.LimitReader(rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}), n))
	return err
}

// newLargeImage is an image of 2 GiB: one large file, and many middling ones in
// another layer.
func newLargeImage() *largeImage {
	return newGenerated(
		func(w io.Writer) error {
			tw := tar.NewWriter(w)
			const size = 2 << 30
			if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "large", Mode: 0o644, Size: size}); err != nil {
				return err
			}
			if err := noise(tw, 1, size); err != nil {
				return err
			}
			return tw.Close()
		},
		func(w io.Writer) error {
			tw := tar.NewWriter(w)
			for i := range 64 {
				if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("f%d", i), Mode: 0o644, Size: 1 << 20}); err != nil {
					return err
				}
				if err := noise(tw, uint64(i+2), 1<<20); err != nil {
					return err
				}
			}
			return tw.Close()
		},
	)
}

func TestManyLayers(t *testing.T) {
	n := 1000
	if testing.Short() {
		n = 100
	}
	st := newStore(t)
	var layers [][]byte
	for i := range n {
		ents := []ent{f(fmt.Sprintf("file%d", i), big(byte(i), 100+i)), d("dir/"), f(fmt.Sprintf("dir/%d", i), "x")}
		if i > 0 && i%3 == 0 {
			ents = append(ents, f(fmt.Sprintf(".wh.file%d", i-1), ""))
		}
		layers = append(layers, tarOf(ents...))
	}
	res := convert(t, st, imageOf(gz, layers...), Options{Name: "x"})
	if len(res.Layers) != n {
		t.Errorf("got %d layers", len(res.Layers))
	}
	s, err := Find(st, "x")
	if err != nil {
		t.Fatal(err)
	}
	got, err := ReadImage(st, s, Merged)
	if err != nil {
		t.Fatal(err)
	}
	// Each third layer but the first removes a file.
	if have, want := len(got.Root.Dir), n-(n-1)/3+1; have != want {
		t.Errorf("got %d names in the root directory, want %d", have, want)
	}
	if have := len(got.Lookup("dir").Dir); have != n {
		t.Errorf("got %d names in /dir, want %d", have, n)
	}
	// All of it again is found in the store.
	for _, l := range convert(t, st, imageOf(gz, layers...), Options{}).Layers {
		if !l.Present {
			t.Fatal("a layer was read again")
		}
	}
}

// TestManyFiles converts one layer of 200,000 files.
func TestManyFiles(t *testing.T) {
	if testing.Short() {
		t.Skip("writes 200,000 files")
	}
	st := newStore(t)
	img := newGenerated(func(w io.Writer) error {
		tw := tar.NewWriter(w)
		for i := range 200_000 {
			body := fmt.Sprintf("%d %s", i, strings.Repeat("x", i%130))
			h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("d%d/f%d", i/1000, i), Mode: 0o644, Size: int64(len(body))}
			if err := tw.WriteHeader(h); err != nil {
				return err
			}
			io.WriteString(tw, body)
		}
		return tw.Close()
	})
	warned := 0
	res := convert(t, st, img, Options{Name: "x", Warn: func(string, ...any) { warned++ }})
	s, err := Find(st, res.Manifest.String())
	if err != nil {
		t.Fatal(err)
	}
	got, err := ReadImage(st, s, Rootfs)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	_ = got.Walk(func(_ string, node *tree.Node) error {
		if node.IsRegular() {
			n++
		}
		return nil
	})
	if n != 200_000 {
		t.Errorf("got %d files, want 200,000", n)
	}
	if warned == 0 {
		t.Error("200 missing parent directories gave no warning")
	}
}

// TestOddNames: what Linux allows goes through, bit by bit.
func TestOddNames(t *testing.T) {
	long := strings.Repeat("n", 255)
	target := strings.Repeat("t/", 2047) + "t" // 4095 bytes
	dup := []ent{f("dup", big(1, 500)), f("dup", big(2, 600))}
	layers := [][]byte{tarOf(append(dup,
		f(long, big(3, 100)), f("\xff\xfe not UTF-8", "x"), f("line\nbreak", "y"), f(" ", "z"),
		symlink("link", target), d("deep/"), f("deep/"+strings.Repeat("d/", 500)+"f", "deep"))...)}
	st := newStore(t)
	convert(t, st, imageOf(gz, layers...), Options{Name: "x"})
	s, err := Find(st, "x")
	if err != nil {
		t.Fatal(err)
	}
	got, err := ReadImage(st, s, Rootfs)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{long, "\xff\xfe not UTF-8", "line\nbreak", " ", "deep/" + strings.Repeat("d/", 500) + "f"} {
		if got.Lookup(name) == nil {
			t.Errorf("%.50q is missing", name)
		}
	}
	if n := got.Lookup("link"); n == nil || n.Target != target {
		t.Error("the link of 4095 bytes differs")
	}
	if n := got.Lookup("dup"); n == nil || n.File.Size != 600 {
		t.Error("of duplicate entries the last one must win")
	}
	var target2 memTarget
	if res, err := Export(ctx, st, s, &target2, ExportOptions{Compression: "none", TempDir: t.TempDir()}); err != nil || res.Layers[0].Digest != s.Layers[0] {
		t.Errorf("exporting: %+v, %v", res, err)
	}
}

// TestHugeSparseFile: a file of 5 GiB that is all holes but for its ends takes next
// to no disk, whether the tar spells the zeros out or not.
func TestHugeSparseFile(t *testing.T) {
	if testing.Short() {
		t.Skip("hashes 5 GiB")
	}
	const size = 5 << 30
	st := newStore(t)
	img := newGenerated(func(w io.Writer) error {
		tw := tar.NewWriter(w)
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "huge", Mode: 0o644, Size: size}); err != nil {
			return err
		}
		io.WriteString(tw, "begin")
		zeros := make([]byte, 1<<20)
		for n := int64(5); n < size-3; {
			k := min(int64(len(zeros)), size-3-n)
			if _, err := tw.Write(zeros[:k]); err != nil {
				return err
			}
			n += k
		}
		io.WriteString(tw, "end")
		return tw.Close()
	})
	convert(t, st, img, Options{Name: "x"})
	u, err := DF(ctx, st)
	if err != nil {
		t.Fatal(err)
	}
	if u.Total.Bytes < size || u.Total.Disk > 1<<20 {
		t.Errorf("got %d bytes of content on %d of disk", u.Total.Bytes, u.Total.Disk)
	}
}
