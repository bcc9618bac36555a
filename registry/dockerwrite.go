package registry

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// createDockerArchive writes what docker load and podman load read: manifest.json, the
// config as it is, so that the image's ID holds, and the layers unpacked, each as
// <diffID>.tar. The manifest itself has no place in such an archive.
func createDockerArchive(ref Ref, opts *Options) (Target, error) {
	return newArchiveTarget(ref, opts, true)
}

// unpackBlob is the write function for a Docker archive. That a blob is compressed is
// told from its content: a config is JSON and never looks so.
func (t *archiveTarget) unpackBlob(f *os.File, r io.Reader) (*v1.Descriptor, error) {
	zr, _, err := decompress(r)
	if err != nil {
		return nil, err
	}
	defer zr.Close()
	h := sha256.New()
	n, err := copyLimited(io.MultiWriter(f, h), zr, t.maxUnpacked)
	if err != nil {
		return nil, err
	}
	// Some decoders stop before the end of the blob: it has to be seen for the digest.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return nil, err
	}
	return &v1.Descriptor{Size: n, Digest: v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(h.Sum(nil))}}, nil
}

func (t *archiveTarget) addDocker(members map[string]member, m *v1.Manifest) error {
	if !m.Config.MediaType.IsConfig() {
		return fmt.Errorf("%w: config of type %q in a Docker archive, want %q or %q; write an OCI archive instead", ErrUnsupported, m.Config.MediaType, types.OCIConfigJSON, types.DockerConfigJSON)
	}
	config := t.blobs[m.Config.Digest]
	if config.size > maxConfig {
		return fmt.Errorf("%w: image config of %d bytes, want at most %d", ErrInvalid, config.size, maxConfig)
	}
	raw, err := os.ReadFile(config.path)
	if err != nil {
		return err
	}
	diffIDs, err := parseConfig(raw)
	if err != nil {
		return err
	}
	if len(diffIDs) != len(m.Layers) {
		return fmt.Errorf("%w: %d layers in the manifest, but %d in the image config", ErrInvalid, len(m.Layers), len(diffIDs))
	}
	img := dockerImage{Config: m.Config.Digest.Hex + ".json", RepoTags: []string{}, Layers: []string{}}
	members[img.Config] = member{path: config.path}
	for i, desc := range m.Layers {
		blob := t.blobs[desc.Digest]
		if blob.content.Digest != diffIDs[i] {
			return fmt.Errorf("layer %s unpacks to something else than the image config says: %w", desc.Digest,
				&DigestError{Want: diffIDs[i], Got: blob.content.Digest, WantSize: blob.content.Size, GotSize: blob.content.Size})
		}
		name := diffIDs[i].Hex + ".tar"
		members[name] = member{path: blob.path}
		img.Layers = append(img.Layers, name)
	}
	if t.ref.Tag != "" {
		img.RepoTags = append(img.RepoTags, t.ref.Tag)
	}
	out, err := json.Marshal([]dockerImage{img})
	members[dockerManifest] = member{bytes: out}
	return err
}
