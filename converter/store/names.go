package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"github.com/particle-os/particle/converter/fsverity"
	"golang.org/x/sys/unix"
)

const (
	maxComponent = 255  // NAME_MAX
	maxRefName   = 3072 // leaves room for the store's own path below PATH_MAX
)

// An Entry is a stream or an image of the store.
type Entry struct {
	// ID is a stream's content id, as "oci-layer-sha256:…", or an image's digest in
	// hexadecimal.
	ID     string          `json:"id"`
	Digest fsverity.Digest `json:"digest"`
}

// A Ref is a name that keeps a stream or an image from being collected.
type Ref struct {
	Name   string `json:"name"`   // below refs/, as "oci/debian:13"
	Target string `json:"target"` // the ID of the entry
	// Digest is that of the entry, zero where the ref leads nowhere.
	Digest fsverity.Digest `json:"digest"`
}

func checkComponent(c string) error {
	if c == "" || c == "." || c == ".." || len(c) > maxComponent || strings.ContainsAny(c, "/\x00") {
		return fmt.Errorf("%w: %q: want 1 to %d bytes without slashes, not %q or %q", ErrBadName, c, maxComponent, ".", "..")
	}
	return nil
}

// checkRefName accepts names whose components, between slashes, are file names.
func checkRefName(name string) error {
	if len(name) > maxRefName {
		return fmt.Errorf("%w: a ref's name of %d bytes, want at most %d", ErrBadName, len(name), maxRefName)
	}
	for c := range strings.SplitSeq(name, "/") {
		if err := checkComponent(c); err != nil {
			return fmt.Errorf("ref %q: %w", name, err)
		}
	}
	return nil
}

func checkEntryName(kind Kind, name string) error {
	switch kind {
	case Images:
		if _, err := fsverity.Parse(name); err != nil {
			return fmt.Errorf("image %q: %w: %w", name, ErrBadName, err)
		}
		return nil
	case Streams:
		if name == refsDir {
			return fmt.Errorf("stream %q: %w", name, ErrBadName)
		}
		if err := checkComponent(name); err != nil {
			return fmt.Errorf("stream %q: %w", name, err)
		}
		return nil
	}
	return fmt.Errorf("kind %q: %w: want %q or %q", kind, ErrBadName, Images, Streams)
}

// parseObjectLink reads the target of an entry's link.
func (s *Store) parseObjectLink(target string) (fsverity.Digest, error) {
	path, ok := strings.CutPrefix(target, "../"+objectsDir+"/")
	if !ok {
		return fsverity.Digest{}, fmt.Errorf("%w: link leads to %q, want ../%s/xx/…", ErrCorrupt, target, objectsDir)
	}
	d, err := fsverity.ParsePath(path)
	if err != nil {
		return d, fmt.Errorf("%w: link leads to %q: %w", ErrCorrupt, target, err)
	}
	if d.Algorithm() != s.alg {
		return d, fmt.Errorf("%w: link leads to %q: %w", ErrCorrupt, target, ErrAlgorithm)
	}
	return d, nil
}

// entry returns the digest of the stream or image with the given ID.
func (s *Store) entry(kind Kind, id string) (fsverity.Digest, error) {
	if err := checkEntryName(kind, id); err != nil {
		return fsverity.Digest{}, err
	}
	target, err := os.Readlink(s.path(string(kind), id))
	if errors.Is(err, fs.ErrNotExist) {
		return fsverity.Digest{}, fmt.Errorf("%s %q: %w", kind.one(), id, ErrNotFound)
	}
	if err != nil {
		return fsverity.Digest{}, fmt.Errorf("%s %q: %w", kind.one(), id, err)
	}
	d, err := s.parseObjectLink(target)
	if err != nil {
		return d, fmt.Errorf("%s %q: %w", kind.one(), id, err)
	}
	return d, nil
}

func (k Kind) one() string { return strings.TrimSuffix(string(k), "s") }

// resolve returns the digest of what name means: an ID, "refs/" and a ref's name,
// or, where there is no such ID, a ref's name.
func (s *Store) resolve(kind Kind, name string) (fsverity.Digest, error) {
	ref, isRef := strings.CutPrefix(name, refsDir+"/")
	if !isRef && checkEntryName(kind, name) == nil {
		d, err := s.entry(kind, name)
		if err == nil || !errors.Is(err, ErrNotFound) {
			return d, err
		}
	}
	id, err := s.ref(kind, ref)
	if err != nil {
		return fsverity.Digest{}, err
	}
	d, err := s.entry(kind, id)
	if err != nil {
		return d, fmt.Errorf("ref %q: %w", ref, err)
	}
	return d, nil
}

// StreamDigest returns the digest of the split stream with that content id, or ref.
func (s *Store) StreamDigest(name string) (fsverity.Digest, error) { return s.resolve(Streams, name) }

// HasStream reports whether the store has a stream with that content id.
func (s *Store) HasStream(id string) bool {
	_, err := s.entry(Streams, id)
	return err == nil
}

// StreamRef returns the content id of the stream that the ref names.
func (s *Store) StreamRef(name string) (id string, err error) { return s.ref(Streams, name) }

// ref returns the ID that a ref's link ends with, and ErrNotFound where there is no
// such ref.
func (s *Store) ref(kind Kind, name string) (id string, err error) {
	if err := checkRefName(name); err != nil {
		return "", err
	}
	target, err := os.Readlink(s.path(string(kind), refsDir, name))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTDIR) {
		return "", fmt.Errorf("ref %q of %s: %w", name, kind, ErrNotFound)
	}
	if err != nil {
		return "", fmt.Errorf("ref %q of %s: %w", name, kind, err)
	}
	return filepath.Base(target), nil
}

// ImageDigest returns the digest of an image by its digest in hexadecimal, or ref.
func (s *Store) ImageDigest(name string) (fsverity.Digest, error) { return s.resolve(Images, name) }

// OpenImage opens an image by its digest in hexadecimal, or ref. Only what is known
// under images/ is found: other objects must not be mounted.
func (s *Store) OpenImage(name string) (*os.File, fsverity.Digest, error) {
	d, err := s.resolve(Images, name)
	if err != nil {
		return nil, d, fmt.Errorf("opening image: %w", err)
	}
	f, err := s.OpenObject(d)
	if err != nil {
		return nil, d, fmt.Errorf("opening image %q: %w", name, err)
	}
	return f, d, nil
}

// Streams returns all streams in the order of their IDs.
func (s *Store) Streams() ([]Entry, error) { return s.entries(Streams) }

// Images returns all images in the order of their IDs.
func (s *Store) Images() ([]Entry, error) { return s.entries(Images) }

func (s *Store) entries(kind Kind) ([]Entry, error) {
	dir, err := os.ReadDir(s.path(string(kind)))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listing %s: %w", kind, err)
	}
	var all []Entry
	for _, e := range dir {
		if e.Name() == refsDir {
			continue
		}
		d, err := s.entry(kind, e.Name())
		if errors.Is(err, ErrNotFound) { // removed meanwhile
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("listing %s: %w\nrun \"particle store fsck\"", kind, err)
		}
		all = append(all, Entry{e.Name(), d})
	}
	return all, nil
}

// StreamRefs returns the refs of streams whose names begin with prefix, sorted.
func (s *Store) StreamRefs(prefix string) ([]Ref, error) { return s.refs(Streams, prefix) }

// ImageRefs returns the refs of images, sorted.
func (s *Store) ImageRefs() ([]Ref, error) { return s.refs(Images, "") }

func (s *Store) refs(kind Kind, prefix string) ([]Ref, error) {
	var all []Ref
	err := s.walkRefs(kind, func(name, target string) error {
		if !strings.HasPrefix(name, prefix) {
			return nil
		}
		r := Ref{Name: name, Target: filepath.Base(target)}
		d, err := s.entry(kind, r.Target)
		if err == nil {
			r.Digest = d
		} else if !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrBadName) {
			return fmt.Errorf("ref %q: %w\nrun \"particle store fsck\"", name, err)
		}
		all = append(all, r)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing refs of %s: %w", kind, err)
	}
	sort.Slice(all, func(i, j int) bool { return all[i].Name < all[j].Name })
	return all, nil
}

// walkRefs calls do for each link below refs/, with its name there and its target.
func (s *Store) walkRefs(kind Kind, do func(name, target string) error) error {
	root := s.path(string(kind), refsDir)
	return filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // nothing there, or removed meanwhile
		}
		if err != nil || e.IsDir() {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		target, err := os.Readlink(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: %q is not a link: %w", ErrCorrupt, path, err)
		}
		return do(name, target)
	})
}

// RemoveRef removes a name. What it named stays until the next GC. The error is
// ErrNotFound where there is no such ref.
func (s *Store) RemoveRef(kind Kind, name string) error {
	if err := s.removeRef(kind, name); err != nil {
		return fmt.Errorf("removing ref %q of %s: %w", name, kind, err)
	}
	return nil
}

func (s *Store) removeRef(kind Kind, name string) error {
	if s.readOnly != "" {
		return fmt.Errorf("%w: %q: %s", ErrReadOnly, s.dir, s.readOnly)
	}
	if err := checkRefName(name); err != nil {
		return err
	}
	root := s.path(string(kind), refsDir)
	path := filepath.Join(root, name)
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || err == nil && st.IsDir() {
		return ErrNotFound
	}
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return ErrNotFound
		}
		return err
	}
	dir := filepath.Dir(path)
	if err := syncDir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Directories that hold other refs stay: rmdir refuses them.
	for ; dir != root; dir = filepath.Dir(dir) {
		if unix.Rmdir(dir) != nil {
			break
		}
	}
	return nil
}
