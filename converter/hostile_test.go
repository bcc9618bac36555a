package converter

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/layer"
	"github.com/particle-os/particle/converter/store"
)

// typed returns an entry of any type; the tar writer of Go refuses some.
func typed(name string, flag byte) []byte {
	b := tarOf(f(name, ""))
	b[156] = flag // typeflag, POSIX.1-1988 header
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b[:512] {
		sum += int(c)
	}
	copy(b[148:156], []byte{'0' + byte(sum>>12&7), '0' + byte(sum>>9&7), '0' + byte(sum>>6&7), '0' + byte(sum>>3&7), '0' + byte(sum&7), 0, ' ', ' '})
	return b
}

func withXattr(name, key, value string) ent {
	return ent{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Format: tar.FormatPAX,
		PAXRecords: map[string]string{"SCHILY.xattr." + key: value}}}
}

// TestBadInput: each gets one clear error and leaves nothing in the store.
func TestBadInput(t *testing.T) {
	good := tarOf(f("good", big(1, 10_000)))
	layerOf := func(ents ...ent) *memImage {
		return imageOf(gz, good, tarOf(append([]ent{f("first", big(2, 10_000))}, ents...)...))
	}
	edited := func(edit func(m *v1.Manifest)) *memImage {
		img := imageOf(gz, good)
		var m v1.Manifest
		if err := json.Unmarshal(img.raw, &m); err != nil {
			t.Fatal(err)
		}
		edit(&m)
		img.raw, _ = json.Marshal(m)
		return img
	}
	claimed := tarOf(f("x", big(3, 10_000)))
	otherDiffID := imageOf(nil, good, claimed)
	otherDiffID.blobs[sum(claimed)] = tarOf(f("x", big(4, 10_000)))
	tooLong := imageOf(gz, good, claimed)
	tooLong.blobs[sum(gz(claimed))] = append(gz(claimed), gz([]byte("more"))...)
	for _, c := range []struct {
		name string
		img  *memImage
		want error  // Is
		text string // in the message
	}{
		{"parent in a name", layerOf(f("a/../../etc/passwd", "x")), layer.ErrName, `"a/../../etc/passwd"`},
		{"dot-dot name", layerOf(f("../x", "x")), layer.ErrName, `"../x"`},
		{"absolute name", layerOf(f("/etc/passwd", "x")), layer.ErrName, `"/etc/passwd"`},
		{"below a symbolic link", layerOf(symlink("l", "/etc"), f("l/passwd", "x")), layer.ErrName, `"l/passwd"`},
		{"hard link to outside", layerOf(link("h", "../../etc/shadow")), layer.ErrLink, `"../../etc/shadow"`},
		{"hard link to nothing", layerOf(link("h", "nothing")), layer.ErrLink, `"nothing"`},
		{"whiteout of the root", layerOf(f(".wh.", "")), layer.ErrName, `".wh."`},
		{"oversize xattr", layerOf(withXattr("x", "user.a", strings.Repeat("v", 70_000))), layer.ErrValue, "70000"},
		{"unknown type", imageOf(gz, good, typed("x", 'Z')), layer.ErrType, `"x"`},
		{"truncated gzip", imageOf(func(b []byte) []byte { return gz(b)[:200] }, good), nil, "truncated"},
		{"truncated tar", imageOf(nil, good[:2048]), layer.ErrTruncated, ""},
		{"not a tar", imageOf(gz, []byte(strings.Repeat("not a tar ", 200))), nil, "tar"},
		{"other diffID", otherDiffID, layer.ErrDiffID, "sha256:"},
		{"longer than it says", tooLong, ErrManifest, "longer"},
		{"missing blob", &memImage{raw: layerOf().raw, opened: map[v1.Hash]int{}}, os.ErrNotExist, "config"},
		{"manifest that is none", &memImage{raw: []byte("{}")}, ErrManifest, "schemaVersion"},
		{"manifest of garbage", &memImage{raw: []byte("\x00")}, ErrManifest, ""},
		{"index in place of a manifest", &memImage{raw: []byte(`{"schemaVersion":2,"manifests":[]}`)}, ErrManifest, "config"},
		{"fewer layers than diffIDs", edited(func(m *v1.Manifest) { m.Layers = nil }), ErrManifest, "1 diffIDs and the manifest 0 layers"},
		{"digest of another algorithm", edited(func(m *v1.Manifest) { m.Layers[0].Digest.Algorithm = "md5" }), ErrManifest, "md5"},
		{"negative size", edited(func(m *v1.Manifest) { m.Layers[0].Size = -1 }), ErrManifest, "-1"},
		{"enormous config", edited(func(m *v1.Manifest) { m.Config.Size = 1 << 40 }), ErrManifest, "1099511627776"},
		{"not bootable", layerOf(), ErrNotBootable, "/usr"},
	} {
		t.Run(c.name, func(t *testing.T) {
			st := newStore(t)
			before := files(t, st.Dir())
			_, err := Convert(ctx, c.img, st, Options{Name: "x", Bootable: c.want == ErrNotBootable, KeepBlobs: true})
			if err == nil {
				t.Fatal("it was accepted")
			}
			if c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %q, want %v with %q", err, c.want, c.text)
			}
			if after := files(t, st.Dir()); !maps.Equal(before, after) {
				t.Errorf("the store has changed: %v, before %v", after, before)
			}
			wantClean(t, st)
		})
	}
}

// TestBomb: a layer larger than the limit is refused while it is being read.
func TestBomb(t *testing.T) {
	st := newStore(t)
	before := files(t, st.Dir())
	bomb := tarOf(f("zeros", string(make([]byte, 8<<20))))
	_, err := Convert(ctx, imageOf(gz, bomb), st, Options{MaxLayerSize: 1 << 20})
	if !errors.Is(err, layer.ErrTooLarge) || !strings.Contains(err.Error(), "--max-layer-size") {
		t.Errorf("got %v, want ErrTooLarge with the flag's name", err)
	}
	if after := files(t, st.Dir()); !maps.Equal(before, after) {
		t.Errorf("the store has changed: %v", after)
	}
	if _, err := Convert(ctx, imageOf(gz, bomb), st, Options{MaxLayerSize: 16 << 20}); err != nil {
		t.Error(err)
	}
}

// TestInterrupted: a cancelled conversion says why it stopped and leaves nothing.
func TestInterrupted(t *testing.T) {
	st := newStore(t)
	before := files(t, st.Dir())
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("stopped by signal: interrupt")
	stop := progressFunc(func(e Event) {
		if e.State == LayerMoved {
			cancel(why)
		}
	})
	_, err := Convert(ctx, imageOf(gz, twoLayers()...), st, Options{Progress: stop})
	if !errors.Is(err, why) {
		t.Errorf("got %v, want %v", err, why)
	}
	if after := files(t, st.Dir()); !maps.Equal(before, after) {
		t.Errorf("the store has changed: %v", after)
	}
}

type progressFunc func(Event)

func (f progressFunc) Progress(e Event) { f(e) }

// TestFullDisk fills a small file system in the middle of a conversion.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a tmpfs needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=3m"); err != nil {
		t.Skipf("mounting a tmpfs: %v", err)
	}
	defer unix.Unmount(dir, 0)
	st, err := store.Init(filepath.Join(dir, "store"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	convert(t, st, imageOf(gz, twoLayers()...), Options{Name: "fits"})
	before := files(t, st.Dir())
	_, err = Convert(ctx, imageOf(gz, tarOf(f("a", big(1, 1<<20)), f("b", big(2, 2<<20)), f("c", big(3, 2<<20)))), st, Options{Name: "too-big"})
	if !errors.Is(err, store.ErrNoSpace) {
		t.Errorf("got %v, want ErrNoSpace", err)
	}
	if after := files(t, st.Dir()); !maps.Equal(before, after) {
		t.Errorf("the store has changed: %v", after)
	}
	wantClean(t, st)
}

// FuzzManifest: what the parsers accept is safe to use.
func FuzzManifest(f *testing.F) {
	img := imageOf(gz, twoLayers()...)
	for _, b := range img.blobs {
		if b[0] == '{' {
			f.Add(img.raw, b)
		}
	}
	f.Add([]byte(`{"schemaVersion":2,"config":{}}`), []byte(`{}`))
	f.Fuzz(func(t *testing.T, raw, config []byte) {
		m, err := parseManifest(raw, "")
		if err != nil {
			if !errors.Is(err, ErrManifest) {
				t.Errorf("got %v, want ErrManifest", err)
			}
			return
		}
		for _, d := range m.Layers {
			if len(d.Digest.Hex) != 64 || d.Size < 0 {
				t.Errorf("accepted descriptor %+v", d)
			}
		}
		if ids, err := parseDiffIDs(config, len(m.Layers)); err == nil && len(ids) != len(m.Layers) {
			t.Errorf("got %d diffIDs for %d layers", len(ids), len(m.Layers))
		}
		if out, err := withLayers(raw, m, m.Layers); err != nil || !bytes.Equal(out, raw) {
			t.Errorf("the same layers give another manifest: %v", err)
		}
	})
}
