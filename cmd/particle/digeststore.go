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
//
// Objects are written under temporary names, made durable many at a time, and only
// then get their names: after a crash each object that is there is whole.
type digestStore struct {
	scan.Objects // computes digests
	dir          string

	mu      sync.Mutex
	known   map[fsverity.Digest]bool // stored, or being stored
	pending []pendingObject
}

// A pendingObject is complete but for its name.
type pendingObject struct{ tmp, name string }

// maxPending is how many objects are made durable at a time, and how many temporary
// files a crash may leave. One sync of the filesystem takes about as long as that of
// a file.
const maxPending = 512

func newDigestStore(dir string) *digestStore {
	return &digestStore{Objects: scan.Hash(fsverity.SHA256), dir: dir, known: map[fsverity.Digest]bool{}}
}

// PutFile implements scan.Objects. The object is there when close has returned.
func (s *digestStore) PutFile(ctx context.Context, f *os.File, size int64) (fsverity.Digest, error) {
	digest, err := s.Objects.PutFile(ctx, f, size)
	if err != nil {
		return digest, err
	}
	s.mu.Lock()
	known := s.known[digest]
	s.known[digest] = true
	s.mu.Unlock()
	if known {
		return digest, nil
	}
	name := filepath.Join(s.dir, digest.Path())
	if _, err := os.Lstat(name); err == nil {
		return digest, nil
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return digest, err
	}
	if err := s.store(f, name, digest); err != nil {
		return digest, fmt.Errorf("storing %s: %w", digest, err)
	}
	return digest, nil
}

// store copies a file to a temporary one, which is pending then.
func (s *digestStore) store(f *os.File, name string, digest fsverity.Digest) (err error) {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
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
	if err := tmp.Close(); err != nil {
		return err
	}
	if err := seal(tmp.Name(), digest); err != nil {
		return err
	}

	s.mu.Lock()
	s.pending = append(s.pending, pendingObject{tmp.Name(), name})
	var full []pendingObject
	if len(s.pending) >= maxPending {
		full, s.pending = s.pending, nil
	}
	s.mu.Unlock()
	return s.name(full)
}

// seal enables fs-verity, where there is any, and makes sure that the file has the
// digest that it is going to be named by: its source may have changed since that was
// computed.
func seal(name string, want fsverity.Digest) error {
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

// name makes objects durable and gives them their names.
func (s *digestStore) name(objects []pendingObject) error {
	if len(objects) == 0 {
		return nil
	}
	err := s.syncFS()
	for _, o := range objects {
		if err == nil {
			err = os.Rename(o.tmp, o.name)
		}
		if err != nil {
			os.Remove(o.tmp)
		}
	}
	return err
}

// close completes the store, or gives up what is pending if the scan failed.
func (s *digestStore) close(scanned error) error {
	if scanned != nil {
		for _, o := range s.pending {
			os.Remove(o.tmp)
		}
		return scanned
	}
	if err := s.name(s.pending); err != nil {
		return fmt.Errorf("storing objects: %w", err)
	}
	if len(s.known) == 0 {
		return nil
	}
	if err := s.syncFS(); err != nil { // the names
		return fmt.Errorf("storing objects: %w", err)
	}
	return nil
}

// syncFS makes all that was written to the store's filesystem durable.
func (s *digestStore) syncFS() error {
	d, err := os.Open(s.dir)
	if errors.Is(err, os.ErrNotExist) { // nothing was stored
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return &os.PathError{Op: "syncfs", Path: s.dir, Err: err}
	}
	return nil
}
