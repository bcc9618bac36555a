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

// The OCI image layout (OCI image specification 1.1, image-layout.md).
const (
	layoutFile     = "oci-layout"
	layoutContent  = `{"imageLayoutVersion":"1.0.0"}`
	indexFile      = "index.json"
	refNameKey     = "org.opencontainers.image.ref.name"
	layoutMajor    = "1." // imageLayoutVersion of layouts that can be read
	maxIndexListed = 20   // names in an error
)

// layoutSource is an OCI layout in a directory or archive.
type layoutSource struct {
	files fileSet
	desc  v1.Descriptor // of the manifest or index that the tag names; or
	raw   []byte        // index.json itself, where it is the index to choose from
}

// openLayout reads index.json and finds the tag. On success the source owns files.
func openLayout(files fileSet, tag string, _ *Options) (source, error) {
	index, raw, err := readLayout(files)
	if err != nil {
		return nil, err
	}
	desc, err := findTag(index, tag)
	if errors.Is(err, errWholeIndex) {
		return &layoutSource{files: files, raw: raw}, nil
	}
	if err != nil {
		return nil, err
	}
	return &layoutSource{files: files, desc: desc}, nil
}

// readLayout reads the two files at the top of a layout.
func readLayout(files fileSet) (*v1.IndexManifest, []byte, error) {
	raw, err := readFile(files, layoutFile, 1<<16)
	if errors.Is(err, ErrNotFound) {
		return nil, nil, fmt.Errorf("%w; is it an OCI image layout?", err)
	}
	if err != nil {
		return nil, nil, err
	}
	var version struct {
		V string `json:"imageLayoutVersion"`
	}
	if err := json.Unmarshal(raw, &version); err != nil {
		return nil, nil, fmt.Errorf("%w: reading %s: %v", ErrInvalid, layoutFile, err)
	}
	if !strings.HasPrefix(version.V, layoutMajor) {
		return nil, nil, fmt.Errorf("%w: OCI layout of version %q, want 1.0.0", ErrUnsupported, version.V)
	}
	if raw, err = readFile(files, indexFile, maxManifest); err != nil {
		return nil, nil, err
	}
	index, err := parseIndex(raw)
	return index, raw, err
}

// parseIndex reads index.json. Unlike an index in a registry it may be empty.
func parseIndex(raw []byte) (*v1.IndexManifest, error) {
	index := new(v1.IndexManifest)
	if err := json.Unmarshal(raw, index); err != nil {
		return nil, fmt.Errorf("%w: reading %s: %v", ErrInvalid, indexFile, err)
	}
	if index.SchemaVersion != 2 {
		return nil, fmt.Errorf("%w: %s with schemaVersion %d, want 2", ErrInvalid, indexFile, index.SchemaVersion)
	}
	if index.MediaType != "" && index.MediaType != types.OCIImageIndex {
		return nil, fmt.Errorf("%w: %s of type %q, want %q", ErrInvalid, indexFile, index.MediaType, types.OCIImageIndex)
	}
	return index, checkDescriptors(index.Manifests)
}

// errWholeIndex says that the index as a whole is what the reference names.
var errWholeIndex = errors.New("the whole index")

// findTag finds the entry of an index.json. Without a tag there must be one entry
// only, or all entries must be the same image for several platforms: each has a
// platform and none a name of its own.
func findTag(index *v1.IndexManifest, tag string) (v1.Descriptor, error) {
	if n, ok := strings.CutPrefix(tag, "@"); ok {
		i, err := strconv.Atoi(n)
		if err != nil || i < 0 || i >= len(index.Manifests) {
			return v1.Descriptor{}, fmt.Errorf("%w: image number %s of %d; they count from @0", ErrNotFound, n, len(index.Manifests))
		}
		return index.Manifests[i], nil
	}
	if tag == "" {
		if len(index.Manifests) == 1 {
			return index.Manifests[0], nil
		}
		platforms := len(index.Manifests) > 0
		for _, d := range index.Manifests {
			platforms = platforms && d.Platform != nil && d.Annotations[refNameKey] == ""
		}
		if platforms {
			return v1.Descriptor{}, errWholeIndex
		}
		if len(index.Manifests) == 0 {
			return v1.Descriptor{}, fmt.Errorf("%w: the layout holds no image", ErrNotFound)
		}
		return v1.Descriptor{}, fmt.Errorf("%w: add one of the tags %s, or @0 to @%d", ErrAmbiguous, tags(index), len(index.Manifests)-1)
	}
	found := -1
	for i, d := range index.Manifests {
		if d.Annotations[refNameKey] != tag {
			continue
		}
		if found >= 0 && index.Manifests[found].Digest != d.Digest {
			return v1.Descriptor{}, fmt.Errorf("%w: tag %q is there twice; choose by number, @%d or @%d", ErrAmbiguous, tag, found, i)
		}
		found = i
	}
	if found < 0 {
		return v1.Descriptor{}, fmt.Errorf("%w: tag %q; there are %s", ErrNotFound, tag, tags(index))
	}
	return index.Manifests[found], nil
}

// tags lists the tags of an index.json for an error.
func tags(index *v1.IndexManifest) string {
	var list []string
	for _, d := range index.Manifests {
		if name := d.Annotations[refNameKey]; name != "" {
			list = append(list, strconv.Quote(name))
		}
	}
	return listed(list)
}

func listed(list []string) string {
	if len(list) == 0 {
		return "none"
	}
	if len(list) > maxIndexListed {
		list = append(list[:maxIndexListed:maxIndexListed], "…")
	}
	return strings.Join(list, ", ")
}

func readFile(files fileSet, name string, limit int64) ([]byte, error) {
	f, err := files.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := readLimited(f, limit)
	if err != nil {
		return nil, fmt.Errorf("reading %q: %w", name, err)
	}
	return raw, nil
}

func (s *layoutSource) root(ctx context.Context) ([]byte, string, v1.Hash, error) {
	if s.raw != nil {
		return s.raw, string(types.OCIImageIndex), v1.Hash{}, nil
	}
	rc, err := s.blob(ctx, s.desc)
	if err != nil {
		return nil, "", v1.Hash{}, err
	}
	raw, err := readAll(rc, s.desc, maxManifest)
	return raw, string(s.desc.MediaType), s.desc.Digest, err
}

func (s *layoutSource) document(ctx context.Context, desc v1.Descriptor) (io.ReadCloser, error) {
	return s.blob(ctx, desc)
}

func (s *layoutSource) blob(ctx context.Context, desc v1.Descriptor) (io.ReadCloser, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := s.files.open(blobName(desc.Digest))
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (s *layoutSource) blobRange(ctx context.Context, desc v1.Descriptor, off, n int64) (io.ReadCloser, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := s.files.open(blobName(desc.Digest))
	if err != nil {
		return nil, err
	}
	return f.part(off, n), nil
}

func (s *layoutSource) Close() error { return s.files.Close() }
