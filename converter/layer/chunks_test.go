package layer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

func TestFromChunksFailures(t *testing.T) {
	ctx := context.Background()
	in := tarOf(file("a", strings.Repeat("x", 1000)), file("b", "y"))
	m, rec := newMemory(), &recorded{}
	res, err := Read(ctx, bytes.NewReader(in), m, rec, Options{})
	if err != nil {
		t.Fatal(err)
	}
	object := slices.IndexFunc(rec.parts, func(p part) bool { return !p.object.IsZero() })
	d := rec.parts[object].object

	// Other ways to record the same bytes.
	for name, parts := range map[string][]part{
		"all inline":         {{inline: in}},
		"body inline":        {rec.parts[0], {inline: in[512:1512]}, {inline: in[1512:]}},
		"body in two pieces": {rec.parts[0], {inline: in[512:600]}, {inline: in[600:]}},
		"empty pieces":       {{}, rec.parts[0], {}, rec.parts[1], {object: d}, {inline: in[1512:]}},
	} {
		tr, err := FromChunks(ctx, &chunkList{parts}, m.open, m, Options{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if diff := tree.Diff(res.Tree, tr); len(diff) > 0 {
			t.Errorf("%s: %v", name, diff)
		}
	}
	// A whole tar as one object.
	whole, _ := m.PutBytes(ctx, in)
	if tr, err := FromChunks(ctx, &chunkList{[]part{{object: whole, size: int64(len(in))}}}, m.open, m, Options{}); err != nil || len(tree.Diff(res.Tree, tr)) > 0 {
		t.Errorf("one object: %v", err)
	}

	short, _ := m.PutBytes(ctx, in[:300])
	other := fsverity.Sum(fsverity.SHA512, []byte("x"))
	absent := fsverity.Sum(fsverity.SHA256, []byte("absent"))
	bad := errors.New("bad disk")
	for _, c := range []struct {
		name   string
		chunks Chunks
		opts   Options
		is     error
	}{
		{"other algorithm", &chunkList{[]part{rec.parts[0], {object: other, size: 1000}}}, Options{}, ErrChunks},
		{"negative size", &chunkList{[]part{rec.parts[0], {object: d, size: -1}}}, Options{}, ErrChunks},
		{"no body", &chunkList{rec.parts[:1]}, Options{}, ErrTruncated},
		{"short object", &chunkList{[]part{{object: short, size: 512}}}, Options{}, ErrChunks},
		{"absent object", &chunkList{[]part{{object: absent, size: 1000}}}, Options{}, nil},
		{"failing reader", &failingChunks{parts: rec.parts, err: bad}, Options{}, bad},
		{"failing reader behind the end", &failingChunks{parts: append(slices.Clone(rec.parts), part{inline: make([]byte, 1)}, part{inline: make([]byte, 1)}), err: bad}, Options{}, bad},
		{"too large", &chunkList{rec.parts}, Options{MaxSize: 1200}, ErrTooLarge},
	} {
		if _, err := FromChunks(ctx, c.chunks, m.open, m, c.opts); err == nil || c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%s: got %v, want the kind %v", c.name, err, c.is)
		}
	}
}

// failingChunks ends in an error.
type failingChunks struct {
	parts []part
	err   error
}

func (f *failingChunks) Next() ([]byte, fsverity.Digest, int64, error) {
	if len(f.parts) == 0 {
		return nil, fsverity.Digest{}, 0, f.err
	}
	p := f.parts[0]
	f.parts = f.parts[1:]
	return p.inline, p.object, p.size, nil
}

func TestAssembleChecksSizes(t *testing.T) {
	m := newMemory()
	d, _ := m.PutBytes(context.Background(), make([]byte, 100))
	for _, size := range []int64{99, 101, -1} {
		if err := Assemble(context.Background(), io.Discard, &chunkList{[]part{{object: d, size: size}}}, m.open); !errors.Is(err, ErrChunks) {
			t.Errorf("size %d: got %v", size, err)
		}
	}
	if err := Assemble(context.Background(), io.Discard, &failingChunks{err: errors.ErrUnsupported}, m.open); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("got %v", err)
	}
}
