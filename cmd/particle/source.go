package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/layer"
	"github.com/particle-os/particle/converter/store"
	podmanext "github.com/particle-os/particle/podman-ext"
	"github.com/particle-os/particle/registry"
)

// openStore opens the store of --store, making it where it does not exist.
func openStore(t *term, c *cli.Context) (*store.Store, error) {
	dir := c.String("store")
	st, err := store.Init(dir, store.Options{})
	if err != nil {
		return nil, err
	}
	st.Waiting = func(message string) { t.infof("%s", message) }
	return st, nil
}

// readStore opens the store of --store, which has to exist.
//
// It is held until the process ends, so that nothing is collected while the verb
// reads; gc, which waits for all others, opens it by freeStore.
func readStore(t *term, c *cli.Context) (*store.Store, error) {
	st, err := freeStore(t, c)
	if err != nil {
		return nil, err
	}
	_, err = st.Hold(c.Context)
	return st, err
}

// freeStore opens the store of --store, which has to exist, without holding it.
func freeStore(t *term, c *cli.Context) (*store.Store, error) {
	st, err := store.Open(c.String("store"))
	if errors.Is(err, store.ErrNotStore) {
		return nil, fmt.Errorf("%w\nparticle convert makes a store, --store names another", err)
	}
	if err != nil {
		return nil, err
	}
	st.Waiting = func(message string) { t.infof("%s", message) }
	return st, nil
}

// registryFlags are the flags of verbs that talk to registries.
func registryFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "platform", Usage: "the `OS/ARCH[/VARIANT]` to take of an index (default: this machine's)"},
		&cli.StringFlag{Name: "authfile", EnvVars: []string{"REGISTRY_AUTH_FILE"}, Usage: "read credentials from this `FILE` only"},
		&cli.StringFlag{Name: "creds", Usage: "log in as `USER:PASSWORD`"},
		&cli.StringFlag{Name: "cert-dir", Usage: "take certificates for the registry from this `DIR`ectory"},
		&cli.BoolFlag{Name: "insecure", Usage: "allow plain HTTP and certificates that nobody vouches for"},
	}
}

func registryOptions(c *cli.Context) (*registry.Options, error) {
	o := &registry.Options{
		Platform:  c.String("platform"),
		Auth:      registry.Auth{File: c.String("authfile")},
		Insecure:  c.Bool("insecure"),
		CertDir:   c.String("cert-dir"),
		UserAgent: "particle",
	}
	if creds := c.String("creds"); creds != "" {
		user, password, ok := strings.Cut(creds, ":")
		if !ok {
			return nil, usagef("--creds: want USER:PASSWORD")
		}
		o.Auth.Username, o.Auth.Password = user, password
	}
	return o, nil
}

// convertFlags are the flags of verbs that bring an image into the store.
func convertFlags() []cli.Flag {
	return append(registryFlags(),
		&cli.BoolFlag{Name: "bootable", Usage: "also make the image to boot from, with /boot and /sysroot empty"},
		&cli.BoolFlag{Name: "keep-blobs", Usage: "also keep the layers' compressed bytes, so that export gives the same manifest"},
		&cli.StringFlag{Name: "max-layer-size", Value: "64G", Usage: "refuse layers with more uncompressed `BYTES` (k, M, G; 0: no limit)"},
		&cli.BoolFlag{Name: "json", Usage: "print the result as JSON"},
	)
}

func convertOptions(t *term, c *cli.Context, name string) (converter.Options, error) {
	limit, err := parseSize(c.String("max-layer-size"))
	if err != nil {
		return converter.Options{}, usageError{fmt.Errorf("--max-layer-size: %w", err)}
	}
	if limit == 0 {
		limit = -1 // none
	}
	return converter.Options{
		Name:         name,
		Bootable:     c.Bool("bootable"),
		KeepBlobs:    c.Bool("keep-blobs"),
		MaxLayerSize: limit,
		Link:         c.Bool("link"),
		CrossMounts:  c.Bool("cross-mounts"),
		Architecture: c.String("arch"),
		Warn:         t.warnf,
	}, nil
}

// parseSize reads a number of bytes with a binary unit: 512, 64k, 2G.
func parseSize(s string) (int64, error) {
	digits, shift := s, 0
	if s != "" {
		if i := strings.IndexByte("kMGT", s[len(s)-1]); i >= 0 {
			digits, shift = s[:len(s)-1], 10*(i+1)
		}
	}
	var n int64
	if _, err := fmt.Sscanf(digits, "%d", &n); err != nil || fmt.Sprint(n) != digits || n < 0 || n > 1<<62>>shift {
		return 0, fmt.Errorf("%q is not a size: want a number with k, M, G or T behind it", s)
	}
	return n << shift, nil
}

// convertSource brings a source of any kind into the store under a name, or under
// one made of the source's.
func convertSource(ctx context.Context, t *term, c *cli.Context, source, name string) (*converter.Result, error) {
	if !isReference(source) {
		return convertPath(ctx, t, c, source, name)
	}
	ref, err := registry.ParseRef(source)
	if err != nil {
		return nil, usageError{err}
	}
	ro, err := registryOptions(c)
	if err != nil {
		return nil, err
	}
	if name == "" {
		name = nameOfRef(ref)
	}
	o, err := convertOptions(t, c, name)
	if err != nil {
		return nil, err
	}
	if ref.Transport == registry.ContainersStorage && !o.KeepBlobs {
		open := func() (*store.Store, error) { return openStore(t, c) }
		find := func() (*podmanext.LocalImage, error) { return podmanext.FindLocal(ctx, ref.Name) }
		if res, err := fromPodman(ctx, t, open, find, true, o); res != nil || err != nil {
			return res, err
		}
	}
	img, err := registry.Open(ctx, ref, ro)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	st, err := openStore(t, c)
	if err != nil {
		return nil, err
	}
	p := t.newProgress()
	defer p.stop()
	o.Progress = p
	return converter.Convert(ctx, img, st, o)
}

// fromPodman brings an image of podman's storage into a store straight from podman's
// files. It returns nil where only podman can read it. With link, files may be shared with
// podman's.
func fromPodman(ctx context.Context, t *term, open func() (*store.Store, error), find func() (*podmanext.LocalImage, error), link bool, o converter.Options) (*converter.Result, error) {
	img, err := find()
	var res *converter.Result
	if err == nil {
		img.Link = link
		var st *store.Store
		if st, err = open(); err != nil {
			return nil, err
		}
		p := t.newProgress()
		o.Progress = p
		res, err = converter.Convert(ctx, img, st, o)
		p.stop()
	}
	switch {
	case errors.Is(err, podmanext.ErrNoImage):
		return nil, nil // podman says what to do
	case errors.Is(err, podmanext.ErrUnreadable) || errors.Is(err, layer.ErrDiffID):
		// A file that was changed in podman's storage, or a sparse one.
		t.infof("podman writes the image out first: %v", err)
		return nil, nil
	}
	return res, err
}

// isReference reports whether a source is named by a transport rather than a path.
func isReference(source string) bool {
	transport, _, ok := strings.Cut(source, ":")
	if !ok || strings.Contains(transport, "/") {
		return false
	}
	_, err := os.Lstat(source)
	return err != nil // a file of that very name wins
}

// convertPath brings a directory, a tar file or a composefs image into the store.
func convertPath(ctx context.Context, t *term, c *cli.Context, path, name string) (*converter.Result, error) {
	if name == "" && path != "-" {
		name = nameOfPath(path)
	}
	o, err := convertOptions(t, c, name)
	if err != nil {
		return nil, err
	}
	var f io.Reader
	var file *os.File
	var size int64 // 0: nobody knows
	isDir := false
	if path == "-" {
		if name == "" {
			return nil, usagef("what comes from stdin needs a NAME")
		}
		f = untilCancelled(ctx, t.in)
	} else {
		if file, err = os.Open(path); err != nil {
			return nil, fmt.Errorf("opening the source: %w", err)
		}
		defer file.Close()
		fi, err := file.Stat()
		if err != nil {
			return nil, err
		}
		f, isDir, size = file, fi.IsDir(), fi.Size()
		if !isDir && !fi.Mode().IsRegular() {
			f, size = untilCancelled(ctx, file), 0
		}
	}
	if isDir {
		if _, err := os.Stat(filepath.Join(path, "oci-layout")); err == nil {
			return nil, usagef("%q is an OCI layout: write oci:%s", path, path)
		}
	}
	st, err := openStore(t, c)
	if err != nil {
		return nil, err
	}
	p := t.newProgress()
	defer p.stop()
	o.Progress = p
	switch {
	case isDir:
		return converter.ConvertDir(ctx, path, st, o)
	case file != nil && isComposefs(file):
		dirs := c.StringSlice("basedir")
		if len(dirs) == 0 {
			dirs = []string{st.ObjectsDir()}
		}
		return converter.ConvertComposefs(ctx, file, func(p string) (*os.File, error) { return openObject(dirs, p) }, st, o)
	}
	res, err := converter.ConvertTar(ctx, f, size, st, o)
	if archive := (*converter.ArchiveError)(nil); errors.As(err, &archive) {
		return nil, usagef("%w: write %s:%s", err, archive.Transport, path)
	}
	return res, err
}

// untilCancelled reads what may block for ever: a pipe that nobody writes to. Reading
// ends with the context.
func untilCancelled(ctx context.Context, r io.Reader) io.Reader {
	pr, pw := io.Pipe()
	go func() {
		_, err := io.CopyBuffer(pw, struct{ io.Reader }{r}, make([]byte, 256<<10))
		pw.CloseWithError(err)
	}()
	context.AfterFunc(ctx, func() { pw.CloseWithError(context.Cause(ctx)) })
	return pr
}

// isComposefs reports whether a file starts as a composefs image does.
func isComposefs(f io.ReaderAt) bool {
	_, err := erofs.ReadInfo(f)
	return !errors.Is(err, erofs.ErrNotComposefs)
}

// openObject opens a path below the first of several directories that has it.
func openObject(dirs []string, path string) (*os.File, error) {
	if !filepath.IsLocal(path) {
		return nil, fmt.Errorf("the image names the object %q, which is no path below a directory of objects", path)
	}
	for _, dir := range dirs {
		f, err := os.Open(filepath.Join(dir, path))
		if !errors.Is(err, os.ErrNotExist) {
			return f, err
		}
	}
	return nil, fmt.Errorf("object %s is in none of %s; --basedir names another directory", path, strings.Join(dirs, ", "))
}

// nameOfRef makes a name for an image of where it came from.
func nameOfRef(ref registry.Ref) string {
	switch ref.Transport {
	case registry.Docker:
		name := ref.Host + "/" + ref.Repo
		switch {
		case ref.Tag != "":
			return name + ":" + ref.Tag
		case ref.Digest != "":
			return name + "@" + ref.Digest
		}
		return name
	case registry.ContainersStorage:
		return ref.Name
	case registry.DockerArchive:
		if ref.Tag != "" && ref.Tag[0] != '@' {
			return ref.Tag
		}
	}
	name := nameOfPath(ref.Path)
	if ref.Tag != "" && ref.Tag[0] != '@' {
		name += ":" + ref.Tag
	}
	return name
}

// nameOfPath makes a name for an image of its source's path.
func nameOfPath(path string) string {
	base := filepath.Base(path)
	if abs, err := filepath.Abs(path); err == nil {
		base = filepath.Base(abs)
	}
	for _, suffix := range []string{".gz", ".zst", ".tgz", ".tar", ".cfs", ".composefs"} {
		base = strings.TrimSuffix(base, suffix)
	}
	return base
}

// largeTemp is the directory of large temporary files: not a /tmp that is memory.
func largeTemp() string {
	if dir := os.Getenv("TMPDIR"); dir != "" {
		return dir
	}
	return "/var/tmp"
}
