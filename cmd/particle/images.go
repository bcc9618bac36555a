package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/hostdeploy"
)

func newImagesCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:  "images",
		Usage: "list the images of the store",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "print the list as JSON"}},
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			st, err := readStore(t, c)
			if err != nil {
				return err
			}
			all, err := converter.List(st)
			if err != nil {
				return err
			}
			if c.Bool("json") {
				if all == nil {
					all = []*converter.Stored{}
				}
				return t.printJSON(all)
			}
			w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tMANIFEST\tLAYERS\tSIZE\tCREATED\tIMAGES")
			for _, s := range all {
				if s.Damage != "" {
					t.warnf("%s", s.Damage)
				}
				names := s.Names
				if len(names) == 0 {
					names = []string{"<none>"}
				}
				var kinds []string
				if s.Damage != "" {
					kinds = []string{"damaged"}
				}
				for _, k := range converter.Kinds {
					if _, ok := s.Images[k.String()]; ok {
						kinds = append(kinds, k.String())
					}
				}
				for _, name := range names {
					fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\n", name, s.Manifest.Hex[:12], len(s.Layers), size(s.Size), date(s.Created), strings.Join(kinds, ","))
				}
			}
			return w.Flush()
		},
	}
}

// date prints when an image was made; many builders leave that out.
func date(t time.Time) string {
	if t.Unix() <= 0 {
		return "-"
	}
	return t.UTC().Format("2006-01-02 15:04")
}

func newInspectCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:        "inspect",
		Usage:       "show the manifest, the config and the digests of an image",
		ArgsUsage:   "NAME",
		Description: "The result is JSON. --manifest and --config print the very bytes that were converted.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "manifest", Usage: "print the manifest alone"},
			&cli.BoolFlag{Name: "config", Usage: "print the config alone"},
			&cli.BoolFlag{Name: "json", Usage: "print JSON (always done)"},
		},
		Action: func(c *cli.Context) error {
			s, err := findImage(t, c)
			if err != nil {
				return err
			}
			switch {
			case c.Bool("manifest"):
				_, err = t.out.Write(s.RawManifest)
			case c.Bool("config"):
				_, err = t.out.Write(s.RawConfig)
			default:
				err = t.printJSON(struct {
					*converter.Stored
					ManifestJSON json.RawMessage `json:"manifestContent"`
					ConfigJSON   json.RawMessage `json:"configContent"`
				}{s, s.RawManifest, s.RawConfig})
			}
			return err
		},
	}
}

// findImage returns the image that a verb's only argument names.
func findImage(t *term, c *cli.Context) (*converter.Stored, error) {
	if c.NArg() != 1 {
		return nil, usagef("%s takes one NAME, got %d arguments", c.Command.Name, c.NArg())
	}
	st, err := readStore(t, c)
	if err != nil {
		return nil, err
	}
	return converter.Find(st, c.Args().First())
}

func newRmCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:        "rm",
		Usage:       "remove images from the store",
		ArgsUsage:   "NAME...",
		Description: "A tag is removed by its name, all tags of an image by a digest. Disk is freed by\nparticle store gc.",
		Flags:       []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "print the removed names as JSON"}},
		Action: func(c *cli.Context) error {
			if c.NArg() == 0 {
				return usagef("rm takes the NAMEs of images, got none")
			}
			all := []string{}
			st, err := readStore(t, c)
			if err != nil {
				return err
			}
			for _, name := range c.Args().Slice() {
				if err := notDeployed(st, name); err != nil {
					return err
				}
				removed, err := converter.Remove(st, name)
				if err != nil {
					return fmt.Errorf("removing %s: %w", name, err)
				}
				if len(removed) == 0 {
					t.infof("image %s has no name: particle store gc removes it", name)
				}
				all = append(all, removed...)
			}
			if c.Bool("json") {
				return t.printJSON(all)
			}
			for _, tag := range all {
				t.printf("%s\n", tag)
			}
			return nil
		},
	}
}

// notDeployed refuses to take away the names by which a host keeps what it boots.
func notDeployed(st *store.Store, name string) error {
	s, err := converter.Find(st, name)
	if err != nil {
		return nil // removing says what is wrong
	}
	for _, n := range s.Names {
		// By a tag only that name goes, by a digest all of them.
		if id, ok := hostdeploy.DeploymentOf(n); ok && (n == name || !slices.Contains(s.Names, name)) {
			return fmt.Errorf("removing %s: %w: %s; particle hostdeploy gc removes it once it is not needed", name, hostdeploy.ErrInUse, hostdeploy.ShortID(id))
		}
	}
	return nil
}
