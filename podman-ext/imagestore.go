package podmanext

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/store"
)

// Errors of image stores; test with errors.Is.
var (
	// ErrNotImageStore: the directory holds something else.
	ErrNotImageStore = errors.New("not an image store of particle")
	// ErrOtherFilesystem: hard links do not reach from the store into the image store.
	ErrOtherFilesystem = errors.New("the image store is on another file system than the store")
	// ErrNotInImageStore: no image has that name.
	ErrNotInImageStore = errors.New("not in the image store")
	// ErrImageInUse: a container runs on the image.
	ErrImageInUse = errors.New("image in use")
)

// An ImageStore is an additional image store (containers-storage.conf(5),
// additionalimagestores): a directory from which podman runs images without a pull.
// It has the form of containers-storage with the overlay driver:
//
//	overlay/<layer>/composefs-data/composefs.blob  the layer merged with all below it
//	overlay/<layer>/diff                           -> DIR/overlay/<layer>/objects
//	overlay/<layer>/objects                        -> ../../objects/<mode>-<uid>-<gid>
//	overlay/<layer>/link, overlay/l/<link>         the layer's short name
//	overlay-layers/layers.json, *.tar-split.gz     layers with their digests
//	overlay-images/images.json, <id>/              names, manifests and configs
//	objects/<mode>-<uid>-<gid>/xx/<rest>           hard links of the store's objects
//
// Podman mounts a layer that has composefs-data as EROFS over the files of diff, and
// that with whatever storage.conf says of use_composefs (drivers/overlay/overlay.go,
// get, of go.podman.io/storage). It takes podman 5.4 or newer (storage 1.57); older
// ones want to write into the directory.
//
// Each layer is merged with the ones below, so that a container has one EROFS under
// it, and no two layers of one container have the same files twice (overlayfs refuses
// that). The layers have the IDs, digests and diffIDs that podman itself would give
// them, and what it needs to make the very tars again: what is built on such an image,
// pushed or saved is what it would be with layers of podman's own.
//
// The directory is a podman's first container's parent for the mode of "/", which is
// why objects lie in a directory with that mode.
//
// Left out: rootless podman, for which the kernel does not mount EROFS.
type ImageStore struct {
	dir string
}

// ImageStoreDir is where the image store is by default.
const ImageStoreDir = "/var/lib/particle-podman/images"

const (
	imageStoreMark = ".particle-image-store"
	imagesTable    = "overlay-images/images.json"
	layersTable    = "overlay-layers/layers.json"
)

// InitImageStore opens the image store in dir and makes it if dir is missing or
// empty. dir becomes part of what podman reads: it cannot be moved later.
func InitImageStore(dir string) (*ImageStore, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if strings.ContainsAny(abs, ":,\\") {
		return nil, fmt.Errorf("image store %q: overlayfs and storage.conf take no path with ':', ',' or '\\'", abs)
	}
	if err := os.MkdirAll(filepath.Dir(abs), 0o755); err != nil {
		return nil, err
	}
	// Podman keeps its own storage from other users as well: setuid programs keep
	// their modes nowhere here, but the objects are everybody's to read.
	if err := os.Mkdir(abs, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	s := &ImageStore{abs}
	if _, err := os.Lstat(s.path(imageStoreMark)); errors.Is(err, fs.ErrNotExist) {
		names, err := os.ReadDir(abs)
		if err != nil {
			return nil, err
		}
		if len(names) > 0 {
			return nil, fmt.Errorf("%w: %q holds %q already", ErrNotImageStore, abs, names[0].Name())
		}
		if err := s.make(); err != nil {
			return nil, fmt.Errorf("making the image store %q: %w", abs, err)
		}
	} else if err != nil {
		return nil, err
	}
	return s, nil
}

// OpenImageStore opens the image store in dir.
func OpenImageStore(dir string) (*ImageStore, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	s := &ImageStore{abs}
	if _, err := os.Lstat(s.path(imageStoreMark)); err != nil {
		return nil, fmt.Errorf("%w: %q: %w", ErrNotImageStore, abs, err)
	}
	return s, nil
}

// make fills an empty directory; the mark comes last but for what podman may find
// already.
func (s *ImageStore) make() error {
	for _, dir := range []string{"objects", "overlay", "overlay/l", "overlay-images", "overlay-layers"} {
		if err := os.MkdirAll(s.path(dir), 0o755); err != nil {
			return err
		}
	}
	for _, table := range []string{imagesTable, layersTable} {
		if err := replaceFile(s.path(table), []byte("[]"), 0o600); err != nil {
			return err
		}
		// Podman opens the locks for reading only, where they are not its own.
		if err := replaceFile(s.path(lockOf(table)), nil, 0o644); err != nil {
			return err
		}
	}
	return replaceFile(s.path(imageStoreMark), nil, 0o644)
}

// Dir returns the directory, an absolute path, as storage.conf takes it.
func (s *ImageStore) Dir() string { return s.dir }

func (s *ImageStore) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

func lockOf(table string) string { return strings.TrimSuffix(table, ".json") + ".lock" }

// An ImageStoreResult says what was added to an image store.
type ImageStoreResult struct {
	ID        string   `json:"id"` // the image's, 64 hexadecimal digits
	Names     []string `json:"names"`
	NewLayers int      `json:"newLayers"`
	// Bytes is what the addition takes on disk apart from the store's own files.
	Bytes int64 `json:"bytes"`
}

// Add makes an image of the store visible to podman under a full name
// (HOST/REPO:TAG). The name is taken from another image that has it.
func (s *ImageStore) Add(ctx context.Context, st *store.Store, img *converter.Stored, name string) (*ImageStoreResult, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	release, err := st.Hold(ctx)
	if err != nil {
		return nil, err
	}
	defer release()

	var m v1.Manifest
	if err := json.Unmarshal(img.RawManifest, &m); err != nil {
		return nil, fmt.Errorf("reading the manifest: %w", err)
	}
	if len(img.Layers) == 0 || len(m.Layers) != len(img.Layers) {
		return nil, fmt.Errorf("image %s has %d layers and %d diffIDs: podman runs nothing without a layer", img.Config, len(m.Layers), len(img.Layers))
	}
	layers, err := s.layers()
	if err != nil {
		return nil, err
	}
	b := &layerBuilder{s: s, st: st, ctx: ctx, links: &linker{from: st.ObjectsDir(), made: map[string]bool{}}}
	added, err := b.chain(img, m.Layers, layers)
	if err != nil {
		return nil, err
	}
	if err := s.writeTable(ctx, layersTable, append(layers, added...)); err != nil {
		return nil, err
	}
	record, err := s.writeImage(img)
	if err != nil {
		return nil, err
	}
	record.Layer = b.top
	images, err := s.images()
	if err != nil {
		return nil, err
	}
	record.Names = []string{name}
	for i := range images {
		if images[i].ID == record.ID {
			record.Names = append(record.Names, slices.DeleteFunc(images[i].Names, func(n string) bool { return n == name })...)
		}
		images[i].Names = slices.DeleteFunc(images[i].Names, func(n string) bool { return n == name })
	}
	images = slices.DeleteFunc(images, func(r imageRecord) bool { return r.ID == record.ID })
	if err := s.writeTable(ctx, imagesTable, append(images, *record)); err != nil {
		return nil, err
	}
	return &ImageStoreResult{ID: record.ID, Names: record.Names, NewLayers: len(added), Bytes: b.bytes}, nil
}

// writeImage writes the manifest and config of an image and returns its record, which
// lacks names and layer.
func (s *ImageStore) writeImage(img *converter.Stored) (*imageRecord, error) {
	dir := s.path("overlay-images", img.Config.Hex)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	r := &imageRecord{
		ID: img.Config.Hex, Digest: img.Manifest.String(), Metadata: "{}",
		Created:      img.Created.UTC().Format(time.RFC3339Nano),
		BigDataSizes: map[string]int64{}, BigDataDigests: map[string]string{},
	}
	for _, item := range []struct {
		key    string
		data   []byte
		digest v1.Hash
	}{
		{img.Config.String(), img.RawConfig, img.Config},
		{"manifest-" + img.Manifest.String(), img.RawManifest, img.Manifest},
		{"manifest", img.RawManifest, img.Manifest},
	} {
		if err := replaceFile(filepath.Join(dir, dataName(item.key)), item.data, 0o600); err != nil {
			return nil, err
		}
		r.BigDataNames = append(r.BigDataNames, item.key)
		r.BigDataSizes[item.key] = int64(len(item.data))
		r.BigDataDigests[item.key] = item.digest.String()
	}
	return r, nil
}

// Images lists the names and IDs of the images, in the order of the table.
func (s *ImageStore) Images() ([]ImageStoreResult, error) {
	images, err := s.images()
	if err != nil {
		return nil, err
	}
	var all []ImageStoreResult
	for _, i := range images {
		all = append(all, ImageStoreResult{ID: i.ID, Names: i.Names})
	}
	return all, nil
}

// Remove takes a name, or an image by its ID with all its names, out of the image
// store, and with the last name what only that image needs. The error is ErrImageInUse,
// and nothing changes, while something of that is mounted: overlayfs looks for the
// content of a file by path when the file is first opened, so that a running container
// would lose what it has not opened yet. Stopped containers that podman made of the
// image cannot be started again.
func (s *ImageStore) Remove(ctx context.Context, name string) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	images, err := s.images()
	if err != nil {
		return err
	}
	found, gone := false, []string{}
	for i := range images {
		before := len(images[i].Names)
		if images[i].ID == name {
			images[i].Names, before = nil, 1
		}
		images[i].Names = slices.DeleteFunc(images[i].Names, func(n string) bool { return n == name })
		if len(images[i].Names) < before {
			found = true
			if len(images[i].Names) == 0 {
				gone = append(gone, images[i].ID)
			}
		}
	}
	if !found {
		return fmt.Errorf("%w: %q in %s", ErrNotInImageStore, name, s.dir)
	}
	images = slices.DeleteFunc(images, func(r imageRecord) bool { return slices.Contains(gone, r.ID) })
	if err := s.checkUnused(images); err != nil {
		return err
	}
	if err := s.writeTable(ctx, imagesTable, images); err != nil {
		return err
	}
	for _, id := range gone {
		if err := os.RemoveAll(s.path("overlay-images", id)); err != nil {
			return err
		}
	}
	return s.sweep(ctx, images)
}

func (s *ImageStore) images() ([]imageRecord, error) { return readImages(s.path(imagesTable)) }

func (s *ImageStore) layers() ([]layerRecord, error) {
	raw, err := os.ReadFile(s.path(layersTable))
	if err != nil {
		return nil, err
	}
	var all []layerRecord
	if err := json.Unmarshal(raw, &all); err != nil {
		return nil, fmt.Errorf("%w: %s: %v", ErrNotImageStore, s.path(layersTable), err)
	}
	return all, nil
}

// lock keeps other writers out, not podman: it reads the tables, which are replaced as
// a whole.
func (s *ImageStore) lock(ctx context.Context) (func(), error) {
	f, err := os.OpenFile(s.path(imageStoreMark), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	err = poll(ctx, func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("locking the image store %q: %w", s.dir, err)
	}
	return func() { f.Close() }, nil
}

// poll asks for a lock until it is had, as long as ctx allows: who sleeps in the kernel
// for it cannot be interrupted.
func poll(ctx context.Context, try func() error) error {
	for {
		switch err := try(); err {
		case nil:
			return nil
		case unix.EAGAIN, unix.EACCES, unix.EINTR: // EACCES is what fcntl(2) may say
		default:
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// writeTable replaces one of podman's tables under podman's lock, and leaves a mark in
// the lock by which a running podman knows that it has to read the table again
// (pkg/lockfile of go.podman.io/storage: any other content of the file).
func (s *ImageStore) writeTable(ctx context.Context, table string, records any) error {
	raw, err := json.Marshal(records)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(s.path(lockOf(table)), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// Podman locks with fcntl(2); locks of the open file conflict with those, too.
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: 0}
	if err := poll(ctx, func() error { return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk) }); err != nil {
		return fmt.Errorf("locking %s, which a podman may have: %w", f.Name(), err)
	}
	if err := replaceFile(s.path(table), raw, 0o600); err != nil {
		return err
	}
	mark := fmt.Sprintf("%-64.64s", fmt.Sprintf("particle %d %d", time.Now().UnixNano(), os.Getpid()))
	_, err = f.WriteAt([]byte(mark), 0)
	return err
}

// replaceFile writes a file that is there whole, and durable, or as it was.
func replaceFile(path string, data []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("writing %q: %w", path, err)
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
