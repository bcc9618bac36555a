package layer

import (
	"context"
	"fmt"
	"sync"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

const (
	// inlineRun is where a run of inline bytes is cut. It shapes the recorded
	// stream, so it must not change.
	inlineRun = 64 << 10
	// maxBuffered is the size in bytes of the largest body that is handed to
	// another goroutine; larger ones stream through.
	maxBuffered = 1 << 20
	ringSize    = 8 << 20 // bodies in flight
	slots       = 128     // parts of the stream in flight
)

// A slot is a part of the split stream: a run of inline bytes, then an object.
type slot struct {
	inline []byte
	object bool
	digest fsverity.Digest
	size   int64

	// A body that a worker stores:
	name       string
	data       []byte     // nil where the object is known already
	start, end int        // of data in the ring
	file       *tree.File // receives the digest, unless nil
	err        error
	done       chan struct{} // holds a token when a worker is done
}

// A queue stores bodies side by side and gives the split stream to the recorder in
// order, all from the goroutine that fills the queue.
type queue struct {
	ctx     context.Context
	objects Objects
	rec     Recorder
	ring    ring

	slots       [slots]slot
	first, last int // the oldest slot in flight; the slot being filled
	tasks       chan *slot
	workers     int // that may still be started
	wg          sync.WaitGroup
}

func newQueue(ctx context.Context, objects Objects, rec Recorder, workers int) *queue {
	return &queue{ctx: ctx, objects: objects, rec: rec, tasks: make(chan *slot, slots), workers: workers}
}

func (q *queue) work() {
	defer q.wg.Done()
	for s := range q.tasks {
		if s.err = q.ctx.Err(); s.err == nil {
			s.digest, s.err = q.objects.PutBytes(q.ctx, s.data)
		}
		s.done <- struct{}{}
	}
}

func (q *queue) at(i int) *slot { return &q.slots[i%slots] }

// inline adds bytes to the stream. It keeps none of p.
func (q *queue) inline(p []byte) error {
	for len(p) > 0 {
		s := q.at(q.last)
		n := min(len(p), inlineRun-len(s.inline))
		s.inline = append(s.inline, p[:n]...)
		if p = p[n:]; len(s.inline) == inlineRun {
			if err := q.advance(); err != nil {
				return err
			}
		}
	}
	return nil
}

// known adds an object that is stored already.
func (q *queue) known(d fsverity.Digest, size int64) error {
	s := q.at(q.last)
	s.object, s.digest, s.size = true, d, size
	return q.advance()
}

// buffer returns room for a body of n bytes, more than 0 and up to maxBuffered, to
// be filled and given to body next.
func (q *queue) buffer(n int) ([]byte, error) {
	for {
		if p, start, ok := q.ring.alloc(n); ok {
			s := q.at(q.last)
			s.data, s.start, s.end = p, start, start+n
			return p, nil
		}
		if err := q.emit(); err != nil {
			return nil, err
		}
	}
}

// body has a worker store what buffer returned last and adds it to the stream. The
// digest will be in file when flush has returned.
func (q *queue) body(name string, file *tree.File) error {
	s := q.at(q.last)
	s.object, s.size, s.name, s.file = true, int64(len(s.data)), name, file
	if s.done == nil {
		s.done = make(chan struct{}, 1)
	}
	if q.workers > 0 {
		q.workers--
		q.wg.Add(1)
		go q.work()
	}
	q.tasks <- s
	return q.advance()
}

// advance ends the slot that is being filled and gives what is ready to the
// recorder.
func (q *queue) advance() error {
	q.last++
	for q.first < q.last {
		s := q.at(q.first)
		if q.last-q.first < slots && s.data != nil && len(s.done) == 0 {
			break
		}
		if err := q.emit(); err != nil {
			return err
		}
	}
	return nil
}

// emit gives the oldest slot to the recorder, when its body is stored.
func (q *queue) emit() error {
	s := q.at(q.first)
	q.first++
	if s.data != nil {
		<-s.done
		q.ring.release(s.start, s.end)
		s.data = nil
		if s.err != nil {
			return fmt.Errorf("storing the content of %q: %w", s.name, s.err)
		}
		if s.file != nil {
			s.file.Object = s.digest
		}
	}
	if len(s.inline) > 0 {
		if err := q.rec.Inline(s.inline); err != nil {
			return fmt.Errorf("recording the layer: %w", err)
		}
	}
	if s.object {
		if err := q.rec.Object(s.digest, s.size); err != nil {
			return fmt.Errorf("recording the layer: %w", err)
		}
	}
	*s = slot{inline: s.inline[:0], done: s.done}
	return nil
}

// flush waits for all bodies and records the rest of the stream.
func (q *queue) flush() error {
	if len(q.at(q.last).inline) > 0 {
		q.last++
	}
	for q.first < q.last {
		if err := q.emit(); err != nil {
			return err
		}
	}
	return nil
}

// close ends the workers. No other method may follow.
func (q *queue) close() {
	close(q.tasks)
	q.wg.Wait()
	q.ring.free()
}

// A ring lends contiguous parts of one buffer, which come back in the same order.
type ring struct {
	buf        *[ringSize]byte
	head, tail int  // lent: from head to tail
	wrapped    bool // lent: from head to the buffer's end, and from its start to tail
}

var ringPool = sync.Pool{New: func() any { return new([ringSize]byte) }}

// alloc lends n bytes, at most half of the buffer, and says where they begin. It
// fails while too much is lent, never when nothing is.
func (r *ring) alloc(n int) (p []byte, start int, ok bool) {
	if r.buf == nil {
		r.buf = ringPool.Get().(*[ringSize]byte)
	}
	switch {
	case !r.wrapped && len(r.buf)-r.tail >= n:
	case !r.wrapped && r.head >= n:
		r.wrapped, r.tail = true, 0
	case r.wrapped && r.head-r.tail >= n:
	default:
		return nil, 0, false
	}
	start = r.tail
	r.tail += n
	return r.buf[start:r.tail:r.tail], start, true
}

// release takes the oldest part back.
func (r *ring) release(start, end int) {
	if start < r.head {
		r.wrapped = false
	}
	if r.head = end; !r.wrapped && r.head == r.tail {
		r.head, r.tail = 0, 0
	}
}

func (r *ring) free() {
	if r.buf != nil {
		ringPool.Put(r.buf)
		r.buf = nil
	}
}
