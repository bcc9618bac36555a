package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/scan"
)

// A digestStore is the directory of mkcomposefs --digest-store: files by their
// digest, xx/rest, and nothing else. Objects that are there already are kept.
type digestStore struct {
	scan.Objects // computes digests
	dir          string

	mu   sync.Mutex
	dirs map[string]bool // those that got an object
}

func newDigestStore(dir string) *digestStore {
	return &digestStore{Objects: scan.Hash(fsverity.SHA256), dir: dir, dirs: map[string]bool{}}
}

// PutFile implements scan.Objects.
func (s *digestStore) PutFile(ctx context.Context, f *os.File, size int64) (fsverity.Digest, error) {
	digest, err := s.Objects.PutFile(ctx, f, size)
	if err != nil {
		return digest, err
	}
	object := filepath.Join(s.dir, digest.Path())
	if _, err := os.Lstat(object); err == nil {
		return digest, nil
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return digest, err
	}
	if err := s.store(f, object, digest); err != nil {
		return digest, fmt.Errorf("storing %s: %w", digest, err)
	}
	return digest, nil
}

func (s *digestStore) store(f *os.File, object string, digest fsverity.Digest) (err error) {
	dir := filepath.Dir(object)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(s.dir, ".tmp")
	if err != nil {
		return err
	}
	defer func() {
		tmp.Close()
		if err != nil {
			os.Remove(tmp.Name())
		}
	}()
	// A clone shares the blocks of the source where the filesystem can. ReadFrom
	// copies within the kernel where that can.
	if err := unix.IoctlFileClone(int(tmp.Fd()), int(f.Fd())); err != nil {
		if _, err := tmp.ReadFrom(f); err != nil {
			return err
		}
	}
	if err := tmp.Chmod(0o644); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	if err := s.seal(tmp.Name(), digest); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), object); err != nil {
		return err
	}
	s.mu.Lock()
	s.dirs[dir] = true
	s.mu.Unlock()
	return nil
}

// seal enables fs-verity, where there is any, and makes sure that the file has the
// digest that it is going to be named by: its source may have changed since that was
// computed.
func (s *digestStore) seal(name string, want fsverity.Digest) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	var got fsverity.Digest
	if fsverity.Enable(f, want.Algorithm()) == nil {
		got, err = fsverity.Measure(f)
	} else {
		got, _, err = fsverity.Read(want.Algorithm(), f)
	}
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("%w: its digest is %s now", scan.ErrChanged, got)
	}
	return nil
}

// sync makes the names of new objects last.
func (s *digestStore) sync() error {
	var errs []error
	for dir := range s.dirs {
		errs = append(errs, syncDir(dir))
	}
	if len(s.dirs) > 0 {
		errs = append(errs, syncDir(s.dir))
	}
	return errors.Join(errs...)
}

func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
