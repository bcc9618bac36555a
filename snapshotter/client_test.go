package snapshotter_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/unpack"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sync/semaphore"
)

// An image is an OCI image in memory.
type image struct {
	manifest ocispec.Descriptor
	layers   []ocispec.Descriptor
	diffIDs  []digest.Digest
	blobs    map[digest.Digest][]byte
}

func (i *image) add(mediaType string, blob []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	i.blobs[d.Digest] = blob
	return d
}

func (i *image) chains() []digest.Digest {
	return identity.ChainIDs(append([]digest.Digest{}, i.diffIDs...))
}

// newImage makes an image of layers that are plain tars.
func newImage(t testing.TB, layers ...[]byte) *image {
	t.Helper()
	i := &image{blobs: map[digest.Digest][]byte{}}
	for _, l := range layers {
		var buf bytes.Buffer
		w := gzip.NewWriter(&buf)
		w.Write(l)
		w.Close()
		i.layers = append(i.layers, i.add(ocispec.MediaTypeImageLayerGzip, buf.Bytes()))
		i.diffIDs = append(i.diffIDs, digest.FromBytes(l))
	}
	config, err := json.Marshal(ocispec.Image{
		Platform: ocispec.Platform{Architecture: runtime.GOARCH, OS: "linux"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: i.diffIDs},
	})
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    i.add(ocispec.MediaTypeImageConfig, config),
		Layers:    i.layers,
	})
	if err != nil {
		t.Fatal(err)
	}
	i.manifest = i.add(ocispec.MediaTypeImageManifest, manifest)
	return i
}

// A client does what containerd does when it pulls: its metadata database, content
// store and unpacker.
type client struct {
	db       *metadata.DB
	content  content.Store
	sn       snapshots.Snapshotter
	applier  diff.Applier
	parallel bool
	fetched  atomic.Int32 // layers
}

// An applierFunc makes a differ that reads from a content store.
type applierFunc func(content.Provider) diff.Applier

func walking(cs content.Provider) diff.Applier { return apply.NewFileSystemApplier(cs) }

// ours is the chain of differs that containerd is configured with.
func ours(e *env) applierFunc {
	return func(cs content.Provider) diff.Applier {
		return chain{e.Differ(provider{cs}), walking(cs)}
	}
}

type provider struct{ content.Provider }

func (p provider) Blob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	at, err := p.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{content.NewReader(at), at}, nil
}

// chain asks one differ after the other, as containerd's diff service does.
type chain []diff.Applier

func (c chain) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mountT, opts ...diff.ApplyOpt) (d ocispec.Descriptor, err error) {
	for _, a := range c {
		if d, err = a.Apply(ctx, desc, mounts, opts...); !errdefs.IsNotImplemented(err) {
			break
		}
	}
	return d, err
}

// newClient makes a containerd with an empty database.
func newClient(t testing.TB, sn snapshots.Snapshotter, differ applierFunc, parallel bool) *client {
	t.Helper()
	dir := t.TempDir()
	cs, err := local.NewStore(filepath.Join(dir, "content"))
	if err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	c := &client{parallel: parallel}
	c.db = metadata.NewDB(db, cs, map[string]snapshots.Snapshotter{"particle": sn})
	c.content, c.sn = c.db.ContentStore(), c.db.Snapshotter("particle")
	c.applier = differ(c.content)
	return c
}

func inNamespace(ctx context.Context) context.Context { return namespaces.WithNamespace(ctx, "test") }

// pull fetches and unpacks an image and returns the name of its top snapshot.
func (c *client) pull(ctx context.Context, i *image) (string, error) {
	platform := unpack.Platform{SnapshotterKey: "particle", Snapshotter: c.sn, Applier: c.applier}
	var opts []unpack.UnpackerOpt
	if c.parallel {
		platform.SnapshotterCapabilities = []string{snapshots.RebaseCap}
		opts = append(opts, unpack.WithUnpackLimiter(semaphore.NewWeighted(4)))
	}
	u, err := unpack.NewUnpacker(ctx, c.content, append(opts, unpack.WithUnpackPlatform(platform))...)
	if err != nil {
		return "", err
	}
	fetch := images.HandlerFunc(func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if images.IsLayerType(desc.MediaType) {
			c.fetched.Add(1)
		}
		err := content.WriteBlob(ctx, c.content, "fetch-"+desc.Digest.String(), bytes.NewReader(i.blobs[desc.Digest]), desc)
		if err != nil {
			return nil, err
		}
		return images.Children(ctx, c.content, desc)
	})
	err = images.Dispatch(ctx, u.Unpack(fetch), nil, i.manifest)
	_, uerr := u.Wait()
	chains := i.chains()
	return chains[len(chains)-1].String(), errors.Join(err, uerr)
}

// tarOf makes a layer.
func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := tar.Header(e.h)
		h.ModTime = time.Unix(1_600_000_000, 0)
		h.Size = int64(len(e.body))
		if h.Size > 0 {
			h.Typeflag = tar.TypeReg
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

type entry struct {
	h    tar.Header
	body string
}

func d(name string, mode int64, ids ...int) entry {
	h := tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}
	if len(ids) == 2 {
		h.Uid, h.Gid = ids[0], ids[1]
	}
	return entry{h: h}
}

func f(name, body string, mode int64, ids ...int) entry {
	h := tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}
	if len(ids) == 2 {
		h.Uid, h.Gid = ids[0], ids[1]
	}
	return entry{h: h, body: body}
}

func l(name, target string) entry {
	return entry{h: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

func hard(name, target string) entry {
	return entry{h: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o4755}}
}

func withXattr(e entry, key, value string) entry {
	e.h.PAXRecords = map[string]string{"SCHILY.xattr." + key: value}
	return e
}

// testImage is an image whose layers do to each other what layers can do.
func testImage(t testing.TB) *image {
	return newImage(t,
		tarOf(t, d("etc", 0o755), f("etc/passwd", "root\n", 0o644), f("etc/shadow", "s", 0o600, 0, 42),
			d("dir", 0o750, 5, 6), f("dir/a", big+"a", 0o644), f("dir/b", "b", 0o640, 7, 8), d("dir/sub", 0o700), f("dir/sub/c", big, 0o644),
			d("var", 0o755), d("var/lib", 0o711, 3, 4), f("var/lib/x", "x", 0o644),
			f("bin/tool", big+"tool", 0o4755), hard("bin/again", "bin/tool"), l("lib", "usr/lib"), d("usr", 0o755), d("usr/lib", 0o755)),
		// whiteouts, of a file and of a directory
		tarOf(t, d("etc", 0o755), f("etc/.wh.shadow", "", 0), d("dir", 0o750, 5, 6), f("dir/.wh.sub", "", 0)),
		// a parent that the layer does not list keeps its owner and mode
		tarOf(t, f("var/lib/y", big+"y", 0o644)),
		// opaque, and a file that replaces a directory
		tarOf(t, d("dir", 0o711, 9, 9), f("dir/.wh..wh..opq", "", 0), f("dir/new", "new", 0o644), f("usr/lib/.wh..wh..opq", "", 0), d("usr/lib", 0o755), f("usr/lib/z", "z", 0o644)),
		// nothing at all
		tarOf(t),
		withXattrLayer(t),
	)
}

func withXattrLayer(t testing.TB) []byte {
	return tarOf(t, withXattr(f("cap", big+"cap", 0o755), "user.k", "v"), f("var/.wh.none", "", 0), d("etc", 0o700), f("etc/passwd", "changed\n", 0o600, 1, 1))
}

// manyLayers is an image of n layers.
func manyLayers(t testing.TB, n int) *image {
	var layers [][]byte
	for i := range n {
		layers = append(layers, tarOf(t, d("all", 0o755), f(fmt.Sprintf("all/%03d", i), fmt.Sprintf("%d %s", i, big), 0o644),
			f("last", fmt.Sprintf("%d", i), 0o644), f("all/.wh."+fmt.Sprintf("%03d", i-2), "", 0)))
	}
	return newImage(t, layers...)
}

// old is a snapshotter as an older containerd uses it: without some labels.
type old struct {
	snapshots.Snapshotter
	without []string
}

func (o old) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mountT, error) {
	opts = append(append([]snapshots.Opt{}, opts...), func(info *snapshots.Info) error {
		for _, l := range o.without {
			delete(info.Labels, l)
		}
		return nil
	})
	return o.Snapshotter.Prepare(ctx, key, parent, opts...)
}

// Blob opens a blob for the converter.
func (i *image) Blob(_ context.Context, desc v1.Descriptor) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(i.blobs[digest.Digest(desc.Digest.String())])), nil
}
