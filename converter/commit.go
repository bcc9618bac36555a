package converter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

// refKeys are the names under which an image's config stream refers to the
// composefs images made of it. The keys of Merged and Bootable are those of
// composefs-rs; its tools take others for layers that no config names.
var refKeys = map[Kind]string{
	Rootfs:   "particle.image.rootfs.v1",
	Merged:   store.ImageRef,
	Bootable: store.BootImageRef,
}

// Prefixes of the names under which a manifest's stream refers to others; layers
// have their diffID without any. (The first is that of composefs-rs.)
const (
	configPrefix = "config:"
	blobPrefix   = "blob:"
)

// commit merges the layers of a transaction, writes the images made of them and
// makes all of it visible.
func commit(ctx context.Context, st *store.Store, txn *store.Txn, raw, rawConfig []byte, layers []*aLayer, o Options) (*Result, error) {
	merged := tree.New()
	for _, l := range layers {
		merged = tree.Merge(merged, l.tree)
		l.tree = nil
	}
	res := &Result{
		Name:     o.Name,
		Manifest: hashOf(raw),
		Config:   hashOf(rawConfig),
		Images:   map[string]fsverity.Digest{},
	}

	refs := map[string]fsverity.Digest{}
	for _, kind := range Kinds {
		if kind == Bootable && !o.Bootable {
			continue
		}
		sealed, err := Seal(merged, kind)
		if err != nil {
			return nil, err
		}
		d, err := txn.PutImage(ctx, func(w io.Writer) error {
			return erofs.Write(w, sealed, erofs.Options{})
		})
		if err != nil {
			return nil, fmt.Errorf("writing the %s image: %w", kind, err)
		}
		refs[refKeys[kind]] = d
	}
	warnSealed(merged, o)

	// From reading what earlier conversions of this image made to adding to it no
	// other may come between.
	unlock, err := st.LockRefs(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	configID := store.ConfigPrefix + res.Config.String()
	manifestID := store.ManifestPrefix + res.Manifest.String()
	if err := oldImages(st, configID, refs); err != nil {
		return nil, err
	}
	for kind, key := range refKeys {
		if d, ok := refs[key]; ok {
			res.Images[kind.String()] = d
		}
	}

	blobs, err := oldBlobs(st, manifestID)
	if err != nil {
		return nil, err
	}
	streams := map[string]fsverity.Digest{}
	for _, l := range layers {
		streams[l.DiffID.String()] = l.stream
		if !l.blobStream.IsZero() {
			blobs[blobPrefix+l.blobID.String()] = l.blobStream
		}
		res.Layers = append(res.Layers, l.LayerResult)
	}
	maps.Copy(refs, streams)
	config, err := putJSON(ctx, txn, rawConfig, store.ConfigStream, configID, refs)
	if err != nil {
		return nil, fmt.Errorf("storing the config: %w", err)
	}
	streams[configPrefix+res.Config.String()] = config
	maps.Copy(streams, blobs)
	if _, err := putJSON(ctx, txn, raw, store.ManifestStream, manifestID, streams); err != nil {
		return nil, fmt.Errorf("storing the manifest: %w", err)
	}
	if o.Name != "" {
		if err := txn.SetRef(store.Streams, store.TagPrefix+store.EncodeTag(o.Name), manifestID); err != nil {
			return nil, err
		}
	}
	if err := txn.Commit(); err != nil {
		return nil, err
	}
	res.NewObjects, res.NewBytes = txn.Added()
	return res, nil
}

// warnSealed tells what Seal settles for lack of better knowledge.
func warnSealed(t *tree.Tree, o Options) {
	if n := t.Root.Dir["usr"]; n == nil || !n.IsDir() {
		o.Warn("the image has no directory /usr: its root gets mode 0755, owner root and the date 1970-01-01")
	}
	if o.Bootable && SELinux(t) {
		o.Warn("the image has an SELinux policy: files are not labelled, let the system relabel at boot")
	}
}

// oldImages adds the images that an earlier conversion of the same config made, so
// that a plain conversion does not forget the bootable one.
func oldImages(st *store.Store, configID string, refs map[string]fsverity.Digest) error {
	old, err := st.OpenStream(configID, store.ConfigStream)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer old.Close()
	named := old.NamedRefs()
	for _, key := range refKeys {
		if d, ok := named[key]; ok && refs[key].IsZero() {
			refs[key] = d
		}
	}
	return nil
}

// oldBlobs returns the compressed layers that an earlier conversion of the same
// manifest kept.
func oldBlobs(st *store.Store, manifestID string) (map[string]fsverity.Digest, error) {
	blobs := map[string]fsverity.Digest{}
	old, err := st.OpenStream(manifestID, store.ManifestStream)
	if errors.Is(err, store.ErrNotFound) {
		return blobs, nil
	}
	if err != nil {
		return nil, err
	}
	defer old.Close()
	for name, d := range old.NamedRefs() {
		if strings.HasPrefix(name, blobPrefix) {
			blobs[name] = d
		}
	}
	return blobs, nil
}

// putJSON stores a manifest or config as composefs-rs does: one object, with a
// stream around it that refers to other streams.
func putJSON(ctx context.Context, txn *store.Txn, raw []byte, content uint64, id string, refs map[string]fsverity.Digest) (fsverity.Digest, error) {
	return putStream(ctx, txn, bytes.NewReader(raw), int64(len(raw)), content, id, refs)
}

// putStream stores size bytes as one object with a stream around it.
func putStream(ctx context.Context, txn *store.Txn, r io.Reader, size int64, content uint64, id string, refs map[string]fsverity.Digest) (fsverity.Digest, error) {
	d, err := txn.Put(ctx, r, size)
	if err != nil {
		return fsverity.Digest{}, err
	}
	s := txn.NewStream(content)
	if err := s.Object(d, size); err != nil {
		s.Abort()
		return fsverity.Digest{}, err
	}
	for name, ref := range refs {
		s.NamedRef(name, ref)
	}
	return s.Close(id)
}

func hashOf(b []byte) v1.Hash {
	h, _, err := v1.SHA256(bytes.NewReader(b))
	if err != nil {
		panic(err) // reading memory does not fail
	}
	return h
}
