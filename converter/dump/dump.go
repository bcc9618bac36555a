// Package dump reads and writes the textual form of a tree, composefs-dump(5): one
// line a name, eleven fields separated by one space, then xattrs.
//
//	PATH SIZE MODE NLINK UID GID RDEV MTIME PAYLOAD CONTENT DIGEST KEY=VALUE...
//
// [Parse] takes what mkcomposefs takes, strictly or not, and what becomes an image
// there becomes the same image here. Where mkcomposefs reads nonsense as something
// else, Parse refuses the line instead: numbers that do not fit their field, NUL in
// names and targets, digests that are not hexadecimal, nanoseconds of a second and
// more. It takes SHA-512 digests too, which mkcomposefs does not.
//
// Left out: a link count of 0 (mkcomposefs keeps it; a Node counts its names then),
// sizes of directories, and payloads and digests of files whose content is inline:
// no image stores them.
package dump

import (
	"errors"
	"fmt"
)

// The kinds of error that Parse returns, wrapped in a *[LineError] where one line
// is to blame.
var (
	ErrSyntax = errors.New("not a composefs dump")
	ErrTree   = errors.New("not a tree")
	ErrLimit  = errors.New("over a limit of composefs")
)

// A LineError says which line cannot be used and why.
type LineError struct {
	Line int   // counted from 1
	Kind error // ErrSyntax, ErrTree or ErrLimit
	Msg  string
}

func (e *LineError) Error() string { return fmt.Sprintf("line %d: %s", e.Line, e.Msg) }

// Unwrap returns the kind.
func (e *LineError) Unwrap() error { return e.Kind }

// fail returns a LineError whose line is still to be filled in.
func fail(kind error, format string, args ...any) *LineError {
	return &LineError{Kind: kind, Msg: fmt.Sprintf(format, args...)}
}

// Limits, in bytes.
const (
	// MaxLine is the length of the longest line that is read. The longest that
	// makes sense has a few thousand bytes of path, target or content and
	// maxXattrText of xattrs.
	MaxLine = 512 << 10
	// MaxInline is the largest content of a file within a dump
	// (LCFS_INLINE_CONTENT_MAX in lcfs-writer.h of composefs).
	MaxInline = 5000
	// MaxSize is the largest size of a file: 1024 chunks of 2^43 bytes
	// (LCFS_MAX_NONINLINE_CHUNKS of composefs, the chunk format of EROFS).
	MaxSize = 1024 << 43

	maxXattrText = 65535 // all xattrs of a line, escaped (mkcomposefs.c)
	// What all xattrs of an inode may take together, and what mkcomposefs counts
	// for them besides names and values (lcfs-writer.c, lcfs_node_set_xattr).
	maxXattrs  = 65535 / 2
	xattrsHead = 12
	xattrHead  = 7
)
