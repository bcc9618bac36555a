package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// layoutTarget writes into an OCI layout in a directory. Blobs wait in a directory of
// their own inside of it; PutManifest moves them to their places, and index.json,
// which makes the image visible, is replaced last. Blobs of images that are replaced
// stay: another tag, or a process that reads, may need them. A Docker manifest is
// stored as it is too, so that its digest holds; the specification allows any type,
// but skopeo finds such an image only where a layout has no tags.
type layoutTarget struct {
	*staging
	root string
	made []string // directories that did not exist before, outermost first
}

func createLayout(ref Ref) (_ Target, err error) {
	t := &layoutTarget{root: ref.Path}
	defer func() {
		if err != nil {
			t.unmake()
		}
	}()
	if err := t.mkdir(ref.Path); err != nil {
		return nil, err
	}
	if err := checkPlace(ref.Path); err != nil {
		return nil, err
	}
	if t.staging, err = newStaging(ref, ref.Path, stagingPrefix); err != nil {
		return nil, err
	}
	t.has = func(desc v1.Descriptor) bool {
		fi, err := os.Lstat(filepath.Join(t.root, blobName(desc.Digest)))
		return err == nil && fi.Mode().IsRegular() && fi.Size() == desc.Size
	}
	return t, nil
}

// checkPlace tells whether a directory may become or stay a layout. It takes the lock
// because a writer that commits makes an empty directory one, step by step.
func checkPlace(dir string) error {
	unlock, err := lockDir(dir)
	if err != nil {
		return err
	}
	defer unlock()
	if _, _, err := readLayout(dirFiles(dir)); !errors.Is(err, ErrNotFound) {
		return err
	}
	if _, err := os.Lstat(filepath.Join(dir, layoutFile)); err == nil {
		return nil // without index.json: a writer was killed in the middle
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), stagingPrefix) {
			// A typing error in a path must not spread blobs over somebody's home.
			return fmt.Errorf("%w: directory %q is no OCI layout and not empty; name a new or empty directory", ErrInvalid, dir)
		}
	}
	return nil
}

// stagingPrefix starts the names of what is unfinished.
const stagingPrefix = ".particle-"

// mkdir makes a directory and those above it, and remembers which are new.
func (t *layoutTarget) mkdir(dir string) error {
	err := os.Mkdir(dir, 0o755)
	switch {
	case err == nil:
		t.made = append(t.made, dir)
		return nil
	case errors.Is(err, fs.ErrExist):
		return nil
	case errors.Is(err, fs.ErrNotExist) && filepath.Dir(dir) != dir:
		if err := t.mkdir(filepath.Dir(dir)); err != nil {
			return err
		}
		return t.mkdir(dir)
	}
	return err
}

// unmake removes the directories that mkdir made, where they are empty still.
func (t *layoutTarget) unmake() {
	for _, dir := range slices.Backward(t.made) {
		if os.Remove(dir) != nil {
			return
		}
	}
}

func (t *layoutTarget) PutBlob(ctx context.Context, desc v1.Descriptor, open func() (io.ReadCloser, error)) error {
	return t.put(ctx, desc, open, copyBlob)
}

func (t *layoutTarget) PutManifest(ctx context.Context, raw []byte, mediaType string) error {
	return t.finish(raw, mediaType, func(doc *document) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		unlock, err := lockDir(t.root)
		if err != nil {
			return err
		}
		defer unlock()
		return t.commit(describe(raw, doc.mediaType), raw)
	})
}

// commit runs under the lock, which other writers of ours wait for.
func (t *layoutTarget) commit(desc v1.Descriptor, raw []byte) error {
	index := &v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
	old, _, err := readLayout(dirFiles(t.root))
	switch {
	case err == nil:
		index = old
	case !errors.Is(err, ErrNotFound):
		return err
	}
	if old == nil {
		if err := writeFile(filepath.Join(t.root, layoutFile), writeBytes([]byte(layoutContent))); err != nil {
			return err
		}
	}
	dirs := map[string]bool{}
	place := func(h v1.Hash) (string, error) {
		name := filepath.Join(t.root, blobName(h))
		dirs[filepath.Dir(name)] = true
		return name, os.MkdirAll(filepath.Dir(name), 0o755)
	}
	for h, blob := range t.blobs {
		if blob.path == "" {
			continue
		}
		name, err := place(h)
		if err != nil {
			return err
		}
		if err := os.Rename(blob.path, name); err != nil {
			return err
		}
		t.blobs[h] = stagedBlob{size: blob.size} // should PutManifest be tried again
	}
	name, err := place(desc.Digest)
	if err != nil {
		return err
	}
	if err := writeFile(name, writeBytes(raw)); err != nil {
		return err
	}
	for _, dir := range append(slices.Sorted(maps.Keys(dirs)), filepath.Join(t.root, "blobs")) {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	out, err := json.Marshal(addToIndex(index, desc, t.ref.Tag))
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(t.root, indexFile), writeBytes(out))
}

// addToIndex puts a manifest in the place of the one with the same tag, or at the
// end. Without a tag, it is not added twice.
func addToIndex(index *v1.IndexManifest, desc v1.Descriptor, tag string) *v1.IndexManifest {
	if tag != "" {
		desc.Annotations = map[string]string{refNameKey: tag}
	}
	at := len(index.Manifests)
	var list []v1.Descriptor
	for i, d := range index.Manifests {
		same := d.Annotations[refNameKey] == tag && (tag != "" || d.Digest == desc.Digest)
		if same {
			at = min(at, i)
			continue
		}
		list = append(list, d)
	}
	index.Manifests = slices.Insert(list, at, desc)
	return index
}

func writeBytes(raw []byte) func(*os.File) error {
	return func(f *os.File) error {
		_, err := f.Write(raw)
		return err
	}
}

// lockDir waits for an exclusive lock on a directory itself, which leaves no file
// behind.
func lockDir(dir string) (unlock func() error, err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		if err = syscall.Flock(int(d.Fd()), syscall.LOCK_EX); !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("locking %q: %w", dir, err), d.Close())
	}
	return d.Close, nil
}

func (t *layoutTarget) Close() error {
	err := t.staging.Close()
	t.unmake() // nothing is empty where the image was written
	return err
}
