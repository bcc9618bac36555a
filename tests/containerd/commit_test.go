package containerd

import (
	"bytes"
	"context"
	"encoding/json"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// appendLayer makes the manifest of an image with one more layer.
func appendLayer(ctx context.Context, c *client.Client, base client.Image, layer ocispec.Descriptor) (ocispec.Descriptor, error) {
	cs := c.ContentStore()
	diffID, err := layerDiffID(ctx, cs, layer)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var m ocispec.Manifest
	var config ocispec.Image
	if err := readBlob(ctx, cs, base.Target(), &m); err != nil {
		return ocispec.Descriptor{}, err
	}
	if err := readBlob(ctx, cs, m.Config, &config); err != nil {
		return ocispec.Descriptor{}, err
	}
	config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffID)
	m.Layers = append(m.Layers, layer)
	labels := map[string]string{}
	for i, l := range m.Layers {
		labels[gcLabel("l", i)] = l.Digest.String()
	}
	if m.Config, err = writeBlob(ctx, cs, m.Config.MediaType, config, nil); err != nil {
		return ocispec.Descriptor{}, err
	}
	labels[gcLabel("config", 0)] = m.Config.Digest.String()
	return writeBlob(ctx, cs, base.Target().MediaType, m, labels)
}

func gcLabel(kind string, i int) string {
	return "containerd.io/gc.ref.content." + kind + "." + string(rune('0'+i%10)) + string(rune('0'+i/10))
}

// layerDiffID returns the digest of an unpacked layer, which differs note on its blob.
func layerDiffID(ctx context.Context, cs content.Store, layer ocispec.Descriptor) (digest.Digest, error) {
	info, err := cs.Info(ctx, layer.Digest)
	if err != nil {
		return "", err
	}
	return digest.Parse(info.Labels["containerd.io/uncompressed"])
}

func readBlob(ctx context.Context, cs content.Store, desc ocispec.Descriptor, v any) error {
	b, err := content.ReadBlob(ctx, cs, desc)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

func writeBlob(ctx context.Context, cs content.Store, mediaType string, v any, labels map[string]string) (ocispec.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	return desc, content.WriteBlob(ctx, cs, desc.Digest.String(), bytes.NewReader(b), desc, content.WithLabels(labels))
}
