package registry_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/particle-os/particle/registry"
)

// An entry of a tar that a test makes.
type entry struct {
	hdr  tar.Header
	data []byte
}

func regular(name string, data []byte) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data))}, data}
}

func link(typ byte, name, target string) entry {
	return entry{tar.Header{Typeflag: typ, Name: name, Linkname: target}, nil}
}

func makeTar(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		if err := tw.WriteHeader(&e.hdr); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// saved is an archive as docker save wrote it before version 25, for the image m,
// whose layers are plain.
func saved(t testing.TB, m *image, extra ...entry) []entry {
	t.Helper()
	type img struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	manifest := img{Config: m.manifest.Config.Digest.Hex + ".json", RepoTags: []string{"x:1", "quay.io/y/z:2"}}
	entries := []entry{regular(manifest.Config, m.blobs[m.manifest.Config.Digest])}
	for i, l := range m.manifest.Layers {
		name := fmt.Sprintf("layer%d/layer.tar", i)
		manifest.Layers = append(manifest.Layers, name)
		entries = append(entries, regular(name, m.blobs[l.Digest]))
	}
	entries = append(entries, extra...)
	return append(entries, regular("manifest.json", jsonOf(t, []img{manifest})))
}

func plainImage(t testing.TB, names ...string) *image {
	kinds := map[string]types.MediaType{}
	for _, n := range names {
		kinds[n] = types.OCIUncompressedLayer
	}
	return newImage(t, false, kinds, names...)
}

func TestDockerArchiveForms(t *testing.T) {
	m := plainImage(t, "a", "b")
	a, b := m.blobs[m.manifest.Layers[0].Digest], m.blobs[m.manifest.Layers[1].Digest]
	config := m.blobs[m.manifest.Config.Digest]
	manifest := func(layers ...string) entry {
		return regular("manifest.json", []byte(fmt.Sprintf(`[{"Config":"config.json","RepoTags":null,"Layers":["%s"]}]`, strings.Join(layers, `","`))))
	}
	conf := regular("config.json", config)
	for name, c := range map[string]struct {
		entries []entry
		types   string
	}{
		"old":             {saved(t, m), "tar tar"},
		"manifest first":  {[]entry{manifest("1", "2"), conf, regular("1", a), regular("2", b)}, "tar tar"},
		"dot slash":       {[]entry{conf, regular("./1", a), regular("./d/2", b), manifest("./1", "d//2")}, "tar tar"},
		"compressed":      {[]entry{conf, regular("1", gzipped(a)), regular("2", zstandard(t, b)), manifest("1", "2")}, "tar+gzip tar+zstd"},
		"OCI in it":       {[]entry{conf, regular("blobs/sha256/"+describe(gzipped(a), "").Digest.Hex, gzipped(a)), regular("2", b), manifest("blobs/sha256/"+describe(gzipped(a), "").Digest.Hex, "2")}, "tar+gzip tar"},
		"symlink":         {[]entry{conf, regular("x/layer.tar", a), link(tar.TypeSymlink, "y/layer.tar", "../x/layer.tar"), regular("2", b), manifest("y/layer.tar", "2")}, "tar tar"},
		"hard link":       {[]entry{conf, regular("x", a), link(tar.TypeLink, "y", "x"), regular("2", b), manifest("y", "2")}, "tar tar"},
		"the last counts": {[]entry{conf, regular("1", b), regular("2", b), regular("1", a), manifest("1", "2")}, "tar tar"},
	} {
		for form, raw := range map[string][]byte{"tar": makeTar(t, c.entries...), "gzip": gzipped(makeTar(t, c.entries...))} {
			file := filepath.Join(t.TempDir(), "a.tar")
			writeFile(t, file, string(raw), 0o600)
			temp := t.TempDir()
			got := readImage(t, mustRef(t, "docker-archive:%s", file), &registry.Options{TempDir: temp})
			if got.manifest.Config.Digest != m.manifest.Config.Digest {
				t.Errorf("%s, %s: config digest is %s, want %s", name, form, got.manifest.Config.Digest, m.manifest.Config.Digest)
			}
			var kinds []string
			for _, l := range got.manifest.Layers {
				kinds = append(kinds, strings.TrimPrefix(string(l.MediaType), "application/vnd.oci.image.layer.v1."))
			}
			if strings.Join(kinds, " ") != c.types {
				t.Errorf("%s, %s: layers are %q, want %q", name, form, kinds, c.types)
			}
			if left := listing(t, temp); len(left) > 0 {
				t.Errorf("%s, %s: %q is left", name, form, left)
			}
		}
	}
}

// TestRepeatedLayer: an empty layer often comes more than once.
func TestRepeatedLayer(t *testing.T) {
	m := plainImage(t, "a", "a")
	// newImage makes layers of different sizes; take the first one twice.
	one := m.manifest.Layers[0]
	config := []byte(fmt.Sprintf(`{"rootfs":{"type":"layers","diff_ids":["%s","%s"]}}`, one.Digest, one.Digest))
	m = &image{mediaType: m.mediaType, manifest: m.manifest, blobs: map[v1.Hash][]byte{one.Digest: m.blobs[one.Digest]}}
	m.manifest.Config = describe(config, types.OCIConfigJSON)
	m.manifest.Layers = []v1.Descriptor{one, one}
	m.blobs[m.manifest.Config.Digest] = config
	m.raw = jsonOf(t, m.manifest)
	dir := t.TempDir()
	for _, name := range []string{"docker-archive:%s/a.tar:x:1", "oci-archive:%s/b.tar:1", "oci:%s/c:1"} {
		ref := mustRef(t, name, dir)
		mustWrite(t, ref, m, nil)
		if got := readImage(t, ref, nil); len(got.manifest.Layers) != 2 || got.manifest.Layers[0].Digest != one.Digest || got.manifest.Layers[1].Digest != one.Digest {
			t.Errorf("%s: layers are %+v, want twice %s", ref, got.manifest.Layers, one.Digest)
		}
	}
}

func TestSeveralImages(t *testing.T) {
	m, other := plainImage(t, "a"), plainImage(t, "bb")
	dir := t.TempDir()

	name := filepath.Join(dir, "docker.tar")
	conf := func(m *image) []byte { return m.blobs[m.manifest.Config.Digest] }
	layer := func(m *image) []byte { return m.blobs[m.manifest.Layers[0].Digest] }
	writeFile(t, name, string(makeTar(t, regular("1.json", conf(m)), regular("2.json", conf(other)), regular("1.tar", layer(m)), regular("2.tar", layer(other)),
		regular("manifest.json", []byte(`[{"Config":"1.json","RepoTags":["debian:12","localhost/x:1"],"Layers":["1.tar"]},{"Config":"2.json","RepoTags":["docker.io/library/debian:13"],"Layers":["2.tar"]}]`)))), 0o600)
	layout := filepath.Join(dir, "layout")
	mustWrite(t, mustRef(t, "oci:%s:one", layout), m, nil)
	mustWrite(t, mustRef(t, "oci:%s:two", layout), other, nil)

	for ref, want := range map[string]*image{
		"docker-archive:" + name + ":debian:12":           m,
		"docker-archive:" + name + ":localhost/x:1":       m,
		"docker-archive:" + name + ":library/debian:13":   other,
		"docker-archive:" + name + ":docker.io/debian:13": other,
		"docker-archive:" + name + ":@0":                  m,
		"docker-archive:" + name + ":@1":                  other,
		"oci:" + layout + ":one":                          m,
		"oci:" + layout + ":two":                          other,
		"oci:" + layout + ":@1":                           other,
	} {
		if got := readImage(t, mustRef(t, "%s", ref), nil); got.manifest.Config.Digest != want.manifest.Config.Digest {
			t.Errorf("%s: got config %s, want %s", ref, got.manifest.Config.Digest, want.manifest.Config.Digest)
		}
	}
	for ref, c := range map[string]struct {
		want error
		text string
	}{
		"docker-archive:" + name:          {registry.ErrAmbiguous, `"debian:12"`},
		"docker-archive:" + name + ":x":   {registry.ErrNotFound, `"debian:12"`},
		"docker-archive:" + name + ":@2":  {registry.ErrNotFound, "of 2"},
		"oci:" + layout:                   {registry.ErrAmbiguous, `"one", "two"`},
		"oci:" + layout + ":three":        {registry.ErrNotFound, `"one", "two"`},
		"oci:" + layout + ":@2":           {registry.ErrNotFound, "of 2"},
		"oci:" + dir:                      {registry.ErrNotFound, "OCI image layout"},
		"oci:" + dir + "/none":            {registry.ErrNotFound, "none"},
		"oci-archive:" + dir + "/none":    {registry.ErrNotFound, "none"},
		"oci-archive:" + layout:           {registry.ErrInvalid, "is a directory"},
		"oci-archive:" + name:             {registry.ErrNotFound, "oci-layout"},
		"docker-archive:" + dir + "/none": {registry.ErrNotFound, "none"},
		"docker-archive:/dev/null":        {registry.ErrNotFound, "manifest.json"},
	} {
		if _, err := registry.Open(t.Context(), mustRef(t, "%s", ref), nil); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: got %v, want %v with %q", ref, err, c.want, c.text)
		}
	}
}

// TestPipe reads an archive that cannot be read in place.
func TestPipe(t *testing.T) {
	dir := t.TempDir()
	m := ociImage(t)
	file := mustRef(t, "oci-archive:%s/a.tar", dir)
	mustWrite(t, file, m, nil)
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		b, err := os.ReadFile(file.Path)
		if err == nil {
			err = os.WriteFile(fifo, b, 0o600)
		}
		done <- err
	}()
	same(t, "pipe", readImage(t, mustRef(t, "oci-archive:%s", fifo), nil), m)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := registry.Create(t.Context(), mustRef(t, "oci-archive:%s", fifo), nil); !errors.Is(err, registry.ErrUnsupported) {
		t.Errorf("writing to a pipe: got %v, want ErrUnsupported", err)
	}
}

// TestHostileArchives: nothing but a clear error comes of them, and nothing is left.
func TestHostileArchives(t *testing.T) {
	m := plainImage(t, "a", "b")
	good := saved(t, m)
	whole := makeTar(t, good...)
	a := m.blobs[m.manifest.Layers[0].Digest]
	conf := regular("c", m.blobs[m.manifest.Config.Digest])
	with := func(layers string, entries ...entry) []byte {
		return makeTar(t, append(entries, conf, regular("manifest.json", []byte(`[{"Config":"c","Layers":[`+layers+`]}]`)))...)
	}
	for name, c := range map[string]struct {
		raw  []byte
		want error
	}{
		"dotdot":           {makeTar(t, append(good, regular("../../etc/passwd", a))...), registry.ErrInvalid},
		"dotdot inside":    {makeTar(t, append(good, regular("a/../../x", a))...), registry.ErrInvalid},
		"absolute":         {makeTar(t, append(good, regular("/etc/passwd", a))...), registry.ErrInvalid},
		"symlink outside":  {with(`"l","l"`, link(tar.TypeSymlink, "l", "../../etc/passwd")), registry.ErrInvalid},
		"symlink absolute": {with(`"l","l"`, link(tar.TypeSymlink, "l", "/etc/passwd")), registry.ErrInvalid},
		"symlink loop":     {with(`"l","l"`, link(tar.TypeSymlink, "l", "k"), link(tar.TypeSymlink, "k", "l")), registry.ErrInvalid},
		"symlink to self":  {with(`"l","l"`, link(tar.TypeSymlink, "l", "l")), registry.ErrInvalid},
		"symlink dangling": {with(`"l","l"`, link(tar.TypeSymlink, "l", "k")), registry.ErrNotFound},
		"directory":        {with(`"d","d"`, entry{tar.Header{Typeflag: tar.TypeDir, Name: "d/"}, nil}), registry.ErrInvalid},
		"device":           {with(`"d","d"`, entry{tar.Header{Typeflag: tar.TypeChar, Name: "d"}, nil}), registry.ErrInvalid},
		"name outside":     {with(`"../x","x"`), registry.ErrInvalid},
		"name absolute":    {with(`"/etc/passwd","x"`), registry.ErrInvalid},
		"name empty":       {with(`"","x"`), registry.ErrInvalid},
		"too few layers":   {with(`"c"`), registry.ErrInvalid},
		"too many layers":  {with(`"c","c","c"`), registry.ErrInvalid},
		"one for two":      {with(`"x","x"`, regular("x", a)), registry.ErrInvalid},
		"bzip2 layer":      {with(`"x","x"`, regular("x", []byte("BZh91AY"))), registry.ErrUnsupported},
		"no images":        {makeTar(t, regular("manifest.json", []byte("[]"))), registry.ErrNotFound},
		"no JSON":          {makeTar(t, regular("manifest.json", []byte("no"))), registry.ErrInvalid},
		"huge JSON":        {makeTar(t, regular("manifest.json", bytes.Repeat([]byte(" "), 5<<20))), registry.ErrInvalid},
		"no tar":           {bytes.Repeat([]byte("particle"), 1000), registry.ErrInvalid},
		"cut in header":    {whole[:700], registry.ErrInvalid},
		"cut in file":      {whole[:len(whole)/2], registry.ErrInvalid},
		"cut gzip":         {gzipped(whole)[:1000], io.ErrUnexpectedEOF},
		"sparse":           {sparse(with(`"s","s"`, entry{tar.Header{Typeflag: tar.TypeReg, Name: "s", Size: 3, PAXRecords: map[string]string{"QNU.sparse.size": "3", "QNU.sparse.numblocks": "1", "QNU.sparse.map": "0,3"}}, []byte("abc")})), registry.ErrInvalid},
		"xz":               {[]byte("\xfd7zXZ\x00"), registry.ErrUnsupported},
		"bomb":             {gzipped(make([]byte, 2<<20)), registry.ErrInvalid},
		"size of exabytes": {hugeEntry(), registry.ErrInvalid},
	} {
		dir, temp := t.TempDir(), t.TempDir()
		file := filepath.Join(dir, "a.tar")
		writeFile(t, file, string(c.raw), 0o600)
		img, err := registry.Open(t.Context(), mustRef(t, "docker-archive:%s", file), &registry.Options{TempDir: temp, MaxUnpacked: 1 << 20})
		if !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
		if err == nil {
			img.Close()
		}
		if left := listing(t, temp); len(left) > 0 {
			t.Errorf("%s: %q is left", name, left)
		}
	}
}

// sparse makes PAX records real that archive/tar refuses to write.
func sparse(b []byte) []byte {
	return bytes.ReplaceAll(b, []byte("QNU.sparse."), []byte("GNU.sparse."))
}

// hugeEntry is a header of 8 EiB less one byte, in base 256 as GNU tar writes it.
func hugeEntry() []byte {
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "manifest.json", Size: 1<<63 - 1, Format: tar.FormatGNU})
	return b.Bytes()
}

// TestForgedArchive: content that is not what the config or the name says shows when
// it is read.
func TestForgedArchive(t *testing.T) {
	m := plainImage(t, "a", "b")
	layer := m.manifest.Layers[0]
	forged := bytes.Clone(m.blobs[layer.Digest])
	forged[600] ^= 1
	dir := t.TempDir()
	file := filepath.Join(dir, "a.tar")
	m.blobs[layer.Digest] = forged
	writeFile(t, file, string(makeTar(t, saved(t, m)...)), 0o600)
	img := mustOpen(t, mustRef(t, "docker-archive:%s", file), nil)
	rc, err := img.Blob(t.Context(), layer)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	if _, err := io.Copy(io.Discard, rc); !errors.Is(err, registry.ErrDigest) {
		t.Errorf("got %v, want ErrDigest", err)
	}
}

// TestHostileLayout: what a layout's blobs directory can hold besides blobs.
func TestHostileLayout(t *testing.T) {
	m := ociImage(t)
	layer := m.manifest.Layers[0]
	blob := func(dir string) string { return filepath.Join(dir, "blobs/sha256", layer.Digest.Hex) }
	for name, c := range map[string]struct {
		spoil func(dir string) error
		want  error
	}{
		"missing":   {func(dir string) error { return os.Remove(blob(dir)) }, registry.ErrNotFound},
		"pipe":      {func(dir string) error { return errors.Join(os.Remove(blob(dir)), syscall.Mkfifo(blob(dir), 0o600)) }, registry.ErrInvalid},
		"directory": {func(dir string) error { return errors.Join(os.Remove(blob(dir)), os.Mkdir(blob(dir), 0o700)) }, registry.ErrInvalid},
		"secret": {func(dir string) error {
			return errors.Join(os.Remove(blob(dir)), os.Symlink("/etc/hostname", blob(dir)))
		}, registry.ErrDigest},
		"changed": {func(dir string) error { return os.WriteFile(blob(dir), make([]byte, layer.Size), 0o600) }, registry.ErrDigest},
		"cut":     {func(dir string) error { return os.Truncate(blob(dir), 5) }, registry.ErrDigest},
	} {
		dir := filepath.Join(t.TempDir(), "l")
		ref := mustRef(t, "oci:%s", dir)
		mustWrite(t, ref, m, nil)
		if err := c.spoil(dir); err != nil {
			t.Fatal(err)
		}
		img := mustOpen(t, ref, nil)
		rc, err := img.Blob(context.Background(), layer)
		if err == nil {
			_, err = io.Copy(io.Discard, rc)
			rc.Close()
		}
		if !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
	for name, c := range map[string]struct {
		file, content string
		want          error
	}{
		"version 2":   {"oci-layout", `{"imageLayoutVersion":"2.0.0"}`, registry.ErrUnsupported},
		"no version":  {"oci-layout", `x`, registry.ErrInvalid},
		"no index":    {"index.json", `x`, registry.ErrInvalid},
		"empty index": {"index.json", `{"schemaVersion":2,"manifests":[]}`, registry.ErrNotFound},
		"wrong type":  {"index.json", `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","manifests":[]}`, registry.ErrInvalid},
		"escape":      {"index.json", `{"schemaVersion":2,"manifests":[{"digest":"sha256:../../../etc/passwd","size":1}]}`, registry.ErrInvalid},
		"wrong size":  {"index.json", strings.Replace(string(jsonOf(t, map[string]any{"schemaVersion": 2, "manifests": []any{describe(m.raw, m.mediaType)}})), `"size":`, `"size":1`, 1), registry.ErrDigest},
	} {
		dir := filepath.Join(t.TempDir(), "l")
		ref := mustRef(t, "oci:%s", dir)
		mustWrite(t, ref, m, nil)
		writeFile(t, filepath.Join(dir, c.file), c.content, 0o600)
		if _, err := registry.Open(context.Background(), ref, nil); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
}
