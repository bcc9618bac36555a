package converter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/layer"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

// Errors of this package; test with errors.Is.
var (
	// ErrManifest: a manifest or config is not one, or the two do not fit.
	ErrManifest = errors.New("bad image manifest")
	// ErrNotFound: the store has no image of that name.
	ErrNotFound = errors.New("no such image")
	// ErrAmbiguous: a digest's prefix fits several images.
	ErrAmbiguous = errors.New("more than one image fits")
)

// maxJSON limits manifests and configs, in bytes: registries refuse manifests over
// 4 MiB (OCI distribution-spec, "Pushing Manifests").
const maxJSON = 8 << 20

// maxName limits names in bytes: each is the name of one file.
const maxName = 255

// Options say how to convert. The zero value is useful.
type Options struct {
	// Name is the tag under which the store keeps the image, "" for none: the image
	// is then found by digest, until the next garbage collection.
	Name string
	// Bootable also makes the image of kind Bootable, and fails where it cannot be.
	Bootable bool
	// KeepBlobs also stores each layer's compressed bytes, so that Export gives the
	// same manifest whoever compressed them.
	KeepBlobs bool
	// MaxLayerSize limits the uncompressed bytes of one layer: 0 is
	// [layer.DefaultMaxSize], negative no limit.
	MaxLayerSize int64
	// Architecture of a directory or tar, which do not say ("amd64"); "" is this
	// machine's.
	Architecture string
	// Link lets files of a directory be hard-linked into the store instead of
	// copied. The caller promises that nobody writes to them any more.
	Link bool
	// CrossMounts takes what is mounted below a directory, too.
	CrossMounts bool
	Progress    Progress
	// Warn is told what was settled in a way that the user may want to know.
	Warn func(format string, args ...any)
}

func (o *Options) defaults() {
	if o.Progress == nil {
		o.Progress = discard{}
	}
	if o.Warn == nil {
		o.Warn = func(string, ...any) {}
	}
}

// A Result says what a conversion made.
type Result struct {
	Name     string                     `json:"name,omitempty"`
	Manifest v1.Hash                    `json:"manifest"`
	Config   v1.Hash                    `json:"config"`
	Layers   []LayerResult              `json:"layers"`
	Images   map[string]fsverity.Digest `json:"images"` // by kind
	// What the store did not have before.
	NewObjects int   `json:"newObjects"`
	NewBytes   int64 `json:"newBytes"`
}

// A LayerResult is one layer of a converted image.
type LayerResult struct {
	DiffID v1.Hash `json:"diffID"`
	Size   int64   `json:"size"` // uncompressed bytes
	// Present says that the store had the layer: nothing was fetched.
	Present bool `json:"present,omitempty"`
}

// aLayer is a layer on its way into the store.
type aLayer struct {
	LayerResult
	tree   *tree.Tree
	stream fsverity.Digest
	// The stored compressed bytes, where they are kept: their digest and stream.
	blobID     v1.Hash
	blobStream fsverity.Digest
}

// Convert brings an image into the store: its layers as split streams, its files as
// objects, and the composefs images made of it. What the store has already is not
// fetched. On an error the store is left as it was.
func Convert(ctx context.Context, img Image, st *store.Store, o Options) (_ *Result, err error) {
	o.defaults()
	if err := checkName(o.Name); err != nil {
		return nil, err
	}
	raw, mediaType, err := img.Manifest(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the manifest: %w", err)
	}
	m, err := parseManifest(raw, mediaType)
	if err != nil {
		return nil, err
	}
	rawConfig, err := readBlob(ctx, img, m.Config)
	if err != nil {
		return nil, fmt.Errorf("reading config %s: %w", m.Config.Digest, err)
	}
	diffIDs, err := parseDiffIDs(rawConfig, len(m.Layers))
	if err != nil {
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

	layers, err := (&fetch{img, st, txn, o, m.Layers, diffIDs}).all(ctx)
	if err != nil {
		return nil, err
	}
	return commit(ctx, st, txn, raw, rawConfig, layers, o)
}

// checkName refuses names that the store could not keep, before anything is fetched.
func checkName(name string) error {
	if encoded := store.EncodeTag(name); len(encoded) > maxName || strings.ContainsRune(name, 0) || name == "." || name == ".." {
		return fmt.Errorf("%w: %.40q has %d bytes as the store writes it, want 1 to %d and no zero bytes", store.ErrBadName, name, len(encoded), maxName)
	}
	return nil
}

// parseManifest reads an image manifest.
func parseManifest(raw []byte, mediaType string) (*v1.Manifest, error) {
	var m v1.Manifest
	if len(raw) > maxJSON {
		return nil, fmt.Errorf("%w: got %d bytes, want at most %d", ErrManifest, len(raw), maxJSON)
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrManifest, err)
	}
	if m.SchemaVersion != 2 {
		return nil, fmt.Errorf("%w: schemaVersion is %d, want 2 (media type %q)", ErrManifest, m.SchemaVersion, mediaType)
	}
	if m.Config.Digest.Hex == "" {
		return nil, fmt.Errorf("%w: it has no config: want an image manifest, got media type %q", ErrManifest, mediaType)
	}
	for i, d := range append([]v1.Descriptor{m.Config}, m.Layers...) {
		if d.Digest.Algorithm != "sha256" || len(d.Digest.Hex) != 64 {
			return nil, fmt.Errorf("%w: descriptor %d has digest %q, want a sha256", ErrManifest, i, d.Digest)
		}
		if d.Size < 0 {
			return nil, fmt.Errorf("%w: descriptor %d has size %d", ErrManifest, i, d.Size)
		}
	}
	return &m, nil
}

// parseDiffIDs reads the diffIDs of an image config (OCI image-spec, config.md) and
// checks that there is one a layer.
func parseDiffIDs(raw []byte, layers int) ([]v1.Hash, error) {
	var c struct {
		RootFS struct {
			Type    string    `json:"type"`
			DiffIDs []v1.Hash `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal(raw, &c); err != nil {
		return nil, fmt.Errorf("%w: reading the config: %v", ErrManifest, err)
	}
	if got := len(c.RootFS.DiffIDs); got != layers {
		return nil, fmt.Errorf("%w: the config has %d diffIDs and the manifest %d layers: is this an image of files?", ErrManifest, got, layers)
	}
	for i, d := range c.RootFS.DiffIDs {
		if d.Algorithm != "sha256" || len(d.Hex) != 64 {
			return nil, fmt.Errorf("%w: diffID %d is %q, want a sha256", ErrManifest, i, d)
		}
	}
	return c.RootFS.DiffIDs, nil
}

// Architecture returns what an image that is not in the store yet is for, as its config says
// ("amd64"); "" where it does not.
func Architecture(ctx context.Context, img Image) (string, error) {
	raw, mediaType, err := img.Manifest(ctx)
	if err != nil {
		return "", fmt.Errorf("reading the manifest: %w", err)
	}
	m, err := parseManifest(raw, mediaType)
	if err != nil {
		return "", err
	}
	rawConfig, err := readBlob(ctx, img, m.Config)
	if err != nil {
		return "", fmt.Errorf("reading config %s: %w", m.Config.Digest, err)
	}
	var c struct {
		Architecture string `json:"architecture"`
	}
	if err := json.Unmarshal(rawConfig, &c); err != nil {
		return "", fmt.Errorf("%w: reading the config: %v", ErrManifest, err)
	}
	return c.Architecture, nil
}

// readBlob reads a small blob whole.
func readBlob(ctx context.Context, img Image, desc v1.Descriptor) (_ []byte, err error) {
	if desc.Size > maxJSON {
		return nil, fmt.Errorf("%w: got %d bytes, want at most %d", ErrManifest, desc.Size, maxJSON)
	}
	r, err := img.Blob(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	return io.ReadAll(io.LimitReader(r, maxJSON+1))
}

// fetch brings the layers of one image into a transaction.
type fetch struct {
	img     Image
	st      *store.Store
	txn     *store.Txn
	o       Options
	descs   []v1.Descriptor
	diffIDs []v1.Hash
}

// A layerKey tells layers apart.
type layerKey struct{ diffID, blob v1.Hash }

// key tells which layers are the same: those of one diffID, and of one blob where
// blobs are kept.
func (f *fetch) key(i int) layerKey {
	if f.keeps(i) {
		return layerKey{f.diffIDs[i], f.descs[i].Digest}
	}
	return layerKey{diffID: f.diffIDs[i]}
}

// all reads the layers side by side, the same ones once.
func (f *fetch) all(ctx context.Context) ([]*aLayer, error) {
	for i := range f.descs {
		f.progress(i, LayerWaiting, 0)
	}
	layers := make([]*aLayer, len(f.descs))
	first := map[layerKey]int{}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(max(2, runtime.GOMAXPROCS(0)))
	for i := range f.descs {
		if _, ok := first[f.key(i)]; ok {
			continue
		}
		first[f.key(i)] = i
		g.Go(func() error {
			l, err := f.one(gctx, i)
			if err != nil {
				return fmt.Errorf("reading layer %d of %d, %s: %w", i+1, len(f.descs), f.descs[i].Digest, err)
			}
			layers[i] = l
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		if cause := context.Cause(ctx); ctx.Err() != nil {
			return nil, cause
		}
		return nil, err
	}
	for i := range layers {
		if layers[i] == nil { // the same layer again, as empty layers often are
			again := *layers[first[f.key(i)]]
			layers[i] = &again
			f.progress(i, LayerPresent, f.descs[i].Size)
		}
	}
	return layers, nil
}

func (f *fetch) progress(i int, s State, bytes int64) {
	f.o.Progress.Progress(Event{Layer: i, Layers: len(f.descs), ID: f.descs[i].Digest.String(), State: s, Bytes: bytes, Size: f.descs[i].Size})
}

// one brings one layer into the transaction, from the store if that has it.
func (f *fetch) one(ctx context.Context, i int) (*aLayer, error) {
	if l, err := f.present(ctx, i); l != nil || err != nil {
		if err == nil {
			f.progress(i, LayerPresent, f.descs[i].Size)
		}
		return l, err
	}
	if img, ok := f.img.(Recorder); ok && !f.keeps(i) {
		return f.record(ctx, img, i)
	}
	f.progress(i, LayerStarted, 0)
	desc := f.descs[i]
	blob, err := f.img.Blob(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer blob.Close()

	var r io.Reader = &counted{r: blob, moved: func(n int64) { f.progress(i, LayerMoved, n) }}
	var keep *keeper
	if f.keeps(i) {
		keep = keepBlob(ctx, f.txn, desc)
		r = io.TeeReader(r, keep)
	}
	stream := f.txn.NewStream(store.LayerStream)
	res, err := layer.Read(ctx, r, f.txn, stream, layer.Options{
		MaxSize: f.o.MaxLayerSize,
		DiffID:  f.diffIDs[i].String(),
	})
	if keep != nil {
		// Where reading failed the keeper was cut off: that is no second reason.
		if kept := keep.Close(); err == nil {
			err = kept
		}
	}
	if err != nil {
		stream.Abort()
		return nil, err
	}
	for _, w := range res.Warnings {
		f.o.Warn("layer %d of %d, %s: %s", i+1, len(f.descs), desc.Digest, w)
	}
	id, err := stream.Close(store.LayerPrefix + f.diffIDs[i].String())
	if err != nil {
		return nil, err
	}
	f.progress(i, LayerDone, desc.Size)
	l := &aLayer{
		LayerResult: LayerResult{DiffID: f.diffIDs[i], Size: res.Size},
		tree:        res.Tree, stream: id,
	}
	if keep != nil {
		l.blobID, l.blobStream = desc.Digest, keep.stream
	}
	return l, nil
}

// keeps reports whether the compressed bytes of a layer are to be stored. Those of
// an uncompressed layer are its stream.
func (f *fetch) keeps(i int) bool {
	return f.o.KeepBlobs && f.descs[i].Digest != f.diffIDs[i]
}

// present returns a layer that the store has, nil if it has not.
func (f *fetch) present(ctx context.Context, i int) (*aLayer, error) {
	l, err := openLayer(ctx, f.st, f.txn, f.diffIDs[i], f.o.MaxLayerSize)
	if err != nil || l == nil {
		return nil, err
	}
	if f.keeps(i) {
		blob, err := f.st.StreamDigest(store.BlobPrefix + f.descs[i].Digest.String())
		if errors.Is(err, store.ErrNotFound) {
			return nil, nil // read it again: the compressed bytes are wanted too
		}
		if err != nil {
			return nil, err
		}
		l.blobID, l.blobStream = f.descs[i].Digest, blob
	}
	return l, nil
}

// openLayer reads the tree of a layer that the store has, nil if it has not.
func openLayer(ctx context.Context, st *store.Store, txn *store.Txn, diffID v1.Hash, limit int64) (*aLayer, error) {
	id, err := st.StreamDigest(store.LayerPrefix + diffID.String())
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	stream, err := st.OpenStreamDigest(id, store.LayerStream)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	t, err := layer.FromChunks(ctx, stream, opener(txn), txn, layer.Options{MaxSize: limit})
	if err != nil {
		return nil, fmt.Errorf("reading the stored layer %s (particle store fsck says more): %w", diffID, err)
	}
	return &aLayer{
		LayerResult: LayerResult{DiffID: diffID, Size: stream.Size(), Present: true},
		tree:        t, stream: id,
	}, nil
}

// opener opens the objects of a transaction or its store.
func opener(txn *store.Txn) layer.Opener {
	return func(d fsverity.Digest) (io.ReadSeekCloser, error) { return txn.OpenObject(d) }
}

// counted tells how many bytes were read.
type counted struct {
	r     io.Reader
	n     int64
	moved func(total int64)
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if n > 0 {
		c.moved(c.n)
	}
	return n, err
}

// A keeper stores the bytes written to it as a blob.
type keeper struct {
	w      *io.PipeWriter
	done   sync.WaitGroup
	stream fsverity.Digest // valid after Close
	err    error
}

// keepBlob starts to store a blob of known digest and size.
func keepBlob(ctx context.Context, txn *store.Txn, desc v1.Descriptor) *keeper {
	r, w := io.Pipe()
	k := &keeper{w: w}
	k.done.Go(func() {
		k.stream, k.err = putStream(ctx, txn, r, desc.Size, store.BlobStream, store.BlobPrefix+desc.Digest.String(), nil)
		if k.err != nil {
			r.CloseWithError(k.err)
		} else {
			r.CloseWithError(fmt.Errorf("%w: blob %s is longer than the %d bytes that it says", ErrManifest, desc.Digest, desc.Size))
		}
	})
	return k
}

func (k *keeper) Write(p []byte) (int, error) { return k.w.Write(p) }

func (k *keeper) Close() error {
	k.w.Close()
	k.done.Wait()
	return k.err
}
