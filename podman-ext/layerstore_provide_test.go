package podmanext

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/mount"
)

func TestProvide(t *testing.T) {
	e := newEnv(t)
	img := image(t, []string{"./", "etc/", "etc/a", "etc/b", "long"}, []string{"etc/", "etc/.wh.a", "etc/c"})
	e.source.images[testRef] = img
	for i, digest := range []string{img.layers[0], img.layers[1], tocOf(img.layers[0])} {
		key := Key{testRef, digest}
		l, err := e.Provide(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		n := i % 2
		if l.DiffID != digestOf(img.tars[n]) || l.Size != int64(len(img.tars[n])) || l.Verification == mount.None {
			t.Errorf("layer %d: %+v", i, l)
		}
		r, err := e.Blob(key)
		if err != nil {
			t.Fatal(err)
		}
		blob, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(blob, img.tars[n]) {
			t.Errorf("layer %d: the blob has %d bytes, want %d: %v", i, len(blob), len(img.tars[n]), err)
		}
		r.Close()
	}
	if got := e.content(Key{testRef, img.layers[0]}, "etc/a"); got != "etc/a" {
		t.Errorf("etc/a is %q", got)
	}
	// The second layer deletes in etc and so has all of it, once and for all.
	if got := e.content(Key{testRef, img.layers[1]}, "etc/b"); got != "etc/b" {
		t.Errorf("the second layer has etc/b %q", got)
	}
	if got := e.content(Key{testRef, img.layers[1]}, "etc/a"); got != "" {
		t.Errorf("the second layer has etc/a %q", got)
	}
	if n := img.opened.Load(); n != 2 {
		t.Errorf("%d layers were fetched, want each once", n)
	}
	for _, key := range []Key{{testRef, digestOf([]byte("other"))}, {"registry.example/other:1", img.layers[0]}, {"x", img.layers[0]}, {testRef, "../.."}} {
		if _, err := e.Provide(t.Context(), key); err == nil {
			t.Errorf("%+v was provided", key)
		}
	}
}

// TestClaim: an image that names the digest of another image's layer does not change
// what that one gets.
func TestClaim(t *testing.T) {
	e := newEnv(t)
	good, evil := image(t, []string{"good"}), image(t, []string{"evil"})
	e.source.images["registry.example/evil:1"] = evil
	evil.manifest = bytes.ReplaceAll(evil.manifest, []byte(evil.layers[0]), []byte(good.layers[0]))
	evil.blobs[good.layers[0]] = evil.blobs[evil.layers[0]] // a registry that lies
	if _, err := e.Provide(t.Context(), Key{"registry.example/evil:1", good.layers[0]}); err != nil {
		t.Fatal(err) // the fake source checks no digests: package registry does
	}
	e.source.images[testRef] = good
	if _, err := e.Provide(t.Context(), Key{testRef, good.layers[0]}); err != nil {
		t.Fatal(err)
	}
	if got := e.content(Key{testRef, good.layers[0]}, "good"); got != "good" {
		t.Errorf("the good image has %q", got)
	}
}

// TestMoved: a tag moves to an image that has the same deleting layer on another one.
func TestMoved(t *testing.T) {
	e := newEnv(t)
	upper := []string{"etc/", "etc/.wh.a", "etc/c"}
	old, moved := image(t, []string{"./", "etc/", "etc/a", "etc/old"}, upper), image(t, []string{"./", "etc/", "etc/a", "etc/new"}, upper)
	key := Key{testRef, old.layers[1]}
	e.source.images[testRef] = old
	if _, err := e.Provide(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	if err := e.Use(key); err != nil {
		t.Fatal(err)
	}
	if got := e.content(key, "etc/old"); got != "etc/old" {
		t.Errorf("etc/old is %q", got)
	}
	e.source.images[testRef] = moved
	if _, err := e.Provide(t.Context(), Key{testRef, moved.layers[0]}); err != nil {
		t.Fatal(err)
	}
	// Now it has what both images agree on.
	for name, want := range map[string]string{"etc/old": "", "etc/new": "", "etc/c": "etc/c"} {
		if got := e.content(key, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if l := e.List(); len(l) != 2 || l[0].Uses+l[1].Uses != 1 {
		t.Errorf("the tree has %+v", l)
	}
}

// TestInterrupt: whoever waits may go; the last one ends the work.
func TestInterrupt(t *testing.T) {
	e := newEnv(t)
	img := image(t, []string{"a"}, []string{"b"})
	img.wait[img.layers[0]] = make(chan bool)
	e.source.images[testRef] = img
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 2)
	for _, c := range []context.Context{ctx, t.Context()} {
		go func() {
			_, err := e.Provide(c, Key{testRef, img.layers[0]})
			done <- err
		}()
	}
	time.Sleep(50 * time.Millisecond)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatalf("the interrupted one got %v", err)
	}
	close(img.wait[img.layers[0]])
	if err := <-done; err != nil {
		t.Fatalf("the other one got %v", err)
	}
}

// TestFlightCancelled: who comes after a flight was given up gets one of its own.
func TestFlightCancelled(t *testing.T) {
	s := &LayerStore{ctx: t.Context(), flights: map[string]*flight{}, images: map[string]*resolved{}}
	img := &resolved{users: 1}
	end := make(chan bool)
	fly := func(work func(context.Context) (fsverity.Digest, error)) *flight {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.fly("x", img, work)
	}
	first := fly(func(ctx context.Context) (fsverity.Digest, error) {
		<-end // slow to notice
		return fsverity.Digest{}, ctx.Err()
	})
	s.land(first)
	joined := make(chan bool)
	second := fly(func(ctx context.Context) (fsverity.Digest, error) {
		<-joined
		return fsverity.Digest{}, ctx.Err()
	})
	close(end)
	<-first.done
	if third := fly(nil); third != second {
		t.Fatal("the end of the first flight took the second one away")
	}
	close(joined)
	s.land(second)
	if _, err := second.wait(t.Context()); err != nil {
		t.Errorf("who came later got %v", err)
	}
	s.land(second)
}
