package erofs_test

import (
	"bytes"
	"testing"

	"github.com/particle-os/particle/converter/dump"
	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/tree"
)

func readImage(tb testing.TB, image []byte) *tree.Tree {
	tb.Helper()
	t, err := erofs.Read(bytes.NewReader(image), int64(len(image)))
	if err != nil {
		tb.Fatal(err)
	}
	return t
}

func printDump(tb testing.TB, t *tree.Tree) string {
	tb.Helper()
	var b bytes.Buffer
	if err := dump.Print(&b, t); err != nil {
		tb.Fatal(err)
	}
	return b.String()
}

// formatOf returns the format to write an image again.
func formatOf(tb testing.TB, image []byte) erofs.Format {
	tb.Helper()
	h, err := erofs.ReadInfo(bytes.NewReader(image))
	if err != nil {
		tb.Fatal(err)
	}
	return []erofs.Format{erofs.V0, erofs.V1, erofs.V1}[h.Version]
}

// TestRoundTrip goes from dumps to images and back, twice.
func TestRoundTrip(t *testing.T) {
	for _, v := range vectors(t) {
		t.Run(v.name, func(t *testing.T) {
			first := parse(t, v.text, dump.Options{})
			image := write(t, first, v.format)
			second := readImage(t, image)
			if changes := tree.Diff(first, second); len(changes) > 0 {
				t.Errorf("the tree has changed: %d changes, %v", len(changes), changes[:min(5, len(changes))])
			}
			if !bytes.Equal(write(t, second, formatOf(t, image)), image) {
				t.Error("the image of what was read differs")
			}
			text := printDump(t, second)
			third := parse(t, []byte(text), dump.Options{Strict: true})
			if printDump(t, third) != text {
				t.Error("the dump of the dump differs")
			}
			if !bytes.Equal(write(t, third, v.format), image) {
				t.Error("the image of the dump of the image differs")
			}
		})
	}
}
