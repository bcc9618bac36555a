package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/registry"
)

// basePath is the PATH of a process in the image, as Docker and Debian's own images
// have it.
const basePath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// layerMediaTypes are those of the OCI image specification, layer.md.
var layerMediaTypes = map[string]types.MediaType{
	"none": types.OCIUncompressedLayer,
	"gzip": types.OCILayer,
	"zstd": types.OCILayerZStd,
}

// A builtImage is an image of one layer, made here. It is a [converter.Image].
type builtImage struct {
	layer          *packedLayer
	manifest       v1.Manifest
	rawManifest    []byte
	manifestDigest v1.Hash
	rawConfig      []byte
}

// packImage makes an image of an installed system; the layer's blob is a file in dir.
func packImage(ctx context.Context, o bootstrapOptions, root *installedRoot, dir string) (*builtImage, error) {
	l, err := packLayer(ctx, root, o.epoch, o.compression, filepath.Join(dir, "layer"))
	if err != nil {
		return nil, err
	}
	return newImage(o, l)
}

// newImage writes the config and the manifest of an image of one layer.
func newImage(o bootstrapOptions, l *packedLayer) (*builtImage, error) {
	created := v1.Time{Time: time.Unix(o.epoch, 0).UTC()}
	platform := ociArch[o.arch]
	labels := map[string]string{
		"org.opencontainers.image.created": created.Format(time.RFC3339),
		"org.opencontainers.image.title":   l.title(),
	}
	if v := l.version(); v != "" {
		labels["org.opencontainers.image.version"] = v
	}
	if url := l.osRelease["HOME_URL"]; url != "" {
		labels["org.opencontainers.image.url"] = url
	}
	config, err := json.Marshal(v1.ConfigFile{
		Architecture: platform.arch,
		Variant:      platform.variant,
		OS:           "linux",
		Created:      created,
		Config: v1.Config{
			Env:    []string{basePath},
			Cmd:    []string{"bash"},
			Labels: labels,
		},
		RootFS:  v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{l.diffID}},
		History: []v1.History{{Created: created, CreatedBy: o.command(), Comment: "mmdebstrap"}},
	})
	if err != nil {
		return nil, fmt.Errorf("writing the image's config: %w", err)
	}
	img := &builtImage{layer: l, rawConfig: config, manifest: v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		Config:        v1.Descriptor{MediaType: types.OCIConfigJSON, Size: int64(len(config)), Digest: sha256Of(config)},
		Layers:        []v1.Descriptor{{MediaType: layerMediaTypes[o.compression], Size: l.blobBytes, Digest: l.digest}},
	}}
	if img.rawManifest, err = json.Marshal(img.manifest); err != nil {
		return nil, fmt.Errorf("writing the image's manifest: %w", err)
	}
	img.manifestDigest = sha256Of(img.rawManifest)
	return img, nil
}

func sha256Of(b []byte) v1.Hash {
	sum := sha256.Sum256(b)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}
}

// Manifest implements [converter.Image].
func (img *builtImage) Manifest(context.Context) ([]byte, string, error) {
	return img.rawManifest, string(img.manifest.MediaType), nil
}

// Blob implements [converter.Image]. The bytes were digested when they were written
// by this process a moment ago and are not read again for it.
func (img *builtImage) Blob(_ context.Context, desc v1.Descriptor) (io.ReadCloser, error) {
	switch desc.Digest {
	case img.manifest.Config.Digest:
		return io.NopCloser(bytes.NewReader(img.rawConfig)), nil
	case img.layer.digest:
		return os.Open(img.layer.file)
	}
	return nil, fmt.Errorf("opening blob %s: the image has none of that digest", desc.Digest)
}

// A deliverFunc brings an image to where it was asked for and says where that is.
type deliverFunc func(context.Context, *builtImage) (where string, err error)

// bootstrapTarget finds out where an image goes: to a target of package registry, or
// into the store if target is empty. Mistakes show now and not after the installation.
func bootstrapTarget(c *cli.Context, t *term, target, name string) (deliverFunc, error) {
	if target == "" {
		st, err := openStore(t, c)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, img *builtImage) (string, error) {
			p := t.newProgress()
			defer p.stop()
			_, err := converter.Convert(ctx, img, st, converter.Options{Name: name, Progress: p, Warn: t.warnf})
			if err != nil {
				return "", fmt.Errorf("converting the image: %w", err)
			}
			return name, nil
		}, nil
	}
	ref, err := registry.ParseRef(target)
	if err != nil {
		return nil, usageError{err}
	}
	if ref.Tag == "" && (ref.Transport == registry.OCILayout || ref.Transport == registry.OCIArchive) {
		ref.Tag = name
	}
	o, err := registryOptions(c)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, img *builtImage) (string, error) {
		_, err := exportTo(ctx, t, ref, o, func(ctx context.Context, to converter.Target, _ converter.Progress) (*converter.ExportResult, error) {
			return &converter.ExportResult{}, img.put(ctx, to)
		})
		if err != nil {
			return "", fmt.Errorf("writing the image to %s: %w", ref, err)
		}
		return ref.String(), nil
	}, nil
}

// put gives the image to a target.
func (img *builtImage) put(ctx context.Context, to converter.Target) error {
	for _, d := range append(img.manifest.Layers[:1:1], img.manifest.Config) {
		open := func() (io.ReadCloser, error) { return img.Blob(ctx, d) }
		if err := to.PutBlob(ctx, d, open); err != nil {
			return fmt.Errorf("storing blob %s: %w", d.Digest, err)
		}
	}
	if err := to.PutManifest(ctx, img.rawManifest, string(img.manifest.MediaType)); err != nil {
		return fmt.Errorf("storing the manifest: %w", err)
	}
	return nil
}
