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
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
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

func TestProvide(t *testing.T) {
	e := newEnv(t)
	img := image(t, []string{"./", "etc/", "etc/a", "etc/b", "long"}, []string{"etc/", "etc/.wh.a", "etc/c"})
	e.source.images[testRef] = img
	for i, digest := range []string{img.layers[0], img.layers[1], tocOf(img.layers[0])} {
		key := Key{testRef, digest}
		l, err := e.Provide(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		n := i % 2
		if l.DiffID != digestOf(img.tars[n]) || l.Size != int64(len(img.tars[n])) || l.Verification == mount.None {
			t.Errorf("layer %d: %+v", i, l)
		}
		r, err := e.Blob(key)
		if err != nil {
			t.Fatal(err)
		}
		blob, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(blob, img.tars[n]) {
			t.Errorf("layer %d: the blob has %d bytes, want %d: %v", i, len(blob), len(img.tars[n]), err)
		}
		r.Close()
	}
	if got := e.content(Key{testRef, img.layers[0]}, "etc/a"); got != "etc/a" {
		t.Errorf("etc/a is %q", got)
	}
	// The second layer deletes in etc and so has all of it, once and for all.
	if got := e.content(Key{testRef, img.layers[1]}, "etc/b"); got != "etc/b" {
		t.Errorf("the second layer has etc/b %q", got)
	}
	if got := e.content(Key{testRef, img.layers[1]}, "etc/a"); got != "" {
		t.Errorf("the second layer has etc/a %q", got)
	}
	if n := img.opened.Load(); n != 2 {
		t.Errorf("%d layers were fetched, want each once", n)
	}
	for _, key := range []Key{{testRef, digestOf([]byte("other"))}, {"registry.example/other:1", img.layers[0]}, {"x", img.layers[0]}, {testRef, "../.."}} {
		if _, err := e.Provide(t.Context(), key); err == nil {
			t.Errorf("%+v was provided", key)
		}
	}
}

// TestClaim: an image that names the digest of another image's layer does not change
// what that one gets.
func TestClaim(t *testing.T) {
	e := newEnv(t)
	good, evil := image(t, []string{"good"}), image(t, []string{"evil"})
	e.source.images["registry.example/evil:1"] = evil
	evil.manifest = bytes.ReplaceAll(evil.manifest, []byte(evil.layers[0]), []byte(good.layers[0]))
	evil.blobs[good.layers[0]] = evil.blobs[evil.layers[0]] // a registry that lies
	if _, err := e.Provide(t.Context(), Key{"registry.example/evil:1", good.layers[0]}); err != nil {
		t.Fatal(err) // the fake source checks no digests: package registry does
	}
	e.source.images[testRef] = good
	if _, err := e.Provide(t.Context(), Key{testRef, good.layers[0]}); err != nil {
		t.Fatal(err)
	}
	if got := e.content(Key{testRef, good.layers[0]}, "good"); got != "good" {
		t.Errorf("the good image has %q", got)
	}
}

// TestMoved: a tag moves to an image that has the same deleting layer on another one.
func TestMoved(t *testing.T) {
	e := newEnv(t)
	upper := []string{"etc/", "etc/.wh.a", "etc/c"}
	old, moved := image(t, []string{"./", "etc/", "etc/a", "etc/old"}, upper), image(t, []string{"./", "etc/", "etc/a", "etc/new"}, upper)
	key := Key{testRef, old.layers[1]}
	e.source.images[testRef] = old
	if _, err := e.Provide(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	if err := e.Use(key); err != nil {
		t.Fatal(err)
	}
	if got := e.content(key, "etc/old"); got != "etc/old" {
		t.Errorf("etc/old is %q", got)
	}
	e.source.images[testRef] = moved
	if _, err := e.Provide(t.Context(), Key{testRef, moved.layers[0]}); err != nil {
		t.Fatal(err)
	}
	// Now it has what both images agree on.
	for name, want := range map[string]string{"etc/old": "", "etc/new": "", "etc/c": "etc/c"} {
		if got := e.content(key, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if l := e.List(); len(l) != 2 || l[0].Uses+l[1].Uses != 1 {
		t.Errorf("the tree has %+v", l)
	}
}

func TestUses(t *testing.T) {
	e := newEnv(t)
	img := image(t, []string{"a"}, []string{"b"})
	e.source.images[testRef], e.source.images["registry.example/app:2"] = img, img
	one, two := Key{testRef, img.layers[0]}, Key{"registry.example/app:2", img.layers[0]}
	for _, key := range []Key{one, two} {
		if _, err := e.Provide(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if err := e.Use(key); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := e.Release(one); err != nil {
		t.Fatal(err)
	}
	if err := e.Detach(); err != nil {
		t.Fatal(err)
	}
	e.open() // as after a crash: mounts are there
	e.Release(one)
	e.Release(one)
	if e.content(two, "a") != "a" {
		t.Error("a layer went that another image uses")
	}
	if err := e.Release(one); !errors.Is(err, ErrNoLayer) {
		t.Errorf("releasing what nobody uses gives %v", err)
	}
	for range 3 {
		if err := e.Release(two); err != nil {
			t.Fatal(err)
		}
	}
	names, err := e.o.Store.StreamRefs(e.prefix)
	if err != nil || len(names) != 0 {
		t.Errorf("names left in the store: %v, %v", names, err)
	}
	if left, _ := filepath.Glob(filepath.Join(e.o.Mounts, "[^.]*")); len(left) != 0 {
		t.Errorf("left mounted: %q", left)
	}
}

// TestInterrupt: whoever waits may go; the last one ends the work.
func TestInterrupt(t *testing.T) {
	e := newEnv(t)
	img := image(t, []string{"a"}, []string{"b"})
	img.wait[img.layers[0]] = make(chan bool)
	e.source.images[testRef] = img
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 2)
	for _, c := range []context.Context{ctx, t.Context()} {
		go func() {
			_, err := e.Provide(c, Key{testRef, img.layers[0]})
			done <- err
		}()
	}
	time.Sleep(50 * time.Millisecond)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatalf("the interrupted one got %v", err)
	}
	close(img.wait[img.layers[0]])
	if err := <-done; err != nil {
		t.Fatalf("the other one got %v", err)
	}
}

// TestUnread: as long as a layer cannot be read, what it may need is kept.
func TestUnread(t *testing.T) {
	e := newEnv(t)
	img := image(t, []string{"a"}, []string{"b"})
	e.source.images[testRef] = img
	for _, digest := range img.layers {
		if _, err := e.Provide(t.Context(), Key{testRef, digest}); err != nil {
			t.Fatal(err)
		}
	}
	counts := func() (names, mounts int) {
		refs, err := e.o.Store.StreamRefs(e.prefix)
		if err != nil {
			t.Fatal(err)
		}
		left, err := filepath.Glob(filepath.Join(e.o.Mounts, "[^.]*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(refs), len(left)
	}
	if err := e.Detach(); err != nil {
		t.Fatal(err)
	}
	hurt := Key{testRef, img.layers[0]}
	if err := os.WriteFile(filepath.Join(e.o.Dir, hurt.path(), infoName), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	e.o.Log = slog.New(slog.NewTextHandler(&log, nil))
	e.open()
	if names, mounts := counts(); names != 2 || mounts != 2 {
		t.Errorf("a layer cannot be read: %d names and %d mounts are left, want 2 and 2", names, mounts)
	}
	if !strings.Contains(log.String(), hurt.path()) {
		t.Errorf("the log does not name the layer:\n%s", log.String())
	}
	// Writing it anew makes it known again, and what nobody uses may go.
	if _, err := e.Provide(t.Context(), hurt); err != nil {
		t.Fatal(err)
	}
	if err := e.Release(hurt); err != nil {
		t.Fatal(err)
	}
	if names, mounts := counts(); names != 1 || mounts != 1 {
		t.Errorf("after all can be read: %d names and %d mounts are left, want 1 and 1", names, mounts)
	}
}

// TestFlightCancelled: who comes after a flight was given up gets one of its own.
func TestFlightCancelled(t *testing.T) {
	s := &LayerStore{ctx: t.Context(), flights: map[string]*flight{}, images: map[string]*resolved{}}
	img := &resolved{users: 1}
	end := make(chan bool)
	fly := func(work func(context.Context) (fsverity.Digest, error)) *flight {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.fly("x", img, work)
	}
	first := fly(func(ctx context.Context) (fsverity.Digest, error) {
		<-end // slow to notice
		return fsverity.Digest{}, ctx.Err()
	})
	s.land(first)
	second := fly(func(ctx context.Context) (fsverity.Digest, error) {
		<-first.done
		return fsverity.Digest{}, ctx.Err()
	})
	close(end)
	<-first.done
	if third := fly(nil); third != second {
		t.Error("the end of the first flight took the second one away")
	}
	s.land(second)
	if _, err := second.wait(t.Context()); err != nil {
		t.Errorf("who came later got %v", err)
	}
	s.land(second)
}

// TestReplace: a layer that is written anew is there all the time.
func TestReplace(t *testing.T) {
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	s := &LayerStore{root: root, o: LayerStoreOptions{Dir: root.Name(), Mounts: root.Name()}}
	e := &entry{key: Key{testRef, digestOf(nil)}, info: LayerInfo{DiffID: digestOf(nil)}}
	e.image = fsverity.Sum(fsverity.SHA256, nil)
	if err := s.writeEntry(e); err != nil {
		t.Fatal(err)
	}
	stop, missing := make(chan bool), make(chan int)
	go func() {
		n := 0
		for {
			select {
			case <-stop:
				missing <- n
				return
			default:
				if _, err := os.Lstat(filepath.Join(root.Name(), e.key.path(), usesName)); err != nil {
					n++
				}
			}
		}
	}()
	for e.uses = range 50 {
		if err := s.writeEntry(e); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	if n := <-missing; n > 0 {
		t.Errorf("the layer was missing %d times", n)
	}
	got, err := s.readEntry(e.key)
	if err != nil || got.uses != 49 {
		t.Errorf("got %+v, %v, want the last one", got, err)
	}
	if left, _ := filepath.Glob(filepath.Join(root.Name(), tempPrefix+"*")); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

func TestBusy(t *testing.T) {
	e := newEnv(t)
	if _, err := OpenLayerStore(e.o); !errors.Is(err, ErrBusy) {
		t.Errorf("a second process gets %v", err)
	}
	if err := UnmountLayers(e.o.Dir, e.o.Mounts); !errors.Is(err, ErrBusy) {
		t.Errorf("unmounting what is served gives %v", err)
	}
	// With mounts of their own as well: there is one front.
	other := e.o
	other.Mounts = t.TempDir()
	if _, err := OpenLayerStore(other); !errors.Is(err, ErrBusy) {
		t.Errorf("a second process with other mounts gets %v", err)
	}
	if err := UnmountLayers(e.o.Dir, other.Mounts); !errors.Is(err, ErrBusy) {
		t.Errorf("unmounting what is served with other mounts gives %v", err)
	}
}

// TestFront speaks the protocol as podman does.
func TestFront(t *testing.T) {
	e := newEnv(t)
	img := image(t, []string{"./", "etc/", "etc/a", strings.Repeat("n", 90)}, []string{"etc/", "etc/.wh.a"})
	e.source.images[testRef] = img
	front, err := e.Serve()
	if err != nil {
		t.Fatal(err)
	}
	defer front.Close()
	key := Key{testRef, img.layers[0]}
	dir := filepath.Join(e.o.Dir, key.path())
	for _, name := range []string{"diff", "info", "blob"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Create(filepath.Join(dir, "use")); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("use gives %v, want ENOENT", err)
	}
	if l := e.List(); len(l) != 1 || l[0].Uses != 1 {
		t.Errorf("after a use the tree has %+v", l)
	}
	var info map[string]any
	raw, err := os.ReadFile(filepath.Join(dir, "info"))
	if err != nil || json.Unmarshal(raw, &info) != nil || info["diff-digest"] != digestOf(img.tars[0]) || info["toc-digest"] != tocOf(img.layers[0]) {
		t.Errorf("info is %s, %v", raw, err)
	}
	blob, err := os.ReadFile(filepath.Join(dir, "blob"))
	if err != nil || !bytes.Equal(blob, img.tars[0]) {
		t.Errorf("blob has %d bytes, want %d: %v", len(blob), len(img.tars[0]), err)
	}
	f, err := os.Open(filepath.Join(dir, "blob"))
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{700, 10, 513, int64(len(blob)) - 3, int64(len(blob)) + 5} { // forth and back
		var b [8]byte
		n, err := f.ReadAt(b[:], off)
		want := blob[min(off, int64(len(blob))):min(off+8, int64(len(blob)))]
		if !bytes.Equal(b[:n], want) || err != nil && err != io.EOF {
			t.Errorf("at %d: %q, want %q: %v", off, b[:n], want, err)
		}
	}
	f.Close()
	if e.content(key, "etc/a") != "etc/a" {
		t.Error("etc/a does not show")
	}
	if err := os.WriteFile(filepath.Join(dir, "other"), nil, 0o600); !errors.Is(err, os.ErrPermission) {
		t.Errorf("writing gives %v", err)
	}
	if err := unix.Rmdir(dir); err != unix.ENOENT {
		t.Errorf("rmdir gives %v, want ENOENT", err)
	}
	if l := e.List(); len(l) != 0 {
		t.Errorf("after the release the tree has %+v", l)
	}
	if err := unix.Rmdir(dir); err != unix.ENOENT {
		t.Errorf("a second rmdir gives %v, want ENOENT", err)
	}
	// One podman has looked for it, and another one released it before the first used it.
	if _, err := os.Create(filepath.Join(dir, "use")); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("use gives %v, want ENOENT", err)
	}
	if l := e.List(); len(l) != 1 || l[0].Uses != 1 {
		t.Errorf("after the use of a layer that was released the tree has %+v", l)
	}
	if err := unix.Rmdir(dir); err != unix.ENOENT {
		t.Errorf("rmdir gives %v, want ENOENT", err)
	}
	for _, name := range []string{"x", encodeRef("noregistry"), encodeRef(testRef) + "/latest", encodeRef(testRef) + "/" + digestOf(nil) + "/diff"} {
		if _, err := os.Stat(filepath.Join(e.o.Dir, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Below lies the plain tree.
	if _, err := os.Stat(filepath.Join(dir, "diff")); err != nil {
		t.Fatal(err)
	}
	if err := front.Close(); err != nil {
		t.Fatal(err)
	}
	if e.content(key, "etc/a") != "etc/a" {
		t.Error("without the front etc/a does not show")
	}
	if _, err := os.Create(filepath.Join(dir, "use")); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("without the front use gives %v, want ENOENT", err)
	}
	if _, err := os.Open(filepath.Join(dir, "blob")); !errors.Is(err, syscall.ENXIO) {
		t.Errorf("without the front blob gives %v, want ENXIO", err)
	}
}

func TestVersions(t *testing.T) {
	for version, want := range map[string]struct{ warns, forgets bool }{
		"podman version 3.4.4": {warns: true}, "podman version 4.3.1": {warns: true}, "podman version 4.4.0": {}, "podman version 5.4.2": {},
		"podman version 5.5.0": {forgets: true}, "podman version 5.8.6": {forgets: true}, "podman version 6.0.0-dev": {forgets: true},
		"podman version 5.10.1": {forgets: true},
	} {
		warning, err := checkVersion(version)
		if errors.Is(err, ErrForgets) != want.forgets || !want.forgets && err != nil || (warning != "") != want.warns {
			t.Errorf("%s: %q, %v", version, warning, err)
		}
	}
	if _, err := checkVersion("buildah 1"); err == nil || errors.Is(err, ErrForgets) {
		t.Errorf("of another program: %v", err)
	}
}

// FuzzKey: names in the layer store are podman's or refused, and never lead elsewhere.
func FuzzKey(f *testing.F) {
	f.Add(encodeRef("docker.io/library/debian:13"), digestOf(nil))
	f.Add(encodeRef("localhost:5000/a/b@"+digestOf(nil)), digestOf(nil))
	f.Add("Li4vLi4v", "sha256:..")
	f.Add("ZG9ja2VyLmlvL3g6MQ=", "sha256:ABC")
	f.Fuzz(func(t *testing.T, name, digest string) {
		ref, err := decodeRef(name)
		if err != nil || checkDigest(digest) != nil {
			return
		}
		p := Key{ref, digest}.path()
		if !filepath.IsLocal(p) || p != name+"/"+digest || strings.Count(p, "/") != 1 || len(name) > 255 {
			t.Errorf("%q and %q give the path %q", name, digest, p)
		}
		if !IsReference(ref) {
			t.Errorf("%q is no reference", ref)
		}
	})
}

// FuzzDescribe: manifests and configs of registries.
func FuzzDescribe(f *testing.F) {
	img := image(f, []string{"a"}, []string{"b"})
	f.Add(img.manifest, img.config())
	f.Add([]byte(`{"schemaVersion":2,"layers":[{"digest":"sha256:x","size":-1}]}`), []byte(`{"rootfs":{"diff_ids":[""]}}`))
	f.Add([]byte("null"), []byte("[]"))
	f.Fuzz(func(t *testing.T, manifest, config []byte) {
		layers, err := describe(manifest, config)
		if err != nil {
			return
		}
		r := &resolved{layers: layers}
		for i, l := range layers {
			if checkDigest(l.digest) != nil || checkDigest(l.diffID) != nil || l.size < 0 || l.toc != "" && checkDigest(l.toc) != nil {
				t.Errorf("layer %d: %+v", i, l)
			}
			if k := r.find(l.digest); k < i {
				t.Errorf("layer %d is found as %d", i, k)
			}
			_ = r.chain(i)
		}
		if r.find("") >= 0 {
			t.Error("no digest is the digest of a layer")
		}
	})
}

// FuzzInfo: files that lie in the layer store's directory.
func FuzzInfo(f *testing.F) {
	f.Add(encodeLayerInfo(LayerInfo{DiffID: digestOf(nil), Size: 3, UIDs: []uint32{0, 1 << 31}}))
	f.Add([]byte(`{"diff-digest":"sha256:","diff-size":-1}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		info, err := parseLayerInfo(raw)
		if err != nil {
			return
		}
		again, err := parseLayerInfo(encodeLayerInfo(info))
		if err != nil || fmt.Sprint(again) != fmt.Sprint(info) {
			t.Errorf("%+v becomes %+v: %v", info, again, err)
		}
	})
}
