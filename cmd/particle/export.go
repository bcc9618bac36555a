package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"text/tabwriter"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/registry"
)

func exportFlags() []cli.Flag {
	return append(registryFlags(),
		&cli.StringFlag{Name: "compression", Usage: "compress layers as `none|gzip|zstd` (default: as the manifest says)"},
		&cli.BoolFlag{Name: "json", Usage: "print the result as JSON"},
	)
}

func newExportCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:      "export",
		Usage:     "write an image of the store as OCI again",
		ArgsUsage: "NAME TARGET",
		Description: "TARGET is oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:TAG],\n" +
			"containers-storage:NAME or docker://HOST/REPO[:TAG], or podman-store:DIR[:NAME],\n" +
			"a directory from which podman 5.4 and newer run the image without a pull: it takes\n" +
			"no room but for metadata (additionalimagestores in storage.conf).\n\n" +
			"DiffIDs and config are always those that were converted. So is the manifest where\n" +
			"layers are uncompressed, were compressed by particle, or were kept (--keep-blobs).",
		Flags: append(exportFlags(),
			&cli.BoolFlag{Name: "remove", Usage: "take the image out of a podman-store again"},
		),
		Action: func(c *cli.Context) error {
			if c.NArg() != 2 {
				return usagef("export takes a NAME and a TARGET, got %d arguments; see particle export --help", c.NArg())
			}
			if isImageStore(c.Args().Get(1)) {
				return runImageStore(t, c, c.Args().Get(0), c.Args().Get(1))
			}
			if c.Bool("remove") {
				return usagef("--remove takes an image out of a podman-store:DIR, not of %s", c.Args().Get(1))
			}
			return runExport(t, c, c.Args().Get(0), c.Args().Get(1))
		},
	}
}

// runExport gives an image of the store to a target and prints what it has now.
func runExport(t *term, c *cli.Context, name, target string) (err error) {
	if err := checkCompression(c.String("compression")); err != nil {
		return err
	}
	ref, err := registry.ParseRef(target)
	if err != nil {
		return usageError{err}
	}
	if ref.Transport == registry.DockerArchive && c.IsSet("compression") {
		return usagef("a docker-archive has plain layers: leave --compression out")
	}
	ro, err := registryOptions(c)
	if err != nil {
		return err
	}
	st, err := readStore(t, c)
	if err != nil {
		return err
	}
	s, err := converter.Find(st, name)
	if err != nil {
		return err
	}
	res, err := exportTo(c.Context, t, ref, ro, func(ctx context.Context, target converter.Target, p converter.Progress) (*converter.ExportResult, error) {
		return converter.Export(ctx, st, s, target, converter.ExportOptions{
			Compression: c.String("compression"),
			// What reads OCI layouts finds no Docker manifests in them.
			OCI:      ref.Transport == registry.OCILayout || ref.Transport == registry.OCIArchive,
			Progress: p,
		})
	})
	if err != nil {
		return fmt.Errorf("exporting %s to %s: %w", name, target, err)
	}
	if c.Bool("json") {
		return t.printJSON(res)
	}
	w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
	defer w.Flush()
	fmt.Fprintf(w, "target\t%s\n", ref)
	if ref.Transport != registry.DockerArchive { // it has a manifest of its own kind
		fmt.Fprintf(w, "manifest\t%s (%s)\n", res.Manifest, whySame(c, s, res))
	}
	fmt.Fprintf(w, "config\t%s (as converted)\n", res.Config)
	return nil
}

// whySame says how the exported manifest relates to the converted one.
func whySame(c *cli.Context, s *converter.Stored, res *converter.ExportResult) string {
	switch {
	case res.Same:
		return "as converted"
	case c.String("compression") != "":
		return "new: layers were compressed as asked"
	case slices.Equal(s.Digests(), digests(res.Layers)):
		return "new: OCI's form of a Docker manifest"
	}
	return "new: layers were compressed anew; convert with --keep-blobs to keep it"
}

func digests(layers []v1.Descriptor) []v1.Hash {
	var all []v1.Hash
	for _, l := range layers {
		all = append(all, l.Digest)
	}
	return all
}

func checkCompression(s string) error {
	switch s {
	case "", "none", "gzip", "zstd":
		return nil
	}
	return usagef("--compression: got %q, want none, gzip or zstd", s)
}

// exportTo makes the target, fills it and closes it; a target that failed is left as
// if nothing had been asked of it.
func exportTo(ctx context.Context, t *term, ref registry.Ref, o *registry.Options, fill func(context.Context, converter.Target, converter.Progress) (*converter.ExportResult, error)) (*converter.ExportResult, error) {
	target, err := registry.Create(ctx, ref, o)
	if err != nil {
		return nil, err
	}
	p := t.newProgress()
	defer p.stop()
	res, err := fill(ctx, target, p)
	return res, errors.Join(err, target.Close())
}
