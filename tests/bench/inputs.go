package main

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// An image is one input in the forms that contenders read.
type image struct {
	name    string
	layout  string   // directory, an OCI layout with the tag name
	archive string   // file, an OCI archive
	layers  []string // gzip blobs of the layout
}

// inputs are what all contenders work on, and where.
type inputs struct {
	particle string // program
	oracle   string // chroot with the C tools, "" if there is none
	scratch  string // for results
	first    image  // the server example over the base
	second   image  // the tiny example over the same base
	root     string // the first image, unpacked
	dump     string // file
	dumpName string
	host     string // of the registry that has both images
	ranged   string // the same registry, serving several ranges at a time; "" if not needed
	server   *http.Server
}

// dumpSource is the largest dump of the conformance tests.
const dumpSource = "converter/erofs/testdata/conformance/cs9-x86_64-developer.dump.gz"

// prepare makes the inputs that are not in the cache yet. It runs in the root of the
// source tree.
func prepare(ctx context.Context, cache, particle string) (_ *inputs, err error) {
	cache, err = filepath.Abs(cache)
	if err != nil {
		return nil, err
	}
	in := &inputs{
		particle: particle,
		oracle:   os.Getenv("PARTICLE_ORACLE"),
		scratch:  filepath.Join(cache, "scratch"),
		root:     filepath.Join(cache, "root"),
		dump:     filepath.Join(cache, "dump"),
		dumpName: strings.TrimSuffix(filepath.Base(dumpSource), ".gz"),
	}
	if err := os.MkdirAll(in.scratch, 0o755); err != nil {
		return nil, err
	}
	if err := gunzip(dumpSource, in.dump); err != nil {
		return nil, fmt.Errorf("unpacking the dump: %w", err)
	}
	in.first, in.second = imageIn(cache, "server"), imageIn(cache, "tiny")
	if _, err := os.Stat(filepath.Join(cache, "complete")); err != nil {
		if err := in.build(ctx, cache); err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(cache, "complete"), nil, 0o644); err != nil {
			return nil, err
		}
	}
	for _, img := range []*image{&in.first, &in.second} {
		if err := img.findLayers(); err != nil {
			return nil, err
		}
	}
	return in, in.serve(filepath.Join(cache, "registry"))
}

func imageIn(cache, name string) image {
	return image{name: name, layout: filepath.Join(cache, name+".oci"), archive: filepath.Join(cache, name+".oci.tar")}
}

// build makes both images from apt, with a storage of its own.
func (in *inputs) build(ctx context.Context, cache string) (err error) {
	for _, gone := range []string{in.first.layout, in.first.archive, in.second.layout, in.second.archive, in.root, filepath.Join(cache, "registry")} {
		if err := os.RemoveAll(gone); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp(in.scratch, "build-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, discard(dir)) }()
	env := in.podman(dir).Env
	do := func(program string, args ...string) error {
		fmt.Fprintf(os.Stderr, "preparing: %s %s\n", filepath.Base(program), strings.Join(args, " "))
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.Env = env
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("running %s: %w\n%s", program, err, tailOf(string(out)))
		}
		return nil
	}
	bootstrap := []string{"bootstrap", "trixie", "containers-storage:localhost/debian:trixie"}
	if m := os.Getenv("PARTICLE_TEST_MIRROR"); m != "" {
		bootstrap = append(bootstrap, "--mirror="+m)
	}
	if a := os.Getenv("PARTICLE_TEST_APTOPT"); a != "" {
		bootstrap = append(bootstrap, "--aptopt="+a)
	}
	if err := do(in.particle, bootstrap...); err != nil {
		return err
	}
	deb := filepath.Join(dir, "deb")
	if err := do("packaging/deb.sh", deb); err != nil {
		return err
	}
	for _, img := range []image{in.first, in.second} {
		ref := "localhost/" + img.name
		err := errors.Join(
			do("podman", "build", "--squash", "--build-context", "deb="+deb, "--build-arg", "BASE=localhost/debian:trixie",
				"--build-arg", "APT_OPTS="+os.Getenv("PARTICLE_TEST_APT_OPTS"), "-t", ref, "docs/examples/"+img.name),
			do("skopeo", "copy", "--quiet", "containers-storage:"+ref, "oci:"+img.layout+":"+img.name),
			do("skopeo", "copy", "--quiet", "oci:"+img.layout+":"+img.name, "oci-archive:"+img.archive+":"+img.name),
		)
		if err != nil {
			return err
		}
	}
	bundle := filepath.Join(dir, "bundle")
	if err := do("umoci", "unpack", "--image", in.first.layout+":"+in.first.name, bundle); err != nil {
		return err
	}
	return os.Rename(filepath.Join(bundle, "rootfs"), in.root)
}

// findLayers lists the layers of an image and checks that they are what the bench
// is about: two, compressed with gzip.
func (img *image) findLayers() error {
	m, _, err := img.open()
	if err != nil {
		return err
	}
	for _, l := range m.Layers {
		if !strings.HasSuffix(string(l.MediaType), "gzip") {
			return fmt.Errorf("image %s has a layer of type %s, want gzip", img.name, l.MediaType)
		}
		img.layers = append(img.layers, filepath.Join(img.layout, "blobs", l.Digest.Algorithm, l.Digest.Hex))
	}
	if len(img.layers) != 2 {
		return fmt.Errorf("image %s has %d layers, want 2", img.name, len(img.layers))
	}
	return nil
}

func (img *image) open() (*v1.Manifest, v1.Image, error) {
	index, err := layout.ImageIndexFromPath(img.layout)
	if err != nil {
		return nil, nil, err
	}
	im, err := index.IndexManifest()
	if err != nil {
		return nil, nil, err
	}
	if len(im.Manifests) != 1 {
		return nil, nil, fmt.Errorf("layout %s has %d images, want 1", img.layout, len(im.Manifests))
	}
	i, err := index.Image(im.Manifests[0].Digest)
	if err != nil {
		return nil, nil, err
	}
	m, err := i.Manifest()
	return m, i, err
}

// serve starts a registry on this machine and gives it both images.
func (in *inputs) serve(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	in.host = l.Addr().String()
	in.server = &http.Server{Handler: registry.New(
		registry.WithBlobHandler(registry.NewDiskBlobHandler(dir)),
		registry.Logger(log.New(io.Discard, "", 0)),
	)}
	go in.server.Serve(l)
	for _, img := range []*image{&in.first, &in.second} {
		_, i, err := img.open()
		if err != nil {
			return err
		}
		ref, err := name.NewTag(in.host + "/" + img.name)
		if err != nil {
			return err
		}
		if err := remote.Write(ref, i); err != nil {
			return fmt.Errorf("giving %s to the registry: %w", img.name, err)
		}
	}
	return nil
}

func (in *inputs) close() error {
	return errors.Join(in.server.Close(), os.RemoveAll(in.scratch))
}

// warm reads files, and all files of directories, so that they are in the page cache.
func (in *inputs) warm(paths func(*inputs) []string) error {
	if paths == nil {
		return nil
	}
	for _, p := range paths(in) {
		err := filepath.WalkDir(p, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = io.Copy(io.Discard, f)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// gunzip unpacks a file unless that was done before.
func gunzip(from, to string) error {
	if _, err := os.Stat(to); err == nil {
		return nil
	}
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return err
	}
	out, err := os.Create(to + ".new")
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, z); err != nil {
		return errors.Join(err, out.Close())
	}
	return errors.Join(out.Close(), os.Rename(to+".new", to))
}

// describe tells for the results what was measured.
func (in *inputs) describe() map[string]string {
	d := map[string]string{"dump": in.dumpName}
	for _, img := range []image{in.first, in.second} {
		var sizes []string
		for _, l := range img.layers {
			if fi, err := os.Stat(l); err == nil {
				sizes = append(sizes, mebibytes(fi.Size()))
			}
		}
		d["image "+img.name] = "layers of " + strings.Join(sizes, " and ") + ", gzip"
	}
	return d
}

// describeMachine names what the numbers depend on.
func describeMachine() map[string]string {
	m := map[string]string{}
	for key, cmd := range map[string][]string{
		"kernel":     {"uname", "-sr"},
		"processors": {"nproc"},
		"podman":     {"podman", "--version"},
		"umoci":      {"umoci", "--version"},
		"skopeo":     {"skopeo", "--version"},
	} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).Output(); err == nil {
			m[key], _, _ = strings.Cut(strings.TrimSpace(string(out)), "\n")
		}
	}
	return m
}
