package registry

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	// maxManifest is the size in bytes beyond which manifests and indexes are
	// refused, the least that the OCI distribution specification 1.1 ("Pushing
	// Manifests") asks registries to accept and what the common ones stop at. A
	// manifest of a thousand layers has a quarter of a megabyte.
	maxManifest = 4 << 20
	// maxConfig bounds image configs, which are kept in memory too.
	maxConfig = 8 << 20
	// maxNesting bounds indexes within indexes: a hostile one could hold itself only
	// by breaking SHA-256, but it can be as deep as somebody cares to push.
	maxNesting = 8
)

// A document is a parsed manifest or index: exactly one of the two is there.
type document struct {
	mediaType types.MediaType
	manifest  *v1.Manifest
	index     *v1.IndexManifest
}

// parseDocument reads a manifest or index. mediaType is what the transport says
// that it is, a Content-Type or the media type of a descriptor; it may be empty or
// of no meaning, as text/plain. The document's own mediaType field decides, and
// must agree with mediaType where that is a type of a manifest or index, because a
// document that two readers take for different things has one digest but two
// contents (CVE-2021-41190). For the same reason a document with the parts of
// both an image and an index is refused.
func parseDocument(raw []byte, mediaType string) (*document, error) {
	var head struct {
		SchemaVersion int64           `json:"schemaVersion"`
		MediaType     types.MediaType `json:"mediaType"`
		Config        json.RawMessage `json:"config"`
		Layers        json.RawMessage `json:"layers"`
		Manifests     json.RawMessage `json:"manifests"`
		FSLayers      json.RawMessage `json:"fsLayers"`
	}
	if len(raw) > maxManifest {
		return nil, fmt.Errorf("%w: manifest of %d bytes, want at most %d", ErrInvalid, len(raw), maxManifest)
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return nil, fmt.Errorf("%w: reading manifest: %v", ErrInvalid, err)
	}
	said := types.MediaType(mediaType)
	known := said.IsImage() || said.IsIndex() || said.IsSchema1()
	if head.SchemaVersion == 1 || head.FSLayers != nil || said.IsSchema1() || head.MediaType.IsSchema1() {
		return nil, fmt.Errorf("%w: manifest of Docker schema 1; convert the image with a tool of its time, or push it again with a present one", ErrUnsupported)
	}
	if head.SchemaVersion != 2 {
		return nil, fmt.Errorf("%w: manifest with schemaVersion %d, want 2", ErrInvalid, head.SchemaVersion)
	}
	isImage, isIndex := head.Config != nil || head.Layers != nil, head.Manifests != nil
	if isImage && isIndex {
		return nil, fmt.Errorf("%w: document is both an image manifest and an index", ErrInvalid)
	}
	doc := &document{mediaType: head.MediaType}
	switch {
	case doc.mediaType == "" && known:
		doc.mediaType = said
	case doc.mediaType == "" && isIndex:
		doc.mediaType = types.OCIImageIndex
	case doc.mediaType == "":
		doc.mediaType = types.OCIManifestSchema1
	case known && said != doc.mediaType:
		return nil, fmt.Errorf("%w: manifest of type %q was served as %q", ErrInvalid, doc.mediaType, said)
	}
	switch {
	case doc.mediaType.IsIndex() && isIndex:
		doc.index = new(v1.IndexManifest)
		if err := json.Unmarshal(raw, doc.index); err != nil {
			return nil, fmt.Errorf("%w: reading index: %v", ErrInvalid, err)
		}
		return doc, checkDescriptors(doc.index.Manifests)
	case doc.mediaType.IsImage() && isImage:
		doc.manifest = new(v1.Manifest)
		if err := json.Unmarshal(raw, doc.manifest); err != nil {
			return nil, fmt.Errorf("%w: reading manifest: %v", ErrInvalid, err)
		}
		if err := checkDescriptor(doc.manifest.Config); err != nil {
			return nil, err
		}
		return doc, checkDescriptors(doc.manifest.Layers)
	case doc.mediaType.IsIndex() || doc.mediaType.IsImage():
		return nil, fmt.Errorf("%w: manifest of type %q lacks the parts of one", ErrInvalid, doc.mediaType)
	}
	return nil, fmt.Errorf("%w: manifest of type %q, want an OCI or Docker image manifest or index", ErrUnsupported, doc.mediaType)
}

func checkDescriptors(list []v1.Descriptor) error {
	for _, d := range list {
		if err := checkDescriptor(d); err != nil {
			return err
		}
	}
	return nil
}

// parseConfig reads the part of an image config that this package needs: the
// digests of the uncompressed layers, lowest first.
func parseConfig(raw []byte) ([]v1.Hash, error) {
	var config struct {
		RootFS struct {
			Type    string    `json:"type"`
			DiffIDs []v1.Hash `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal(raw, &config); err != nil {
		return nil, fmt.Errorf("%w: reading image config: %v", ErrInvalid, err)
	}
	if t := config.RootFS.Type; t != "layers" {
		return nil, fmt.Errorf("%w: image config with rootfs of type %q, want \"layers\"", ErrInvalid, t)
	}
	return config.RootFS.DiffIDs, nil
}

// describe returns the descriptor of bytes in memory.
func describe(raw []byte, mediaType types.MediaType) v1.Descriptor {
	h, n, err := v1.SHA256(bytes.NewReader(raw))
	if err != nil {
		panic("registry: hashing memory: " + err.Error()) // a bytes.Reader has no errors but io.EOF
	}
	return v1.Descriptor{MediaType: mediaType, Digest: h, Size: n}
}

// readLimited reads a small file of a known place whole.
func readLimited(r io.Reader, limit int64) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(raw)) > limit {
		err = fmt.Errorf("%w: more than %d bytes", ErrInvalid, limit)
	}
	return raw, err
}
