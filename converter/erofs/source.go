package erofs

import (
	"errors"
	"fmt"
	"io"
)

// A source reads an image by pages, some of which it keeps: memory is bounded
// whatever the image's size, and an image in the page cache costs few system calls.
type source struct {
	r     io.ReaderAt
	size  int64
	pages map[int64][]byte
	queue []int64 // the pages, oldest first

	// budget is how many bytes may still be used as inodes, directories and data.
	// No byte of a composefs image has two uses, so all uses together take no more
	// than the image. Without this a small image whose inodes share their blocks
	// could unfold to any size.
	budget int64
}

const (
	pageSize = 64 << 10
	maxPages = 64
)

func newSource(r io.ReaderAt, size int64) *source {
	return &source{r: r, size: size, pages: map[int64][]byte{}, budget: size}
}

// spend takes n bytes off the budget.
func (s *source) spend(n int64) error {
	if n > s.budget {
		return fmt.Errorf("%w: it uses more bytes than it has", ErrCorrupt)
	}
	s.budget -= n
	return nil
}

// at returns n bytes at an offset, not to be changed. Both may be any number.
func (s *source) at(off, n int64) ([]byte, error) {
	if off < 0 || n < 0 || off > s.size || n > s.size-off {
		return nil, fmt.Errorf("%w: it refers to %d bytes at %d, but has %d bytes", ErrCorrupt, n, off, s.size)
	}
	if n == 0 {
		return nil, nil
	}
	first, last := off/pageSize, (off+n-1)/pageSize
	p, err := s.page(first)
	if err != nil {
		return nil, err
	}
	off -= first * pageSize
	if first == last {
		return p[off : off+n : off+n], nil
	}
	b := append(make([]byte, 0, n), p[off:]...)
	for i := first + 1; i <= last; i++ {
		if p, err = s.page(i); err != nil {
			return nil, err
		}
		b = append(b, p[:min(int64(len(p)), n-int64(len(b)))]...)
	}
	return b, nil
}

func (s *source) page(i int64) ([]byte, error) {
	if p, ok := s.pages[i]; ok {
		return p, nil
	}
	if len(s.queue) == maxPages {
		delete(s.pages, s.queue[0])
		s.queue = append(s.queue[:0], s.queue[1:]...)
	}
	p := make([]byte, min(pageSize, s.size-i*pageSize))
	if n, err := s.r.ReadAt(p, i*pageSize); n < len(p) {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("reading image at %d: %w", i*pageSize, err)
	}
	s.pages[i] = p
	s.queue = append(s.queue, i)
	return p, nil
}
