package podmanext

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/layer"
	"github.com/particle-os/particle/converter/store"
)

// ErrUnreadable says that an image lies in podman's storage in a form that only
// podman reads: another driver than overlay, files that this user may not open, a
// layer without its tar's headers, composefs layers. The image can still be had by
// way of podman.
var ErrUnreadable = errors.New("image cannot be read from podman's files")

// A LocalImage is an image in podman's storage, read from its files. It is a
// [converter.Image] and a [converter.Recorder]: the files of its layers go into a
// store by hard link, by reflink or by copy, whatever the file system allows, and no
// tar is made.
//
// Podman keeps the layers uncompressed; the manifest is still the one that the image
// came with, so that its digest is the registry's.
type LocalImage struct {
	// Link lets files be hard-linked. Podman never writes to a layer's files, but
	// whoever reaches into its storage by hand would write to the store's as well.
	Link bool

	overlay string // GRAPHROOT/overlay
	layers  string // GRAPHROOT/overlay-layers
	data    string // GRAPHROOT/overlay-images/<id>
	raw     []byte // the manifest
	config  v1.Descriptor
	byDiff  map[v1.Hash]string // layer IDs
}

// OpenLocal finds the image with an ID (64 hexadecimal digits) in podman's storage of
// the overlay driver below graphRoot. Errors wrap [ErrUnreadable] where the image, or
// all of the storage, needs podman to be read.
//
// Podman's locks are not taken: it replaces its tables by renames, and what is removed
// while it is read ends in an error.
func OpenLocal(graphRoot, id string) (_ *LocalImage, err error) {
	defer func() {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			err = fmt.Errorf("%w: %w", ErrUnreadable, err)
		}
	}()
	img := &LocalImage{
		overlay: filepath.Join(graphRoot, "overlay"),
		layers:  filepath.Join(graphRoot, "overlay-layers"),
		data:    filepath.Join(graphRoot, "overlay-images", id),
		byDiff:  map[v1.Hash]string{},
	}
	table, err := readImages(filepath.Join(graphRoot, "overlay-images", "images.json"))
	if err != nil {
		return nil, err
	}
	var record *imageRecord
	for i := range table {
		if table[i].ID == id {
			record = &table[i]
		}
	}
	if record == nil {
		return nil, fmt.Errorf("%w: %s knows no image %s", ErrUnreadable, graphRoot, id)
	}
	if img.raw, err = os.ReadFile(filepath.Join(img.data, dataName("manifest"))); err != nil {
		return nil, err
	}
	var m v1.Manifest
	if err := json.Unmarshal(img.raw, &m); err != nil {
		return nil, fmt.Errorf("%w: its manifest: %v", ErrUnreadable, err)
	}
	img.config = m.Config
	return img, img.chain(record.Layer)
}

// chain maps the diffIDs of the layers from the top one down.
func (i *LocalImage) chain(top string) error {
	all, err := readLayers(i.layers)
	if err != nil {
		return err
	}
	for id := top; id != ""; {
		l, ok := all[id]
		if !ok {
			return fmt.Errorf("%w: layer %s is not in %s", ErrUnreadable, id, i.layers)
		}
		// Removed at once, so that a circle ends.
		delete(all, id)
		diffID, err := v1.NewHash(l.DiffDigest)
		if err != nil {
			return fmt.Errorf("%w: layer %s has no diffID, as one that was pulled in part", ErrUnreadable, id)
		}
		if err := i.check(id); err != nil {
			return err
		}
		i.byDiff[diffID] = id
		id = l.Parent
	}
	return nil
}

// check reports whether a layer's files lie under their own names.
func (i *LocalImage) check(id string) error {
	if !isHex(id, 64) {
		return fmt.Errorf("%w: strange layer ID %q", ErrUnreadable, id)
	}
	dir := filepath.Join(i.overlay, id)
	if fi, err := os.Lstat(filepath.Join(dir, "diff")); err != nil {
		return err
	} else if !fi.IsDir() {
		return fmt.Errorf("%w: layer %s lies in an additional layer store", ErrUnreadable, id)
	}
	if _, err := os.Lstat(filepath.Join(dir, "composefs-data")); err == nil {
		return fmt.Errorf("%w: layer %s is a composefs layer", ErrUnreadable, id)
	}
	if _, err := os.Lstat(i.tarSplit(id)); err != nil {
		return err
	}
	return nil
}

func (i *LocalImage) tarSplit(id string) string {
	return filepath.Join(i.layers, id+".tar-split.gz")
}

// Manifest returns the manifest that the image came to podman with.
func (i *LocalImage) Manifest(context.Context) ([]byte, string, error) { return i.raw, "", nil }

// Blob opens the config. Layers are not there as blobs.
func (i *LocalImage) Blob(_ context.Context, desc v1.Descriptor) (io.ReadCloser, error) {
	if desc.Digest != i.config.Digest {
		return nil, fmt.Errorf("%w: podman keeps no blob of layer %s", ErrUnreadable, desc.Digest)
	}
	raw, err := os.ReadFile(filepath.Join(i.data, dataName(desc.Digest.String())))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	if sum := sha256.Sum256(raw); hex.EncodeToString(sum[:]) != desc.Digest.Hex {
		return nil, fmt.Errorf("%w: the config in %s is not %s", ErrUnreadable, i.data, desc.Digest)
	}
	return io.NopCloser(bytes.NewReader(raw)), nil
}

// RecordLayer implements [converter.Recorder].
func (i *LocalImage) RecordLayer(ctx context.Context, diffID v1.Hash, txn *store.Txn, rec layer.Recorder) error {
	id, ok := i.byDiff[diffID]
	if !ok {
		return fmt.Errorf("%w: no layer of it has the diffID %s", ErrUnreadable, diffID)
	}
	txn.SetImmutableSources(i.Link && isPrivate(txn.Store().Dir()))
	if err := recordTarSplit(ctx, i.tarSplit(id), filepath.Join(i.overlay, id, "diff"), txn, rec); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("reading podman's layer %s: %w", id, err)
	}
	return nil
}

// isPrivate reports whether nobody but its owner may enter a store: linked files keep
// their modes there, setuid among them.
func isPrivate(dir string) bool {
	fi, err := os.Stat(dir)
	return err == nil && fi.Mode().Perm()&0o077 == 0
}

// An imageRecord is one of overlay-images/images.json (Image in
// go.podman.io/storage/images.go), as far as it is read or written here.
type imageRecord struct {
	ID             string            `json:"id"`
	Digest         string            `json:"digest,omitempty"`
	Names          []string          `json:"names,omitempty"`
	Layer          string            `json:"layer,omitempty"`
	Metadata       string            `json:"metadata,omitempty"`
	BigDataNames   []string          `json:"big-data-names,omitempty"`
	BigDataSizes   map[string]int64  `json:"big-data-sizes,omitempty"`
	BigDataDigests map[string]string `json:"big-data-digests,omitempty"`
	Created        string            `json:"created,omitempty"` // RFC 3339
}

// A layerRecord is one of overlay-layers/layers.json (Layer in
// go.podman.io/storage/layers.go), as far as it is read or written here.
type layerRecord struct {
	ID               string   `json:"id"`
	Parent           string   `json:"parent,omitempty"`
	Created          string   `json:"created,omitempty"`                // RFC 3339
	CompressedDigest string   `json:"compressed-diff-digest,omitempty"` // of the blob as it came
	CompressedSize   int64    `json:"compressed-size,omitempty"`        // bytes
	DiffDigest       string   `json:"diff-digest,omitempty"`            // the diffID
	DiffSize         int64    `json:"diff-size,omitempty"`              // bytes of the tar
	Compression      int      `json:"compression,omitempty"`            // 0 none, 1 bzip2, 2 gzip, 3 xz, 4 zstd
	UIDs             []uint32 `json:"uidset,omitempty"`
	GIDs             []uint32 `json:"gidset,omitempty"`
}

func readImages(path string) ([]imageRecord, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var all []imageRecord
	if err := json.Unmarshal(raw, &all); err != nil {
		return nil, fmt.Errorf("%w: %s: %v", ErrUnreadable, path, err)
	}
	return all, nil
}

// readLayers reads the layers of a storage by their IDs. Those of running containers
// may be in volatile-layers.json; images have none there.
func readLayers(dir string) (map[string]layerRecord, error) {
	path := filepath.Join(dir, "layers.json")
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var list []layerRecord
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("%w: %s: %v", ErrUnreadable, path, err)
	}
	all := map[string]layerRecord{}
	for _, l := range list {
		all[l.ID] = l
	}
	return all, nil
}

// dataName is the name of the file that keeps an image's data item
// (makeBigDataBaseName in go.podman.io/storage/images.go): the key itself where it is
// made of lower-case letters, digits and dots, else "=" and its base64.
func dataName(key string) string {
	if strings.Trim(key, "abcdefghijklmnopqrstuvwxyz0123456789.") == "" {
		return key
	}
	return "=" + base64.StdEncoding.EncodeToString([]byte(key))
}

func isHex(s string, n int) bool {
	return len(s) == n && strings.Trim(s, "0123456789abcdef") == ""
}

var (
	_ converter.Image    = (*LocalImage)(nil)
	_ converter.Recorder = (*LocalImage)(nil)
)
