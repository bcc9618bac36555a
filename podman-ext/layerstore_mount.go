package podmanext

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

// Names in the store that keep layers from being collected: of the layer's stream,
// by its diffID, and of the composefs image that is mounted.
const refPrefix = "podman-layers/"

func streamRef(diffID string) string                  { return refPrefix + strings.TrimPrefix(diffID, "sha256:") }
func imageRef(image fsverity.Digest) string           { return refPrefix + image.String() }
func (s *LayerStore) target(d fsverity.Digest) string { return filepath.Join(s.o.Mounts, d.String()) }

// Modes of the root directory of a layer that does not list it, as podman's own
// storage has them: the lowest layer gets c/storage's default, those above mostly have
// the one below them, which base images list with this mode.
const (
	baseRootMode  = tree.TypeDir | 0o555
	upperRootMode = tree.TypeDir | 0o755
)

// putLayerImage makes the composefs image of one layer. Whiteouts in it are escaped,
// so that an overlay on its mount sees them.
func putLayerImage(ctx context.Context, txn *store.Txn, t *tree.Tree, base bool) (fsverity.Digest, error) {
	if t.Root.Implied {
		root := *t.Root
		root.Mode = upperRootMode
		if base {
			root.Mode = baseRootMode
		}
		t = &tree.Tree{Root: &root, Owners: t.Owners}
	}
	return txn.PutImage(ctx, func(w io.Writer) error { return erofs.Write(w, t, erofs.Options{}) })
}

// deletes reports whether a layer hides anything of those below it.
func deletes(t *tree.Tree) bool {
	stop := errors.New("found")
	return t.Walk(func(_ string, n *tree.Node) error {
		if n.IsWhiteout() || n.IsOpaque() {
			return stop
		}
		return nil
	}) != nil
}

// isMounted reports whether something is mounted on a directory.
func isMounted(target string) bool {
	var st, parent unix.Stat_t
	if unix.Stat(target, &st) != nil || unix.Stat(filepath.Dir(target), &parent) != nil {
		return false
	}
	return st.Dev != parent.Dev
}

// mountEntry mounts the layer of an entry, unless it is.
func (s *LayerStore) mountEntry(e *entry) error {
	if e.verification != mount.None && isMounted(s.target(e.image)) {
		return nil
	}
	v, err := s.mountImage(e.image)
	if err == nil {
		e.verification = v
	}
	return err
}

// mountImage mounts the composefs image of a layer, or takes over the mount that an
// earlier process left.
func (s *LayerStore) mountImage(image fsverity.Digest) (mount.Verification, error) {
	f, _, err := s.o.Store.OpenImage(image.String())
	if err != nil {
		return mount.None, err
	}
	defer f.Close()
	target := s.target(image)
	if isMounted(target) {
		if v, err := s.takeOver(target, image, f); err == nil {
			return v, nil
		}
		if err := unmountLayer(target); err != nil {
			return mount.None, err
		}
	}
	if err := os.Mkdir(target, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return mount.None, err
	}
	state, err := mount.Mount(target, mount.Options{
		Image: f, Objects: []string{s.o.Store.ObjectsDir()},
		Digest: image, Verity: mount.VerityTry, ObjectsChecked: true,
		Name: image.String(),
		// Containers stack a second overlay on it.
		Loop: !s.features.File.OK || !s.features.FileStacks.OK,
	})
	if err != nil {
		os.Remove(target) // an empty directory must not pass for the layer
		return mount.None, err
	}
	for _, w := range state.Warnings {
		s.log.Warn(w, "image", image.String())
	}
	return state.Verification, nil
}

// takeOver checks that what is mounted is the image, and the image what its name says.
func (s *LayerStore) takeOver(target string, image fsverity.Digest, f *os.File) (mount.Verification, error) {
	all, err := mount.List()
	if err != nil {
		return mount.None, err
	}
	for _, m := range all {
		if m.Target != target || m.Name != image.String() {
			continue
		}
		got, _, err := fsverity.Read(s.o.Store.Algorithm(), io.NewSectionReader(f, 0, 1<<62))
		if err != nil {
			return mount.None, err
		}
		if got != image {
			return mount.None, fmt.Errorf("%w: the image %s has the digest %s", mount.ErrWrongDigest, image, got)
		}
		if m.Verity && s.o.Store.Verity() {
			return mount.Enforced, nil
		}
		return mount.Checked, nil
	}
	return mount.None, mount.ErrNotMounted
}

// unmountLayer clears a mount point and removes it. Who still uses the files keeps
// them.
func unmountLayer(target string) error {
	for {
		err := mount.Detach(target)
		if errors.Is(err, mount.ErrNotMounted) || errors.Is(err, os.ErrNotExist) {
			break
		}
		if err != nil {
			return err
		}
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// unmountLayers clears all mount points below a directory.
func unmountLayers(dir string) error {
	names, err := os.ReadDir(dir)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	var errs []error
	for _, n := range names {
		if _, err := fsverity.Parse(n.Name()); err == nil {
			errs = append(errs, unmountLayer(filepath.Join(dir, n.Name())))
		}
	}
	return errors.Join(errs...)
}

// frontType is the type of our FUSE mounts in /proc/self/mountinfo.
const frontType = "fuse.particle-layers"

// detachFront takes our FUSE mounts away from a directory, alive or not.
func detachFront(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	// The directory itself cannot be looked at while its server is dead.
	if parent, err := filepath.EvalSymlinks(filepath.Dir(dir)); err == nil {
		dir = filepath.Join(parent, filepath.Base(dir))
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	fronts := 0
	err = mount.ParseMountinfo(f, func(e mount.Entry) error {
		if e.Target == dir && e.Type == frontType {
			fronts++
		}
		return nil
	})
	for ; err == nil && fronts > 0; fronts-- {
		if err = unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			err = fmt.Errorf("taking the front of the layer store away from %s: %w", dir, err)
		}
	}
	return err
}
