package store

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
	"golang.org/x/sys/unix"
)

// fakeImage is what the tests take for an EROFS image: the magic number in its
// place, then raw digests.
func fakeImage(objects ...fsverity.Digest) []byte {
	b := make([]byte, 1024)
	b = binary.LittleEndian.AppendUint32(b, 0xE0F5E1E2)
	for _, d := range objects {
		b = d.AppendTo(b)
	}
	return b
}

var errFake = errors.New("odd image")

func fakeObjects(r io.ReaderAt, size int64) ([]fsverity.Digest, error) {
	b := make([]byte, size-1028)
	if _, err := r.ReadAt(b, 1028); err != nil && err != io.EOF {
		return nil, err
	}
	var all []fsverity.Digest
	for ; len(b) >= 32; b = b[32:] {
		d, err := fsverity.New(fsverity.SHA256, b[:32])
		if err != nil {
			return nil, err
		}
		all = append(all, d)
	}
	if len(b) > 0 {
		return nil, errFake
	}
	return all, nil
}

// An example is a store with two images of one OCI kind each, which share a layer.
type example struct {
	*Store
	a, b, shared, lone, onlyImage     fsverity.Digest // objects
	layer, layerA, layerB             fsverity.Digest
	configA, manifestA, configB, manB fsverity.Digest
	image                             fsverity.Digest
}

func newExample(t *testing.T) *example {
	t.Helper()
	e := &example{Store: memStore(t, 0)}
	txn := begin(t, e.Store)
	stream := func(id string, kind uint64, objects []string, refs map[string]fsverity.Digest) fsverity.Digest {
		w := txn.NewStream(kind)
		for _, o := range objects {
			if err := w.Object(put(t, txn, []byte(o)), int64(len(o))); err != nil {
				t.Fatal(err)
			}
		}
		for name, d := range refs {
			w.NamedRef(name, d)
		}
		d, err := w.Close(id)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	e.a, e.b, e.shared = put(t, txn, []byte("a")), put(t, txn, []byte("b")), put(t, txn, []byte("shared"))
	e.lone, e.onlyImage = put(t, txn, []byte("lone")), put(t, txn, []byte("only in the image"))
	var err error
	e.image, err = txn.PutImage(context.Background(), func(w io.Writer) error {
		_, err := w.Write(fakeImage(e.a, e.shared, e.onlyImage))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	e.layer = stream(LayerPrefix+"shared", LayerStream, []string{"shared"}, nil)
	e.layerA = stream(LayerPrefix+"a", LayerStream, []string{"a"}, nil)
	e.layerB = stream(LayerPrefix+"b", LayerStream, []string{"b"}, nil)
	e.configA = stream(ConfigPrefix+"a", ConfigStream, []string{"config a"}, map[string]fsverity.Digest{"s": e.layer, "a": e.layerA, ImageRef: e.image})
	e.configB = stream(ConfigPrefix+"b", ConfigStream, []string{"config b"}, map[string]fsverity.Digest{"s": e.layer, "b": e.layerB})
	e.manifestA = stream(ManifestPrefix+"a", ManifestStream, []string{"manifest a"}, map[string]fsverity.Digest{"config:a": e.configA})
	e.manB = stream(ManifestPrefix+"b", ManifestStream, []string{"manifest b"}, map[string]fsverity.Digest{"config:b": e.configB})
	if err := errors.Join(
		txn.SetRef(Streams, TagPrefix+"a", ManifestPrefix+"a"),
		txn.SetRef(Streams, TagPrefix+"b", ManifestPrefix+"b"),
	); err != nil {
		t.Fatal(err)
	}
	commit(t, txn)
	wantClean(t, e.Store, fakeObjects)
	return e
}

func (e *example) has(t *testing.T, want bool, digests ...fsverity.Digest) {
	t.Helper()
	for _, d := range digests {
		if got, err := e.HasObject(d); got != want || err != nil {
			t.Errorf("object %s: got %v (%v), want %v", d, got, err, want)
		}
	}
}

func TestGC(t *testing.T) {
	e := newExample(t)
	ctx := context.Background()
	if _, err := e.GC(ctx, GCOptions{}); !errors.Is(err, errNoImageObjects) {
		t.Errorf("without a function for images: got %v", err)
	}
	if err := e.RemoveRef(Streams, TagPrefix+"b"); err != nil {
		t.Fatal(err)
	}
	// What b alone uses: its object, layer, config and manifest with their JSON;
	// and the lone one.
	want := GCStats{ObjectsKept: 10, ObjectsRemoved: 7, StreamsRemoved: 3}
	want.BytesRemoved = 0
	for _, d := range []fsverity.Digest{e.b, e.layerB, e.configB, e.manB, e.lone,
		fsverity.Sum(fsverity.SHA256, []byte("config b")), fsverity.Sum(fsverity.SHA256, []byte("manifest b"))} {
		want.BytesRemoved += blocks(t, e.path(objectsDir, d.Path()))
	}
	before := listing(t, e.Store)
	st, err := e.GC(ctx, GCOptions{ImageObjects: fakeObjects, DryRun: true})
	if err != nil || st != want {
		t.Errorf("dry run: got %+v, %v; want %+v", st, err, want)
	}
	wantListing(t, e.Store, before)

	st, err = e.GC(ctx, GCOptions{ImageObjects: fakeObjects, DryRun: true, Roots: []string{ConfigPrefix + "b"}})
	if err != nil || st.ObjectsRemoved != 3 || st.StreamsRemoved != 1 {
		t.Errorf("with a root: got %+v, %v; want 3 objects and 1 stream removed", st, err)
	}
	if _, err := e.GC(ctx, GCOptions{ImageObjects: fakeObjects, Roots: []string{"gone"}}); !errors.Is(err, ErrNotFound) {
		t.Errorf("with a root that is missing: got %v, want ErrNotFound", err)
	}
	wantListing(t, e.Store, before)

	if st, err = e.GC(ctx, GCOptions{ImageObjects: fakeObjects}); err != nil || st != want {
		t.Errorf("got %+v, %v; want %+v", st, err, want)
	}
	e.has(t, true, e.a, e.shared, e.onlyImage, e.image, e.layer, e.layerA, e.configA, e.manifestA)
	e.has(t, false, e.b, e.lone, e.layerB, e.configB, e.manB)
	wantClean(t, e.Store, fakeObjects)

	// The image goes with the last that names it.
	if err := e.RemoveRef(Streams, TagPrefix+"a"); err != nil {
		t.Fatal(err)
	}
	st, err = e.GC(ctx, GCOptions{ImageObjects: fakeObjects, Roots: []string{e.image.String()}})
	if err != nil || st.ObjectsKept != 4 || st.ImagesRemoved != 0 {
		t.Errorf("got %+v, %v; want the image and its 3 objects kept", st, err)
	}
	wantClean(t, e.Store, fakeObjects)
	st, err = e.GC(ctx, GCOptions{ImageObjects: fakeObjects})
	if err != nil || st.ObjectsKept != 0 || st.ImagesRemoved != 1 {
		t.Errorf("got %+v, %v; want nothing kept", st, err)
	}
	if left, _ := os.ReadDir(e.ObjectsDir()); len(left) != 0 {
		t.Errorf("directories are left: %v", left)
	}
}

// TestGCKeepsWhenDamaged breaks what leads to objects: nothing may be removed then.
func TestGCKeepsWhenDamaged(t *testing.T) {
	ctx := context.Background()
	for name, harm := range map[string]func(t *testing.T, e *example){
		"stream missing": func(t *testing.T, e *example) { os.Remove(e.path(objectsDir, e.configA.Path())) },
		"stream cut":     func(t *testing.T, e *example) { os.Truncate(e.path(objectsDir, e.layerA.Path()), 50) },
		"image missing":  func(t *testing.T, e *example) { os.Remove(e.path(objectsDir, e.image.Path())) },
		"image odd":      func(t *testing.T, e *example) { os.Truncate(e.path(objectsDir, e.image.Path()), 1100) },
		"link odd": func(t *testing.T, e *example) {
			os.Remove(e.path("streams", ManifestPrefix+"b"))
			os.Symlink("/etc/passwd", e.path("streams", ManifestPrefix+"b"))
		},
		"ref no link": func(t *testing.T, e *example) { os.WriteFile(e.path("streams/refs/file"), nil, 0o600) },
	} {
		e := newExample(t)
		harm(t, e)
		before := listing(t, e.Store)
		_, err := e.GC(ctx, GCOptions{ImageObjects: fakeObjects})
		if err == nil || !strings.Contains(err.Error(), "fsck") {
			t.Errorf("%s: got %v, want an error that names fsck", name, err)
		}
		wantListing(t, e.Store, before)
		if r, err := e.Fsck(ctx, FsckOptions{ImageObjects: fakeObjects}); err != nil || r.Clean() {
			t.Errorf("%s: fsck finds nothing (%v)", name, err)
		}
	}
}

func TestGCRemovesLeftovers(t *testing.T) {
	e := newExample(t)
	os.Symlink("../gone", e.path("streams/refs/gone"))
	os.MkdirAll(e.path("images/refs/x/y"), 0o755)
	os.Symlink("../../../"+strings.Repeat("0", 64), e.path("images/refs/x/y/z"))
	os.WriteFile(e.path("objects/.tmp-object-abc"), nil, 0o600)
	os.MkdirAll(e.path(".staging/txn-dead"), 0o700)
	os.WriteFile(e.path(".staging/txn-dead/1"), nil, 0o600)
	st, err := e.GC(context.Background(), GCOptions{ImageObjects: fakeObjects})
	if err != nil || st.RefsRemoved != 2 || st.StagingRemoved != 1 || st.ObjectsRemoved != 1 {
		t.Errorf("got %+v, %v; want 2 refs, 1 staging directory and the lone object removed", st, err)
	}
	for _, name := range []string{"images/refs/x", "streams/refs/gone", "objects/.tmp-object-abc", ".staging/txn-dead"} {
		if _, err := os.Lstat(e.path(name)); err == nil {
			t.Errorf("%s is left", name)
		}
	}
	wantClean(t, e.Store, fakeObjects)
}

// TestGCWaits has a transaction keep the garbage collector out, and the other way
// round.
func TestGCWaits(t *testing.T) {
	s := newStore(t, 0)
	told := make(chan string, 1)
	s.Waiting = func(m string) { told <- m }
	txn := begin(t, s)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.GC(ctx, GCOptions{}); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "lock") {
		t.Errorf("got %v, want a deadline while waiting for the lock", err)
	}
	if _, err := s.GC(context.Background(), GCOptions{DryRun: true}); err != nil {
		t.Errorf("a dry run beside a transaction: %v", err)
	}
	done := make(chan error)
	go func() {
		_, err := s.GC(context.Background(), GCOptions{})
		done <- err
	}()
	if m := <-told; !strings.Contains(m, s.Dir()) || !strings.Contains(m, "reads or writes") {
		t.Errorf("told %q", m)
	}
	put(t, txn, []byte("x"))
	commit(t, txn)
	if err := <-done; err != nil {
		t.Error(err)
	}

	lock, err := s.lock(context.Background(), unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	for name, do := range map[string]func(context.Context) error{
		"Begin": func(ctx context.Context) error { _, err := s.Begin(ctx); return err },
		"Hold":  func(ctx context.Context) error { _, err := s.Hold(ctx); return err },
		"Fsck":  func(ctx context.Context) error { _, err := s.Fsck(ctx, FsckOptions{}); return err },
		"DF":    func(ctx context.Context) error { _, err := s.DF(ctx, nil); return err },
	} {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		if err := do(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s beside GC: got %v, want a deadline", name, err)
		}
		cancel()
	}
	lock.Close()
	release, err := s.Hold(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.GC(ctx, GCOptions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("GC beside Hold: got %v, want a deadline", err)
	}
	release()
}

func TestDF(t *testing.T) {
	e := newExample(t)
	txn := begin(t, e.Store)
	second, err := txn.PutImage(context.Background(), func(w io.Writer) error {
		_, err := w.Write(fakeImage(e.shared, e.b))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := txn.SetRef(Images, "second", second.String()); err != nil {
		t.Fatal(err)
	}
	commit(t, txn)
	u, err := e.DF(context.Background(), fakeObjects)
	if err != nil {
		t.Fatal(err)
	}
	disk := func(d fsverity.Digest) int64 { return blocks(t, e.path(objectsDir, d.Path())) }
	if u.Total.Objects != 18 || u.Total.Bytes < 2*1028 || u.Total.Disk < 18*disk(e.a) {
		t.Errorf("total %+v, want 18 objects of a block or more", u.Total)
	}
	if want := (Amount{1, 4, disk(e.lone)}); u.Unreferenced != want {
		t.Errorf("unreferenced %+v, want %+v", u.Unreferenced, want)
	}
	if want := (Amount{1, 6, disk(e.shared)}); u.Shared != want || u.SavedBytes != 6 {
		t.Errorf("shared %+v, saved %d; want %+v and 6", u.Shared, u.SavedBytes, want)
	}
	if u.Streams != 7 || u.Images != 2 || u.StreamRefs != 2 || u.ImageRefs != 1 {
		t.Errorf("got %+v", u)
	}
}

// TestGCWait: whoever does not want to wait for others is told that there are some.
func TestGCWait(t *testing.T) {
	s := newStore(t, fsverity.SHA256)
	txn, err := s.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.GC(t.Context(), GCOptions{Wait: 50 * time.Millisecond}); !errors.Is(err, ErrBusy) {
		t.Errorf("beside a transaction: got %v, want ErrBusy", err)
	}
	if err := txn.Rollback(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.GC(t.Context(), GCOptions{Wait: time.Minute}); err != nil {
		t.Error(err)
	}
}
