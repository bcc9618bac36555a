package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter"
	podmanext "github.com/particle-os/particle/podman-ext"
	"github.com/particle-os/particle/registry"
)

func newLayerStoreCommand(t *term) *cli.Command {
	dirs := func() []cli.Flag {
		return []cli.Flag{
			&cli.StringFlag{Name: "dir", Value: podmanext.LayerStoreDir, Usage: "the `DIR`ectory that podman's storage.conf names"},
			&cli.StringFlag{Name: "mounts", Value: podmanext.LayerMountsDir, Usage: "mount layers below this `DIR`ectory"},
		}
	}
	return &cli.Command{
		Name:  "layer-store",
		Usage: "give podman the layers of the store, fetching those that are missing",
		Description: "Runs until it is stopped. podman uses it when storage.conf has, under\n" +
			"[storage.options],\n\n" +
			"    additionallayerstores = [\"" + podmanext.LayerStoreDir + ":ref\"]\n\n" +
			"Credentials are those of podman login for root.",
		Flags: append(dirs(), registryFlags()...),
		Subcommands: []*cli.Command{
			{
				Name:      "tree",
				Usage:     "write the layers of images that the store has into the directory, for podman without the service",
				ArgsUsage: "[NAME...]",
				Description: "Without a NAME all images are taken whose name is a registry's reference in full.\n" +
					"The mounts do not outlive a boot: run this again.",
				Flags: append(dirs(),
					&cli.BoolFlag{Name: "blobs", Usage: "also write the layers' bytes, a second copy: podman push and save need them"},
					&cli.BoolFlag{Name: "json", Usage: "print the layers as JSON"}),
				Action: func(c *cli.Context) error { return layerTree(t, c) },
			},
			{
				Name:  "stop",
				Usage: "unmount what a killed service, or tree, has left mounted; running containers keep their files",
				Flags: dirs(),
				Action: func(c *cli.Context) error {
					if err := noArgs(c); err != nil {
						return err
					}
					return podmanext.UnmountLayers(c.String("dir"), c.String("mounts"))
				},
			},
		},
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return usagef("layer-store takes tree, stop or nothing, not %q", c.Args().First())
			}
			return serveLayers(t, c)
		},
	}
}

// openLayers opens the layer store of --dir over the store of --store.
func openLayers(t *term, c *cli.Context, source podmanext.Source) (*podmanext.LayerStore, error) {
	st, err := openStore(t, c)
	if err != nil {
		return nil, err
	}
	level := slog.LevelInfo
	if t.quiet {
		level = slog.LevelWarn
	}
	return podmanext.OpenLayerStore(podmanext.LayerStoreOptions{
		Dir: c.String("dir"), Mounts: c.String("mounts"), Store: st, Source: source,
		Log: slog.New(slog.NewTextHandler(t.err, &slog.HandlerOptions{Level: level, ReplaceAttr: withoutTime})),
	})
}

// withoutTime drops the time of a log line under systemd, whose journal has its own.
func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey && len(groups) == 0 && os.Getenv("JOURNAL_STREAM") != "" {
		return slog.Attr{}
	}
	return a
}

// checkPodman refuses a podman that layer stores do not work with, and warns of one that
// needs care.
func checkPodman(t *term, c *cli.Context) error {
	warning, err := podmanext.CheckPodman(c.Context)
	if warning != "" {
		t.warnf("%s", warning)
	}
	return err
}

func serveLayers(t *term, c *cli.Context) error {
	ro, err := registryOptions(c)
	if err != nil {
		return err
	}
	if err := checkPodman(t, c); err != nil {
		return err
	}
	layers, err := openLayers(t, c, registrySource{ro})
	if err != nil {
		return err
	}
	front, err := layers.Serve()
	if err != nil {
		return errors.Join(err, layers.Close())
	}
	t.infof("serving %d layers to podman on %s", len(layers.List()), c.String("dir"))
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		t.warnf("telling systemd: %v", err)
	}
	gone := make(chan struct{})
	go func() {
		front.Wait()
		close(gone)
	}()
	select {
	case <-c.Context.Done():
		return errors.Join(front.Close(), layers.Close())
	case <-gone:
		return errors.Join(fmt.Errorf("%s was unmounted", c.String("dir")), layers.Close())
	}
}

func layerTree(t *term, c *cli.Context) error {
	names := c.Args().Slice()
	if err := checkPodman(t, c); err != nil {
		return err
	}
	layers, err := openLayers(t, c, nil)
	if err != nil {
		return err
	}
	defer layers.Detach()
	if len(names) == 0 {
		st, err := readStore(t, c)
		if err != nil {
			return err
		}
		images, err := converter.List(st)
		if err != nil {
			return err
		}
		for _, img := range images {
			for _, name := range img.Names {
				if podmanext.IsReference(name) {
					names = append(names, name)
				}
			}
		}
	}
	for _, name := range names {
		if _, err := layers.Add(c.Context, name, c.Bool("blobs")); err != nil {
			return fmt.Errorf("giving %s to podman: %w", name, err)
		}
	}
	all := layers.List()
	if c.Bool("json") {
		return t.printJSON(all)
	}
	for _, l := range all {
		t.printf("%s %s %s\n", l.Ref, l.Digest, l.Verification)
	}
	return nil
}

// registrySource fetches for the layer store.
type registrySource struct{ options *registry.Options }

func (s registrySource) Open(ctx context.Context, ref string) (podmanext.SourceImage, error) {
	r, err := registry.ParseRef("docker://" + strings.TrimPrefix(ref, "docker://"))
	if err != nil {
		return nil, err
	}
	img, err := registry.Open(ctx, r, s.options)
	if err != nil {
		return nil, err // not a nil *registry.Image in an interface
	}
	return img, nil
}
