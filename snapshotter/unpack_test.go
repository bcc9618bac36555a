package snapshotter_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
	"github.com/particle-os/particle/snapshotter"
	"github.com/particle-os/particle/tests/program"
)

type mountT = cmount.Mount

// pulled pulls an image and returns what a container sees of it.
func pulled(t testing.TB, c *client, i *image) *tree.Tree {
	t.Helper()
	ctx := inNamespace(t.Context())
	top, err := c.pull(ctx, i)
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := c.sn.Prepare(ctx, "run", top)
	if err != nil {
		t.Fatal(err)
	}
	return look(t, mounts)
}

// unlisted are the directories of testImage without an entry of their own, whose
// times are those of unpacking or none.
var unlisted = []string{"/", "/bin", "/var", "/var/lib", "/usr"}

func sameImage(t testing.TB, want, got *tree.Tree) {
	t.Helper()
	for _, tr := range []*tree.Tree{want, got} {
		for _, path := range unlisted {
			if n := tr.Lookup(path); n != nil {
				n.MtimeSec, n.MtimeNsec = 0, 0
			}
		}
	}
	for _, d := range tree.Diff(want, got) {
		t.Error(d)
	}
}

const (
	diffIDLabel = snapshots.LabelSnapshotDiffID
	parentLabel = "containerd.io/snapshot/parent-chain-id"
)

// versions are the releases of containerd, by the labels that they give.
var versions = map[string][]string{
	"2.4": nil,
	"2.2": {diffIDLabel},
	"1.6": {diffIDLabel, parentLabel},
}

// TestUnpack unpacks by each way and compares with the overlayfs snapshotter.
func TestUnpack(t *testing.T) {
	requireMounts(t)
	i := testImage(t)
	want := func(t *testing.T) *tree.Tree { return pulled(t, newClient(t, newOverlayfs(t), walking, false), i) }
	for _, differ := range []bool{false, true} {
		for _, parallel := range []bool{false, true} {
			t.Run(fmt.Sprintf("differ=%t parallel=%t", differ, parallel), func(t *testing.T) {
				e := mustOpen(t, t.TempDir(), snapshotter.Options{})
				how := walking
				if differ {
					how = ours(e)
				}
				c := newClient(t, e, how, parallel)
				got := pulled(t, c, i)
				want := want(t)
				if parallel && !differ {
					// What writes into a directory without seeing the layers below cannot
					// know what they say of a parent. It is so with all snapshotters.
					for _, tr := range []*tree.Tree{want, got} {
						for _, path := range []string{"/var", "/var/lib", "/usr"} {
							tr.Lookup(path).Stat = tree.Stat{Mode: tree.DefaultDirMode}
						}
					}
				}
				sameImage(t, want, got)
				st := e.Stats()
				if differ && st.LayersRead != int64(len(i.layers)) || !differ && st.LayersRead != 0 {
					t.Errorf("the differ read %d layers", st.LayersRead)
				}
				if n := int(c.fetched.Load()); n != len(i.layers) {
					t.Errorf("%d layers were fetched, want %d", n, len(i.layers))
				}
			})
		}
	}
}

// TestPresent pulls an image whose layers the store has: nothing may be fetched.
func TestPresent(t *testing.T) {
	requireMounts(t)
	i := testImage(t)
	dir := t.TempDir()
	e := mustOpen(t, dir, snapshotter.Options{})
	want := pulled(t, newClient(t, e, ours(e), false), i)
	for version, without := range versions {
		for _, parallel := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s parallel=%t", version, parallel), func(t *testing.T) {
				if version == "1.6" && parallel {
					t.SkipNow() // it cannot
				}
				// Another containerd's snapshots over the same store.
				other, err := open(t.Context(), t.TempDir(), snapshotter.Options{Log: quiet(t), Store: e.store})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { other.end(t) })
				c := newClient(t, old{other, without}, ours(other), parallel)
				got := pulled(t, c, i)
				sameImage(t, want, got)
				wantFetched := 0
				if version == "2.2" && parallel {
					// Such a client takes no snapshot without a parent but the lowest one.
					wantFetched = len(i.layers) - 1
				}
				if n := int(c.fetched.Load()); n != wantFetched {
					t.Errorf("%d layers were fetched, want %d", n, wantFetched)
				}
				if n := other.Stats().LayersFound; int(n) != len(i.layers)-wantFetched {
					t.Errorf("%d layers were found", n)
				}
			})
		}
	}
	t.Run("another namespace", func(t *testing.T) {
		c := newClient(t, e, ours(e), false)
		sameImage(t, want, pulled(t, c, i))
		if n := c.fetched.Load(); n != 0 {
			t.Errorf("%d layers were fetched", n)
		}
	})
	t.Run("no lookup", func(t *testing.T) {
		other, err := open(t.Context(), t.TempDir(), snapshotter.Options{Log: quiet(t), NoLookup: true, Store: e.store})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { other.end(t) })
		c := newClient(t, other, walking, false)
		sameImage(t, want, pulled(t, c, i))
		if n := c.fetched.Load(); int(n) != len(i.layers) {
			t.Errorf("%d layers were fetched, want all", n)
		}
	})
}

// TestSparse collects garbage between unpacking a layer with a sparse file and making
// the image: the file's content as it reads is nobody's but the image's.
func TestSparse(t *testing.T) {
	requireMounts(t)
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	want := append(make([]byte, 1<<20), big...)
	if err := os.WriteFile(filepath.Join(dir, "sparse"), []byte(big), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := do(file("sparse", "", 0o644), truncate("sparse", 1<<20), func(dir string) error {
		f, err := os.OpenFile(filepath.Join(dir, "sparse"), os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString(big)
		return errors.Join(err, f.Close())
	})(dir); err != nil {
		t.Fatal(err)
	}
	out, err := program.Try("tar", "-C", dir, "--sparse", "--format=pax", "-cf", "-", "sparse")
	if err != nil {
		t.Fatal(err)
	}
	layer := []byte(out)
	if len(layer) > 100_000 {
		t.Fatalf("the layer has %d bytes: it is not sparse", len(layer))
	}
	e := mustOpen(t, t.TempDir(), snapshotter.Options{})
	c := newClient(t, e, ours(e), false)
	ctx := inNamespace(t.Context())
	i := newImage(t, layer, tarOf(t, f("other", big, 0o644)))
	top, err := c.pull(ctx, i)
	if err != nil {
		t.Fatal(err)
	}
	stats, err := converter.GC(ctx, e.store, store.GCOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d objects were collected", stats.ObjectsRemoved)
	mounts, err := c.sn.View(ctx, "view", top)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(mounts[0].Source, "sparse")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("got %d bytes, want %d: %v", len(got), len(want), err)
	}
}
