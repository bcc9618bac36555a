package erofs_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/particle-os/particle/converter/dump"
	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/tree"
)

// FuzzRead checks that whatever can be read can be printed, and written and read
// again.
func FuzzRead(f *testing.F) {
	f.Add(emptyV2())
	f.Add(simpleV2())
	for _, name := range []string{"special.dump", "honggfuzz-bigfile-with-acl.dump", "longlink.dump"} {
		text, err := os.ReadFile(filepath.Join(conformance, name))
		if err != nil {
			f.Fatal(err)
		}
		tr := parse(f, text, dump.Options{})
		f.Add(write(f, tr, erofs.V0))
		f.Add(write(f, tr, erofs.V1))
	}
	for seed := range uint64(3) {
		if image := write(f, randomTree(seed), erofs.V1); len(image) < 100_000 {
			f.Add(image)
		}
	}
	f.Fuzz(func(t *testing.T, image []byte) {
		r, size := bytes.NewReader(image), int64(len(image))
		tr, err := erofs.Read(r, size)
		if err != nil {
			for _, kind := range []error{erofs.ErrCorrupt, erofs.ErrNotComposefs, erofs.ErrUnsupported} {
				if errors.Is(err, kind) {
					return
				}
			}
			t.Fatalf("an error of no kind: %v", err)
		}
		if _, err := erofs.Objects(r, size); err != nil {
			t.Fatal(err)
		}
		if _, err := erofs.ReadView(r, size); err != nil {
			t.Fatal(err)
		}
		text := printDump(t, tr)
		if _, err := dump.Parse(bytes.NewReader([]byte(text)), dump.Options{Strict: true}); err != nil && !errors.Is(err, dump.ErrLimit) {
			t.Fatalf("%v in\n%s", err, text)
		}
		again := readImage(t, write(t, tr, formatOf(t, image)))
		if changes := tree.Diff(tr, again); len(changes) > 0 && !marksWhiteouts(tr) {
			t.Fatalf("the tree has changed: %v", changes)
		}
	})
}

// marksWhiteouts reports whether a tree has xattrs that only Write should make.
func marksWhiteouts(t *tree.Tree) bool {
	found := false
	_ = t.Walk(func(_ string, n *tree.Node) error {
		for _, k := range []string{"trusted.overlay.whiteout", "trusted.overlay.whiteouts", "user.overlay.whiteout", "user.overlay.whiteouts", "trusted.overlay.opaque", "user.overlay.opaque"} {
			if _, ok := n.Xattrs[k]; ok {
				found = true
			}
		}
		return nil
	})
	return found
}

// hasHugeDevice reports whether something without data has a size: it changes the
// image, but is not in it.
func hasHugeDevice(t *tree.Tree) bool {
	found := false
	_ = t.Walk(func(_ string, n *tree.Node) error {
		found = found || n.File != nil && !n.IsRegular()
		return nil
	})
	return found
}

// FuzzDump checks that what a dump says comes back from an image of it.
func FuzzDump(f *testing.F) {
	files, err := filepath.Glob(conformance + "/*.dump")
	if err != nil || len(files) == 0 {
		f.Fatal("no seeds", err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		if len(b) < 40_000 {
			f.Add(b)
		}
	}
	f.Add([]byte(simpleDump))
	f.Add([]byte(printDump(f, randomTree(7))))
	f.Fuzz(func(t *testing.T, text []byte) {
		tr, err := dump.Parse(bytes.NewReader(text), dump.Options{})
		if err != nil {
			return
		}
		image := write(t, tr, erofs.V1)
		back := readImage(t, image)
		if changes := tree.Diff(tr, back); len(changes) > 0 && !marksWhiteouts(tr) {
			t.Fatalf("the tree has changed: %v", changes)
		}
		if !bytes.Equal(write(t, back, erofs.V1), image) && !marksWhiteouts(tr) && !hasHugeDevice(tr) {
			t.Fatal("the image of what was read differs")
		}
	})
}
