package podmanext

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/vbatts/tar-split/tar/asm"
	tarsplit "github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/layer"
	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

// layerBuilder brings the layers of one image into an image store.
type layerBuilder struct {
	s     *ImageStore
	st    *store.Store
	ctx   context.Context
	links *linker
	top   string // ID of the layer last built
	bytes int64  // written
}

// chain builds the layers that the image store lacks, from the lowest up, and returns
// their records. descs are those of the manifest.
func (b *layerBuilder) chain(img *converter.Stored, descs []v1.Descriptor, have []layerRecord) ([]layerRecord, error) {
	known := map[string]bool{}
	for _, l := range have {
		known[l.ID] = true
	}
	var added []layerRecord
	merged, trees := tree.New(), 0 // the first layers that are merged
	for i, diffID := range img.Layers {
		parent := b.top
		b.top = layerID(parent, diffID)
		if known[b.top] {
			continue
		}
		// A layer that the image contains twice in a row has two IDs: fine.
		known[b.top] = true
		record := layerRecord{
			ID: b.top, Parent: parent, Created: img.Created.UTC().Format(time.RFC3339Nano),
			CompressedDigest: descs[i].Digest.String(), CompressedSize: descs[i].Size,
			DiffDigest: diffID.String(), Compression: compressionOf(string(descs[i].MediaType)),
		}
		var size int64
		for ; trees <= i; trees++ {
			t, n, err := b.readLayer(img.Layers[trees])
			if err != nil {
				return nil, err
			}
			record.UIDs, record.GIDs = owners(t)
			size = n
			merged = tree.Merge(merged, t)
		}
		record.DiffSize = size
		if err := b.build(b.top, diffID, merged); err != nil {
			return nil, fmt.Errorf("writing layer %s: %w", diffID, err)
		}
		added = append(added, record)
	}
	return added, nil
}

// layerID is the ID that podman gives a layer that it pulls (computeID in
// image/storage/storage_dest.go of go.podman.io/image): of the lowest the diffID, of
// others the digest of the parent's ID, "+" and the diffID.
func layerID(parent string, diffID v1.Hash) string {
	if parent == "" {
		return diffID.Hex
	}
	sum := sha256.Sum256([]byte(parent + "+" + diffID.Hex))
	return hex.EncodeToString(sum[:])
}

// compressionOf is podman's number for a layer's compression (archive.Compression in
// go.podman.io/storage/pkg/archive).
func compressionOf(mediaType string) int {
	switch {
	case strings.HasSuffix(mediaType, "+gzip"), strings.HasSuffix(mediaType, ".tar.gzip"):
		return 2
	case strings.HasSuffix(mediaType, "+zstd"), strings.HasSuffix(mediaType, ".tar.zstd"):
		return 4
	}
	return 0
}

// readLayer returns a layer's tree and the bytes of its tar.
func (b *layerBuilder) readLayer(diffID v1.Hash) (*tree.Tree, int64, error) {
	r, err := b.st.OpenStream(store.LayerPrefix+diffID.String(), store.LayerStream)
	if err != nil {
		return nil, 0, err
	}
	defer r.Close()
	t, err := layer.FromChunks(b.ctx, r, b.open, layer.Discard(b.st.Algorithm()), layer.Options{MaxSize: -1})
	if err != nil {
		return nil, 0, fmt.Errorf("reading the stored layer %s: %w", diffID, err)
	}
	return t, r.Size(), nil
}

func (b *layerBuilder) open(d fsverity.Digest) (io.ReadSeekCloser, error) { return b.st.OpenObject(d) }

// owners lists who owns files of a layer, sorted.
func owners(t *tree.Tree) (uids, gids []uint32) {
	_ = t.Walk(func(_ string, n *tree.Node) error {
		if !n.IsWhiteout() && !n.Implied {
			uids, gids = append(uids, n.UID), append(gids, n.GID)
		}
		return nil
	})
	slices.Sort(uids)
	slices.Sort(gids)
	return slices.Compact(uids), slices.Compact(gids)
}

// build writes all of a layer but its record: without that podman does not see it.
func (b *layerBuilder) build(id string, diffID v1.Hash, merged *tree.Tree) error {
	sealed, err := converter.Seal(merged, converter.Rootfs)
	if err != nil {
		return err
	}
	objects, err := b.objects(sealed.Root.Stat)
	if err != nil {
		return err
	}
	sealed, err = b.link(sealed, objects)
	if err != nil {
		return err
	}
	tmp := b.s.path("overlay", ".tmp-"+id)
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	// empty is the lowest layer of a mount of the image alone.
	for _, dir := range []string{tmp, filepath.Join(tmp, "composefs-data"), filepath.Join(tmp, "empty")} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	blob := filepath.Join(tmp, "composefs-data", "composefs.blob")
	if err := b.file(blob, func(w io.Writer) error { return erofs.Write(w, sealed, erofs.Options{}) }); err != nil {
		return err
	}
	// Podman follows a link at diff, an absolute one, by one step, and takes the name
	// of the directory above for the layer's ID (DiffGetter in
	// drivers/overlay/overlay.go): hence two links.
	if err := os.Symlink(b.s.path("overlay", id, "objects"), filepath.Join(tmp, "diff")); err != nil {
		return err
	}
	if err := os.Symlink(filepath.Join("..", "..", "objects", filepath.Base(objects)), filepath.Join(tmp, "objects")); err != nil {
		return err
	}
	link := linkName(id)
	if err := os.WriteFile(filepath.Join(tmp, "link"), []byte(link), 0o644); err != nil {
		return err
	}
	split := b.s.path("overlay-layers", id+".tar-split.gz")
	if err := b.file(split+".tmp", func(w io.Writer) error { return b.tarSplit(diffID, w) }); err != nil {
		return err
	}
	if err := os.Rename(split+".tmp", split); err != nil {
		return err
	}

	// Whatever an addition that was killed left has no record.
	dir := b.s.path("overlay", id)
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	if err := os.Symlink(filepath.Join("..", id, "diff"), b.s.path("overlay", "l", link)); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	// Links and directories are made durable at once, before the record.
	f, err := os.Open(b.s.dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
}

// file writes a file and counts its bytes. Syncing is the caller's.
func (b *layerBuilder) file(path string, write func(io.Writer) error) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(write(f), f.Close()); err != nil {
		return err
	}
	fi, err := os.Stat(path)
	if err == nil {
		b.bytes += fi.Size()
	}
	return err
}

// tarSplit writes what podman needs to make the layer's tar of its files.
func (b *layerBuilder) tarSplit(diffID v1.Hash, w io.Writer) error {
	r, err := b.st.OpenStream(store.LayerPrefix+diffID.String(), store.LayerStream)
	if err != nil {
		return err
	}
	defer r.Close()
	z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return err
	}
	pr, pw := io.Pipe()
	go func() { pw.CloseWithError(layer.Assemble(b.ctx, pw, r, b.open)) }()
	defer pr.Close()
	if err := splitTar(pr, z); err != nil {
		return fmt.Errorf("splitting the tar: %w", err)
	}
	return z.Close()
}

// splitTar writes all of a tar but the contents of its files to w, as tar-split has it.
func splitTar(r io.Reader, w io.Writer) error {
	tar, done, err := asm.NewInputTarStreamWithDone(r, tarsplit.NewJSONPacker(w), tarsplit.NewDiscardFilePutter())
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, tar)
	tar.Close()
	return errors.Join(err, <-done) // from here on nobody writes to w
}

// linkName makes a layer's short name, 26 letters and digits as podman's own
// (generateID in drivers/overlay/overlay.go), of its ID.
func linkName(id string) string {
	sum := sha256.Sum256([]byte(id))
	return base32.StdEncoding.EncodeToString(sum[:])[:26]
}

// objects makes the directory of objects for images with a certain root: podman
// gives "/" of a container the mode and owner of its layer's diff directory.
func (b *layerBuilder) objects(root tree.Stat) (string, error) {
	mode := root.Mode & 0o7777
	dir := b.s.path("objects", fmt.Sprintf("%04o-%d-%d", mode, root.UID, root.GID))
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		err = nil // by an addition that was killed, perhaps before it had mode and owner
	}
	if err == nil {
		err = os.Chown(dir, int(root.UID), int(root.GID))
	}
	if err == nil {
		err = unix.Chmod(dir, mode)
	}
	return dir, err
}

// link brings all content of a tree into a directory of objects and returns the tree
// without inline files: podman opens each file of a layer by its redirect when it
// makes a tar (overlayFileGetter in drivers/overlay/overlay.go).
func (b *layerBuilder) link(t *tree.Tree, dir string) (*tree.Tree, error) {
	b.links.to = dir
	done := map[*tree.Node]*tree.Node{}
	var copyNode func(*tree.Node) (*tree.Node, error)
	copyNode = func(n *tree.Node) (*tree.Node, error) {
		if c, ok := done[n]; ok {
			return c, nil
		}
		c := *n
		done[n] = &c
		switch {
		case n.IsDir():
			c.Dir = make(map[string]*tree.Node, len(n.Dir))
			for name, child := range n.Dir {
				var err error
				if c.Dir[name], err = copyNode(child); err != nil {
					return nil, err
				}
			}
		case n.IsRegular() && len(n.File.Inline) > 0:
			d := fsverity.Sum(b.st.Algorithm(), n.File.Inline)
			c.File = &tree.File{Size: n.File.Size, Object: d}
			return &c, b.small(filepath.Join(dir, d.Path()), n.File.Inline)
		case n.IsRegular() && !n.File.Object.IsZero():
			if err := b.ctx.Err(); err != nil {
				return nil, context.Cause(b.ctx)
			}
			return &c, b.links.link(n.File.Object.Path())
		}
		return &c, nil
	}
	root, err := copyNode(t.Root)
	if err != nil {
		return nil, err
	}
	return &tree.Tree{Root: root}, nil
}

// small writes an object that the store keeps inline.
func (b *layerBuilder) small(path string, data []byte) error {
	// One that is there may have lost its content with the power.
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, data) {
		return nil
	}
	if err := b.links.mkdir(path); err != nil {
		return err
	}
	// A crash may leave it empty: hence a name of its own first.
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, data, 0o444); err != nil {
		return err
	}
	b.bytes += int64(len(data))
	return os.Rename(tmp, path)
}

// A linker links objects of the store into another directory.
type linker struct {
	from, to string
	made     map[string]bool // directories
}

func (l *linker) mkdir(path string) error {
	dir := filepath.Dir(path)
	if l.made[dir] {
		return nil
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	l.made[dir] = true
	return nil
}

func (l *linker) link(object string) error {
	path := filepath.Join(l.to, object)
	if err := l.mkdir(path); err != nil {
		return err
	}
	err := os.Link(filepath.Join(l.from, object), path)
	switch {
	case err == nil, errors.Is(err, fs.ErrExist):
		return nil
	case errors.Is(err, unix.EXDEV):
		return fmt.Errorf("%w: %s and %s; make it next to the store", ErrOtherFilesystem, l.to, l.from)
	}
	return err
}

// needed returns which layers images need, by ID.
func needed(layers []layerRecord, images []imageRecord) map[string]bool {
	parents, used := map[string]string{}, map[string]bool{}
	for _, l := range layers {
		parents[l.ID] = l.Parent
	}
	for _, i := range images {
		for id := i.Layer; id != "" && !used[id]; id = parents[id] {
			used[id] = true
		}
	}
	return used
}

// checkUnused returns ErrImageInUse if a layer that none of the images needs is mounted.
func (s *ImageStore) checkUnused(images []imageRecord) error {
	layers, err := s.layers()
	if err != nil {
		return err
	}
	used, unused, anyGoes := needed(layers, images), map[string]bool{}, false
	for _, l := range layers {
		unused[l.ID] = !used[l.ID]
		anyGoes = anyGoes || !used[l.ID]
	}
	// id returns the layer that a path lies in, "" if it is none of ours that would go.
	id := func(path string) string {
		rest, ok := strings.CutPrefix(path, s.path("overlay")+"/")
		name, _, _ := strings.Cut(rest, "/")
		if !ok || !unused[name] {
			return ""
		}
		return name
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	err = mount.ParseMountinfo(f, func(e mount.Entry) error {
		paths := append([]string{e.Source}, e.SuperOption("datadir+")...)
		for _, lower := range append(e.SuperOption("lowerdir"), e.SuperOption("lowerdir+")...) {
			paths = append(paths, strings.Split(lower, ":")...)
		}
		for _, path := range paths {
			l := id(path)
			if l == "" && anyGoes && strings.HasPrefix(path, s.path("objects")+"/") {
				l = "(some) with objects of " + filepath.Base(path) // not podman's: it could be any
			}
			if l != "" {
				return fmt.Errorf("%w: layer %s is mounted at %s; stop and remove the container, or unmount that, first", ErrImageInUse, l, e.Target)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	// Podman unmounts the EROFS of a layer as soon as it is below a container's overlay:
	// mountinfo does not have it, but where it is on a loop device that has the file.
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	for _, loop := range loops {
		raw, err := os.ReadFile(loop)
		if err != nil {
			continue // free by now
		}
		if l := id(strings.TrimSuffix(string(raw), "\n")); l != "" {
			return fmt.Errorf("%w: layer %s is on /dev/%s; stop the containers that run on it first", ErrImageInUse, l, strings.Split(loop, "/")[3])
		}
	}
	return nil
}

// sweep removes the layers that no image needs and the objects that no layer needs.
func (s *ImageStore) sweep(ctx context.Context, images []imageRecord) error {
	layers, err := s.layers()
	if err != nil {
		return err
	}
	used := needed(layers, images)
	kept := slices.DeleteFunc(slices.Clone(layers), func(l layerRecord) bool { return !used[l.ID] })
	if err := s.writeTable(ctx, layersTable, kept); err != nil {
		return err
	}
	for _, l := range layers {
		if used[l.ID] {
			continue
		}
		for _, path := range []string{
			s.path("overlay", "l", linkName(l.ID)), s.path("overlay", l.ID),
			s.path("overlay-layers", l.ID+".tar-split.gz"),
		} {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
		}
	}
	return s.sweepObjects(kept)
}

func (s *ImageStore) sweepObjects(layers []layerRecord) error {
	keep := map[string]bool{} // by path
	for _, l := range layers {
		dir, err := os.Readlink(s.path("overlay", l.ID, "objects"))
		if err != nil {
			return err
		}
		dir = s.path("overlay", l.ID, dir)
		objects, err := blobObjects(s.path("overlay", l.ID, "composefs-data", "composefs.blob"))
		if err != nil {
			return err
		}
		for _, d := range objects {
			keep[filepath.Join(dir, d.Path())] = true
		}
	}
	return filepath.WalkDir(s.path("objects"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || keep[path] {
			return err
		}
		return os.Remove(path)
	})
}

func blobObjects(path string) ([]fsverity.Digest, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	objects, err := erofs.Objects(f, fi.Size())
	if err != nil {
		return nil, fmt.Errorf("reading %q: %w", path, err)
	}
	return objects, nil
}
