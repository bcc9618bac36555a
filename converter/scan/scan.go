// Package scan reads a directory into a tree.
//
// [Dir] opens each name relative to its parent's file descriptor and follows no
// symbolic link, so that neither a hostile tree nor somebody who renames
// directories meanwhile can lead it outside, and neither depth nor the length of a
// path has a limit. Metadata is read by one goroutine, contents by several.
//
// What it makes of a directory is what mkcomposefs of libcomposefs does
// (tools/mkcomposefs.c, lcfs_build), with these options' zero values but for one
// point: names of one inode stay links, where mkcomposefs writes an inode for
// each name ([Options.SplitLinks] does so too). Sockets stay sockets. Xattrs are
// taken as the kernel lists them, trusted.overlay.* too: whoever writes an image
// escapes them.
//
// Left out: what is not in a tree, namely atime, ctime, inode numbers and
// attributes (chattr), holes of files that have data, and subtrees to leave out.
package scan

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// Errors of this package, wrapped with the path.
var (
	// ErrChanged says that what was being read changed meanwhile.
	ErrChanged = errors.New("changed while it was read")
	// ErrOptions says that options exclude each other.
	ErrOptions = errors.New("bad options")
	// ErrNotLayer says that an upper directory of overlayfs is not a layer by
	// itself.
	ErrNotLayer = errors.New("needs the layers below it")
)

// Objects takes the contents of files. Calls run side by side.
type Objects interface {
	Algorithm() fsverity.Algorithm
	// PutFile stores a file, which is positioned at its start and open for reading,
	// and returns its digest. It fails unless the file has size bytes. The caller
	// closes the file.
	PutFile(ctx context.Context, f *os.File, size int64) (fsverity.Digest, error)
}

// Options says what to read. The zero value reads all there is.
type Options struct {
	// Threads is the number of files read side by side, 0 for one a CPU.
	Threads int
	// InlineSize is the size in bytes up to which a file's content goes into the
	// tree, 0 for tree.InlineSize, negative for none.
	InlineSize int64

	SkipDevices bool // leave out block and character devices
	SkipXattrs  bool // leave out all xattrs
	UserXattrs  bool // leave out all xattrs but user.*
	UseEpoch    bool // all times are 1970
	// SplitLinks makes an inode of each name, as the C mkcomposefs does.
	SplitLinks bool

	// OneFileSystem stops at mount points, as tar --one-file-system does: a
	// directory that something is mounted on is kept without what is in it, a file
	// that something is mounted on is left out. Bind mounts count as mounts. Without
	// it mounts are crossed, as tar and mkcomposefs do.
	OneFileSystem bool
	// OverlayUpper says that the directory is an upperdir of overlayfs. Its
	// whiteouts and opaque directories are what they are in the tree of a layer
	// (SkipDevices does not concern them); xattrs that overlayfs keeps for itself
	// (origin, impure, …) are left out. Directories that were renamed with
	// redirect_dir and files that were changed with metacopy depend on the layers
	// below and give ErrNotLayer.
	OverlayUpper bool
	// TrustedXattrs says that the overlay of an OverlayUpper was mounted without
	// userxattr: xattrs named user.overlay.* are the files' own then, as those of an
	// unprivileged overlay within a container are.
	TrustedXattrs bool

	// Live says that the directory is in use. Names that vanish are left out, and what
	// changes while it is read is read again; only when that goes on and on is it
	// ErrChanged.
	Live bool
}

// How often a live directory is read again: names in one scan, and one file's content.
const (
	maxRetries   = 10000
	maxRereading = 8
)

// Dir reads the directory root and all below it. A root that is a symbolic link is
// followed.
//
// If objects is nil, no content is read: regular files have nothing but a size. Such
// a tree serves to look at names and metadata, not to be written.
//
// The first error ends the scan: a tree that lacks something nobody may see is
// worse than none. What is in objects by then stays there.
func Dir(ctx context.Context, root string, objects Objects, opts Options) (*tree.Tree, error) {
	if opts.SkipXattrs && opts.UserXattrs {
		return nil, fmt.Errorf("scanning %q: %w: SkipXattrs and UserXattrs exclude each other", root, ErrOptions)
	}
	if opts.Threads <= 0 {
		opts.Threads = runtime.GOMAXPROCS(0)
	}
	if opts.InlineSize == 0 {
		opts.InlineSize = tree.InlineSize
	}
	fd, err := openRetry(unix.AT_FDCWD, root, dirFlags&^unix.O_NOFOLLOW)
	if err != nil {
		return nil, fmt.Errorf("opening %q: %w", root, err)
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s := &scanner{
		ctx:     ctx,
		opts:    opts,
		objects: objects,
		links:   map[inode]*tree.Node{},
		jobs:    make(chan job, 2*opts.Threads),
		retries: maxRetries,
	}
	var workers sync.WaitGroup
	for range opts.Threads {
		workers.Go(func() {
			for j := range s.jobs {
				if ctx.Err() == nil {
					if err := s.settled(j); err != nil {
						cancel(err)
					}
				}
				j.file.Close()
			}
		})
	}
	node, err := s.root(root, fd)
	if err != nil {
		cancel(err)
	}
	close(s.jobs)
	workers.Wait()
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	return &tree.Tree{Root: node}, nil
}

// An inode names a file of this machine.
type inode struct {
	dev uint64 // as tree.Makedev
	ino uint64
}

// A job is a regular file whose content is to be read.
type job struct {
	dir  *dir
	name string
	file *os.File
	stat unix.Statx_t
	node *tree.Node
}

func (j job) path() string { return j.dir.path(j.name) }

type scanner struct {
	ctx     context.Context
	opts    Options
	objects Objects
	links   map[inode]*tree.Node // files with several names
	jobs    chan job
	retries int            // left in a live directory
	dents   [64 << 10]byte // of the one goroutine that lists directories
}

// settled reads one regular file; one that is written to meanwhile, in a live
// directory, again a little later.
func (s *scanner) settled(j job) error {
	for try := range maxRereading {
		err := s.content(j)
		if !s.opts.Live || !errors.Is(err, ErrChanged) {
			return err
		}
		select {
		case <-s.ctx.Done():
			return nil // Dir has the cause
		case <-time.After(time.Millisecond << try):
		}
		if err := statx(int(j.file.Fd()), "", unix.AT_EMPTY_PATH, &j.stat); err != nil {
			return fmt.Errorf("reading %q: %w", j.path(), err)
		}
		if _, err := j.file.Seek(0, io.SeekStart); err != nil {
			return fmt.Errorf("reading %q: %w", j.path(), err)
		}
		j.node.Stat = s.newNode(&j.stat).Stat
		j.node.File = &tree.File{Size: int64(j.stat.Size)}
	}
	return s.content(j)
}

// content reads the content of one regular file, and its xattrs.
func (s *scanner) content(j job) error {
	fd := int(j.file.Fd())
	if err := s.xattrs(j.node, fdXattrs(fd)); err != nil {
		return fmt.Errorf("reading %q: %w", j.path(), err)
	}
	size := int64(j.stat.Size)
	file := j.node.File
	switch {
	case s.objects == nil || size == 0:
	case size <= s.opts.InlineSize:
		buf := make([]byte, size+1)
		n, err := readFull(j.file, buf)
		if err != nil {
			return fmt.Errorf("reading %q: %w", j.path(), err)
		}
		if int64(n) != size {
			return fmt.Errorf("reading %q: %w: got other than its %d bytes", j.path(), ErrChanged, size)
		}
		file.Inline = buf[:size:size]
	default:
		digest, err := s.objects.PutFile(s.ctx, j.file, size)
		if err != nil {
			return fmt.Errorf("reading %q: %w", j.path(), err)
		}
		file.Object = digest
	}

	// Not ctime: a store that makes a hard link of the file changes it.
	var now unix.Statx_t
	if err := statx(fd, "", unix.AT_EMPTY_PATH, &now); err != nil {
		return fmt.Errorf("reading %q: %w", j.path(), err)
	}
	if now.Size != j.stat.Size {
		return fmt.Errorf("reading %q: %w: its size was %d bytes and is %d", j.path(), ErrChanged, j.stat.Size, now.Size)
	}
	if now.Mtime != j.stat.Mtime {
		return fmt.Errorf("reading %q: %w: it was written to", j.path(), ErrChanged)
	}
	return nil
}
