package podmanext

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
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

// refPrefix begins the names in the store that keep layers from being collected. A
// name of the layer store's directory follows, and the diffID of a layer's stream or
// the digest of a composefs image.
const refPrefix = "podman-layers/"

func (s *LayerStore) streamRef(diffID string) string {
	return s.prefix + strings.TrimPrefix(diffID, "sha256:")
}

func (s *LayerStore) imageRef(image fsverity.Digest) string { return s.prefix + image.String() }

// target returns where an image is mounted.
func (s *LayerStore) target(image fsverity.Digest) string {
	return filepath.Join(s.o.Mounts, image.String())
}

// rootMode is the mode of the root directory of a layer that does not list it: what
// podman's own storage gives it (c/storage drivers/overlay/overlay.go, defaultPerms).
const rootMode = tree.TypeDir | 0o555

// Xattrs by which a file is a whiteout, and a directory has such files, for an overlay
// that finds them in its lower layer (Linux Documentation/filesystems/overlayfs.rst,
// "Nesting overlayfs mounts"). The EROFS writer escapes them, so that the overlay that
// is the layer's mount shows them to the one that podman stacks on it.
const (
	whiteoutAttr = "trusted.overlay.whiteout"
	hasWhiteouts = "x" // value of tree.OpaqueAttr: there are files that are whiteouts
	opaqueYes    = "y" // value of tree.OpaqueAttr: the layers below are hidden
)

// putLayerImage makes the composefs image of one layer.
//
// Plain whiteouts would delete nothing, as the lower overlay consumes them. The writer
// would escape them by itself, with xattrs user.overlay.* for mounts without privilege,
// but those would show in containers.
func putLayerImage(ctx context.Context, txn *store.Txn, t *tree.Tree) (fsverity.Digest, error) {
	t = &tree.Tree{Root: nested(t.Root)}
	if t.Root.Implied {
		t.Root.Mode = rootMode
	}
	return txn.PutImage(ctx, func(w io.Writer) error { return erofs.Write(w, t, erofs.Options{}) })
}

// fill returns a layer in which each directory that deletes something of the layers
// below hides them altogether, and has all that the merge of the two shows there. The
// root directory stays as it is.
//
// Linux (6.18 has it) does not remove a directory on top of one with whiteouts of the
// nested form, because ovl_check_empty_dir counts them as files. Only the root cannot
// be removed anyway.
func fill(lower, upper *tree.Tree) *tree.Tree {
	merged := tree.Merge(lower, upper)
	var filled func(dir, full *tree.Node, root bool) *tree.Node
	filled = func(dir, full *tree.Node, root bool) *tree.Node {
		copied := *dir
		if !root && !dir.IsOpaque() && hasWhiteout(dir) {
			copied = *full
			copied.Xattrs = maps.Clone(copied.Xattrs)
			if copied.Xattrs == nil {
				copied.Xattrs = map[string]string{}
			}
			copied.Xattrs[tree.OpaqueAttr] = opaqueYes
			return &copied
		}
		copied.Dir = make(map[string]*tree.Node, len(dir.Dir))
		for name, n := range dir.Dir {
			if n.IsDir() {
				n = filled(n, full.Dir[name], false)
			}
			copied.Dir[name] = n
		}
		return &copied
	}
	return &tree.Tree{Root: filled(upper.Root, merged.Root, true)}
}

func hasWhiteout(dir *tree.Node) bool {
	for _, n := range dir.Dir {
		if n.IsWhiteout() {
			return true
		}
	}
	return false
}

// nested returns a copy of a layer's directory in which whiteouts are files that an
// overlay on an overlay sees as such.
func nested(dir *tree.Node) *tree.Node {
	copied := *dir
	copied.Dir = make(map[string]*tree.Node, len(dir.Dir))
	marked := false
	for name, n := range dir.Dir {
		switch {
		case n.IsDir():
			n = nested(n)
		case n.IsWhiteout() && dir.IsOpaque():
			continue // nothing of the layers below shows here anyway
		case n.IsWhiteout():
			n = &tree.Node{
				Stat: tree.Stat{Mode: tree.TypeRegular | 0o644, Xattrs: map[string]string{whiteoutAttr: ""}},
				File: &tree.File{},
			}
			marked = true
		}
		copied.Dir[name] = n
	}
	if marked {
		copied.Xattrs = maps.Clone(copied.Xattrs)
		if copied.Xattrs == nil {
			copied.Xattrs = map[string]string{}
		}
		copied.Xattrs[tree.OpaqueAttr] = hasWhiteouts
	}
	return &copied
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
