// Package hostdeploy makes a host boot images: it installs them, keeps several
// deployments side by side, moves between them, and removes what is no longer needed.
//
// Find looks into an image for what it takes to boot it. NewPlan works out what is to
// be done, and writes nothing; Apply does it. What makes a deployment visible, its boot
// entry, comes last, so that the host boots the old or the new system, whenever the
// power fails. docs/boot.md has the layout and the order of writes.
//
// Left out: where images come from (callers bring them into the host's store), how a
// disk is partitioned (package disk), the boot loaders (package bootloader) and what
// happens while the machine boots (package initramfs).
package hostdeploy

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
	"github.com/particle-os/particle/hostdeploy/bootloader"
	"github.com/particle-os/particle/hostdeploy/initramfs"
)

// Places below the physical root; docs/boot.md shows the whole.
const (
	storeDir   = "composefs"
	deployDir  = "state/deploy"
	osDir      = "state/os"
	defaultOS  = "default"
	historyLog = "state/history"
	lockFile   = "state/lock"
	// verityMark is there when the store was filled where files could not get
	// fs-verity; the initramfs does that and removes it.
	verityMark = "state/enable-verity"
)

// conflictsFile, below a deployment's state, has the conflicts of the merge that made its
// /etc, where there were any.
const conflictsFile = "conflicts.json"

// stagedFile, below the run directory, is the deployment that becomes one at shutdown.
const stagedFile = "staged.json"

// A Host is a physical root with its boot file system: the disk of this machine, or
// one that is being installed.
type Host struct {
	// Root is the directory of the physical root: "/sysroot" on a running host.
	Root string
	// Run is the directory for what a power loss shall forget: "/run/particle". "" on
	// a disk that is being installed, which cannot have staged deployments.
	Run    string
	Paths  bootloader.Paths
	Loader bootloader.Loader
	Store  *store.Store
	// Booted is the id of the running deployment, "" where none of this host's runs.
	Booted string
	// Warn is told what is odd but does no harm; never nil.
	Warn func(format string, args ...any)
}

// HostOptions say where the parts of a host are. The zero value is the running host.
type HostOptions struct {
	Root string // "/sysroot"
	Run  string // "/run/particle"
	// Boot is where the boot file system is mounted; "/boot".
	Boot string
	// Loader names the boot loader; "" finds out.
	Loader string
	// Cmdline is that of the running kernel; "" reads /proc/cmdline.
	Cmdline string
	Warn    func(format string, args ...any)
}

func (o HostOptions) defaults() HostOptions {
	o.Root, o.Run, o.Boot = cmp.Or(o.Root, "/sysroot"), cmp.Or(o.Run, "/run/particle"), cmp.Or(o.Boot, "/boot")
	if o.Warn == nil {
		o.Warn = func(string, ...any) {}
	}
	return o
}

// running returns the id of the deployment that runs, "" for none.
func running(o HostOptions) (string, error) {
	if o.Cmdline == "" {
		line, err := os.ReadFile("/proc/cmdline")
		if err != nil {
			return "", fmt.Errorf("reading the kernel's command line: %w", err)
		}
		o.Cmdline = string(line)
	}
	// After a soft reboot the command line is still that of the boot before.
	r, err := initramfs.Read(o.Run)
	if err == nil {
		return cmp.Or(r.Deployment, r.Digest.String()), nil
	} else if !errors.Is(err, initramfs.ErrNoReport) {
		o.Warn("reading what the initramfs reported: %v", err)
	}
	return bootedID(ParseArgs(o.Cmdline)), nil
}

// OnTrial reports whether the running deployment has not proved good yet. It needs
// nothing of the boot file system.
func OnTrial(o HostOptions) (bool, error) {
	o = o.defaults()
	id, err := running(o)
	if err != nil || id == "" {
		return false, err
	}
	return exists((&Host{Root: o.Root}).trialFile(id))
}

// Open opens the running host. The error is ErrNotHost where it was not deployed by
// Particle, and [bootloader.ErrNone] where it has no boot loader.
func Open(o HostOptions) (*Host, error) {
	o = o.defaults()
	h := &Host{Root: o.Root, Run: o.Run, Warn: o.Warn}
	var err error
	if h.Booted, err = running(o); err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(h.Root, deployDir)); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: there is no %s; particle hostdeploy install makes one", ErrNotHost, filepath.Join(h.Root, deployDir))
	} else if err != nil {
		return nil, fmt.Errorf("looking for deployments: %w", err)
	}
	h.Store, err = store.Open(filepath.Join(h.Root, storeDir))
	if errors.Is(err, store.ErrNotStore) {
		return nil, fmt.Errorf("%w: %w", ErrNotHost, err)
	}
	if err != nil {
		return nil, err // a store that this user may not read is one
	}
	if h.Paths, err = BootPaths(o.Boot); err != nil {
		return nil, err
	}
	if o.Loader != "" {
		h.Loader, err = bootloader.ByName(o.Loader, h.Paths)
	} else {
		h.Loader, err = bootloader.Detect(h.Paths)
	}
	return h, err
}

// BootPaths tells where the loader sees a boot directory's files: at the root, if it is
// a file system of its own, or else below its path in the file system that has it. That is
// so, too, where the directory is bound to another place, as /sysroot/boot to /boot.
func BootPaths(dir string) (bootloader.Paths, error) {
	// The path leads past dir, so that what is mounted there on demand is.
	_, err := os.Stat(dir + "/.")
	var inside string
	if err == nil {
		_, inside, err = mountOf(dir)
	}
	if err != nil {
		return bootloader.Paths{}, fmt.Errorf("looking for the boot file system at %q: %w", dir, err)
	}
	p := bootloader.Paths{Boot: dir}
	if inside != "/" {
		p.Prefix = inside
	}
	return p, nil
}

// bootedID returns the id of the deployment that a kernel command line names, "" for
// none.
func bootedID(args Args) string {
	if id, ok := args.Value("particle.deployment"); ok && checkID(id) == nil {
		return id
	}
	// Several digests may be given; the first one that could be booted was.
	for _, a := range args {
		switch name, value := cutArg(a); name {
		case "composefs.digest":
			if d, _, err := parseDigestText(value); err == nil {
				return d.String()
			}
		case "composefs":
			if d, err := fsverity.Parse(strings.TrimPrefix(value, "?")); err == nil {
				return d.String()
			}
		}
	}
	return ""
}

// path returns a path below the physical root.
func (h *Host) path(elem ...string) string {
	return filepath.Join(append([]string{h.Root}, elem...)...)
}

// Lock keeps other runs out until release is called. It does not wait: the error is
// ErrBusy and says which process has the lock.
func (h *Host) Lock() (release func(), err error) {
	name := h.path(lockFile)
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, unix.EROFS) {
		return nil, fmt.Errorf("locking %q: %w; is the physical root mounted read-only?", name, ErrReadOnly)
	} else if err != nil {
		return nil, fmt.Errorf("locking the host's deployments: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("locking %q: %w", name, err)
		}
		pid, _ := io.ReadAll(io.LimitReader(f, 32))
		return nil, fmt.Errorf("%w (process %s); wait for it to end", ErrBusy, bytes.TrimSpace(pid))
	}
	// Only for the message above: the lock is the kernel's and ends with the process.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return func() { f.Close() }, nil
}

// WaitLock is Lock for who must have it and waits until ctx ends: the error is that of the
// last try.
func (h *Host) WaitLock(ctx context.Context) (release func(), err error) {
	for {
		release, err = h.Lock()
		if !errors.Is(err, ErrBusy) {
			return release, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// tree reads the tree of an image of the store by its composefs digest.
func (h *Host) tree(d fsverity.Digest) (*tree.Tree, error) {
	f, _, err := h.Store.OpenImage(d.String())
	if errors.Is(err, store.ErrNotFound) {
		return nil, fmt.Errorf("%w: %w", ErrNoImage, err)
	} else if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return erofs.Read(f, fi.Size())
}

// checkWritable returns ErrReadOnly unless the boot file system and the physical root
// can be written.
func (h *Host) checkWritable() error {
	for _, dir := range []struct{ path, what string }{{h.Paths.Boot, "the boot file system"}, {h.Root, "the physical root"}} {
		// Opening it makes an automount mount; asking for access does not.
		f, err := os.Open(dir.path)
		if err != nil {
			return fmt.Errorf("checking %s: %w", dir.what, err)
		}
		err = unix.Faccessat(int(f.Fd()), ".", unix.W_OK, 0)
		f.Close()
		if errors.Is(err, unix.EROFS) {
			return fmt.Errorf("%w: %s at %q is mounted read-only; mount -o remount,rw %s", ErrReadOnly, dir.what, dir.path, dir.path)
		} else if err != nil {
			return fmt.Errorf("checking %s at %q: %w", dir.what, dir.path, err)
		}
	}
	return nil
}

// exists reports whether there is something at a path.
func exists(name string) (bool, error) {
	_, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
