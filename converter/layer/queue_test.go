package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
)

// TestRing lends parts of random sizes and takes them back, and checks that no two
// lent parts overlap.
func TestRing(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	type lent struct{ start, end int }
	var r ring
	defer r.free()
	var out []lent
	full := 0
	for range 20_000 {
		n := 1 + rnd.IntN(maxBuffered)
		p, start, ok := r.alloc(n)
		if !ok {
			if len(out) == 0 {
				t.Fatalf("nothing lent, and yet no room for %d bytes", n)
			}
			full++
			for range 1 + rnd.IntN(len(out)) {
				r.release(out[0].start, out[0].end)
				out = out[1:]
			}
			continue
		}
		if len(p) != n || cap(p) != n || &p[0] != &r.buf[start] {
			t.Fatalf("got %d bytes at %d, want %d", len(p), start, n)
		}
		for _, l := range out {
			if start < l.end && l.start < start+n {
				t.Fatalf("%d-%d overlaps %d-%d", start, start+n, l.start, l.end)
			}
		}
		out = append(out, lent{start, start + n})
	}
	if full < 1000 {
		t.Errorf("the ring was full %d times only", full)
	}
}

// slow is Objects that takes random times, so that bodies are ready out of order.
type slow struct {
	*memory
	busy, most atomic.Int32
}

func (s *slow) PutBytes(ctx context.Context, data []byte) (fsverity.Digest, error) {
	n := s.busy.Add(1)
	defer s.busy.Add(-1)
	for old := s.most.Load(); n > old && !s.most.CompareAndSwap(old, n); old = s.most.Load() {
	}
	time.Sleep(time.Duration(rand.IntN(200)) * time.Microsecond)
	return s.memory.PutBytes(ctx, data)
}

func TestOrder(t *testing.T) {
	var entries []entry
	for i := range 1000 {
		entries = append(entries, file(strings.Repeat("x", 1+i%200)+"/"+string(rune('a'+i%26)), strings.Repeat(string(rune('a'+i%26)), 65+i*97%40_000)))
	}
	plain := tarOf(entries...)
	var want *recorded
	for _, workers := range []int{1, 8} {
		s, rec := &slow{memory: newMemory()}, &recorded{}
		res, err := Read(context.Background(), bytes.NewReader(plain), s, rec, Options{Workers: workers})
		if err != nil {
			t.Fatal(err)
		}
		checkRead(t, res, s.memory, rec, plain)
		if most := int(s.most.Load()); most > workers || workers > 1 && most < 2 {
			t.Errorf("%d bodies at once, want up to %d", most, workers)
		}
		if want == nil {
			want = rec
		} else if len(want.parts) != len(rec.parts) {
			t.Errorf("got %d parts, want %d", len(rec.parts), len(want.parts))
		}
	}
}

// broken is Objects or a Recorder that fails after some calls.
type broken struct {
	*memory
	recorded
	puts, records atomic.Int32
}

var errFull = errors.New("no space left on device")

func (b *broken) Put(ctx context.Context, r io.Reader, size int64) (fsverity.Digest, error) {
	if b.puts.Add(-1) < 0 {
		return fsverity.Digest{}, errFull
	}
	return b.memory.Put(ctx, r, size)
}

func (b *broken) PutBytes(ctx context.Context, data []byte) (fsverity.Digest, error) {
	if b.puts.Add(-1) < 0 {
		return fsverity.Digest{}, errFull
	}
	return b.memory.PutBytes(ctx, data)
}

func (b *broken) Inline(p []byte) error {
	if b.records.Add(-1) < 0 {
		return errFull
	}
	return b.recorded.Inline(p)
}

func (b *broken) Object(d fsverity.Digest, size int64) error {
	if b.records.Add(-1) < 0 {
		return errFull
	}
	return b.recorded.Object(d, size)
}

// TestStorageFails checks that an error of any call comes back, whatever else is
// going on, and that the name of the file comes with it.
func TestStorageFails(t *testing.T) {
	sparse := rawPAX(map[string]string{"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.realsize": "9000", "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,1000"}, "sparse", strings.Repeat("s", 1000))
	var plain []byte
	for _, part := range [][]byte{sample(), sparse, sample()} {
		plain = append(plain, part[:len(part)-1024]...)
	}
	plain = append(plain, make([]byte, 1024)...)
	rec := &recorded{}
	res, err := Read(context.Background(), bytes.NewReader(plain), newMemory(), rec, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if res.Entries != 11 {
		t.Fatalf("got %d entries", res.Entries)
	}
	for puts := range 6 { // two bodies in each sample, and the sparse file twice
		b := &broken{memory: newMemory()}
		b.puts.Store(int32(puts))
		if _, err := Read(context.Background(), bytes.NewReader(plain), b, nil, Options{}); !errors.Is(err, errFull) || !strings.Contains(err.Error(), `"`) {
			t.Errorf("after %d objects: got %v", puts, err)
		}
	}
	for records := range rec.parts {
		b := &broken{memory: newMemory()}
		b.records.Store(int32(records))
		b.puts.Store(100)
		if _, err := Read(context.Background(), bytes.NewReader(plain), b, b, Options{}); !errors.Is(err, errFull) {
			t.Errorf("after %d records: got %v", records, err)
		}
	}
}

// endless gives a tar of n files of the given size without having it in memory.
func endless(n int, size int64) *io.PipeReader {
	r, w := io.Pipe()
	go func() {
		tw := tar.NewWriter(w)
		block := bytes.Repeat([]byte("content "), 8192)
		for i := range n {
			err := tw.WriteHeader(&tar.Header{Name: fmt.Sprint(i), Typeflag: tar.TypeReg, Size: size})
			for left := size; left > 0 && err == nil; left -= int64(len(block)) {
				_, err = tw.Write(block[:min(left, int64(len(block)))])
			}
			if err != nil {
				w.CloseWithError(err)
				return
			}
		}
		w.CloseWithError(tw.Close())
	}()
	return r
}

// watched is a Recorder that looks at the heap from time to time.
type watched struct {
	calls int
	most  uint64
}

func (w *watched) Inline(p []byte) error { return nil }

func (w *watched) Object(d fsverity.Digest, size int64) error {
	if w.calls++; w.calls%20 == 0 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		w.most = max(w.most, m.HeapAlloc)
	}
	return nil
}

// TestMemory checks that memory does not grow with the layer, neither with the
// number of large files nor with their size, and not while objects are slow either.
func TestMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	const limit = 32 << 20
	for _, c := range []struct {
		name string
		n    int
		size int64
	}{{"buffered", 300, 1 << 20}, {"streamed", 60, 5_000_000}, {"one", 1, 300 << 20}} {
		runtime.GC()
		var before runtime.MemStats
		runtime.ReadMemStats(&before)
		w := &watched{calls: 19} // the first call counts
		res, err := Read(context.Background(), endless(c.n, c.size), Discard(fsverity.SHA256), w, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if res.Entries != c.n {
			t.Errorf("%s: got %d entries", c.name, res.Entries)
		}
		if got := int64(w.most) - int64(before.HeapAlloc); w.most == 0 || got > limit {
			t.Errorf("%s: got %d bytes of memory in use, want at most %d", c.name, got, limit)
		}
	}
}

// TestLargeSparse reads a file of 5 GiB, all of it but a block a hole.
func TestLargeSparse(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	const size = 5 << 30
	in := rawPAX(map[string]string{"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.realsize": fmt.Sprint(size), "GNU.sparse.numblocks": "1", "GNU.sparse.map": "4294967296,100"}, "f", strings.Repeat("x", 100))
	res, err := Read(context.Background(), bytes.NewReader(in), Discard(fsverity.SHA256), nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if n := res.Tree.Lookup("f"); n.File.Size != size || n.File.Object.IsZero() {
		t.Errorf("got %+v", n.File)
	}
	if err := failing(t, in, Options{MaxSize: 1 << 30}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("got %v", err)
	}
}

// cancelling is a Recorder that ends the context.
type cancelling struct {
	recorded
	cancel func()
}

func (c *cancelling) Object(d fsverity.Digest, size int64) error {
	c.cancel()
	return nil
}

func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	for _, size := range []int64{1000, 1 << 20, 10 << 20, 1 << 40} {
		in := endless(1<<30, size)
		if size == 1<<40 {
			cancel() // before the start: no object of this size is ever recorded
		}
		_, err := Read(ctx, in, Discard(fsverity.SHA256), &cancelling{cancel: cancel}, Options{MaxSize: -1})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("files of %d bytes: got %v", size, err)
		}
		in.Close() // ends the writer
		ctx, cancel = context.WithCancel(context.Background())
	}
	cancel()
}
