// Package initramfs sets up the root of a deployed image while the machine boots, and
// holds the files that carry it into an initramfs: a hook and scripts of
// initramfs-tools, a module of dracut.
//
// [Setup] is what cmd/particle-init-root runs once the physical root is mounted:
// it reads the kernel's command line ([ParseArgs]), enables fs-verity where the store
// was filled without it, mounts the image that the command line names and puts it,
// with /etc, /var and the physical root at /sysroot, in the place of the physical
// root. [PrepareNext] does the same for a soft reboot. What either found is a [Report],
// which [Read] finds again on the running system. [Inspect] looks into an initramfs
// for all this. docs/boot.md has the layout and the arguments.
//
// The layout of the state and the arguments are those of bootc's composefs backend and
// of composefs-rs (crates/composefs-setup-root); docs/boot.md says where they differ.
//
// Left out: finding, checking and mounting the physical root, which initramfs-tools
// and dracut do; switching to the new root, which is theirs too; SELinux labels; and
// images of EROFS format V2.
package initramfs

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Errors of this package; test with errors.Is.
var (
	// ErrArgs: the kernel's command line says something that is not understood.
	ErrArgs = errors.New("bad kernel argument")
	// ErrNotDeployed: the kernel's command line names neither an image nor a manifest.
	ErrNotDeployed = errors.New("the kernel command line names no image of Particle")
	// ErrRoot: the physical root is not mounted, cannot be written or holds no store.
	ErrRoot = errors.New("unusable physical root")
	// ErrImage: the store has none of the images that may be booted.
	ErrImage = errors.New("image is not in the store")
	// ErrVerity: fs-verity is asked for and cannot be had.
	ErrVerity = errors.New("fs-verity cannot be enforced")
	// ErrState: /etc or /var of the deployment is missing.
	ErrState = errors.New("deployment without its state")
	// ErrSystem: the image lacks what every system has.
	ErrSystem = errors.New("image is no bootable system")
	// ErrManifest: a manifest of layers is not what it should be.
	ErrManifest = errors.New("bad manifest of layers")
	// ErrArchive: a file is no initramfs, or a damaged one.
	ErrArchive = errors.New("bad initramfs")
	// ErrNoReport: this system was not set up by this package.
	ErrNoReport = errors.New("no report of the boot")
)

// Places below the physical root (docs/boot.md, "The physical root").
const (
	storeDir   = "composefs"
	stateDir   = "state"
	verityMark = "state/enable-verity"
)

// Sysroot is where a booted system has the physical root.
const Sysroot = "sysroot"

// ShellMark is the file that lets a shell come when a boot fails. Images have it, and
// the carriers copy it into the initramfs.
const ShellMark = "/usr/lib/particle/shell"

// Program is where the program lies, in an image as in its initramfs.
const Program = "/usr/lib/particle/particle-init-root"

// Exit statuses of the program, for the scripts that run it.
const (
	ExitDone    = 0 // the new root is in its place
	ExitFailed  = 1 // it is not, and a shell may come; without one the machine restarts
	ExitUsage   = 2
	ExitNothing = 3 // the command line names no image: the boot is not Particle's
)

// cloned is what open_tree(2) needs to copy a mount and all below it.
const cloned = unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_RECURSIVE
