package hostdeploy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/hostdeploy/bootloader"
)

// A NewHost is a disk, or a directory, that is made a host.
type NewHost struct {
	// Root is the directory of the physical root, mounted and writable.
	Root string
	// Paths of the boot file system, which may be an ordinary directory until the disk
	// is finished.
	Paths bootloader.Paths
	// Loader names the boot loader.
	Loader string
	// Target is what the loader itself is installed on; nil leaves the disk's loader as
	// it is. Its Root is filled in here.
	Target *bootloader.Target
	// Args lead to the physical root: "root=UUID=…", "rw".
	Args Args
	// Machine are further arguments that this machine needs, "console=ttyS0" say.
	Machine Args
	// Fstab has lines for the machine's /etc/fstab.
	Fstab string
	// Reference is where updates come from.
	Reference string
	// Kernel, Force and Insecure as in [Request].
	Kernel   string
	Force    bool
	Insecure bool
	Warn     func(format string, args ...any)
	Done     Done

	made  bool // Prepare has made the store
	begun bool // Install has made the mark
}

// installMark is there until just before an installation writes the boot entry: what it is
// found with has never run.
const installMark = "state/installing"

// Fill brings the image into the new host's store and returns the digest of its
// manifest.
type Fill func(context.Context, *store.Store) (manifest string, err error)

// Prepare makes the store and fills it. What it returns may be applied. On failure
// nothing is left of a store that was not there before.
func (n *NewHost) Prepare(ctx context.Context, fill Fill) (*Plan, error) {
	p, err := n.prepare(ctx, fill)
	if err != nil {
		return nil, errors.Join(err, n.Discard())
	}
	return p, nil
}

// Discard removes the store that Prepare has made, where its plan is not to be applied.
func (n *NewHost) Discard() error {
	if !n.made {
		return nil
	}
	n.made = false
	return os.RemoveAll(filepath.Join(n.Root, storeDir))
}

func (n *NewHost) prepare(ctx context.Context, fill Fill) (*Plan, error) {
	if n.Warn == nil {
		n.Warn = func(string, ...any) {}
	}
	loader, err := bootloader.ByName(n.Loader, n.Paths)
	if err != nil {
		return nil, err
	}
	if err := n.refuse(); err != nil {
		return nil, err
	}
	dir := filepath.Join(n.Root, storeDir)
	have, err := exists(dir)
	if err != nil {
		return nil, err
	}
	n.made = !have
	st, err := store.Init(dir, store.Options{})
	if err != nil {
		return nil, err
	}
	manifest, err := fill(ctx, st)
	if err != nil {
		return nil, err
	}
	s, err := converter.Find(st, manifest)
	if err != nil {
		return nil, err
	}
	if _, err := converter.MakeBootable(ctx, st, s); err != nil {
		return nil, err
	}
	h := &Host{Root: n.Root, Paths: n.Paths, Loader: loader, Store: st, Warn: n.Warn}
	if _, ok := n.Machine.Value("panic"); !ok && loader.Tries().Max > 0 {
		// A kernel that panics is not to stand there: the next start is another try.
		n.Machine = append(slices.Clip(n.Machine), "panic=10")
	}
	return NewPlan(ctx, h, Request{
		Manifest: manifest, Reference: n.Reference, KArgs: KArgs{Boot: n.Args, Machine: n.Machine},
		Kernel: n.Kernel, Force: n.Force, Insecure: n.Insecure, Fstab: n.Fstab,
	}, false)
}

// refuse returns an error for a root that has deployments. What an installation left that
// did not get as far as a boot entry is none.
func (n *NewHost) refuse() error {
	if begun, err := exists(filepath.Join(n.Root, installMark)); begun || err != nil {
		return err
	}
	for _, dir := range []string{deployDir, osDir} { // a /var alone is somebody's, too
		if have, err := exists(filepath.Join(n.Root, dir)); err != nil {
			return err
		} else if have {
			return fmt.Errorf("installing to %q: there are deployments already, in %q; particle hostdeploy switch, on the running system, changes them", n.Root, dir)
		}
	}
	return nil
}

// Install applies a plan of Prepare and installs the boot loader. On failure nothing is left
// of it but what the loader's own installation wrote, unless the boot entry is there; what
// a power loss leaves does not hinder the next try.
func (n *NewHost) Install(ctx context.Context, p *Plan) error {
	state := filepath.Join(n.Root, filepath.Dir(installMark))
	if err := os.MkdirAll(state, 0o755); err != nil {
		return fmt.Errorf("making the state's directory: %w", err)
	}
	unlock, err := p.h.Lock()
	if err != nil {
		return err
	}
	defer unlock()
	// Another installation may have come first.
	if err := n.refuse(); err != nil {
		return err
	}
	if err := n.clear(); err != nil {
		return err
	}
	if err = n.install(ctx, p); err == nil {
		return nil
	}
	if used, uerr := p.h.used(p.ID); used || uerr != nil {
		return errors.Join(err, uerr) // it may boot
	}
	entries, eerr := p.h.Loader.Entries(n.Warn)
	if eerr == nil && !slices.Contains(usedBootDirs(entries), p.files.dir()) {
		eerr = os.RemoveAll(filepath.Join(n.Paths.Boot, p.files.dir()))
	}
	err = errors.Join(err, eerr, n.clear(), n.Discard(), os.Remove(filepath.Join(n.Root, lockFile)))
	_ = os.Remove(state) // unless it was there before, with something else in it
	return err
}

// clear removes the state that an unfinished installation has made.
func (n *NewHost) clear() error {
	begun, err := exists(filepath.Join(n.Root, installMark))
	if err != nil || !begun && !n.begun {
		return err
	}
	for _, name := range []string{deployDir, osDir, historyLog, verityMark, installMark} {
		if err := removeAll(filepath.Join(n.Root, name)); err != nil {
			return fmt.Errorf("removing what an installation left: %w", err)
		}
	}
	return nil
}

// install does it, on a root without any state.
func (n *NewHost) install(ctx context.Context, p *Plan) error {
	mark := filepath.Join(n.Root, installMark)
	if err := writeFile(mark, nil, 0o600); err != nil {
		return err
	}
	n.begun = true
	for _, dir := range []string{deployDir, filepath.Join(osDir, defaultOS)} {
		if err := os.MkdirAll(filepath.Join(n.Root, dir), 0o755); err != nil {
			return fmt.Errorf("making the state's directories: %w", err)
		}
	}
	if !p.h.Store.Verity() {
		// The store was filled where files cannot get fs-verity: the first boot gives it
		// to them.
		if err := writeFile(filepath.Join(n.Root, verityMark), nil, 0o600); err != nil {
			return err
		}
	}
	if n.Target != nil {
		if err := n.installLoader(ctx, p); err != nil {
			return fmt.Errorf("installing the boot loader %s: %w", n.Loader, err)
		}
	}
	// The mark goes before the entry comes: what has an entry may be run, and kept.
	entry := &p.Steps[len(p.Steps)-1]
	add := entry.run
	entry.run = func(ctx context.Context) error {
		err := os.Remove(mark)
		if err == nil {
			err = syncDir(filepath.Dir(mark))
		}
		if err != nil {
			return err
		}
		return add(ctx)
	}
	return p.Apply(ctx, n.Done)
}

// installLoader has the loader installed from the image, which is mounted for it.
func (n *NewHost) installLoader(ctx context.Context, p *Plan) (err error) {
	installer, err := bootloader.InstallerByName(n.Loader)
	if err != nil {
		return err
	}
	// The whole image: loaders' files may lie in /boot.
	img, err := converter.OpenImage(p.h.Store, p.image, converter.Merged)
	if err != nil {
		return err
	}
	defer img.Close()
	dir, err := os.MkdirTemp("", "particle-image-")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	if _, err := mount.Mount(dir, mount.Options{
		Image: img, Objects: []string{p.h.Store.ObjectsDir()}, ObjectsChecked: true,
		Name: p.image.Images[converter.Merged.String()].String(), ReadOnly: true,
	}); err != nil {
		return fmt.Errorf("mounting the image: %w", err)
	}
	defer func() {
		if uerr := mount.Unmount(dir); err == nil {
			err = uerr
		}
	}()
	t := *n.Target
	t.Root = dir
	return installer.Install(ctx, t)
}
