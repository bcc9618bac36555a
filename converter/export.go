package converter

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/errgroup"

	"github.com/particle-os/particle/converter/layer"
	"github.com/particle-os/particle/converter/store"
)

// ExportOptions say how to export. The zero value keeps what the manifest says.
type ExportOptions struct {
	// Compression recompresses all layers: "none", "gzip" or "zstd"; "" is what the
	// manifest says of each.
	Compression string
	// TempDir takes recompressed layers until the target has them; "" is $TMPDIR or
	// /var/tmp.
	TempDir string
	// OCI makes an OCI manifest of a Docker one (schema 2), for targets that hold
	// nothing else. The config's bytes stay; the manifest's digest cannot.
	OCI      bool
	Progress Progress
}

// An ExportResult says what was exported.
type ExportResult struct {
	Manifest v1.Hash         `json:"manifest"`
	Config   v1.Hash         `json:"config"`
	Layers   []v1.Descriptor `json:"layers"`
	// Same says that the manifest is the one that was converted: the compressed
	// bytes were kept, or there are none, or compressing gave the same again.
	Same bool `json:"same"`
}

// Export gives an image of the store to a target. The bytes of each layer are those
// that were converted, so diffIDs and config hold. Layers that came compressed are
// taken from the kept blob if there is one and compressed anew otherwise; where that
// gives other bytes the manifest describes those.
func Export(ctx context.Context, st *store.Store, s *Stored, target Target, o ExportOptions) (*ExportResult, error) {
	if o.Progress == nil {
		o.Progress = discard{}
	}
	release, err := st.Hold(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	if o.TempDir == "" {
		// Not /tmp, which is memory on many systems: layers are large.
		if o.TempDir = os.Getenv("TMPDIR"); o.TempDir == "" {
			o.TempDir = "/var/tmp"
		}
	}
	dir, err := os.MkdirTemp(o.TempDir, "particle-export-")
	if err != nil {
		return nil, fmt.Errorf("making a directory for compressed layers: %w", err)
	}
	defer os.RemoveAll(dir)

	m, err := parseManifest(s.RawManifest, "")
	if err != nil {
		return nil, err
	}
	if isDocker(m.MediaType) && (o.OCI || o.Compression == layer.Zstd.String()) {
		// Docker's format knows no zstd.
		m.MediaType = types.OCIManifestSchema1
		m.Config.MediaType = types.OCIConfigJSON
		for i := range m.Layers {
			m.Layers[i].MediaType = ociLayer(m.Layers[i].MediaType)
		}
	}

	e := &export{st: st, s: s, descs: m.Layers, target: target, o: o, dir: dir}
	descs := make([]v1.Descriptor, len(m.Layers))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(max(2, runtime.GOMAXPROCS(0)))
	for i := range descs {
		e.progress(i, LayerWaiting, 0)
		g.Go(func() error {
			d, err := e.layer(gctx, i)
			if err != nil {
				return fmt.Errorf("exporting layer %d of %d, %s: %w", i+1, len(descs), s.Layers[i], err)
			}
			descs[i] = d
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, err
	}

	config := m.Config
	err = target.PutBlob(ctx, config, func() (io.ReadCloser, error) {
		return io.NopCloser(strings.NewReader(string(s.RawConfig))), nil
	})
	if err != nil {
		return nil, fmt.Errorf("exporting config %s: %w", config.Digest, err)
	}
	raw, err := withLayers(s.RawManifest, m, descs)
	if err != nil {
		return nil, err
	}
	if err := target.PutManifest(ctx, raw, mediaTypeOf(m)); err != nil {
		return nil, fmt.Errorf("exporting the manifest: %w", err)
	}
	res := &ExportResult{Manifest: hashOf(raw), Config: config.Digest, Layers: descs}
	res.Same = res.Manifest == s.Manifest
	return res, nil
}

// mediaTypeOf returns a manifest's media type; manifests of OCI may lack it.
func mediaTypeOf(m *v1.Manifest) string {
	if m.MediaType != "" {
		return string(m.MediaType)
	}
	return string(types.OCIManifestSchema1)
}

type export struct {
	st     *store.Store
	s      *Stored
	descs  []v1.Descriptor // of the layers as the target is to have them, if nothing is compressed anew
	target Target
	o      ExportOptions
	dir    string
}

func (e *export) progress(i int, s State, bytes int64) {
	d := e.descs[i]
	e.o.Progress.Progress(Event{Layer: i, Layers: len(e.descs), ID: d.Digest.String(), State: s, Bytes: bytes, Size: d.Size})
}

// layer gives one layer to the target and returns its descriptor.
func (e *export) layer(ctx context.Context, i int) (v1.Descriptor, error) {
	e.progress(i, LayerStarted, 0)
	desc, diffID := e.descs[i], e.s.Layers[i]
	want, err := compressionOf(desc, diffID)
	if err != nil {
		return desc, err
	}
	same := e.o.Compression == "" || e.o.Compression == want.String()
	if e.o.Compression != "" {
		if want, err = layer.ParseCompression(e.o.Compression); err != nil {
			return desc, err
		}
	}

	var open func() (io.ReadCloser, error)
	moved := func(n int64) { e.progress(i, LayerMoved, min(n, e.descs[i].Size)) }
	kept, isKept := e.s.blobs[desc.Digest]
	switch {
	case same && isKept:
		open = func() (io.ReadCloser, error) { return e.st.OpenStreamDigest(kept, store.BlobStream) }
	case want == layer.None:
		size, err := e.size(i)
		if err != nil {
			return desc, err
		}
		if !same {
			desc = describe(desc, diffID, size, want)
		}
		open = func() (io.ReadCloser, error) { return e.st.OpenStreamDigest(e.s.streams[i], store.LayerStream) }
	default:
		name, digest, size, err := e.compress(ctx, i, want)
		if err != nil {
			return desc, err
		}
		defer os.Remove(name)
		if digest != desc.Digest {
			desc = describe(desc, digest, size, want)
		}
		moved = nil
		open = func() (io.ReadCloser, error) { return os.Open(name) }
	}

	err = e.target.PutBlob(ctx, desc, func() (io.ReadCloser, error) {
		r, err := open()
		if err != nil {
			return nil, err
		}
		if moved == nil {
			return r, nil
		}
		return struct {
			io.Reader
			io.Closer
		}{&counted{r: r, moved: moved}, r}, nil
	})
	if err != nil {
		return desc, err
	}
	e.progress(i, LayerDone, e.descs[i].Size)
	return desc, nil
}

// compressionOf tells how a layer was compressed: an uncompressed one has its diffID
// as its digest; for others the media type decides.
func compressionOf(d v1.Descriptor, diffID v1.Hash) (layer.Compression, error) {
	switch mt := string(d.MediaType); {
	case d.Digest == diffID:
		return layer.None, nil
	case strings.HasSuffix(mt, "gzip"):
		return layer.Gzip, nil
	case strings.HasSuffix(mt, "zstd"):
		return layer.Zstd, nil
	}
	// A layer whose media type says nothing of its compression: gzip, which all
	// engines read.
	return layer.Gzip, nil
}

// describe returns the descriptor of the same layer with other bytes. Annotations
// may speak of the old bytes (a table of contents' offset, say) and go.
func describe(d v1.Descriptor, digest v1.Hash, size int64, c layer.Compression) v1.Descriptor {
	docker := isDocker(d.MediaType)
	switch {
	case docker && c == layer.None:
		d.MediaType = types.DockerUncompressedLayer
	case docker && c == layer.Gzip:
		d.MediaType = types.DockerLayer
	case c == layer.None:
		d.MediaType = types.OCIUncompressedLayer
	case c == layer.Gzip:
		d.MediaType = types.OCILayer
	default:
		d.MediaType = types.OCILayerZStd
	}
	d.Digest, d.Size, d.Annotations, d.URLs = digest, size, nil, nil
	return d
}

// isDocker reports whether a media type is one of Docker's image manifest schema 2.
func isDocker(t types.MediaType) bool {
	return strings.HasPrefix(string(t), "application/vnd.docker.")
}

// ociLayer returns OCI's name of a type of layers.
func ociLayer(t types.MediaType) types.MediaType {
	switch t {
	case types.DockerLayer:
		return types.OCILayer
	case types.DockerUncompressedLayer:
		return types.OCIUncompressedLayer
	case types.DockerForeignLayer:
		return types.OCIRestrictedLayer
	}
	return t
}

// size returns the uncompressed size of a layer in bytes.
func (e *export) size(i int) (int64, error) {
	r, err := e.st.OpenStreamDigest(e.s.streams[i], store.LayerStream)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	return r.Size(), nil
}

// compress writes a layer to a file and returns its name, digest and size.
func (e *export) compress(ctx context.Context, i int, c layer.Compression) (name string, digest v1.Hash, size int64, err error) {
	r, err := e.st.OpenStreamDigest(e.s.streams[i], store.LayerStream)
	if err != nil {
		return "", v1.Hash{}, 0, err
	}
	defer r.Close()
	f, err := os.CreateTemp(e.dir, "layer-")
	if err != nil {
		return "", v1.Hash{}, 0, err
	}
	defer f.Close()
	h := sha256.New()
	w, err := layer.NewCompressor(io.MultiWriter(f, h), c, layer.CompressorOptions{})
	if err != nil {
		return "", v1.Hash{}, 0, err
	}
	// Compressing is the work; what follows is told as no progress.
	from := &counted{r: &interrupted{ctx, r}, moved: func(n int64) {
		e.progress(i, LayerMoved, int64(float64(n)/float64(max(r.Size(), 1))*float64(e.descs[i].Size)))
	}}
	if _, err := io.Copy(w, from); err != nil {
		return "", v1.Hash{}, 0, err
	}
	if err := w.Close(); err != nil {
		return "", v1.Hash{}, 0, err
	}
	fi, err := f.Stat()
	if err != nil {
		return "", v1.Hash{}, 0, err
	}
	return f.Name(), v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(h.Sum(nil))}, fi.Size(), nil
}

// interrupted stops reading when the context ends.
type interrupted struct {
	ctx context.Context
	r   io.Reader
}

func (r *interrupted) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(p)
}

// withLayers returns the manifest raw with m's media types and other layer
// descriptors: the very bytes where nothing differs, and otherwise the same document
// with all fields that we do not know.
func withLayers(raw []byte, m *v1.Manifest, descs []v1.Descriptor) ([]byte, error) {
	old, err := parseManifest(raw, "")
	if err != nil {
		return nil, err
	}
	same := old.MediaType == m.MediaType
	for i, d := range descs {
		was := old.Layers[i]
		same = same && d.Digest == was.Digest && d.Size == was.Size && d.MediaType == was.MediaType
	}
	if same {
		return raw, nil
	}
	var doc map[string]json.RawMessage
	if err := json.Unmarshal(raw, &doc); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrManifest, err)
	}
	layers, err := json.Marshal(descs)
	if err != nil {
		return nil, err
	}
	doc["layers"] = layers
	if old.MediaType != m.MediaType {
		config, err := json.Marshal(m.Config)
		if err != nil {
			return nil, err
		}
		doc["mediaType"], doc["config"] = json.RawMessage(strconv.Quote(string(m.MediaType))), config
	}
	return json.Marshal(doc) // keys come sorted
}
