package converter

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/store"
)

// A Stored is an OCI image that a store has.
type Stored struct {
	Names    []string                   `json:"names"`
	Manifest v1.Hash                    `json:"manifest"`
	Config   v1.Hash                    `json:"config"`
	Images   map[string]fsverity.Digest `json:"images"` // by kind
	Layers   []v1.Hash                  `json:"layers"` // diffIDs
	Created  time.Time                  `json:"created"`
	Arch     string                     `json:"architecture"`
	OS       string                     `json:"os"`
	Size     int64                      `json:"size"` // uncompressed bytes of all layers

	// Damage says why the image cannot be read, "" if it can. All else but Names may
	// be missing then.
	Damage string `json:"damage,omitempty"`

	RawManifest []byte                      `json:"-"`
	RawConfig   []byte                      `json:"-"`
	streams     []fsverity.Digest           // of the layers
	blobs       map[v1.Hash]fsverity.Digest // streams of kept compressed layers
}

// Digests returns the digests of the layers as the manifest has them.
func (s *Stored) Digests() []v1.Hash {
	m, err := parseManifest(s.RawManifest, "")
	if err != nil {
		return nil // a damaged image
	}
	var all []v1.Hash
	for _, l := range m.Layers {
		all = append(all, l.Digest)
	}
	return all
}

// Find returns the image of a name: a tag, the digest of its manifest or config, or
// of one of its composefs images. Digests may be cut to 6 or more digits and lack
// the algorithm.
func Find(st *store.Store, name string) (*Stored, error) {
	refs, err := st.StreamRefs(store.TagPrefix + store.EncodeTag(name))
	if err != nil {
		return nil, err
	}
	for _, ref := range refs {
		if ref.Name == store.TagPrefix+store.EncodeTag(name) {
			return load(st, ref.Target, []string{name})
		}
	}
	hex := strings.TrimPrefix(name, "sha256:")
	if len(hex) < 6 || strings.Trim(hex, "0123456789abcdef") != "" {
		return nil, notFound(st, name)
	}
	all, err := List(st)
	if err != nil {
		return nil, err
	}
	var found []*Stored
	for _, s := range all {
		digests := []string{s.Manifest.Hex, s.Config.Hex}
		for _, d := range s.Images {
			digests = append(digests, d.String())
		}
		if slices.ContainsFunc(digests, func(d string) bool { return strings.HasPrefix(d, hex) }) {
			found = append(found, s)
		}
	}
	switch len(found) {
	case 0:
		return nil, notFound(st, name)
	case 1:
		return load(st, store.ManifestPrefix+found[0].Manifest.String(), found[0].Names)
	}
	return nil, fmt.Errorf("looking for %q in %s: %w (%d of them): give more digits", name, st.Dir(), ErrAmbiguous, len(found))
}

func notFound(st *store.Store, name string) error {
	return fmt.Errorf("looking for %.200q in %s: %w; particle images lists what there is", name, st.Dir(), ErrNotFound)
}

// List returns all images of a store, sorted by their first name; those without a
// name come last.
func List(st *store.Store) ([]*Stored, error) {
	refs, err := st.StreamRefs(store.TagPrefix)
	if err != nil {
		return nil, err
	}
	names := map[string][]string{}
	for _, ref := range refs {
		tag := store.DecodeTag(strings.TrimPrefix(ref.Name, store.TagPrefix))
		names[ref.Target] = append(names[ref.Target], tag)
	}
	streams, err := st.Streams()
	if err != nil {
		return nil, err
	}
	var all []*Stored
	for _, stream := range streams {
		id := stream.ID
		if !strings.HasPrefix(id, store.ManifestPrefix) {
			continue
		}
		slices.Sort(names[id])
		s, err := load(st, id, names[id])
		if err != nil {
			s = &Stored{Names: names[id], Damage: err.Error()}
			s.Manifest, _ = v1.NewHash(strings.TrimPrefix(id, store.ManifestPrefix))
		}
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b *Stored) int {
		if (len(a.Names) == 0) != (len(b.Names) == 0) {
			return len(b.Names) - len(a.Names)
		}
		return slices.Compare(append(a.Names, a.Manifest.Hex), append(b.Names, b.Manifest.Hex))
	})
	return all, nil
}

// load reads the manifest of a stream and all that it refers to. It goes by the
// digests in the manifest's stream: the content ids of config and layers may have come
// to name other streams, of another conversion.
func load(st *store.Store, id string, names []string) (_ *Stored, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("reading image %s: %w", strings.TrimPrefix(id, store.ManifestPrefix), err)
		}
	}()
	d, err := st.StreamDigest(id)
	if err != nil {
		return nil, err
	}
	raw, refs, err := readStream(st, d, store.ManifestStream)
	if err != nil {
		return nil, err
	}
	m, err := parseManifest(raw, "")
	if err != nil {
		return nil, err
	}
	s := &Stored{
		Names: names, RawManifest: raw, Manifest: hashOf(raw), Config: m.Config.Digest,
		Images: map[string]fsverity.Digest{}, blobs: map[v1.Hash]fsverity.Digest{},
	}
	config, ok := refs[configPrefix+s.Config.String()]
	if !ok {
		return nil, fmt.Errorf("%w: its stream does not refer to its config %s", store.ErrCorrupt, s.Config)
	}
	var images map[string]fsverity.Digest
	if s.RawConfig, images, err = readStream(st, config, store.ConfigStream); err != nil {
		return nil, fmt.Errorf("config %s: %w", s.Config, err)
	}
	if s.Layers, err = parseDiffIDs(s.RawConfig, len(m.Layers)); err != nil {
		return nil, err
	}
	var c struct {
		Created      time.Time `json:"created"`
		Architecture string    `json:"architecture"`
		OS           string    `json:"os"`
	}
	if err := json.Unmarshal(s.RawConfig, &c); err != nil {
		return nil, fmt.Errorf("config %s: %w: %v", s.Config, ErrManifest, err)
	}
	s.Created, s.Arch, s.OS = c.Created, c.Architecture, c.OS
	for kind, key := range refKeys {
		if d, ok := images[key]; ok {
			s.Images[kind.String()] = d
		}
	}
	for i, diffID := range s.Layers {
		d, ok := refs[diffID.String()]
		if !ok {
			return nil, fmt.Errorf("%w: its stream does not refer to layer %s", store.ErrCorrupt, diffID)
		}
		l, err := st.OpenStreamDigest(d, store.LayerStream)
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", diffID, err)
		}
		s.Size += l.Size()
		l.Close()
		s.streams = append(s.streams, d)
		if blob, ok := refs[blobPrefix+m.Layers[i].Digest.String()]; ok {
			s.blobs[m.Layers[i].Digest] = blob
		}
	}
	return s, nil
}

// readStream reads a small stream whole.
func readStream(st *store.Store, d fsverity.Digest, content uint64) ([]byte, map[string]fsverity.Digest, error) {
	r, err := st.OpenStreamDigest(d, content)
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	if r.Size() > maxJSON {
		return nil, nil, fmt.Errorf("%w: got %d bytes, want at most %d", ErrManifest, r.Size(), maxJSON)
	}
	raw, err := io.ReadAll(r)
	return raw, r.NamedRefs(), err
}

// Remove removes a name from the store, or all names of the image that a digest
// names. The files go with the next garbage collection.
func Remove(st *store.Store, name string) (removed []string, err error) {
	s, err := Find(st, name)
	if err != nil {
		return nil, err
	}
	for _, tag := range s.Names {
		if err := st.RemoveRef(store.Streams, store.TagPrefix+store.EncodeTag(tag)); err != nil {
			return removed, err
		}
		removed = append(removed, tag)
	}
	return removed, nil
}
