package scan

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// TestLive changes a file a number of times while it is read: a live directory has the
// last state, until there is no end to it.
func TestLive(t *testing.T) {
	for _, tt := range []struct {
		times int
		ok    bool
	}{{1, true}, {3, true}, {maxRereading + 1, false}} {
		t.Run(fmt.Sprint(tt.times), func(t *testing.T) {
			d := newDir(t)
			d.write("file", strings.Repeat("x", 100))
			want := ""
			n := 0
			o := hook{Hash(fsverity.SHA256), func(*os.File) {
				if n++; n <= tt.times {
					want = strings.Repeat("y", 100+n)
					d.write("file", want)
				}
			}}
			got, err := Dir(context.Background(), d.root, o, Options{Live: true})
			if !tt.ok {
				if !errors.Is(err, ErrChanged) {
					t.Errorf("got %v, want ErrChanged", err)
				}
				return
			}
			d.check(err)
			f := got.Lookup("/file").File
			if f.Size != int64(len(want)) || f.Object != fsverity.Sum(fsverity.SHA256, []byte(want)) {
				t.Errorf("got %d bytes, %s; want the last content, of %d bytes", f.Size, f.Object, len(want))
			}
		})
	}
}

// TestLiveChurn scans while names come, go and change their types: what nobody touches
// is all there, and nothing makes the scan fail.
func TestLiveChurn(t *testing.T) {
	d := newDir(t)
	for i := range 50 {
		d.write(fmt.Sprintf("still%d", i), strings.Repeat("x", 100+i))
	}
	var stop atomic.Bool
	var churn sync.WaitGroup
	var turns atomic.Int64
	for i := range 2 {
		churn.Go(func() {
			for !stop.Load() {
				a, b := d.path(fmt.Sprintf("a%d", i)), d.path(fmt.Sprintf("b%d", i))
				os.WriteFile(a, []byte(strings.Repeat("z", 200)), 0o600)
				os.Rename(a, b)
				os.Remove(b)
				os.Symlink("nowhere", b)
				os.Remove(b)
				os.MkdirAll(b+"/sub/sub", 0o700)
				os.WriteFile(b+"/sub/file", []byte("small"), 0o600)
				os.Link(b+"/sub/file", a)
				os.RemoveAll(b)
				os.Remove(a)
				turns.Add(1)
			}
		})
	}
	defer churn.Wait()
	defer stop.Store(true)
	for range 200 {
		got, err := Dir(context.Background(), d.root, Hash(fsverity.SHA256), Options{Live: true})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 50 {
			if n := got.Root.Dir[fmt.Sprintf("still%d", i)]; n == nil || n.Type() != tree.TypeRegular || n.File.Object.IsZero() {
				t.Fatalf("still%d: got %v, want a file with a digest", i, n)
			}
		}
	}
	if turns.Load() == 0 {
		t.Error("nothing changed meanwhile: the test showed nothing")
	}
}
