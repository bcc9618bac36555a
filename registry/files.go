package registry

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// fileSet is the files of a layout or archive, wherever they are. Names are slash
// separated and relative.
type fileSet interface {
	// open opens a regular file; the error wraps ErrNotFound where there is none.
	open(name string) (*file, error)
	Close() error
}

// A file is a part of an open file.
type file struct {
	*io.SectionReader
	close func() error
}

func (f *file) Close() error { return f.close() }

// part returns n bytes from off as a reader that owns the file.
func (f *file) part(off, n int64) io.ReadCloser {
	return &cappedReadCloser{io.NewSectionReader(f.SectionReader, off, n), f}
}

// blobName is where a blob lies in an OCI layout. Hashes are parsed ones, so the
// name cannot lead out of the layout.
func blobName(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }

// dirFiles is the files below a directory.
type dirFiles string

func (d dirFiles) open(name string) (*file, error) {
	// Without O_NONBLOCK, a named pipe in a hostile layout would block forever.
	f, err := os.OpenFile(filepath.Join(string(d), filepath.FromSlash(name)), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %q in %q", ErrNotFound, name, string(d))
	}
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%w: %q in %q is not a regular file", ErrInvalid, name, string(d))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &file{io.NewSectionReader(f, 0, fi.Size()), f.Close}, nil
}

func (d dirFiles) Close() error { return nil }

// maxEntries bounds how many entries of an archive are remembered.
const maxEntries = 1 << 20

// tarFiles is the files in an uncompressed tar, read in place: for each name the
// section of the archive with its content.
type tarFiles struct {
	name    string
	f       *os.File
	entries map[string]tarEntry
}

type tarEntry struct {
	off, size int64
	link      string // the entry that has the content, where not empty
	odd       string // what it is, where it is neither a file nor a link
}

// indexTar reads the headers of an archive. It owns f, also on errors.
//
// Nothing is unpacked, so names that lead outside could do no harm; an archive with
// one is refused all the same, because other programs that are given it will unpack.
func indexTar(ctx context.Context, name string, f *os.File) (_ *tarFiles, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("reading archive %q: %w", name, err), f.Close())
		}
	}()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	t := &tarFiles{name: name, f: f, entries: make(map[string]tarEntry)}
	tr := tar.NewReader(f)
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		hdr, err := tr.Next()
		if err == io.EOF {
			return t, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %v; is it a whole tar file?", ErrInvalid, err)
		}
		entry, err := entryName("", hdr.Name)
		if err != nil {
			return nil, err
		}
		if entry == "" {
			continue // the archive's root directory
		}
		var e tarEntry
		switch hdr.Typeflag {
		case tar.TypeReg:
			// tar.Reader reads whole headers and nothing ahead, so the file stands at
			// the start of the content.
			if e.off, err = f.Seek(0, io.SeekCurrent); err != nil {
				return nil, err
			}
			if sparse(hdr) {
				e.odd = "a sparse file"
			} else if e.size = hdr.Size; e.size > fi.Size()-e.off {
				return nil, fmt.Errorf("%w: %q has %d bytes, but the archive ends before", ErrInvalid, hdr.Name, hdr.Size)
			}
		case tar.TypeSymlink:
			e.link, err = entryName(path.Dir(entry), hdr.Linkname)
		case tar.TypeLink:
			e.link, err = entryName("", hdr.Linkname)
		case tar.TypeDir:
			e.odd = "a directory"
		default:
			e.odd = fmt.Sprintf("an entry of type %q", hdr.Typeflag)
		}
		if err != nil {
			return nil, err
		}
		if len(t.entries) == maxEntries {
			return nil, fmt.Errorf("%w: more than %d entries", ErrInvalid, maxEntries)
		}
		t.entries[entry] = e // the last of several wins, as on unpacking
	}
}

// sparse tells whether the content in the archive is not the file's as it is: the
// PAX form of sparse files (GNU tar manual, "Sparse Formats"). The older form has a
// type of its own.
func sparse(hdr *tar.Header) bool {
	for k := range hdr.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// entryName returns the clean name of an entry, relative to dir of the archive.
func entryName(dir, name string) (string, error) {
	clean := path.Join(dir, name)
	if path.IsAbs(name) || clean == ".." || strings.HasPrefix(clean, "../") {
		return "", fmt.Errorf("%w: %q leads out of the archive", ErrInvalid, name)
	}
	if clean == "." {
		return "", nil
	}
	return clean, nil
}

// maxLinks bounds the symbolic links that are followed to one entry.
const maxLinks = 16

func (t *tarFiles) lookup(name string) (tarEntry, error) {
	at := path.Clean(name)
	for range maxLinks {
		e, ok := t.entries[at]
		switch {
		case !ok:
			return e, fmt.Errorf("%w: %q in archive %q", ErrNotFound, at, t.name)
		case e.odd != "":
			return e, fmt.Errorf("%w: %q in archive %q is %s, want a regular file", ErrInvalid, at, t.name, e.odd)
		case e.link == "":
			return e, nil
		}
		at = e.link
	}
	return tarEntry{}, fmt.Errorf("%w: too many links from %q in archive %q", ErrInvalid, name, t.name)
}

func (t *tarFiles) open(name string) (*file, error) {
	e, err := t.lookup(name)
	if err != nil {
		return nil, err
	}
	return &file{io.NewSectionReader(t.f, e.off, e.size), func() error { return nil }}, nil
}

func (t *tarFiles) Close() error { return t.f.Close() }
