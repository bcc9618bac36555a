package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

// An image is an open composefs image that an argument names: an image of the store,
// or a file.
type image struct {
	*os.File
	// store has the image, nil for a file; digest is zero then.
	store  *store.Store
	digest fsverity.Digest
}

// openImage opens the image that an argument names: one of the store's, of the kind
// that --kind says, or a file of that path.
func openImage(t *term, c *cli.Context, name string) (*image, error) {
	kind, err := kindOf(c)
	if err != nil {
		return nil, err
	}
	st, err := readStore(t, c)
	if err == nil {
		var s *converter.Stored
		if s, err = converter.Find(st, name); err == nil {
			f, err := converter.OpenImage(st, s, kind)
			return &image{f, st, s.Images[kind.String()]}, err
		}
	}
	fi, serr := os.Stat(name)
	if serr != nil || !(errors.Is(err, converter.ErrNotFound) || errors.Is(err, store.ErrNotStore)) {
		return nil, err
	}
	if fi.IsDir() {
		return nil, usagef("%q is a directory: want an image of the store or a composefs image", name)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	if !isComposefs(f) {
		f.Close()
		return nil, fmt.Errorf("%q is neither an image of the store nor a composefs image", name)
	}
	return &image{File: f}, nil
}

// tree reads the tree of the image.
func (f *image) tree() (*tree.Tree, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	t, err := erofs.Read(f, fi.Size())
	if err != nil {
		return nil, fmt.Errorf("reading %q: %w", f.Name(), err)
	}
	return t, nil
}

// kindFlag selects one of the composefs images made of an OCI image.
func kindFlag() cli.Flag {
	return &cli.StringFlag{Name: "kind", Value: converter.Rootfs.String(), Usage: "which image of the store's: `rootfs|merged|bootable`"}
}

func kindOf(c *cli.Context) (converter.Kind, error) {
	k, err := converter.ParseKind(c.String("kind"))
	if err != nil {
		return k, usageError{fmt.Errorf("--kind: %w", err)}
	}
	return k, nil
}
