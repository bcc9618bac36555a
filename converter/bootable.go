package converter

import (
	"context"
	"fmt"
	"io"

	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/store"
)

// MakeBootable adds the image of kind Bootable to an image of the store that has none,
// and returns the image as it is then. Nothing is fetched: all files are there.
func MakeBootable(ctx context.Context, st *store.Store, s *Stored) (*Stored, error) {
	if _, ok := s.Images[Bootable.String()]; ok {
		return s, nil
	}
	t, err := ReadImage(st, s, Rootfs)
	if err != nil {
		return nil, err
	}
	sealed, err := Seal(t, Bootable)
	if err != nil {
		return nil, err
	}
	txn, err := st.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer txn.Rollback()
	d, err := txn.PutImage(ctx, func(w io.Writer) error { return erofs.Write(w, sealed, erofs.Options{}) })
	if err != nil {
		return nil, fmt.Errorf("writing the %s image of %s: %w", Bootable, s.Manifest, err)
	}
	// Config and manifest are the same bytes; their streams refer to one thing more.
	unlock, err := st.LockRefs(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	manifestID := store.ManifestPrefix + s.Manifest.String()
	manifest, err := st.StreamDigest(manifestID)
	if err != nil {
		return nil, err
	}
	rawManifest, refs, err := readStream(st, manifest, store.ManifestStream)
	if err != nil {
		return nil, err
	}
	configRef := configPrefix + s.Config.String()
	rawConfig, configRefs, err := readStream(st, refs[configRef], store.ConfigStream)
	if err != nil {
		return nil, fmt.Errorf("config %s: %w", s.Config, err)
	}
	configRefs[refKeys[Bootable]] = d
	if refs[configRef], err = putJSON(ctx, txn, rawConfig, store.ConfigStream, store.ConfigPrefix+s.Config.String(), configRefs); err != nil {
		return nil, fmt.Errorf("storing the config: %w", err)
	}
	if _, err := putJSON(ctx, txn, rawManifest, store.ManifestStream, manifestID, refs); err != nil {
		return nil, fmt.Errorf("storing the manifest: %w", err)
	}
	if err := txn.Commit(); err != nil {
		return nil, err
	}
	return load(st, manifestID, s.Names)
}
