package podman

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/scan"
	"github.com/particle-os/particle/converter/tree"
	"github.com/particle-os/particle/registry"
	"github.com/particle-os/particle/tests/program"
)

// A blobCount is what a registry has sent.
type blobCount struct {
	requests, bytes atomic.Int64

	mu       sync.Mutex
	byDigest map[string]int // requests
}

func (c *blobCount) add(digest string, bytes int64) {
	c.requests.Add(1)
	c.bytes.Add(bytes)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byDigest == nil {
		c.byDigest = map[string]int{}
	}
	c.byDigest[digest]++
}

// of returns how often a blob was sent.
func (c *blobCount) of(digest string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byDigest[digest]
}

// serve starts a registry that ends with the test, and counts the blobs it sends.
func serve(t testing.TB, o registry.ServeOptions) (addr string, blobs *blobCount, stop func()) {
	t.Helper()
	return serveFrom(t, "", o)
}

// serveFrom is serve with blobs in a directory, for large images.
func serveFrom(t testing.TB, dir string, o registry.ServeOptions) (addr string, blobs *blobCount, stop func()) {
	t.Helper()
	blobs = new(blobCount)
	o.OnRequest = func(r registry.Request) {
		if _, digest, ok := strings.Cut(r.Path, "/blobs/"); ok && r.Method == "GET" {
			blobs.add(digest, r.Out)
		}
	}
	s, err := registry.Serve(context.Background(), dir, "", &o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s.Addr(), blobs, func() { s.Close() }
}

// An entry is a file of a layer's tar.
type entry struct {
	tar.Header
	body string
}

var date = time.Unix(1_600_000_000, 123_456_789)

func dir(name string, mode int64) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}}
}

func file(name, body string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, body: body}
}

func link(typ byte, name, target string) entry {
	return entry{Header: tar.Header{Typeflag: typ, Name: name, Linkname: target, Mode: 0o777}}
}

// with changes an entry.
func (e entry) with(fn func(h *tar.Header)) entry {
	fn(&e.Header)
	return e
}

func layerOf(t testing.TB, entries ...entry) v1.Layer {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		e.Format, e.Size = tar.FormatPAX, int64(len(e.body))
		if e.ModTime.IsZero() {
			e.ModTime = date
		}
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// noise returns bytes that do not compress, the same for the same seed.
func noise(seed string, size int) string {
	var b bytes.Buffer
	for i := 0; b.Len() < size; i++ {
		sum := sha256.Sum256([]byte(fmt.Sprint(seed, i)))
		b.Write(sum[:])
	}
	return b.String()[:size]
}

// bigFile is the size of the generated image's large files.
const bigFile = 1 << 20

// baseLayer is a system small enough for tests, with one of each kind of file.
func baseLayer(t testing.TB) v1.Layer {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	entries := []entry{
		dir(".", 0o755), dir("bin", 0o755), dir("etc", 0o755), dir("tmp", 0o1777), dir("usr", 0o755),
		dir("usr/lib", 0o755), dir("usr/share", 0o755), dir("var", 0o755), dir("root", 0o700), dir("dev", 0o755), dir("proc", 0o755), dir("sys", 0o755),
		file("bin/busybox", string(busybox)).with(func(h *tar.Header) { h.Mode = 0o755 }),
		file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
		file("etc/empty", ""),
		file("etc/shadow", "root:*:::::::\n").with(func(h *tar.Header) { h.Mode = 0o640; h.Gid = 42 }),
		file("usr/lib/big", noise("big", bigFile)),
		link(tar.TypeLink, "usr/lib/big-link", "usr/lib/big").with(func(h *tar.Header) { h.Mode = 0o644 }),
		link(tar.TypeSymlink, "usr/lib/symlink", "../share/x"),
		file("usr/lib/capable", noise("capable", 5000)).with(func(h *tar.Header) {
			h.Mode = 0o4755
			h.PAXRecords = map[string]string{
				"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
				"SCHILY.xattr.user.note":           "seen",
			}
		}),
		file("usr/lib/owned", noise("owned", 300)).with(func(h *tar.Header) { h.Uid, h.Gid = 1000, 1001 }),
		{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "var/pipe", Mode: 0o600}},
		{Header: tar.Header{Typeflag: tar.TypeChar, Name: "var/null", Mode: 0o666, Devmajor: 1, Devminor: 3}},
	}
	for _, applet := range []string{"sh", "ls", "cat", "echo", "sleep", "true", "mv", "rm", "touch", "mkdir"} {
		entries = append(entries, link(tar.TypeSymlink, "bin/"+applet, "busybox"))
	}
	for _, d := range []string{"gone", "opaque", "renamed", "kept", "becomes-file"} {
		entries = append(entries, dir("usr/share/"+d, 0o750))
		for i := range 5 {
			entries = append(entries, file(fmt.Sprintf("usr/share/%s/f%d", d, i), noise(d+fmt.Sprint(i), 100+i*900)))
		}
	}
	entries = append(entries, file("usr/share/becomes-dir", "a file"), dir("usr/share/deep", 0o755), dir("usr/share/deep/er", 0o711),
		file("usr/share/deep/er/hidden", noise("hidden", 200)), file("usr/share/deep/er/stays", noise("stays", 200)))
	return layerOf(t, entries...)
}

// threeLayers is an image whose upper layers delete, rename, and make directories
// opaque.
func threeLayers(t testing.TB) v1.Image {
	t.Helper()
	second := layerOf(t,
		dir("usr", 0o755), dir("usr/share", 0o755),
		file("usr/share/.wh.gone", ""), // a directory with all in it
		file("usr/share/.wh.renamed", ""), dir("usr/share/new-name", 0o750),
		file("usr/share/new-name/f0", noise("renamed0", 100)),
		dir("usr/share/opaque", 0o700), file("usr/share/opaque/.wh..wh..opq", ""), file("usr/share/opaque/.wh.f2", ""), file("usr/share/opaque/f1", "only this"),
		dir("usr/share/kept", 0o755), file("usr/share/kept/.wh.f2", ""), file("usr/share/kept/f3", "changed"),
		file("usr/share/.wh.becomes-file", ""), file("usr/share/becomes-file", "was a directory"),
		dir("usr/share/becomes-dir", 0o755), file("usr/share/becomes-dir/in", "was a file"),
		dir("usr/share/deep", 0o755), dir("usr/share/deep/er", 0o711), file("usr/share/deep/er/.wh.hidden", ""),
		dir("usr/lib", 0o755), file("usr/lib/.wh.big-link", ""), file("usr/lib/second", noise("second", bigFile)),
	)
	third := layerOf(t,
		dir("usr", 0o755), dir("usr/share", 0o755),
		dir("usr/share/gone", 0o711), file("usr/share/gone/again", "back, but empty"), // over a whiteout
		dir("usr/share/opaque", 0o755), file("usr/share/opaque/.wh.f1", ""), file("usr/share/opaque/f4", noise("f4", 4096)),
		dir("usr/share/kept", 0o755), file("usr/share/kept/f2", "again"), file("usr/share/kept/.wh.f4", ""),
		dir("usr/share/new-name", 0o750), file("usr/share/new-name/.wh.f0", ""), file("usr/share/new-name/f9", noise("f9", 70)),
		dir("etc", 0o755), file("etc/.wh.empty", ""), link(tar.TypeSymlink, "etc/link", "passwd"),
		dir("tmp", 0o1777), file("tmp/third", noise("third", bigFile)),
	)
	return imageOf(t, baseLayer(t), second, third)
}

func imageOf(t testing.TB, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.Architecture, c.OS, c.Created = "amd64", "linux", v1.Time{Time: date.UTC().Truncate(time.Second)}
	c.Config.Cmd, c.Config.Env = []string{"/bin/sh"}, []string{"PATH=/bin"}
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	return img
}

// put writes an image to a registry of this process.
func put(t testing.TB, img v1.Image, ref string) {
	t.Helper()
	r, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), program.Deadline)
	defer cancel()
	if err := remote.Write(r, img, remote.WithContext(ctx)); err != nil {
		t.Fatal(err)
	}
}

// layerDigests returns the digests of an image's layers in a registry.
func layerDigests(t testing.TB, ref string) (digests []string) {
	t.Helper()
	r, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), program.Deadline)
	defer cancel()
	img, err := remote.Image(r, remote.WithContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		digests = append(digests, l.Digest.String())
	}
	return digests
}

// treeOf reads a directory with all metadata and the digests of all files.
func treeOf(t testing.TB, dir string) *tree.Tree {
	t.Helper()
	tr, err := scan.Dir(context.Background(), dir, scan.Hash(fsverity.SHA256), scan.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// sameFiles compares an image in two engines, path by path, but for the dates of some
// paths.
func sameFiles(t testing.TB, plain, layered *engine, image string, dates ...string) {
	t.Helper()
	var want, got *tree.Tree
	plain.mounted(image, func(dir string) { want = treeOf(t, dir) })
	layered.mounted(image, func(dir string) { got = treeOf(t, dir) })
	n := 0
	_ = want.Walk(func(string, *tree.Node) error { n++; return nil })
	if n < 40 {
		t.Fatalf("plain podman shows %d paths only", n)
	}
	// No layer lists it: plain podman dates it with the pull.
	undated(got, want, append(dates, "/"))
	for _, c := range tree.Diff(want, got) {
		t.Errorf("%s: %s (plain podman first, with the layer store second)", c.Path, c.What)
	}
}
