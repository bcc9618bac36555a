// Package erofs writes trees as composefs images and reads them back.
//
// A composefs image is an EROFS filesystem
// (https://docs.kernel.org/filesystems/erofs.html) that holds the metadata of a tree
// and the content of small files. Larger files are empty stand-ins whose xattrs tell
// overlayfs which object of a store to show, and which fs-verity digest it must have
// (Linux Documentation/filesystems/overlayfs.rst, "Metadata only copy up" and
// "fs-verity support").
//
// [Write] makes the formats V0 and V1, byte for byte what libcomposefs makes
// (lcfs-writer-erofs.c of https://github.com/composefs/composefs): the digest of an
// image is the identity of a tree, so there is one way to write it. [Read] also
// takes V2, which earlier releases of composefs-rs wrote.
//
// Where the two projects differ, Write follows libcomposefs: an image without a
// forced version becomes V1 when there are whiteouts, and files get the number of
// links that a dump gave. Among the names of a file the one that a dump called the
// file counts, as in libcomposefs; a tree that does not say so ([tree.Tree].Owners)
// has the first name in byte order count, as in composefs-rs. Content of more than
// 4096 bytes whose end fits behind no inode makes libcomposefs fail; Write puts it
// into blocks of its own.
//
// Left out: images that are not composefs (compression, data of large files, devices,
// long xattr prefixes), and mounting (package mount).
package erofs

import (
	"errors"

	"github.com/particle-os/particle/converter/tree"
)

// The kinds of error of this package.
var (
	// ErrNotComposefs says that the bytes are no composefs image at all.
	ErrNotComposefs = errors.New("not a composefs image")
	// ErrUnsupported says that the image is of a version or has features that this
	// package does not read.
	ErrUnsupported = errors.New("unsupported composefs image")
	// ErrCorrupt says that an image contradicts itself or its size.
	ErrCorrupt = errors.New("corrupt composefs image")
	// ErrTree says that a tree has no form as an image.
	ErrTree = errors.New("tree cannot be an image")
)

// A Format is a version of the image format, or a way to choose one. The zero value
// is V1.
type Format uint8

const (
	// V1 is what `mkcomposefs --min-version=1` and composefs-rs write.
	V1 Format = iota
	// V0 is what `mkcomposefs --max-version=0` writes.
	V0
	// Auto is what mkcomposefs writes by default: V1 if the tree has a whiteout,
	// else V0.
	Auto
)

// FormatFor returns the format that mkcomposefs chooses for the given values of
// --min-version and --max-version.
func FormatFor(minVersion, maxVersion int) (Format, error) {
	switch {
	case minVersion < 0 || minVersion > 1 || maxVersion < 0 || maxVersion > 1:
		return 0, errors.New("unsupported composefs version: want 0 or 1")
	case minVersion == 1:
		return V1, nil
	case maxVersion == 1:
		return Auto, nil
	}
	return V0, nil
}

// String returns the name of the format.
func (f Format) String() string {
	switch f {
	case V1:
		return "V1"
	case V0:
		return "V0"
	case Auto:
		return "V0 or V1"
	}
	return "unknown format"
}

// Options say how to write an image.
type Options struct {
	Format Format
}

const (
	// MaxInline is the largest content in bytes that an image holds itself
	// (LCFS_INLINE_CONTENT_MAX in lcfs-writer.h).
	MaxInline = 5000
	// MaxSize is the largest size of a file in bytes (maxChunks chunks of the
	// largest kind).
	MaxSize = maxChunks << maxChunkBits
	// MaxDepth is how many directories may lie within each other. A path that is
	// one byte longer cannot be opened (PATH_MAX), and a chain of directories
	// without end would be a cheap way to exhaust whoever walks the tree.
	MaxDepth = 2048
)

// The xattrs by which overlayfs knows what a file is. What a tree says with them is
// stored with one more "overlay." so that the overlay shows it instead of doing it
// (overlayfs.rst, "Nesting overlayfs mounts"). The user.* ones do the same for
// overlays mounted with userxattr.
const (
	overlayPrefix   = "trusted.overlay."
	escapedPrefix   = "trusted.overlay.overlay."
	attrMetacopy    = overlayPrefix + "metacopy"
	attrRedirect    = overlayPrefix + "redirect"
	attrOpaque      = tree.OpaqueAttr
	attrWhiteout    = escapedPrefix + "whiteout"
	attrWhiteouts   = escapedPrefix + "whiteouts"
	attrHasOpaque   = escapedPrefix + "opaque"
	userWhiteout    = "user.overlay.whiteout"
	userWhiteouts   = "user.overlay.whiteouts"
	userHasOpaque   = "user.overlay.opaque"
	opaqueYes       = "y"
	opaqueWhiteouts = "x" // "may contain escaped whiteouts"
)
