package layer

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
)

// The uncompressed layer flows in chunks from one goroutine that decompresses to
// two readers: one that hashes it, and the tar reader.
const (
	chunkSize = 256 << 10
	maxChunks = 16 // 4 MiB between the decompressor and the slower reader
)

// A chunk is a piece of the stream. It is free again when both readers are done.
type chunk struct {
	buf  [chunkSize]byte
	n    int
	refs atomic.Int32
}

var chunkPool = sync.Pool{New: func() any { return new(chunk) }}

// A stream is the reading end of the uncompressed layer.
type stream struct {
	free, hash, tar chan *chunk // none ever blocks a sender: each holds all chunks
	sum             chan []byte
	made            int

	cur *chunk
	off int
	err error // the stream's end; written before tar is closed
}

func startStream(ctx context.Context, r io.Reader, max int64) *stream {
	s := &stream{
		free: make(chan *chunk, maxChunks),
		hash: make(chan *chunk, maxChunks),
		tar:  make(chan *chunk, maxChunks),
		sum:  make(chan []byte, 1),
	}
	go s.produce(ctx, r, max)
	go func() {
		h := sha256.New()
		for c := range s.hash {
			h.Write(c.buf[:c.n])
			s.release(c)
		}
		s.sum <- h.Sum(nil)
	}()
	return s
}

func (s *stream) produce(ctx context.Context, r io.Reader, max int64) {
	defer close(s.hash)
	defer close(s.tar)
	for total := int64(0); ; {
		c := s.get(ctx)
		if c == nil {
			s.err = ctx.Err()
			return
		}
		n, err := fill(r, c.buf[:])
		if total += int64(n); total > max {
			s.err = tooLarge(max)
			return
		}
		if c.n = n; n > 0 {
			c.refs.Store(2)
			s.hash <- c
			s.tar <- c
		}
		if err != nil {
			s.err = err
			return
		}
	}
}

func tooLarge(max int64) error {
	return fmt.Errorf("%w: it has more than %d bytes uncompressed; --max-layer-size raises the limit", ErrTooLarge, max)
}

// fill reads until p is full. Its error is that of r.
func fill(r io.Reader, p []byte) (n int, err error) {
	for empty := 0; n < len(p) && err == nil; {
		var m int
		if m, err = r.Read(p[n:]); m == 0 && err == nil {
			if empty++; empty == 100 {
				return n, io.ErrNoProgress
			}
			continue
		}
		empty = 0
		n += m
	}
	return n, err
}

// get returns a chunk to fill, nil when ctx is done.
func (s *stream) get(ctx context.Context) *chunk {
	if ctx.Err() != nil {
		return nil
	}
	select {
	case c := <-s.free:
		return c
	default:
	}
	if s.made < maxChunks {
		s.made++
		return chunkPool.Get().(*chunk)
	}
	select {
	case c := <-s.free:
		return c
	case <-ctx.Done():
		return nil
	}
}

func (s *stream) release(c *chunk) {
	if c.refs.Add(-1) == 0 {
		s.free <- c
	}
}

// Read returns io.EOF, or the error that ended the stream, after its last byte.
func (s *stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if s.cur == nil {
		c, ok := <-s.tar
		if !ok {
			return 0, s.err
		}
		s.cur, s.off = c, 0
	}
	n := copy(p, s.cur.buf[s.off:s.cur.n])
	if s.off += n; s.off == s.cur.n {
		s.release(s.cur)
		s.cur = nil
	}
	return n, nil
}

// close waits for the goroutines, after the context was cancelled or the stream
// read to its end, and returns the SHA-256 of the whole.
func (s *stream) close() []byte {
	if s.cur != nil {
		s.release(s.cur)
		s.cur = nil
	}
	for c := range s.tar {
		s.release(c)
	}
	sum := <-s.sum
	for {
		select {
		case c := <-s.free:
			chunkPool.Put(c)
		default:
			return sum
		}
	}
}
