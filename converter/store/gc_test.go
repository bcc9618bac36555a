package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
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

// TestFsck harms a store in every way that fsck knows.
func TestFsck(t *testing.T) {
	ctx := context.Background()
	rewrite := func(t *testing.T, e *example, d fsverity.Digest, data string) {
		name := e.path(objectsDir, d.Path())
		os.Remove(name)
		if err := os.WriteFile(name, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	relink := func(t *testing.T, e *example, name, target string) {
		os.Remove(e.path(name))
		if err := os.Symlink(target, e.path(name)); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		harm func(t *testing.T, e *example)
		path func(e *example) string
		text string // of the problem
		// deep ones are found by reading all content only
		deep bool
	}{
		"bit flip":       {func(t *testing.T, e *example) { rewrite(t, e, e.a, "b") }, func(e *example) string { return "objects/" + e.a.Path() }, "digest " + fsverity.Sum(fsverity.SHA256, []byte("b")).String(), true},
		"lone bit flip":  {func(t *testing.T, e *example) { rewrite(t, e, e.lone, "loNe") }, func(e *example) string { return "objects/" + e.lone.Path() }, "digest", true},
		"wrong size":     {func(t *testing.T, e *example) { rewrite(t, e, e.a, "") }, func(e *example) string { return "streams/oci-layer-a" }, "gives 0 bytes, its header says 1", false},
		"missing":        {func(t *testing.T, e *example) { os.Remove(e.path(objectsDir, e.a.Path())) }, func(e *example) string { return "objects/" + e.a.Path() }, "needed by", false},
		"missing, image": {func(t *testing.T, e *example) { os.Remove(e.path(objectsDir, e.onlyImage.Path())) }, func(e *example) string { return "objects/" + e.onlyImage.Path() }, "needed by images/", false},
		"missing stream": {func(t *testing.T, e *example) { os.Remove(e.path(objectsDir, e.layer.Path())) }, func(e *example) string { return "streams/oci-layer-shared" }, "not in the store", false},
		"directory": {func(t *testing.T, e *example) {
			os.Mkdir(e.path("objects/00/"), 0o755)
			os.Mkdir(e.path("objects/00/"+strings.Repeat("0", 62)), 0o755)
		}, func(e *example) string { return "objects/00/" + strings.Repeat("0", 62) }, "not a regular file", false},
		"name":       {func(t *testing.T, e *example) { os.WriteFile(e.path("objects/"+e.a.Path()[:2]+"/x"), nil, 0o600) }, func(e *example) string { return "objects/" + e.a.Path()[:2] + "/x" }, "no digest", false},
		"upper name": {func(t *testing.T, e *example) { os.Mkdir(e.path("objects/abc"), 0o700) }, func(e *example) string { return "objects/abc" }, "two hexadecimal digits", false},
		"algorithm": {func(t *testing.T, e *example) {
			d := fsverity.Sum(fsverity.SHA512, nil)
			os.MkdirAll(e.path("objects/"+d.Path()[:2]), 0o755)
			os.WriteFile(e.path("objects/"+d.Path()), nil, 0o600)
		}, func(e *example) string { return "objects/" + fsverity.Sum(fsverity.SHA512, nil).Path() }, "another algorithm", false},
		"no stream": {func(t *testing.T, e *example) { relink(t, e, "streams/oci-layer-a", "../objects/"+e.lone.Path()) }, func(e *example) string { return "streams/oci-layer-a" }, "split stream", false},
		"no image": {func(t *testing.T, e *example) {
			relink(t, e, "images/"+e.lone.String(), "../objects/"+e.lone.Path())
		}, func(e *example) string { return "images/" + e.lone.String() }, "no EROFS image", false},
		"other image":  {func(t *testing.T, e *example) { relink(t, e, "images/"+e.image.String(), "../objects/"+e.lone.Path()) }, func(e *example) string { return "images/" + e.image.String() }, "leads to object", false},
		"link":         {func(t *testing.T, e *example) { relink(t, e, "streams/oci-layer-a", "/objects/"+e.layerA.Path()) }, func(e *example) string { return "streams/oci-layer-a" }, "link leads to", false},
		"file":         {func(t *testing.T, e *example) { os.WriteFile(e.path("streams/file"), nil, 0o600) }, func(e *example) string { return "streams/file" }, "not a link", false},
		"image name":   {func(t *testing.T, e *example) { relink(t, e, "images/name", "../objects/"+e.image.Path()) }, func(e *example) string { return "images/name" }, "bad name", false},
		"ref":          {func(t *testing.T, e *example) { relink(t, e, "streams/refs/oci/a", "../../gone") }, func(e *example) string { return "streams/refs/oci/a" }, "leads nowhere", false},
		"ref path":     {func(t *testing.T, e *example) { relink(t, e, "streams/refs/oci/a", "../oci-manifest-a") }, func(e *example) string { return "streams/refs/oci/a" }, `want "../../oci-manifest-a"`, false},
		"ref file":     {func(t *testing.T, e *example) { os.WriteFile(e.path("images/refs/file"), nil, 0o600) }, func(e *example) string { return "images/refs/file" }, "not a link", false},
		"no meta":      {func(t *testing.T, e *example) { os.Remove(e.path(metaName)) }, func(e *example) string { return metaName }, "no meta.json", false},
		"version":      {func(t *testing.T, e *example) { os.WriteFile(e.path(metaName), []byte(`{"version":2}`), 0o600) }, func(e *example) string { return metaName }, "version 2, want 1", false},
		"stream bytes": {func(t *testing.T, e *example) { rewrite(t, e, e.layerA, "SplitStream") }, func(e *example) string { return "streams/oci-layer-a" }, "of 11 bytes", false},
	} {
		t.Run(name, func(t *testing.T) {
			e := newExample(t)
			c.harm(t, e)
			for _, scrub := range []bool{false, true} {
				var last, total int64
				r, err := e.Fsck(ctx, FsckOptions{Scrub: scrub, ImageObjects: fakeObjects, Progress: func(d, n int64) { last, total = d, n }})
				if err != nil {
					t.Fatal(err)
				}
				found := false
				for _, p := range r.Problems {
					if p.Path == c.path(e) && strings.Contains(p.Problem, c.text) && p.Advice != "" {
						found = true
					}
				}
				if want := scrub || !c.deep; found != want {
					t.Errorf("scrub %v: found %v, want %v in %v", scrub, found, want, r.Problems)
				}
				if scrub && (last != total || last != r.Bytes) {
					t.Errorf("progress ends at %d of %d, want %d", last, total, r.Bytes)
				}
				js, err := json.Marshal(r)
				var back FsckReport
				if err != nil || json.Unmarshal(js, &back) != nil || !reflect.DeepEqual(&back, r) {
					t.Errorf("JSON %s gives another report (%v)", js, err)
				}
			}
		})
	}
}

// TestFsckHealed scrubs, removes what is bad and puts it again.
func TestFsckHealed(t *testing.T) {
	e := newExample(t)
	name := e.path(objectsDir, e.a.Path())
	os.Remove(name)
	if err := os.WriteFile(name, []byte("X"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := e.Fsck(context.Background(), FsckOptions{Scrub: true, ImageObjects: fakeObjects})
	if err != nil || len(r.Problems) != 1 {
		t.Fatalf("got %v, %v; want one problem", r, err)
	}
	os.Remove(e.path(r.Problems[0].Path))
	txn := begin(t, e.Store)
	put(t, txn, []byte("a"))
	commit(t, txn)
	wantClean(t, e.Store, fakeObjects)
}

func TestTags(t *testing.T) {
	// The pairs of composefs-rs' own test, and text that EncodeTag never makes.
	for name, enc := range map[string]string{
		"myimage:latest": "myimage:latest", "library/nginx": "library%2Fnginx",
		"docker://busybox": "docker:%2F%2Fbusybox", "test%2F": "test%252F",
		"a%b/%": "a%25b%2F%25", "%%": "%25%25", "": "",
	} {
		if got := EncodeTag(name); got != enc {
			t.Errorf("EncodeTag(%q) = %q, want %q", name, got, enc)
		}
		if got := DecodeTag(enc); got != name {
			t.Errorf("DecodeTag(%q) = %q, want %q", enc, got, name)
		}
	}
	for _, odd := range []string{"%", "%2", "%zz", "%2f"} {
		if got := DecodeTag(odd); got != odd {
			t.Errorf("DecodeTag(%q) = %q, want it unchanged", odd, got)
		}
	}
}

func TestMeta(t *testing.T) {
	dir := t.TempDir()
	for text, want := range map[string]struct {
		err      error
		readOnly string
	}{
		`{"version":1,"algorithm":"fsverity-sha256-12"}`:                                                                         {nil, "format V1"},
		`{"version":1,"algorithm":"fsverity-sha512-12","features":{"read-only-compatible":["v1_erofs"]}}`:                        {nil, ""},
		`{"version":1,"algorithm":"fsverity-sha512-12","erofs_formats":{"default":1,"extra":[2]}}`:                               {nil, ""},
		`{"version":1,"algorithm":"fsverity-sha512-12","erofs_formats":{"default":2,"extra":[1]}}`:                               {nil, ""},
		`{"version":1,"algorithm":"fsverity-sha512-12","erofs_formats":{"default":2}}`:                                           {nil, "format V1"},
		`{"version":1,"algorithm":"fsverity-sha512-12","features":{"compatible":["x"]},"erofs_formats":{"default":1}}`:           {nil, ""},
		`{"version":1,"algorithm":"fsverity-sha512-12","features":{"read-only-compatible":["x"]},"erofs_formats":{"default":1}}`: {nil, `"x"`},
		`{"version":1,"algorithm":"fsverity-sha512-12","features":{"incompatible":["x"]}}`:                                       {ErrFeature, ""},
		`{"version":2,"algorithm":"fsverity-sha1024","features":7}`:                                                              {ErrVersion, ""},
		`{"version":0}`:                                     {ErrVersion, ""},
		`{"algorithm":"fsverity-sha256-12"}`:                {ErrCorrupt, ""},
		`{"version":1,"algorithm":"fsverity-sha256-16"}`:    {ErrAlgorithm, ""},
		`{"version":1,"algorithm":"sha256"}`:                {ErrAlgorithm, ""},
		`{"version":1,"algorithm":"fsverity-sha256"}`:       {ErrAlgorithm, ""},
		`{"version":1,"algorithm":"fsverity-fsverity-sha"}`: {ErrAlgorithm, ""},
		`{"version":1`: {ErrCorrupt, ""},
		``:             {ErrCorrupt, ""},
	} {
		if err := os.WriteFile(filepath.Join(dir, metaName), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(dir)
		if !errors.Is(err, want.err) || (err == nil) != (want.err == nil) {
			t.Errorf("%s: got %v, want %v", text, err, want.err)
			continue
		}
		if err != nil {
			// Init must not make a new store of it either.
			if _, err := Init(dir, Options{}); !errors.Is(err, want.err) {
				t.Errorf("Init over %s: got %v, want %v", text, err, want.err)
			}
			continue
		}
		if (s.ReadOnly() == "") != (want.readOnly == "") || !strings.Contains(s.ReadOnly(), want.readOnly) {
			t.Errorf("%s: read only %q, want %q", text, s.ReadOnly(), want.readOnly)
		}
		txn, err := s.Begin(context.Background())
		if want.readOnly == "" {
			if err != nil {
				t.Errorf("%s: %v", text, err)
				continue
			}
			txn.Rollback()
		} else {
			_, gcErr := s.GC(context.Background(), GCOptions{})
			for _, err := range []error{err, gcErr, s.RemoveRef(Streams, "x")} {
				if !errors.Is(err, ErrReadOnly) {
					t.Errorf("%s: writing: got %v, want ErrReadOnly", text, err)
				}
			}
			if _, err := s.GC(context.Background(), GCOptions{DryRun: true}); err != nil {
				t.Errorf("%s: a dry run: %v", text, err)
			}
		}
	}
}

func TestInit(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	if _, err := Open(dir); !errors.Is(err, ErrNotStore) {
		t.Errorf("opening nothing: got %v, want ErrNotStore", err)
	}
	var stores [8]*Store
	done := make(chan error)
	for i := range stores {
		go func() {
			var err error
			stores[i], err = Init(dir, Options{Algorithm: fsverity.SHA512})
			done <- err
		}()
	}
	for range stores {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	want := "{\n  \"version\": 1,\n  \"algorithm\": \"fsverity-sha512-12\",\n  \"features\": {\n    \"compatible\": [],\n    \"read-only-compatible\": [\n      \"v1_erofs\"\n    ],\n    \"incompatible\": []\n  },\n  \"erofs_formats\": {\n    \"default\": 1\n  }\n}\n"
	if got, err := os.ReadFile(filepath.Join(dir, metaName)); err != nil || string(got) != want {
		t.Errorf("meta.json is %q (%v), want %q", got, err, want)
	}
	if s, err := Init(dir, Options{}); err != nil || s.Algorithm() != fsverity.SHA512 {
		t.Errorf("Init again: %v", err)
	}
	if _, err := Init(dir, Options{Algorithm: fsverity.SHA256}); !errors.Is(err, ErrAlgorithm) {
		t.Errorf("Init with another algorithm: got %v, want ErrAlgorithm", err)
	}
	for _, e := range must(os.ReadDir(dir)) {
		if isMetaTemp(e.Name()) {
			t.Errorf("%s is left", e.Name())
		}
	}

	other := t.TempDir()
	if err := os.WriteFile(filepath.Join(other, "photo.jpg"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Init(other, Options{}); !errors.Is(err, ErrNotStore) || !strings.Contains(err.Error(), "photo.jpg") {
		t.Errorf("Init over a directory in use: got %v, want ErrNotStore and the name", err)
	}
	old := t.TempDir()
	if err := os.MkdirAll(filepath.Join(old, "objects/00"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Init(old, Options{}); !errors.Is(err, ErrNotStore) || !strings.Contains(err.Error(), "cfsctl") {
		t.Errorf("Init over objects without meta.json: got %v, want ErrNotStore and advice", err)
	}
	if got := must(os.ReadDir(old)); len(got) != 1 {
		t.Errorf("Init left %v", got)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestUmask stores under a umask that takes everything from others.
func TestUmask(t *testing.T) {
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	s := newStore(t, 0)
	txn := begin(t, s)
	d := put(t, txn, []byte("x"))
	commit(t, txn)
	if st, err := os.Stat(s.path(objectsDir, d.Path())); err != nil || st.Mode() != objectMode {
		t.Errorf("mode %v (%v), want %v", st.Mode(), err, os.FileMode(objectMode))
	}
}

// TestLiveStaging checks that the staging directory of a living transaction stays.
func TestLiveStaging(t *testing.T) {
	s := newStore(t, 0)
	txn := begin(t, s)
	d := put(t, txn, []byte("x"))
	if n, err := s.sweep(); n != 0 || err != nil {
		t.Errorf("swept %d, %v", n, err)
	}
	begin(t, s).Rollback()
	commit(t, txn)
	if !bytes.Equal(readObject(t, s, d), []byte("x")) {
		t.Error("other content")
	}
}

// FuzzMeta reads anything as meta.json: what is accepted means the same when it is
// written again.
func FuzzMeta(f *testing.F) {
	for _, seed := range []string{
		`{"version":1,"algorithm":"fsverity-sha256-12"}`,
		`{"version":1,"algorithm":"fsverity-sha512-12","features":{"compatible":["a"],"read-only-compatible":["v1_erofs"],"incompatible":[]},"erofs_formats":{"default":1,"extra":[2]}}`,
		`{"version":2}`, `[]`, ``,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, alg, readOnly, err := parseMeta(data)
		if err != nil {
			return
		}
		if alg.Size() == 0 {
			t.Fatal("no algorithm")
		}
		again, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, alg2, readOnly2, err := parseMeta(again); err != nil || alg2 != alg || readOnly2 != readOnly {
			t.Fatalf("%s: %v, %v, %q; before %v, %q", again, err, alg2, readOnly2, alg, readOnly)
		}
	})
}
