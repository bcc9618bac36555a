package podmanext

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/particle-os/particle/converter"
)

// Annotations of a layer's descriptor with the digest of its table of contents, in the
// order in which podman looks at them (c/storage pkg/chunked/toc).
var tocAnnotations = []string{
	"io.github.containers.zstd-chunked.manifest-checksum",
	"containerd.io/snapshot/stargz/toc.digest",
}

const (
	// imageLife is how long an opened image of a registry serves look-ups.
	imageLife = time.Minute
	// resolveTime limits how long a registry may take for a manifest and a config.
	resolveTime = 30 * time.Second
	// maxConfig limits configs, in bytes.
	maxConfig = 8 << 20
)

// An imageLayer is a layer as manifest and config of its image describe it.
type imageLayer struct {
	descriptor v1.Descriptor
	digest     string // of the blob
	size       int64  // of the blob, in bytes
	toc        string // digest of its table of contents, "" for none
	diffID     string
}

// A resolved image is one whose layers are known.
//
// The manifest and the config of the very image say which diffID a layer has. Those of
// other images would know some layers as well, but anybody can publish an image that
// claims the digest of another one's layer.
type resolved struct {
	ref    string
	layers []imageLayer
	local  bool // it is the image that the store has under this reference

	source SourceImage // nil for local images
	err    error       // or: why there is none
	ready  chan struct{}
	until  time.Time
	users  int // jobs, and the table of images
}

// find returns the index of the layer with a digest, of the blob or its table of
// contents, -1 for none. Of several it is the last: what is shown for the others, in
// the middle of the image, that one hides.
func (r *resolved) find(digest string) int {
	for i, l := range slices.Backward(r.layers) {
		if digest == l.digest || l.toc != "" && digest == l.toc {
			return i
		}
	}
	return -1
}

// chain returns a name of a layer with all below it: the hash of their diffIDs.
func (r *resolved) chain(i int) string {
	h := sha256.New()
	for _, l := range r.layers[:i+1] {
		fmt.Fprintln(h, l.diffID)
	}
	return fmt.Sprintf("sha256:%x", h.Sum(nil))
}

// describe reads the layers out of a manifest and its config.
func describe(manifest, config []byte) ([]imageLayer, error) {
	m, err := v1.ParseManifest(bytes.NewReader(manifest))
	if err != nil {
		return nil, fmt.Errorf("%w: %v", converter.ErrManifest, err)
	}
	var c struct {
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, fmt.Errorf("%w: reading the config: %v", converter.ErrManifest, err)
	}
	if len(c.RootFS.DiffIDs) != len(m.Layers) {
		return nil, fmt.Errorf("%w: %d diffIDs and %d layers", converter.ErrManifest, len(c.RootFS.DiffIDs), len(m.Layers))
	}
	var layers []imageLayer
	for i, d := range m.Layers {
		l := imageLayer{descriptor: d, digest: d.Digest.String(), size: d.Size, diffID: c.RootFS.DiffIDs[i]}
		for _, name := range tocAnnotations {
			if toc := d.Annotations[name]; toc != "" && checkDigest(toc) == nil {
				l.toc = toc
				break
			}
		}
		if err := errors.Join(checkDigest(l.digest), checkDigest(l.diffID)); err != nil {
			return nil, fmt.Errorf("%w: layer %d: %w", converter.ErrManifest, i, err)
		}
		if l.size < 0 {
			return nil, fmt.Errorf("%w: layer %d has size %d", converter.ErrManifest, i, l.size)
		}
		layers = append(layers, l)
	}
	return layers, nil
}

// resolve returns the image of a reference that has the layer asked for: the store's
// if it is there under that name, else the registry's. The caller calls unuse.
func (s *LayerStore) resolve(ctx context.Context, key Key) (*resolved, error) {
	if err := errors.Join(checkRef(key.Ref), checkDigest(key.Digest)); err != nil {
		return nil, err
	}
	local, err := s.local(key.Ref)
	if err == nil && local.find(key.Digest) >= 0 {
		return local, nil
	}
	if err != nil && !errors.Is(err, converter.ErrNotFound) {
		s.log.Warn("reading the store's image", "image", key.Ref, "error", err)
	}
	if s.o.Source == nil {
		return nil, fmt.Errorf("%w: no image in the store has the name %q and the layer %s", ErrNoLayer, key.Ref, key.Digest)
	}
	for again := false; ; again = true {
		img := s.open(key.Ref, again)
		select {
		case <-img.ready:
		case <-ctx.Done():
			s.unuse(img)
			return nil, context.Cause(ctx)
		}
		if img.err == nil && img.find(key.Digest) >= 0 {
			return img, nil
		}
		s.unuse(img)
		if img.err != nil {
			return nil, fmt.Errorf("looking for layer %s of %s: %w: %w", key.Digest, key.Ref, errImage, img.err)
		}
		if again {
			return nil, fmt.Errorf("%w: %s has no layer %s for this platform", ErrNoLayer, key.Ref, key.Digest)
		}
		// The tag may have come to mean another image since this one was opened.
	}
}

// local returns the image that the store has under a reference.
func (s *LayerStore) local(ref string) (*resolved, error) {
	img, err := converter.Find(s.o.Store, ref)
	if err != nil {
		return nil, err
	}
	layers, err := describe(img.RawManifest, img.RawConfig)
	if err != nil {
		return nil, err
	}
	return &resolved{ref: ref, layers: layers, local: true, users: 1}, nil
}

// errImage marks an error of a whole image.
var errImage = errors.New("opening the image")

// open returns the registry's image of a reference, which may still be on its way. One
// that has been opened lately serves again, unless another is wanted. The caller calls
// unuse.
func (s *LayerStore) open(ref string, fresh bool) *resolved {
	s.mu.Lock()
	defer s.mu.Unlock()
	if img := s.images[ref]; img != nil {
		opening := img.until.IsZero()
		if opening || time.Now().Before(img.until) && (!fresh || img.err != nil) {
			img.users++
			return img
		}
		s.forgetImage(ref)
	}
	img := &resolved{ref: ref, ready: make(chan struct{}), users: 2} // the table and the caller
	s.images[ref] = img
	s.busy.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, resolveTime)
		defer cancel()
		source, layers, err := s.openSource(ctx, ref)
		life := imageLife
		if err != nil {
			life = failLife
			s.log.Warn("podman has to pull an image itself", "image", ref, "error", err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		img.source, img.layers, img.err, img.until = source, layers, err, time.Now().Add(life)
		close(img.ready)
		time.AfterFunc(life, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.images[ref] == img {
				s.forgetImage(ref)
			}
		})
	})
	return img
}

func (s *LayerStore) openSource(ctx context.Context, ref string) (_ SourceImage, _ []imageLayer, err error) {
	img, err := s.o.Source.Open(ctx, ref)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, img.Close())
		}
	}()
	raw, _, err := img.Manifest(ctx)
	if err != nil {
		return nil, nil, err
	}
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %v", converter.ErrManifest, err)
	}
	if m.Config.Size > maxConfig {
		return nil, nil, fmt.Errorf("%w: its config has %d bytes, want at most %d", converter.ErrManifest, m.Config.Size, maxConfig)
	}
	r, err := img.Blob(ctx, m.Config)
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	config, err := io.ReadAll(io.LimitReader(r, maxConfig+1))
	if err != nil {
		return nil, nil, err
	}
	layers, err := describe(raw, config)
	return img, layers, err
}

// forgetImage takes an image out of the table. s.mu is held.
func (s *LayerStore) forgetImage(ref string) {
	img := s.images[ref]
	delete(s.images, ref)
	s.unuseLocked(img)
}

// unuse closes an image that nobody uses any more.
func (s *LayerStore) unuse(img *resolved) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unuseLocked(img)
}

func (s *LayerStore) unuseLocked(img *resolved) {
	if img.users--; img.users == 0 && img.source != nil {
		if err := img.source.Close(); err != nil {
			s.log.Debug("closing an image", "image", img.ref, "error", err)
		}
	}
}
