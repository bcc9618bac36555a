// Package bootloader writes and reads what boot loaders need to offer deployments.
//
// The entries of all loaders are Boot Loader Specification files of type 1
// (https://uapi-group.org/specifications/specs/boot_loader_specification/) in
// loader/entries of the boot file system. systemd-boot reads them itself; for the
// others a menu in their own language is made from them, and what they can remember
// (GRUB's environment block, extlinux's "once") carries the boot counter.
//
// Every change is one file that is written beside its place, made durable and renamed,
// so that a power loss leaves the old or the new menu.
//
// Left out: kernels and initramfs images (package hostdeploy puts them on the boot file
// system and takes them away), entries that are not Particle's, and EFI variables.
package bootloader

import (
	"context"
	"errors"

	"github.com/particle-os/particle/hostdeploy/bootloader/bls"
)

// Errors of this package; test with errors.Is.
var (
	// ErrNone: the host has no boot loader that is known here.
	ErrNone = errors.New("no boot loader found")
	// ErrBootDir: the loader that booted the system does not read the directory that is
	// to be its boot file system.
	ErrBootDir = errors.New("not the directory that the boot loader reads")
	// ErrUnknown: no boot loader goes by that name here.
	ErrUnknown = errors.New("unknown boot loader")
	// ErrMissing: the image lacks a program or file that installing the loader needs.
	ErrMissing = errors.New("boot loader's files are missing")
	// ErrTarget: the disk, or what is told of it, does not do for the loader.
	ErrTarget = errors.New("the disk does not do for the boot loader")
	// ErrNoEntry: there is no entry of that id.
	ErrNoEntry = errors.New("no such boot entry")
	// ErrEntry: the entry has something that the loader has no way to say or to start.
	ErrEntry = errors.New("boot entry that cannot be written")
	// ErrMenu: a file of the loader's is not what it should be.
	ErrMenu = errors.New("bad boot menu")
)

// An Entry is one choice of the boot menu: one deployment.
type Entry struct {
	// ID is the file's name without ".conf" and without the counter: "particle-" and a
	// number, as "particle-12".
	ID string
	// Generation orders the entries, highest first; it is the entry's "version".
	Generation int
	Title      string
	// Linux, Initrd and EFI are paths from the root of the boot file system, beginning
	// with a slash. An entry has Linux and perhaps Initrd, or EFI (a unified kernel image).
	Linux  string
	Initrd []string
	EFI    string
	// Options is the kernel command line.
	Options string
	// Counter is nil for an entry that has proved good, or that its loader cannot count.
	Counter *Counter
	// Extra are the lines that this program does not know, in their order.
	Extra []bls.Field
}

// A Counter says how often a loader may still try an entry and how often it has
// (Boot Loader Specification, "Boot counting").
type Counter struct{ Left, Done int }

// Bad reports whether all tries are used up: the entry comes last in the menu.
func (e *Entry) Bad() bool { return e.Counter != nil && e.Counter.Left == 0 }

// A Loader is a boot loader's menu on one boot file system.
type Loader interface {
	// Name is what --bootloader takes, as "systemd-boot".
	Name() string
	// Entries returns Particle's entries in the order in which the loader tries them:
	// the first is what boots next. Files that are no entries are skipped; warn is told
	// of those that ought to be ones.
	Entries(warn func(format string, args ...any)) ([]Entry, error)
	// Check tells whether Add can write an entry, and changes nothing: the error is
	// ErrEntry for what the loader has no way to say or to start, and ErrMenu where its
	// menu could not be made because of a setting.
	Check(e Entry) error
	// Add makes an entry known and durable. One of the same ID is replaced. Errors are
	// those of Check, before anything is written.
	Add(e Entry) error
	// Remove takes an entry away. The error is ErrNoEntry where there is none.
	Remove(id string) error
	// Good ends the counting of an entry: it booted.
	Good(id string) error
	// Sync makes the loader's own menu from the entries again, where it has one and it
	// is not what it should be: after a power loss between an entry and its menu.
	Sync() error
	// Tries tells whether, and how, the loader counts boots.
	Tries() Tries
}

// Tries is how a loader falls back from an entry that does not boot.
type Tries struct {
	// Max is the largest number of tries that the loader can count: 0 where it cannot
	// fall back at all, 1 for "once".
	Max int
	// How says it for people: "in the names of the entries".
	How string
}

// Paths say where a boot file system is.
type Paths struct {
	// Boot is the directory at which it is mounted, as "/boot".
	Boot string
	// Prefix is the path of Boot as the loader sees it: "" where Boot is the root of the
	// boot file system, "/boot" where it is a directory of the root file system.
	Prefix string
}

// An Installer puts the loader itself on a disk.
type Installer interface {
	// Layout says what the loader needs of a disk.
	Layout() Layout
	// Install makes the disk boot the loader. It is called once the boot file system is
	// there and before the first entry is added. Errors are ErrMissing where the image
	// lacks the loader.
	Install(ctx context.Context, t Target) error
}

// A Layout is what a loader needs of a disk.
type Layout struct {
	// ESP: the boot file system is a FAT EFI system partition. Else it is ext4.
	ESP bool
	// BIOSBoot: a partition for GRUB's core image (1 MiB, type 21686148-…).
	BIOSBoot bool
	// Active: the boot partition has the attribute "legacy BIOS bootable".
	Active bool
	// Ext4Options for mkfs.ext4 of a boot partition, as "-O ^64bit".
	Ext4Options []string
}

// A Target is a disk that a loader is installed on.
type Target struct {
	// Root is the mounted image that the loader's files and programs are taken from.
	Root string
	// Boot is a directory that becomes the root of the boot file system. Where Mounted
	// is false it is an ordinary directory, which is copied there later (an ESP in a
	// disk's file, which this kernel may not be able to mount).
	Boot    string
	Mounted bool
	// Disk is the path of the whole disk: a block device or an image file. "" where only
	// a file system is installed to.
	Disk string
	// Device is a block device of the whole disk (the disk itself, or a loop device over
	// its file), BootDevice that of the boot partition; "" where there is none.
	Device, BootDevice string
	// BIOSBootStart is the first byte of the BIOS boot partition on the disk, and
	// BIOSBootSize its length; 0 where there is none.
	BIOSBootStart, BIOSBootSize int64
	// BootNumber is the boot partition's number in the partition table, from 1.
	BootNumber int
	// BootUUID is the UUID of the boot file system as blkid(8) prints it.
	BootUUID string
	// Serial asks for a menu on the first serial line, too: "115200", "" for none.
	Serial string
}
