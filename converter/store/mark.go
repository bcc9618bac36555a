package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/particle-os/particle/converter/fsverity"
)

// An ImageObjects lists the objects that an EROFS image of size bytes refers to, in
// any order, perhaps several times. This package cannot read such images itself.
type ImageObjects func(r io.ReaderAt, size int64) ([]fsverity.Digest, error)

// errNoImageObjects is for callers that forgot the function.
var errNoImageObjects = errors.New("no function was given that lists an image's objects")

// A marker finds what must be kept: everything that the things it walks refer to.
type marker struct {
	s            *Store
	imageObjects ImageObjects
	live         map[fsverity.Digest]struct{} // objects that must stay
	walked       map[fsverity.Digest]struct{} // streams and images among them
}

func (s *Store) newMarker(f ImageObjects) *marker {
	return &marker{s, f, map[fsverity.Digest]struct{}{}, map[fsverity.Digest]struct{}{}}
}

// A pending thing is still to be walked.
type pending struct {
	digest fsverity.Digest
	via    string // what refers to it
	kind   Kind   // "" where only its content tells
}

// walk marks a stream or an image and all that it leads to. A thing that is missing
// or cannot be read is an error: what it refers to is unknown then, so that nothing
// may be removed.
func (m *marker) walk(ctx context.Context, start pending) error {
	stack := []pending{start}
	for len(stack) > 0 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		p := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if _, ok := m.walked[p.digest]; ok {
			continue
		}
		named, err := m.one(p)
		if err != nil {
			return fmt.Errorf("reading what %s refers to: %w", p.via, err)
		}
		m.walked[p.digest] = struct{}{}
		for name, d := range named {
			stack = append(stack, pending{d, fmt.Sprintf("%s (%q)", p.via, name), ""})
		}
	}
	return nil
}

// one marks a thing and its objects, and returns what else it names.
func (m *marker) one(p pending) (map[string]fsverity.Digest, error) {
	f, err := m.s.OpenObject(p.digest)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m.live[p.digest] = struct{}{}
	kind := p.kind
	if kind == "" {
		if kind, err = sniff(f); err != nil {
			return nil, err
		}
	}
	switch kind {
	case Images:
		digests, err := m.s.imageObjects(f, m.imageObjects)
		for _, d := range digests {
			m.live[d] = struct{}{}
		}
		return nil, err
	case Streams:
		st, err := f.Stat()
		if err != nil {
			return nil, err
		}
		r, err := newStreamReader(f, st.Size(), m.s, m.s.alg)
		if err != nil {
			return nil, err
		}
		defer r.Close()
		for d, err := range r.ObjectRefs() {
			if err != nil {
				return nil, err
			}
			m.live[d] = struct{}{}
		}
		return r.NamedRefs(), nil
	}
	return nil, nil // a plain object
}

// imageObjects lists the objects of the image f.
func (s *Store) imageObjects(f *os.File, list ImageObjects) ([]fsverity.Digest, error) {
	if list == nil {
		return nil, errNoImageObjects
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	digests, err := list(f, st.Size())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	for _, d := range digests {
		if d.Algorithm() != s.alg {
			return nil, fmt.Errorf("%w: the image refers to object %s: %w", ErrCorrupt, d, ErrAlgorithm)
		}
	}
	return digests, nil
}

// sniff tells by its content what a stream refers to by name: another stream, an
// EROFS image, or anything else ("").
func sniff(f io.ReaderAt) (Kind, error) {
	const superblock = 1024 // its place, and its magic number (Linux fs/erofs/erofs_fs.h)
	var b [superblock + 4]byte
	n, err := f.ReadAt(b[:], 0)
	if err != nil && err != io.EOF {
		return "", err
	}
	switch {
	case n >= headerSize && (bytes.HasPrefix(b[:], []byte(streamMagic)) || bytes.HasPrefix(b[18:], []byte(streamMagic))):
		return Streams, nil
	case n == len(b) && binary.LittleEndian.Uint32(b[superblock:]) == 0xE0F5E1E2:
		return Images, nil
	}
	return "", nil
}

// markRefs walks all that has a name. It returns the paths of refs that lead nowhere.
func (m *marker) markRefs(ctx context.Context) (dangling []string, err error) {
	for _, kind := range []Kind{Images, Streams} {
		refs, err := m.s.refs(kind, "")
		if err != nil {
			return nil, err
		}
		for _, r := range refs {
			path := string(kind) + "/" + refsDir + "/" + r.Name
			if r.Digest.IsZero() {
				dangling = append(dangling, path)
				continue
			}
			if err := m.walk(ctx, pending{r.Digest, path, kind}); err != nil {
				return nil, err
			}
		}
	}
	return dangling, nil
}
