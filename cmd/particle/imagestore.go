package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter"
	podmanext "github.com/particle-os/particle/podman-ext"
	"github.com/particle-os/particle/registry"
)

// imageStorePrefix names a target that is no place for OCI images but a directory from
// which podman runs the store's: podman-store:DIR[:NAME].
const imageStorePrefix = "podman-store:"

// runImageStore adds an image of the store to an image store of podman, or removes it.
func runImageStore(t *term, c *cli.Context, name, target string) error {
	if c.IsSet("compression") {
		return usagef("podman-store takes the store's own files: leave --compression out")
	}
	dir, full, _ := strings.Cut(strings.TrimPrefix(target, imageStorePrefix), ":")
	if dir == "" {
		return usagef("%s lacks a directory: want podman-store:DIR[:NAME]", target)
	}
	if full == "" {
		full = name
	}
	if c.Bool("remove") {
		s, err := podmanext.OpenImageStore(dir)
		if err != nil {
			return err
		}
		err = s.Remove(c.Context, full)
		if errors.Is(err, podmanext.ErrNotInImageStore) {
			if full, err = fullName(full); err == nil {
				err = s.Remove(c.Context, full)
			}
		}
		return err
	}
	full, err := fullName(full)
	if err != nil {
		return usageError{err}
	}
	start := time.Now()
	st, err := readStore(t, c)
	if err != nil {
		return err
	}
	img, err := converter.Find(st, name)
	if err != nil {
		return err
	}
	s, err := podmanext.InitImageStore(dir)
	if err != nil {
		return err
	}
	res, err := s.Add(c.Context, st, img, full)
	if err != nil {
		return fmt.Errorf("adding %s to %s: %w", name, target, err)
	}
	if c.Bool("json") {
		return t.printJSON(res)
	}
	w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "target\t%s\n", s.Dir())
	fmt.Fprintf(w, "image\t%s\n", res.ID)
	fmt.Fprintf(w, "names\t%s\n", strings.Join(res.Names, " "))
	fmt.Fprintf(w, "layers\t%d new, %s of metadata, in %s\n", res.NewLayers, size(res.Bytes), seconds(time.Since(start)))
	return w.Flush()
}

// fullName makes a name as podman keeps them, with a host and a tag: those without a
// host get localhost, as images have that podman builds.
func fullName(name string) (string, error) {
	host, _, ok := strings.Cut(name, "/")
	if !ok || !strings.ContainsAny(host, ".:") && host != "localhost" {
		name = "localhost/" + name
	}
	ref, err := registry.ParseRef("docker://" + name)
	if err != nil {
		return "", err
	}
	if ref.Digest != "" {
		return "", fmt.Errorf("name %q: a name with a tag is needed, podman-store:DIR:NAME says which", name)
	}
	return nameOfRef(ref), nil
}

// isImageStore reports whether an argument of export names an image store.
func isImageStore(target string) bool {
	_, err := os.Lstat(target)
	return strings.HasPrefix(target, imageStorePrefix) && err != nil
}
