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

	RawManifest []byte `json:"-"`
	RawConfig   []byte `json:"-"`
	descs       []v1.Descriptor
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
		return nil, fmt.Errorf("looking for %q in %s: %w; particle images lists what there is", name, st.Dir(), ErrNotFound)
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
		return nil, fmt.Errorf("looking for %q in %s: %w; particle images lists what there is", name, st.Dir(), ErrNotFound)
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("looking for %q in %s: %w (%d of them): give more digits", name, st.Dir(), ErrAmbiguous, len(found))
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
			return nil, err
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

// load reads the manifest of a stream and all that it refers to.
func load(st *store.Store, id string, names []string) (*Stored, error) {
	s := &Stored{Names: names, Images: map[string]fsverity.Digest{}}
	raw, refs, err := readStream(st, id, store.ManifestStream)
	if err != nil {
		return nil, err
	}
	m, err := parseManifest(raw, "")
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", id, err)
	}
	s.RawManifest, s.Manifest, s.Config, s.descs = raw, hashOf(raw), m.Config.Digest, m.Layers
	if _, ok := refs[configPrefix+s.Config.String()]; !ok {
		return nil, fmt.Errorf("reading %s: it does not refer to its config %s: the store is damaged, see particle store fsck", id, s.Config)
	}
	s.RawConfig, refs, err = readStream(st, store.ConfigPrefix+s.Config.String(), store.ConfigStream)
	if err != nil {
		return nil, err
	}
	if s.Layers, err = parseDiffIDs(s.RawConfig, len(m.Layers)); err != nil {
		return nil, fmt.Errorf("reading config %s: %w", s.Config, err)
	}
	var c struct {
		Created      time.Time `json:"created"`
		Architecture string    `json:"architecture"`
		OS           string    `json:"os"`
	}
	if err := json.Unmarshal(s.RawConfig, &c); err != nil {
		return nil, fmt.Errorf("reading config %s: %w: %v", s.Config, ErrManifest, err)
	}
	s.Created, s.Arch, s.OS = c.Created, c.Architecture, c.OS
	for kind, key := range refKeys {
		if d, ok := refs[key]; ok {
			s.Images[kind.String()] = d
		}
	}
	for _, diffID := range s.Layers {
		l, err := st.OpenStream(store.LayerPrefix+diffID.String(), store.LayerStream)
		if err != nil {
			return nil, fmt.Errorf("reading layer %s of %s: %w", diffID, id, err)
		}
		s.Size += l.Size()
		l.Close()
	}
	return s, nil
}

// readStream reads a small stream whole.
func readStream(st *store.Store, id string, content uint64) ([]byte, map[string]fsverity.Digest, error) {
	r, err := st.OpenStream(id, content)
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	if r.Size() > maxJSON {
		return nil, nil, fmt.Errorf("reading %s: %w: got %d bytes, want at most %d", id, ErrManifest, r.Size(), maxJSON)
	}
	raw, err := io.ReadAll(r)
	if err != nil {
		return nil, nil, fmt.Errorf("reading %s: %w", id, err)
	}
	return raw, r.NamedRefs(), nil
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
