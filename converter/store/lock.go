package store

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	firstPause  = 5 * time.Millisecond
	longPause   = 200 * time.Millisecond
	noticeAfter = 2 * time.Second
)

// lock takes the flock of the store's directory: unix.LOCK_SH, or unix.LOCK_EX
// that keeps everybody else out. It asks again and again rather than sleeping in
// the kernel, because a sleeping flock cannot be given up when ctx ends. Closing
// the file gives the lock back; so does the end of the process, however it comes.
func (s *Store) lock(ctx context.Context, how int) (*os.File, error) {
	return s.lockPath(ctx, s.dir, how)
}

// LockRefs keeps other callers of LockRefs out until release is called: for whoever
// reads an entry in order to commit another one in its place. It is taken besides the
// transaction's lock, and composefs-rs knows nothing of it.
func (s *Store) LockRefs(ctx context.Context) (release func(), err error) {
	f, err := s.lockPath(ctx, s.path(string(Streams)), unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}

func (s *Store) lockPath(ctx context.Context, path string, how int) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("locking store: %w", err)
	}
	start, told := time.Now(), false
	for pause := firstPause; ; pause = min(2*pause, longPause) {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			f.Close()
			return nil, fmt.Errorf("locking store %q: %w", s.dir, err)
		}
		if !told && s.Waiting != nil && time.Since(start) >= noticeAfter {
			told = true
			if how == unix.LOCK_EX {
				s.Waiting(fmt.Sprintf("waiting for store %q: another process reads or writes it", s.dir))
			} else {
				s.Waiting(fmt.Sprintf("waiting for store %q: another process collects its garbage", s.dir))
			}
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			f.Close()
			return nil, fmt.Errorf("waiting for the lock of store %q: %w", s.dir, context.Cause(ctx))
		case <-timer.C:
		}
	}
}
