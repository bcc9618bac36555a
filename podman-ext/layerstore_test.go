package podmanext

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/fsverity"
)

func TestUses(t *testing.T) {
	e := newEnv(t)
	img := image(t, []string{"a"}, []string{"b"})
	e.source.images[testRef], e.source.images["registry.example/app:2"] = img, img
	one, two := Key{testRef, img.layers[0]}, Key{"registry.example/app:2", img.layers[0]}
	for _, key := range []Key{one, two} {
		if _, err := e.Provide(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if err := e.Use(key); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := e.Release(one); err != nil {
		t.Fatal(err)
	}
	if err := e.Detach(); err != nil {
		t.Fatal(err)
	}
	e.open() // as after a crash: mounts are there
	e.Release(one)
	e.Release(one)
	if e.content(two, "a") != "a" {
		t.Error("a layer went that another image uses")
	}
	if err := e.Release(one); !errors.Is(err, ErrNoLayer) {
		t.Errorf("releasing what nobody uses gives %v", err)
	}
	for range 3 {
		if err := e.Release(two); err != nil {
			t.Fatal(err)
		}
	}
	names, err := e.o.Store.StreamRefs(e.prefix)
	if err != nil || len(names) != 0 {
		t.Errorf("names left in the store: %v, %v", names, err)
	}
	if left, _ := filepath.Glob(filepath.Join(e.o.Mounts, "[^.]*")); len(left) != 0 {
		t.Errorf("left mounted: %q", left)
	}
}

// TestUnread: as long as a layer cannot be read, what it may need is kept.
func TestUnread(t *testing.T) {
	e := newEnv(t)
	img := image(t, []string{"a"}, []string{"b"})
	e.source.images[testRef] = img
	for _, digest := range img.layers {
		if _, err := e.Provide(t.Context(), Key{testRef, digest}); err != nil {
			t.Fatal(err)
		}
	}
	counts := func() (names, mounts int) {
		refs, err := e.o.Store.StreamRefs(e.prefix)
		if err != nil {
			t.Fatal(err)
		}
		left, err := filepath.Glob(filepath.Join(e.o.Mounts, "[^.]*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(refs), len(left)
	}
	if err := e.Detach(); err != nil {
		t.Fatal(err)
	}
	hurt := Key{testRef, img.layers[0]}
	if err := os.WriteFile(filepath.Join(e.o.Dir, hurt.path(), infoName), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	e.o.Log = slog.New(slog.NewTextHandler(&log, nil))
	e.open()
	if names, mounts := counts(); names != 2 || mounts != 2 {
		t.Errorf("a layer cannot be read: %d names and %d mounts are left, want 2 and 2", names, mounts)
	}
	if !strings.Contains(log.String(), hurt.path()) {
		t.Errorf("the log does not name the layer:\n%s", log.String())
	}
	// Writing it anew makes it known again, and what nobody uses may go.
	if _, err := e.Provide(t.Context(), hurt); err != nil {
		t.Fatal(err)
	}
	if err := e.Release(hurt); err != nil {
		t.Fatal(err)
	}
	if names, mounts := counts(); names != 1 || mounts != 1 {
		t.Errorf("after all can be read: %d names and %d mounts are left, want 1 and 1", names, mounts)
	}
}

// TestReplace: a layer that is written anew is there all the time.
func TestReplace(t *testing.T) {
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	s := &LayerStore{root: root, o: LayerStoreOptions{Dir: root.Name(), Mounts: root.Name()}}
	e := &entry{key: Key{testRef, digestOf(nil)}, info: LayerInfo{DiffID: digestOf(nil)}}
	e.image = fsverity.Sum(fsverity.SHA256, nil)
	if err := s.writeEntry(e); err != nil {
		t.Fatal(err)
	}
	stop, missing := make(chan bool), make(chan int)
	go func() {
		n := 0
		for {
			select {
			case <-stop:
				missing <- n
				return
			default:
				if _, err := os.Lstat(filepath.Join(root.Name(), e.key.path(), usesName)); err != nil {
					n++
				}
			}
		}
	}()
	for e.uses = range 50 {
		if err := s.writeEntry(e); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	if n := <-missing; n > 0 {
		t.Errorf("the layer was missing %d times", n)
	}
	got, err := s.readEntry(e.key)
	if err != nil || got.uses != 49 {
		t.Errorf("got %+v, %v, want the last one", got, err)
	}
	if left, _ := filepath.Glob(filepath.Join(root.Name(), tempPrefix+"*")); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

func TestBusy(t *testing.T) {
	e := newEnv(t)
	if _, err := OpenLayerStore(e.o); !errors.Is(err, ErrBusy) {
		t.Errorf("a second process gets %v", err)
	}
	if err := UnmountLayers(e.o.Dir, e.o.Mounts); !errors.Is(err, ErrBusy) {
		t.Errorf("unmounting what is served gives %v", err)
	}
	// With mounts of their own as well: there is one front.
	other := e.o
	other.Mounts = t.TempDir()
	if _, err := OpenLayerStore(other); !errors.Is(err, ErrBusy) {
		t.Errorf("a second process with other mounts gets %v", err)
	}
	if err := UnmountLayers(e.o.Dir, other.Mounts); !errors.Is(err, ErrBusy) {
		t.Errorf("unmounting what is served with other mounts gives %v", err)
	}
}
