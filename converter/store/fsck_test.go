package store

import (
	"context"
	"encoding/json"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/fsverity"
)

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
