package podmanext

import (
	"archive/tar"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"go.podman.io/storage/pkg/fileutils"
)

// A buildContext is what the service gets of a build: a tar of the directory without
// what its ignore file names, with the Containerfile and the secrets wherever these
// lie. The service moves secrets out of the directory before it builds.
type buildContext struct {
	dir     string
	file    string                    // name of the Containerfile in the tar
	outside string                    // its path, where that is not below dir
	ignore  *fileutils.PatternMatcher // nil: nothing is ignored
	always  map[string]bool           // names that are sent whatever is ignored
	secrets []sentSecret
}

type sentSecret struct{ id, name, path, env string }

func newBuildContext(o BuildOptions, secrets []secret) (*buildContext, error) {
	dir, err := filepath.EvalSymlinks(o.Context)
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	b := &buildContext{dir: dir, always: map[string]bool{}}
	parent, err := filepath.EvalSymlinks(filepath.Dir(o.File))
	if err != nil {
		return nil, err
	}
	path, err := filepath.Abs(filepath.Join(parent, filepath.Base(o.File)))
	if err != nil {
		return nil, err
	}
	if rel, err := filepath.Rel(dir, path); err == nil && filepath.IsLocal(rel) {
		b.file = filepath.ToSlash(rel)
	} else {
		b.file, b.outside = ".particle-containerfile-"+rand.Text(), path
	}
	b.always[b.file] = true
	if err := b.readIgnore(path); err != nil {
		return nil, err
	}
	for _, s := range secrets {
		b.secrets = append(b.secrets, sentSecret{s.id, ".particle-secret-" + rand.Text(), s.src, s.env})
	}
	return b, nil
}

// readIgnore reads the ignore file: that of the Containerfile, else the directory's.
func (b *buildContext) readIgnore(file string) error {
	for _, path := range []string{
		file + ".containerignore", file + ".dockerignore",
		filepath.Join(b.dir, ".containerignore"), filepath.Join(b.dir, ".dockerignore"),
	} {
		raw, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if b.ignore, err = fileutils.NewPatternMatcher(parseIgnore(string(raw))); err != nil {
			return fmt.Errorf("reading %q: %w", path, err)
		}
		// The service reads it as well.
		if rel, err := filepath.Rel(b.dir, path); err == nil {
			b.always[filepath.ToSlash(rel)] = true
		}
		return nil
	}
	return nil
}

// parseIgnore splits an ignore file (containerignore(5)) into patterns: one a line,
// "#" begins a comment, "!" an exception, and all count from the directory.
func parseIgnore(text string) []string {
	var patterns []string
	for line := range strings.Lines(strings.TrimPrefix(text, "\ufeff")) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		except := ""
		if line[0] == '!' {
			except, line = "!", strings.TrimSpace(line[1:])
		}
		if line = filepath.Clean(line); len(line) > 1 {
			line = strings.TrimPrefix(line, "/")
		}
		patterns = append(patterns, except+line)
	}
	return patterns
}

// ignored reports whether a name is left out.
func (b *buildContext) ignored(name string) (bool, error) {
	if b.ignore == nil || b.always[name] {
		return false, nil
	}
	res, err := b.ignore.MatchesResult(name)
	if err != nil {
		return false, fmt.Errorf("ignore file, %q: %w", name, err)
	}
	return res.IsMatched(), nil
}

// write writes the tar. Owners are root, as COPY gives them; sockets and devices are
// left out.
func (b *buildContext) write(ctx context.Context, w io.Writer) error {
	tw := tar.NewWriter(w)
	err := filepath.WalkDir(b.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		rel, err := filepath.Rel(b.dir, path)
		if err != nil || rel == "." {
			return err
		}
		name := filepath.ToSlash(rel)
		out, err := b.ignored(name)
		if err != nil {
			return err
		}
		if out {
			if d.IsDir() && !b.ignore.Exclusions() && !b.needed(name) {
				return fs.SkipDir
			}
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case info.Mode().IsRegular():
			return addFile(tw, name, path, info)
		case info.IsDir(), info.Mode()&fs.ModeSymlink != 0:
			target := ""
			if !info.IsDir() {
				if target, err = os.Readlink(path); err != nil {
					return err
				}
			}
			h, err := tar.FileInfoHeader(info, target)
			if err != nil {
				return err
			}
			return writeHeader(tw, h, name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if b.outside != "" {
		info, err := os.Stat(b.outside)
		if err != nil {
			return err
		}
		if err := addFile(tw, b.file, b.outside, info); err != nil {
			return err
		}
	}
	for _, s := range b.secrets {
		data := []byte(os.Getenv(s.env))
		if s.path != "" {
			if data, err = os.ReadFile(s.path); err != nil {
				return fmt.Errorf("reading secret %q: %w", s.id, err)
			}
		}
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: s.name, Mode: 0o600, Size: int64(len(data))}); err != nil {
			return err
		}
		if _, err := tw.Write(data); err != nil {
			return err
		}
	}
	return tw.Close()
}

// needed reports whether something below a directory is sent in any case.
func (b *buildContext) needed(dir string) bool {
	for name := range b.always {
		if strings.HasPrefix(name, dir+"/") {
			return true
		}
	}
	return false
}

func writeHeader(tw *tar.Writer, h *tar.Header, name string) error {
	h.Name = name
	if h.Typeflag == tar.TypeDir {
		h.Name += "/"
	}
	h.Uid, h.Gid, h.Uname, h.Gname = 0, 0, "", ""
	return tw.WriteHeader(h)
}

func addFile(tw *tar.Writer, name, path string, info fs.FileInfo) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h, err := tar.FileInfoHeader(info, "")
	if err != nil {
		return err
	}
	if err := writeHeader(tw, h, name); err != nil {
		return err
	}
	n, err := io.Copy(tw, io.LimitReader(f, info.Size()))
	if err == nil && n != info.Size() {
		err = fmt.Errorf("%q got shorter while it was read", path)
	}
	return err
}
