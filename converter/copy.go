package converter

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/store"
)

// copyWorkers is how many objects are copied at a time.
const copyWorkers = 4

// Copy brings an image from one store into another, as it is: its manifest, config,
// layers and composefs images get the same digests there. Both stores must have the
// same algorithm. Objects that the other store has are not copied.
func Copy(ctx context.Context, from *store.Store, s *Stored, to *store.Store, o Options) (*Result, error) {
	if from.Algorithm() != to.Algorithm() {
		return nil, fmt.Errorf("copying image %s: %w: %s has %s, %s has %s", s.Manifest, store.ErrAlgorithm,
			from.Dir(), from.Algorithm().Name(), to.Dir(), to.Algorithm().Name())
	}
	txn, err := to.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer txn.Rollback()
	c := &copier{ctx: ctx, from: from, to: txn, done: map[fsverity.Digest]bool{}}
	manifest, err := from.StreamDigest(store.ManifestPrefix + s.Manifest.String())
	if err == nil {
		err = c.stream(store.ManifestPrefix+s.Manifest.String(), manifest)
	}
	if err != nil {
		return nil, fmt.Errorf("copying image %s from %s to %s: %w", s.Manifest, from.Dir(), to.Dir(), err)
	}
	if o.Name != "" {
		if err := txn.SetRef(store.Streams, store.TagPrefix+store.EncodeTag(o.Name), store.ManifestPrefix+s.Manifest.String()); err != nil {
			return nil, err
		}
	}
	if err := txn.Commit(); err != nil {
		return nil, err
	}
	res := &Result{Name: o.Name, Manifest: s.Manifest, Config: s.Config, Images: s.Images}
	for _, diffID := range s.Layers {
		res.Layers = append(res.Layers, LayerResult{DiffID: diffID})
	}
	res.NewObjects, res.NewBytes = txn.Added()
	return res, nil
}

type copier struct {
	ctx  context.Context
	from *store.Store
	to   *store.Txn
	done map[fsverity.Digest]bool
}

// stream copies a split stream with all that it refers to. id is the content id that
// it gets.
func (c *copier) stream(id string, d fsverity.Digest) error {
	if c.done[d] {
		return nil
	}
	c.done[d] = true
	r, err := c.from.OpenStreamDigest(d, 0)
	if err != nil {
		return err
	}
	defer r.Close()
	refs := r.NamedRefs()
	for name, ref := range refs {
		if err := c.ref(r.ContentType(), name, ref); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	var objects []fsverity.Digest
	for o, err := range r.ObjectRefs() {
		if err != nil {
			return err
		}
		objects = append(objects, o)
	}
	if err := c.objects(objects); err != nil {
		return err
	}
	w := c.to.NewStream(r.ContentType())
	for name, ref := range refs {
		w.NamedRef(name, ref)
	}
	for {
		inline, object, size, err := r.Next()
		switch {
		case errors.Is(err, io.EOF):
			got, err := w.Close(id)
			if err == nil && got != d {
				err = fmt.Errorf("%w: stream %s became %s", store.ErrCorrupt, d, got)
			}
			return err
		case err != nil:
		case object.IsZero():
			err = w.Inline(inline)
		default:
			err = w.Object(object, size)
		}
		if err != nil {
			w.Abort()
			return err
		}
	}
}

// ref copies what a stream of the given type calls by name: the content ids follow
// from the names (see refKeys, configPrefix and blobPrefix).
func (c *copier) ref(contentType uint64, name string, d fsverity.Digest) error {
	switch {
	case contentType == store.ConfigStream:
		for _, key := range refKeys {
			if key == name {
				return c.image(d)
			}
		}
		return c.stream(store.LayerPrefix+name, d)
	case contentType != store.ManifestStream:
		return fmt.Errorf("%w: a stream of type %#x refers to others", store.ErrContentType, contentType)
	case len(name) > len(configPrefix) && name[:len(configPrefix)] == configPrefix:
		return c.stream(store.ConfigPrefix+name[len(configPrefix):], d)
	case len(name) > len(blobPrefix) && name[:len(blobPrefix)] == blobPrefix:
		return c.stream(store.BlobPrefix+name[len(blobPrefix):], d)
	}
	return c.stream(store.LayerPrefix+name, d)
}

// image copies an EROFS image with its objects.
func (c *copier) image(d fsverity.Digest) error {
	f, _, err := c.from.OpenImage(d.String())
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	objects, err := erofs.Objects(f, fi.Size())
	if err != nil {
		return err
	}
	if err := c.objects(append(objects, d)); err != nil {
		return err
	}
	return c.to.LinkImage(d)
}

// objects copies those that have not been copied yet.
func (c *copier) objects(all []fsverity.Digest) error {
	g, ctx := errgroup.WithContext(c.ctx)
	g.SetLimit(copyWorkers)
	for _, d := range all {
		if c.done[d] {
			continue
		}
		c.done[d] = true
		if have, err := c.to.Store().HasObject(d); err != nil {
			return err
		} else if have {
			continue
		}
		g.Go(func() error { return c.object(ctx, d) })
	}
	return g.Wait()
}

func (c *copier) object(ctx context.Context, d fsverity.Digest) error {
	f, err := c.from.OpenObject(d)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	got, err := c.to.PutFile(ctx, f, fi.Size())
	if err == nil && got != d {
		err = fmt.Errorf("%w: object %s has the digest %s; particle store scrub finds all that are damaged", store.ErrCorrupt, d, got)
	}
	return err
}
