package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// podman's storage is reached through the podman command, which knows its
// configuration, its locks and its user. Images come and go as a dir:
// (containers-transports(5)), the only form that changes neither an OCI manifest
// nor a Docker one into the other, so that the config digest is podman's image ID.
// The files of a dir: are manifest.json, version, and the blobs under their bare
// hexadecimal digests.
const (
	dirManifest       = "manifest.json"
	dirVersion        = "version"
	dirVersionContent = "Directory Transport Version: 1.1\n"
)

// podmanProgram is the command: $PARTICLE_PODMAN, or podman.
func podmanProgram() string {
	if name := os.Getenv("PARTICLE_PODMAN"); name != "" {
		return name
	}
	return "podman"
}

// podman runs the command and returns its standard output.
func podman(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, podmanProgram(), args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	// Killed at once, podman would leave a half-written layer in its storage.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 15 * time.Second
	err := cmd.Run()
	switch {
	case err == nil:
		return strings.TrimSpace(stdout.String()), nil
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("%w: program %q; install podman, or name another one in PARTICLE_PODMAN", ErrNotFound, cmd.Path)
	case ctx.Err() != nil:
		return "", ctx.Err()
	}
	return "", fmt.Errorf("running %s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(stderr.String()))
}

// podmanSource is an image exported into a private directory.
type podmanSource struct {
	files dirFiles
}

func openPodman(ctx context.Context, name string, opts *Options) (source, error) {
	// Exit status 1 of exists is the one plain answer that there is no such image.
	_, err := podman(ctx, "image", "exists", name)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 1 {
		return nil, fmt.Errorf("%w: podman has no image %q; podman images lists them, for each user others", ErrNotFound, name)
	}
	if err != nil {
		return nil, err
	}
	id, err := podman(ctx, "image", "inspect", "--format", "{{.Id}}", name)
	if err != nil {
		return nil, err
	}
	id = strings.TrimPrefix(id, "sha256:")
	dir, err := os.MkdirTemp(opts.tempDir(), "particle-podman-")
	if err != nil {
		return nil, err
	}
	return closeOnError(&podmanSource{dirFiles(dir)}, func() (source, error) {
		if _, err := podman(ctx, "push", "--quiet", id, "dir:"+dir); err != nil {
			return nil, err
		}
		s := &podmanSource{dirFiles(dir)}
		return s, s.checkID(id)
	})
}

// checkID compares the exported config with the ID: a podman that converts the image
// on the way would give other digests than podman itself shows.
func (s *podmanSource) checkID(id string) error {
	raw, err := readFile(s.files, dirManifest, maxManifest)
	if err != nil {
		return err
	}
	doc, err := parseDocument(raw, "")
	if err != nil {
		return err
	}
	if doc.manifest == nil {
		return fmt.Errorf("%w: podman exported a list of images; name one image of it", ErrUnsupported)
	}
	if got := doc.manifest.Config.Digest.Hex; got != id {
		return fmt.Errorf("%w: podman exported image %s with config %s", ErrInvalid, id, got)
	}
	return nil
}

func (s *podmanSource) root(context.Context) ([]byte, string, v1.Hash, error) {
	raw, err := readFile(s.files, dirManifest, maxManifest)
	return raw, "", v1.Hash{}, err
}

func (s *podmanSource) document(ctx context.Context, desc v1.Descriptor) (io.ReadCloser, error) {
	return s.blob(ctx, desc)
}

func (s *podmanSource) blob(_ context.Context, desc v1.Descriptor) (io.ReadCloser, error) {
	f, err := s.files.open(desc.Digest.Hex)
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (s *podmanSource) blobRange(_ context.Context, desc v1.Descriptor, off, n int64) (io.ReadCloser, error) {
	f, err := s.files.open(desc.Digest.Hex)
	if err != nil {
		return nil, err
	}
	return f.part(off, n), nil
}

func (s *podmanSource) Close() error { return os.RemoveAll(string(s.files)) }

// podmanTarget assembles a dir: and has podman read it.
type podmanTarget struct {
	*staging
}

func createPodman(ctx context.Context, ref Ref, opts *Options) (Target, error) {
	// Otherwise the name's faults would show after everything has been copied.
	if strings.Contains(ref.Name, "@") {
		return nil, fmt.Errorf("%w: %q has a digest; write to a name with a tag", ErrReference, ref.Name)
	}
	if _, err := parseDocker(ref.Name); err != nil {
		return nil, fmt.Errorf("%w: image name %q: %v", ErrReference, ref.Name, err)
	}
	if _, err := podman(ctx, "version", "--format", "{{.Client.Version}}"); err != nil {
		return nil, err
	}
	s, err := newStaging(ref, opts.tempDir(), "particle-podman-")
	if err != nil {
		return nil, err
	}
	return &podmanTarget{s}, nil
}

func (t *podmanTarget) PutBlob(ctx context.Context, desc v1.Descriptor, open func() (io.ReadCloser, error)) error {
	return t.put(ctx, desc, open, copyBlob)
}

func (t *podmanTarget) PutManifest(ctx context.Context, raw []byte, mediaType string) error {
	return t.finish(raw, mediaType, func(doc *document) error {
		dir := filepath.Join(t.dir, "dir")
		if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
			return err
		}
		for h, blob := range t.blobs {
			if err := os.Link(blob.path, filepath.Join(dir, h.Hex)); err != nil {
				return err
			}
		}
		for name, content := range map[string][]byte{dirManifest: raw, dirVersion: []byte(dirVersionContent)} {
			if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
				return err
			}
		}
		return t.load(ctx, dir, doc.manifest.Config.Digest.Hex)
	})
}

// load pulls the directory, which gives the image no name, and then names it: the
// image is visible under the name with everything or not at all.
func (t *podmanTarget) load(ctx context.Context, dir, want string) error {
	_, err := podman(ctx, "image", "exists", want)
	fresh := err != nil
	id, err := podman(ctx, "pull", "--quiet", "dir:"+dir)
	if err != nil {
		return err
	}
	if id != want {
		err = fmt.Errorf("%w: podman stored the image as %s, want %s", ErrInvalid, id, want)
	} else {
		_, err = podman(ctx, "tag", id, t.ref.Name)
	}
	if err != nil && fresh {
		_, undo := podman(context.WithoutCancel(ctx), "rmi", id)
		err = errors.Join(err, undo)
	}
	return err
}
