package containerd

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/particle-os/particle/registry"
)

// A loggedRegistry remembers who fetched which blobs.
type loggedRegistry struct {
	*registry.Server
	mu   sync.Mutex
	gets []get
}

type get struct{ digest, agent string }

func newRegistry(t testing.TB) *loggedRegistry {
	t.Helper()
	dir, err := os.MkdirTemp(work, "registry-")
	if err != nil {
		t.Fatal(err)
	}
	r := &loggedRegistry{}
	r.Server, err = registry.Serve(context.Background(), dir, "", &registry.ServeOptions{Wrap: func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if _, digest, ok := strings.Cut(req.URL.Path, "/blobs/"); ok && req.Method == http.MethodGet {
				r.mu.Lock()
				r.gets = append(r.gets, get{digest, req.UserAgent()})
				r.mu.Unlock()
			}
			h.ServeHTTP(w, req)
		})
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Close()
		os.RemoveAll(dir)
	})
	return r
}

// fetched counts the layers of an image that were fetched since the last call, by our
// programs and by others.
func (r *loggedRegistry) fetched(t testing.TB, img v1.Image) (ours, theirs int) {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range layers {
		d, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range r.gets {
			switch {
			case g.digest != d.String():
			case strings.Contains(g.agent, "particle"):
				ours++
			default:
				theirs++
			}
		}
	}
	r.gets = nil
	return ours, theirs
}

func (r *loggedRegistry) push(t testing.TB, repo string, img v1.Image) (ref string) {
	t.Helper()
	ref = r.Addr() + "/" + repo + ":1"
	tag, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, img); err != nil {
		t.Fatal(err)
	}
	return ref
}

// get returns an image that is in the registry.
func (r *loggedRegistry) get(t testing.TB, ref string) v1.Image {
	t.Helper()
	tag, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(tag)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// An entry is one of a layer's tar.
type entry struct {
	tar.Header
	body string
}

var then = time.Unix(1_600_000_000, 0)

func f(name, body string, mode int64) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(body)), ModTime: then}, body}
}

func d(name string, mode int64) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode, ModTime: then}}
}

func link(name, target string, flag byte) entry {
	e := entry{Header: tar.Header{Typeflag: flag, Name: name, Linkname: target, Mode: 0o777, ModTime: then}}
	if flag == tar.TypeLink {
		e.Mode = 0o640 // that of its target
	}
	return e
}

func (e entry) owned(uid, gid int) entry {
	e.Uid, e.Gid = uid, gid
	return e
}

func layerOf(t testing.TB, entries ...entry) v1.Layer {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
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

func imageOf(t testing.TB, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{Architecture: runtime.GOARCH, OS: "linux"})
	if err == nil {
		img, err = mutate.AppendLayers(img, layers...)
	}
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// archive writes an image as docker save does.
func archive(t testing.TB, img v1.Image, ref string) (path string) {
	t.Helper()
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "image.tar")
	if err := tarball.WriteToFile(path, tag, img); err != nil {
		t.Fatal(err)
	}
	return path
}

// shell is a layer with a shell and the directories that a container needs.
func shell(t testing.TB) v1.Layer {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	entries := []entry{
		d("bin", 0o755), f("bin/busybox", string(program), 0o755),
		d("proc", 0o555), d("sys", 0o555), d("dev", 0o755), d("run", 0o755), d("tmp", 0o1777), d("etc", 0o755), d("var", 0o755),
	}
	for _, applet := range []string{"sh", "cat", "find", "sort", "stat", "sha256sum", "sleep", "rm", "mkdir", "mv", "ls", "readlink", "id", "echo", "chown", "true"} {
		entries = append(entries, link("bin/"+applet, "busybox", tar.TypeSymlink))
	}
	return layerOf(t, entries...)
}

// big is the content of files that are no inline ones.
func big(seed int) string { return strings.Repeat(fmt.Sprintf("%d bottles of beer\n", seed), 500) }

// hundred is an image of 100 layers over the shell: each adds a file, removes the one
// of two layers before, and replaces another.
func hundred(t testing.TB) v1.Image {
	layers := []v1.Layer{shell(t)}
	for i := range 99 {
		layers = append(layers, layerOf(t, d("all", 0o755), f(fmt.Sprintf("all/%02d", i), big(i), 0o644),
			f("last", fmt.Sprint(i), 0o644), f(fmt.Sprintf("all/.wh.%02d", i-2), "", 0)))
	}
	return imageOf(t, layers...)
}

// changes is an image whose upper layers delete, replace, rename, chown and hide.
func changes(t testing.TB) v1.Image {
	return imageOf(t, shell(t),
		layerOf(t,
			f("etc/kept", big(1), 0o644), f("etc/deleted", big(2), 0o644), f("etc/back", "first", 0o644),
			f("etc/changed", "old", 0o644), f("etc/chowned", big(3), 0o644), f("etc/chmodded", big(4), 0o644),
			f("etc/from", big(5), 0o644), f("etc/setuid", "#!", 0o4755),
			d("opaque", 0o755), f("opaque/hidden", "x", 0o644), d("opaque/sub", 0o755), f("opaque/sub/hidden", "x", 0o644),
			d("gone", 0o755), f("gone/file", "x", 0o644), d("tofile", 0o755), f("tofile/x", "x", 0o644), f("todir", "x", 0o644),
			d("tolink", 0o755), f("tolink/x", "x", 0o644), d("recreated", 0o700), f("recreated/old", "x", 0o644),
			f("hard1", big(6), 0o640), link("hard2", "hard1", tar.TypeLink), f("hard3", big(7), 0o640), link("hard4", "hard3", tar.TypeLink),
			link("symlink", "etc/kept", tar.TypeSymlink), link("dangling", "nowhere", tar.TypeSymlink),
			d("owned", 0o2775).owned(1, 2), f("owned/file", "x", 0o600).owned(3, 4), f("empty", "", 0o600),
			entry{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o622, ModTime: then}},
			entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3, ModTime: then}},
			f("unlisted/deep/file", big(8), 0o644), f(strings.Repeat("n", 250), "long name", 0o644)),
		layerOf(t,
			f("etc/.wh.deleted", "", 0), f("etc/.wh.back", "", 0), f("etc/changed", "new", 0o600),
			f("etc/chowned", big(3), 0o644).owned(1000, 1000), f("etc/chmodded", big(4), 0o400),
			f("etc/.wh.from", "", 0), f("etc/to", big(5), 0o644),
			d("opaque", 0o750), f("opaque/.wh..wh..opq", "", 0), f("opaque/new", "n", 0o644),
			f(".wh.gone", "", 0), f("tofile", "now a file", 0o644), d("todir", 0o711), f("todir/y", "y", 0o644),
			link("tolink", "etc", tar.TypeSymlink), f(".wh.recreated", "", 0), f(".wh.hard2", "", 0),
			d("owned", 0o2770).owned(5, 6)),
		layerOf(t,
			f("etc/back", "second", 0o644), d("recreated", 0o711), f("recreated/new", "x", 0o644), f("opaque/.wh.new", "", 0),
			f("opaque/hidden", "again", 0o644), f("hard3", "no link any more", 0o644), f("unlisted/deep/.wh.file", "", 0)))
}

// listing prints what a container sees, but for mount points. Sizes of directories are
// the file system's own affair, and numbers of links: overlayfs also counts names that an
// upper layer removed.
const listing = `find / -xdev | sort | while IFS= read -r p; do case $p in /proc|/sys|/dev|/run|/dev/*|/etc/resolv.conf|/etc/hosts|/) continue;; esac
	if [ -L "$p" ]; then stat -c '%n %f %u:%g' "$p"; readlink "$p"
	elif [ -d "$p" ]; then stat -c '%n %f %u:%g' "$p"
	elif [ -f "$p" ]; then stat -c '%n %f %u:%g %s %Y' "$p"; sha256sum <"$p"
	else stat -c '%n %f %u:%g %t,%T' "$p"; fi; done`
