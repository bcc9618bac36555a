package registry

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// archiveTarget writes a tar: of an OCI layout, or of docker save's form. The same
// image and tag give the same bytes.
type archiveTarget struct {
	*staging
	docker      bool
	maxUnpacked int64 // bytes of a layer
}

// newArchiveTarget stages beside the new file, where the space for it must be anyway.
func newArchiveTarget(ref Ref, opts *Options, docker bool) (*archiveTarget, error) {
	fi, err := os.Stat(ref.Path)
	switch {
	case err == nil && !fi.Mode().IsRegular():
		return nil, fmt.Errorf("%w: %q is no regular file, so nothing can take its place at once; write to a new file", ErrUnsupported, ref.Path)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	dir := opts.TempDir
	if dir == "" {
		dir = filepath.Dir(ref.Path)
	}
	s, err := newStaging(ref, dir, stagingPrefix)
	if err != nil {
		return nil, err
	}
	return &archiveTarget{staging: s, docker: docker, maxUnpacked: opts.maxUnpacked()}, nil
}

func createArchive(ref Ref, opts *Options) (Target, error) {
	return newArchiveTarget(ref, opts, false)
}

func (t *archiveTarget) PutBlob(ctx context.Context, desc v1.Descriptor, open func() (io.ReadCloser, error)) error {
	if t.docker {
		return t.put(ctx, desc, open, t.unpackBlob)
	}
	return t.put(ctx, desc, open, copyBlob)
}

func (t *archiveTarget) PutManifest(ctx context.Context, raw []byte, mediaType string) error {
	return t.finish(raw, mediaType, func(doc *document) error {
		members := map[string]member{}
		var err error
		if t.docker {
			err = t.addDocker(members, doc.manifest)
		} else {
			err = t.addLayout(members, raw, doc)
		}
		if err != nil {
			return err
		}
		return writeFile(t.ref.Path, func(f *os.File) error { return writeTar(ctx, f, members) })
	})
}

// addLayout names the files of an OCI layout. Only the blobs of this image go in,
// whatever else was put.
func (t *archiveTarget) addLayout(members map[string]member, raw []byte, doc *document) error {
	for _, d := range append([]v1.Descriptor{doc.manifest.Config}, doc.manifest.Layers...) {
		members[blobName(d.Digest)] = member{path: t.blobs[d.Digest].path}
	}
	desc := describe(raw, doc.mediaType)
	members[blobName(desc.Digest)] = member{bytes: raw}
	members[layoutFile] = member{bytes: []byte(layoutContent)}
	index := &v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
	out, err := json.Marshal(addToIndex(index, desc, t.ref.Tag))
	members[indexFile] = member{bytes: out}
	return err
}

// A member is a file of an archive: a file of this machine, or bytes.
type member struct {
	path  string
	bytes []byte
}

// writeTar writes files in the order of their names, each after its directories, with
// owner 0 and time 0, so that the bytes depend on nothing else.
func writeTar(ctx context.Context, w io.Writer, members map[string]member) error {
	tw := tar.NewWriter(w)
	dirs := make(map[string]bool)
	for _, name := range slices.Sorted(maps.Keys(members)) {
		for i, c := range name {
			if dir := name[:i]; c == '/' && !dirs[dir] {
				dirs[dir] = true
				if err := tw.WriteHeader(tarHeader(dir+"/", tar.TypeDir, 0o755, 0)); err != nil {
					return err
				}
			}
		}
		if err := members[name].write(ctx, tw, name); err != nil {
			return fmt.Errorf("writing %q: %w", name, err)
		}
	}
	return tw.Close()
}

func tarHeader(name string, typ byte, mode, size int64) *tar.Header {
	hdr := &tar.Header{Typeflag: typ, Name: name, Mode: mode, Size: size, ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR}
	if size >= 1<<33 {
		hdr.Format = tar.FormatPAX // 11 octal digits are all that ustar has for a size
	}
	return hdr
}

func (m member) write(ctx context.Context, tw *tar.Writer, name string) error {
	var r io.Reader = strings.NewReader(string(m.bytes))
	size := int64(len(m.bytes))
	if m.path != "" {
		f, err := os.Open(m.path)
		if err != nil {
			return err
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		r, size = f, fi.Size()
	}
	if err := tw.WriteHeader(tarHeader(name, tar.TypeReg, 0o644, size)); err != nil {
		return err
	}
	_, err := io.Copy(tw, &contextReader{ctx, r})
	return err
}
