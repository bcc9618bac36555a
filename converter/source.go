package converter

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/layer"
	"github.com/particle-os/particle/converter/scan"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

// ConvertTar brings a root file system's tar archive into the store, compressed or
// not, as an image of one layer. The layer is the archive's own uncompressed bytes.
// size is that of the archive, for the progress; 0 where nobody knows.
func ConvertTar(ctx context.Context, r io.Reader, size int64, st *store.Store, o Options) (*Result, error) {
	o.defaults()
	r = &counted{r: r, moved: func(n int64) { o.one(LayerMoved, n, size) }}
	return convertOne(ctx, st, o, func(txn *store.Txn) (*aLayer, error) {
		stream := txn.NewStream(store.LayerStream)
		res, err := layer.Read(ctx, r, txn, stream, layer.Options{MaxSize: o.MaxLayerSize})
		if err != nil {
			stream.Abort()
			return nil, err
		}
		if transport := imageArchive(res.Tree); transport != "" {
			stream.Abort()
			return nil, &ArchiveError{transport}
		}
		for _, w := range res.Warnings {
			o.Warn("%s", w)
		}
		return closeLayer(stream, res.DiffID, res.Size, tree.Merge(tree.New(), res.Tree))
	})
}

// An ArchiveError says that a tar holds an image, with layers and all, where a root
// file system was wanted.
type ArchiveError struct{ Transport string } // "oci-archive" or "docker-archive"

func (e *ArchiveError) Error() string {
	return "this is an " + e.Transport + " of an image, not a root file system"
}

// imageArchive tells which archive of an image a tar's tree looks like, "" if none.
func imageArchive(t *tree.Tree) string {
	has := func(name string) bool { n := t.Root.Dir[name]; return n != nil && n.IsRegular() }
	switch {
	case has("oci-layout") && has("index.json"):
		return "oci-archive"
	case has("manifest.json") && t.Root.Dir["usr"] == nil && t.Root.Dir["etc"] == nil:
		return "docker-archive"
	}
	return ""
}

// ConvertDir brings a directory into the store as an image of one layer. Sockets
// are left out: no archive can hold them. What is mounted below is left out too,
// unless o says otherwise.
func ConvertDir(ctx context.Context, dir string, st *store.Store, o Options) (*Result, error) {
	o.defaults()
	inside, err := isBelow(st.Dir(), dir)
	if err != nil {
		return nil, err
	}
	if inside {
		return nil, fmt.Errorf("the store %q lies in the directory %q: --store names another", st.Dir(), dir)
	}
	return convertOne(ctx, st, o, func(txn *store.Txn) (*aLayer, error) {
		txn.SetImmutableSources(o.Link)
		t, err := scan.Dir(ctx, dir, &countedFiles{Txn: txn, o: &o}, scan.Options{OneFileSystem: !o.CrossMounts})
		if err != nil {
			return nil, err
		}
		return recordTree(ctx, txn, t, o)
	})
}

// ConvertComposefs brings a composefs image into the store as an image of one layer.
// open opens the object at a path below the image's objects directories.
func ConvertComposefs(ctx context.Context, image *os.File, open func(path string) (*os.File, error), st *store.Store, o Options) (*Result, error) {
	fi, err := image.Stat()
	if err != nil {
		return nil, err
	}
	t, err := erofs.Read(image, fi.Size())
	if err != nil {
		return nil, fmt.Errorf("reading %q: %w", image.Name(), err)
	}
	o.defaults()
	return convertOne(ctx, st, o, func(txn *store.Txn) (*aLayer, error) {
		// The tree is ours alone until it is recorded, so its files may be set.
		done := map[*tree.File]bool{}
		bytes := int64(0)
		err := t.Walk(func(path string, n *tree.Node) error {
			if !n.IsRegular() || n.File == nil || n.File.Path() == "" || done[n.File] {
				return nil
			}
			done[n.File] = true
			if err := importObject(ctx, txn, n.File, open); err != nil {
				return fmt.Errorf("importing %q: %w", path, err)
			}
			bytes += n.File.Size
			o.one(LayerMoved, bytes, 0)
			return nil
		})
		if err != nil {
			return nil, err
		}
		return recordTree(ctx, txn, t, o)
	})
}

// isBelow reports whether a path is a directory or lies below it.
func isBelow(path, dir string) (bool, error) {
	for _, p := range []*string{&path, &dir} {
		real, err := filepath.EvalSymlinks(*p)
		if err != nil {
			return false, err
		}
		if *p, err = filepath.Abs(real); err != nil {
			return false, err
		}
	}
	rel, err := filepath.Rel(dir, path)
	return err == nil && filepath.IsLocal(rel), nil
}

// countedFiles tells how many bytes of files were stored.
type countedFiles struct {
	*store.Txn
	o *Options
	n atomic.Int64
}

func (c *countedFiles) PutFile(ctx context.Context, f *os.File, size int64) (fsverity.Digest, error) {
	d, err := c.Txn.PutFile(ctx, f, size)
	if err == nil {
		c.o.one(LayerMoved, c.n.Add(size), 0)
	}
	return d, err
}

// one tells how far the only layer of an image is.
func (o *Options) one(s State, bytes, size int64) {
	o.Progress.Progress(Event{Layers: 1, ID: o.Name, State: s, Bytes: bytes, Size: size})
}

// importObject copies the object of a file into the store and checks its digest.
func importObject(ctx context.Context, txn *store.Txn, f *tree.File, open func(string) (*os.File, error)) error {
	obj, err := open(f.Path())
	if err != nil {
		return err
	}
	defer obj.Close()
	d, err := txn.PutFile(ctx, obj, f.Size)
	if err != nil {
		return err
	}
	if want := f.Object; !want.IsZero() {
		got := d
		if want.Algorithm() != d.Algorithm() {
			if got, _, err = fsverity.Read(want.Algorithm(), io.NewSectionReader(obj, 0, f.Size)); err != nil {
				return err
			}
		}
		if got != want {
			return fmt.Errorf("object %s has the fs-verity digest %s: it was changed", f.Path(), got)
		}
	}
	f.Object, f.Payload = d, ""
	return nil
}

// recordTree writes a tree as a layer.
func recordTree(ctx context.Context, txn *store.Txn, t *tree.Tree, o Options) (*aLayer, error) {
	rec := &hashing{StreamWriter: txn.NewStream(store.LayerStream), txn: txn, sum: sha256.New()}
	err := layer.Write(ctx, t, rec, layer.WriteOptions{Warn: func(w string) { o.Warn("%s", w) }})
	if err != nil {
		rec.Abort()
		return nil, err
	}
	l, err := closeLayer(rec.StreamWriter, "sha256:"+hex.EncodeToString(rec.sum.Sum(nil)), rec.size, nil)
	if err != nil {
		return nil, err
	}
	// The tree is read back from the layer: there is one way from bytes to trees.
	stream, err := txn.OpenStreamDigest(l.stream, store.LayerStream)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	l.tree, err = layer.FromChunks(ctx, stream, opener(txn), txn, layer.Options{MaxSize: -1})
	return l, err
}

// hashing records a layer and computes its diffID.
type hashing struct {
	*store.StreamWriter
	txn  *store.Txn
	sum  hash.Hash
	size int64
}

func (h *hashing) Inline(p []byte) error {
	h.sum.Write(p)
	h.size += int64(len(p))
	return h.StreamWriter.Inline(p)
}

func (h *hashing) Object(d fsverity.Digest, size int64) error {
	f, err := h.txn.OpenObject(d)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.Copy(h.sum, f)
	if err != nil {
		return fmt.Errorf("reading object %s: %w", d, err)
	}
	if n != size {
		return fmt.Errorf("reading object %s: got %d bytes, want %d", d, n, size)
	}
	h.size += size
	return h.StreamWriter.Object(d, size)
}

func closeLayer(stream *store.StreamWriter, diffID string, size int64, t *tree.Tree) (*aLayer, error) {
	h, err := v1.NewHash(diffID)
	if err != nil {
		return nil, err
	}
	id, err := stream.Close(store.LayerPrefix + diffID)
	if err != nil {
		return nil, err
	}
	return &aLayer{LayerResult: LayerResult{DiffID: h, Size: size}, tree: t, stream: id}, nil
}

// convertOne makes an image of one layer, with a manifest and a config of our own.
func convertOne(ctx context.Context, st *store.Store, o Options, read func(*store.Txn) (*aLayer, error)) (_ *Result, err error) {
	if err := checkName(o.Name); err != nil {
		return nil, err
	}
	txn, err := st.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, txn.Rollback())
		}
	}()
	l, err := read(txn)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	o.one(LayerDone, l.Size, l.Size)
	raw, rawConfig, err := describeLayer(l, o)
	if err != nil {
		return nil, err
	}
	return commit(ctx, st, txn, raw, rawConfig, []*aLayer{l}, o)
}

// describeLayer makes the manifest and the config of an image of one uncompressed
// layer. Both follow from the layer: the image is dated as its newest file.
func describeLayer(l *aLayer, o Options) (raw, rawConfig []byte, err error) {
	arch := o.Architecture
	if arch == "" {
		arch = runtime.GOARCH
	}
	created := v1.Time{Time: newest(l.tree)}
	config, err := json.Marshal(v1.ConfigFile{
		Architecture: arch,
		OS:           "linux",
		Created:      created,
		RootFS:       v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{l.DiffID}},
		History:      []v1.History{{Created: created, CreatedBy: "particle convert"}},
	})
	if err != nil {
		return nil, nil, err
	}
	raw, err = json.Marshal(v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		Config:        v1.Descriptor{MediaType: types.OCIConfigJSON, Size: int64(len(config)), Digest: hashOf(config)},
		Layers:        []v1.Descriptor{{MediaType: types.OCIUncompressedLayer, Size: l.Size, Digest: l.DiffID}},
	})
	return raw, config, err
}

// newest returns the latest mtime in a tree, to the second.
func newest(t *tree.Tree) time.Time {
	var sec int64
	_ = t.Walk(func(_ string, n *tree.Node) error {
		sec = max(sec, n.MtimeSec)
		return nil
	})
	const year9999 = 253402300799 // the last second that JSON's time format holds
	return time.Unix(min(sec, year9999), 0).UTC()
}
