package layer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
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
