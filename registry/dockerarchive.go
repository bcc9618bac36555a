package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// A dockerImage is one element of manifest.json in an archive of docker save
// (Docker image specification v1.2, "Combined Image JSON + Filesystem Changeset
// Format").
type dockerImage struct {
	Config   string   // name of the config's file
	RepoTags []string // REPO:TAG, or null
	Layers   []string // names of the layers' files, lowest first
}

const dockerManifest = "manifest.json"

// dockerArchive is one image of a Docker archive. The archive has no manifest; the
// one made here is an OCI manifest over the config as it lies there, so that the
// config digest (the image's ID) holds, and over the layers as they lie there. An
// uncompressed layer's digest is its diffID, which the config has; that the bytes
// are right shows when they are read. Only a compressed layer that the archive does
// not name by its digest has to be read once to know its digest.
type dockerArchive struct {
	files  fileSet
	raw    []byte
	byHash map[v1.Hash]string // names of the files
}

// openDockerArchive reads manifest.json, finds the image, and makes its manifest.
// On success the source owns files.
func openDockerArchive(ctx context.Context, files fileSet, tag string) (source, error) {
	raw, err := readFile(files, dockerManifest, maxManifest)
	if errors.Is(err, ErrNotFound) {
		return nil, fmt.Errorf("%w; is it an archive of docker save? (prefix oci-archive for an OCI archive)", err)
	}
	if err != nil {
		return nil, err
	}
	images, err := parseDockerManifest(raw)
	if err != nil {
		return nil, err
	}
	img, err := findDockerImage(images, tag)
	if err != nil {
		return nil, err
	}
	config, err := readFile(files, img.Config, maxConfig)
	if err != nil {
		return nil, fmt.Errorf("reading image config: %w", err)
	}
	diffIDs, err := parseConfig(config)
	if err != nil {
		return nil, err
	}
	if len(diffIDs) != len(img.Layers) {
		return nil, fmt.Errorf("%w: %d layers in %s, but %d in the image config", ErrInvalid, len(img.Layers), dockerManifest, len(diffIDs))
	}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: describe(config, types.OCIConfigJSON)}
	a := &dockerArchive{files: files, byHash: map[v1.Hash]string{m.Config.Digest: img.Config}}
	known := make(map[string]v1.Descriptor) // a file may be several layers
	m.Layers = []v1.Descriptor{}            // written as [], not null
	for i, name := range img.Layers {
		desc, ok := known[name]
		if ok && desc.MediaType == types.OCIUncompressedLayer && desc.Digest != diffIDs[i] {
			return nil, fmt.Errorf("%w: layers of different digests are one file %q", ErrInvalid, name)
		}
		if !ok {
			if desc, err = describeLayer(ctx, files, name, diffIDs[i]); err != nil {
				return nil, fmt.Errorf("reading layer %q: %w", name, err)
			}
			known[name] = desc
		}
		a.byHash[desc.Digest] = name
		m.Layers = append(m.Layers, desc)
	}
	if a.raw, err = json.Marshal(m); err != nil {
		return nil, err
	}
	return a, nil
}

// parseDockerManifest reads manifest.json.
func parseDockerManifest(raw []byte) ([]dockerImage, error) {
	var images []dockerImage
	if err := json.Unmarshal(raw, &images); err != nil {
		return nil, fmt.Errorf("%w: reading %s: %v", ErrInvalid, dockerManifest, err)
	}
	for i, img := range images {
		for _, name := range append([]string{img.Config}, img.Layers...) {
			if clean, err := entryName("", name); err != nil || clean == "" {
				return nil, fmt.Errorf("%w: image %d of %s names the file %q", ErrInvalid, i, dockerManifest, name)
			}
		}
	}
	return images, nil
}

// findDockerImage finds the image with a tag in its canonical form, or number @N,
// or the only one.
func findDockerImage(images []dockerImage, tag string) (dockerImage, error) {
	if n, ok := strings.CutPrefix(tag, "@"); ok {
		i, err := strconv.Atoi(n)
		if err != nil || i < 0 || i >= len(images) {
			return dockerImage{}, fmt.Errorf("%w: image number %s of %d; they count from @0", ErrNotFound, n, len(images))
		}
		return images[i], nil
	}
	if tag == "" && len(images) == 1 {
		return images[0], nil
	}
	var have []string
	for _, img := range images {
		for _, t := range img.RepoTags {
			ref, err := parseDocker(t)
			if err != nil {
				continue // Docker never wrote it, and nobody can ask for it
			}
			if tag == ref.familiar() {
				return img, nil
			}
			have = append(have, strconv.Quote(t))
		}
	}
	switch {
	case len(images) == 0:
		return dockerImage{}, fmt.Errorf("%w: the archive holds no image", ErrNotFound)
	case tag == "":
		return dockerImage{}, fmt.Errorf("%w: add one of the tags %s, or @0 to @%d", ErrAmbiguous, listed(have), len(images)-1)
	}
	return dockerImage{}, fmt.Errorf("%w: tag %q; there are %s", ErrNotFound, tag, listed(have))
}

// describeLayer makes the descriptor of a layer in its present compression.
func describeLayer(ctx context.Context, files fileSet, name string, diffID v1.Hash) (v1.Descriptor, error) {
	f, err := files.open(name)
	if err != nil {
		return v1.Descriptor{}, err
	}
	defer f.Close()
	var head [magicLen]byte
	n, err := f.ReadAt(head[:], 0)
	if err != nil && err != io.EOF {
		return v1.Descriptor{}, err
	}
	desc := v1.Descriptor{Size: f.Size()}
	switch detect(head[:n]) {
	case gzipped:
		desc.MediaType = types.OCILayer
	case zstandard:
		desc.MediaType = types.OCILayerZStd
	case plain:
		desc.MediaType, desc.Digest = types.OCIUncompressedLayer, diffID
		return desc, nil
	default:
		return v1.Descriptor{}, fmt.Errorf("%w: layer compressed with xz or bzip2; load the archive into podman and save it again", ErrUnsupported)
	}
	// Docker 25 and later lay an OCI layout under the old archive. Its blobs' names
	// are digests, which reading the layer will check.
	if hex, ok := strings.CutPrefix(name, "blobs/sha256/"); ok {
		if h, err := v1.NewHash("sha256:" + hex); err == nil {
			desc.Digest = h
			return desc, nil
		}
	}
	desc.Digest, _, err = v1.SHA256(&contextReader{ctx, f})
	return desc, err
}

func (a *dockerArchive) root(context.Context) ([]byte, string, v1.Hash, error) {
	return a.raw, string(types.OCIManifestSchema1), v1.Hash{}, nil
}

func (a *dockerArchive) document(_ context.Context, desc v1.Descriptor) (io.ReadCloser, error) {
	return nil, fmt.Errorf("%w: manifest %s: a Docker archive holds none", ErrNotFound, desc.Digest)
}

func (a *dockerArchive) file(ctx context.Context, desc v1.Descriptor) (*file, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	name, ok := a.byHash[desc.Digest]
	if !ok {
		return nil, fmt.Errorf("%w: blob %s in the archive", ErrNotFound, desc.Digest)
	}
	return a.files.open(name)
}

func (a *dockerArchive) blob(ctx context.Context, desc v1.Descriptor) (io.ReadCloser, error) {
	f, err := a.file(ctx, desc)
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (a *dockerArchive) blobRange(ctx context.Context, desc v1.Descriptor, off, n int64) (io.ReadCloser, error) {
	f, err := a.file(ctx, desc)
	if err != nil {
		return nil, err
	}
	return f.part(off, n), nil
}

func (a *dockerArchive) Close() error { return a.files.Close() }
