package initramfs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/mount"
)

// A Layer is one squashfs file of a manifest.
type Layer struct {
	// Path is that of the file, from the physical root, beginning with a slash.
	Path string
	// SHA256 is what the file must have, in hexadecimal; "" for anything.
	SHA256 string
}

// Limits of a manifest. Overlayfs takes 500 layers.
const (
	maxManifest = 1 << 20
	maxLayers   = 128
)

// ParseManifest reads a manifest of layers, lowest first: a JSON list, or an object
// that has the list as "layers" and else what it likes. Each layer is a string, its
// path, or an object with "file" or "path" and perhaps "digest": "sha256:" and 64
// hexadecimal digits, or these alone. Paths are relative to dir, the manifest's own
// directory, unless they begin with a slash; none leads above the physical root. Errors
// are [ErrManifest].
func ParseManifest(data []byte, dir string) ([]Layer, error) {
	layers, err := parseManifest(data, path.Clean("/"+dir))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrManifest, err)
	}
	return layers, nil
}

func parseManifest(data []byte, dir string) ([]Layer, error) {
	if len(data) > maxManifest {
		return nil, fmt.Errorf("got %d bytes, want at most %d", len(data), maxManifest)
	}
	list := json.RawMessage(data)
	if trimmed := bytes.TrimLeft(data, " \t\r\n"); len(trimmed) > 0 && trimmed[0] == '{' {
		var o struct {
			Layers json.RawMessage `json:"layers"`
		}
		if err := json.Unmarshal(data, &o); err != nil {
			return nil, err
		}
		if o.Layers == nil {
			return nil, errors.New(`want a list, or an object with the list "layers"`)
		}
		list = o.Layers
	}
	var entries []json.RawMessage
	if err := json.Unmarshal(list, &entries); err != nil {
		return nil, err
	}
	if len(entries) == 0 || len(entries) > maxLayers {
		return nil, fmt.Errorf("got %d layers, want 1 to %d", len(entries), maxLayers)
	}
	layers := make([]Layer, len(entries))
	for i, e := range entries {
		var err error
		if layers[i], err = parseLayer(e, dir); err != nil {
			return nil, fmt.Errorf("layer %d: %w", i+1, err)
		}
	}
	return layers, nil
}

func parseLayer(data []byte, dir string) (Layer, error) {
	var l struct{ File, Path, Digest string }
	if len(data) > 0 && data[0] == '"' {
		if err := json.Unmarshal(data, &l.File); err != nil {
			return Layer{}, err
		}
	} else if err := json.Unmarshal(data, &l); err != nil {
		return Layer{}, err
	}
	name := l.File
	switch {
	case l.File != "" && l.Path != "":
		return Layer{}, fmt.Errorf(`got both "file" %q and "path" %q, want one`, l.File, l.Path)
	case l.File == "":
		name = l.Path
	}
	if name == "" || strings.ContainsRune(name, 0) || strings.HasSuffix(name, "/") {
		return Layer{}, fmt.Errorf("got the path %q, want that of a squashfs file", name)
	}
	if !path.IsAbs(name) {
		name = path.Join(dir, name)
	}
	layer := Layer{Path: path.Clean(name)}
	if l.Digest == "" {
		return layer, nil
	}
	layer.SHA256 = strings.TrimPrefix(l.Digest, "sha256:")
	if sum, err := hex.DecodeString(layer.SHA256); err != nil || len(sum) != sha256.Size || strings.ToLower(layer.SHA256) != layer.SHA256 {
		return Layer{}, fmt.Errorf("got the digest %q, want sha256: and 64 hexadecimal digits", l.Digest)
	}
	return layer, nil
}

// prepareManifest makes the mounts of a root of squashfs layers: all that is written
// goes to memory.
func (s *setup) prepareManifest(ctx context.Context) error {
	fail := func(err error) error {
		return fmt.Errorf("%w: %s: %w\ncheck particle.manifest= on the kernel command line, and the files on the physical root", ErrManifest, s.args.Manifest, err)
	}
	f, err := s.openFile(s.args.Manifest)
	if err != nil {
		return fail(err)
	}
	data, err := readLimited(f, maxManifest)
	if err != nil {
		return fail(err)
	}
	layers, err := parseManifest(data, path.Dir(s.args.Manifest))
	if err != nil {
		return fail(err)
	}
	r := s.report
	r.Manifest, r.Transient = s.args.Manifest, []string{"root", "etc", "var"}
	r.Verification, r.Why = mount.None, "not every layer of the manifest has a digest to compare with"
	checked := true
	var dirs []*os.File
	for i, l := range layers {
		dir, err := s.mountLayer(ctx, i, l)
		if err != nil {
			return fail(fmt.Errorf("layer %d, %q: %w", i+1, l.Path, err))
		}
		dirs = append(dirs, dir)
		r.Layers = append(r.Layers, l.Path)
		checked = checked && l.SHA256 != ""
	}
	if checked {
		r.Why = "the layers were compared with a manifest that nobody vouches for"
	}
	slices.Reverse(dirs) // overlayfs wants the highest first
	if s.root, err = s.overlay("root", dirs...); err != nil {
		return fail(err)
	}
	s.files = append(s.files, s.root)
	// Layers that know nothing of Particle lack the directory.
	if err := unix.Mkdirat(int(s.root.Fd()), Sysroot, 0o755); err != nil && err != unix.EEXIST {
		return fail(fmt.Errorf("making /%s: %w", Sysroot, err))
	}
	if err := s.movePhysical(); err != nil {
		return err
	}
	return s.checkInit()
}

// openFile opens a file of the physical root; symbolic links stay below it.
func (s *setup) openFile(name string) (*os.File, error) {
	fd, err := openat2(s.phys, strings.TrimLeft(name, "/"), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
	if err != nil {
		return nil, &os.PathError{Op: "opening", Path: filepath.Join(s.o.Root, name), Err: err}
	}
	f := os.NewFile(uintptr(fd), filepath.Join(s.o.Root, name))
	s.files = append(s.files, f)
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%q is not a regular file", f.Name())
	}
	return f, nil
}

// mountLayer checks a squashfs file and mounts it where the overlay finds it; Linux
// before 6.15 takes no detached mounts as layers. The place goes with the setup.
func (s *setup) mountLayer(ctx context.Context, i int, l Layer) (*os.File, error) {
	f, err := s.openFile(l.Path)
	if err != nil {
		return nil, err
	}
	if l.SHA256 != "" {
		h := sha256.New()
		if _, err := io.Copy(h, contextReader{ctx, f}); err != nil {
			return nil, err
		}
		if got := hex.EncodeToString(h.Sum(nil)); got != l.SHA256 {
			return nil, fmt.Errorf("got sha256:%s, want sha256:%s", got, l.SHA256)
		}
	}
	dev, err := mount.OpenLoop(f)
	if err != nil {
		return nil, err
	}
	defer dev.Close() // the mount holds it
	dir := filepath.Join(s.run, "layers", fmt.Sprint(i))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount(dev.Name(), dir, "squashfs", unix.MS_RDONLY, ""); err != nil {
		return nil, fmt.Errorf("mounting it as squashfs: %w", err)
	}
	s.temp = append(s.temp, dir)
	d, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	s.files = append(s.files, d)
	return d, nil
}

// contextReader ends a long read.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}
