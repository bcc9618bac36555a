package podmanext

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/particle-os/particle/converter/store"
)

// A Front shows a LayerStore to podman at the store's own directory, over the plain
// tree: it brings layers that podman looks for, counts their users, and gives their
// bytes. No file of a layer is read through it: "diff" is a symbolic link to the mount
// of the layer.
type Front struct {
	dir    string
	server *fuse.Server
}

// Serve mounts the front. The plain tree lies below it, so that podman goes on with
// the layers it has when the front is gone.
func (s *LayerStore) Serve() (*Front, error) {
	zero := time.Duration(0)
	server, err := fs.Mount(s.o.Dir, &rootNode{s: s}, &fs.Options{
		MountOptions: fuse.MountOptions{
			FsName: s.o.Dir, Name: frontType[len("fuse."):],
			DisableXAttrs: true, DirectMountStrict: true,
			Options: []string{"nosuid", "nodev", "noexec", "default_permissions"},
		},
		// A layer may go at any time: nothing is cached, and names are looked up anew.
		EntryTimeout: &zero, AttrTimeout: &zero, NegativeTimeout: &zero,
	})
	if err != nil {
		hint := ""
		if _, serr := os.Stat("/dev/fuse"); serr != nil {
			hint = "\nload the kernel's module fuse; particle layer-store tree does without"
		}
		return nil, fmt.Errorf("mounting the front of the layer store on %s: %w%s", s.o.Dir, err, hint)
	}
	return &Front{s.o.Dir, server}, nil
}

// Wait returns when the front is unmounted, by whomever.
func (f *Front) Wait() { f.server.Wait() }

// closeWait is how long Close waits for podman to read a layer to its end.
const closeWait = 10 * time.Second

// Close takes the front out of sight, and waits a while for those who have a file of
// it open.
func (f *Front) Close() error {
	err := detachFront(f.dir)
	done := make(chan struct{})
	go func() {
		f.server.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(closeWait):
	}
	return err
}

// Modes of what the front shows: its contents are root's, like podman's own storage.
const (
	dirMode  = syscall.S_IFDIR | 0o755
	fileMode = syscall.S_IFREG | 0o444
	linkMode = syscall.S_IFLNK | 0o777
)

// A rootNode has the images.
type rootNode struct {
	fs.Inode
	s *LayerStore
}

var (
	_ fs.NodeLookuper   = (*rootNode)(nil)
	_ fs.NodeReaddirer  = (*rootNode)(nil)
	_ fs.NodeLookuper   = (*imageNode)(nil)
	_ fs.NodeReaddirer  = (*imageNode)(nil)
	_ fs.NodeRmdirer    = (*imageNode)(nil)
	_ fs.NodeLookuper   = (*layerNode)(nil)
	_ fs.NodeReaddirer  = (*layerNode)(nil)
	_ fs.NodeCreater    = (*layerNode)(nil)
	_ fs.NodeReadlinker = (*linkNode)(nil)
	_ fs.NodeOpener     = (*infoNode)(nil)
	_ fs.NodeReader     = (*infoNode)(nil)
	_ fs.NodeGetattrer  = (*infoNode)(nil)
	_ fs.NodeOpener     = (*blobNode)(nil)
	_ fs.NodeGetattrer  = (*blobNode)(nil)
	_ fs.FileReader     = (*blobFile)(nil)
	_ fs.FileReleaser   = (*blobFile)(nil)
)

// child returns the node of a name, made by create if the kernel knows none.
func child(ctx context.Context, parent *fs.Inode, name string, mode uint32, create func() fs.InodeEmbedder) *fs.Inode {
	if c := parent.GetChild(name); c != nil {
		return c
	}
	return parent.NewInode(ctx, create(), fs.StableAttr{Mode: mode & syscall.S_IFMT})
}

// Lookup finds any image that podman could ask for: whether there is one shows with
// the first of its layers.
func (n *rootNode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	ref, err := decodeRef(name)
	if err != nil {
		return nil, syscall.ENOENT
	}
	out.Mode = dirMode
	return child(ctx, n.EmbeddedInode(), name, dirMode, func() fs.InodeEmbedder { return &imageNode{s: n.s, ref: ref} }), 0
}

func (n *rootNode) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	var names []string
	for _, l := range n.s.List() {
		names = append(names, encodeRef(l.Ref))
	}
	return dirOf(slices.Compact(names), dirMode), 0
}

func dirOf(names []string, mode uint32) fs.DirStream {
	var list []fuse.DirEntry
	for _, name := range names {
		list = append(list, fuse.DirEntry{Name: name, Mode: mode})
	}
	return fs.NewListDirStream(list)
}

// An imageNode has the layers of an image.
type imageNode struct {
	fs.Inode
	s   *LayerStore
	ref string
}

// Lookup finds anything that is named as a layer. Whether it can be had is found out
// one level below: a lookup that waits keeps others out of the same directory.
func (n *imageNode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if checkDigest(name) != nil {
		return nil, syscall.ENOENT
	}
	out.Mode = dirMode
	return child(ctx, n.EmbeddedInode(), name, dirMode, func() fs.InodeEmbedder { return &layerNode{s: n.s, key: Key{n.ref, name}} }), 0
}

func (n *imageNode) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	var names []string
	for _, l := range n.s.List() {
		if l.Ref == n.ref {
			names = append(names, l.Digest)
		}
	}
	return dirOf(names, dirMode), 0
}

// Rmdir is podman's word that it does not use a layer any more. ENOENT means yes.
func (n *imageNode) Rmdir(_ context.Context, name string) syscall.Errno {
	return counted(n.s, Key{n.ref, name}, n.s.Release)
}

// counted answers podman's two ways of counting. That there is no such layer is no
// failure: it was dropped, and cannot be had any more or nobody asked for it.
func counted(s *LayerStore, key Key, count func(Key) error) syscall.Errno {
	if err := count(key); err != nil && !errors.Is(err, ErrNoLayer) {
		s.log.Error("counting", "image", key.Ref, "layer", key.Digest, "error", err)
		return syscall.EIO
	}
	return syscall.ENOENT
}

// A layerNode is a layer's directory.
type layerNode struct {
	fs.Inode
	s   *LayerStore
	key Key
}

func (n *layerNode) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	return dirOf([]string{blobName, diffName, infoName}, 0), 0
}

// Lookup brings the layer.
func (n *layerNode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if name != diffName && name != infoName && name != blobName {
		return nil, syscall.ENOENT
	}
	l, err := n.s.Provide(ctx, n.key)
	if err != nil {
		if ctx.Err() != nil {
			return nil, syscall.EINTR
		}
		// That an image cannot be had was said once, for all of its layers.
		level := slog.LevelWarn
		if errors.Is(err, errImage) {
			level = slog.LevelDebug
		}
		n.s.log.Log(ctx, level, "podman has to pull a layer itself", "image", n.key.Ref, "layer", n.key.Digest, "error", err)
		return nil, errnoOf(err)
	}
	switch name {
	case diffName:
		out.Mode = linkMode
		return child(ctx, n.EmbeddedInode(), name, linkMode, func() fs.InodeEmbedder { return &linkNode{s: n.s, key: n.key} }), 0
	case infoName:
		out.Mode, out.Size = fileMode, uint64(len(n.s.info(n.key)))
		return child(ctx, n.EmbeddedInode(), name, fileMode, func() fs.InodeEmbedder { return &infoNode{s: n.s, key: n.key} }), 0
	}
	out.Mode, out.Size = fileMode, uint64(l.Size)
	return child(ctx, n.EmbeddedInode(), name, fileMode, func() fs.InodeEmbedder { return &blobNode{s: n.s, key: n.key, size: l.Size} }), 0
}

// errnoOf returns what podman shows a person who runs an image whose layer cannot be
// had any more. When it pulls one all errors are the same to it.
func errnoOf(err error) syscall.Errno {
	var network *net.OpError
	switch {
	case errors.Is(err, ErrStalled), errors.Is(err, context.DeadlineExceeded):
		return syscall.ETIMEDOUT
	case errors.As(err, &network):
		return syscall.EHOSTDOWN
	}
	return syscall.ENOENT
}

// Create of the file "use" is podman's word that it uses the layer. ENOENT means yes.
//
// The layer was there when this podman looked for it, but the last of its other users
// may have released it since. It is brought again: a container whose layer is not
// counted would lose its files to the next collection of garbage.
func (n *layerNode) Create(ctx context.Context, name string, _, _ uint32, _ *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	if name != useName {
		return nil, nil, 0, syscall.EPERM
	}
	return nil, nil, 0, counted(n.s, n.key, func(key Key) error {
		err := n.s.Use(key)
		if !errors.Is(err, ErrNoLayer) {
			return err
		}
		if _, err := n.s.Provide(ctx, key); err != nil {
			return err
		}
		return n.s.Use(key)
	})
}

// A linkNode leads to the mount of a layer.
type linkNode struct {
	fs.Inode
	s   *LayerStore
	key Key
}

func (n *linkNode) Readlink(context.Context) ([]byte, syscall.Errno) {
	n.s.mu.Lock()
	defer n.s.mu.Unlock()
	e := n.s.entries[n.key]
	if e == nil {
		return nil, syscall.ENOENT
	}
	return []byte(n.s.target(e.image)), 0
}

// info returns the file "info" of a layer, nil if the tree lacks the layer.
func (s *LayerStore) info(key Key) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.entries[key]; e != nil {
		return encodeLayerInfo(e.info)
	}
	return nil
}

// An infoNode is what podman takes over into its records.
type infoNode struct {
	fs.Inode
	s   *LayerStore
	key Key
}

func (n *infoNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = fileMode, uint64(len(n.s.info(n.key)))
	return 0
}

func (n *infoNode) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (n *infoNode) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	raw := n.s.info(n.key)
	if off >= int64(len(raw)) {
		return fuse.ReadResultData(nil), 0
	}
	return fuse.ReadResultData(dest[:copy(dest, raw[off:])]), 0
}

// A blobNode is the uncompressed layer, put together as it is read.
type blobNode struct {
	fs.Inode
	s    *LayerStore
	key  Key
	size int64 // follows from the key: the diffID of a layer never changes
}

func (n *blobNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = fileMode, uint64(n.size)
	return 0
}

// Open opens the layer for reading from its beginning; direct I/O keeps the reads of
// one reader in order.
func (n *blobNode) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return nil, 0, syscall.EACCES
	}
	// What is read must not be collected meanwhile, also if the layer is released.
	release, err := n.s.o.Store.Hold(ctx)
	if err != nil {
		return nil, 0, n.s.failed("opening a layer", n.key, err)
	}
	r, err := n.s.Blob(n.key)
	if err != nil {
		release()
		return nil, 0, n.s.failed("opening a layer", n.key, err)
	}
	return &blobFile{n: n, r: r, release: release}, fuse.FOPEN_DIRECT_IO, 0
}

// failed tells what went wrong and returns what podman is told.
func (s *LayerStore) failed(what string, key Key, err error) syscall.Errno {
	s.log.Error(what, "image", key.Ref, "layer", key.Digest, "error", err)
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, ErrNoLayer) {
		return syscall.ENOENT
	}
	return syscall.EIO
}

// A blobFile is an open layer.
type blobFile struct {
	n       *blobNode
	release func()

	mu  sync.Mutex
	r   io.ReadCloser
	pos int64
}

func (f *blobFile) Read(_ context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if off >= f.n.size {
		return fuse.ReadResultData(nil), 0
	}
	if err := f.seek(off); err != nil {
		return nil, f.n.s.failed("reading a layer", f.n.key, err)
	}
	n, err := io.ReadFull(f.r, dest)
	f.pos += int64(n)
	if err != nil && f.pos != f.n.size {
		return nil, f.n.s.failed("reading a layer", f.n.key, fmt.Errorf("at %d of %d bytes: %w", f.pos, f.n.size, err))
	}
	return fuse.ReadResultData(dest[:n]), 0
}

// seek goes to an offset: backwards from the beginning anew.
func (f *blobFile) seek(off int64) error {
	if off < f.pos {
		r, err := f.n.s.Blob(f.n.key)
		if err != nil {
			return err
		}
		f.r.Close()
		f.r, f.pos = r, 0
	}
	n, err := io.CopyN(io.Discard, f.r, off-f.pos)
	f.pos += n
	return err
}

func (f *blobFile) Release(context.Context) syscall.Errno {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.release()
	if err := f.r.Close(); err != nil {
		return syscall.EIO
	}
	return 0
}
