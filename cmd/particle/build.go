package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/store"
	podmanext "github.com/particle-os/particle/podman-ext"
	"github.com/particle-os/particle/registry"
)

func newBuildCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:      "build",
		Usage:     "build an image with podman and bring it into the store",
		ArgsUsage: "[DIR]",
		Description: "Podman builds: its service where one listens (CONTAINER_HOST, or podman.socket), else\n" +
			"its program. DIR is the directory to build from, the current one by default. What the\n" +
			"build prints goes to stderr. The image is in podman's storage then, and in the\n" +
			"store under the first --tag.\n\n" +
			"With --cache-from and --cache-to a repository, a step that was run somewhere once is\n" +
			"not run again.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "file", Aliases: []string{"f"}, Usage: "the Container`FILE` (default: Containerfile or Dockerfile of DIR)"},
			&cli.StringSliceFlag{Name: "tag", Aliases: []string{"t"}, Usage: "a `NAME` for the image"},
			&cli.GenericFlag{Name: "build-arg", Value: &listValue{}, Usage: "set an ARG of the Containerfile: `KEY=VALUE`"},
			&cli.GenericFlag{Name: "secret", Value: &listValue{}, Usage: "something that RUN --mount=type=secret may read: `id=ID,src=FILE` or id=ID,env=VARIABLE"},
			&cli.StringFlag{Name: "target", Usage: "end with this `STAGE`"},
			&cli.StringFlag{Name: "cache-from", Usage: "take layers from this `REPO`sitory (HOST/REPO) instead of running their step"},
			&cli.StringFlag{Name: "cache-to", Usage: "give the layers of steps that ran to this `REPO`sitory"},
			&cli.BoolFlag{Name: "no-cache", Usage: "run all steps"},
			&cli.BoolFlag{Name: "pull", Usage: "fetch base images, although podman has them"},
			&cli.StringFlag{Name: "platform", Usage: "build for this `OS/ARCH`"},
			&cli.StringFlag{Name: "authfile", EnvVars: []string{"REGISTRY_AUTH_FILE"}, Usage: "read credentials from this `FILE` only"},
			&cli.BoolFlag{Name: "insecure", Usage: "allow plain HTTP and certificates that nobody vouches for"},
			&cli.BoolFlag{Name: "push", Usage: "give the image to the registry of each --tag"},
			&cli.StringFlag{Name: "compression", Value: "gzip", Usage: "compress layers as `none|gzip|zstd` for --push"},
			&cli.BoolFlag{Name: "bootable", Usage: "also make the image to boot from, with /boot and /sysroot empty"},
			&cli.StringFlag{Name: "max-layer-size", Value: "64G", Usage: "refuse layers with more uncompressed `BYTES` (k, M, G; 0: no limit)"},
			&cli.BoolFlag{Name: "json", Usage: "print the result as JSON"},
		},
		Action: func(c *cli.Context) error {
			if c.NArg() > 1 {
				return usagef("build takes one DIR, got %d arguments; see particle build --help", c.NArg())
			}
			return runBuild(t, c)
		},
	}
}

// A listValue takes the values of a flag that is given several times, commas and all.
type listValue []string

func (l *listValue) Set(v string) error { *l = append(*l, v); return nil }
func (l *listValue) String() string     { return strings.Join(*l, " ") }

// A buildResult is the result of build.
type buildResult struct {
	*converter.Result
	Builder string                    `json:"builder"`
	Pushed  []*converter.ExportResult `json:"pushed,omitempty"` // in the order of the tags
}

func runBuild(t *term, c *cli.Context) error {
	ctx, start := c.Context, time.Now()
	if err := checkCompression(c.String("compression")); err != nil {
		return err
	}
	var targets []registry.Ref
	if c.Bool("push") {
		for _, tag := range c.StringSlice("tag") {
			ref, err := registry.ParseRef(inRegistry(tag))
			if err != nil {
				return usageError{err}
			}
			targets = append(targets, ref)
		}
		if len(targets) == 0 {
			return usagef("--push needs a --tag that names the registry")
		}
	}
	o := podmanext.BuildOptions{
		Context: ".", File: c.String("file"), Tags: c.StringSlice("tag"), Args: *c.Generic("build-arg").(*listValue),
		Secrets: *c.Generic("secret").(*listValue), Target: c.String("target"),
		CacheFrom: c.String("cache-from"), CacheTo: c.String("cache-to"),
		NoCache: c.Bool("no-cache"), Pull: c.Bool("pull"), Platform: c.String("platform"),
		AuthFile: c.String("authfile"), Insecure: c.Bool("insecure"),
	}
	if c.Args().Present() {
		o.Context = c.Args().First()
	}
	if !t.quiet {
		o.Output = t.err
	}
	name := ""
	if len(o.Tags) > 0 {
		name = o.Tags[0]
	}
	co, err := convertOptions(t, c, name)
	if err != nil {
		return err
	}
	b, err := podmanext.NewBuilder(ctx)
	if err != nil {
		return err
	}
	t.infof("building %s with %s", o.Context, b)
	id, err := b.Build(ctx, o)
	if err != nil {
		return fmt.Errorf("building %s: %w", o.Context, err)
	}
	res, err := convertBuilt(ctx, t, c, b, id, co)
	if err != nil {
		return fmt.Errorf("converting what was built, %s: %w", id, err)
	}
	out := buildResult{Result: res, Builder: b.String()}
	for _, ref := range targets {
		pushed, err := pushBuilt(ctx, t, c, res.Manifest.String(), ref)
		if err != nil {
			return fmt.Errorf("pushing to %s: %w", ref, err)
		}
		out.Pushed = append(out.Pushed, pushed)
	}
	if c.Bool("json") {
		return t.printJSON(out)
	}
	printResult(t, res, time.Since(start))
	for i, ref := range targets {
		t.printf("pushed    %s %s\n", ref, out.Pushed[i].Manifest)
	}
	return nil
}

// convertBuilt brings a built image into the store: from podman's files, or from what
// podman saves of it.
func convertBuilt(ctx context.Context, t *term, c *cli.Context, b *podmanext.Builder, id string, o converter.Options) (*converter.Result, error) {
	st, err := openStore(t, c)
	if err != nil {
		return nil, err
	}
	open := func() (*store.Store, error) { return st, nil }
	find := func() (*podmanext.LocalImage, error) { return b.Local(ctx, id) }
	if res, err := fromPodman(ctx, t, open, find, true, o); res != nil || err != nil {
		return res, err
	}
	dir, err := os.MkdirTemp(largeTemp(), "particle-build-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "image.tar")
	if err := b.Save(ctx, id, path); err != nil {
		return nil, err
	}
	archive, err := registry.Open(ctx, registry.Ref{Transport: registry.OCIArchive, Path: path}, nil)
	if err != nil {
		return nil, err
	}
	defer archive.Close()
	p := t.newProgress()
	defer p.stop()
	o.Progress = p
	return converter.Convert(ctx, archive, st, o)
}

// pushBuilt gives an image of the store to a registry.
func pushBuilt(ctx context.Context, t *term, c *cli.Context, digest string, ref registry.Ref) (*converter.ExportResult, error) {
	ro, err := registryOptions(c)
	if err != nil {
		return nil, err
	}
	st, err := readStore(t, c)
	if err != nil {
		return nil, err
	}
	s, err := converter.Find(st, digest)
	if err != nil {
		return nil, err
	}
	return exportTo(ctx, t, ref, ro, func(ctx context.Context, target converter.Target, p converter.Progress) (*converter.ExportResult, error) {
		return converter.Export(ctx, st, s, target, converter.ExportOptions{Compression: c.String("compression"), Progress: p})
	})
}
