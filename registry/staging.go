package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// staging is a private directory where the blobs of an image wait for its manifest.
type staging struct {
	ref Ref
	dir string
	// has tells whether the target has a blob already; nil means that it has none.
	has func(v1.Descriptor) bool

	mu    sync.Mutex
	blobs map[v1.Hash]stagedBlob
	done  bool
}

type stagedBlob struct {
	path string // empty where the target had the blob
	size int64
	// content is what the blob unpacks to, where the target wants that instead.
	content *v1.Descriptor
}

// newStaging makes the directory in parent.
func newStaging(ref Ref, parent, pattern string) (*staging, error) {
	dir, err := os.MkdirTemp(parent, pattern)
	if err != nil {
		return nil, err
	}
	return &staging{ref: ref, dir: dir, blobs: make(map[v1.Hash]stagedBlob)}, nil
}

// put stores a blob through write, which gets a verified stream and a new file. Two
// puts of one blob side by side do the work twice and agree.
func (s *staging) put(ctx context.Context, desc v1.Descriptor, open func() (io.ReadCloser, error), write func(*os.File, io.Reader) (*v1.Descriptor, error)) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("writing %s to %s: %w", desc.Digest, s.ref, err)
		}
	}()
	if err := checkDescriptor(desc); err != nil {
		return err
	}
	s.mu.Lock()
	done := s.done
	blob, there := s.blobs[desc.Digest]
	s.mu.Unlock()
	switch {
	case done:
		return errDone
	case there && blob.size != desc.Size:
		return &DigestError{Want: desc.Digest, WantSize: desc.Size, GotSize: min(blob.size, desc.Size+1), Got: desc.Digest}
	case there:
		return nil
	}
	blob = stagedBlob{size: desc.Size}
	if s.has == nil || !s.has(desc) {
		if blob.path, blob.content, err = s.write(ctx, desc, open, write); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, there := s.blobs[desc.Digest]; !there {
		s.blobs[desc.Digest] = blob
	}
	return nil
}

func (s *staging) write(ctx context.Context, desc v1.Descriptor, open func() (io.ReadCloser, error), write func(*os.File, io.Reader) (*v1.Descriptor, error)) (string, *v1.Descriptor, error) {
	rc, err := openVerified(desc, open)
	if err != nil {
		return "", nil, err
	}
	defer rc.Close()
	f, err := os.CreateTemp(s.dir, desc.Digest.Hex+"-")
	if err != nil {
		return "", nil, err
	}
	content, err := write(f, &contextReader{ctx, rc})
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(f.Name())
		return "", nil, err
	}
	return f.Name(), content, nil
}

// copyBlob is the write function for targets that keep blobs as they are.
func copyBlob(f *os.File, r io.Reader) (*v1.Descriptor, error) {
	_, err := io.Copy(f, r)
	return nil, err
}

// get returns the blob that a manifest names.
func (s *staging) get(desc v1.Descriptor) (stagedBlob, error) {
	blob, ok := s.blobs[desc.Digest]
	switch {
	case ok && blob.size == desc.Size:
		return blob, nil
	case !ok && s.has != nil && s.has(desc):
		return stagedBlob{size: desc.Size}, nil
	}
	return stagedBlob{}, fmt.Errorf("%w: blob %s of %d bytes, which the manifest names, was not put", ErrNotFound, desc.Digest, desc.Size)
}

// finish runs commit with a manifest whose blobs are all there, once.
func (s *staging) finish(raw []byte, mediaType string, commit func(*document) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := errDone
	if !s.done {
		err = s.check(raw, mediaType, commit)
	}
	if err != nil {
		return fmt.Errorf("writing the manifest to %s: %w", s.ref, err)
	}
	s.done = true
	return nil
}

func (s *staging) check(raw []byte, mediaType string, commit func(*document) error) error {
	doc, err := parseImage(raw, mediaType)
	if err != nil {
		return err
	}
	for _, desc := range append([]v1.Descriptor{doc.manifest.Config}, doc.manifest.Layers...) {
		if _, err := s.get(desc); err != nil {
			return err
		}
	}
	return commit(doc)
}

// Close removes the directory with what is still in it.
func (s *staging) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done = true
	return os.RemoveAll(s.dir)
}

// writeFile replaces a file so that after a crash the old or the new one is there.
// The name becomes visible when write has succeeded and all bytes are on disk.
func writeFile(name string, write func(*os.File) error) error {
	dir := filepath.Dir(name)
	f, err := os.CreateTemp(dir, stagingPrefix+filepath.Base(name)+"-")
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		os.Remove(f.Name())
		return err
	}
	return syncDir(dir)
}

// syncDir makes renames in a directory last.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
