package podmanext

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vbatts/tar-split/tar/asm"
	tarsplit "github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

// stored converts an image and returns it as the store has it.
func stored(t testing.TB, st *store.Store, m *memImage, name string) *converter.Stored {
	if _, err := converter.Convert(t.Context(), m, st, converter.Options{Name: name}); err != nil {
		t.Fatal(err)
	}
	s, err := converter.Find(st, name)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newImageStore(t testing.TB, st *store.Store) *ImageStore {
	s, err := InitImageStore(filepath.Join(filepath.Dir(st.Dir()), "images"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// blob reads the tree that podman mounts for a layer.
func (s *ImageStore) blob(t testing.TB, id string) *tree.Tree {
	f, err := os.Open(s.path("overlay", id, "composefs-data", "composefs.blob"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	tr, err := erofs.Read(f, fi.Size())
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// A podmanFiles finds files as podman's DiffGetter does: below diff, which it follows
// by one step, at what the merged tree redirects to.
type podmanFiles struct {
	diff string
	tree *tree.Tree
}

func (p podmanFiles) Get(name string) (io.ReadCloser, error) {
	n := p.tree.Lookup("/" + filepath.Clean(name))
	if n == nil || !n.IsRegular() || n.File.Path() == "" {
		return nil, fmt.Errorf("no redirect at %q: %w", name, fs.ErrNotExist)
	}
	return os.Open(filepath.Join(p.diff, n.File.Path()))
}

// TestImageStore: each layer shows what the layers up to it show, keeps its tar's very
// bytes, and takes no byte of a file twice.
func TestImageStore(t *testing.T) {
	st := newStore(t)
	layers := testLayers(t)
	m := newMemImage(t, layers...)
	img := stored(t, st, m, "x")
	s := newImageStore(t, st)
	res, err := s.Add(t.Context(), st, img, "localhost/x:1")
	if err != nil {
		t.Fatal(err)
	}
	if res.ID != m.id() || !slices.Equal(res.Names, []string{"localhost/x:1"}) || res.NewLayers != 2 {
		t.Errorf("got %+v, want image %s with two new layers", res, m.id())
	}

	records, err := s.layers()
	if err != nil || len(records) != 2 {
		t.Fatalf("got %d layers, %v, want 2", len(records), err)
	}
	if records[0].ID != strings.TrimPrefix(m.diffIDs[0], "sha256:") || records[1].Parent != records[0].ID {
		t.Errorf("got layers %+v", records)
	}
	if want := strings.TrimPrefix(sha([]byte(records[0].ID+"+"+strings.TrimPrefix(m.diffIDs[1], "sha256:"))), "sha256:"); records[1].ID != want {
		t.Errorf("second layer: got ID %s, want %s", records[1].ID, want)
	}
	if !slices.Equal(records[0].UIDs, []uint32{0, 7}) || records[0].DiffSize != int64(len(layers[0])) {
		t.Errorf("first layer: got %+v, want owners 0 and 7, %d bytes", records[0], len(layers[0]))
	}
	for i, r := range records {
		diff, err := os.Readlink(s.path("overlay", r.ID, "diff"))
		if err != nil || !filepath.IsAbs(diff) || filepath.Base(filepath.Dir(diff)) != r.ID {
			t.Errorf("layer %d: diff leads to %q, %v", i, diff, err)
		}
		if fi, err := os.Stat(diff); err != nil || fi.Mode().Perm() != 0o755 {
			t.Errorf("layer %d: diff is %v, %v, want mode 0755 for the container's root", i, fi, err)
		}
		link, err := os.ReadFile(s.path("overlay", r.ID, "link"))
		if err != nil || len(link) != 26 {
			t.Errorf("layer %d: got link %q, %v", i, link, err)
		}
		if target, err := os.Readlink(s.path("overlay", "l", string(link))); err != nil || target != "../"+r.ID+"/diff" {
			t.Errorf("layer %d: link leads to %q, %v", i, target, err)
		}
		// The tar, as podman puts it together.
		f, err := os.Open(s.path("overlay-layers", r.ID+".tar-split.gz"))
		if err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(f)
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		err = asm.WriteOutputTarStream(podmanFiles{diff, s.blob(t, r.ID)}, tarsplit.NewJSONUnpacker(z), &got)
		f.Close()
		if err != nil || !bytes.Equal(got.Bytes(), layers[i]) {
			t.Errorf("layer %d: got %d bytes of tar with digest %s, %v, want %s", i, got.Len(), sha(got.Bytes()), err, r.DiffDigest)
		}
	}
	if lower := s.blob(t, records[0].ID); lower.Lookup("/usr/small") == nil || lower.Lookup("/etc") != nil {
		t.Error("the lower layer shows another image than its own")
	}
	// But for files of up to 64 bytes, which the store keeps elsewhere, the upper layer
	// is the very image of the store.
	want, err := converter.ReadImage(st, img, converter.Rootfs)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range tree.Diff(want, s.blob(t, records[1].ID)) {
		if n := want.Lookup(c.Path); n == nil || !n.IsRegular() || len(n.File.Inline) == 0 {
			t.Errorf("upper layer: %s: %s", c.Path, c.What)
		}
	}

	// Twice the same is nothing new.
	if again, err := s.Add(t.Context(), st, img, "localhost/x:2"); err != nil || again.NewLayers != 0 || len(again.Names) != 2 {
		t.Errorf("added again: got %+v, %v", again, err)
	}
	var images []map[string]any
	raw, err := os.ReadFile(s.path(imagesTable))
	if err == nil {
		err = json.Unmarshal(raw, &images)
	}
	if err != nil || len(images) != 1 || images[0]["digest"] != img.Manifest.String() {
		t.Errorf("images.json: got %s, %v", raw, err)
	}
	if local, err := readImages(s.path(imagesTable)); err != nil || local[0].Layer != records[1].ID {
		t.Errorf("got %+v, %v, want top layer %s", local, err, records[1].ID)
	}
}

// TestImageStoreLinks: files are the store's own, so they are on disk and in memory
// once; with the store's gone they stay.
func TestImageStoreLinks(t *testing.T) {
	st := newStore(t)
	img := stored(t, st, newMemImage(t, testLayers(t)...), "x")
	s := newImageStore(t, st)
	if _, err := s.Add(t.Context(), st, img, "localhost/x:1"); err != nil {
		t.Fatal(err)
	}
	big := s.blob(t, img.Layers[0].Hex).Lookup("/usr/big")
	path := s.path("overlay", img.Layers[0].Hex, "diff", big.File.Path())
	if !linkedTo(t, st, path) {
		t.Errorf("%s is a copy", path)
	}
	if err := os.RemoveAll(st.Dir()); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Size() != 320000 {
		t.Errorf("without the store: got %v, %v", fi, err)
	}
}

// TestImageStoreRemove: what is left after an image was removed is what the others
// need.
func TestImageStoreRemove(t *testing.T) {
	st := newStore(t)
	layers := testLayers(t)
	one := stored(t, st, newMemImage(t, layers[0]), "one")
	two := stored(t, st, newMemImage(t, layers...), "two")
	s := newImageStore(t, st)
	for name, img := range map[string]*converter.Stored{"localhost/one:1": one, "localhost/two:1": two} {
		if _, err := s.Add(t.Context(), st, img, name); err != nil {
			t.Fatal(err)
		}
	}
	alone, err := InitImageStore(filepath.Join(t.TempDir(), "alone"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := alone.Add(t.Context(), st, one, "localhost/one:1"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), "localhost/two:1"); err != nil {
		t.Fatal(err)
	}
	if got, want := listing(t, s.dir), listing(t, alone.dir); !slices.Equal(got, want) {
		t.Errorf("after the other image was removed: got %q, want %q", got, want)
	}
	if err := s.Remove(t.Context(), "localhost/two:1"); !errors.Is(err, ErrNotInImageStore) {
		t.Errorf("removed again: got %v, want ErrNotInImageStore", err)
	}
	if err := s.Remove(t.Context(), one.Config.Hex); err != nil {
		t.Fatal(err)
	}
	for _, path := range listing(t, s.dir) {
		if strings.HasPrefix(path, "objects/") && strings.Count(path, "/") > 2 || strings.HasPrefix(path, "overlay/") && path != "overlay/l" {
			t.Errorf("%s is left in an image store without images", path)
		}
	}
	if all, err := s.Images(); err != nil || len(all) != 0 {
		t.Errorf("got %v, %v, want no images", all, err)
	}
}

// TestImageStoreInUse: what is mounted stays, since its files are opened by path.
func TestImageStoreInUse(t *testing.T) {
	requireMounts(t)
	st := newStore(t)
	img := stored(t, st, newMemImage(t, testLayers(t)...), "x")
	s := newImageStore(t, st)
	if _, err := s.Add(t.Context(), st, img, "localhost/x:1"); err != nil {
		t.Fatal(err)
	}
	records, err := s.layers()
	if err != nil {
		t.Fatal(err)
	}
	layer := s.path("overlay", records[len(records)-1].ID)
	blob, objects := filepath.Join(layer, "composefs-data", "composefs.blob"), filepath.Join(layer, "objects")
	direct := func(target string) error {
		f, err := os.Open(blob)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = mount.Mount(target, mount.Options{Image: f, Objects: []string{objects}, Loop: true})
		return err
	}
	// As podman does: the EROFS is not to be seen afterwards.
	asPodman := func(target string) error {
		image := t.TempDir()
		if err := unix.Mount(blob, image, "erofs", unix.MS_RDONLY, ""); err != nil {
			t.Log("EROFS is not mounted from a file here: ", err)
			return direct(target)
		}
		return errors.Join(
			unix.Mount("overlay", target, "overlay", unix.MS_RDONLY, "lowerdir="+image+"::"+objects+",metacopy=on,redirect_dir=on"),
			unix.Unmount(image, unix.MNT_DETACH))
	}
	for how, mounted := range map[string]func(string) error{"direct": direct, "podman's way": asPodman} {
		target := t.TempDir()
		if err := mounted(target); err != nil {
			t.Fatal(err)
		}
		err = s.Remove(t.Context(), "localhost/x:1")
		if !errors.Is(err, ErrImageInUse) {
			t.Errorf("%s: removing what is mounted: got %v, want ErrImageInUse", how, err)
		} else if !strings.Contains(err.Error(), target) {
			t.Errorf("%s: the error does not say that it is mounted at %s: %v", how, target, err)
		}
		if _, err := os.ReadFile(filepath.Join(target, "usr", "big")); err != nil {
			t.Errorf("%s: a file that was not opened before: %v", how, err)
		}
		if err := unix.Unmount(target, 0); err != nil {
			t.Fatal(err)
		}
	}
	if all, err := s.Images(); err != nil || len(all) != 1 {
		t.Errorf("got %v, %v, want the image", all, err)
	}
	if err := s.Remove(t.Context(), "localhost/x:1"); err != nil {
		t.Fatal(err)
	}
}

// listing lists the files below a directory but for empty directories of objects.
func listing(t testing.TB, dir string) (paths []string) {
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(dir, path)
		if err == nil && !(d.IsDir() && strings.HasPrefix(rel, "objects/")) {
			paths = append(paths, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// TestImageStoreName: a name is of one image.
func TestImageStoreName(t *testing.T) {
	st := newStore(t)
	layers := testLayers(t)
	s := newImageStore(t, st)
	for i, n := range []int{1, 2} {
		if _, err := s.Add(t.Context(), st, stored(t, st, newMemImage(t, layers[:n]...), fmt.Sprint(i)), "localhost/x:1"); err != nil {
			t.Fatal(err)
		}
	}
	all, err := s.Images()
	if err != nil || len(all) != 2 || len(all[0].Names) != 0 || !slices.Equal(all[1].Names, []string{"localhost/x:1"}) {
		t.Errorf("got %+v, %v", all, err)
	}
}

// TestImageStoreKilled: what an addition that was killed anywhere left is neither seen
// nor in the way of the next.
func TestImageStoreKilled(t *testing.T) {
	st := newStore(t)
	img := stored(t, st, newMemImage(t, testLayers(t)...), "x")
	s := newImageStore(t, st)
	if _, err := s.Add(t.Context(), st, img, "localhost/x:1"); err != nil {
		t.Fatal(err)
	}
	want := listing(t, s.dir)
	// As before the first record: all files are there, some cut short.
	for _, table := range []string{layersTable, imagesTable} {
		if err := s.writeTable(t.Context(), table, []int{}); err != nil {
			t.Fatal(err)
		}
	}
	id := img.Layers[0].Hex
	for _, err := range []error{
		os.Truncate(s.path("overlay", id, "composefs-data", "composefs.blob"), 10),
		os.Truncate(s.path("overlay-layers", id+".tar-split.gz"), 10),
		os.MkdirAll(s.path("overlay", ".tmp-"+id, "composefs-data"), 0o700),
		os.WriteFile(s.path("overlay-layers", id+".tar-split.gz.tmp"), []byte("x"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	// A directory without its mode yet, and small objects that lost their content.
	dirs, err := filepath.Glob(s.path("objects", "*"))
	if err != nil || len(dirs) == 0 {
		t.Fatalf("got %q, %v", dirs, err)
	}
	for _, dir := range dirs {
		if err := os.Chmod(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	emptied := map[string]int64{}
	err = filepath.WalkDir(s.path("objects"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		fi, err := d.Info()
		if err != nil || fi.Size() > 64 || fi.Size() == 0 || fi.Sys().(*syscall.Stat_t).Nlink > 1 {
			return err
		}
		emptied[path] = fi.Size()
		return os.Truncate(path, 0)
	})
	if err != nil || len(emptied) == 0 {
		t.Fatalf("no small object: %v", err)
	}
	if all, err := s.Images(); err != nil || len(all) != 0 {
		t.Fatalf("got %v, %v, want no images", all, err)
	}
	if _, err := s.Add(t.Context(), st, img, "localhost/x:1"); err != nil {
		t.Fatal(err)
	}
	if got := listing(t, s.dir); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, dir := range dirs {
		if fi, err := os.Stat(dir); err != nil || fmt.Sprintf("%04o", fi.Mode().Perm()) != filepath.Base(dir)[:4] {
			t.Errorf("%s: %v, %v, want the mode that its name says", dir, fi.Mode(), err)
		}
	}
	for path, size := range emptied {
		if fi, err := os.Stat(path); err != nil || fi.Size() != size {
			t.Errorf("the object %s was not written again: %v", path, err)
		}
	}
	if tr := s.blob(t, id); tr.Lookup("/usr/big") == nil {
		t.Error("the damaged image was kept")
	}
}

func TestImageStoreRefused(t *testing.T) {
	other := t.TempDir()
	if err := os.WriteFile(filepath.Join(other, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := InitImageStore(other); !errors.Is(err, ErrNotImageStore) {
		t.Errorf("a directory with something else: got %v, want ErrNotImageStore", err)
	}
	if _, err := OpenImageStore(filepath.Join(other, "none")); !errors.Is(err, ErrNotImageStore) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: got %v, want ErrNotImageStore", err)
	}
	if _, err := InitImageStore(filepath.Join(other, "a:b")); err == nil {
		t.Error("a path with a colon was taken")
	}
	st := newStore(t)
	empty := stored(t, st, newMemImage(t), "empty")
	if _, err := newImageStore(t, st).Add(t.Context(), st, empty, "localhost/e:1"); err == nil {
		t.Error("an image without layers was taken")
	}
	shm, err := os.MkdirTemp("/dev/shm", "particle-")
	if err != nil {
		t.Skip("no other file system here: ", err)
	}
	defer os.RemoveAll(shm)
	far, err := InitImageStore(filepath.Join(shm, "images"))
	if err != nil {
		t.Fatal(err)
	}
	img := stored(t, st, newMemImage(t, testLayers(t)...), "x")
	if _, err := far.Add(t.Context(), st, img, "localhost/x:1"); !errors.Is(err, ErrOtherFilesystem) {
		t.Errorf("on another file system: got %v, want ErrOtherFilesystem", err)
	}
	if all, err := far.Images(); err != nil || len(all) != 0 {
		t.Errorf("a failed addition: got %v, %v, want no images", all, err)
	}
}
