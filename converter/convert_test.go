package converter

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/particle-os/particle/converter/layer"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

var ctx = context.Background()

// twoLayers is a small system: a base, and a layer that changes it in each way.
func twoLayers() [][]byte {
	return [][]byte{
		tarOf(d("usr/"), d("usr/bin/"), f("usr/bin/sh", big(1, 5000)), link("usr/bin/dash", "usr/bin/sh"),
			d("etc/"), f("etc/hostname", "host\n"), f("etc/gone", big(2, 300)), d("var/"), f("var/old", "x"), d("run/"), f("run/x", "y"), d("boot/")),
		tarOf(d("etc/"), f("etc/.wh.gone", ""), d("var/"), f("var/.wh..wh..opq", ""), f("var/new", big(3, 100_000)),
			symlink("bin", "usr/bin"), d("usr/"), d("usr/bin/"), f("usr/bin/sh", big(4, 5000))),
	}
}

func convert(t *testing.T, st *store.Store, img Image, o Options) *Result {
	t.Helper()
	res, err := Convert(ctx, img, st, o)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func TestConvert(t *testing.T) {
	st := newStore(t)
	res := convert(t, st, imageOf(gz, twoLayers()...), Options{Name: "a/b:c%d", Bootable: true})
	s, err := Find(st, "a/b:c%d")
	if err != nil {
		t.Fatal(err)
	}
	if s.Manifest != res.Manifest || !maps.Equal(s.Images, res.Images) || len(res.Images) != 3 {
		t.Errorf("found %+v, converted %+v", s, res)
	}
	got, err := ReadImage(st, s, Rootfs)
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	_ = got.Walk(func(path string, _ *tree.Node) error { paths = append(paths, path); return nil })
	want := []string{"/", "/bin", "/boot", "/etc", "/etc/hostname", "/run", "/run/x", "/usr", "/usr/bin", "/usr/bin/dash", "/usr/bin/sh", "/var", "/var/new"}
	if !slices.Equal(paths, want) {
		t.Errorf("got %q, want %q", paths, want)
	}
	if got.Lookup("usr/bin/sh").File.Object == got.Lookup("usr/bin/dash").File.Object {
		t.Error("the upper layer's /usr/bin/sh replaced /usr/bin/dash too")
	}
	wantClean(t, st)
}

// TestRoundTrip converts and exports: diffIDs and config always hold, the manifest
// does under the conditions that Export names.
func TestRoundTrip(t *testing.T) {
	particle := func(c layer.Compression) func([]byte) []byte {
		return func(b []byte) []byte {
			var out bytes.Buffer
			w, err := layer.NewCompressor(&out, c, layer.CompressorOptions{})
			if err != nil {
				t.Fatal(err)
			}
			w.Write(b)
			w.Close()
			return out.Bytes()
		}
	}
	trailing := append(tarOf(f("a", big(1, 100))), "bytes after the end"...)
	members := func(b []byte) []byte { return append(gz(b[:700]), gz(b[700:])...) }
	for _, c := range []struct {
		name     string
		compress func([]byte) []byte
		keep     bool
		same     bool
	}{
		{"uncompressed", nil, false, true},
		{"foreign gzip", gz, false, false},
		{"foreign gzip, kept", gz, true, true},
		{"foreign zstd", zst, false, false},
		{"foreign zstd, kept", zst, true, true},
		{"several gzip members", members, false, false},
		{"several gzip members, kept", members, true, true},
		{"our gzip", particle(layer.Gzip), false, true},
		{"our zstd", particle(layer.Zstd), false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			st := newStore(t)
			img := imageOf(c.compress, append(twoLayers(), trailing)...)
			convert(t, st, img, Options{Name: "x", KeepBlobs: c.keep})
			s, err := Find(st, "x")
			if err != nil {
				t.Fatal(err)
			}
			var target memTarget
			res, err := Export(ctx, st, s, &target, ExportOptions{TempDir: t.TempDir()})
			if err != nil {
				t.Fatal(err)
			}
			if res.Same != c.same || bytes.Equal(target.raw, img.raw) != c.same {
				t.Errorf("same manifest: %v, want %v", res.Same, c.same)
			}
			if res.Config != s.Config || target.blobs[res.Config] == nil {
				t.Errorf("config is %s, want %s", res.Config, s.Config)
			}
			wantClean(t, st)

			// The exported image converts again, to the same diffIDs and images.
			again := convert(t, newStore(t), target.image(), Options{})
			for _, kind := range []Kind{Rootfs, Merged} {
				if again.Images[kind.String()] != s.Images[kind.String()] {
					t.Errorf("%s image differs after the round trip", kind)
				}
			}
		})
	}
}

// TestExportCompression asks for each compression in turn.
func TestExportCompression(t *testing.T) {
	st := newStore(t)
	convert(t, st, imageOf(gz, twoLayers()...), Options{Name: "x"})
	s, err := Find(st, "x")
	if err != nil {
		t.Fatal(err)
	}
	for compression, suffix := range map[string]string{"none": "tar", "gzip": "tar+gzip", "zstd": "tar+zstd"} {
		var target memTarget
		res, err := Export(ctx, st, s, &target, ExportOptions{Compression: compression, TempDir: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		for i, l := range res.Layers {
			if !strings.HasSuffix(string(l.MediaType), suffix) {
				t.Errorf("%s: layer %d has media type %s", compression, i, l.MediaType)
			}
			if same := l.Digest == s.Layers[i]; same != (compression == "none") {
				t.Errorf("%s: layer %d has its diffID as digest: %v", compression, i, same)
			}
		}
		var m map[string]any
		if err := json.Unmarshal(target.raw, &m); err != nil || m["mediaType"] == nil {
			t.Errorf("%s: manifest %s: %v", compression, target.raw, err)
		}
	}
	if _, err := Export(ctx, st, s, &memTarget{}, ExportOptions{Compression: "lzma"}); err == nil {
		t.Error("an unknown compression was accepted")
	}
}

// TestSecondImage: what the store has is neither fetched nor stored again.
func TestSecondImage(t *testing.T) {
	st := newStore(t)
	layers := twoLayers()
	convert(t, st, imageOf(gz, layers...), Options{Name: "one"})
	before := files(t, st.ObjectsDir())

	upper := tarOf(f("extra", big(9, 2000)), f("copy", big(1, 5000)))
	img := imageOf(gz, append(layers, upper)...)
	res := convert(t, st, img, Options{Name: "two"})
	for i, l := range res.Layers {
		if l.Present != (i < 2) {
			t.Errorf("layer %d present: %v", i, l.Present)
		}
	}
	var m v1.Manifest
	if err := json.Unmarshal(img.raw, &m); err != nil {
		t.Fatal(err)
	}
	for i, desc := range m.Layers {
		if want := i / 2; img.opened[desc.Digest] != want {
			t.Errorf("layer %d was opened %d times, want %d", i, img.opened[desc.Digest], want)
		}
	}
	// New are: one file, one split stream, manifest and config with a stream each,
	// and two composefs images.
	objects := 0
	for name := range files(t, st.ObjectsDir()) {
		if _, ok := before[name]; !ok && !strings.HasSuffix(name, "/") {
			objects++
		}
	}
	if objects != 8 || res.NewObjects != 8 {
		t.Errorf("got %d new objects (%d reported), want 8", objects, res.NewObjects)
	}
	wantClean(t, st)
}

// TestConvertAgain keeps what an earlier conversion made.
func TestConvertAgain(t *testing.T) {
	st := newStore(t)
	img := imageOf(gz, twoLayers()...)
	first := convert(t, st, img, Options{Name: "x", Bootable: true, KeepBlobs: true})
	second := convert(t, st, img, Options{Name: "y"})
	if !maps.Equal(first.Images, second.Images) {
		t.Errorf("got %v, want %v", second.Images, first.Images)
	}
	if _, err := GC(ctx, st, store.GCOptions{}); err != nil {
		t.Fatal(err)
	}
	s, err := Find(st, "y")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadImage(st, s, Bootable); err != nil {
		t.Error(err)
	}
	var target memTarget
	if res, err := Export(ctx, st, s, &target, ExportOptions{TempDir: t.TempDir()}); err != nil || !res.Same {
		t.Errorf("the kept blobs are gone: %+v, %v", res, err)
	}
	wantClean(t, st)
}

// TestSameLayerTwice: engines write the same empty layer again and again.
func TestSameLayerTwice(t *testing.T) {
	st := newStore(t)
	empty := tarOf()
	layers := [][]byte{tarOf(f("a", big(1, 100))), empty, tarOf(f("b", big(2, 100))), empty}
	res := convert(t, st, imageOf(gz, layers...), Options{Name: "x"})
	if len(res.Layers) != 4 || res.Layers[1] != res.Layers[3] {
		t.Errorf("got %+v", res.Layers)
	}
	wantClean(t, st)
}

func TestFindListRemove(t *testing.T) {
	st := newStore(t)
	one := convert(t, st, imageOf(nil, tarOf(f("a", "1"))), Options{Name: "one"})
	convert(t, st, imageOf(nil, tarOf(f("a", "1"))), Options{Name: "uno"})
	two := convert(t, st, imageOf(nil, tarOf(f("a", "2"))), Options{Name: "two"})
	convert(t, st, imageOf(nil, tarOf(f("a", "3"))), Options{})

	all, err := List(st)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range all {
		got = append(got, strings.Join(s.Names, "+"))
	}
	if want := []string{"one+uno", "two", ""}; !slices.Equal(got, want) {
		t.Errorf("List: got %q, want %q", got, want)
	}
	for _, name := range []string{"one", "uno", one.Manifest.String(), one.Manifest.Hex[:8], one.Config.String(), one.Images["rootfs"].String()} {
		if s, err := Find(st, name); err != nil || s.Manifest != one.Manifest {
			t.Errorf("Find(%q): %v", name, err)
		}
	}
	for _, name := range []string{"", "on", "three", one.Manifest.Hex[:5], "zz" + one.Manifest.Hex[2:]} {
		if _, err := Find(st, name); !errors.Is(err, ErrNotFound) {
			t.Errorf("Find(%q): got %v, want ErrNotFound", name, err)
		}
	}
	if removed, err := Remove(st, "one"); err != nil || !slices.Equal(removed, []string{"one"}) {
		t.Errorf("Remove(one): %q, %v", removed, err)
	}
	if removed, err := Remove(st, two.Manifest.String()); err != nil || !slices.Equal(removed, []string{"two"}) {
		t.Errorf("Remove by digest: %q, %v", removed, err)
	}
	if _, err := GC(ctx, st, store.GCOptions{}); err != nil {
		t.Fatal(err)
	}
	if all, err = List(st); err != nil || len(all) != 1 || all[0].Names[0] != "uno" {
		t.Errorf("after GC: %+v, %v", all, err)
	}
	wantClean(t, st)
	if _, err := Remove(st, "uno"); err != nil {
		t.Fatal(err)
	}
	if _, err := GC(ctx, st, store.GCOptions{}); err != nil {
		t.Fatal(err)
	}
	for name := range files(t, st.ObjectsDir()) {
		if !strings.HasSuffix(name, "/") {
			t.Errorf("object %s is left in an empty store", name)
		}
	}
}

// TestConcurrent converts overlapping images side by side, from several handles of
// one store: each object is there once, and nothing is lost.
func TestConcurrent(t *testing.T) {
	dir := newStore(t).Dir()
	base := tarOf(d("usr/"), f("usr/base", big(1, 70_000)), f("usr/base2", big(2, 3000)))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			st, err := store.Open(dir)
			if err != nil {
				t.Error(err)
				return
			}
			own := tarOf(f(fmt.Sprintf("own%d", i), big(byte(10+i), 1000)), f("shared", big(3, 40_000)))
			if _, err := Convert(ctx, imageOf(gz, base, own), st, Options{Name: fmt.Sprint("img", i)}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	st, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	wantClean(t, st)
	all, err := List(st)
	if err != nil || len(all) != 8 {
		t.Errorf("got %d images, want 8 (%v)", len(all), err)
	}
	bodies := map[int64]int{}
	for _, size := range files(t, st.ObjectsDir()) {
		bodies[size]++
	}
	if bodies[70_000] != 1 || bodies[40_000] != 1 || bodies[1000] != 8 {
		t.Errorf("objects by size: %v", bodies)
	}
}
